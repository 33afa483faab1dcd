"""What a training run leaves on record: how long it was, on how many samples, and its curve.

A run goes on in parts, and its log with it. The record is exported beside the weights, small enough to be committed,
and is what a run that goes on from bare weights takes up: `training.json` (steps, samples, hours) and
`training_log.jsonl` (at most 100 rows).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hasten.errors import ModelError
from hasten.io import read_json, read_lines, write_atomically
from torch import Tensor

__all__ = ["LOG", "POSITION", "Start", "export_record", "hours_of", "read_log", "start_of", "thinned"]

LOG = "log.jsonl"
POSITION = "training.json"
CURVE = "training_log.jsonl"
ROWS = 100
LEFT_OUT = ("seconds", "samples_per_second")  # of a part, which says nothing once rows are joined


@dataclass(frozen=True)
class Start:
    """Bare weights that a run goes on from, and what is on record of them.

    Attributes:
        weights: by name.
        steps, samples: that they have seen.
        seconds: of training, as far as it is known.
        timed_from: samples before which the seconds are not known; 0 if all are.
        curve: rows of the log.
    """

    weights: dict[str, Tensor]
    steps: int
    samples: int
    seconds: float = 0.0
    timed_from: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log that count, in order, each with its `hours` of training in total; none without a log.

    After an interruption a run goes on from its last checkpoint: rows from after it do not count, nor does a last line
    that was cut off. Logs written before 0.2 have only the seconds of each part, which are added up.
    """
    rows: list[dict[str, Any]] = []
    before = latest = 0.0
    for line in read_lines(path) if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "hours" not in row and "seconds" in row:
            if row["seconds"] < latest:
                before += latest
            latest = row["seconds"]
            row["hours"] = round((before + latest) / 3600, 4)
        while rows and rows[-1]["step"] >= row["step"]:
            rows.pop()
        rows.append(row)
    return rows


def hours_of(log: Path) -> float:
    """Of training, by a log."""
    return max((row.get("hours", 0.0) for row in read_log(log)), default=0.0)


def thinned(rows: Sequence[Mapping[str, Any]], most: int = ROWS) -> list[dict[str, Any]]:
    """At most `most` rows: neighbours are joined, losses averaged, the rest as in the last of them."""
    size = max(1, math.ceil(len(rows) / most))
    joined = []
    for group in (rows[start : start + size] for start in range(0, len(rows), size)):
        row = {key: value for key, value in group[-1].items() if key not in LEFT_OUT}
        for key in sorted({key for one in group for key in one if key.startswith("loss")}):
            values = [one[key] for one in group if key in one]
            row[key] = round(sum(values) / len(values), 5)
        joined.append(row)
    return joined


def export_record(folder: Path, state: Mapping[str, Any], log: Path | None = None, **others: Any) -> None:
    """Write the record of a run into a folder.

    Args:
        folder: gets `training.json` and `training_log.jsonl`.
        state: of `Training.state`.
        log: of the run; without it there is no curve.
        others: further entries of `training.json`.
    """
    steps, samples, _ = state["position"]
    seconds, timed_from = state.get("time", (3600 * hours_of(log) if log else 0.0, 0))
    position = {"steps": steps, "samples": samples, "hours": round(seconds / 3600, 3)}
    if timed_from:
        position["timed_from_sample"] = timed_from
    write_atomically(folder / POSITION, json.dumps(position | others) + "\n")
    if log is not None:
        curve = "".join(json.dumps(row) + "\n" for row in thinned(read_log(log)))
        write_atomically(folder / CURVE, curve)


def start_of(folder: Path, weights: dict[str, Tensor]) -> Start:
    """Weights with the record in their folder.

    Raises:
        ModelError: if it is missing or damaged.
    """
    position = read_json(folder / POSITION, error=ModelError)
    steps, samples = position["steps"], position["samples"]
    timed_from = position.get("timed_from_sample", 0) if "hours" in position else samples
    seconds = 3600 * position.get("hours", 0.0)
    return Start(weights, steps, samples, seconds, timed_from, read_log(folder / CURVE))
