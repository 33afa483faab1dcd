"""Spectrum: ridge regression on Chebyshev polynomials over the computed steps, mixed with a local forecast. Han et al.,
"Adaptive Spectral Feature Forecasting for Diffusion Sampling Acceleration", arXiv:2603.01623 (CVPR 2026).

    w(t)  = phi(t)^T (Phi^T Phi + ridge I)^-1 Phi^T,   phi = (T_0, ..., T_M) on the steps mapped to [-1, 1]
    F^(t) = blend * sum_k w_k(t) F_k + (1 - blend) * (line through the two newest features)

A global fit forgets noise that a local one follows, and has no horizon at which it explodes.

The paper's forecast is the regression alone (`blend=1`); the mixture is in the authors' code (hanjq17/Spectrum), which
recommends a share of 0.5 to 1. Degree 4, ridge 0.1 and 50 mapped steps are theirs; stable-diffusion.cpp takes degree 3,
ridge 1 and a share of 0.4.

Departures: steps are counted from the oldest feature that is kept, and where a run is longer than `span` the mapped
interval ends at the step that is forecast, since the polynomials explode outside of [-1, 1]; `window` limits the
features that are kept; the computed steps are those of the schedule, not ever rarer ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import chebyshev

from hasten.caching.method import CachingMethod
from hasten.caching.predictors import Predictor, Taylor
from hasten.errors import ConfigError
from hasten.registry import method

__all__ = ["ChebyshevRidge", "Spectrum"]


@dataclass(frozen=True)
class ChebyshevRidge:
    """Ridge regression of the features on Chebyshev polynomials of the step.

    Args:
        degree: of the polynomials.
        ridge: of the regression, which draws its forecast towards zero.
        blend: share of the regression in [0, 1]; the rest is the line through the two newest features.
        window: how many features are kept.
        span: steps that are mapped to [-1, 1]; 1 lets the interval end at the step that is forecast.
    """

    degree: int
    ridge: float
    blend: float
    window: int
    span: int

    def __post_init__(self) -> None:
        if self.degree < 0:
            raise ConfigError(f"degree must be 0 or more, got {self.degree}")
        if self.ridge <= 0:
            raise ConfigError(f"ridge must be positive (few features do not determine a polynomial), got {self.ridge}")
        if not 0 <= self.blend <= 1:
            raise ConfigError(f"blend must be in [0, 1], got {self.blend}")
        if self.window < 2:
            raise ConfigError(f"window must be at least 2, got {self.window}")
        if self.span < 1:
            raise ConfigError(f"span must be at least 1 step, got {self.span}")

    @property
    def memory(self) -> int:
        return self.window

    def weights(self, target: int, anchors: Sequence[int]) -> list[float]:
        if len(anchors) < 2:
            return [1.0]
        steps = np.asarray([target, *anchors], dtype=float) - anchors[-1]
        table = chebyshev.chebvander(2 * steps / max(self.span, steps[0]) - 1, self.degree)
        here, past = table[0], table[1:]
        fitted = here @ np.linalg.solve(past.T @ past + self.ridge * np.eye(past.shape[1]), past.T)
        local = np.asarray(Taylor(1).weights(target, anchors))
        return [float(w) for w in self.blend * fitted + (1 - self.blend) * local]


@method("spectrum", kind="caching", paper="Spectrum, arXiv:2603.01623")
@dataclass(frozen=True, kw_only=True)
class Spectrum(CachingMethod):
    """Forecast by a ridge regression on Chebyshev polynomials (Spectrum).

    Args:
        degree: of the polynomials.
        ridge: of the regression.
        blend: share of the regression; the rest is the line through the two newest features.
        window: how many features are kept.
        span: steps that are mapped to the interval of the polynomials; the usual number of steps of a run.
    """

    degree: int = 4
    ridge: float = 0.1
    blend: float = 0.5
    window: int = 8
    span: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        self.predictors()  # validates the parameters

    def predictors(self) -> Mapping[str, Predictor]:
        return {"whole": ChebyshevRidge(self.degree, self.ridge, self.blend, self.window, self.span)}
