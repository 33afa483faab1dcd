"""Gates decide step by step whether to compute: by a schedule, or by looking at what the sampler is doing.

A gate decides at the first pass of a step, for all passes of it. One gate serves one run; `begin` starts it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from hasten.caching.schedule import Decision, Part, Schedule, check_warmup, computed_steps, of_part
from hasten.caching.sums import magnitude

__all__ = ["Gate", "Scheduled", "ThresholdGate", "relative_change"]

Reduce = Callable[[Tensor], Tensor]
TINY = float(torch.finfo(torch.float32).tiny)


class Gate(ABC):
    """Decides which steps are computed.

    Attributes:
        total: steps of the run, or of the part of it in which the transformer is called.
        part: where that part lies in the run, if two experts share it.
    """

    total: int | None = None
    part: Part | None = None
    reduce: Reduce = staticmethod(lambda sums: sums)

    def begin(self, total: int | None) -> None:
        """A run of `total` steps begins (None: nobody knows how many).

        Raises:
            ScheduleError: if the gate cannot serve such a run.
        """
        self.total = total

    @abstractmethod
    def decide(self, step: int, last_computed: int | None, observed: Tensor | None) -> Decision:
        """Decide for `step`, given the latest computed step and what the method's `Feature.gate_input` asks for."""

    def computed(self, step: int, output: Tensor) -> None:  # noqa: B027
        """Given the transformer's result after the first pass of a computed step."""

    def verified(self, step: int, error: float) -> None:  # noqa: B027
        """Told how far a draft was from what the last block makes of it."""

    def skips_nothing(self, total: int) -> bool:
        """Whether it is known beforehand that every step of a run will be computed."""
        return False

    def held(self) -> Iterable[Tensor]:
        """Tensors that the gate keeps from step to step."""
        return ()


class Scheduled(Gate):
    """Computed steps that are known beforehand."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = self._now = schedule

    def begin(self, total: int | None) -> None:
        super().begin(total)
        if self.part is None or total is None:
            self._now = self._schedule.for_run(total)
        else:
            self._now = of_part(self._schedule, self.part, total)

    def decide(self, step: int, last_computed: int | None, observed: Tensor | None) -> Decision:
        return self._now.decide(step, last_computed)

    def skips_nothing(self, total: int) -> bool:
        return len(computed_steps(self._now, total)) == total


class ThresholdGate(Gate):
    """Computes a step when a measured value exceeds a threshold.

    Args:
        threshold: largest value at which a step is still skipped.
        interval: longest distance from one computed step to the next; 1 computes every step.
        warmup: computed steps at the start.
        last: compute the last step as well, where the number of steps is known.
    """

    def __init__(self, threshold: float, interval: int, warmup: int, last: bool) -> None:
        self._threshold, self._interval, self._warmup, self._last = threshold, interval, warmup, last

    def begin(self, total: int | None) -> None:
        super().begin(total)
        if total is not None and self._interval > 1:  # else every step is computed, however few there are
            if self.part is None:
                check_warmup(self._warmup, total)
            self._warmup = min(self._warmup, total)

    @abstractmethod
    def measure(self, step: int, observed: Tensor | None) -> float | None:
        """The value at `step`; None where nothing can be measured yet. Called once for every step."""

    def on_decision(self, computed: bool, observed: Tensor | None) -> None:
        """Told what was decided from the measured value."""

    def decide(self, step: int, last_computed: int | None, observed: Tensor | None) -> Decision:
        value = self.measure(step, observed)
        decision = self._rule(step, last_computed, value)
        self.on_decision(decision.computed, observed)
        return decision

    def _rule(self, step: int, last_computed: int | None, value: float | None) -> Decision:
        if step < self._warmup or last_computed is None or value is None:
            return Decision(True, "warm-up")
        if self._last and self.total is not None and step == self.total - 1:
            return Decision(True, "last step")
        if step - last_computed >= self._interval:
            return Decision(True, "interval")
        if value > self._threshold:
            return Decision(True, "above threshold", value)
        return Decision(False, "below threshold", value)

    def skips_nothing(self, total: int) -> bool:
        return self._interval == 1 or total <= self._warmup


def relative_change(
    new: Tensor, old: Tensor, reduce: Reduce, per_sample: bool = False, size: Tensor | None = None
) -> float:
    """`mean |new - old| / mean |old|`, the measure of FBCache and TeaCache, summed in float32. Reads one tensor.

    Args:
        new, old: `[B, ...]`.
        reduce: adds up sums over the devices that share the tokens of one image.
        per_sample: measure each image of the batch on its own and return the largest change, the worst case over the
            batch; otherwise the batch is measured as one.
        size: `magnitude(old, per_sample)`, where that is known.
    """
    sums = torch.stack([magnitude(new - old, per_sample), magnitude(old, per_sample) if size is None else size])
    change, whole = np.asarray(reduce(sums).tolist())
    return float(np.max(change / np.maximum(whole, TINY)))
