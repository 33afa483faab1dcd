"""What is remembered of the full steps, for one pass: a few features for each slot of the site."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hasten.caching.predictors import Predictor
from hasten.caching.projectors import Projector

__all__ = ["PassMemory"]


class PassMemory:
    """Features of one pass of one run, and their forecast.

    Args:
        predictors: one for each part of the projector.
        projector: how a feature is split.
    """

    def __init__(self, predictors: Mapping[str, Predictor], projector: Projector) -> None:
        self._predictors, self._projector = predictors, projector
        self._keep = max(predictor.memory for predictor in predictors.values())
        self._features: dict[str, deque[tuple[int, Tensor]]] = {}
        self._weights: dict[tuple[int, tuple[int, ...]], dict[str, list[float]]] = {}
        self.step = 0
        # What the module site has to know of each submodule's outputs beside their features.
        self.forms: dict[str, list[Any]] = {}

    @property
    def empty(self) -> bool:
        """Whether nothing has been recorded yet."""
        return not self._features

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of what has been recorded, in order."""
        return tuple(self._features)

    @property
    def bytes(self) -> int:
        """Bytes of the features held."""
        return sum(f.numel() * f.element_size() for slot in self._features.values() for _, f in slot)

    def record(self, slot: str, feature: Tensor) -> None:
        """Keep the feature of the current step. It is copied, since models go on to work on views of it."""
        history = self._features.setdefault(slot, deque(maxlen=self._keep))
        if history and history[0][0] == self.step:
            raise RuntimeError(
                f"slot {slot!r} was recorded twice in step {self.step}: its module runs twice in a forward"
            )
        history.appendleft((self.step, feature.detach().clone()))

    def forecast(self, slot: str) -> Tensor:
        """The feature that the current step would have had."""
        history = self._features[slot]
        anchors = tuple(step for step, _ in history)
        key = (self.step, anchors)
        if key not in self._weights:  # the module site asks once a slot, always for the same anchors
            self._weights = {key: {p: pred.weights(self.step, anchors) for p, pred in self._predictors.items()}}
        return self._projector.combine([feature for _, feature in history], self._weights[key])
