"""Draw a video chunk by chunk, with a method that says what each chunk sees of the past."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise

import torch
from hasten.errors import ConfigError
from hasten.streaming.policy import KVStream
from torch import Tensor

from hasten_zoo.sprites_stream.data import World, conditions
from hasten_zoo.sprites_stream.model import CausalVideoTransformer

__all__ = ["RollOut", "noise_levels", "roll_out", "rolled_chunks"]

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


def rolled_chunks(
    model: CausalVideoTransformer,
    worlds: Sequence[World],
    stream: KVStream,
    steps: int = 8,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Chunks `[B, chunk, 3, side, side]` in [-1, 1], one after another without end, by Euler steps.

    Nothing of a chunk is kept but what the stream keeps. Noise depends on the seed alone, so that methods can be
    compared image by image. Run under `torch.no_grad()` unless gradients are wanted.

    Args:
        stream: of `new_stream`; it is reset first.
        steps: forwards of each chunk, beside the clean pass.

    Raises:
        ConfigError: without worlds or steps.
    """
    if not worlds or steps < 1:
        raise ConfigError(f"expected at least one world and one step, got {len(worlds)} and {steps}")
    config = model.config
    stream.reset()
    generator = torch.Generator().manual_seed(seed)
    device = model.head.weight.device
    levels = noise_levels(steps)
    for first in count(0, config.chunk):
        words = torch.stack([conditions(world, first, config.chunk) for world in worlds]).to(device)
        shape = (len(worlds), config.chunk, 3, config.side, config.side)
        x = torch.randn(shape, generator=generator).to(device)
        for now, following in pairwise(levels):
            t = torch.full(words.shape[:2], now, device=device)
            x = x + (following - now) * model(x, t, words, stream, first)
        model(x, torch.zeros(words.shape[:2], device=device), words, stream, first, keep=True)
        yield x


def roll_out(
    model: CausalVideoTransformer,
    worlds: Sequence[World],
    stream: KVStream,
    frames: int = 48,
    steps: int = 8,
    seed: int = 0,
) -> RollOut:
    """Videos of these worlds, one batch; see `rolled_chunks`.

    Args:
        stream: of `new_stream`; it is reset first.
        frames: a multiple of the model's chunk.
        steps: forwards of each chunk, beside the clean pass.

    Raises:
        ConfigError: for another number of frames, no worlds or no steps.
    """
    chunk = model.config.chunk
    if frames % chunk or frames < chunk:
        raise ConfigError(f"expected frames in multiples of {chunk}, got {frames}")
    chunks, seconds = [], []
    coming = rolled_chunks(model, worlds, stream, steps, seed)
    for _ in range(frames // chunk):
        started = time.perf_counter()
        chunks.append(next(coming))
        seconds.append(time.perf_counter() - started)
    return RollOut((torch.cat(chunks, 1) / 2 + 0.5).clamp(0, 1), seconds)
