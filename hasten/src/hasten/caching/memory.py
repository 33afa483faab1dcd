"""What is remembered of the computed steps, for one pass: a few features for each slot of the site."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hasten.caching.components import Components, FeatureKey
from hasten.caching.gram import GramPredictor
from hasten.models import TokenLayout

__all__ = ["PassMemory"]

Listener = Callable[[str, int, str, Tensor], None]


class _Slot:
    """The newest features of one slot, and what forecasts them."""

    def __init__(self, parts: Components) -> None:
        self.parts = parts
        self.keep = max(predictor.memory for predictor in parts.predictors.values())
        self.anchors: deque[tuple[int, Tensor]] = deque(maxlen=self.keep)
        self.fitted = any(isinstance(predictor, GramPredictor) for predictor in parts.predictors.values())
        self.gram: npt.NDArray[np.float64] = np.zeros((0, 0))

    def add(self, step: int, feature: Tensor, mean: Callable[[Tensor], Tensor]) -> None:
        self.anchors.appendleft((step, feature))
        if self.fitted:
            row = [(feature.float() * old.float()).mean(dtype=torch.float64) for _, old in self.anchors]
            size = len(row)
            gram = np.empty((size, size))
            gram[1:, 1:] = self.gram[: size - 1, : size - 1]
            gram[0] = gram[:, 0] = mean(torch.stack(row)).cpu().numpy()
            self.gram = gram


class PassMemory:
    """Features of one pass of one run, and their forecast.

    Args:
        parts: gives the split and the predictors of a place.
        pass_name: the pass.
        layout: where the image's tokens lie, or None where that is not known.
        mean: averages per-device means over the devices that share the tokens of one image.
        listener: called with (pass, step, slot, feature) for everything recorded.
    """

    def __init__(
        self,
        parts: Callable[[FeatureKey], Components],
        pass_name: str = "pass0",
        layout: TokenLayout | None = None,
        mean: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        listener: Listener | None = None,
    ) -> None:
        self._parts, self._pass_name, self._layout = parts, pass_name, layout
        self._mean, self._listener = mean, listener
        self._slots: dict[str, _Slot] = {}
        self._weights: dict[tuple[int, tuple[int, ...], int], dict[str, list[float]]] = {}
        self.step = 0
        # What the module site has to know of each submodule's outputs beside their features.
        self.forms: dict[str, list[Any]] = {}

    @property
    def empty(self) -> bool:
        """Whether nothing has been recorded yet."""
        return not self._slots

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of what has been recorded, in order."""
        return tuple(self._slots)

    @property
    def bytes(self) -> int:
        """Bytes of the features held."""
        return sum(f.numel() * f.element_size() for slot in self._slots.values() for _, f in slot.anchors)

    def record(self, name: str, feature: Tensor) -> None:
        """Keep the feature of the current step. It is copied, since models go on to work on views of it."""
        slot = self._slots.get(name)
        if slot is None:
            slot = self._slots[name] = _Slot(self._parts(FeatureKey(self._pass_name, name, self._layout)))
        if slot.anchors and slot.anchors[0][0] == self.step:
            raise RuntimeError(
                f"slot {name!r} was recorded twice in step {self.step}: its module runs twice in a forward"
            )
        slot.add(self.step, feature.detach().clone(), self._mean)
        self.show(name, slot.anchors[0][1])

    def show(self, name: str, tensor: Tensor) -> None:
        """Tell the listener of a tensor that need not be remembered."""
        if self._listener is not None:
            self._listener(self._pass_name, self.step, name, tensor)

    def forecast(self, name: str) -> Tensor:
        """The feature that the current step would have had."""
        slot = self._slots[name]
        anchors = tuple(step for step, _ in slot.anchors)
        return slot.parts.projector.combine([feature for _, feature in slot.anchors], self._weigh(slot, anchors))

    def _weigh(self, slot: _Slot, anchors: tuple[int, ...]) -> Mapping[str, list[float]]:
        """Weights of each part. They depend on the steps alone, and so serve all slots of the same parts, unless a
        predictor fits them to the slot's own features."""
        predictors = slot.parts.predictors.items()
        if slot.fitted:
            return {
                part: predictor.fitted(self.step, anchors, slot.gram)
                if isinstance(predictor, GramPredictor)
                else predictor.weights(self.step, anchors)
                for part, predictor in predictors
            }
        key = (self.step, anchors, id(slot.parts))
        if key not in self._weights:
            self._weights = {k: w for k, w in self._weights.items() if k[0] == self.step}
            self._weights[key] = {part: predictor.weights(self.step, anchors) for part, predictor in predictors}
        return self._weights[key]
