"""FoCa: forecast by BDF2, then calibrate by Heun's rule. Zheng et al., "Forecast then Calibrate: Feature Caching as
ODE for Efficient Diffusion Transformers", arXiv:2508.16211.

Equations 6 to 8, with `h` the step and `F'` slopes of the feature as a function of the step:

    P       = 4/3 F_k - 1/3 F_{k-1} + 2h/3 F'_k              forecast (BDF2)
    P'      = (3 P - 4 F_k + F_{k-1}) / (2h)                 slope at the forecast
    F_{k+1} = F_k + h/2 (F'(last computed step) + P')            calibrate (Heun)

The text leaves open which slope `F'_k` is and whether `F_k` may be forecasts. Three readings, as `form`:

* `"stored"`: all from computed steps, variable-step BDF2 with the 3-point slope, then Heun. Keeps 3 features.
* `"literal"`: the recursion as printed, one sampler step at a time on the two newest values of any kind, `F'_k` their
  difference. After `m` skipped steps it is `F0 + m S + (1 - 2^-m)(d - S)`, with `S` the slope between the last two
  computed steps and `d` the difference of the last computed step to the value before it, which was a forecast. Because
  forecasts are weighted sums of computed steps, so is this, but of all of them: it keeps every computed feature of the
  run.
* `"author"`: the constant form of a snippet by the authors, `7/6 F0 - 1/6 F1` for the whole interval. Keeps 2 features.

Departures: the default site is the hidden one (the paper's is `"module"`); slopes between computed steps are divided by
their gap; on a uniform schedule the first interval is a straight line (`"stored"`), as in TaylorSeer's code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from hasten.caching.method import ScheduledMethod
from hasten.caching.multistep import StoredSteps, Vector, bdf, three_point_weights
from hasten.caching.predictors import ALL, Predictor
from hasten.parameters import Declared
from hasten.registry import method

__all__ = ["FoCa", "FoCaPredictor"]

Form = Literal["stored", "literal", "author"]


def from_stored(a: StoredSteps) -> Vector:
    """BDF2 from computed steps, then the mean of the slopes at the last computed step and at the forecast."""
    secant = (bdf(a) - a.F0) / a.x
    slope_there = secant + a.x * (secant - a.s0) / (a.x + a.g0)
    return a.F0 + a.x / 2 * (a.slope + slope_there)


def literal_weights(target: int, stored: Sequence[int]) -> Vector:
    """The recursion's closed form, unrolled over the earlier computed steps."""
    size = len(stored)
    unit = np.eye(size)
    if size == 1:
        return unit[0]
    m = target - stored[0]
    slope = (unit[0] - unit[1]) / (stored[0] - stored[1])
    if stored[0] - stored[1] == 1:
        before = unit[1]
    else:
        before = np.concatenate([[0.0], literal_weights(stored[0] - 1, stored[1:])])
    return unit[0] + m * slope + (1 - 0.5**m) * (unit[0] - before - slope)


@dataclass(frozen=True)
class FoCaPredictor(Declared):
    """FoCa's forecast in one of its forms; `first` gates the stored one, see `three_point_weights`."""

    form: Form = "stored"
    first: int = 0

    @property
    def memory(self) -> int:
        return {"stored": 3, "literal": ALL, "author": 2}[self.form]

    def weights(self, target: int, stored: Sequence[int]) -> list[float]:
        if self.form == "stored":
            return three_point_weights(from_stored, target, stored, self.first)
        if self.form == "literal":
            return [float(w) for w in literal_weights(target, stored)]
        return [1.0] if len(stored) == 1 else [7 / 6, -1 / 6, *[0.0] * (len(stored) - 2)]


@method("foca", kind="caching", paper="FoCa, arXiv:2508.16211")
@dataclass(frozen=True, kw_only=True)
class FoCa(ScheduledMethod):
    """Forecast the features of skipped steps by BDF2 and calibrate by Heun's rule (FoCa)."""

    tried: ClassVar[Mapping[str, tuple[Any, ...]]] = {"form": ("stored", "literal"), "domain": ("plain", "normed")}

    form: Annotated[
        Form, "slopes from stored steps alone, the recursion as it is printed (literal), or the authors' constants"
    ] = "stored"

    def predictors(self) -> Mapping[str, Predictor]:
        return {"whole": FoCaPredictor(self.form, self.first_difference)}
