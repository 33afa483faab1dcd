"""The guidance scale of a run, and whether a fit serves it.

A fit knows the scales that its calls named (`guidances`), and for each the weight of the first pass in the mixture that
they made (`mixtures`). A run shows the one by the arguments of its pipeline's call, the other by its passes.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from torch import Tensor

from hasten.errors import ConfigError, HastenWarning, ScheduleError, brief
from hasten.pipeline.caller import Caller
from hasten.pipeline.guidance import SCALES, denies_something, one_number, scales_beside
from hasten.solvers.content import Content
from hasten.solvers.tables import Axis, Table

__all__ = [
    "Steady",
    "asked_guidance",
    "check_asked_guidance",
    "check_told",
    "known_scales",
    "nearest",
    "scale_of_run",
    "scale_of_times",
]

TOLERANCE = 0.03  # of the guidance scale that a run shows, relative; half precision shows it less exactly
KEPT_SCALES = ("_guidance_scale", "_guidance_scale_2", "_true_cfg_scale", "_guidance_rescale")  # by calls, in pipelines
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


class Steady:
    """The guidance of a call with a callback, which may change what the passes are mixed by."""

    def __init__(self, pipe: Any) -> None:
        self._pipe, self._scales = weakref.ref(pipe), _kept_scales(pipe)

    @classmethod
    def of_call(cls) -> Self | None:
        """That of the pipeline's call under way; None where nothing can change it."""
        caller = Caller()
        given = caller.arguments
        able = any(given.get(name) is not None for name in ("callback_on_step_end", "callback"))
        able = able and not given.get("use_dynamic_cfg")  # with which CogVideoX changes it itself, in the fit as well
        return cls(caller.pipe) if able and caller.pipe is not None else None

    def check(self, evaluation: int) -> None:
        """Raise a ScheduleError if it is not what it was at the first evaluation."""
        pipe = self._pipe()
        if pipe is None:
            return
        for before, now in zip(self._scales, _kept_scales(pipe), strict=True):
            if now is not before and (isinstance(now, Tensor) or now != before):
                raise ScheduleError(
                    f"the guidance of this call changed before evaluation {evaluation}, and LEAP needs it constant: "
                    "leave out the callback that changes it, or put the plain scheduler back (hasten.remove(pipe))"
                )


def _kept_scales(pipe: Any) -> list[Any]:
    """What a pipeline's call guides by at the moment; a tensor is another one if it is another object."""
    return [getattr(pipe, name, None) for name in KEPT_SCALES]


def asked_guidance(content: Content) -> tuple[float, ...]:
    """The guidance scales among the arguments of the pipeline's call; none where it does not show.

    Pipelines may have two, of which one does nothing: true guidance counts alone where the call makes use of it, by a
    negative prompt. A fit that says by which argument it was given its scales asks for that one.

    Args:
        content: of the scheduler, with the argument by which the fit was given its scales.

    Raises:
        ScheduleError: for what is no number, true guidance beside the embedded one that the fit is for, or another
            scale beside it than the fit's.
    """
    argument = content.guidance_argument
    given = Caller().arguments
    _check_beside(content.guidance_beside or {}, given)
    known = {name: _number(name, given[name]) for name in SCALES if given.get(name) is not None}
    true = known.pop("true_cfg_scale", 1.0)
    denies = denies_something(given)
    if denies is False:
        true = 1.0
    if argument == "true_cfg_scale":
        return (true,) if "true_cfg_scale" in given else ()
    if argument is None and content.one_pass and denies and true > 1:
        warnings.warn(
            f"LEAP was fitted without guidance, and this run has {true:g}: its image can be farther from the full "
            "run's than plain steps are; fit with it (fit_leap, the calls with their guidance), or call without it",
            HastenWarning,
            stacklevel=4,
        )
        return tuple(known.values())
    if argument is not None:
        if denies and true > 1:
            raise ScheduleError(
                f"this run has true guidance {true:g} (true_cfg_scale with a negative prompt), and LEAP was fitted "
                f"without it: leave it out, or fit with it; {REMEDY.partition('; ')[2]}"
            )
        return tuple(known.values())
    if true > 1:
        return (true,) if denies else (*known.values(), true)
    return tuple(known.values())


def _check_beside(fitted: Mapping[str, float | None], given: Mapping[str, Any]) -> None:
    """Compare what else a call guides by."""
    asked = {name: one_number(given[name]) for name in SCALES if name in given} | scales_beside(given)
    for name, own in fitted.items():
        here = asked.get(name, own)
        if name == "guidance_scale_2":  # of Wan's second expert, which has the first one's unless it is given its own
            first = asked.get("guidance_scale")
            if own is None and here == first:
                here = None
            elif own is not None and here is None:
                here = first
        same = here == own if here is None or own is None else _within(here, [own])
        if not same:
            told = ["its default" if one is None else f"{one:g}" for one in (own, here)]
            raise ScheduleError(f"LEAP was fitted with {name} at {told[0]}, and this run has {told[1]}: {REMEDY}")


def _number(name: str, value: Any) -> float:
    """A scale that a call gives, perhaps as an array of one number."""
    number = one_number(value)
    if number is not None:
        return number
    raise ScheduleError(f"{name} of this call is {brief(value)}, and LEAP needs one number to go by")


def check_asked_guidance(asked: Sequence[float], guidances: Sequence[float | None]) -> None:
    """Compare what a call asks for with the scales of the fit, where both are known.

    Raises:
        ScheduleError: if none of it is among them or between.
    """
    fitted = known_scales(guidances)
    if asked and len(fitted) == len(guidances) and not any(_within(one, fitted) for one in asked):
        raise ScheduleError(f"LEAP was fitted for guidance {_range(fitted)}, and this run has {asked[-1]:g}: {REMEDY}")


def scale_of_run(
    content: Content, mixture: float | None, asked: Sequence[float], hooked: bool, timed: float | None = None
) -> tuple[float, Axis]:
    """The guidance scale of a run and the axis with those of the fits, in one measure.

    Args:
        content: of the scheduler.
        mixture: the weight of the first pass, where both were seen.
        asked: what the call asks for; see `asked_guidance`.
        hooked: whether the scheduler serves whatever scale the run has, and not the one that it was told.
        timed: the scale that the run's times are for, where they differ.

    Raises:
        ScheduleError: if it is not known, outside of what was fitted, or not that of the times.
    """
    if timed is not None:
        _check_mixture(content, mixture, timed, bool(asked))
        return nearest(timed, content.axis.scales), content.axis
    guidances = content.axis.scales
    named = None not in content.guidances
    shows = hooked or content.guidance_argument is not None or len(asked) == 1
    served = [one for one in asked if named and _within(one, guidances)] if shows else []
    mixtures = known_scales(content.mixtures)
    if mixture is not None and len(mixtures) == len(content.mixtures):
        if _within(mixture, mixtures):
            return nearest(mixture, mixtures), Axis(tuple(mixtures))
        if served:  # pipelines that bring the mixture to another length have other weights with every prompt
            return nearest(served[0], guidances), content.axis
        own = _own_measure(mixture, guidances, mixtures) if named else None
        if own is None:
            raise ScheduleError(f"LEAP was fitted for another guidance than this run has: {REMEDY}")
        raise ScheduleError(f"LEAP was fitted for guidance {_range(guidances)}, and this run has {own:.4g}: {REMEDY}")
    scale = served[0] if served else content.guidance
    if scale is None:
        if len(guidances) > 1:
            known = ", ".join(f"{one:g}" for one in guidances)
            raise ScheduleError(
                f"LEAP was fitted for guidance {known}, and this run does not show its own: name it, "
                "LeapScheduler.load(file, pipe, guidance=...), or use hasten.accelerate(pipe, hasten.Leap(file))"
            )
        return guidances[0], content.axis
    _refuse_outside(scale, guidances)
    return nearest(scale, guidances), content.axis


def scale_of_times(content: Content, table: Table, asked: Sequence[float]) -> float | None:
    """The guidance scale that says at what times a run evaluates the model; None if they are the same at all scales.

    Args:
        content: of the scheduler.
        table: of the run.
        asked: what the call asks for.

    Raises:
        ScheduleError: if times differ, and the scale does not show before the first evaluation.
    """
    if table.timesteps_by_scale is None:
        return None
    scales = known_scales(content.guidances)
    scale = next((one for one in asked if _within(one, scales)), content.guidance)
    if scale is None:
        raise ScheduleError(
            f"LEAP was fitted for guidance {_range(scales)} with other times at each scale, and this run does not show "
            "its own: name it, hasten.Leap(file, guidance=...) or LeapScheduler.load(file, pipe, guidance=...)"
        )
    return scale


def nearest(scale: float, scales: Sequence[float]) -> float:
    """A scale, or the end of the range that it is a little outside of."""
    return min(max(scale, min(scales)), max(scales))


def _check_mixture(content: Content, mixture: float | None, scale: float, shown: bool) -> None:
    """Compare what the passes of a run were mixed of with the scale that its times are for.

    Args:
        content: of the scheduler.
        mixture: the weight of the first pass, where both were seen.
        scale: of the times.
        shown: whether the call showed it, or else it was named; the weights of some pipelines differ with every prompt.

    Raises:
        ScheduleError: if it is another one.
    """
    guidances, mixtures = known_scales(content.guidances), known_scales(content.mixtures)
    if mixture is None or len(mixtures) != len(content.mixtures):
        return
    own = _own_measure(mixture, guidances, mixtures)
    if own is None:
        weights = Axis(tuple(guidances)).weights(nearest(scale, guidances))  # mixtures go with the scale itself
        expected = sum(w * one for w, one in zip(weights, mixtures, strict=True))
        wrong = not shown and not _within(mixture, [expected])
    else:
        wrong = not _within(own, [scale])
    if wrong:
        mixed = "another one" if own is None else f"{own:.4g}"
        remedy = "leave out what changes it, such as a callback" if shown else "name the one that it has"
        raise ScheduleError(
            f"LEAP's times are those for guidance {scale:.4g}, which this run was "
            f"{'called with' if shown else 'said to have'}, but its passes are mixed for {mixed}: {remedy}"
        )


def check_told(content: Content) -> None:
    """Raise a ConfigError if the scale that a scheduler was told is none that its fit serves."""
    if content.guidance is None:
        return
    scales = known_scales(content.guidances)
    if not scales:
        raise ConfigError("this LEAP was fitted without guidance, or the calls did not name it: leave guidance out")
    if not _within(content.guidance, scales):
        raise ConfigError(
            f"guidance must be one that LEAP was fitted for, {_range(scales)}, got {content.guidance:g}; fit for this "
            "one (fit_leap(..., guidances=...) serves a range)"
        )


def known_scales(scales: Sequence[float | None]) -> list[float]:
    """Those that have a number."""
    return [one for one in scales if one is not None]


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
