"""Which steps are *full* (the blocks run) and which are *cached* (their result is forecast).

Steps count up from 0 in the order of execution. A schedule decides once per step, for all passes of that step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from hasten.errors import ConfigError, ScheduleError

__all__ = ["Decision", "Explicit", "Schedule", "Uniform", "full_steps"]


@dataclass(frozen=True)
class Decision:
    """Whether a step is full, and why."""

    full: bool
    reason: str


class Schedule(Protocol):
    """Anything that decides which steps are full."""

    def decide(self, step: int, last_full: int | None) -> Decision:
        """Decide for `step`, given the latest full step of the run (None before the first)."""
        ...

    def check(self, total: int) -> None:
        """Raise `ScheduleError` if the schedule cannot serve a run of `total` steps."""
        ...


@dataclass(frozen=True)
class Uniform:
    """`warmup` full steps, then one full step every `interval` steps.

    The rule of TaylorSeer's, HiCache's and FreqCa's code: no step is forced at the end. With 50 steps and a warm-up
    of 3, interval 5 gives the full steps 0, 1, 2, 7, 12, ..., 47. A warm-up of 1 gives 0, N, 2N, ... (FORA's rule).
    """

    interval: int
    warmup: int = 3

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ConfigError(f"interval must be at least 1 (1 computes every step), got {self.interval}")
        if self.warmup < 1:
            raise ConfigError(f"warmup must be at least 1, because a forecast needs a computed step, got {self.warmup}")

    def decide(self, step: int, last_full: int | None) -> Decision:
        if step < self.warmup:
            return Decision(True, "warm-up")
        if last_full is None or step - last_full >= self.interval:
            return Decision(True, "interval")
        return Decision(False, "forecast")

    def check(self, total: int) -> None:
        if self.warmup > total:
            raise ScheduleError(
                f"a warm-up of {self.warmup} full steps is longer than the run of {total} steps; "
                f"use warmup={max(1, total // 3)} or run more steps"
            )


@dataclass(frozen=True)
class Explicit:
    """Exactly the listed steps are full."""

    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.steps or self.steps[0] != 0:
            raise ConfigError(
                f"explicit full steps must begin with 0, because a forecast needs a computed step, got {self.steps}"
            )
        if any(b <= a for a, b in zip(self.steps, self.steps[1:], strict=False)):
            raise ConfigError(f"explicit full steps must increase strictly, got {self.steps}")

    def decide(self, step: int, last_full: int | None) -> Decision:
        full = step in self.steps
        return Decision(full, "listed" if full else "forecast")

    def check(self, total: int) -> None:
        if self.steps[-1] >= total:
            raise ScheduleError(f"full step {self.steps[-1]} lies outside the run of {total} steps (0 to {total - 1})")


def full_steps(schedule: Schedule, total: int) -> list[int]:
    """The full steps of a run of `total` steps."""
    fulls: list[int] = []
    for step in range(total):
        if schedule.decide(step, fulls[-1] if fulls else None).full:
            fulls.append(step)
    return fulls
