"""LEAP as a method of `hasten.accelerate`: its scheduler in the pipeline, and a hook that tells the passes apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from hasten.calibration import Calibration
from hasten.errors import AlreadyAcceleratedError
from hasten.parameters import MOST_GUIDANCE, Declared, Range
from hasten.pipeline.hooks import Remove
from hasten.registry import method
from hasten.solvers.content import LEAP, check_pipeline
from hasten.solvers.handover import hand_over
from hasten.solvers.passes import PassesHook, watch_passes
from hasten.solvers.scheduler import LeapScheduler

__all__ = ["AttachedLeap", "Leap"]


@method(LEAP, kind="solver", paper="ours", needs_calibration=True)
@dataclass(frozen=True)
class Leap(Declared):
    """Sample with learned times and coefficients in place of the pipeline's scheduler (LEAP)."""

    calibration: Annotated[Calibration | str | None, "what `hasten tune` or `fit_leap` learned"] = None
    guidance: Annotated[
        Annotated[float, Range(0, MOST_GUIDANCE)] | None,
        "guidance scale of loops of your own, for a file that serves a range; a pipeline's call shows its own",
    ] = None

    def check(self) -> None:
        object.__setattr__(self, "calibration", Calibration.of(LEAP, self.calibration))

    def scheduler(self, pipe: Any = None) -> LeapScheduler:
        """The scheduler to put in place of the pipeline's own; see `LeapScheduler.load`."""
        assert isinstance(self.calibration, Calibration)
        return LeapScheduler.of(self.calibration, pipe, self.guidance)

    def engine(self, pipe: Any) -> AttachedLeap:
        """What puts scheduler and hook into a pipeline; nothing is changed yet.

        Raises:
            ConfigError: for what is no pipeline with a scheduler.
            CalibrationError: if the fit belongs to another model.
        """
        check_pipeline(pipe)
        return AttachedLeap(self, pipe)


@dataclass(frozen=True)
class Evaluation:
    """One step that LEAP took: of which run, its number there, and its cost relative to a step of the plain sampler."""

    run: int
    step: int
    cost: float = 1.0


class AttachedLeap:
    """LEAP at work in a pipeline.

    Attributes:
        method: the method.
    """

    def __init__(self, chosen: Leap, pipe: Any) -> None:
        self.method = chosen
        self._pipe, self._scheduler = pipe, chosen.scheduler(pipe)
        self._scheduler.expects_passes = True
        self._plain: Any = None
        self._hooks: list[PassesHook] = []
        self._unhook: Remove | None = None

    def attach(self) -> None:
        """Put scheduler and hook into the pipeline.

        Raises:
            AlreadyAcceleratedError: if LEAP is there already.
        """
        if isinstance(self._pipe.scheduler, LeapScheduler):
            raise AlreadyAcceleratedError(
                "the pipeline's scheduler is a LeapScheduler already; call .remove() on the handle that accelerate() "
                "returned, or put the plain scheduler back"
            )
        self._hooks, self._unhook = watch_passes(self._pipe, self._scheduler.observe)
        self._plain, self._pipe.scheduler = self._pipe.scheduler, self._scheduler
        hand_over(self._plain, self._scheduler)

    @property
    def records(self) -> list[Evaluation]:
        """The latest evaluations; a run begins where their numbers fall."""
        found: list[Evaluation] = []
        for step in self._scheduler.taken:
            run = 0 if not found else found[-1].run + (step <= found[-1].step)
            found.append(Evaluation(run, step))
        return found

    @property
    def plain_scheduler(self) -> Any:
        """The pipeline's own scheduler, while LEAP's is in its place."""
        return self._plain

    def forget(self) -> None:
        """Forget all records."""
        self._scheduler.taken.clear()

    @property
    def handle(self) -> Any:
        """What `accelerate` returned."""
        return self._hooks[0].handle if self._hooks else None

    @handle.setter
    def handle(self, handle: Any) -> None:
        for hook in self._hooks:
            hook.handle = handle

    def remove(self) -> None:
        """Take hook and scheduler away; a scheduler that somebody else put in meanwhile stays."""
        if self._unhook is not None:
            self._unhook()
        if self._pipe is not None and self._pipe.scheduler is self._scheduler:
            self._pipe.scheduler = self._plain
            self._scheduler.unwatch()
            hand_over(self._scheduler, self._plain)
        self._pipe = self._plain = self._unhook = None  # records stay readable, and keep no model
        self._hooks = []
