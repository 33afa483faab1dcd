"""HiCache: a scaled Hermite basis in place of Taylor's monomials. Feng et al., "HiCache: Training-free Acceleration
of Diffusion Models via Hermite Polynomial-based Feature Caching", arXiv:2508.16984.

    F^(a_0 + x) = F(a_0) + sum_{i=1..O} sigma^i H_i(sigma x) / i! * D_i
    H_0 = 1, H_1 = 2x, H_{n+1} = 2x H_n - 2n H_{n-1}

`sigma` inside contracts the argument, `sigma^i` outside damps the order. At `sigma = 1/sqrt(2)` the first order is
Taylor's; at the default 0.5 it is half of it, so that much of the method's steadiness at long intervals is a shrunken
slope. The horizon is positive in the order of execution and `D_i` are backward differences: with the opposite sign of
either the odd orders would point the wrong way.

Departures: the default site is the hidden one (the paper's is `"module"`); sums are in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hasten.caching.method import CachingMethod
from hasten.caching.predictors import Hermite, Ladder, Predictor
from hasten.registry import method

__all__ = ["HiCache"]


@method("hicache", kind="caching", paper="HiCache, arXiv:2508.16984")
@dataclass(frozen=True, kw_only=True)
class HiCache(CachingMethod):
    """Extrapolate the features of skipped steps in a scaled Hermite basis (HiCache).

    Args:
        order: highest difference; `order + 1` features are kept. 0 is reuse.
        sigma: scale of the basis in (0, 1]; smaller trusts the slope less. 0.5 is the paper's choice for FLUX.1-dev.
        ladder: `"recursive"` (official) or `"divided"` (true differences at irregular gaps).
    """

    order: int = 2
    sigma: float = 0.5
    ladder: Ladder = "recursive"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.predictors()  # validates order, sigma and ladder

    def predictors(self) -> Mapping[str, Predictor]:
        return {"whole": Hermite(self.order, first=self.first_difference, ladder=self.ladder, sigma=self.sigma)}
