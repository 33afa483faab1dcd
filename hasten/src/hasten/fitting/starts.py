"""Where a fit of LEAP starts: lists of times, the plain solvers, and the solver with fewer evaluations."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hasten.errors import HastenError
from hasten.fitting.leap_fitter import Fitter, Leap
from hasten.fitting.surrogate import Surrogate
from hasten.fitting.symbolic import PlainSolver, prepared, read_off
from hasten.solvers.multistep import Row, combine
from hasten.solvers.plain import SOLVERS, SPACINGS, Sampler

__all__ = ["Starts", "extended", "find_starts", "plain_solvers"]

WEIGHTS = (0.02, 0.3)  # of the states on the way, in the surrogate
FRACTIONS = (0.4, 0.15)  # moves of a time, as shares of the way to its neighbour
FACTOR = 8.0  # starts whose error is larger by more than this are not refined


@dataclass(frozen=True)
class Starts:
    """What refinements may start from.

    Attributes:
        leaps: solvers fitted to all calls by name, the best first; one at least.
        plain: the best plain solver's name, and its error on all calls; None if none was looked at.
        trials: how many lists of times the model judged.
    """

    leaps: dict[str, Leap]
    plain: tuple[str, float] | None
    trials: int


def plain_solvers(scheduler: Any, arguments: dict[str, Any], kind: str) -> dict[str, PlainSolver]:
    """The plain solvers with all their spacings, by label; those that a model or class does not have are left out.

    Args:
        scheduler: the pipeline's own.
        arguments: of `set_timesteps`, for the number of evaluations.
        kind: prediction type.
    """
    found: dict[str, PlainSolver] = {}
    for sampler in (Sampler(solver, spacing) for solver in SOLVERS for spacing in SPACINGS):
        try:
            made = read_off(prepared(sampler.scheduler(scheduler), arguments), kind)
        except (HastenError, ValueError, TypeError, ImportError, AssertionError):
            continue  # whatever schedulers raise that do not fit
        if all(other.rows != made.rows for other in found.values()):
            found[sampler.label] = made
    return found


def find_starts(
    fitter: Fitter,
    surrogate: Surrogate,
    plain: dict[str, PlainSolver],
    before: Leap | None,
    count: int,
    *,
    trials: int,
    seed: int,
    progress: Callable[[int, float], None],
) -> Starts:
    """Solvers with `count` evaluations to refine, the best first.

    Args:
        fitter: while its evaluator is probing.
        surrogate: of its references.
        plain: solvers with `count` evaluations.
        before: the best solver with fewer evaluations, of the same calls.
        count: evaluations.
        trials: most lists of times that the model judges; with one nothing but the first is looked at. All calls judge
            them, the first alone the plain solvers.
        seed: of the order of the moves.
        progress: called with lists so far and the best error.
    """
    closed, grid = fitter.restricted(fitter.calls), fitter.references.plain.timesteps
    judged: set[tuple[float, ...]] = set()

    def judge(leap: Leap) -> None:
        if not judged or leap.error < closed.best.error:  # columns of the others are let go of: they are large
            closed.remember(leap)
        judged.add(leap.timesteps)
        progress(len(judged), closed.best.error)

    for weight in WEIGHTS[:trials]:
        times = tuple(grid[step] for step in surrogate.best(count, weight))
        if times not in judged:
            judge(closed.fit(times))
    if trials == 1:
        return Starts({"spanned": closed.best}, None, 1)
    first = fitter.restricted(fitter.calls[:1])
    scores = {label: first.plain(solver).error for label, solver in plain.items()}
    best_plain = min(scores, key=lambda label: scores[label], default=None)
    leaps: dict[str, Leap] = {}
    told = None
    if best_plain is not None:
        solver = plain[best_plain]
        exact = fitter.plain(solver)
        told = (best_plain, exact.error)
        leaps[f"plain {best_plain}"] = fitter.score(exact.timesteps, exact.rows, exact, count)
        if tuple(solver.timesteps) not in judged:
            judge(closed.fit(solver.timesteps, [closed.widened(row) for row in solver.rows]))
    rng = random.Random(seed)
    improved = True
    while improved and len(judged) < trials:
        improved = False
        base = closed.best
        for times in _moved(base.timesteps, rng):
            if times in judged:
                continue
            if len(judged) >= trials:
                break
            judge(closed.fit(times))
            if closed.best is not base:
                improved = True
                break
    leaps["searched"] = closed.best
    if before is not None:
        longer = before
        while len(longer.timesteps) < count:
            longer = extended(fitter, longer)
        leaps["extended"] = longer
    ranked = sorted(leaps.items(), key=lambda item: item[1].error)
    kept = {label: leap for label, leap in ranked if leap.error <= FACTOR * ranked[0][1].error}
    return Starts(kept, told, len(judged))


def _moved(times: tuple[float, ...], rng: random.Random) -> Iterator[tuple[float, ...]]:
    """Lists with one time moved towards a neighbour (never the first), in random order, far moves first."""
    whole = [*times, 0.0]
    for fraction in FRACTIONS:
        moves = [(k, side) for k in range(1, len(times)) for side in (-1, 1)]
        rng.shuffle(moves)
        for k, side in moves:
            yield (*times[:k], whole[k] + fraction * (whole[k + side] - whole[k]), *times[k + 1 :])


def extended(fitter: Fitter, leap: Leap) -> Leap:
    """A solver with one evaluation more, which is no worse.

    The new evaluation stands halfway between two others, or before the end. The others go on as if it were not there,
    so it alone has to be made; then the last row is fitted anew.
    """
    return min((_inserted(fitter, leap, place) for place in range(1, len(leap.rows) + 1)), key=lambda one: one.error)


def _inserted(fitter: Fitter, leap: Leap, place: int) -> Leap:
    """The solver with a new evaluation at number `place`."""
    times, width = leap.timesteps, fitter.width
    time = 0.5 * (times[place - 1] + [*times, 0.0][place])
    before = leap.rows[place - 2] if place > 1 else [1.0]
    after = leap.rows[place - 1]
    halfway = [0.5 * (number + (before[i] if i < len(before) else 0.0)) for i, number in enumerate(after)]
    cut = 1 + width * place

    def with_gap(row: Row) -> Row:
        return [*row[:cut], *[0.0] * width, *row[cut:]]

    rows = [*leap.rows[: place - 1], halfway, *(with_gap(row) for row in leap.rows[place - 1 :])]
    columns = []
    for i, call in enumerate(fitter.calls):
        known = leap.columns[i]
        output, apart = fitter.evaluator(call, combine(known, halfway), time)
        own = [output] if apart is None or width == 1 else [output, apart]
        columns.append([*known[:cut], *own, *known[cut:]])
    made = Leap((*times[:place], time, *times[place:]), rows, leap.errors, columns, fitter.calls)
    return fitter.score(made.timesteps, rows, made, len(made.timesteps))
