"""Spectrum: ridge regression on Chebyshev polynomials over all computed steps, mixed with a local forecast. "Spectrum",
adopted by sglang and stable-diffusion.cpp in 2026.

    w(t)  = phi(t)^T (Phi^T Phi + ridge I)^-1 Phi^T,   phi = (T_0, ..., T_M) on the steps mapped to [-1, 1]
    F^(t) = blend * sum_k w_k(t) F_k + (1 - blend) * (line through the two newest features)

A global fit forgets noise that a local one follows, and has no horizon at which it explodes.

Departures: degree, ridge and share are the usual ones of public implementations, since the paper was not at hand; the
interval that is mapped to [-1, 1] ends at the step that is forecast, so that the length of the run need not be known;
`window` limits the features that are kept.
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
    """Ridge regression of the features on Chebyshev polynomials of the step."""

    degree: int
    ridge: float
    blend: float
    window: int

    def __post_init__(self) -> None:
        if self.degree < 0:
            raise ConfigError(f"degree must be 0 or more, got {self.degree}")
        if self.ridge <= 0:
            raise ConfigError(f"ridge must be positive (few features do not determine a polynomial), got {self.ridge}")
        if not 0 <= self.blend <= 1:
            raise ConfigError(f"blend must be in [0, 1], got {self.blend}")
        if self.window < 2:
            raise ConfigError(f"window must be at least 2, got {self.window}")

    @property
    def memory(self) -> int:
        return self.window

    def weights(self, target: int, anchors: Sequence[int]) -> list[float]:
        if len(anchors) < 2:
            return [1.0]
        steps = np.asarray([target, *anchors], dtype=float)
        span = 2 * (steps - steps[-1]) / (target - steps[-1]) - 1
        table = chebyshev.chebvander(span, min(self.degree, len(anchors) - 1))
        here, past = table[0], table[1:]
        fitted = here @ np.linalg.solve(past.T @ past + self.ridge * np.eye(past.shape[1]), past.T)
        local = np.asarray(Taylor(1).weights(target, anchors))
        return [float(w) for w in self.blend * fitted + (1 - self.blend) * local]


@method("spectrum", kind="caching", paper="Spectrum (Chebyshev ridge regression), as in sglang")
@dataclass(frozen=True, kw_only=True)
class Spectrum(CachingMethod):
    """Forecast by a ridge regression on Chebyshev polynomials (Spectrum).

    Args:
        degree: of the polynomials.
        ridge: of the regression.
        blend: share of the regression; the rest is the line through the two newest features.
        window: how many features are kept.
    """

    degree: int = 4
    ridge: float = 0.1
    blend: float = 0.5
    window: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.predictors()  # validates the parameters

    def predictors(self) -> Mapping[str, Predictor]:
        return {"whole": ChebyshevRidge(self.degree, self.ridge, self.blend, self.window)}
