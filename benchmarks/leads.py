"""Results that are gone on with, and how far an arm is ahead of others on the same prompts: for benchmarks with rows.

A row has the operations of an arm and its figures, a list per measure with a number for each prompt. Whether more is
better a measure's sign says: 1, or -1 where less is. Figures may lack a number (None), as that of what an edit has
left alone where it may change everything; such prompts are left out of the measure. An arm without figures has the
reason in their place: `refused` if it cannot run, `failed` after an error that nobody expected.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hasten.bench.environment import environment
from hasten.bench.plain import plain_samplers
from hasten.bench.subject import Subject
from hasten.io import write_atomically
from hasten.quality.metrics import PSNR_CEILING
from held_out import FAILS, check_asked, check_weights, is_settled, weights_of

RESAMPLES = 2000
ALIKE = 1e-6  # difference of operations that is none
FEW = 2  # steps of the plain sampler that tell, beside those of its full run, what every step costs

Row = dict[str, Any]
Figures = Mapping[str, Sequence[float | None]]


class Results:
    """Rows by the text of their arm in a JSON file, which is written whenever one is added.

    Args:
        file: may be there; what it has is not measured again.
        model: whose rows they are.
        asked: what else rows depend on, by name. Rows that were measured with something else end the program.
    """

    def __init__(self, file: Path, model: Subject, asked: Mapping[str, Any]) -> None:
        known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        check_weights(known, model, file)
        check_asked(known, asked, file, "--json")
        here = environment()
        self.file, self.commit = file, here["commit"]
        self.whole = known | {"weights": weights_of(model), "environment": here} | dict(asked)
        self.rows: dict[str, Row] = self.whole.setdefault("rows", {})

    def has(self, text: str) -> bool:
        """Whether an arm is not to be measured."""
        return is_settled(self.rows.get(text), self.commit)

    def add(self, text: str, flops: Sequence[int], figures: Figures, **more: Any) -> Row:
        """Write a new row, with the commit that it was measured on; the first one is the full run, to which the
        operations of all are compared. PSNR of identical images is the ceiling.

        Raises:
            ValueError: for figures that are not numbers; nothing is written.
        """
        own = float(np.mean(flops))
        base = next(iter(self.rows.values()))["flops"] if self.rows else own
        rounded = {
            name: [None if value is None else round(min(float(value), PSNR_CEILING), 5) for value in values]
            for name, values in figures.items()
        }
        if bad := [name for name, values in rounded.items() if not np.isfinite(_known(values)).all()]:
            raise ValueError(f"figures that are not finite: {', '.join(bad)}")
        means = {
            name: round(float(known.mean()), 4) for name, values in rounded.items() if len(known := _known(values))
        }
        row = {"flops": own, "ratio": base / own, **more, "figures": rounded, "means": means}
        return self._keep(text, row)

    def lack(self, text: str, kind: str, reason: str) -> Row:
        """Write why an arm has no figures, and print it; `kind` is `refused` or `failed`."""
        print(f"{text} {kind.upper()}: {reason}", flush=True)
        return self._keep(text, {kind: reason})

    def _keep(self, text: str, row: Row) -> Row:
        self.rows[text] = row | {"commit": self.commit}
        self.write()
        return self.rows[text]

    def write(self) -> None:
        """Write everything."""
        write_atomically(self.file, json.dumps(self.whole, indent=1) + "\n")


def _known(values: Sequence[float | None]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([value for value in values if value is not None], np.float64)


def paired(ahead: Sequence[float]) -> dict[str, Any]:
    """The mean of differences between two arms on the same prompts, and 95 % of a bootstrap over the prompts."""
    values = np.asarray(ahead, np.float64)
    means = np.random.default_rng(0).choice(values, (RESAMPLES, len(values))).mean(1)
    return {
        "mean": round(float(values.mean()), 4),
        "interval": [round(float(one), 4) for one in np.quantile(means, (0.025, 0.975))],
    }


def leads(row: Row, others: Mapping[str, Row], signs: Mapping[str, int]) -> dict[str, Any]:
    """By measure: the best of some other rows, and how far a row is ahead of it, above 0 where it is better.

    Args:
        row: whose lead it is.
        others: rows of the same prompts.
        signs: of the measures. What has none of one (the full run has no distance to itself) is left out of it, and
            so is a measure of which both have figures on no prompt.
    """
    found: dict[str, Any] = {}
    for name, sign in signs.items():
        known = {
            label: float(other["means"][name]) for label, other in others.items() if name in other.get("means", {})
        }
        if name not in row["means"] or not known:
            continue
        best = max(known, key=lambda label: sign * known[label])
        pairs = zip(row["figures"][name], others[best]["figures"][name], strict=True)
        ahead = [sign * (own - other) for own, other in pairs if own is not None and other is not None]
        if ahead:
            found[name] = {"best": best, **paired(ahead)}
    return found


def nearest(row: Row, others: Mapping[str, Row]) -> str | None:
    """Of other rows that cost at least as much as a row, the one that costs least; None if all cost less."""
    costly = {label: other["flops"] for label, other in others.items() if other["flops"] >= (1 - ALIKE) * row["flops"]}
    return min(costly, key=lambda label: costly[label], default=None)


def rival_leads(
    rows: Mapping[str, Row], arm: str, families: Mapping[str, Callable[[str], bool]], signs: Mapping[str, int]
) -> dict[str, Any]:
    """How far an arm is ahead of the nearest row of each family that costs at least as much; None where all cost less.

    Args:
        rows: by the text of their arm.
        arm: which of them.
        families: by name, whether the text of an arm is of it.
        signs: of the measures.
    """
    found: dict[str, Any] = {}
    for family, belongs in families.items():
        rival = nearest(rows[arm], {text: row for text, row in rows.items() if belongs(text) and "flops" in row})
        if rival is None:
            found[family] = None
            continue
        cost = round(rows[rival]["flops"] / rows[arm]["flops"], 4)
        found[family] = {"rival": rival, "cost": cost, **leads(rows[arm], {rival: rows[rival]}, signs)}
    return found


def plain_count(flops: float, row_of: Callable[[int], Row], most: int) -> int:
    """The fewest steps of a plain sampler that cost at least as much as an arm.

    A call costs something apart from its steps (text encoders, the VAE): that, and what a step costs, are taken from
    a run of few steps and a long one. What it comes to is checked on a run of so many steps.

    Args:
        flops: of the arm.
        row_of: the sampler's row, by steps.
        most: steps of the long run.
    """
    few, many = row_of(FEW)["flops"], row_of(most)["flops"]
    step = (many - few) / (most - FEW)
    least = (1 - ALIKE) * flops
    count = max(1, math.ceil((least - few) / step) + FEW)
    while row_of(count)["flops"] < least:
        count += 1
    return count


def against_plain(
    text: str, measure: Callable[[str], Row], steps: int, signs: Mapping[str, int], samplers: Sequence[str] = ()
) -> dict[str, Any]:
    """How far an arm is ahead of the best plain sampler with the fewest steps that cost at least as much, by measure.

    Args:
        text: the arm.
        measure: its row, and those of plain samplers by `name@steps`; that of one that cannot run has no operations.
        steps: of the full run.
        signs: of the measures.
        samplers: solvers and spacings to try; all by default. Those that the model does not have, and those that cost
            less than the arm, are named.
    """
    row = measure(text)
    count = plain_count(row["flops"], lambda n: measure(f"euler@{n}"), steps)
    beside, lacking = dict[str, Row](), list[str]()
    for sampler in samplers or plain_samplers():
        label = f"{sampler}@{count}"
        try:
            rival = measure(label)
        except FAILS:
            rival = {}
        if rival.get("flops", 0) >= (1 - ALIKE) * row["flops"]:
            beside[label] = rival
        else:
            lacking.append(sampler)
    return leads(row, beside, signs) | {"steps": count} | ({"lacking": lacking} if lacking else {})
