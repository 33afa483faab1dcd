"""The guidance scale of a run, and whether a fit serves it.

A fit knows the scales that its calls named (`guidances`), and for each the weight of the first pass in the mixture that
they made (`mixtures`). A run shows the one by the arguments of its pipeline's call, the other by its passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hasten.errors import ScheduleError
from hasten.pipeline.caller import call_arguments, current_owner
from hasten.solvers.content import Content
from hasten.solvers.tables import Table

__all__ = ["SCALES", "asked_guidance", "check_asked_guidance", "check_mixture", "scale_of_run", "scale_of_times"]

SCALES = ("true_cfg_scale", "guidance_scale")  # arguments by which pipelines take guidance, the surer one first
TOLERANCE = 0.03  # of the guidance scale that a run shows, relative; half precision shows it less exactly
REMEDY = (
    "call the pipeline with that guidance, or fit for this one (fit_leap(..., guidances=...) serves a range); "
    "hasten.remove(pipe) or the plain scheduler serves any"
)
# What the weight of the first pass says in pipelines: `w` in `second + w (first - second)`, where the negative pass
# comes second or first, and the scale counts from the negative pass or from the other one.
CONVENTIONS: tuple[Callable[[float], float], ...] = (
    lambda weight: weight,
    lambda weight: 1 - weight,
    lambda weight: weight - 1,
    lambda weight: -weight,
)


def asked_guidance() -> tuple[float, ...]:
    """The guidance scales among the arguments of the pipeline's call; none where it does not show.

    Pipelines may have two, of which one does nothing: true guidance counts alone where the call makes use of it.
    """
    given = call_arguments(current_owner())
    known = {name: float(given[name]) for name in SCALES if isinstance(given.get(name), int | float)}
    denies = any(name.startswith("negative_prompt") and value is not None for name, value in given.items())
    if denies and known.get("true_cfg_scale", 1.0) > 1:
        return (known["true_cfg_scale"],)
    return tuple(known.values())


def check_asked_guidance(asked: Sequence[float], guidances: Sequence[float | None]) -> None:
    """Compare what a call asks for with the scales of the fit, where both are known.

    Raises:
        ScheduleError: if none of it is among them or between.
    """
    fitted = [one for one in guidances if one is not None]
    if asked and len(fitted) == len(guidances) and not any(_within(one, fitted) for one in asked):
        raise ScheduleError(f"LEAP was fitted for guidance {_range(fitted)}, and this run has {asked[-1]:g}: {REMEDY}")


def scale_of_run(
    content: Content, mixture: float | None, asked: Sequence[float], hooked: bool
) -> tuple[float, list[float]]:
    """The guidance scale of a run and those of the fits, in one measure.

    Args:
        content: of the scheduler.
        mixture: the weight of the first pass, where both were seen.
        asked: what the call asks for; see `asked_guidance`.
        hooked: whether the scheduler serves whatever scale the run has, and not the one that it was told.

    Raises:
        ScheduleError: if it is not known, or outside of what was fitted.
    """
    guidances = [0.0 if one is None else one for one in content.guidances]
    named = None not in content.guidances
    served = [one for one in asked if named and _within(one, guidances)] if hooked else []
    mixtures = [one for one in content.mixtures if one is not None]
    if mixture is not None and len(mixtures) == len(content.mixtures):
        if _within(mixture, mixtures):
            return mixture, mixtures
        if served:  # pipelines that bring the mixture to another length have other weights with every prompt
            return served[0], guidances
        own = _own_measure(mixture, guidances, mixtures) if named else None
        if own is None:
            raise ScheduleError(f"LEAP was fitted for another guidance than this run has: {REMEDY}")
        raise ScheduleError(f"LEAP was fitted for guidance {_range(guidances)}, and this run has {own:.4g}: {REMEDY}")
    scale = served[0] if served else content.guidance
    if scale is None:
        if len(guidances) > 1:
            known = ", ".join(f"{one:g}" for one in guidances)
            raise ScheduleError(
                f"LEAP was fitted for guidance {known}, and a scheduler does not see the scale: use "
                "hasten.accelerate(pipe, hasten.Leap(file)), or LeapScheduler.load(file, pipe, guidance=...)"
            )
        return guidances[0], guidances
    _refuse_outside(scale, guidances)
    return scale, guidances


def scale_of_times(content: Content, table: Table, asked: Sequence[float], hooked: bool) -> float | None:
    """The guidance scale that says at what times a run evaluates the model; None if they are the same at all scales.

    Args:
        content: of the scheduler.
        table: of the run.
        asked, hooked: see `scale_of_run`.

    Raises:
        ScheduleError: if times differ, and the scale does not show before the first evaluation.
    """
    if table.timesteps_by_scale is None:
        return None
    scales = [one for one in content.guidances if one is not None]
    served = [one for one in asked if _within(one, scales)] if hooked else []
    scale = served[0] if served else content.guidance
    if scale is None:
        raise ScheduleError(
            f"LEAP was fitted for guidance {_range(scales)} with other times at each scale, and the scale does not "
            "show here: name it, by hasten.Leap(file, guidance=...) or LeapScheduler.load(file, pipe, guidance=...); "
            "with hasten.Leap(file) a call of the pipeline shows it"
        )
    _refuse_outside(scale, scales)
    return min(max(scale, min(scales)), max(scales))


def check_mixture(content: Content, mixture: float | None, scale: float) -> None:
    """Compare what the passes of a run were mixed of with the scale that its times are for, where they tell the scale.

    Raises:
        ScheduleError: if it is another one.
    """
    guidances = [one for one in content.guidances if one is not None]
    mixtures = [one for one in content.mixtures if one is not None]
    if mixture is None or len(mixtures) != len(content.mixtures):
        return
    own = _own_measure(mixture, guidances, mixtures)
    if own is not None and not _within(own, [scale]):
        raise ScheduleError(
            f"this run was called with guidance {scale:.4g} and mixes its passes with {own:.4g} from its first "
            "evaluation on; LEAP's times are for the guidance of the call: leave out what changes it (a callback)"
        )


def _refuse_outside(scale: float, guidances: Sequence[float]) -> None:
    if not _within(scale, guidances):
        raise ScheduleError(f"LEAP was fitted for guidance {_range(guidances)}, and this run has {scale:.4g}: {REMEDY}")


def _within(scale: float, fitted: Sequence[float]) -> bool:
    low, high = min(fitted), max(fitted)
    slack = TOLERANCE * max(abs(low), abs(high), 1.0)
    return low - slack <= scale <= high + slack


def _range(fitted: Sequence[float]) -> str:
    return " to ".join(f"{one:g}" for one in dict.fromkeys((min(fitted), max(fitted))))


def _own_measure(mixture: float, guidances: Sequence[float], mixtures: Sequence[float]) -> float | None:
    """The scale as the pipeline calls it; None where the fits do not tell how it mixes."""
    for convention in CONVENTIONS:
        if all(_within(convention(one), [scale]) for one, scale in zip(mixtures, guidances, strict=True)):
            return convention(mixture)
    return None
