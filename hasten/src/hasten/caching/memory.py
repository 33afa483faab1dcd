"""What is remembered of the computed steps, for one pass: a few features for each cache key of the site."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hasten.caching.components import Components, FeatureKey
from hasten.caching.sums import buffer_for, finite, fused_on, inner_product, map_tokens
from hasten.models import FinalNorm, TokenLayout

__all__ = ["Listener", "PassMemory", "finite"]

Listener = Callable[[str, int, str, Tensor], None]
AS_IT_IS = nullcontext()


class _Ring:
    """The newest features under one cache key, in buffers that are written in turn and keep their addresses.

    Args:
        components: what forecasts them.
    """

    def __init__(self, components: Components) -> None:
        self.components = components
        self.size = components.memory
        self.features: deque[Tensor] = deque()  # newest first
        self.steps: tuple[int, ...] = ()
        self.gram: npt.NDArray[np.float64] = np.zeros((0, 0))

    def write(self, step: int, feature: Tensor, norm: FinalNorm | None = None) -> int:
        """Copy a feature into the oldest buffer, or into a new one while there are fewer than are used.

        Args:
            step: of the feature.
            feature: what is kept; nobody's own.
            norm: what it is kept as it leaves; None for as it is.

        Returns:
            by how many bytes the buffers have grown.
        """
        grown = 0
        oldest = self.features.pop() if len(self.features) == self.size else None
        buffer = buffer_for(feature, oldest)
        if buffer is not oldest:
            grown = buffer.nbytes - (0 if oldest is None else oldest.nbytes)
            fused_on(feature.device)  # what compiles and waits does so here, not on a skipped step
        if norm is None:
            buffer.copy_(feature.detach())
        else:
            map_tokens(norm, feature.detach(), buffer)
        self.features.appendleft(buffer)
        self.steps = (step, *self.steps[: self.size - 1])
        return grown

    def weights(self, target: int) -> Mapping[str, Sequence[float]]:
        """Weights of each component on the features, for a forecast at step `target`."""
        return self.components.weights(target, self.steps, self.gram)

    def products(self) -> Tensor:
        """Inner products of the newest feature with all that are kept, divided by its size, `[k]` float64."""
        newest = self.features[0].view(-1)
        return torch.stack([inner_product(newest, old.view(-1)) for old in self.features]) / newest.numel()

    def extend_gram(self, row: npt.NDArray[np.float64]) -> None:
        """Take in the products of the newest feature."""
        size = len(row)
        gram = np.empty((size, size))
        gram[1:, 1:] = self.gram[: size - 1, : size - 1]
        gram[0] = gram[:, 0] = row
        self.gram = gram


class PassMemory:
    """Features of one pass of one run, and their forecast.

    Args:
        components: gives split and predictors of a feature key.
        pass_name: of the pass.
        layout: where the tokens of the image lie, for methods that split by it.
        mean: means of numbers over each device's tokens, as means over all tokens of one image.
        listener: called with (pass, step, cache key, feature) for everything recorded. The feature is the memory's own
            and is written over later: a listener copies what it keeps.
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
        self._rings: dict[str, _Ring] = {}
        self._unread: list[tuple[_Ring, Tensor]] = []  # rings whose newest products are on the device alone
        self.step = 0
        self.bytes = 0  # of the features held
        self.mixed = False  # whether the forward under way is in mixed precision
        self.method: object = None  # whose forecasts it makes
        # What the site has to know of the results beside their features.
        self.forms: dict[str, Any] = {}

    def predict_by(self, components: Callable[[FeatureKey], Components]) -> None:
        """Forecast by other predictors from now on, which use as many features."""
        self._components = components
        for key, ring in self._rings.items():
            ring.components = components(self._feature_key(key))

    def _feature_key(self, key: str) -> FeatureKey:
        return FeatureKey(self._pass_name, key, self._layout)

    @property
    def empty(self) -> bool:
        """Whether nothing has been recorded yet."""
        return not self._rings

    @property
    def cache_keys(self) -> tuple[str, ...]:
        """Cache keys of what has been recorded, in order."""
        return tuple(self._rings)

    def record(self, key: str, feature: Tensor, norm: FinalNorm | None = None) -> None:
        """Keep the feature of the current step, normalised where a norm is given.

        It is copied, since models go on to work on views of it.
        """
        ring = self._rings.get(key)
        if ring is None:
            ring = self._rings[key] = _Ring(self._components(self._feature_key(key)))
        elif ring.steps[0] == self.step:
            raise RuntimeError(
                f"feature {key!r} was recorded twice in step {self.step}: its module runs twice in a forward"
            )
        with self.exact(feature.device):
            self.bytes += ring.write(self.step, feature, norm)
        if ring.components.fitted:
            with self.exact(feature.device):
                self._unread.append((ring, ring.products()))
        self.observe(key, ring.features[0])

    def observe(self, key: str, tensor: Tensor) -> None:
        """Tell the listener of a tensor that need not be remembered."""
        if self._listener is not None:
            self._listener(self._pass_name, self.step, key, tensor)

    def settle(self) -> None:
        """The forward of a computed step is over: read what predictors are fitted to, at once for all cache keys."""
        if not self._unread:
            return
        rows = self._mean(torch.cat([row for _, row in self._unread])).cpu().numpy()
        for ring, row in self._unread:
            ring.extend_gram(rows[: len(row)])
            rows = rows[len(row) :]
        self._unread.clear()

    def forecast(self, key: str) -> Tensor:
        """The feature that the current step would have had, as a new tensor."""
        ring = self._rings[key]
        with self.exact(ring.features[0].device):
            return finite(ring.components.projector.combine([*ring.features], ring.weights(self.step)))

    def exact(self, device: torch.device) -> AbstractContextManager[Any]:
        """Features keep the dtype in which the model made them; autocast would round what is computed from them."""
        return torch.autocast(device.type, enabled=False) if self.mixed else AS_IT_IS
