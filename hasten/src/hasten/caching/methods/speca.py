"""SpeCa: draft by a Taylor forecast, let the last block check it. Liu et al., "SpeCa: Accelerating Diffusion
Transformers with Speculative Feature Caching", arXiv:2509.11628.

    draft: Taylor forecast of what enters the last block and of what leaves it
    error = mean|draft out - block(draft in)| / mean|block(draft in)|
    the next step is computed if error > max(threshold * decay^(t / T), threshold / 10)

There is no rollback: a draft that fails has been used already. At least `least` and at most `interval - 1` steps are
drafted in a row.

Departures: the papers' code drafts the step after every computed one even in the warm-up; here the warm-up is computed.
Its thresholds (7 for FLUX.1-dev) belong to unnormalised errors; here errors are relative. Its floor is 0.1; here it is
a tenth of the threshold, whatever that is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from hasten.caching.adaptive import AdaptiveMethod
from hasten.caching.gates import Gate, ThresholdGate
from hasten.caching.method import Feature
from hasten.caching.predictors import Order
from hasten.caching.schedule import Decision
from hasten.parameters import Range
from hasten.registry import method

__all__ = ["SpeCa"]


class DraftGate(ThresholdGate):
    """Goes by how far the newest draft was off."""

    def __init__(self, config: SpeCa) -> None:
        super().__init__(config.threshold, config.interval, config.warmup, config.last)
        self._config = config

    def begin(self, total: int | None) -> None:
        super().begin(total)
        self._error = 0.0

    def measure(self, step: int, observed: Tensor | None) -> float | None:
        return self._error

    def decide(self, step: int, last_computed: int | None, observed: Tensor | None) -> Decision:
        progress = step / self.total if self.total else 0.0
        self._threshold = self._config.threshold * max(self._config.decay**progress, 0.1)
        decision = super().decide(step, last_computed, observed)
        early = last_computed is not None and step - last_computed <= self._config.least
        if decision.reason == "above threshold" and early:
            decision = Decision(False, "fewest drafts", decision.indicator)
        return decision

    def on_decision(self, computed: bool, observed: Tensor | None) -> None:
        self._error = 0.0  # the passes of this step set it again, and the worst of them counts

    def verified(self, step: int, error: float) -> None:
        self._error = max(self._error, error)


@method("speca", kind="caching", paper="SpeCa, arXiv:2509.11628")
@dataclass(frozen=True, kw_only=True)
class SpeCa(AdaptiveMethod):
    """Draft by a Taylor forecast and let the last block check the draft (SpeCa)."""

    threshold: Annotated[
        float, Range(0), "largest relative error of a draft after which drafting goes on, at the start of the run"
    ] = 0.1
    interval: int = 9
    warmup: int = 3
    order: Annotated[Order, "of the Taylor forecast"] = 2
    decay: Annotated[float, Range(above=0, most=1), "what is left of the threshold at the end of the run"] = 0.3
    least: Annotated[int, Range(0), "fewest drafts in a row"] = 2

    def feature(self) -> Feature:
        return Feature(verify=True)

    def gate(self) -> Gate:
        return DraftGate(self)
