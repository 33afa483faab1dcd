"""HiCache: a scaled Hermite basis in place of Taylor's monomials. Feng et al., "HiCache: Training-free Acceleration
of Diffusion Models via Hermite Polynomial-based Feature Caching", arXiv:2508.16984.

    F^(a_0 + x) = F(a_0) + sum_{i=1..O} sigma^i H_i(sigma x) / i! * D_i
    H_0 = 1, H_1 = 2x, H_{n+1} = 2x H_n - 2n H_{n-1}

`sigma` inside contracts the argument, `sigma^i` outside damps the order. At `sigma = 1/sqrt(2)` the first order is
Taylor's; at the default 0.5 it is half of it, so that much of the method's steadiness at long intervals is a shrunken
slope. The horizon is positive in the order of execution and `D_i` are backward differences: with the opposite sign of
either the odd orders would point the wrong way.

With `scale="adaptive"` the scale follows the features, `sigma = min(sigma_max, alpha / (sqrt(2) q))`, so that
`sigma sqrt(2) q`, on which the paper's error bound rests, stays near a constant. `q^2` is an exponential mean of the
squared first differences, corrected for its short history.

Departures: the default site is the hidden one (the paper's is `"module"`); sums are in float32. The adaptive scale
takes differences relative to the newest feature, over a whole gap, so that it does not depend on the unit of the
features (`alpha` is therefore not the published 1.28); its mean runs over the features that are kept; its largest scale
is `1/sqrt(2)`, the whole slope, in place of 1, which overshoots.

True guidance mixes the forecasts of two passes with weights of opposite sign, so their errors add up where the features
cancel, the more the stronger it is, and a smaller part of the slope serves better: `guided_sigma` (ours) is the scale
at guidance 5 and above, where a step has several passes, or one whose batch joins several, as a pipeline's own latents
tell: those of another loop, and of pipelines that call theirs otherwise (`latents`), cannot be told from one pass.
From guidance 1 to 5 the part of the slope that the first order takes, `2 sigma^2`, goes from that of `sigma` to that of
`guided_sigma` with the square of what the guidance is above 1, as the error of the mixture does. The guidance is the
argument of the pipeline's call, for the whole run; where it does not show, as in a loop of one's own, or something else
mixes passes in, `guided_sigma` serves.

Which `sigma` serves a model best depends on it: `hasten tune --method hicache` finds it by whole runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import sqrt
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt

from hasten.caching.effects import Effects, With
from hasten.caching.method import ScheduledMethod
from hasten.caching.predictors import Hermite, Ladder, Order, Predictor, Scale
from hasten.parameters import Range
from hasten.registry import method

__all__ = ["AdaptiveHermite", "HiCache"]

SMALLEST_SCALE = 0.1
STRONG_GUIDANCE = 5.0  # from which on `guided_sigma` serves alone
Strength = Annotated[float, Range(above=0)]


@dataclass(frozen=True)
class AdaptiveHermite(Hermite):
    """A Hermite forecast whose scale follows the size of the newest differences.

    Args:
        sigma: serves while there is no difference yet; the largest scale afterwards is `sigma_max`.
        alpha: what `sigma sqrt(2) q` is kept near.
        beta: weight of the newest difference in the mean.
        sigma_max: largest scale.
    """

    alpha: Strength = 0.3
    beta: Annotated[float, Range(above=0, most=1)] = 0.5
    sigma_max: Annotated[float, Range(SMALLEST_SCALE, 1)] = sqrt(0.5)

    def scale(self, gram: npt.NDArray[np.float64]) -> float:
        """The scale for features with these inner products, newest first."""
        squares = [float(gram[i, i] - 2 * gram[i, i + 1] + gram[i + 1, i + 1]) for i in range(len(gram) - 1)]
        if not squares or gram[0, 0] <= 0:
            return self.sigma
        shares = np.asarray([self.beta * (1 - self.beta) ** i for i in range(len(squares))])
        q = sqrt(max(float(shares @ np.asarray(squares) / shares.sum() / gram[0, 0]), 1e-24))
        return float(np.clip(self.alpha / (sqrt(2) * q), SMALLEST_SCALE, self.sigma_max))

    def fitted(self, target: int, stored: Sequence[int], gram: npt.NDArray[np.float64]) -> list[float]:
        fixed = Hermite(self.order, first=self.first, ladder=self.ladder, sigma=self.scale(gram))
        return fixed.weights(target, stored)


@method("hicache", kind="caching", paper="HiCache, arXiv:2508.16984")
@dataclass(frozen=True, kw_only=True)
class HiCache(ScheduledMethod):
    """Extrapolate the features of skipped steps in a scaled Hermite basis (HiCache)."""

    tried: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "sigma": (0.3, 0.4, 0.5, 0.6, 0.71, 0.85),
        "order": (1, 2),
        "domain": ("plain", "normed"),
    }
    effects: ClassVar[Effects] = {
        "sigma": (With("scale", ("fixed",)),),
        "guided_sigma": (With("scale", ("fixed",)),),
        "alpha": (With("scale", ("adaptive",)),),
    }

    order: Annotated[Order, "highest difference; `order + 1` features are kept; 0 is reuse"] = 2
    sigma: Annotated[Scale, "scale of the basis; smaller trusts the slope less; the paper's for FLUX.1-dev is 0.5"] = (
        0.5
    )
    guided_sigma: Annotated[
        Scale | None,
        "scale where a step has several passes, at guidance 5 and above or unknown; nearer to sigma below",
    ] = None
    ladder: Annotated[Ladder, "the official differences, or the true ones at irregular gaps (divided)"] = "recursive"
    scale: Annotated[Literal["fixed", "adaptive"], "`sigma` throughout, or a scale that follows the features"] = "fixed"
    alpha: Annotated[Strength, "of the adaptive scale; larger trusts the slope more"] = 0.3

    @property
    def follows_guidance(self) -> bool:
        return self.guided_sigma is not None

    def guided(self, scale: float | None) -> Self:
        if self.guided_sigma is None:
            return self
        share = 1.0 if scale is None else min(max((scale - 1) / (STRONG_GUIDANCE - 1), 0.0), 1.0)
        share = round(share, 2)  # so that a server's many scales make no more than a hundred methods
        if share not in self._guided:
            slope = (1 - share**2) * self.sigma**2 + share**2 * self.guided_sigma**2
            sigma = self.guided_sigma if share == 1 else sqrt(slope)
            self._guided.setdefault(share, replace(self, sigma=sigma, guided_sigma=None))
        return self._guided[share]

    @cached_property
    def _guided(self) -> dict[float, Self]:
        return {}

    def predictors(self) -> Mapping[str, Predictor]:
        first = self.first_difference
        if self.scale == "adaptive":
            return {"whole": AdaptiveHermite(self.order, first, self.ladder, self.sigma, self.alpha)}
        return {"whole": Hermite(self.order, first=first, ladder=self.ladder, sigma=self.sigma)}
