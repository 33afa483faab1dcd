"""What every caching method has: a schedule, a site, a projector and its predictors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

from hasten.caching.predictors import Predictor
from hasten.caching.projectors import Projector, Whole
from hasten.caching.schedule import Explicit, Schedule, Uniform, full_steps
from hasten.errors import ConfigError, ScheduleError, unknown

__all__ = ["SITES", "CachingMethod", "SiteName"]

SiteName = Literal["hidden", "output", "module"]
SITES = ("hidden", "output", "module")


@dataclass(frozen=True, kw_only=True)
class CachingMethod:
    """Base of the caching methods: parameters that all of them share.

    Args:
        interval: a full step every `interval` steps after the warm-up; 1 computes every step.
        warmup: full steps at the start.
        site: `"hidden"` (image tokens after the last block: one tensor a pass), `"output"` (after the final layer) or
            `"module"` (every attention and feed-forward output, the papers' original form).
        steps: explicit full steps instead of interval and warm-up.
    """

    interval: int = 5
    warmup: int = 3
    site: SiteName = "hidden"
    steps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise unknown("site", self.site, SITES)
        if self.steps is not None:
            object.__setattr__(self, "steps", tuple(self.steps))
        self.schedule()

    def schedule(self) -> Schedule:
        """Which steps are full."""
        if self.steps is not None:
            return Explicit(self.steps)
        return Uniform(self.interval, self.warmup)

    def projector(self) -> Projector:
        """How features are split; whole unless the method says otherwise."""
        return Whole()

    def predictors(self) -> Mapping[str, Predictor]:
        """One predictor for each part of the projector."""
        raise NotImplementedError

    @property
    def saves(self) -> bool:
        """Whether the user asked for any step to be skipped."""
        return self.steps is not None or self.interval > 1

    def with_full_steps(self, count: int, total: int) -> Self:
        """The same method with the smallest interval that has no more than `count` full steps in `total`.

        Raises:
            ScheduleError: if even one full step after the warm-up is too many.
        """
        if count < 1 or count > total:
            raise ConfigError(f"full steps must be between 1 and the {total} steps of the run, got {count}")
        for interval in range(1, total + 1):
            if len(full_steps(Uniform(interval, self.warmup), total)) <= count:
                return replace(self, interval=interval, steps=None)
        raise ScheduleError(
            f"{count} full steps are fewer than the warm-up of {self.warmup}; "
            f"use warmup={max(1, count - 1)} or more full steps"
        )
