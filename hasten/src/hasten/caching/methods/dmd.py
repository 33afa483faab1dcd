"""DMD: dynamic mode decomposition, a sum of damped exponentials in place of a polynomial. As a cache predictor in
hicache-pp and cache-dit; the decomposition is Schmid's (Journal of Fluid Mechanics 656, 2010).

    X = [f_1 .. f_{m-1}],  Y = [f_2 .. f_m],  X = U S V^T,  A = U^T Y V S^-1 = W diag(l) W^-1
    F^(a_0 + x) = Re Phi (l^(x / spacing) b),   Phi = Y V S^-1 W,   Phi b ~ f_m

Everything here follows from the m x m inner products of the kept features: a square root of them gives the features in
an orthonormal basis of their span, and the forecast lies in that span, so that it is again a weighted sum of features.
Only the weights depend on the data.

The operator carries a feature one spacing further, hence it takes evenly spaced computed steps: the newest stretch of
equal distances is used. With fewer than four, the forecast is Hermite's. Small singular values are dropped. Growing
modes are not clamped: features that grow, or run along a line (a double rate of 1), need rates of 1 and above. After
the warm-up of an even schedule a forecast stays within one spacing, so that no mode grows by more than it did between
computed steps; in a long warm-up's wake it reaches several, and the tests bound what noise does there.

Departures: one decomposition serves a whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt

from hasten.caching.method import ScheduledMethod
from hasten.caching.predictors import Hermite, Predictor, Scale
from hasten.parameters import Declared, Range
from hasten.registry import method

__all__ = ["DMD", "DynamicModes"]

FEWEST = 4
SMALLEST = 1e-4  # of the singular values, relative to the largest
History = Annotated[int, Range(FEWEST)]
Ridge = Annotated[float, Range(0)]


def uniform_stretch(stored: Sequence[int]) -> int:
    """How many of the newest stored steps are evenly spaced."""
    gaps = -np.diff(np.asarray(stored))
    other = np.flatnonzero(gaps != gaps[0]) if len(gaps) else np.asarray([])
    return len(stored) if len(other) == 0 else int(other[0]) + 1


@dataclass(frozen=True)
class DynamicModes(Declared):
    """A forecast by dynamic modes, from the inner products of the features.

    Args:
        history: how many features are kept.
        ridge: added to the singular values, relative to the largest.
        fallback: serves while the history is short or uneven, and for features that are all zero.
    """

    history: History
    ridge: Ridge
    fallback: Predictor

    @property
    def memory(self) -> int:
        return self.history

    def weights(self, target: int, stored: Sequence[int]) -> list[float]:
        return self.fallback.weights(target, stored)

    def fitted(self, target: int, stored: Sequence[int], gram: npt.NDArray[np.float64]) -> list[float]:
        m = uniform_stretch(stored)
        inner = gram[:m, :m][::-1, ::-1]  # oldest first
        if m < FEWEST or not np.isfinite(inner).all() or inner[:-1, :-1].trace() <= 0:
            return self.weights(target, stored)
        horizon = (target - stored[0]) / (stored[0] - stored[1])
        own = _modes(inner, horizon, self.ridge)
        return [*own[::-1].tolist(), *[0.0] * (len(stored) - m)]


def _modes(inner: npt.NDArray[np.float64], horizon: float, ridge: float) -> npt.NDArray[np.float64]:
    """Weights on the features whose inner products are given, oldest first, for a forecast `horizon` spacings ahead."""
    squares, vectors = np.linalg.eigh(inner)
    features = np.sqrt(np.maximum(squares, 0.0))[:, None] * vectors.T  # columns: in a basis of their span
    past, next_ = features[:, :-1], features[:, 1:]
    left, sizes, right = np.linalg.svd(past, full_matrices=False)
    kept = sizes > SMALLEST * sizes[0]
    inverse = right[kept].T / (sizes[kept] + ridge * sizes[0])  # V S^-1
    rates, eigenvectors = np.linalg.eig(left[:, kept].T @ next_ @ inverse)
    modes = inverse @ eigenvectors  # as weights on Y
    # Not by the normal equations: two nearly equal rates, as on a straight line, make the modes nearly parallel.
    amplitudes = np.linalg.lstsq(next_ @ modes, features[:, -1].astype(complex), rcond=None)[0]
    on_next = (modes @ (rates.astype(complex) ** horizon * amplitudes)).real
    return np.concatenate([[0.0], on_next])


@method("dmd", kind="caching", paper="dynamic mode decomposition, as in hicache-pp and cache-dit")
@dataclass(frozen=True, kw_only=True)
class DMD(ScheduledMethod):
    """Forecast by dynamic modes: a sum of damped exponentials fitted to the newest features (DMD)."""

    history: Annotated[History, "how many features are kept"] = 5
    ridge: Annotated[Ridge, "added to the singular values, relative to the largest"] = 1e-8
    sigma: Annotated[Scale, "of the Hermite forecast while the history is short or uneven"] = 0.7

    def predictors(self) -> Mapping[str, Predictor]:
        fallback = Hermite(2, first=self.first_difference, sigma=self.sigma)
        return {"whole": DynamicModes(self.history, self.ridge, fallback)}
