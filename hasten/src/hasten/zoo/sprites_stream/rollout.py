"""Draw a video chunk by chunk, with a method that says what each chunk sees of the past."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hasten.errors import ConfigError
from hasten.streaming.kv_policy import KVStream
from hasten.zoo.sprites_stream.data import World, conditions
from hasten.zoo.sprites_stream.model import CausalVideoTransformer

__all__ = ["RollOut", "noise_levels", "roll_out"]

SHIFT = 3.0


@dataclass(frozen=True, eq=False)
class RollOut:
    """A finished video.

    Attributes:
        video: `[B, F, 3, side, side]` in [0, 1], float32.
        chunk_seconds: time for each chunk, its clean pass included.
    """

    video: Tensor
    chunk_seconds: list[float]


def noise_levels(steps: int, shift: float = SHIFT) -> list[float]:
    """`steps + 1` levels from 1 to 0, denser at the noisy end: `s t / (1 + (s - 1) t)`."""
    even = [1 - i / steps for i in range(steps + 1)]
    return [shift * t / (1 + (shift - 1) * t) for t in even]


def roll_out(
    model: CausalVideoTransformer,
    worlds: Sequence[World],
    stream: KVStream,
    frames: int = 48,
    steps: int = 8,
    seed: int = 0,
) -> RollOut:
    """Videos of these worlds, one batch, by Euler steps.

    Noise depends on the seed alone, so that methods can be compared picture by picture. Run under `torch.no_grad()`
    unless gradients are wanted.

    Args:
        stream: of `new_stream`; it is reset first.
        frames: a multiple of the model's chunk.
        steps: forwards of each chunk, beside the clean pass.

    Raises:
        ConfigError: for another number of frames or no steps.
    """
    config = model.config
    if frames % config.chunk or frames < config.chunk or steps < 1:
        raise ConfigError(
            f"expected frames in multiples of {config.chunk} and at least one step, got {frames} and {steps}"
        )
    stream.reset()
    generator = torch.Generator().manual_seed(seed)
    device = model.head.weight.device
    levels, chunks, seconds = noise_levels(steps), [], []
    for first in range(0, frames, config.chunk):
        started = time.perf_counter()
        words = torch.stack([conditions(world, first, config.chunk) for world in worlds]).to(device)
        shape = (len(worlds), config.chunk, 3, config.side, config.side)
        x = torch.randn(shape, generator=generator).to(device)
        for now, following in pairwise(levels):
            t = torch.full(words.shape[:2], now, device=device)
            x = x + (following - now) * model(x, t, words, stream, first)
        model(x, torch.zeros(words.shape[:2], device=device), words, stream, first, keep=True)
        chunks.append(x)
        seconds.append(time.perf_counter() - started)
    return RollOut((torch.cat(chunks, 1) / 2 + 0.5).clamp(0, 1), seconds)
