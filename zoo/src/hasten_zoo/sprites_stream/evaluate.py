"""Measure streaming methods and their parts on `sprites-stream`: time, work, likeness to the full history, drift.

    python -m hasten_zoo.sprites_stream.evaluate --json benchmarks/sprites-stream.json --worlds 8

The comparators of `hasten bench --model sprites-stream`, and besides Focused Forcing without each of its parts. Budgets
by importance are fitted first, and written beside the weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from hasten.bench.streams import DEFAULT_METHODS, StreamSettings, parse_streaming, run_streams
from hasten.fitting.importance import masked_importance
from hasten.streaming import FocusedForcing, FullHistory, HeadBudgets, StreamingMethod

from hasten_zoo.command import at_least_one, told
from hasten_zoo.sprites_stream.model import CausalVideoTransformer, load_model, new_stream
from hasten_zoo.sprites_stream.reference import WEIGHTS, load_sprites_stream, worlds_of
from hasten_zoo.sprites_stream.rollout import roll_out

__all__ = ["ablations", "fitted_budgets", "head_importance"]

BUDGET = 6  # frames of history, a quarter of the mean history of 48 frames
TOKENS = 64  # all of a frame; with `choice="frame"` and nothing forgotten it is release 0.1.0's default


def head_importance(model: CausalVideoTransformer, frames: int, steps: int, seed: int = 0) -> torch.Tensor:
    """Masked importance of every head on one world, `[layers, heads]`: one rollout for each head."""
    world = worlds_of(10_000 + seed)

    def rollout(gates: torch.Tensor) -> torch.Tensor:
        stream = new_stream(model, FullHistory())
        stream.gates = gates
        return roll_out(model, world, stream, frames, steps, seed).video

    return masked_importance(rollout, model.config.layers, model.config.heads)


def ablations(budget: int, budgets: HeadBudgets | None) -> dict[str, StreamingMethod]:
    """What each part of Focused Forcing gives."""
    arms: dict[str, StreamingMethod] = {
        "as in 0.1.0": FocusedForcing(
            budget=budget, choice="frame", diversity_tokens=TOKENS, forget_after=None, keep_first=False
        ),
        "choice per frame, nothing forgotten": FocusedForcing(
            budget=budget, choice="frame", diversity_tokens=TOKENS, forget_after=None
        ),
        "choice per frame": FocusedForcing(budget=budget, choice="frame"),
        "choice of all frames": FocusedForcing(budget=budget, choice="union"),
        "choice by the mean": FocusedForcing(budget=budget, choice="mean"),
        "nothing forgotten": FocusedForcing(budget=budget, forget_after=None),
        "forgotten after a chunk": FocusedForcing(budget=budget, forget_after=1),
        "no diversity": FocusedForcing(budget=budget, mix=1.0),
        "diversity alone": FocusedForcing(budget=budget, mix=0.0),
        "diversity of all tokens": FocusedForcing(budget=budget, diversity_tokens=TOKENS),
        "diversity on cached keys": FocusedForcing(budget=budget, diversity_on="cached"),
        "chosen anew each step": FocusedForcing(budget=budget, refresh_every=1),
        "first frame not kept": FocusedForcing(budget=budget, keep_first=False),
    }
    if budgets is not None:
        arms["importance budgets"] = FocusedForcing(budget=budgets)
    return arms


def fitted_budgets(model: CausalVideoTransformer, frames: int, steps: int, budget: int) -> HeadBudgets:
    """Budgets by masked importance with a given mean."""
    facts = {"model": "sprites-stream", "chunk": model.config.chunk, "frames": frames}
    importance = head_importance(model, frames, steps)
    return HeadBudgets.with_mean(importance, budget, min(2, budget), 2 * budget, facts=facts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--json", type=Path, default=Path("out/sprites-stream.json"))
    parser.add_argument("--worlds", type=at_least_one, default=8)
    parser.add_argument("--frames", type=int, default=48)
    parser.add_argument("--steps", type=at_least_one, default=8)
    args = parser.parse_args(arguments)
    file = args.weights / "budgets.json"
    if not file.exists():
        fitted_budgets(load_model(args.weights), args.frames, args.steps, BUDGET).save(file)
    methods: Mapping[str, StreamingMethod] = {text: parse_streaming(text) for text in DEFAULT_METHODS}
    methods = {**methods, **ablations(BUDGET, HeadBudgets.load(file))}
    settings = StreamSettings(args.worlds, args.frames, args.steps)
    run_streams(
        load_sprites_stream(args.weights), methods, settings, args.json, lambda i, n, name: print(f"{i}/{n} {name}")
    )


if __name__ == "__main__":
    told(main)
