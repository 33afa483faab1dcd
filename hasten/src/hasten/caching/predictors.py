"""Forecasts as weights on the features of stored steps: `F^(target) = sum_k w_k F_k`.

`K` stored steps, newest first, `a_0 > a_1 > ...`; horizon `x = target - a_0 >= 1`. The difference ladder and the bases
follow TaylorSeer (arXiv:2503.06923) and HiCache (arXiv:2508.16984). Because every order of the ladder is itself a
weighted sum of features, no difference tensor is ever formed or kept: a forecast of order `O` holds `O + 1` features
and reads each once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from hasten.parameters import Declared, Range

__all__ = [
    "ALL",
    "GramPredictor",
    "Hermite",
    "Ladder",
    "Order",
    "Predictor",
    "Reuse",
    "Scale",
    "Taylor",
    "difference_ladder",
    "hermite_coefficient",
    "taylor_coefficient",
]

Ladder = Literal["recursive", "divided"]
# At the far end of an interval the weights of order n add up to 2^(n + 1) - 1 in magnitude: from order 7 on they make
# half of a feature, and more, of bfloat16's rounding (2^-9), and each order keeps one feature more in memory.
MOST_ORDER = 6
Order = Annotated[int, Range(0, MOST_ORDER)]
Scale = Annotated[float, Range(above=0, most=1)]  # HiCache diverges above 1
ALL = 1024  # more computed steps than any run has


@runtime_checkable
class Predictor(Protocol):
    """Anything that forecasts linearly from the features of stored steps."""

    @property
    def memory(self) -> int:
        """How many stored steps the predictor can use: the number of features that must be kept."""
        ...

    def weights(self, target: int, stored: Sequence[int]) -> list[float]:
        """Weights on the features of the `stored` steps (newest first, at least one) for a forecast at `target`."""
        ...


@runtime_checkable
class GramPredictor(Predictor, Protocol):
    """A predictor that fits its weights to the features at hand, through their inner products alone."""

    def fitted(self, target: int, stored: Sequence[int], gram: npt.NDArray[np.float64]) -> list[float]:
        """Weights on the stored steps, newest first, from their inner products divided by the size of a feature."""
        ...


def difference_ladder(
    stored: Sequence[int], order: int, *, first: int = 0, ladder: Ladder = "recursive"
) -> list[list[float]]:
    """The differences `D_0, D_1, ...` at the newest stored step, each as weights on the stored steps.

    Args:
        stored: steps, newest first.
        order: highest order wanted; fewer come back where the stored steps do not reach.
        first: computed steps before this one give order 0 only (the gate of the official code: `warmup - 1`).
        ladder: `"recursive"` divides every order by the latest gap, as the official code does; with irregular gaps
            that is not the true derivative. `"divided"` is the divided difference scaled to a derivative: exact for a
            monomial of that order.

    Returns:
        up to `order + 1` rows of `len(stored)` weights.
    """
    size = len(stored)
    below: list[list[float]] = []
    for j in reversed(range(size)):
        rows = [[1.0 if k == j else 0.0 for k in range(size)]]
        if j < size - 1 and stored[j] >= first:
            for i in range(min(order, len(below))):
                gap: float = stored[j] - stored[j + 1]
                if ladder == "divided":
                    gap = (stored[j] - stored[j + i + 1]) / (i + 1)
                rows.append([(a - b) / gap for a, b in zip(rows[i], below[i], strict=True)])
        below = rows
    return below


def taylor_coefficient(i: int, x: float) -> float:
    """`x^i / i!`"""
    return x**i / math.factorial(i)


def hermite_coefficient(i: int, x: float, sigma: float) -> float:
    """`sigma^i H_i(sigma x) / i!` with the physicists' Hermite polynomials (HiCache's dual scaling)."""
    previous, current = 0.0, 1.0
    for n in range(i):
        previous, current = current, 2 * sigma * x * current - 2 * n * previous
    return sigma**i * current / math.factorial(i)


@dataclass(frozen=True)
class Reuse:
    """The newest computed feature, unchanged."""

    memory = 1

    def weights(self, target: int, stored: Sequence[int]) -> list[float]:
        return [1.0] + [0.0] * (len(stored) - 1)


@dataclass(frozen=True)
class Taylor(Declared):
    """`F_0 + sum_i x^i/i! D_i`: exact for polynomials of degree 1 at any gaps (`order >= 1`).

    Args:
        order: highest difference; 0 is reuse.
        first: see `difference_ladder`.
        ladder: see `difference_ladder`.
    """

    order: Order
    first: int = 0
    ladder: Ladder = "recursive"

    @property
    def memory(self) -> int:
        return self.order + 1

    def coefficient(self, i: int, x: float) -> float:
        """Weight of the difference of order `i` at horizon `x`."""
        return taylor_coefficient(i, x)

    def weights(self, target: int, stored: Sequence[int]) -> list[float]:
        rows = difference_ladder(stored, self.order, first=self.first, ladder=self.ladder)
        x = target - stored[0]
        coefficients = [self.coefficient(i, x) for i in range(len(rows))]
        return [sum(c * row[k] for c, row in zip(coefficients, rows, strict=True)) for k in range(len(stored))]


@dataclass(frozen=True)
class Hermite(Taylor):
    """`F_0 + sum_i sigma^i H_i(sigma x)/i! D_i`: a Taylor forecast with damped orders and a contracted argument."""

    sigma: Scale = 0.5

    def coefficient(self, i: int, x: float) -> float:
        return hermite_coefficient(i, x, self.sigma)
