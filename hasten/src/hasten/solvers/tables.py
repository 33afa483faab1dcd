"""What a LEAP file holds for one number of evaluations, as JSON and as tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.io import Array, decreasing, increasing
from hasten.solvers.formula import level_at

__all__ = [
    "ARRAYS",
    "COLUMNS",
    "Axis",
    "Table",
    "interpolated",
    "middle_of",
    "packed",
    "times_at",
    "unpacked",
]

Times = tuple[float, ...]
Rows = tuple[tuple[float, ...], ...]
COLUMNS = {"guided": 1, "passes": 2}  # columns per evaluation of a form
LOOKS = 65  # at times between guidance scales, when a table is checked

# G guidance scales, K known levels of noise; rows of n evaluations are padded with zeros.
ARRAYS = {
    "{n}/timesteps": Array("float", ("n",), (decreasing,), low=0),
    "{n}/levels": Array("float", ("n",), (decreasing,), low=0, high=1),
    "{n}/guided": Array("float", ("G", "n", "w")),
    "{n}/passes": Array("float", ("G", "n", "v"), needed=False),
    "{n}/timesteps_by_scale": Array("float", ("G", "n"), low=0, needed=False),
    "{n}/noise_timesteps": Array("float", ("K",), (increasing,), low=0, needed=False),
    "{n}/noise_levels": Array("float", ("K",), low=0, high=1, needed=False),
}


@dataclass(frozen=True)
class Axis:
    """Guidance scales at which something is known, and over what polynomials go between them.

    Attributes:
        scales: all different.
        logarithmic: whether over the logarithm of the scale, which is positive then, or over the scale itself.
    """

    scales: tuple[float, ...]
    logarithmic: bool = False

    def place(self, scale: float) -> float:
        """Where a scale is."""
        return math.log(scale) if self.logarithmic else scale

    def weights(self, scale: float) -> list[float]:
        """Weights with which values at the scales make the value of their polynomial at another one (Lagrange)."""
        places, here = [self.place(own) for own in self.scales], self.place(scale)
        found = []
        for i, own in enumerate(places):
            others = [other for j, other in enumerate(places) if j != i]
            found.append(float(np.prod([(here - other) / (own - other) for other in others])))
        return found

    def between(self, low: float, high: float, share: float) -> float:
        """The scale that lies between two at a share of the way."""
        if share in (0, 1):
            return high if share else low  # exactly
        place = (1 - share) * self.place(low) + share * self.place(high)
        return math.exp(place) if self.logarithmic else place

    def looks(self) -> list[float]:
        """Scales at which times by scale are looked at: as closely as it takes to see them cross."""
        low, high = min(self.scales), max(self.scales)
        return [self.between(low, high, i / (LOOKS - 1)) for i in range(LOOKS)]


@dataclass(frozen=True)
class Table:
    """Times and coefficients for one number of evaluations.

    Attributes:
        timesteps: of the evaluations, as the model counts time.
        levels: noise levels there: the share of noise in `(1 - s) x + s noise` of a flow, in
            `sqrt(1 - s^2) x + s noise` of a variance-preserving model.
        guided: for each guidance scale the rows over the guided outputs alone; row `k` has `2 + k` numbers.
        passes: likewise over the guided outputs and the differences of the passes; row `k` has `3 + 2 k` numbers.
        timesteps_by_scale: those for each guidance scale, where they differ; `timesteps` are those in the middle then.
        noise_timesteps, noise_levels: where those are given: noise levels at the times of the plain sampler, rising.
    """

    timesteps: Times
    levels: Times
    guided: tuple[Rows, ...]
    passes: tuple[Rows, ...] | None = None
    timesteps_by_scale: tuple[Times, ...] | None = None
    noise_timesteps: Times | None = None
    noise_levels: Times | None = None

    def at(self, axis: Axis, scale: float, kind: str) -> tuple[Times, Times]:
        """Times and levels at a guidance scale.

        Args:
            axis: with the scales that the table is for.
            scale: of the run.
            kind: prediction type.
        """
        if self.timesteps_by_scale is None:
            return self.timesteps, self.levels
        assert self.noise_timesteps is not None
        assert self.noise_levels is not None
        times = times_at(self.timesteps_by_scale, axis, scale)
        return times, tuple(level_at(time, self.noise_timesteps, self.noise_levels, kind) for time in times)

    def check(self, count: int, axis: Axis, kind: str) -> None:
        """Raise ValueError for a table that is none of `count` evaluations at the guidance scales of an axis."""
        scales = axis.scales
        _check_times(count, self.timesteps, self.levels)
        several, noise = self.timesteps_by_scale, (self.noise_timesteps, self.noise_levels)
        if several is not None:
            if [len(one) for one in several] != [count] * len(scales) or len(scales) < 2:
                raise ValueError(f"the table for {count} evaluations does not have {count} times for each scale")
            if noise[0] is None or noise[1] is None or len(noise[0]) != len(noise[1]) or len(noise[0]) < 2:
                raise ValueError(f"the table for {count} evaluations has times by scale without levels of noise")
            if complaint := increasing(np.asarray(noise[0])):
                raise ValueError(f"noise_timesteps of the table for {count} evaluations: {complaint}")
            if not 0 <= noise[1][0] < noise[1][-1] <= 1 or np.any(np.diff(noise[1]) < 0):
                raise ValueError(f"noise_levels of the table for {count} evaluations must rise within 0 and 1")
            if len({one[0] for one in several}) > 1 or several[middle_of(scales)] != self.timesteps:
                raise ValueError(f"the table for {count} evaluations has times by scale that do not go together")
            for scale in axis.looks():
                _check_times(count, *self.at(axis, scale, kind))
        for form, columns in COLUMNS.items():
            rows = getattr(self, form)
            if rows is None:
                continue
            if len(rows) != len(scales):
                raise ValueError(
                    f"the table for {count} evaluations has {len(rows)} fits for {len(scales)} guidance scales"
                )
            if any([len(row) for row in one] != [1 + columns * (k + 1) for k in range(count)] for one in rows):
                raise ValueError(f"the table for {count} evaluations does not have {count} rows that grow by {columns}")

    def tensors(self) -> dict[str, Tensor]:
        """The table as a calibration keeps it."""
        found = {
            "timesteps": torch.tensor(self.timesteps, dtype=torch.float64),
            "levels": torch.tensor(self.levels, dtype=torch.float64),
        }
        for form in COLUMNS:
            rows = getattr(self, form)
            if rows is not None:
                found[form] = torch.stack([_padded(one) for one in rows])
        for name in ("timesteps_by_scale", "noise_timesteps", "noise_levels"):
            if getattr(self, name) is not None:
                found[name] = torch.tensor(getattr(self, name), dtype=torch.float64)
        return found


def _check_times(count: int, timesteps: Sequence[float], levels: Sequence[float]) -> None:
    if {len(timesteps), len(levels)} != {count}:
        raise ValueError(f"the table for {count} evaluations does not have {count} times and levels")
    for name, numbers in (("timesteps", timesteps), ("levels", levels)):
        if complaint := decreasing(np.asarray(numbers)):
            raise ValueError(f"{name} of the table for {count} evaluations: {complaint}")
    if timesteps[-1] < 0 or not 0 < levels[-1] <= levels[0] <= 1:
        raise ValueError(f"the times of the table for {count} evaluations must be within the run")


def _padded(rows: Sequence[Sequence[float]]) -> Tensor:
    made = torch.zeros(len(rows), len(rows[-1]), dtype=torch.float64)
    for k, row in enumerate(rows):
        made[k, : len(row)] = torch.tensor(row, dtype=torch.float64)
    return made


def packed(tables: Mapping[int, Table]) -> dict[str, Tensor]:
    """Tensors of a calibration."""
    return {f"{n}/{name}": tensor for n, table in tables.items() for name, tensor in table.tensors().items()}


def unpacked(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The tables in a calibration's tensors, as JSON has them.

    Raises:
        ValueError: if a row has numbers after its end.
    """
    tables: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        count, _, entry = name.partition("/")
        content = tensor.tolist()
        if entry in COLUMNS:
            ends = [1 + COLUMNS[entry] * (k + 1) for k in range(len(content[0]))]
            if any(any(row[end:]) for one in content for row, end in zip(one, ends, strict=True)):
                raise ValueError(f"{name!r} makes use of later evaluations")
            content = [[row[:end] for row, end in zip(one, ends, strict=True)] for one in content]
        tables.setdefault(count, {})[entry] = content
    return tables


def middle_of(scales: Sequence[object]) -> int:
    """The place of the scale in the middle, whose times and guidance a file has where none is said."""
    return (len(scales) - 1) // 2


def times_at(several: Sequence[Times], axis: Axis, scale: float) -> Times:
    """Times at a guidance scale, by the polynomial through those at the fitted scales."""
    weights = axis.weights(scale)
    columns = zip(*several, strict=True)  # differences, so that what is the same everywhere stays so exactly
    return tuple(at[0] + sum(w * (one - at[0]) for w, one in zip(weights, at, strict=True)) for at in columns)


def interpolated(fits: Sequence[Sequence[Sequence[float]]], axis: Axis, scale: float) -> list[list[float]]:
    """Rows at a guidance scale: the polynomial through those at the fitted scales (three make it quadratic)."""
    if len(fits) == 1:
        return [list(row) for row in fits[0]]
    weights = axis.weights(scale)
    return [
        [sum(w * number for w, number in zip(weights, numbers, strict=True)) for numbers in zip(*rows, strict=True)]
        for rows in zip(*fits, strict=True)
    ]
