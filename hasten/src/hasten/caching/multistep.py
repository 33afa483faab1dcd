"""Multistep ODE formulas as forecasts: `F^(target) = sum_k w_k F_k` with slopes taken from computed features only.

Spacing-aware forms: stored steps `a_0 > a_1 > a_2`, gaps `g0 = a_0 - a_1`, `g1 = a_1 - a_2`, horizon `x = target -
a_0`, `w = x / g0`, slopes `s0 = (F0 - F1) / g0`, `s1 = (F1 - F2) / g1`. Each reduces to its textbook form at `x = g0 =
g1` and is exact on straight lines at any gaps, except the damped one. With two stored steps all of them are the
straight line, with one they are reuse. None uses its own forecasts as history: such a recursion amplifies its errors
from interval to interval for all of these but the damped one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import numpy.typing as npt

from hasten.parameters import Declared, Names

__all__ = ["SOLVERS", "Multistep", "StoredSteps", "Vector"]

Vector = npt.NDArray[np.float64]


class StoredSteps(NamedTuple):
    """Three stored steps: their features as unit vectors of weights, and their geometry."""

    F0: Vector
    F1: Vector
    F2: Vector
    g0: float
    g1: float
    x: float

    @property
    def w(self) -> float:
        return self.x / self.g0

    @property
    def s0(self) -> Vector:
        return (self.F0 - self.F1) / self.g0

    @property
    def s1(self) -> Vector:
        return (self.F1 - self.F2) / self.g1

    @property
    def slope(self) -> Vector:
        """Slope at `a_0` of the parabola through the three stored steps (3-point backward differentiation)."""
        return self.s0 + self.g0 * (self.s0 - self.s1) / (self.g0 + self.g1)


def newton(a: StoredSteps) -> Vector:
    """The parabola through the three stored steps (Newton's form): exact on quadratics."""
    return a.F0 + a.x * a.s0 + a.x * (a.x + a.g0) * (a.s0 - a.s1) / (a.g0 + a.g1)


def adams_bashforth(a: StoredSteps) -> Vector:
    """AB2; unit step 5/2, -2, 1/2."""
    return a.F0 + a.x * ((1 + a.w / 2) * a.s0 - (a.w / 2) * a.s1)


def runge_kutta(a: StoredSteps) -> Vector:
    """RK2 in the midpoint sense: the mean slope over both gaps; unit step 3/2, 0, -1/2."""
    return a.F0 + a.x * (a.F0 - a.F2) / (a.g0 + a.g1)


def bdf(a: StoredSteps) -> Vector:
    """Variable-step BDF2 with the 3-point slope at the newest stored step."""
    return ((1 + a.w) ** 2 * a.F0 - a.w**2 * a.F1 + (1 + a.w) * a.x * a.slope) / (1 + 2 * a.w)


def bdf_damped(a: StoredSteps) -> Vector:
    """BDF2 without its slope term; unit step 4/3, -1/3: a third of the slope, at most half a gap of it."""
    return a.F0 + min(a.w / 3, 0.5) * (a.F0 - a.F1)


def adams_moulton(a: StoredSteps) -> Vector:
    """AM2 with an AB2 predictor; unit step 55/24, -19/12, 7/24."""
    new = (adams_bashforth(a) - a.F0) / a.x
    w = a.w
    return a.F0 + a.x * ((2 * w + 3) / (6 * (w + 1)) * new + (w + 3) / 6 * a.s0 - w**2 / (6 * (w + 1)) * a.s1)


SOLVERS: dict[str, Callable[[StoredSteps], Vector]] = {
    "newton": newton,
    "ab2": adams_bashforth,
    "rk2": runge_kutta,
    "bdf2": bdf,
    "bdf2-damped": bdf_damped,
    "am2": adams_moulton,
}


@dataclass(frozen=True)
class Multistep(Declared):
    """A predictor by one of the formulas of this file, `SOLVERS`.

    Args:
        solver: its name.
        first: see `three_point_weights`.
    """

    solver: Annotated[str, Names(SOLVERS)]
    first: int = 0
    memory = 3

    def weights(self, target: int, stored: Sequence[int]) -> list[float]:
        return three_point_weights(SOLVERS[self.solver], target, stored, self.first)


def three_point_weights(
    formula: Callable[[StoredSteps], Vector], target: int, stored: Sequence[int], first: int = 0
) -> list[float]:
    """Weights of a formula of three stored steps, with the fall-backs of a short history; further steps get 0.

    Args:
        formula: weights of the three newest steps.
        target: the step to forecast.
        stored: steps, newest first.
        first: computed steps before this one have no difference of their own, as in `difference_ladder`. The last step
            of a uniform schedule's warm-up has one, so that the first interval is a straight line: a second difference
            of adjacent steps, taken over an interval of many, is mostly noise.
    """
    unit = np.eye(len(stored))
    x = float(target - stored[0])
    if len(stored) == 1 or stored[0] < first:
        return unit[0].tolist()
    g0 = float(stored[0] - stored[1])
    if len(stored) == 2 or stored[1] < first:
        weights = unit[0] + x * (unit[0] - unit[1]) / g0
    else:
        weights = formula(StoredSteps(unit[0], unit[1], unit[2], g0, float(stored[1] - stored[2]), x))
    return [float(w) for w in weights]
