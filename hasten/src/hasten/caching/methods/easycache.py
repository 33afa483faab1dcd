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
from hasten.caching.gates import Gate, ThresholdGate
from hasten.caching.method import Feature
from hasten.registry import method

__all__ = ["EasyCache"]


class RateGate(ThresholdGate):
    """Predicts the change of the result from the change of the input."""

    def begin(self, total: int | None) -> None:
        super().begin(total)
        self._x: Tensor | None = None
        self._computed: list[tuple[Tensor, Tensor]] = []  # (input, result) of the two newest computed steps
        self._error = 0.0

    def _mean(self, tensor: Tensor) -> float:
        sums = self.reduce(torch.stack([tensor.float().abs().sum(), tensor.new_tensor(tensor.numel()).float()]))
        return float(sums[0] / sums[1])

    def measure(self, step: int, observed: Tensor | None) -> float | None:
        previous, self._x = self._x, observed
        if previous is None or observed is None or len(self._computed) < 2:
            return None
        (x1, out1), (x0, out0) = self._computed
        rate = self._mean(out0 - out1) / max(self._mean(x0 - x1), 1e-12)
        self._error += rate * self._mean(observed - previous) / max(self._mean(out0), 1e-12)
        return self._error

    def on_decision(self, computed: bool, observed: Tensor | None) -> None:
        if computed:
            self._error = 0.0

    def computed(self, step: int, output: Tensor) -> None:
        assert self._x is not None
        self._computed = [*self._computed[-1:], (self._x, output)]

    def held(self) -> Iterable[Tensor]:
        return [tensor for pair in self._computed for tensor in pair] + ([] if self._x is None else [self._x])


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
