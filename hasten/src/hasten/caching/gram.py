"""Predictors whose weights depend on the features, through the inner products of the anchors alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from hasten.caching.predictors import Predictor

__all__ = ["GramPredictor"]


@runtime_checkable
class GramPredictor(Predictor, Protocol):
    """A predictor that fits its weights to the features at hand."""

    def fitted(self, target: int, anchors: Sequence[int], gram: npt.NDArray[np.float64]) -> list[float]:
        """Weights on the anchors, newest first, from their inner products divided by the size of a feature."""
        ...
