"""Which steps are *computed* (the blocks run) and which are *skipped* (their features are forecast).

Steps count up from 0 in the order of execution. A schedule decides once per step, for all passes of that step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Protocol

from hasten.errors import ConfigError, ScheduleError
from hasten.parameters import Declared, Range

__all__ = [
    "Decision",
    "Explicit",
    "Part",
    "Schedule",
    "Spread",
    "Uniform",
    "UniformCount",
    "check_warmup",
    "computed_steps",
    "learned_list",
    "of_part",
    "spread",
    "told_steps",
]

Count = Annotated[int, Range(1)]


def told_steps(count: int) -> str:
    """A number of steps in words, for messages: `1 step`, `2 steps`."""
    return f"{count} step{'' if count == 1 else 's'}"


@dataclass(frozen=True)
class Decision:
    """Whether a step is computed, and why; `indicator` is the number that an adaptive gate went by."""

    computed: bool
    reason: str
    indicator: float | None = None


class Schedule(Protocol):
    """Anything that decides which steps are computed."""

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
class Uniform(Declared):
    """`warmup` computed steps, then one computed step every `interval` steps.

    The rule of TaylorSeer's, HiCache's and FreqCa's code: no step is forced at the end. With 50 steps and a warm-up
    of 3, interval 5 gives the computed steps 0, 1, 2, 7, 12, ..., 47. A warm-up of 1 gives 0, N, 2N, ... (FORA's rule).

    Args:
        interval: steps from one computed step to the next; 1 computes every step.
        warmup: computed steps at the start.
        last: compute the last step as well, where detail forms.
    """

    interval: Count
    warmup: Count = 3
    last: bool = False

    def shortened(self, total: int) -> Uniform:
        """With no longer a warm-up than `total` steps."""
        return replace(self, warmup=min(self.warmup, total))

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
        if self.interval > 1:  # else every step is computed, however few there are
            check_warmup(self.warmup, total)
        return Explicit((*sorted({*_follow(self, total), total - 1}),)) if self.last else self


@dataclass(frozen=True)
class UniformCount(Declared):
    """The uniform schedule with exactly `count` computed steps: the smallest interval that gives them in a run.

    Args:
        count: computed steps.
        warmup: computed steps at the start.
        last: compute the last step as well.
    """

    count: Count
    warmup: Count = 3
    last: bool = False

    def check(self) -> None:
        fewest = self.warmup + self.last
        if self.count < fewest:
            raise ConfigError(
                f"computed_steps={self.count} is less than warmup={self.warmup}{' and the last step' * self.last}; "
                f"use a shorter warmup, or schedule='even', which needs none"
            )

    def decide(self, step: int, last_computed: int | None) -> Decision:
        raise ScheduleError("a schedule by count decides nothing before `for_run` told it the number of steps")

    def for_run(self, total: int | None) -> Schedule:
        if total is None:
            raise _needs_total(f"computed_steps={self.count}")
        check_warmup(self.warmup, total)
        known: dict[int, int] = {}
        rest = total - self.warmup
        for interval in range(1, total + 1):
            # One more step for each interval that fits after the warm-up, and the last one where it is left over.
            known.setdefault(self.warmup + rest // interval + (self.last and rest % interval > 0), interval)
        if self.count not in known:
            counts = ", ".join(map(str, sorted(known)))
            raise ScheduleError(
                f"a uniform schedule with warmup={self.warmup} cannot compute {self.count} of {told_steps(total)}; "
                f"take one of {counts}, another warmup, or schedule='even', which has any number"
            )
        return Uniform(known[self.count], self.warmup, self.last).for_run(total)


@dataclass(frozen=True)
class Spread(Declared):
    """Computed steps that are spread from the first step to the last, or nearly to it.

    Step `i` of `n` falls on `E (i / (n - 1))^power`, where `E` is the last of the `T` steps of the run, `T - 1`, less
    `tail` of the mean gap `(T - 1) / (n - 1)`, in whole steps: a power of 1 spreads them evenly, a larger one puts more
    of them early. The usual schedules spend their warm-up at the start and leave a whole interval at the end, where
    detail forms, to extrapolation.

    Args:
        count: computed steps, or the uniform schedule that has as many.
        power: see above.
        tail: see above; 0 computes the last step.
    """

    count: Count | Uniform
    power: Annotated[float, Range(above=0)] = 1.0
    tail: Annotated[float, Range(0, 0.5)] = 0.0

    def decide(self, step: int, last_computed: int | None) -> Decision:
        raise ScheduleError("a spread schedule decides nothing before `for_run` told it the number of steps")

    def for_run(self, total: int | None) -> Schedule:
        if total is None:
            raise _needs_total("a spread schedule")
        asked = self.count
        if isinstance(asked, Uniform):  # of a run that is shorter than its warm-up: every step
            asked = len(computed_steps(asked.shortened(total), total))
        if asked > total:
            raise ScheduleError(
                f"computed_steps={asked} is more than the {told_steps(total)} of the run; use {total} or less"
            )
        skipped = int(self.tail * (total - 1) / (asked - 1)) if asked > 1 else 0
        return Explicit(spread(asked, total - skipped, self.power))


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


def check_warmup(warmup: int, total: int) -> None:
    """Refuse a warm-up that is longer than a run of `total` steps.

    Raises:
        ScheduleError: if it is.
    """
    if warmup > total:
        raise ScheduleError(
            f"a warm-up of {warmup} computed steps is longer than the run of {told_steps(total)}; "
            f"use warmup={max(1, total // 3)} or run more steps"
        )


def _needs_total(what: str) -> ScheduleError:
    return ScheduleError(
        f"{what} has to know how many steps a run has, which neither a bare denoiser tells nor a pipeline without a "
        "`scheduler`; accelerate a pipeline that has one, or list the computed steps with steps=..."
    )


@dataclass(frozen=True)
class Explicit(Declared):
    """Exactly the listed steps are computed."""

    steps: tuple[int, ...]

    def check(self) -> None:
        if self.steps[0] != 0:
            raise ConfigError(
                f"explicit computed steps must begin with 0, because a forecast needs a computed step, got {self.steps}"
            )
        if any(b <= a for a, b in pairwise(self.steps)):
            raise ConfigError(f"explicit computed steps must increase strictly, got {self.steps}")

    def decide(self, step: int, last_computed: int | None) -> Decision:
        listed = step in self.steps
        return Decision(listed, "listed" if listed else "forecast")

    def for_run(self, total: int | None) -> Schedule:
        if total is not None and self.steps[-1] >= total:
            raise ScheduleError(
                f"computed step {self.steps[-1]} lies outside the run of {told_steps(total)} (0 to {total - 1})"
            )
        return self


def computed_steps(schedule: Schedule, total: int) -> list[int]:
    """The computed steps of a run of `total` steps.

    Raises:
        ScheduleError: if the schedule cannot serve such a run.
    """
    return _follow(schedule.for_run(total), total)


@dataclass(frozen=True)
class Part:
    """Where the steps of one of two experts lie in the run: its first step, and the steps of the whole run."""

    start: int
    whole: int


def of_part(schedule: Schedule, part: Part, total: int) -> Schedule:
    """A schedule as it serves the `total` steps of one of two experts.

    Lists and budgets are for the whole run. An expert has no features of the other, so the first computed step of its
    part becomes its first step. An interval is followed by each expert on its own, with a warm-up of its own.

    Raises:
        ScheduleError: if it cannot serve the whole run.
    """
    if isinstance(schedule, Uniform):
        return schedule.shortened(total).for_run(total)
    listed = computed_steps(schedule, part.whole)
    own = [step - part.start for step in listed if part.start <= step < part.start + total]
    return Explicit((0, *own[1:]))


def _follow(schedule: Schedule, total: int) -> list[int]:
    computed: list[int] = []
    for step in range(total):
        if schedule.decide(step, computed[-1] if computed else None).computed:
            computed.append(step)
    return computed


def learned_list(
    lists: Iterable[Sequence[int]], asked: int | Uniform, total: int, exact: bool = True
) -> tuple[int, ...]:
    """Of learned lists of computed steps the one with `asked` of them, or the longest that fits a uniform schedule.

    Args:
        lists: one of each length.
        asked: how many computed steps, or the schedule that has as many at the most.
        total: steps of a run.
        exact: whether the schedule was asked for; where it was not, the shortest list serves if all are longer.

    Raises:
        ScheduleError: if there is none; it names the lengths that there are.
    """
    known = {len(steps): tuple(steps) for steps in lists}
    lengths = ", ".join(map(str, sorted(known)))
    if isinstance(asked, int):
        if asked not in known:
            raise ScheduleError(
                f"computed_steps={asked}, but lists were learned for {lengths}; take one of these, or learn one more"
            )
        return known[asked]
    most = len(computed_steps(asked, total))
    fitting = [length for length in known if length <= most]
    if not fitting and not exact:
        return known[min(known)]
    if not fitting:
        raise ScheduleError(
            f"interval={asked.interval} with warmup={asked.warmup} asks for {most} computed steps, but lists were "
            f"learned for {lengths}; take computed_steps={min(known)} or a shorter interval, or learn a shorter list"
        )
    return known[max(fitting)]
