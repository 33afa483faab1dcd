"""One call of a pipeline, timed and counted: how long it took, and how many steps were really computed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hasten import hosts
from hasten.acceleration import TRANSFORMERS, Acceleration
from hasten.hosts.probe import require_stacks
from hasten.zoo import ReferenceModel

__all__ = ["Attach", "Shot", "count_flops", "counted_layer", "plain", "shoot"]

Attach = Callable[[Any], AbstractContextManager[Acceleration | None]]


@contextmanager
def plain(pipe: Any) -> Iterator[None]:
    """Leaves the pipeline as it is."""
    yield


@dataclass(frozen=True)
class Shot:
    """One picture and what it cost.

    Attributes:
        picture: `[3, H, W]` in [0, 1], on the CPU.
        latents: after each step, on the CPU.
        seconds: wall-clock time of the pipeline's call.
        cache_bytes: most bytes of features held at once; None where the library does not tell.
        layer_calls: calls of the counted layer, all transformers together.
        forwards: calls of the transformers.
    """

    picture: Tensor
    latents: list[Tensor]
    seconds: float
    cache_bytes: int | None
    layer_calls: int
    forwards: int


def counted_layer(model: nn.Module) -> str:
    """Name of the layer whose calls tell how many steps are computed: a linear one in the last block but one.

    Methods may run the first block at every step (to decide) or the last one (to verify), never the one before it. In
    the block it is a layer of the attention, because some libraries cache nothing else.
    """
    host = hosts.find(model)
    stacks = [stack.name for stack in host.used(model)] if host is not None else require_stacks(model)
    blocks = [f"{name}.{child}" for name in stacks for child, _ in model.get_submodule(name).named_children()]
    block = blocks[-2] if len(blocks) > 2 else blocks[-1]
    linear = [name for name, module in model.get_submodule(block).named_modules() if isinstance(module, nn.Linear)]
    chosen = next((name for name in linear if "attn" in name), linear[-1] if linear else "")
    return f"{block}.{chosen}" if chosen else block


@contextmanager
def _counting(pipe: Any, attach: Attach) -> Iterator[tuple[Acceleration | None, Counter[str]]]:
    """Switch an arm on and count the calls of the transformers and of their counted layers."""
    found = {name: getattr(pipe, name, None) for name in TRANSFORMERS}
    models = {name: model for name, model in found.items() if isinstance(model, nn.Module)}
    names = {name: counted_layer(model) for name, model in models.items()}
    # hasten's arms put stand-ins into the model itself, the peers' arms put a copy in its place: where the model is
    # still the same, so is its layer, though perhaps not to be found under its name.
    layers = {name: model.get_submodule(names[name]) for name, model in models.items()}
    counts: Counter[str] = Counter()
    with attach(pipe) as acceleration, ExitStack() as stack:
        for name, model in models.items():
            live = getattr(pipe, name)
            layer = layers[name] if live is model else live.get_submodule(names[name])
            for kind, module in (("layer", layer), ("forward", live)):
                stack.callback(module.register_forward_pre_hook(lambda *_, kind=kind: counts.update([kind])).remove)
        yield acceleration, counts


def _sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def shoot(model: ReferenceModel, attach: Attach, steps: int, prompt: str, seed: int, call: dict[str, Any]) -> Shot:
    """Draw one prompt.

    Args:
        model: what draws.
        attach: switches on, for the length of the call, what is to be measured.
        steps: sampler steps.
        prompt: what to draw.
        seed: of the generator.
        call: further arguments of the pipeline's call.
    """
    latents: list[Tensor] = []

    def keep(_pipe: Any, _step: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        latents.append(kwargs["latents"])
        return kwargs

    arguments = {**model.call, **call, "num_inference_steps": steps, "output_type": "pt"}
    generator = torch.Generator("cpu").manual_seed(seed)
    with _counting(model.pipe, attach) as (acceleration, counts):
        _sync()
        started = time.perf_counter()
        pictures = model.pipe(prompt, generator=generator, callback_on_step_end=keep, **arguments).images
        _sync()
        seconds = time.perf_counter() - started
        held = acceleration.summary().cache_bytes if acceleration is not None else None
    return Shot(
        picture=pictures[0].float().cpu(),
        latents=[x.float().cpu() for x in latents],
        seconds=seconds,
        cache_bytes=held,
        layer_calls=counts["layer"],
        forwards=counts["forward"],
    )


def count_flops(
    model: ReferenceModel, attach: Attach, steps: int, prompt: str, seed: int, call: dict[str, Any]
) -> tuple[int, Shot]:
    """Operations (matrix products, attention) of one whole call, and its result; also serves as a warm-up."""
    with FlopCounterMode(display=False) as counter:
        shot = shoot(model, attach, steps, prompt, seed, call)
    return int(counter.get_total_flops()), shot
