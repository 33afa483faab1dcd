"""What is remembered of the computed steps, for one pass: a few features for each cache key of the site."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hasten.caching.components import Components, FeatureKey
from hasten.caching.predictors import GramPredictor
from hasten.models import TokenLayout

__all__ = ["Listener", "PassMemory", "finite", "without_autocast"]

Listener = Callable[[str, int, str, Tensor], None]


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Features keep the dtype in which the model made them; autocast would round what is computed from them."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


def finite(forecast: Tensor) -> Tensor:
    """A forecast within the range of its dtype: models in float16 clip what they compute, an extrapolation does not."""
    if forecast.dtype is not torch.float16:
        return forecast
    limits = torch.finfo(forecast.dtype)
    return forecast.clamp(limits.min, limits.max)


class _Stored:
    """The newest features under one cache key, and what forecasts them."""

    def __init__(self, components: Components) -> None:
        self.components = components
        keep = max(predictor.memory for predictor in components.predictors.values())
        self.steps: deque[tuple[int, Tensor]] = deque(maxlen=keep)  # newest first
        self.fitted = any(isinstance(predictor, GramPredictor) for predictor in components.predictors.values())
        self.gram: npt.NDArray[np.float64] = np.zeros((0, 0))

    def add(self, step: int, feature: Tensor, mean: Callable[[Tensor], Tensor]) -> None:
        self.steps.appendleft((step, feature))
        if self.fitted:
            row = [(feature.float() * old.float()).mean(dtype=torch.float64) for _, old in self.steps]
            size = len(row)
            gram = np.empty((size, size))
            gram[1:, 1:] = self.gram[: size - 1, : size - 1]
            gram[0] = gram[:, 0] = mean(torch.stack(row)).cpu().numpy()
            self.gram = gram


class PassMemory:
    """Features of one pass of one run, and their forecast.

    Args:
        components: gives the split and the predictors of a feature.
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
        self._stored: dict[str, _Stored] = {}
        self._weights: dict[tuple[int, tuple[int, ...], int], dict[str, list[float]]] = {}
        self.step = 0
        # What the site has to know of the results beside their features.
        self.forms: dict[str, Any] = {}

    @property
    def empty(self) -> bool:
        """Whether nothing has been recorded yet."""
        return not self._stored

    @property
    def cache_keys(self) -> tuple[str, ...]:
        """Cache keys of what has been recorded, in order."""
        return tuple(self._stored)

    @property
    def bytes(self) -> int:
        """Bytes of the features held."""
        return sum(f.numel() * f.element_size() for stored in self._stored.values() for _, f in stored.steps)

    def record(self, key: str, feature: Tensor) -> None:
        """Keep the feature of the current step. It is copied, since models go on to work on views of it."""
        stored = self._stored.get(key)
        if stored is None:
            stored = self._stored[key] = _Stored(self._components(FeatureKey(self._pass_name, key, self._layout)))
        if stored.steps and stored.steps[0][0] == self.step:
            raise RuntimeError(
                f"feature {key!r} was recorded twice in step {self.step}: its module runs twice in a forward"
            )
        with without_autocast(feature.device):
            stored.add(self.step, feature.detach().clone(), self._mean)
        self.observe(key, stored.steps[0][1])

    def observe(self, key: str, tensor: Tensor) -> None:
        """Tell the listener of a tensor that need not be remembered."""
        if self._listener is not None:
            self._listener(self._pass_name, self.step, key, tensor)

    def forecast(self, key: str) -> Tensor:
        """The feature that the current step would have had."""
        stored = self._stored[key]
        steps = tuple(step for step, _ in stored.steps)
        features = [feature for _, feature in stored.steps]
        with without_autocast(features[0].device):
            return finite(stored.components.projector.combine(features, self._weigh(stored, steps)))

    def _weigh(self, stored: _Stored, steps: tuple[int, ...]) -> Mapping[str, list[float]]:
        """Weights of each component. They depend on the steps alone, and so serve all features of the same components,
        unless a predictor fits them to the features themselves."""
        predictors = stored.components.predictors.items()
        if stored.fitted:
            return {
                name: predictor.fitted(self.step, steps, stored.gram)
                if isinstance(predictor, GramPredictor)
                else predictor.weights(self.step, steps)
                for name, predictor in predictors
            }
        key = (self.step, steps, id(stored.components))
        if key not in self._weights:
            self._weights = {k: w for k, w in self._weights.items() if k[0] == self.step}
            self._weights[key] = {name: predictor.weights(self.step, steps) for name, predictor in predictors}
        return self._weights[key]
