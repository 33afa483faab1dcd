"""What a benchmark's measurements say: modes against each other, strengths, gaps, verdicts, defences, curves.

All intervals are those of `drape.statistics`, over walks and seeds, paired where the same walks are compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drape.errors import ConfigError
from drape.scene.scene import Scene
from drape.statistics import interval, paired, within

__all__ = [
    "HIGHER_IS_STRONGER",
    "METRICS",
    "compare",
    "curve",
    "defence_cost",
    "gaps",
    "intervals",
    "same_verdict",
    "separation",
    "walks_needed",
]

HIGHER_IS_STRONGER = {
    "area": -1,
    "recall": -1,
    "sequence_success_50": 1,
    "sequence_success_10": 1,
    "longest_run": -1,
    "track_recall": -1,
}
METRICS = tuple(HIGHER_IS_STRONGER)
Results = Mapping[str, Mapping[str, Any]]


def by_walk(results: Results, names: Sequence[str], metric: str) -> NDArray[np.float64]:
    """One metric of some textures, `[textures, walks]`."""
    return np.array([results[name]["by_walk"][metric] for name in names])


def compare(results: Results, seeds: Sequence[int], baseline: str, mode: str = "sequence") -> dict[str, Any]:
    """One mode against another: each seed, means, and the gain with its interval.

    Args:
        results: metrics by "MODE-SEED" and "BASELINE-SEED".

    Returns:
        for each of `METRICS`; a gain above 0 means that `mode` is the stronger attack.
    """
    rows: dict[str, Any] = {}
    for metric, sign in HIGHER_IS_STRONGER.items():
        each = {m: by_walk(results, [f"{m}-{seed}" for seed in seeds], metric) for m in (mode, baseline)}
        by_seed = sign * (each[mode].mean(axis=1) - each[baseline].mean(axis=1))
        rows[metric] = {
            **{m: values.mean(axis=1).tolist() for m, values in each.items()},
            "mean": {m: interval(values).plain() for m, values in each.items()},
            "gain": paired(sign * each[mode], sign * each[baseline]).plain(),
            "seeds_won": int((by_seed > 0).sum()),
            "seeds_lost": int((by_seed < 0).sum()),
        }
    return rows


def intervals(results: Results, groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Each metric of each group of textures (one for a control, one per seed for a mode), with its interval."""
    return {
        group: {metric: interval(by_walk(results, names, metric)).plain() for metric in METRICS}
        for group, names in groups.items()
    }


def separation(results: Results, groups: Mapping[str, Sequence[str]], metric: str = "area") -> dict[str, Any]:
    """Whether textures of different strength are told apart.

    Args:
        groups: the textures of each strength, the weakest first.

    Returns:
        strengths: for each group its interval, the one without the walks' own differences (`within`), and what it is
        stronger by than the group before, paired.
        apart: whether all the intervals within walks have nothing in common with their neighbours'.
        steps_above_zero: whether every step's paired interval lies above 0.
    """
    values = {name: by_walk(results, names, metric) for name, names in groups.items()}
    inner, sign = within(values), HIGHER_IS_STRONGER[metric]
    names, rows = list(values), {}
    for place, name in enumerate(names):
        rows[name] = {"interval": interval(values[name]).plain(), "within": inner[name].plain()}
        if place:  # groups may have other seeds, so each walk's mean over seeds is compared
            here, before = (sign * values[n].mean(axis=0, keepdims=True) for n in (name, names[place - 1]))
            rows[name]["step"] = paired(here, before).plain()
    neighbours = list(itertools.pairwise(names))
    return {
        "metric": metric,
        "strengths": rows,
        "apart": all(inner[a].apart(inner[b]) for a, b in neighbours),
        "steps_above_zero": all(rows[b]["step"]["low"] > 0 for _, b in neighbours),
    }


def same_verdict(results: Results, names: Sequence[str], cut: float = 0.5) -> float:
    """Share of the walks on which all textures have the same verdict: missed, or seen in a share `cut` of frames."""
    verdicts = by_walk(results, names, "recall") < cut
    return float((verdicts.min(axis=0) == verdicts.max(axis=0)).mean())


def walks_needed(results: Results, first: Sequence[str], second: Sequence[str], metric: str = "area") -> int:
    """How many walks unpaired intervals of two groups of textures would need to lie apart.

    That is, if walks went on to differ as these do and the difference stayed, until the half widths, 1.96 deviations /
    sqrt(W), add up to it.
    """
    means = [by_walk(results, names, metric).mean(axis=0) for names in (first, second)]
    difference = abs(means[0].mean() - means[1].mean())
    wide = 1.96 * sum(values.std(ddof=1) for values in means)
    return int(np.ceil((wide / max(difference, 1e-9)) ** 2))


def gaps(test: Results, train: Results, groups: Mapping[str, Sequence[str]], clean: str) -> dict[str, Any]:
    """From the walks of the optimisation to the held-out ones, for each group of textures.

    `gap` is the recall on held-out walks less that on the training walks; `beyond_clean` is what of it the control
    `clean`, which nobody optimised, does not have too. The walks are others, so the intervals are not paired: they
    are of a bootstrap of either side.
    """
    rows: dict[str, Any] = {}
    clean_gap = interval(by_walk(test, [clean], "recall")).mean - interval(by_walk(train, [clean], "recall")).mean
    for group, names in groups.items():
        known = [name for name in names if name in train]
        if known:
            here, there = (interval(by_walk(side, known, "recall")) for side in (test, train))
            gap = here.mean - there.mean
            rows[group] = {
                "test": here.plain(),
                "train": there.plain(),
                "gap": gap,
                "beyond_clean": gap - clean_gap,
            }
    return rows


def defence_cost(bare: Results, behind: Results, clean: str, attack: str) -> dict[str, Any]:
    """What a defence restores and costs on each walk, with paired intervals.

    Args:
        bare, behind: metrics without and with it, of the textures `clean` and `attack`.
    """
    rows = {}
    for metric in ("area", "recall", "sequence_success_50", "longest_run"):
        here, before = (-HIGHER_IS_STRONGER[metric] * by_walk(r, [attack], metric) for r in (behind, bare))
        rows[f"{metric}_restored"] = paired(here, before).plain()
    for metric in ("ap50", "false_boxes", "recall"):
        here, before = (by_walk(r, [clean], metric) for r in (behind, bare))
        rows[f"clean_{metric}_change"] = paired(here, before).plain()
    return rows


def curve(
    curves: Mapping[str, Sequence[float]], places: Mapping[str, NDArray[np.float64]], edges: Sequence[float]
) -> list[dict[str, Any]]:
    """Mean confidence in bins of a property that each frame has, with an interval over the walks that have such frames.

    Args:
        curves: confidences by walk.  places: the property of the same frames.  edges: of the bins, ascending.
    """
    if curves.keys() != places.keys() or len(edges) < 2 or list(edges) != sorted(edges):
        raise ConfigError(
            f"{len(curves)} walks, {len(places)} properties, edges {list(edges)}; expected the same walks."
        )
    rows = []
    for low, high in itertools.pairwise(edges):
        inside = {walk: (places[walk] >= low) & (places[walk] < high) for walk in curves}
        means = [float(np.asarray(curves[walk])[chosen].mean()) for walk, chosen in inside.items() if chosen.any()]
        found = interval([means]).plain() if means else None
        rows.append({"from": low, "to": high, "walks": len(means), "confidence": found})
    return rows


def distances(scenes: Sequence[Scene]) -> dict[str, NDArray[np.float64]]:
    """How far the person is from the camera in each frame, metres."""
    return {s.label: s.buffers.distance.double().numpy() for s in scenes}


def sides(scenes: Sequence[Scene]) -> dict[str, NDArray[np.float64]]:
    """Which side of the person each frame shows, degrees from -22.5 (the front) on."""
    return {s.label: ((s.buffers.azimuth.double() + 22.5) % 360 - 22.5).numpy() for s in scenes}
