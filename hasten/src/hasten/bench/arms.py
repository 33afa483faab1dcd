"""What is compared: one `Arm` for each way of sampling, each switched on for one call and off again.

Arms can be pickled, so that several processes can work with the same ones.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hasten.acceleration import accelerate
from hasten.bench.requests import Request, reported
from hasten.bench.sampling import Attach, plain
from hasten.bench.thresholds import Trials, match_computed_steps
from hasten.caching import CachingMethod, ScheduledMethod, computed_steps
from hasten.calibration import Calibration
from hasten.errors import ConfigError, HastenError
from hasten.pipeline.handle import Acceleration
from hasten.resolution.engine import ResolutionMethod
from hasten.solvers import Leap

__all__ = ["Accelerated", "Arm", "Solved", "merged", "method_arms", "one_line", "says_its_steps"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arm:
    """One way of sampling.

    Attributes:
        id: unique in a result, such as `"hicache-9"`.
        method: name, such as `"hicache"` or `"euler"`.
        library: `"hasten"`, `"plain"` or a peer's name.
        params: parameters, as they are reported.
        steps: sampler steps.
        computed_steps: steps whose blocks run; where a threshold decides, the number that it was matched to.
        attach: switches the arm on for a pipeline, for the length of a `with`.
        note: what a reader has to know about the figures.
        error: why it cannot run; it then has a row without figures.
        staged: whether steps run on fewer tokens, so that only counted operations tell what it saves.
        groups: numbers of computed steps that a table shows it under; its own if empty.
    """

    id: str
    method: str
    library: str
    params: dict[str, Any]
    steps: int
    computed_steps: int
    attach: Attach = plain
    note: str = ""
    error: str = ""
    staged: bool = False
    groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class Accelerated:
    """Switches a cache of hasten on, a resolution method, or both."""

    method: CachingMethod | None
    staged: ResolutionMethod | None = None

    def __call__(self, pipe: Any) -> Acceleration:
        return accelerate(pipe, *(method for method in (self.staged, self.method) if method is not None))


@dataclass(frozen=True)
class Solved:
    """Switches LEAP on: its scheduler and the hook that tells the passes apart."""

    calibration: Calibration

    def __call__(self, pipe: Any) -> Acceleration:
        return accelerate(pipe, Leap(self.calibration))


def says_its_steps(method: ScheduledMethod) -> bool:
    """Whether a method was written with its own steps, so that no number of computed steps is asked of it."""
    return any(value is not None for value in (method.steps, method.interval, method.computed_steps))


def method_arms(requests: Sequence[Request], counts: Sequence[int], total: int, trials: Trials | None) -> list[Arm]:
    """Every cache and LEAP at every number of computed steps; one that cannot have a number is an arm with the reason.

    A method with a schedule computes exactly so many steps, or as many as it lists itself; one with a threshold is
    matched by `trials`.

    Args:
        requests: caches and LEAP.
        counts: numbers of computed steps.
        total: steps of the sampler.
        trials: to match thresholds with; None to see, before any model is loaded, which numbers the schedules have.
    """
    arms = []
    for wanted in counts:
        for request in requests:
            if request.leap:
                arms += [_solver_arm(request, wanted, trials)] if trials is not None else []
            elif isinstance(request.caching, ScheduledMethod):
                arms.append(_scheduled_arm(request, request.caching, wanted, total))
            elif request.caching is not None and trials is not None:
                arms.append(_adaptive_arm(request, request.caching, wanted, trials))
    return arms


def _scheduled_arm(request: Request, method: ScheduledMethod, wanted: int, total: int) -> Arm:
    label = request.label
    try:
        fitted = method if says_its_steps(method) else method.with_computed_steps(wanted, total)
        count = len(computed_steps(fitted.plan(), total))
    except ConfigError as error:
        arm = Arm(f"{label}-{wanted}", label, "hasten", reported(method), total, wanted)
        return replace(arm, error=one_line(error))
    return Arm(f"{label}-{count}", label, "hasten", reported(fitted), total, count, Accelerated(fitted))


def _solver_arm(request: Request, wanted: int, trials: Trials) -> Arm:
    """LEAP with as many evaluations; an arm with an error where it was not fitted for them."""
    label, calibration = request.label, request.fit(trials.model)
    arm = Arm(f"{label}-{wanted}", label, "hasten", {"calibration": "given"}, wanted, wanted, Solved(calibration))
    fitted = sorted(int(count) for count in calibration.report)
    if wanted in fitted:
        return arm
    return replace(arm, error=f"fitted for {', '.join(map(str, fitted))} evaluations; run hasten tune")


def _adaptive_arm(request: Request, method: CachingMethod, wanted: int, trials: Trials) -> Arm:
    label = request.label
    trials.progress(f"matching {label} to {wanted} computed steps")
    arm = Arm(f"{label}-{wanted}", label, "hasten", reported(method), trials.steps, wanted)
    try:
        found = match_computed_steps(
            lambda value: trials.run(Accelerated(_with(method, value)), f"{label}:threshold={value!r}"), wanted
        )
    except HastenError as error:
        return replace(arm, error=f"{one_line(error)} (interval= and warmup= of the method)")
    except Exception as error:  # whatever it is, the other arms can be measured
        log.warning("%s cannot be measured", label, exc_info=error)
        return replace(arm, error=one_line(error))
    fitted = _with(method, found.threshold)
    return replace(arm, params=reported(fitted), attach=Accelerated(fitted))


def _with(method: CachingMethod, threshold: float) -> CachingMethod:
    changes: dict[str, Any] = {"threshold": threshold}  # a field that only methods with a gate have
    return replace(method, **changes)


def merged(arms: list[Arm]) -> list[Arm]:
    """The arms without repetitions: two requests may come to the same schedule, or to the same plain sampler."""
    kept: dict[str, Arm] = {}
    for arm in arms:
        first = kept.setdefault(arm.id, arm)
        if first is not arm:
            groups = dict.fromkeys([*(first.groups or (first.computed_steps,)), *(arm.groups or (arm.computed_steps,))])
            notes = dict.fromkeys(note for note in (first.note, arm.note) if note)
            kept[arm.id] = replace(first, groups=tuple(groups), note="; ".join(notes))
    return list(kept.values())


def one_line(error: Exception) -> str:
    """An error as one line, with its kind if it is not one of ours."""
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, HastenError) else f"{type(error).__name__}: {text}"
