"""Which steps are *full* (the blocks run) and which are *cached* (their result is forecast).

Steps count up from 0 in the order of execution. A schedule decides once per step, for all passes of that step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from hasten.errors import ConfigError, ScheduleError

__all__ = ["SCHEDULES", "Decision", "Explicit", "Schedule", "Spread", "Uniform", "computed_steps", "longest_within"]

SCHEDULES = ("uniform", "last", "even", "early", "tuned")


@dataclass(frozen=True)
class Decision:
    """Whether a step is full, and why; `indicator` is the number that an adaptive gate went by."""

    computed: bool
    reason: str
    indicator: float | None = None


class Schedule(Protocol):
    """Anything that decides which steps are full."""

    def decide(self, step: int, last_computed: int | None) -> Decision:
        """Decide for `step`, given the latest computed step of the run (None before the first)."""
        ...

    def for_run(self, total: int | None) -> Schedule:
        """The schedule as it serves a run of `total` steps (None: nobody knows how many).

        Raises:
            ScheduleError: if it cannot serve such a run.
        """
        ...


@dataclass(frozen=True)
class Uniform:
    """`warmup` computed steps, then one computed step every `interval` steps.

    The rule of TaylorSeer's, HiCache's and FreqCa's code: no step is forced at the end. With 50 steps and a warm-up
    of 3, interval 5 gives the computed steps 0, 1, 2, 7, 12, ..., 47. A warm-up of 1 gives 0, N, 2N, ... (FORA's rule).

    Args:
        interval: steps from one computed step to the next; 1 computes every step.
        warmup: computed steps at the start.
        last: compute the last step as well, where detail forms.
    """

    interval: int
    warmup: int = 3
    last: bool = False

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ConfigError(f"interval must be at least 1 (1 computes every step), got {self.interval}")
        if self.warmup < 1:
            raise ConfigError(f"warmup must be at least 1, because a forecast needs a computed step, got {self.warmup}")

    def decide(self, step: int, last_computed: int | None) -> Decision:
        if step < self.warmup:
            return Decision(True, "warm-up")
        if last_computed is None or step - last_computed >= self.interval:
            return Decision(True, "interval")
        return Decision(False, "forecast")

    def for_run(self, total: int | None) -> Schedule:
        if total is None:
            if self.last:
                raise _needs_total("schedule 'last'")
            return self
        if self.warmup > total:
            raise ScheduleError(
                f"a warm-up of {self.warmup} computed steps is longer than the run of {total} steps; "
                f"use warmup={max(1, total // 3)} or run more steps"
            )
        return Explicit((*sorted({*_follow(self, total), total - 1}),)) if self.last else self


@dataclass(frozen=True)
class Spread:
    """As many computed steps as `Uniform(interval, warmup)` has, spread from the first step to the last.

    Step `i` of `n` falls on `(T - 1) (i / (n - 1))^power`: a power of 1 spreads them evenly, a larger one puts more of
    them early. The usual schedules spend their warm-up at the start and leave the end, where detail forms, to
    extrapolation.
    """

    interval: int
    warmup: int = 3
    power: float = 1.0

    def __post_init__(self) -> None:
        Uniform(self.interval, self.warmup)  # validates both
        if self.power <= 0:
            raise ConfigError(f"power must be positive, got {self.power}")

    def decide(self, step: int, last_computed: int | None) -> Decision:
        raise ScheduleError("a spread schedule decides nothing before `for_run` told it the number of steps")

    def for_run(self, total: int | None) -> Schedule:
        if total is None:
            raise _needs_total("a spread schedule")
        count = len(computed_steps(Uniform(self.interval, self.warmup), total))
        return Explicit(spread(count, total, self.power))


def spread(count: int, total: int, power: float = 1.0) -> tuple[int, ...]:
    """`count` different steps from 0 to `total - 1`, near `(total - 1) (i / (count - 1))^power`."""
    if count < 2:
        return (0,)
    steps = [round((total - 1) * (i / (count - 1)) ** power) for i in range(count)]
    for i in range(1, count):  # the dense end may round to the same step
        steps[i] = max(steps[i], steps[i - 1] + 1)
    for i in range(count - 1, 0, -1):
        steps[i] = min(steps[i], total - count + i)
    return tuple(steps)


def _needs_total(what: str) -> ScheduleError:
    return ScheduleError(
        f"{what} has to know how many steps a run has, which a bare transformer does not tell; "
        "accelerate the pipeline instead, or list the computed steps with steps=..."
    )


@dataclass(frozen=True)
class Explicit:
    """Exactly the listed steps are full."""

    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.steps or self.steps[0] != 0:
            raise ConfigError(
                f"explicit computed steps must begin with 0, because a forecast needs a computed step, got {self.steps}"
            )
        if any(b <= a for a, b in zip(self.steps, self.steps[1:], strict=False)):
            raise ConfigError(f"explicit computed steps must increase strictly, got {self.steps}")

    def decide(self, step: int, last_computed: int | None) -> Decision:
        listed = step in self.steps
        return Decision(listed, "listed" if listed else "forecast")

    def for_run(self, total: int | None) -> Schedule:
        if total is not None and self.steps[-1] >= total:
            raise ScheduleError(
                f"computed step {self.steps[-1]} lies outside the run of {total} steps (0 to {total - 1})"
            )
        return self


def computed_steps(schedule: Schedule, total: int) -> list[int]:
    """The computed steps of a run of `total` steps.

    Raises:
        ScheduleError: if the schedule cannot serve such a run.
    """
    return _follow(schedule.for_run(total), total)


def _follow(schedule: Schedule, total: int) -> list[int]:
    computed: list[int] = []
    for step in range(total):
        if schedule.decide(step, computed[-1] if computed else None).computed:
            computed.append(step)
    return computed


def longest_within(lists: Iterable[Sequence[int]], asked: Uniform, total: int) -> tuple[int, ...]:
    """The longest of some learned lists of computed steps that has no more of them than a uniform schedule.

    Raises:
        ScheduleError: if all are longer.
    """
    most = len(computed_steps(asked, total))
    known = sorted((tuple(steps) for steps in lists), key=len)
    fitting = [steps for steps in known if len(steps) <= most]
    if not fitting:
        raise ScheduleError(
            f"interval={asked.interval} with warmup={asked.warmup} asks for {most} computed steps, but lists were tuned "
            f"for {', '.join(str(len(steps)) for steps in known)}; use a shorter interval, or tune for fewer"
        )
    return fitting[-1]
