"""FORA: keep the newest computed feature. Selvaraju et al., "FORA: Fast-Forward Caching in Diffusion Transformer
Acceleration", arXiv:2407.01425.

    F^(t) = F(a_0)

Departures: the paper computes steps 0, N, 2N, ... (`warmup=1`); the default here is the warm-up of 3 that the
forecasting methods use, so that a comparison at one interval is a comparison at one number of computed steps. The paper
caches every module's output (`site="module"`); the default here is the hidden site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hasten.caching.method import ScheduledMethod
from hasten.caching.predictors import Predictor
from hasten.caching.predictors import Reuse as ReusePredictor
from hasten.registry import method

__all__ = ["Reuse"]


@method("reuse", kind="caching", paper="FORA, arXiv:2407.01425")
@dataclass(frozen=True, kw_only=True)
class Reuse(ScheduledMethod):
    """Reuse the newest computed feature (FORA)."""

    def predictors(self) -> Mapping[str, Predictor]:
        return {"whole": ReusePredictor()}
