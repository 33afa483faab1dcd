"""`sprites-stream` as a reference model: worlds to roll out, and grades of what comes of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from random import Random

import torch
from hasten.bench.rollout import Rolled, RollOut
from hasten.bench.subject import StreamingSubject
from hasten.streaming.method import StreamingMethod

from hasten_zoo.sprites_stream.data import World, random_world
from hasten_zoo.sprites_stream.grade import grade
from hasten_zoo.sprites_stream.model import CausalVideoTransformer, load_model, new_stream
from hasten_zoo.sprites_stream.rollout import roll_out

__all__ = ["WEIGHTS", "load_sprites_stream", "rollout", "worlds_of"]

WEIGHTS = Path(__file__).parent / "weights"


def worlds_of(seed: int, count: int = 1) -> list[World]:
    """Worlds of pairs that training left out."""
    rng = Random(1000 + seed)
    return [random_world(rng, held_out=True) for _ in range(count)]


def rollout(model: CausalVideoTransformer, frames: int, steps: int, graded: bool = True) -> RollOut:
    """Rolls out the world of a seed and grades it, for `measure`."""

    @torch.no_grad()
    def roll(method: StreamingMethod, seed: int) -> Rolled:
        stream = new_stream(model, method, timed=True)
        worlds = worlds_of(seed)
        result = roll_out(model, worlds, stream, frames, steps, seed)
        grades = [grade(w, v) for w, v in zip(worlds, result.video, strict=True)] if graded else []
        return Rolled(result.video, result.chunk_seconds, stream.stats(), grades)

    return roll


def load_sprites_stream(weights: Path = WEIGHTS) -> StreamingSubject:
    """The trained model.

    Raises:
        ModelError: if the files are missing or damaged.
    """
    about = "a causal video model in small: worlds of moving sprites"
    return StreamingSubject("sprites-stream", partial(rollout, load_model(weights)), about)
