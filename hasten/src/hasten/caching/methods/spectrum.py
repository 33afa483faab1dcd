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
from typing import Annotated

import numpy as np
from numpy.polynomial import chebyshev

from hasten.caching.method import ScheduledMethod
from hasten.caching.predictors import Order, Predictor, Taylor
from hasten.parameters import Declared, Range
from hasten.registry import method

__all__ = ["ChebyshevRidge", "Spectrum"]

Ridge = Annotated[float, Range(above=0)]  # few features do not determine a polynomial
Share = Annotated[float, Range(0, 1)]
Window = Annotated[int, Range(2)]
Span = Annotated[int, Range(1)]


@dataclass(frozen=True)
class ChebyshevRidge(Declared):
    """Ridge regression of the features on Chebyshev polynomials of the step.

    Args:
        degree: of the polynomials.
        ridge: of the regression, which shrinks its forecast.
        blend: share of the regression in [0, 1]; the rest is the line through the two newest features.
        window: how many features are kept.
        span: steps that are mapped to [-1, 1]; 1 lets the interval end at the step that is forecast.
    """

    degree: Order
    ridge: Ridge
    blend: Share
    window: Window
    span: Span

    @property
    def memory(self) -> int:
        return self.window

    def weights(self, target: int, stored: Sequence[int]) -> list[float]:
        if len(stored) < 2:
            return [1.0]
        steps = np.asarray([target, *stored], dtype=float) - stored[-1]
        table = chebyshev.chebvander(2 * steps / max(self.span, steps[0]) - 1, self.degree)
        here, past = table[0], table[1:]
        fitted = here @ np.linalg.solve(past.T @ past + self.ridge * np.eye(past.shape[1]), past.T)
        local = np.asarray(Taylor(1).weights(target, stored))
        return [float(w) for w in self.blend * fitted + (1 - self.blend) * local]


@method("spectrum", kind="caching", paper="Spectrum, arXiv:2603.01623")
@dataclass(frozen=True, kw_only=True)
class Spectrum(ScheduledMethod):
    """Forecast by a ridge regression on Chebyshev polynomials (Spectrum)."""

    degree: Annotated[Order, "of the polynomials"] = 4
    ridge: Annotated[Ridge, "of the regression, which shrinks its forecast"] = 0.1
    blend: Annotated[Share, "share of the regression; the rest is the line through the two newest features"] = 0.5
    window: Annotated[Window, "how many features are kept"] = 8
    span: Annotated[Span, "steps mapped to the interval of the polynomials: the usual length of a run"] = 50

    def predictors(self) -> Mapping[str, Predictor]:
        return {"whole": ChebyshevRidge(self.degree, self.ridge, self.blend, self.window, self.span)}
