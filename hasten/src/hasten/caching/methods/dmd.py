"""DMD: dynamic mode decomposition, a sum of damped exponentials in place of a polynomial. As a cache predictor in
hicache-pp and cache-dit; the decomposition is Schmid's (Journal of Fluid Mechanics 656, 2010).

    X = [f_1 .. f_{m-1}],  Y = [f_2 .. f_m],  X = U S V^T,  A = U^T Y V S^-1 = W diag(l) W^-1
    F^(a_0 + x) = Re Phi (l^(x / spacing) b),   Phi = Y V S^-1 W,   Phi b ~ f_m

Everything here follows from the m x m inner products of the kept features, and the forecast lies in their span, so that
it is again a weighted sum of features: only the weights depend on the data.

The operator carries a feature one spacing further, hence it takes evenly spaced full steps: the newest stretch of equal
distances is used. With fewer than four, the forecast is Hermite's. Small singular values are dropped.

Departures: one decomposition serves a whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hasten.caching.method import CachingMethod
from hasten.caching.predictors import Hermite, Predictor
from hasten.errors import ConfigError
from hasten.registry import method

__all__ = ["DMD", "DynamicModes"]

FEWEST = 4
SMALLEST = 1e-4  # of the singular values, relative to the largest


def uniform_stretch(anchors: Sequence[int]) -> int:
    """How many of the newest anchors are evenly spaced."""
    gaps = -np.diff(np.asarray(anchors))
    equal = np.flatnonzero(gaps != gaps[0]) if len(gaps) else np.asarray([])
    return len(anchors) if len(equal) == 0 else int(equal[0]) + 1


@dataclass(frozen=True)
class DynamicModes:
    """A forecast by dynamic modes, from the inner products of the features.

    Args:
        history: how many features are kept.
        ridge: of the amplitudes, relative to the largest.
        fallback: serves while the history is short or uneven.
    """

    history: int
    ridge: float
    fallback: Predictor

    def __post_init__(self) -> None:
        if self.history < FEWEST:
            raise ConfigError(f"history must be at least {FEWEST}, got {self.history}")
        if self.ridge < 0:
            raise ConfigError(f"ridge must not be negative, got {self.ridge}")

    @property
    def memory(self) -> int:
        return self.history

    def weights(self, target: int, anchors: Sequence[int]) -> list[float]:
        return self.fallback.weights(target, anchors)

    def fitted(self, target: int, anchors: Sequence[int], gram: npt.NDArray[np.float64]) -> list[float]:
        m = uniform_stretch(anchors)
        if m < FEWEST:
            return self.weights(target, anchors)
        inner = gram[:m, :m][::-1, ::-1]  # oldest first
        horizon = (target - anchors[0]) / (anchors[0] - anchors[1])
        own = _modes(inner, horizon, self.ridge)
        return [*own[::-1].tolist(), *[0.0] * (len(anchors) - m)]


def _modes(inner: npt.NDArray[np.float64], horizon: float, ridge: float) -> npt.NDArray[np.float64]:
    """Weights on the features whose inner products are given, oldest first, for a forecast `horizon` spacings ahead."""
    squares, vectors = np.linalg.eigh(inner[:-1, :-1])
    kept = squares > max(squares[-1], 0.0) * SMALLEST**2
    scaled = vectors[:, kept] / np.sqrt(squares[kept])  # V S^-1
    operator = scaled.T @ inner[:-1, 1:] @ scaled
    eigenvalues, eigenvectors = np.linalg.eig(operator)
    modes = scaled @ eigenvectors  # as weights on Y
    overlap = modes.conj().T @ inner[1:, 1:] @ modes
    pull = ridge * np.abs(overlap).max() * np.eye(len(overlap))
    amplitudes = np.linalg.solve(overlap + pull, modes.conj().T @ inner[1:, -1])
    on_y = (modes @ (eigenvalues.astype(complex) ** horizon * amplitudes)).real
    return np.concatenate([[0.0], on_y])


@method("dmd", kind="caching", paper="dynamic mode decomposition, as in hicache-pp and cache-dit")
@dataclass(frozen=True, kw_only=True)
class DMD(CachingMethod):
    """Forecast by dynamic modes: a sum of damped exponentials fitted to the newest features (DMD).

    Args:
        history: how many features are kept.
        ridge: of the amplitudes.
        sigma: of the Hermite forecast while the history is short or uneven.
    """

    history: int = 5
    ridge: float = 1e-8
    sigma: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        self.predictors()  # validates the parameters

    def predictors(self) -> Mapping[str, Predictor]:
        fallback = Hermite(2, first=self.first_difference, sigma=self.sigma)
        return {"whole": DynamicModes(self.history, self.ridge, fallback)}
