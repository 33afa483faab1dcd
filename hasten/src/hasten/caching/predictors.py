"""Forecasts as weights on the features of the computed steps: `F^(target) = sum_k w_k F_k`.

`K` anchors, newest first, at steps `a_0 > a_1 > ...`; horizon `x = target - a_0 >= 1`. The difference ladder and the
bases follow TaylorSeer (arXiv:2503.06923) and HiCache (arXiv:2508.16984). Because every order of the ladder is itself
a weighted sum of anchors, no difference tensor is ever formed or kept: a forecast of order `O` holds `O + 1` features
and reads each once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from hasten.errors import ConfigError

__all__ = ["Hermite", "Predictor", "Reuse", "Taylor", "difference_ladder", "hermite_coefficient", "taylor_coefficient"]

Ladder = Literal["recursive", "divided"]


class Predictor(Protocol):
    """Anything that forecasts linearly from the features of computed steps."""

    @property
    def memory(self) -> int:
        """How many anchors the predictor can use: the number of features that must be kept."""
        ...

    def weights(self, target: int, anchors: Sequence[int]) -> list[float]:
        """Weights on the features at `anchors` (steps, newest first, at least one) for a forecast at `target`."""
        ...


def difference_ladder(
    anchors: Sequence[int], order: int, *, first: int = 0, ladder: Ladder = "recursive"
) -> list[list[float]]:
    """The differences `D_0, D_1, ...` at the newest anchor, each as weights on the anchors.

    Args:
        anchors: steps, newest first.
        order: highest order wanted; fewer come back where the anchors do not reach.
        first: computed steps before this one give order 0 only (the gate of the official code: `warmup - 1`).
        ladder: `"recursive"` divides every order by the latest gap, as the official code does; with irregular gaps
            that is not the true derivative. `"divided"` is the divided difference scaled to a derivative: exact for a
            monomial of that order.

    Returns:
        up to `order + 1` rows of `len(anchors)` weights.
    """
    size = len(anchors)
    below: list[list[float]] = []
    for j in reversed(range(size)):
        rows = [[1.0 if k == j else 0.0 for k in range(size)]]
        if j < size - 1 and anchors[j] >= first:
            for i in range(min(order, len(below))):
                gap: float = anchors[j] - anchors[j + 1]
                if ladder == "divided":
                    gap = (anchors[j] - anchors[j + i + 1]) / (i + 1)
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
    """The newest full feature, unchanged."""

    memory = 1

    def weights(self, target: int, anchors: Sequence[int]) -> list[float]:
        return [1.0] + [0.0] * (len(anchors) - 1)


@dataclass(frozen=True)
class Taylor:
    """`F_0 + sum_i x^i/i! D_i`: exact for polynomials of degree 1 at any gaps (`order >= 1`).

    Args:
        order: highest difference; 0 is reuse.
        first: see `difference_ladder`.
        ladder: see `difference_ladder`.
    """

    order: int
    first: int = 0
    ladder: Ladder = "recursive"

    def __post_init__(self) -> None:
        if self.order < 0:
            raise ConfigError(f"order must be 0 (reuse) or more, got {self.order}")
        if self.ladder not in ("recursive", "divided"):
            raise ConfigError(f"ladder must be 'recursive' or 'divided', got {self.ladder!r}")

    @property
    def memory(self) -> int:
        return self.order + 1

    def coefficient(self, i: int, x: float) -> float:
        """Weight of the difference of order `i` at horizon `x`."""
        return taylor_coefficient(i, x)

    def weights(self, target: int, anchors: Sequence[int]) -> list[float]:
        rows = difference_ladder(anchors, self.order, first=self.first, ladder=self.ladder)
        x = target - anchors[0]
        coefficients = [self.coefficient(i, x) for i in range(len(rows))]
        return [sum(c * row[k] for c, row in zip(coefficients, rows, strict=True)) for k in range(len(anchors))]


@dataclass(frozen=True)
class Hermite(Taylor):
    """`F_0 + sum_i sigma^i H_i(sigma x)/i! D_i`: a Taylor forecast with damped orders and a contracted argument."""

    sigma: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sigma <= 1:
            raise ConfigError(f"sigma must be in (0, 1] (HiCache diverges above), got {self.sigma}")

    def coefficient(self, i: int, x: float) -> float:
        return hermite_coefficient(i, x, self.sigma)
