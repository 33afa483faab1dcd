"""Fixtures: a FLUX pipeline with random weights (small enough for hundreds of steps a second) and the trained one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor

from hasten import zoo
from hasten.zoo.emoji_flux.data import load_emoji_set
from hasten.zoo.emoji_flux.model import build_pipeline

Draw = Callable[..., Tensor]

# A busy machine is slow, and that is no error of the code.
hypothesis.settings.register_profile("hasten", deadline=None)
hypothesis.settings.load_profile("hasten")


def make_pipe(seed: int = 0) -> Any:
    """A `FluxPipeline` with random weights; the gates are opened so that blocks matter."""
    torch.manual_seed(seed)
    data = load_emoji_set()
    pipe = build_pipeline(data.captions, data.pictures, width=32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, steps: int = 12, prompt: Any = "red apple", seed: int = 0, **kwargs: Any) -> Tensor:
    """Final latents of one call at 32x32 pixels."""
    arguments = {"height": 32, "width": 32, "output_type": "latent", "max_sequence_length": 8, **kwargs}
    arguments.setdefault("generator", torch.Generator().manual_seed(seed))
    return pipe(prompt, num_inference_steps=steps, **arguments).images


@pytest.fixture
def pipe() -> Any:
    return make_pipe()


@pytest.fixture(scope="session")
def emoji() -> zoo.ReferenceModel:
    model = zoo.load("emoji-flux")
    model.pipe.set_progress_bar_config(disable=True)
    return model
