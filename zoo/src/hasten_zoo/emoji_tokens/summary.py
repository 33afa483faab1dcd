"""From the runs of `compare` to the figures of the documentation: means over the seeds, intervals, and steps to a goal.

Intervals are those of Student's t at 95 %. Differences to another vocabulary are taken seed by seed, as runs of a seed
share weights and images; one whose interval holds 0 is none that these seeds show.

The goal is the flat model's final quality: the mean over the seeds of the last point of its curves. `steps_to_flat` is,
for each seed, the first point of a curve that is at least as good, None if there is none; all runs share one learning
rate schedule, so that a run which is good early is so at a high learning rate.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from hasten.errors import ConfigError
from scipy.stats import t

__all__ = ["curves_of", "differences", "interval", "rates", "spread", "summary"]

MEASURES = ("frechet", "precision", "recall", "objects")
PREDICTION = ("loss", "loss_over_log_k", "entropy_over_log_k", "token_loss")
Run = dict[str, Any]


def spread(values: list[float]) -> dict[str, float]:
    """Mean, least and most."""
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}


def interval(values: list[float]) -> dict[str, float]:
    """`spread`, and the 95 % interval of the mean: `low`, `high`; infinite for a single value."""
    n = len(values)
    reach = float("inf") if n < 2 else float(t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)
    found = spread(values)
    return {**found, "low": found["mean"] - reach, "high": found["mean"] + reach}


def differences(runs: list[Run], one: str, other: str) -> dict[str, dict[str, float]]:
    """Figures of one vocabulary minus those of another, seed by seed, with their intervals.

    Raises:
        ConfigError: if no seed has both.
    """
    of = {(run["vocabulary"], run["seed"]): run for run in runs}
    seeds = [seed for seed in sorted({run["seed"] for run in runs}) if (one, seed) in of and (other, seed) in of]
    if not seeds:
        raise ConfigError(f"no seed has runs of both {one} and {other}; let `compare` run to its end first")

    def figures(run: Run) -> dict[str, float]:
        return {m: run["last"]["uniform"][m] for m in MEASURES} | {"token_loss": run["curve"][-1]["token_loss"]}

    pairs = [(figures(of[one, seed]), figures(of[other, seed])) for seed in seeds]
    return {m: interval([a[m] - b[m] for a, b in pairs]) for m in (*MEASURES, "token_loss")}


def rates(tuning: list[Run]) -> dict[str, dict[str, float]]:
    """For each vocabulary the Fréchet distance in the end by the learning rate that it was trained with."""
    found: dict[str, dict[str, float]] = {}
    for run in tuning:
        found.setdefault(run["vocabulary"], {})[f"{run['lr']:g}"] = run["curve"][-1]["frechet"]
    return found


def curves_of(runs: list[Run]) -> dict[str, list[list[Run]]]:
    """For each vocabulary the curves of its runs, in the order of the runs."""
    curves: dict[str, list[list[Run]]] = {}
    for run in runs:
        curves.setdefault(run["vocabulary"], []).append(run["curve"])
    return curves


def _reached(curve: list[Run], goal: float) -> int | None:
    """The first step whose Fréchet distance is not above the goal."""
    return next((row["step"] for row in curve if row["frechet"] <= goal), None)


def summary(runs: list[Run]) -> dict[str, Any]:
    """Figures of complete seeds.

    Args:
        runs: `comparison.json`'s, in any order.

    Returns:
        `seeds`, `goal` (the flat model's final Fréchet distance on the curves), and `vocabularies`: name -> figures.

    Raises:
        ConfigError: if no seed has all the vocabularies that there are, the flat one among them.
    """
    names = list(dict.fromkeys(run["vocabulary"] for run in runs))
    of = {(run["vocabulary"], run["seed"]): run for run in runs}
    seeds = [seed for seed in sorted({run["seed"] for run in runs}) if all((name, seed) in of for name in names)]
    if "flat" not in names or not seeds:
        raise ConfigError("no seed is complete, or the flat runs are missing; let `compare` run to its end first")
    goal = sum(of["flat", seed]["curve"][-1]["frechet"] for seed in seeds) / len(seeds)
    return {
        "seeds": seeds,
        "goal": goal,
        "vocabularies": {name: _of_one([of[name, seed] for seed in seeds], goal) for name in names},
    }


def _of_one(runs: list[Run], goal: float) -> dict[str, Any]:
    """Figures of a vocabulary's runs."""
    first = runs[0]
    steps = [_reached(run["curve"], goal) for run in runs]
    seconds = [next((r["cpu_seconds"] for r in run["curve"] if r["frechet"] <= goal), None) for run in runs]
    return {
        "clusters": first["clusters"],
        "largest_cluster": first["largest_cluster"],
        "parameters": first["parameters"],
        "lr": first["lr"],
        "cpu_seconds": spread([run["curve"][-1]["cpu_seconds"] for run in runs]),
        "seconds": spread([run["curve"][-1]["seconds"] for run in runs]),
        "steps_to_flat": steps,
        "cpu_seconds_to_flat": seconds,
        "drawn": {m: interval([run["last"]["uniform"][m] for run in runs]) for m in MEASURES},
        "members": {kind: interval([run["last"][kind]["frechet"] for run in runs]) for kind in first["last"]},
        "member_cpu_seconds": {
            kind: spread([run["last"][kind]["cpu_seconds"] for run in runs])
            for kind, figures in first["last"].items()
            if "cpu_seconds" in figures
        },
        "held_out": {m: interval([run["curve"][-1][m] for run in runs]) for m in PREDICTION},
        "frechet_curve": [
            {"step": rows[0]["step"], **spread([row["frechet"] for row in rows])}
            for rows in zip(*(run["curve"] for run in runs), strict=True)
        ],
    }
