"""FBCache and DBCache: skip while the change that the first blocks make stays the same. ParaAttention's first-block
cache, as in diffusers' `FirstBlockCacheConfig`; with more front blocks and a forecast, DBCache of cache-dit.

    skip if mean|r - r_full| / mean|r_full| <= threshold,     r = change that the front blocks make
    out  = (hidden tokens after the front blocks) + (change of the other blocks at the last computed step)

`r_full` is that change at the last computed step. The front blocks run at every step.

Departures: the text tokens after the last block are not rebuilt, since no final layer of the families here reads them.
Deciding per batch or per image is a choice (`per_sample`). The other blocks' change may be forecast (`order=1`: what
cache-dit calls DBCache + TaylorSeer) and not only reused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from hasten.caching.adaptive import AdaptiveMethod
from hasten.caching.gates import Gate, ThresholdGate, relative_change
from hasten.caching.method import Feature
from hasten.caching.sums import magnitude
from hasten.parameters import Range
from hasten.registry import method

__all__ = ["FBCache"]


class FrontGate(ThresholdGate):
    """Compares the change that the front blocks make with that of the last computed step."""

    def __init__(self, config: FBCache) -> None:
        super().__init__(config.threshold, config.interval, config.warmup, config.last)
        self._per_sample = config.per_sample

    def begin(self, total: int | None) -> None:
        super().begin(total)
        self._reference: Tensor | None = None
        self._size: Tensor | None = None  # of the reference

    def measure(self, step: int, observed: Tensor | None) -> float | None:
        if self._reference is None or observed is None or observed.shape != self._reference.shape:
            return None
        return relative_change(observed, self._reference, self.reduce, self._per_sample, self._size)

    def on_decision(self, computed: bool, observed: Tensor | None) -> None:
        if computed:
            self._reference = observed
            self._size = None if observed is None else magnitude(observed, self._per_sample)

    def held(self) -> Iterable[Tensor]:
        return () if self._reference is None else (self._reference,)


@method("fbcache", kind="caching", paper="first-block cache of ParaAttention and diffusers; DBCache of cache-dit")
@dataclass(frozen=True, kw_only=True)
class FBCache(AdaptiveMethod):
    """Skip while the change that the first blocks make stays the same (FBCache, DBCache)."""

    threshold: float = 0.05
    warmup: int = 1
    front: Annotated[int, Range(1), "blocks that run at every step and decide (DBCache's Fn)"] = 1
    per_sample: Annotated[bool, "let the image of a batch that changed most decide, not the batch's mean"] = False

    def feature(self) -> Feature:
        return Feature(change=True, front=self.front, gate_input="front")

    def gate(self) -> Gate:
        return FrontGate(self)
