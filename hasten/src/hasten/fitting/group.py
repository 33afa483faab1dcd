"""Calls of a fit at one guidance scale: their references, and what evaluates the model for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hasten.errors import CalibrationError, ConfigError
from hasten.fitting.evaluator import Evaluator
from hasten.fitting.leap_fitter import Fitter
from hasten.fitting.references import References, record_references
from hasten.parameters import accepted
from hasten.pipeline.guidance import SCALES, denies_something, one_number, scales_beside
from hasten.pipeline.replay import Replay
from hasten.pipeline.view import denoisers
from hasten.solvers.tables import COLUMNS

__all__ = [
    "GUIDED",
    "PASSES",
    "Group",
    "check_differ",
    "check_passes",
    "guidance_of_calls",
    "told_guidance",
]

GUIDED, PASSES = "guided", "passes"  # the form that is searched, and the one that follows
SAME = 1e-3  # relative difference of two answers of a model to one question, in float32
ROUNDINGS = 20  # of a narrower dtype, that such answers may differ by: states are rounded on their way in


class Group:
    """The calls of a fit at one guidance scale.

    Args:
        pipe: the pipeline.
        replay: the calls; groups of one fit, which share generators, are changes of one replay, and each begins with
            the same noise.
        ridge: see `Fitter`.
        tick: called after each reference with their number.

    Attributes:
        references: their plain trajectories.
        evaluator: evaluates the model for them.
        fitters: by form, see `COLUMNS`; that for both passes only where there were two.

    Raises:
        CalibrationError: if the calls cannot be followed; see `record_references` and `check_answers`.
    """

    def __init__(self, pipe: Any, replay: Replay, ridge: float, tick: Callable[[int], None]) -> None:
        self.references = record_references(pipe, replay, lambda done, total: tick(done))
        self.evaluator = Evaluator(pipe, replay)
        check_answers(self.evaluator, self.references, type(pipe).__name__)
        guided = Fitter(self.evaluator, self.references, ridge, COLUMNS[GUIDED])
        self.fitters = {
            form: guided.narrowed(width)
            for form, width in COLUMNS.items()
            if form == GUIDED or self.references.differences
        }


def check_answers(evaluator: Evaluator, references: References, name: str) -> None:
    """Ask the model at an early, a middle and a late state of the first call what it answered there in the reference.

    Args:
        evaluator: of the calls.
        references: of the same.
        name: of the pipeline, for messages.

    Raises:
        CalibrationError: if an answer is another one.
    """
    if _differs(evaluator, references) is None:
        return
    evaluator.skips = False  # the first forward of a call may leave something behind without which the next is another
    found = _differs(evaluator, references)
    if found is not None:
        step, apart = found
        raise CalibrationError(
            f"the model's answer at step {step} of call 0 is another one when {name} asks it there alone, by "
            f"{100 * apart:.2g} %: something in the call depends on the number of the step (a guidance or control that "
            "ends early or changes with the steps, a callback), and LEAP fits answers that depend on state and time "
            "alone; leave that out of the calls (control_guidance_end=1, use_dynamic_cfg=False, no callback)"
        )


def _differs(evaluator: Evaluator, references: References) -> tuple[int, float] | None:
    """The first step looked at where the answer is another one, and the relative difference."""
    allowed = SAME if references.rounding < 1e-6 else max(SAME, ROUNDINGS * references.rounding)
    last = references.total - 1
    with evaluator.probing():
        for step in sorted({0, last // 2, last}):
            own = references.outputs[0][step]
            answer, _ = evaluator(0, references.states[0][step], references.plain.timesteps[step])
            if answer.shape != own.shape:
                return step, 1.0
            apart = float((answer - own).norm() / own.norm().clamp_min(torch.finfo(own.dtype).tiny))
            if not apart <= allowed:
                return step, apart
    return None


def check_passes(groups: Sequence[Group], scales: Sequence[float]) -> None:
    """Compare the passes that the pipeline makes at the latest scale with those at the first one.

    Raises:
        ConfigError: if there is one here and two there.
    """
    passes = [2 if group.references.differences else 1 for group in groups]
    if passes[-1] != passes[0]:
        raise ConfigError(
            f"one fit serves scales with as many passes, and the pipeline makes {passes[0]} at guidance {scales[0]:g} "
            f"and {passes[-1]} at {scales[len(passes) - 1]:g}: leave out the scales with one pass (1 and below, as a "
            "rule), and fit without guidance for them"
        )


def check_differ(groups: Sequence[Group], scales: Sequence[float], name: str | None) -> None:
    """Ask at the latest scale what was asked at the first one.

    Raises:
        ConfigError: if the answer is the same.
    """
    if len(groups) == 1:
        return
    first, last = groups[0].references, groups[-1]
    with last.evaluator.probing():
        answer, _ = last.evaluator(0, first.states[0][0], first.plain.timesteps[0])
    if torch.equal(answer, first.outputs[0][0]):
        raise ConfigError(
            f"{name} does nothing in these calls: the model's answers are the same with {scales[0]:g} and "
            f"{scales[len(groups) - 1]:g}; true guidance needs a negative prompt"
        )


def told_guidance(
    pipe: Any, references: References, calls: Sequence[Mapping[str, Any]], named: tuple[str | None, float | None]
) -> tuple[str | None, float | None, dict[str, float | None]]:
    """By what argument and at what scale the calls of a fit guide, and what else they guide by, by argument.

    Args:
        pipe: the pipeline, whose defaults count where a call gives nothing.
        references: of the calls.
        calls: all of them.
        named: what they name themselves, see `guidance_of`. A default counts only where guidance does something: there
            are two passes, or the model is told the scale.

    Raises:
        ConfigError: if they differ in what else they guide by.
    """
    told = any(getattr(getattr(one, "config", None), "guidance_embeds", False) for one in denoisers(pipe).values())
    defaults = {name: one.default for name, one in inspect.signature(pipe.__call__).parameters.items()}
    if told or references.differences:
        scales = {name: one for name in SCALES if (one := one_number(defaults.get(name))) is not None}
        named = guidance_of(scales | dict(calls[0]))
    several = []
    for call in calls:
        given = defaults | dict(call)
        several.append(scales_beside(given))
        if named[0] == "true_cfg_scale" and told and "guidance_scale" in given:
            several[-1]["guidance_scale"] = one_number(given["guidance_scale"])
    if (other := next((i for i, beside in enumerate(several) if beside != several[0]), None)) is not None:
        raise ConfigError(
            f"one fit is for one guidance: call 0 has {several[0]}, call {other} has {several[other]}; give all the "
            "same"
        )
    return *named, several[0]


def guidance_of_calls(
    calls: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]], scales: Sequence[float]
) -> tuple[str | None, float | None]:
    """The argument by which all calls set their guidance scale, and the scale; see `guidance_of`.

    Args:
        calls: to learn from.
        held_out: others, with the same guidance or none; a range gives them its own.
        scales: of a range, in which calls may have any scale.

    Raises:
        ConfigError: if calls have different guidance, or none where a range is asked for; if scales are there twice,
            or a call that is held out is learned from, too.
    """
    learned = [_asked_for(call) for call in calls]
    for i, call in enumerate(held_out):
        if (asked := _asked_for(call)) is not None and asked in learned:
            raise ConfigError(
                f"held-out call {i} asks for what call {learned.index(asked)} does, with the same noise: its error "
                "would be that of the training; hold other prompts out"
            )
    found = [guidance_of(call) for call in calls]
    others = [] if scales else [guidance_of(call) for call in held_out]
    for name, some in (("call", found), ("held-out call", others)):
        for i, other in enumerate(some):
            if other[: 1 if scales else 2] != found[0][: 1 if scales else 2] and (some is found or other[0]):
                raise ConfigError(
                    f"one fit is for one guidance: call 0 has {_told(found[0])}, {name} {i} has {_told(other)}; give "
                    "all the same, or fit a range (guidances=...)"
                )
    if scales and found[0][0] is None:
        raise ConfigError(
            f"guidances are given, and the calls say by none of {' and '.join(SCALES)} what takes them: give the "
            "calls that argument of the pipeline, at any scale"
        )
    if len(set(scales)) < len(scales):
        raise ConfigError(f"guidances have to differ, got {tuple(scales)}: leave out what is there twice")
    return found[0]


def _asked_for(call: Mapping[str, Any]) -> tuple[str, tuple[int, ...]] | None:
    """Prompt and noise of a call, as far as they show."""
    if any("image" in name or "video" in name for name in call):  # one instruction for two images
        return None
    noise = call.get("generator")
    generators = [noise] if isinstance(noise, torch.Generator) else list(noise or [])
    if call.get("prompt") is None or not generators:
        return None
    return str(call["prompt"]), tuple(generator.initial_seed() for generator in generators)


def _told(guidance: Sequence[Any]) -> str:
    return "none" if guidance[0] is None else " ".join(map(str, guidance))


def guidance_of(call: Mapping[str, Any]) -> tuple[str | None, float | None]:
    """The argument by which a call sets its guidance scale, and the scale.

    Beside another scale, true guidance counts where there is a negative prompt and it is above 1.

    Raises:
        ConfigError: if it is no number.
    """
    given: dict[str, float] = {}
    for name in (name for name in SCALES if call.get(name) is not None):
        given[name] = accepted("fit_leap", f"{name} of the calls", float, call[name])
    true = given.get("true_cfg_scale")
    if true is not None and len(given) > 1 and not (true > 1 and denies_something(call)):
        del given["true_cfg_scale"]
    return next(iter(given.items()), (None, None))
