"""EasyCache: skip while the result is expected to follow its input. Zhou et al., "Less is Enough: Training-Free Video
Diffusion Acceleration via Runtime-Adaptive Caching", arXiv:2507.02860.

    k = mean|out - out'| / mean|x - x'|                  at computed steps, primes: the computed step before
    error <- error + k mean|x_t - x_{t-1}| / mean|out'|  at every step; a computed step resets it
    skip while error <= threshold:  out = x + (out - x at the last computed step)

`x` is what enters the transformer, `out` its result: no block is looked into, and a skipped step runs nothing.

Departures: three computed steps at the start by default (paper: ten), which a budget of seven could not hold. Where
input and result differ in shape (reference tokens, condition channels, learned variance), the change is taken over the
part that corresponds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hasten.caching.adaptive import AdaptiveMethod
from hasten.caching.gates import TINY, Gate, ThresholdGate
from hasten.caching.method import Feature
from hasten.caching.sums import magnitude, written
from hasten.registry import method

__all__ = ["EasyCache"]


class RateGate(ThresholdGate):
    """Predicts the change of the result from the change of the input."""

    def begin(self, total: int | None) -> None:
        super().begin(total)
        # Copies, in buffers that are written over: captured graphs and loops with fixed buffers write into theirs.
        self._x: Tensor | None = None  # of the step before
        self._computed: tuple[Tensor, Tensor] | None = None  # input and result of the newest computed step
        # Magnitudes that a computed step settles, on the device: change of the result and of the input since the one
        # before, and the result. They are ratios of means over equal numbers of elements, and so of sums.
        self._scales: Tensor | None = None
        self._error = 0.0

    def measure(self, step: int, observed: Tensor | None) -> float | None:
        assert observed is not None
        x, scales = self._x, self._scales
        moved = magnitude(observed - x)[None] if x is not None and x.shape == observed.shape else None
        self._x = written(x, observed)
        if moved is None or scales is None:
            return None
        sums = self.reduce(torch.cat([scales, moved])).tolist()
        result_change, input_change, result, change = sums
        self._error += result_change / max(input_change, TINY) * change / max(result, TINY)
        return self._error

    def on_decision(self, computed: bool, observed: Tensor | None) -> None:
        if computed:
            self._error = 0.0

    def computed(self, step: int, output: Tensor) -> None:
        assert self._x is not None
        x, before, self._scales = self._x, self._computed, None
        if before is not None and before[0].shape == x.shape and before[1].shape == output.shape:
            changes = (output - before[1], x - before[0], output)
            self._scales = torch.stack([magnitude(change) for change in changes])
        old = (None, None) if before is None else before
        self._computed = written(old[0], x), written(old[1], output)

    def held(self) -> Iterable[Tensor]:
        return [*(self._computed or ()), *(() if self._x is None else (self._x,))]


@method("easycache", kind="caching", paper="EasyCache, arXiv:2507.02860")
@dataclass(frozen=True, kw_only=True)
class EasyCache(AdaptiveMethod):
    """Skip while the result is expected to follow its input (EasyCache)."""

    site: Literal["output"] = "output"  # type: ignore[assignment]  # narrows the choice of all caches, not the base's
    threshold: float = 0.05
    warmup: int = 3
    schedule: Literal["uniform", "last"] = "last"

    def feature(self) -> Feature:
        return Feature(change=True, gate_input="input")

    def gate(self) -> Gate:
        return RateGate(self.threshold, self.interval, self.warmup, self.last)
