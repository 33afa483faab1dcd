"""AB-Cache: Adams-Bashforth read as a linear relation between successive results. Yu et al., "AB-Cache: Training-Free
Acceleration of Diffusion Models via Adams-Bashforth Cached Feature Reuse", arXiv:2504.10540.

    F^(t) = sum_{i=1..k} (-1)^(i+1) C(k, i) F_i,       F_i the i-th newest computed feature (k = 3: 3, -3, 1)

which is the polynomial of degree k - 1 through the last k features, one spacing ahead. Two readings, as `form`:

* `"spaced"`: that polynomial at the true horizon, whatever the distances of the computed steps;
* `"literal"`: the constant weights, for the whole interval: right only at a horizon that equals the spacing.

Departures: the features are those of computed steps (the relation holds for successive steps of a sampler); the default
site is the hidden one. The relation is written from a summary of the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb, prod
from typing import Annotated, Literal

from hasten.caching.method import ScheduledMethod
from hasten.caching.predictors import Predictor
from hasten.parameters import Declared, Range
from hasten.registry import method

__all__ = ["ABCache", "AdamsBashforth"]

Form = Literal["spaced", "literal"]
Points = Annotated[int, Range(1)]


@dataclass(frozen=True)
class AdamsBashforth(Declared):
    """Extrapolation through the `order` newest features."""

    order: Points
    form: Form = "spaced"

    @property
    def memory(self) -> int:
        return self.order

    def weights(self, target: int, stored: Sequence[int]) -> list[float]:
        used = stored[: self.order]
        k = len(used)
        if self.form == "literal":
            own = [float((-1) ** i * comb(k, i + 1)) for i in range(k)]
        else:
            own = [prod((target - b) / (a - b) for b in used if b != a) for a in used]
        return own + [0.0] * (len(stored) - k)


@method("ab-cache", kind="caching", paper="AB-Cache, arXiv:2504.10540")
@dataclass(frozen=True, kw_only=True)
class ABCache(ScheduledMethod):
    """Extrapolate through the newest computed features (AB-Cache)."""

    order: Annotated[Points, "how many features; 3 is the paper's usual choice, 1 is reuse"] = 3
    form: Annotated[Form, "the polynomial at its true horizon, or the constant weights (literal)"] = "spaced"

    def predictors(self) -> Mapping[str, Predictor]:
        return {"whole": AdamsBashforth(self.order, self.form)}
