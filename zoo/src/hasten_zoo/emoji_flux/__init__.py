"""`emoji-flux`: FLUX.1 in small, text to 3-D emoji at 64x64 (16x16 tokens) or 32x32 (8x8 tokens)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hasten.bench.subject import Subject
from torch import Tensor

from hasten_zoo.emoji_flux.data import load_emoji_set

__all__ = ["certificates", "load_emoji_flux", "nearest_captions"]

WEIGHTS = Path(__file__).parent / "weights"
LEAP = Path(__file__).parent / "leap.safetensors"  # 4 to 16 evaluations, without guidance


def certificates() -> Path:
    """The folder with what `hasten certify` wrote about this model."""
    return Path(__file__).parent / "certificates"


def nearest_captions(images: Tensor) -> list[str]:
    """The caption of the training image nearest to each image (mean squared error over pixels).

    Args:
        images: `[B, 3, R, R]` in [0, 1], R a divisor of 64.
    """
    data = load_emoji_set()
    known = data.at(images.shape[-1]).flatten(1)
    flat = images.float().cpu().flatten(1)
    distances = (flat[:, None] - known[None]).square().mean(-1)
    return [data.captions[i] for i in distances.argmin(1).tolist()]


def _grade(images: Tensor, prompts: list[str]) -> list[bool]:
    return [caption == prompt for caption, prompt in zip(nearest_captions(images), prompts, strict=True)]


def load_emoji_flux(weights: Path = WEIGHTS) -> Subject:
    """The trained pipeline with its prompts; `weights` may be a folder written by the training script's `--export`."""
    from hasten_zoo.emoji_flux.model import load_pipeline

    pipe = load_pipeline(weights)
    captions = load_emoji_set().captions
    order = np.random.default_rng(0).permutation(len(captions))
    return Subject(
        name="emoji-flux",
        pipe=pipe,
        prompts=[captions[i] for i in order],
        call={"height": 64, "width": 64, "num_inference_steps": 50, "max_sequence_length": 8},
        grade=_grade,
        fitted={"leap": LEAP} if weights == WEIGHTS else {},
        sizes=((64, 64), (32, 32)),
        about="FLUX.1 in small: 3-D emoji from their names",
    )
