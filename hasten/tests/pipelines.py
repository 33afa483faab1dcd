"""A FLUX pipeline with random weights, and one call of it.

They stand here and not in `conftest.py` because both projects have a file of that name and one test run collects both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from hasten_zoo.emoji_flux.data import load_emoji_set
from hasten_zoo.emoji_flux.model import build_pipeline
from torch import Tensor


def make_pipe(seed: int = 0) -> Any:
    """A `FluxPipeline` with random weights; the gates are opened so that blocks matter."""
    torch.manual_seed(seed)
    data = load_emoji_set()
    pipe = build_pipeline(data.captions, data.images, width=32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def own_tokenizers(pipe: Any) -> dict[str, Any]:
    """Copies of the tokenizers of a pipeline, as its components.

    A fast tokenizer keeps padding and truncation as state, so that pipelines on two threads must not share one.
    """
    return {name: copy.deepcopy(part) for name, part in pipe.components.items() if name.startswith("tokenizer")}


def asking(pipe: Any, call: Callable[[], Any], answers: list[Tensor] | None = None) -> Callable[..., Any]:
    """A callback that asks the transformer itself, after every step, what `call` asked it first; keeps the answers."""
    asked: list[dict[str, Any]] = []
    looking = pipe.transformer.register_forward_pre_hook(lambda *given: asked.append(given[2]), with_kwargs=True)
    call()
    looking.remove()

    def callback(_pipe: Any, _index: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            answer = pipe.transformer(**asked[0])[0]
        if answers is not None:
            answers.append(answer)
        return kwargs

    return callback


def draw(pipe: Any, steps: int = 12, prompt: Any = "red apple", seed: int = 0, **kwargs: Any) -> Tensor:
    """Final latents of one call at 32x32 pixels."""
    arguments = {"height": 32, "width": 32, "output_type": "latent", "max_sequence_length": 8, **kwargs}
    arguments.setdefault("generator", torch.Generator().manual_seed(seed))
    return pipe(prompt, num_inference_steps=steps, **arguments).images
