"""Measure streaming methods on `sprites-stream`: time, work, likeness to the full history, drift.

    python -m hasten.zoo.sprites_stream.evaluate --weights hasten/src/hasten/zoo/sprites_stream/weights --worlds 8

Writes `evaluation.json`, the table `evaluation.md` and a video of the first world for each method into `--out`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

import torch

from hasten.streaming import DummyForcing, FocusedForcing, HeadBudgets, SlidingWindow, StreamingMethod, TopKAttention
from hasten.streaming.importance import masked_importance
from hasten.streaming.measure import Rolled, RollOut, markdown, measure
from hasten.streaming.methods import ForcingKV, FullHistory
from hasten.streaming.video import best_suffix, write_video
from hasten.zoo.sprites_stream.data import World, random_world
from hasten.zoo.sprites_stream.grade import grade
from hasten.zoo.sprites_stream.model import CausalVideoTransformer, load_model, new_stream
from hasten.zoo.sprites_stream.rollout import roll_out

__all__ = ["ablations", "comparators", "head_importance", "roller", "worlds_of"]

TOKENS = 16  # of the 64 of a frame; choosing by all of them costs 7 % of the attention time at this size


def worlds_of(seed: int, count: int = 1) -> list[World]:
    """Worlds of pairs that training left out."""
    rng = Random(1000 + seed)
    return [random_world(rng, held_out=True) for _ in range(count)]


def roller(model: CausalVideoTransformer, frames: int, steps: int, graded: bool = True) -> RollOut:
    """Rolls out the world of a seed and grades it, for `measure`."""

    @torch.no_grad()
    def roll(method: StreamingMethod, seed: int) -> Rolled:
        stream = new_stream(model, method)
        worlds = worlds_of(seed)
        result = roll_out(model, worlds, stream, frames, steps, seed)
        grades = [grade(w, v) for w, v in zip(worlds, result.video, strict=True)] if graded else []
        return Rolled(result.video, result.chunk_seconds, stream.stats(), grades)

    return roll


def head_importance(model: CausalVideoTransformer, frames: int, steps: int, seed: int = 0) -> torch.Tensor:
    """Masked importance of every head on one world, `[layers, heads]`: one rollout for each head."""
    world = worlds_of(10_000 + seed)

    def rollout(gates: torch.Tensor) -> torch.Tensor:
        stream = new_stream(model, FullHistory())
        stream.gates = gates
        return roll_out(model, world, stream, frames, steps, seed).video

    return masked_importance(rollout, model.config.layers, model.config.heads)


def comparators(budget: int) -> dict[str, StreamingMethod]:
    """The methods of the issue at the same mean budget."""
    return {
        "focused forcing": FocusedForcing(budget=budget, diversity_tokens=TOKENS),
        "sliding window": SlidingWindow(window=budget - 1, sink=1),
        "top-k attention": TopKAttention(k=budget),
        "dummy forcing": DummyForcing(local=1, history=2 * budget - 2),
        "forcing-kv": ForcingKV(),
    }


def ablations(budget: int, budgets: HeadBudgets | None) -> dict[str, StreamingMethod]:
    """What each part of Focused Forcing gives."""
    arms: dict[str, StreamingMethod] = {
        "choice per chunk": FocusedForcing(budget=budget, choice="chunk", diversity_tokens=TOKENS),
        "no diversity": FocusedForcing(budget=budget, mix=1.0),
        "diversity alone": FocusedForcing(budget=budget, mix=0.0, diversity_tokens=TOKENS),
        "diversity of all tokens": FocusedForcing(budget=budget),
        "diversity on cached keys": FocusedForcing(budget=budget, diversity_on="cached", diversity_tokens=TOKENS),
        "chosen anew each step": FocusedForcing(budget=budget, refresh_every=1, diversity_tokens=TOKENS),
        "first frame kept": FocusedForcing(budget=budget, keep_first=True, diversity_tokens=TOKENS),
    }
    if budgets is not None:
        arms["importance budgets"] = FocusedForcing(budget=budgets, diversity_tokens=TOKENS)
        arms["importance budgets per chunk"] = FocusedForcing(budget=budgets, choice="chunk", diversity_tokens=TOKENS)
    return arms


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=Path(__file__).parent / "weights")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--worlds", type=int, default=8)
    parser.add_argument("--frames", type=int, default=48)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument(
        "--budget", type=int, default=6, help="frames of history; a quarter of the mean history is 6 at 48"
    )
    parser.add_argument(
        "--budgets", type=Path, help="head budgets: read from here, or fitted and written here if missing"
    )
    args = parser.parse_args(arguments)
    model = load_model(args.weights)
    budgets = None
    if args.budgets:
        if not args.budgets.exists():
            facts = {"model": "sprites-stream", "chunk": model.config.chunk, "frames": args.frames}
            importance = head_importance(model, args.frames, args.steps)
            HeadBudgets.with_mean(importance, args.budget, min(2, args.budget), 2 * args.budget, facts=facts).save(
                args.budgets
            )
        budgets = HeadBudgets.load(args.budgets)
    methods = comparators(args.budget) | ablations(args.budget, budgets)
    rows = measure(roller(model, args.frames, args.steps), methods, range(args.worlds))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "evaluation.json").write_text(json.dumps([row.to_dict() for row in rows], indent=1), encoding="utf-8")
    (args.out / "evaluation.md").write_text(markdown(rows) + "\n", encoding="utf-8")
    for name, method in {"full history": FullHistory(), **comparators(args.budget)}.items():
        video = roller(model, args.frames, args.steps, graded=False)(method, 0).video[0]
        write_video(video, args.out / f"{name.replace(' ', '-')}{best_suffix()}", enlarge=6)


if __name__ == "__main__":
    main()
