"""One number of evaluations after another of a LEAP fit (`leap.py`), and what is to be told of each."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import count as count_from
from typing import Any

import numpy as np

from hasten.calibration import Fingerprint, model_digest
from hasten.fitting.group import GUIDED, PASSES, Group, check_differ, check_passes, guidance_of_calls, told_guidance
from hasten.fitting.guidance import Family, Place, axis_of, families_from, halfway
from hasten.fitting.leap_fitter import ERROR, YARDSTICK, Fitter, Leap
from hasten.fitting.references import References
from hasten.fitting.refine import DIRECTIONS, refine
from hasten.fitting.starts import Seeker, Start, resized
from hasten.pipeline.replay import Replay
from hasten.solvers.content import denoiser_of
from hasten.solvers.multistep import Row
from hasten.solvers.tables import COLUMNS, Table, middle_of
from hasten.weights import weights_digest

__all__ = ["FitUnderWay", "Progress", "plain_config"]

Progress = Callable[[int, int, int, float], None]


class FitUnderWay:
    """A fit under way: tables for one number of evaluations after another.

    Args:
        pipe: the pipeline.
        calls: to learn from.
        guidances: see `fit_leap`.
        held_out: calls to tell errors of; perhaps none.
        ridge: see `fit_leap`.
        progress: see `fit_leap`.

    Attributes:
        total: steps of the references.
        fingerprint: of what the fit belongs to.
        options: of its calibration, apart from the settings of `fit_leap`.
    """

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

    def solver(self, count: int, trials: int, rounds: int, longer: bool) -> tuple[Table, dict[str, Any]]:
        """The table for a number of evaluations, and what is to be told of it. `longer`: see `best_start`."""
        made_before = sum(at.evaluator.made for at in self._all)
        total = len(self._seekers) * (trials + rounds) + (rounds if self._axis else 0) + longer
        done = count_from(1)

        def tick(error: float) -> None:
            if self._progress is not None:
                self._progress(count, min(next(done), total), total, error)

        start, best = self._seekers[len(self._at) - 1].solver(count, trials, rounds, longer, tick)
        over_range: dict[str, Any] = {}
        if self._axis is None:
            table, found = self._with_differences(best, rounds)
        else:
            lowest = self._seekers[0].solver(count, trials, rounds, False, tick)[1].timesteps
            fitted = dict(zip(self._axis.scales, self._at, strict=True))
            highest = best.timesteps, best.rows
            del best  # columns are large
            families = families_from(lowest, highest, fitted, self._between, rounds, tick)
            table = self._table({form: own.rows for form, own in families.items()}, families[GUIDED].timesteps)
            by_guidance = {}
            for scale, group in sorted([*fitted.items(), *self._between.items()], key=lambda one: one[0]):
                found = _made_at(scale, group, families)  # at last at the highest scale, of which the report tells
                by_guidance[f"{scale:.6g}"] = _figures(found)
            over_range = {"guidance": self._axis.scales[-1], "by_guidance": by_guidance}
        done = count_from(total)
        tick(found[GUIDED].relative_squared_error)
        report = over_range | self._report(start, found)
        report["evaluations_of_fit"] = sum(at.evaluator.made for at in self._all) - made_before
        return table, report

    def begun_with(
        self, other: Mapping[str, Any], count: int, told: Mapping[str, Any], rounds: int
    ) -> tuple[Table | None, dict[str, Any]]:
        """A table that begins with one for another number of evaluations, at one guidance scale.

        Args:
            other: the table to begin with.
            count: evaluations.
            told: the report of the table that there is.
            rounds: of the refinement; after the first it goes on only where the table that there is has more error.

        Returns:
            the table, or None if the one that there is has no more error over the guided outputs (of those over both
            passes nothing is asked); and the report of the one that is kept.
        """
        fitter, evaluator = self._hardest.fitters[GUIDED], self._hardest.evaluator
        made_before, first, known = sum(at.evaluator.made for at in self._all), min(1, rounds), told[ERROR]
        between = max(len(_times_of(other, -1)) - count - 1, 0)  # evaluations that are left out before the last
        total, done = between * first + max(rounds, 1), count_from(1)

        def tick(error: float) -> None:
            if self._progress is not None:
                self._progress(count, next(done), total, error)

        table, report = None, dict(told)
        with evaluator.probing():
            start, leap = resized(fitter, fitter.exact(_times_of(other, -1), other[GUIDED][-1]), count, first, tick)
            unmoved = leap.figures
            leap = refine(fitter, leap, first, tick)
            if leap.error < known:
                leap = refine(fitter, leap, rounds - first, tick, first=first)
        if leap.error < known:
            table, found = self._with_differences(leap, rounds)
            kept = {name: told[name] for name in ("plain", "tried_from") if name in told}
            report = self._report(Start(start, unmoved, None, told["trials"]), found) | kept
        report["trials"] = told["trials"] + 1
        made = sum(at.evaluator.made for at in self._all) - made_before
        report["evaluations_of_fit"] = told["evaluations_of_fit"] + made
        done = count_from(total)
        tick(report["relative_squared_error"])
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
    return {name: figures["relative_squared_error"], f"{name}_{ERROR}": figures[ERROR]}


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
