"""TaylorSeer: a Taylor expansion around the newest computed step. Liu et al., "From Reusing to Forecasting:
Accelerating Diffusion Models with TaylorSeers", arXiv:2503.06923.

    F^(a_0 + x) = F(a_0) + sum_{i=1..O} x^i / i! * D_i

`D_i` is the i-th difference of the computed steps' features, divided by the latest gap at every order, as in the
official code; with `ladder="divided"` it is the true derivative of the interpolating polynomial's order, also where
gaps change (the warm-up boundary).

Departures: the default site is the hidden one (the paper's is `"module"`); sums are in float32; differences are
weights on the kept features and never tensors of their own. As in the official code, differences begin at the last
warm-up step, so that the first interval is a first-order forecast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from hasten.caching.method import ScheduledMethod
from hasten.caching.predictors import Ladder, Order, Predictor, Taylor
from hasten.registry import method

__all__ = ["TaylorSeer"]


@method("taylorseer", kind="caching", paper="TaylorSeer, arXiv:2503.06923")
@dataclass(frozen=True, kw_only=True)
class TaylorSeer(ScheduledMethod):
    """Extrapolate the features of skipped steps by a Taylor polynomial (TaylorSeer)."""

    tried: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "order": (1, 2, 3),
        "ladder": ("recursive", "divided"),
        "domain": ("plain", "normed"),
    }

    order: Annotated[Order, "highest difference; `order + 1` features are kept; 0 is reuse"] = 1
    ladder: Annotated[Ladder, "the official differences, or the true ones at irregular gaps (divided)"] = "recursive"

    def predictors(self) -> Mapping[str, Predictor]:
        return {"whole": Taylor(self.order, first=self.first_difference, ladder=self.ladder)}
