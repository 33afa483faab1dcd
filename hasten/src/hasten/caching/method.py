"""What every caching method has: a schedule, a site, a projector and its predictors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal, Self

from torch import nn

from hasten.caching.components import Components, FeatureKey
from hasten.caching.gates import Gate, Scheduled
from hasten.caching.predictors import Predictor
from hasten.caching.projectors import Projector, Whole
from hasten.caching.schedule import SCHEDULES, Explicit, Schedule, Spread, Uniform, computed_steps, longest_within
from hasten.calibration import Calibration, RunFacts, declare_contents
from hasten.errors import CalibrationError, ConfigError, ScheduleError, unknown
from hasten.io import Array, step_list

__all__ = ["SITES", "CachingMethod", "Feature", "ScheduleName", "SiteName"]

SiteName = Literal["hidden", "output", "module"]
SITES: tuple[SiteName, ...] = ("hidden", "output", "module")
ScheduleName = Literal["uniform", "last", "even", "early", "tuned"]
TUNED = "steps"  # what a calibration of lists of computed steps is called
EARLY = 1.3  # power of the schedule that is dense early


def _check_lists(calibration: Calibration) -> None:
    for name, steps in calibration.tensors.items():
        if int(steps[-1]) >= calibration.fingerprint.steps:
            raise ValueError(f"{name!r} goes beyond the {calibration.fingerprint.steps} steps of the run")


declare_contents(TUNED, {"steps/{n}": Array("integer", ("n",), (step_list,))}, _check_lists)


@dataclass(frozen=True)
class Feature:
    """What of the site is remembered, for methods that look before they skip.

    Attributes:
        change: remember the change that the skipped part makes (out - in) instead of what comes out of it.
        front: blocks of the first stack that always run.
        sees: what the gate is shown before it decides: nothing, the transformer's input (`"input"`), the first
            block's modulated input (`"modulated"`), or the change that the front blocks made (`"front"`).
        verify: run the last block on a drafted input and show the gate how far it is from the draft.
    """

    change: bool = False
    front: int = 0
    sees: Literal["nothing", "input", "modulated", "front"] = "nothing"
    verify: bool = False


@dataclass(frozen=True, kw_only=True)
class CachingMethod:
    """Base of the caching methods: parameters that all of them share.

    Args:
        interval: a computed step every `interval` steps after the warm-up; 1 computes every step.
        warmup: computed steps at the start.
        site: `"hidden"` (image tokens after the last block: one tensor a pass), `"output"` (after the final layer) or
            `"module"` (every attention and feed-forward output, the papers' original form).
        schedule: where the computed steps fall. `"uniform"`: warm-up, then every `interval` steps (the papers' rule);
            `"last"`: the same, and the last step; `"even"`: as many as uniform has, spread evenly from the first step
            to the last; `"early"`: spread so, but denser early; these three need a pipeline, which tells how many steps
            there are. `"tuned"`: the lists in `tuned`, which are taken whenever they are given.
        steps: explicit computed steps instead of all that.
        tuned: lists of computed steps that `hasten tune` found for the model, or the path of the file; the longest that is
            no longer than the uniform schedule is used.
    """

    sites: ClassVar[tuple[SiteName, ...]] = SITES
    adaptive: ClassVar[bool] = False  # whether a gate decides, by a parameter `threshold`
    needs_layout: ClassVar[bool] = False  # whether parts() has to know where the image's tokens lie

    interval: int = 5
    warmup: int = 3
    site: SiteName = "hidden"
    schedule: ScheduleName = "uniform"
    steps: tuple[int, ...] | None = None
    tuned: Calibration | str | None = None

    def __post_init__(self) -> None:
        if self.site not in self.sites:
            raise unknown(f"site of {type(self).__name__}", self.site, self.sites)
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        if self.steps is not None:
            object.__setattr__(self, "steps", tuple(self.steps))
        if self.schedule == "tuned" and self.tuned is None:
            raise ConfigError(
                "schedule='tuned' takes the computed steps that `hasten tune` found: give "
                "tuned='calibrations/steps.safetensors'"
            )
        if self.tuned is not None:
            object.__setattr__(self, "tuned", Calibration.of(TUNED, self.tuned))
        self.plan()

    def plan(self) -> Schedule:
        """Which steps are full."""
        if self.steps is not None:
            return Explicit(self.steps)
        if isinstance(self.tuned, Calibration):
            return self._tuned_plan(self.tuned)
        if self.schedule in ("even", "early"):
            return Spread(self.interval, self.warmup, EARLY if self.schedule == "early" else 1.0)
        return Uniform(self.interval, self.warmup, last=self.schedule == "last")

    def _tuned_plan(self, tuned: Calibration) -> Schedule:
        lists = [steps.tolist() for steps in tuned.tensors.values()]
        return Explicit(longest_within(lists, Uniform(self.interval, self.warmup), tuned.fingerprint.steps))

    def gate(self) -> Gate:
        """What decides, step by step; a fresh object for each transformer."""
        return Scheduled(self.plan())

    def feature(self) -> Feature:
        """What of the site is remembered."""
        return Feature()

    def check_model(self, model: nn.Module) -> None:
        """Raise an error if the method cannot serve the model; called when it is attached."""

    def check_run(self, run: RunFacts) -> None:
        """Raise an error if the method cannot serve the run; called at its first step."""
        if isinstance(self.tuned, Calibration) and run.total is not None:
            differences = self.tuned.check_run(RunFacts(run.total))
            if differences:
                raise CalibrationError(f"the computed steps were {differences[0]}. Tune again, or use schedule='even'")

    def check_passes(self, passes: Sequence[str]) -> None:
        """Raise an error if the method cannot serve these forwards within a step; called at the second step."""

    def parts(self, place: FeatureKey) -> Components:
        """Split and predictors of a place; the same everywhere unless the method says otherwise."""
        return self._parts

    @cached_property
    def _parts(self) -> Components:
        return Components(self.projector(), self.predictors())

    def projector(self) -> Projector:
        """How features are split; whole unless the method says otherwise."""
        return Whole()

    def predictors(self) -> Mapping[str, Predictor]:
        """One predictor for each part of the projector."""
        raise NotImplementedError

    @property
    def first_difference(self) -> int:
        """The first step whose change from the step before it counts: the last of a uniform schedule's warm-up."""
        return self.warmup - 1 if isinstance(self.plan(), Uniform) else 0

    @property
    def saves(self) -> bool:
        """Whether the user asked for any step to be skipped."""
        return self.steps is not None or self.interval > 1

    def with_computed_steps(self, count: int, total: int) -> Self:
        """The same method with the smallest interval that has no more than `count` computed steps in `total`.

        Raises:
            ScheduleError: if even one computed step after the warm-up is too many.
        """
        if count < 1 or count > total:
            raise ConfigError(f"computed steps must be between 1 and the {total} steps of the run, got {count}")
        for interval in range(1, total + 1):
            method = replace(self, interval=interval, steps=None)
            if len(computed_steps(method.plan(), total)) <= count:
                return method
        raise ScheduleError(
            f"{count} computed steps are fewer than the warm-up of {self.warmup}; "
            f"use warmup={max(1, count - 1)} or more computed steps"
        )
