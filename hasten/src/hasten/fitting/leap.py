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
evaluations. Each is refined a little on a few calls, and the best goes on; so the result is never worse on its prompts
than the best plain solver, or than with fewer evaluations (but for a range of guidance, see `guidance.py`).

All this goes by the answers with guidance alone: with the differences there are twice as many numbers, which fit a few
prompts at any times. They come last, from zero, or from their closed form where closed forms with them are nearer than
without on calls that they were not fitted to.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count as count_from
from typing import Annotated, Any

import numpy as np

from hasten.calibration import Calibration, Fingerprint, model_digest
from hasten.errors import AlreadyAcceleratedError, CalibrationError
from hasten.fitting.group import GUIDED, PASSES, Group, check_differ, check_passes, guidance_of_calls, told_guidance
from hasten.fitting.guidance import Family, Place, axis_of, families_from, halfway
from hasten.fitting.leap_fitter import YARDSTICK, Fitter, Leap
from hasten.fitting.references import References
from hasten.fitting.refine import DIRECTIONS, refine
from hasten.fitting.starts import MOST_STARTS, Seeker, Start
from hasten.parameters import MOST_GUIDANCE, Range, accepted
from hasten.pipeline.hooks import refuse_accelerated
from hasten.pipeline.replay import Replay
from hasten.pipeline.view import denoisers
from hasten.solvers.content import LEAP, check_pipeline, denoiser_of
from hasten.solvers.multistep import Row
from hasten.solvers.scheduler import LeapScheduler
from hasten.solvers.tables import COLUMNS, Table, middle_of, packed, unpacked
from hasten.weights import weights_digest

__all__ = ["fit_leap", "plain_config"]

Progress = Callable[[int, int, int, float], None]


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
    known: Calibration | None = None,
    keep: Callable[[Calibration], object] | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Learn a solver for each number of evaluations.

    Args:
        pipe: a pipeline of a flow-matching or variance-preserving model, with a linear scheduler (no noise, no
            clipping).
        calls: arguments of its calls, with the steps, size and guidance that the references are to have, each with
            generators or latents. Give batches: each evaluation of the fit runs every call once.
        evaluations: numbers of evaluations; those that differ by one or two help each other.
        guidances: scales at which times and coefficients are fitted; three serve all scales between them. By
            default the one of the calls. At all of them the pipeline has to make as many passes.
        held_out: other calls, on which the error is reported beside that of the training. For a range both are those at
            its highest scale, whatever the calls say.
        trials: most starts of the refinement that are tried for each number; 1 takes a spread of times, and from 3 on
            the best plain solver and the solver with fewer evaluations are among them.
        rounds: of the joint refinement of times and coefficients; 0 leaves it out.
        ridge: how strongly coefficients are drawn to those of the plain sampler.
        known: an earlier result, perhaps of a fit that was cut short; what was fitted to the same prompts with the
            same settings is taken over.
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
    arguments = {
        "trials": (Annotated[int, Range(1)], trials),
        "rounds": (Annotated[int, Range(0)], rounds),
        "ridge": (Annotated[float, Range(0)], ridge),
        **({"guidances": (tuple[Annotated[float, Range(0, MOST_GUIDANCE)], ...], guidances)} if len(guidances) else {}),
    }
    for name, (hint, value) in arguments.items():
        accepted("fit_leap", name, hint, value)
    trials = min(trials, MOST_STARTS)
    with Replay(held_out) as others, Replay(calls) as replay:
        _check_counts(evaluations, replay.steps(pipe))
        fit = _Fit(pipe, replay, guidances, others, ridge, progress)
        _check_counts(evaluations, fit.total)  # a run may have other steps than it was asked for
        options = fit.options | {"trials": trials, "rounds": rounds, "ridge": ridge}
        result = Calibration(LEAP, {}, fit.fingerprint, {}, options)
        # A fit at one scale that does not say by which argument is as good as one that does.
        unsaid = {} if guidances else {"guidance_argument": result.options["guidance_argument"]}
        if known is not None and (known.fingerprint, unsaid | known.options) == (result.fingerprint, result.options):
            result = known
        for count in sorted(evaluations):
            if str(count) in result.report:
                if held_out:  # perhaps others than the known fit was given
                    told = result.report[str(count)] | fit.held_out(unpacked(result.tensors)[str(count)])
                    result = replace(result, report=result.report | {str(count): told})
                continue
            if fewer := [int(name) for name in result.report if int(name) < count]:
                fit.recall(unpacked(result.tensors)[str(max(fewer))])
            table, report = fit.solver(count, trials, rounds)
            tensors = result.tensors | packed({count: table})
            result = Calibration(LEAP, tensors, result.fingerprint, result.report | {str(count): report}, options)
            if keep is not None:
                keep(result)
    return result


def _check_counts(evaluations: Sequence[int], steps: int | None) -> None:
    """Raise a ConfigError for numbers of evaluations that references of so many steps do not allow."""
    accepted("fit_leap", "evaluations", tuple[Annotated[int, Range(1, steps)], ...], evaluations)


class _Fit:
    """A fit under way."""

    def __init__(
        self,
        pipe: Any,
        calls: Replay,
        guidances: Sequence[float],
        held_out: Replay,
        ridge: float,
        progress: Progress | None,
    ) -> None:
        self._pipe, self._progress = pipe, progress
        name, own = guidance_of_calls(list(calls), list(held_out), guidances)
        scales = sorted(map(float, guidances))
        self._scales: list[float | None] = list(scales) or [own]
        self._axis = axis_of(scales) if len(scales) > 1 else None
        between, few = halfway(self._axis) if self._axis else [], -(-len(calls) // 2)
        total, done = len(self._scales) * len(calls) + len(between) * few + len(held_out), 0

        def tick(_: int) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(0, done, max(total, done), 1.0)

        def at(scale: float, of: Replay = calls, count: int | None = None) -> Replay:
            return of.changed(count, **{str(name): scale})

        groups = [at(scale) for scale in scales] or [calls]
        self._at: list[Group] = []
        for group in groups:
            self._at.append(Group(pipe, group, ridge, tick))
            check_passes(self._at, scales)
            check_differ(self._at, scales, name)
        argument, own, self._beside = told_guidance(pipe, self._at[0].references, list(calls), (name, own))
        self._argument = name if scales else argument
        self._scales = list(scales) or [own]
        self._between: dict[float, Group] = {}
        for scale in between:
            self._between[scale] = Group(pipe, at(scale, count=few), ridge, tick)
            check_passes([self._at[0], self._between[scale]], [scales[0], scale])
        self._hardest = self._at[-1]  # at the highest scale, where errors are largest: reports tell of it
        hardest = self._hardest.references
        self._held = None
        if held_out:
            self._held = Group(pipe, at(scales[-1], held_out) if scales else held_out, ridge, tick)
        self.total = hardest.total
        ends = {0, len(self._at) - 1}
        self._seekers = {end: Seeker(self._at[end].fitters[GUIDED], len(scales) > 1) for end in ends}
        self._checks = sum(at.evaluator.made for at in self._all)
        self.fingerprint = _fingerprint(pipe, hardest, self._scales[middle_of(self._scales)])
        self.options = self._options(hardest)

    def _options(self, references: References) -> dict[str, Any]:
        # FLUX.2's shift depends on the number of steps too, and tells nothing of the image's size then.
        mu = references.mu if self._hardest.evaluator.mu == references.mu else None
        return {
            "prediction_type": references.kind,
            "num_train_timesteps": int(self._pipe.scheduler.config.num_train_timesteps),
            "shift_mu": mu,
            "guidances": self._scales,
            "guidance_argument": self._argument,
            "guidance_beside": self._beside,
            **({"interpolated_over": "logarithm"} if self._axis and self._axis.logarithmic else {}),
            "mixtures": [at.references.mixture for at in self._at],
            "noise_scale": references.plain.noise_scale,
            "plain": plain_config(self._pipe.scheduler),
            "prompts": references.prompts,
            "learned_from": references.digest,
            "yardstick": YARDSTICK,
        }

    @property
    def _all(self) -> list[Group]:
        return [*self._at, *self._between.values(), *([] if self._held is None else [self._held])]

    # --- one number of evaluations

    def recall(self, table: Mapping[str, Any]) -> None:
        """Let a table with fewer evaluations be a start of the next one."""
        for end, seeker in self._seekers.items():
            seeker.before = _times_of(table, end), table[GUIDED][end]

    def solver(self, count: int, trials: int, rounds: int) -> tuple[Table, dict[str, Any]]:
        """The table for a number of evaluations, and what is to be told of it."""
        made_before = sum(at.evaluator.made for at in self._all)
        total, done = len(self._seekers) * (trials + rounds) + (rounds if self._axis else 0), count_from(1)

        def tick(error: float) -> None:
            if self._progress is not None:
                self._progress(count, min(next(done), total), total, error)

        start, best = self._seekers[len(self._at) - 1].solver(count, trials, rounds, tick)
        over_range: dict[str, Any] = {}
        if self._axis is None:
            table, found = self._with_differences(best, rounds)
        else:
            lowest = self._seekers[0].solver(count, trials, rounds, tick)[1].timesteps
            fitted = dict(zip(self._axis.scales, self._at, strict=True))
            highest = best.timesteps, best.rows
            del best  # columns are large
            families = families_from(lowest, highest, fitted, self._between, rounds, tick)
            table = self._table({form: own.rows for form, own in families.items()}, families[GUIDED].timesteps)
            found = _made_at(self._axis.scales[-1], self._hardest, families)
            judged = sorted([*fitted.items(), *self._between.items()], key=lambda one: one[0])
            by_scale = {f"{scale:.4g}": _figures(_made_at(scale, group, families)) for scale, group in judged}
            over_range = {"guidance": self._axis.scales[-1], "by_guidance": by_scale}
        done = count_from(total)
        tick(found[GUIDED].relative_squared_error)
        report = over_range | self._report(start, found)
        report["evaluations_of_fit"] = sum(at.evaluator.made for at in self._all) - made_before
        return table, report

    def _with_differences(self, best: Leap, rounds: int) -> tuple[Table, dict[str, Leap]]:
        """The table of a solver, with coefficients for the differences as well where there are two passes."""
        found, fitters = {GUIDED: best}, self._hardest.fitters
        if PASSES in fitters:
            with self._hardest.evaluator.probing():
                found[PASSES] = _wide(fitters[PASSES], fitters[GUIDED], best, rounds)
        return self._table({form: [own.rows] for form, own in found.items()}, [best.timesteps]), found

    def _table(self, rows: Mapping[str, Sequence[Sequence[Row]]], timesteps: Sequence[tuple[float, ...]]) -> Table:
        references = self._hardest.references
        middle, several = timesteps[middle_of(timesteps)], len(timesteps) > 1
        noise = references.noise if several else (None, None)
        return Table(
            middle,
            tuple(references.level_at(time) for time in middle),
            _frozen(rows[GUIDED]),
            _frozen(rows[PASSES]) if PASSES in rows else None,
            tuple(timesteps) if several else None,
            *noise,
        )

    def _report(self, start: Start, found: Mapping[str, Leap]) -> dict[str, Any]:
        best = found[GUIDED]
        hardest = self._hardest.references
        report: dict[str, Any] = {
            "steps": _steps(hardest, best.timesteps),
            **_figures(found),
            "start": start.name,
            **_of("at_the_start", start.unmoved),
            "trials": start.trials,
            "plain": None if start.plain is None else {"sampler": start.plain[0], **start.plain[1]},
            "formula_error": hardest.error,
            "evaluations_of_references": sum(at.references.total * at.references.prompts for at in self._all),
            "evaluations_of_checks": self._checks,
        }
        if self._held is not None:
            report |= self._held_out(best.timesteps, {form: own.rows for form, own in found.items()})
        return report

    def held_out(self, table: Mapping[str, Any]) -> dict[str, float]:
        """The errors of a table of an earlier fit on the calls that are held out, of which there are some."""
        rows = {form: table[form][-1] for form in COLUMNS if form in table}
        return self._held_out(_times_of(table, -1), rows)

    def _held_out(self, timesteps: Sequence[float], rows: Mapping[str, Sequence[Row]]) -> dict[str, float]:
        assert self._held is not None
        form = [one for one in rows if one in self._held.fitters][-1]  # the held-out calls may have no guidance
        with self._held.evaluator.probing():
            return _of("held_out", self._held.fitters[form].exact(timesteps, rows[form]).figures)


def _times_of(table: Mapping[str, Any], at: int) -> tuple[float, ...]:
    """The times of a table of an earlier fit, of the scale that is number `at`."""
    several = table.get("timesteps_by_scale")
    return tuple(table["timesteps"] if several is None else several[at])


def _made_at(scale: float, group: Group, families: Mapping[str, Family]) -> dict[str, Leap]:
    """What families do at a scale, by form."""
    return {form: Place(scale, group.fitters[form]).run(own) for form, own in families.items()}


def _figures(found: Mapping[str, Leap]) -> dict[str, float]:
    """Errors of a solver in its forms, as a report has them."""
    figures = dict(found[GUIDED].figures)
    if PASSES in found:
        figures |= {f"{name}_with_both_passes": error for name, error in found[PASSES].figures.items()}
    return figures


def _of(name: str, figures: Mapping[str, float]) -> dict[str, float]:
    """Both errors (`Leap.figures`) of something else than the solver, as a report has them."""
    relative = "relative_to_first_order"
    return {name: figures["relative_squared_error"], f"{name}_{relative}": figures[relative]}


def _wide(fitter: Fitter, guided: Fitter, leap: Leap, rounds: int) -> Leap:
    """A solver with coefficients for the differences as well, at the times of one over the outputs alone.

    It starts from the closed form if that is the nearer one, here and on calls that it was not fitted to.
    """
    own = fitter.exact(leap.timesteps, [fitter.widened(row) for row in leap.rows])
    if fitter.elsewhere(leap.timesteps) < guided.elsewhere(leap.timesteps):
        own = min(own, fitter.fit(leap.timesteps), key=lambda one: one.error)
    return refine(fitter, own, min(rounds, 1), times=False, directions=DIRECTIONS)


def _fingerprint(pipe: Any, references: References, guidance: float | None) -> Fingerprint:
    name, model = denoiser_of(pipe)
    return Fingerprint(
        model=name,
        config=model_digest(model),
        weights=weights_digest(model),
        scheduler=type(pipe.scheduler).__name__,
        timesteps=tuple(references.plain.timesteps),
        passes=("cond", "uncond") if references.differences else ("cond",),
        guidance=guidance,
        site="output",
    )


def plain_config(scheduler: Any) -> dict[str, Any]:
    """The configuration of a scheduler as JSON holds it, with the name of its class; infinite defaults are left out."""
    content: dict[str, Any] = json.loads(scheduler.to_json_string())
    return {
        name: value for name, value in content.items() if not (isinstance(value, float) and not math.isfinite(value))
    }


def _frozen(fits: Sequence[Sequence[Row]]) -> tuple[tuple[tuple[float, ...], ...], ...]:
    return tuple(tuple(tuple(row) for row in rows) for rows in fits)


def _steps(references: References, times: Sequence[float]) -> list[int]:
    """The plain sampler's steps next to some times, each another one: lists for caching methods."""
    grid = [*references.plain.timesteps, 0.0]
    places = np.interp(times, grid[::-1], np.arange(len(grid))[::-1])
    steps = [0]
    for place in places[1:]:
        steps.append(max(round(float(place)), steps[-1] + 1))
    for i in range(len(steps) - 1, 0, -1):
        steps[i] = min(steps[i], references.total - len(steps) + i)
    return steps
