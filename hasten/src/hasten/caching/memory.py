"""What is remembered of the computed steps, for one pass: a few features per cache key of the site."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hasten.caching.components import Components, FeatureKey
from hasten.caching.predictors import GramPredictor
from hasten.models import TokenLayout

__all__ = ["PassMemory"]

Listener = Callable[[str, int, str, Tensor], None]


class _Entry:
    """The newest features of one cache key, and what forecasts them."""

    def __init__(self, components: Components) -> None:
        self.components = components
        predictors = components.predictors.values()
        self.stored: deque[tuple[int, Tensor]] = deque(maxlen=max(predictor.memory for predictor in predictors))
        self.fitted = any(isinstance(predictor, GramPredictor) for predictor in predictors)
        self.gram: npt.NDArray[np.float64] = np.zeros((0, 0))

    def add(self, step: int, feature: Tensor, mean: Callable[[Tensor], Tensor]) -> None:
        self.stored.appendleft((step, feature))
        if self.fitted:
            row = [(feature.float() * old.float()).mean(dtype=torch.float64) for _, old in self.stored]
            size = len(row)
            gram = np.empty((size, size))
            gram[1:, 1:] = self.gram[: size - 1, : size - 1]
            gram[0] = gram[:, 0] = mean(torch.stack(row)).cpu().numpy()
            self.gram = gram


class PassMemory:
    """Features of one pass of one run, and their forecast.

    Args:
        components: gives the split and the predictors of a feature key.
        pass_name: the pass.
        layout: where the image's tokens lie, or None where that is not known.
        mean: averages per-device means over the devices that share the tokens of one image.
        listener: called with (pass, step, cache key, feature) for everything recorded.
    """

    def __init__(
        self,
        components: Callable[[FeatureKey], Components],
        pass_name: str = "pass0",
        layout: TokenLayout | None = None,
        mean: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        listener: Listener | None = None,
    ) -> None:
        self._components, self._pass_name, self._layout = components, pass_name, layout
        self._mean, self._listener = mean, listener
        self._entries: dict[str, _Entry] = {}
        self._weights: dict[tuple[int, tuple[int, ...], int], dict[str, list[float]]] = {}
        self.step = 0
        # What the module site has to know of each submodule's outputs beside their features.
        self.forms: dict[str, list[Any]] = {}

    @property
    def empty(self) -> bool:
        """Whether nothing has been recorded yet."""
        return not self._entries

    @property
    def cache_keys(self) -> tuple[str, ...]:
        """Names of what has been recorded, in order."""
        return tuple(self._entries)

    @property
    def bytes(self) -> int:
        """Bytes of the features held."""
        return sum(f.numel() * f.element_size() for entry in self._entries.values() for _, f in entry.stored)

    def record(self, name: str, feature: Tensor) -> None:
        """Keep the feature of the current step. It is copied, since models go on to work on views of it."""
        entry = self._entries.get(name)
        if entry is None:
            key = FeatureKey(self._pass_name, name, self._layout)
            entry = self._entries[name] = _Entry(self._components(key))
        if entry.stored and entry.stored[0][0] == self.step:
            raise RuntimeError(f"{name!r} was recorded twice in step {self.step}: its module runs twice in a forward")
        entry.add(self.step, feature.detach().clone(), self._mean)
        self.show(name, entry.stored[0][1])

    def show(self, name: str, tensor: Tensor) -> None:
        """Tell the listener of a tensor that need not be remembered."""
        if self._listener is not None:
            self._listener(self._pass_name, self.step, name, tensor)

    def forecast(self, name: str) -> Tensor:
        """The feature that the current step would have had."""
        entry = self._entries[name]
        return entry.components.projector.combine([feature for _, feature in entry.stored], self._weigh(entry))

    def _weigh(self, entry: _Entry) -> Mapping[str, list[float]]:
        """Weights of each component. They depend on the steps alone, and so serve all cache keys of the same
        components, unless a predictor fits them to the features themselves."""
        stored = tuple(step for step, _ in entry.stored)
        predictors = entry.components.predictors.items()
        if entry.fitted:
            return {
                component: predictor.fitted(self.step, stored, entry.gram)
                if isinstance(predictor, GramPredictor)
                else predictor.weights(self.step, stored)
                for component, predictor in predictors
            }
        key = (self.step, stored, id(entry.components))
        if key not in self._weights:
            self._weights = {k: w for k, w in self._weights.items() if k[0] == self.step}
            self._weights[key] = {name: predictor.weights(self.step, stored) for name, predictor in predictors}
        return self._weights[key]
