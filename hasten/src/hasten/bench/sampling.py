"""One call of a pipeline, timed and counted: how long it took, and how many steps were really computed."""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from hasten import models
from hasten.bench.edits import source_arguments
from hasten.bench.subject import Subject
from hasten.models.probe import require_stacks
from hasten.pipeline.handle import Acceleration
from hasten.pipeline.view import denoisers

__all__ = [
    "Attach",
    "Sample",
    "call_arguments",
    "count_flops",
    "counted_layer",
    "counting",
    "draw_sample",
    "flop_counter",
    "plain",
]

ATTENTION = (  # kernels of CPUs, of Apple's devices, and of back-ends that bring their own
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_attention_math_for_mps",
    "_scaled_dot_product_fused_attention_overrideable",
)
Attach = Callable[[Any], AbstractContextManager[Acceleration | None]]


@contextmanager
def plain(pipe: Any) -> Iterator[None]:
    """Leaves the pipeline as it is."""
    yield


@dataclass(frozen=True)
class Sample:
    """One image or clip and what it cost.

    Attributes:
        image: `[3, H, W]`, or the frames `[F, 3, H, W]`, in [0, 1], on the CPU.
        latents: after each step, on the CPU.
        seconds: wall-clock time of the pipeline's call.
        cache_bytes: most bytes of features held at once; None where the library does not tell.
        layer_calls: calls of the counted layer, all transformers together.
        forwards: calls of the transformers.
        plan: the grids of the stages, where a method with stages planned them.
    """

    image: Tensor
    latents: list[Tensor]
    seconds: float
    cache_bytes: int | None
    layer_calls: int
    forwards: int
    plan: str = ""


def counted_layer(model: nn.Module) -> str:
    """Name of the layer whose calls tell how many steps are computed: a linear one in the last block but one.

    Methods may run the first block at every step (to decide) or the last one (to verify), never the one before it. In
    the block it is a layer of the attention, because some libraries cache nothing else.
    """
    host = models.find(model)
    stacks = [stack.name for stack in host.used(model)] if host is not None else require_stacks(model)
    blocks = [f"{name}.{child}" for name in stacks for child, _ in model.get_submodule(name).named_children()]
    block = blocks[-2] if len(blocks) > 2 else blocks[-1]
    linear = [name for name, module in model.get_submodule(block).named_modules() if isinstance(module, nn.Linear)]
    chosen = next((name for name in linear if "attn" in name), linear[-1] if linear else "")
    return f"{block}.{chosen}" if chosen else block


@contextmanager
def counting(pipe: Any, attach: Attach) -> Iterator[tuple[Acceleration | None, Counter[str]]]:
    """Switch an arm on and count the calls of the transformers and of their counted layers."""
    models = {name: getattr(pipe, name) for name in denoisers(pipe)}
    names = {name: counted_layer(model) for name, model in models.items()}
    # hasten's arms put proxies into the model itself, the peers' arms put a copy in its place: where the model is
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


def call_arguments(model: Subject, prompts: Sequence[str], call: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call for some prompts, apart from the prompts themselves.

    Args:
        model: its own arguments are the defaults; one with edits gets the source images of the prompts.
        prompts: of the call.
        call: the user's arguments. `true_cfg_scale` becomes `guidance_scale` where a pipeline calls it so.
    """
    known = inspect.signature(type(model.pipe).__call__).parameters
    given = dict(call)
    if "true_cfg_scale" in given and "true_cfg_scale" not in known:
        given["guidance_scale"] = given.pop("true_cfg_scale")
    arguments = {**model.call, **given}
    if "max_area" in known and {"height", "width"} <= arguments.keys():  # or the pipeline would draw at its own size
        arguments["max_area"] = arguments["height"] * arguments["width"]
    return arguments | source_arguments(model, prompts, arguments)


def _held(acceleration: Acceleration | None) -> int | None:
    """Most bytes of features that a cache held; 0 for stages without one, None where nothing is known."""
    if acceleration is None:
        return None
    return acceleration.summary().cache_bytes if acceleration.engines else 0


def _plan(acceleration: Acceleration | None) -> str:
    plans = getattr(acceleration.stages, "plans", None) if acceleration is not None else None
    return str(plans[-1]) if plans else ""


def draw_sample(model: Subject, attach: Attach, steps: int, prompt: str, seed: int, call: dict[str, Any]) -> Sample:
    """Draw one prompt: an image, an edited image, or a clip.

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

    arguments = call_arguments(model, [prompt], call) | {"num_inference_steps": steps, "output_type": "pt"}
    generator = torch.Generator("cpu").manual_seed(seed)
    with counting(model.pipe, attach) as (acceleration, counts):
        _sync()
        started = time.perf_counter()
        output = model.pipe(prompt=prompt, generator=generator, callback_on_step_end=keep, **arguments)
        _sync()
        seconds = time.perf_counter() - started
        held, plan = _held(acceleration), _plan(acceleration)
    drawn = output.frames if hasattr(output, "frames") else output.images
    return Sample(
        image=drawn[0].float().cpu(),
        latents=[x.float().cpu() for x in latents],
        seconds=seconds,
        cache_bytes=held,
        layer_calls=counts["layer"],
        forwards=counts["forward"],
        plan=plan,
    )


def flop_counter() -> FlopCounterMode:
    """Counts operations of matrix products, convolutions and attention, on CPUs too.

    PyTorch's counter knows the kernels of CUDA alone (2.13); attention in others would be counted as nothing.
    """
    others = [getattr(torch.ops.aten, name) for name in ATTENTION if hasattr(torch.ops.aten, name)]
    return FlopCounterMode(display=False, custom_mapping=dict.fromkeys(others, _attention_flops))


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def count_flops(
    model: Subject, attach: Attach, steps: int, prompt: str, seed: int, call: dict[str, Any]
) -> tuple[int, Sample]:
    """Operations (matrix products, attention) of one whole call, and its result; also serves as a warm-up."""
    with flop_counter() as counter:
        sample = draw_sample(model, attach, steps, prompt, seed, call)
    return int(counter.get_total_flops()), sample
