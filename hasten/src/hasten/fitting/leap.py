"""LEAP: least-squares extrapolation along the path. Our own method; related in spirit to learned non-stationary
solvers (Shaul et al., BNS, 2024).

Any multistep sampler with `n` evaluations is a choice of times and of coefficients in

    x_{k+1} = r_k x_0 + sum_{j<=k} a_kj g_j + b_kj d_j

where `g_j` is the model's answer with guidance and `d_j` the difference of the two passes that it was mixed of.
Reference trajectories of the plain sampler are drawn once. Then, evaluation after evaluation, the model is asked at the
state that the fast sampler itself has reached, and row `k` brings it as near to the reference's state at the next time
as the known columns allow: a small linear system for the whole training batch. No gradient passes through the model,
and training sees what it will meet in use. Every image counts the same, however hard it is (`leap_fitter.py`).

Times and coefficients are refined together (`refine.py`), and where that ends depends on where it began. So it begins
at several places (`starts.py`): spreads of times, times whose answers span the references' states best (`surrogate.py`,
no evaluations), the best plain solver, which is a point of the same family, and so is the solver with fewer
evaluations. Each is refined a little on a few calls, and the best goes on. Finally the fit goes back from the most
evaluations down: a solver without the evaluation whose loss costs least is one more start (`docs/leap.md` has what that
is worth), and for the longest one such a start is made of one evaluation more. So the result is never worse on its
prompts than the best plain solver, or than with fewer evaluations (but for a range of guidance, for which there is no
way back, see `guidance.py`).

All this goes by the answers with guidance alone: with the differences there are twice as many numbers, which fit a few
prompts at any times. They come last, from zero, or from their closed form where closed forms with them are nearer than
without on calls that they were not fitted to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from hasten.calibration import Calibration
from hasten.errors import AlreadyAcceleratedError, CalibrationError, ConfigError
from hasten.fitting.leap_fitter import ERROR
from hasten.fitting.leap_under_way import FitUnderWay, Progress
from hasten.fitting.starts import MOST_STARTS
from hasten.parameters import MOST_GUIDANCE, Range, accepted
from hasten.pipeline.hooks import refuse_accelerated
from hasten.pipeline.replay import Replay
from hasten.pipeline.view import denoisers
from hasten.solvers.content import LEAP, check_pipeline
from hasten.solvers.scheduler import LeapScheduler
from hasten.solvers.tables import packed, unpacked

__all__ = ["fit_leap"]

BOTH_WAYS = 3  # trials from which on solvers begin with others that have fewer or more evaluations


def fit_leap(
    pipe: Any,
    calls: Sequence[Mapping[str, Any]],
    evaluations: Sequence[int],
    *,
    guidances: Sequence[float] = (),
    held_out: Sequence[Mapping[str, Any]] = (),
    trials: int = MOST_STARTS,
    rounds: int = 3,
    ridge: float = 1e-6,
    known: Calibration | str | Path | None = None,
    keep: Callable[[Calibration], object] | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Learn a solver for each number of evaluations.

    Args:
        pipe: a pipeline of a flow-matching or variance-preserving model, with a linear scheduler (no noise, no
            clipping).
        calls: arguments of its calls, with the steps, size and guidance that the references are to have, each with
            generators or latents. Give batches: each evaluation of the fit runs every call once.
        evaluations: numbers of evaluations; those that differ by one or two help each other, from below and from above.
        guidances: scales at which times and coefficients are fitted; three or four serve all between. By
            default the one of the calls. At all of them the pipeline has to make as many passes.
        held_out: other calls, on which the error is reported beside that of the training. For a range both are those at
            its highest scale, whatever the calls say.
        trials: most starts of the refinement that are tried for each number; 1 takes a spread of times, and from 3 on
            the best plain solver and the solver with fewer evaluations are among them. At one scale that with more
            evaluations is another one then, and for the largest number one with an evaluation more that is made for it.
        rounds: of the joint refinement of times and coefficients; 0 leaves it out.
        ridge: how strongly coefficients are drawn to those of the plain sampler.
        known: an earlier result or its file, perhaps of a fit that was cut short; what was fitted to the same prompts
            with the same settings is taken over.
        keep: called with the result so far after each number, such as `lambda fit: fit.save(path)`.
        progress: called with (number of evaluations, trials and rounds so far, of how many, relative squared error: of
            a range that at its highest scale, then at its lowest, and while all is refined together the geometric mean
            over it); while the references are drawn with (0, calls so far, of how many, 1).

    Returns:
        a calibration to save, to give to `Leap`, or to make a scheduler of: `LeapScheduler.of(calibration, pipe)`.

    Raises:
        CalibrationError: if there are no calls, they cannot be followed (they differ in size or steps, or the model's
            answer depends on more than state and time), or the scheduler is none that LEAP can follow.
        ConfigError: if a number or a guidance scale does not fit the run.
        AlreadyAcceleratedError: if the pipeline is accelerated, or its scheduler is a LeapScheduler.
    """
    check_pipeline(pipe)
    refuse_accelerated(denoisers(pipe).values())
    if isinstance(pipe.scheduler, LeapScheduler):
        raise AlreadyAcceleratedError(
            "the pipeline's scheduler is a LeapScheduler, and a fit learns from the plain one: put the plain scheduler "
            "back first, such as pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)"
        )
    if not calls:
        raise CalibrationError("there is nothing to learn from: give at least one call")
    asked = not isinstance(guidances, Sequence) or len(guidances) > 0  # a number is no list, and told so
    arguments = {
        "trials": (Annotated[int, Range(1)], trials),
        "rounds": (Annotated[int, Range(0)], rounds),
        "ridge": (Annotated[float, Range(0)], ridge),
        **({"guidances": (tuple[Annotated[float, Range(0, MOST_GUIDANCE)], ...], guidances)} if asked else {}),
    }
    for name, (hint, value) in arguments.items():
        accepted("fit_leap", name, hint, value)
    if keep is not None and not callable(keep):
        raise ConfigError(
            f"keep must be a function of a calibration, such as `lambda fit: fit.save(path)`, got {keep!r}"
        )
    known = None if known is None else Calibration.of(LEAP, known)
    trials = min(trials, MOST_STARTS)
    with Replay(held_out) as others, Replay(calls) as replay:
        _check_counts(evaluations, replay.steps(pipe))
        fit = FitUnderWay(pipe, replay, guidances, others, ridge, progress)
        _check_counts(evaluations, fit.total)  # a run may have other steps than it was asked for
        options = fit.options | {"trials": trials, "rounds": rounds, "ridge": ridge}
        result = Calibration(LEAP, {}, fit.fingerprint, {}, options)
        # A fit at one scale that does not say by which argument is as good as one that does.
        unsaid = {} if guidances else {"guidance_argument": result.options["guidance_argument"]}
        if known is not None and (known.fingerprint, unsaid | known.options) == (result.fingerprint, result.options):
            result = known
        back = trials >= BOTH_WAYS and len(guidances) < 2
        for count in sorted(evaluations):
            if str(count) in result.report:
                if held_out:  # perhaps others than the known fit was given
                    told = result.report[str(count)] | fit.held_out(unpacked(result.tensors)[str(count)])
                    result = replace(result, report=result.report | {str(count): told})
                continue
            if fewer := [int(name) for name in result.report if int(name) < count]:
                fit.recall(unpacked(result.tensors)[str(max(fewer))])
            longest = count >= max([*evaluations, *map(int, result.report)])  # there is none to go back from
            table, report = fit.solver(count, trials, rounds, longer=longest and back)
            tensors = result.tensors | packed({count: table})
            result = Calibration(LEAP, tensors, result.fingerprint, result.report | {str(count): report}, options)
            if keep is not None:
                keep(result)
        if back:
            for better in _both_ways(fit, result, sorted(map(int, result.report)), rounds):
                result = better
                if keep is not None:
                    keep(result)
    return result


def _both_ways(fit: FitUnderWay, result: Calibration, counts: Sequence[int], rounds: int) -> Iterator[Calibration]:
    """The result after each attempt to begin solvers with others: from the most evaluations down, and up again.

    Up only where fewer evaluations have come to have less error. A solver that was tried from one with so many
    evaluations is not tried again, even if that one has been exchanged by a later fit.
    """
    for more, fewer in pairwise(reversed(counts)):
        if result.report[str(fewer)].get("tried_from") != more:
            result = _begun_with(fit, result, fewer, more, rounds)
            told = result.report[str(fewer)] | {"tried_from": more}
            result = replace(result, report=result.report | {str(fewer): told})
            yield result
    for fewer, more in pairwise(counts):
        errors = [result.report[str(count)][ERROR] for count in (fewer, more)]
        if errors[0] < errors[1]:
            result = _begun_with(fit, result, more, fewer, rounds)
            yield result


def _begun_with(fit: FitUnderWay, result: Calibration, count: int, other: int, rounds: int) -> Calibration:
    """The result with a solver for `count` that began with that for `other` evaluations, if that is the better one."""
    table, report = fit.begun_with(unpacked(result.tensors)[str(other)], count, result.report[str(count)], rounds)
    tensors = result.tensors if table is None else result.tensors | packed({count: table})
    return replace(result, tensors=tensors, report=result.report | {str(count): report})


def _check_counts(evaluations: Sequence[int], steps: int | None) -> None:
    """Raise a ConfigError for numbers of evaluations that references of so many steps do not allow."""
    accepted("fit_leap", "evaluations", tuple[Annotated[int, Range(1, steps)], ...], evaluations)
