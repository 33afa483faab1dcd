"""Where a fit of LEAP starts: lists of times, the plain solvers, and solvers with fewer evaluations or more."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from hasten.caching.schedule import spread
from hasten.errors import HastenError
from hasten.fitting.leap_fitter import Fitter, Leap
from hasten.fitting.refine import refine
from hasten.fitting.surrogate import Surrogate
from hasten.fitting.symbolic import PlainSolver, prepared, read_off
from hasten.solvers.multistep import NormalEquations, Row, combine
from hasten.solvers.plain import SOLVERS, SPACINGS, Sampler

__all__ = ["MOST_STARTS", "Seeker", "Start", "best_start", "extended", "plain_solvers", "resized", "shortened"]

Times = tuple[float, ...]

POWERS = (1.15, 1.3, 1.0)  # of spreads of times: above 1 they are denser where the noise is strong
WEIGHT = 0.3  # of the states on the way, in the surrogate
RIDGE = 1e-9  # of the combination of columns that takes the place of one
FEW = 3  # plain solvers, the best on the first call, that all calls judge
PART = 4  # the share of the calls on which a start is tried, as a divisor
LENGTHENED, SHORTENED = "fewer evaluations", "more evaluations"  # the names of these starts
MOST_STARTS = len(POWERS) + 3  # with the best plain solver, the one with fewer evaluations, and the surrogate's list


@dataclass(frozen=True)
class Start:
    """What the refinement of a solver began with.

    Attributes:
        name: where its times came from.
        unmoved: its errors (`Leap.figures`), as they were before it was moved.
        plain: the best plain solver's name, and its errors on all calls; None if none was looked at.
        trials: how many starts were tried.
    """

    name: str
    unmoved: dict[str, float]
    plain: tuple[str, dict[str, float]] | None
    trials: int


class Seeker:
    """Looks for solvers at one guidance scale, for one number of evaluations after another.

    Args:
        fitter: over the guided outputs.
        whole: whether all solvers begin where the plain sampler does, as those that are interpolated have to.

    Attributes:
        before: times and rows of the best solver with fewer evaluations, which is a start of the next one.
    """

    def __init__(self, fitter: Fitter, whole: bool) -> None:
        self.before: tuple[Times, list[Row]] | None = None
        self._fitter, self._first = fitter, fitter.references.plain.timesteps[0] if whole else None
        self._surrogate = Surrogate(fitter.references, fitter.width, fitter.roots)

    def solver(
        self, count: int, trials: int, rounds: int, longer: bool, progress: Callable[[float], None]
    ) -> tuple[Start, Leap]:
        """Where the refinement of a solver with `count` evaluations begins, and where it ends.

        Args:
            count: evaluations.
            trials: see `best_start`.
            longer: see `best_start`.
            rounds: of the refinement.
            progress: called with the relative squared error after each start and each round.
        """
        fitter, evaluator, plain = self._fitter, self._fitter.evaluator, {}
        with evaluator.probing():
            if trials > 1:
                plain = plain_solvers(evaluator.scheduler, evaluator.arguments(count), fitter.references.kind)
            if self._first is not None:
                plain = {label: solver for label, solver in plain.items() if solver.timesteps[0] == self._first}
            before = None if self.before is None else fitter.exact(*self.before)
            start, leap = best_start(
                fitter,
                self._surrogate,
                plain,
                before,
                count,
                trials=trials,
                longer=longer,
                move=rounds > 0,
                progress=progress,
            )
            return start, refine(fitter, leap, rounds, progress)


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


def best_start(
    fitter: Fitter,
    surrogate: Surrogate,
    plain: dict[str, PlainSolver],
    before: Leap | None,
    count: int,
    *,
    trials: int,
    longer: bool,
    move: bool,
    progress: Callable[[float], None],
) -> tuple[Start, Leap]:
    """The solver with `count` evaluations to refine: fitted to all calls, and moved already if it is to be.

    The error of a closed form says little of where its refinement ends: of six spreads of seven evaluations on
    `emoji-flux`, the one with the best closed form ended worst. So every start is refined a little, on a part of the
    calls, and all calls say which is the best.

    Args:
        fitter: while its evaluator is probing.
        surrogate: of its references.
        plain: solvers with `count` evaluations.
        before: the best solver with fewer evaluations, of the same calls.
        count: evaluations.
        trials: most starts; with one the first spread of times is taken as it is, and from three on the solver with
            fewer evaluations and the best plain solver are among them.
        longer: whether the last start, beside these, is a solver with one evaluation more that is made for this alone:
            for numbers that are not tried from a longer one later. Only where starts are moved.
        move: whether starts are refined; else the nearest closed form is taken.
        progress: called after each start with the relative squared error of the best.
    """
    best_plain = _best_plain(fitter, plain) if trials > 2 else None
    best: tuple[Start, Leap] | None = None
    told, tried = None if best_plain is None else (best_plain[0], best_plain[2]), 0
    starts = list(islice(_starts(fitter, surrogate, best_plain, before, count), trials))
    if longer and move and count < fitter.references.total:
        starts.append((SHORTENED, lambda: _one_more_left_out(fitter, surrogate, count)))
    for name, made in starts:
        tried += 1
        leap = made()
        unmoved = leap.figures
        if move and trials > 1:
            leap = _moved(fitter, leap)
        if best is None or leap.error < best[1].error:
            best = Start(name, unmoved, told, tried), leap
        progress(best[1].relative_squared_error)
        del leap  # columns are large: those of the best start alone are held while the next one is made
    assert best is not None
    return replace(best[0], trials=tried), best[1]


def _best_plain(fitter: Fitter, plain: dict[str, PlainSolver]) -> tuple[str, PlainSolver, dict[str, float]] | None:
    """The plain solver that is the best on all calls, of the few that are the best on the first; its error."""
    first = fitter.restricted(fitter.calls[:1])
    scores = {label: first.plain(solver).error for label, solver in plain.items()}
    few = sorted(scores, key=lambda label: scores[label])[:FEW]
    made = [(label, fitter.plain(plain[label])) for label in few]
    best = min(made, key=lambda one: one[1].error, default=None)
    return None if best is None else (best[0], plain[best[0]], best[1].figures)


def _starts(
    fitter: Fitter,
    surrogate: Surrogate,
    plain: tuple[str, PlainSolver, dict[str, float]] | None,
    before: Leap | None,
    count: int,
) -> Iterator[tuple[str, Callable[[], Leap]]]:
    """What a fit may begin with, by name: how to make it. Of equal lists the first is given alone."""
    grid = fitter.references.plain.timesteps
    known: set[Times] = set()

    def closed(name: str, steps: Sequence[int]) -> Iterator[tuple[str, Callable[[], Leap]]]:
        times = tuple(grid[step] for step in steps)
        if times not in known:
            known.add(times)
            yield name, lambda: fitter.fit(times)

    yield from closed(f"spread, power {POWERS[0]:g}", spread(count, len(grid), POWERS[0]))
    if before is not None:
        yield LENGTHENED, lambda: _lengthened(fitter, before, count)
    if plain is not None:
        label, solver, _ = plain
        rows = [fitter.widened(row) for row in solver.rows]
        yield f"plain {label}", lambda: fitter.score(solver.timesteps, rows)
    for power in POWERS[1:]:
        yield from closed(f"spread, power {power:g}", spread(count, len(grid), power))
    yield from closed("spanned", surrogate.best(count, WEIGHT))


def _lengthened(fitter: Fitter, leap: Leap, count: int) -> Leap:
    while len(leap.timesteps) < count:
        leap = extended(fitter, leap)
    return leap


def _one_more_left_out(fitter: Fitter, surrogate: Surrogate, count: int) -> Leap:
    """A solver with one evaluation more, moved, without the one whose loss costs least."""
    grid = fitter.references.plain.timesteps
    times = tuple(grid[step] for step in surrogate.best(count + 1, WEIGHT))
    return shortened(fitter, _moved(fitter, fitter.fit(times)))


def _moved(fitter: Fitter, leap: Leap) -> Leap:
    """A start after a round of refinement on a part of the calls, or as it was if that is better on all of them."""
    part = fitter.restricted(fitter.calls[: -(-len(fitter.calls) // PART)])
    moved = refine(part, part.exact(leap.timesteps, leap.rows), 1)
    return min(fitter.score(moved.timesteps, moved.rows), leap, key=lambda one: one.error)


def extended(fitter: Fitter, leap: Leap) -> Leap:
    """A solver with one evaluation more, which is no worse.

    The new evaluation stands halfway between two others, or before the end. The others go on as if it were not there,
    so it alone has to be made; then the last row is fitted anew.
    """
    whole = [*leap.timesteps, 0.0]
    places = [place for place in range(1, len(whole)) if whole[place] < whole[place - 1]]  # the last time may be 0
    return min((_inserted(fitter, leap, place) for place in places), key=lambda one: one.error)


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
    made = Leap(
        (*times[:place], time, *times[place:]), rows, leap.errors, leap.relative_squared_error, columns, fitter.calls
    )
    return fitter.score(made.timesteps, rows, made, len(made.timesteps))


def shortened(fitter: Fitter, leap: Leap) -> Leap:
    """A solver with one evaluation fewer, without that whose loss leaves the least error. The first one always stays.

    Rows that used its answer use the combination of earlier columns that is nearest to it, or all rows are the closed
    form of the times that are left, whichever has less error.
    """
    best: Leap | None = None
    for place in range(1, len(leap.timesteps)):
        times = (*leap.timesteps[:place], *leap.timesteps[place + 1 :])
        rows = _without(fitter, leap, place)
        folded = None if rows is None else fitter.score(times, rows, leap, place)
        closed = fitter.fit(times)
        best = min([one for one in (best, folded, closed) if one is not None], key=lambda one: one.error)
    assert best is not None
    return best


def _without(fitter: Fitter, leap: Leap, place: int) -> list[Row] | None:
    """The rows of a solver without the evaluation at number `place`; None where the model has no answer."""
    cut, width = 1 + fitter.width * place, fitter.width
    shares = []
    for column in range(cut, cut + width):
        equations = NormalEquations(cut)
        for i, call in enumerate(fitter.calls):
            equations.add(leap.columns[i][:cut], leap.columns[i][column], fitter.roots[call])
        if not equations.is_finite():
            return None
        shares.append(equations.solve([0.0] * cut, RIDGE))

    def folded(row: Row) -> Row:
        gone = row[cut : cut + width]
        first = [a + sum(b * own[i] for b, own in zip(gone, shares, strict=True)) for i, a in enumerate(row[:cut])]
        return [*first, *row[cut + width :]]

    return [*leap.rows[: place - 1], *map(folded, leap.rows[place:])]


def resized(fitter: Fitter, leap: Leap, count: int, rounds: int, progress: Callable[[float], None]) -> tuple[str, Leap]:
    """A solver with another number of evaluations to begin with, and what a report calls such a start.

    Args:
        fitter: while its evaluator is probing.
        leap: the solver with more evaluations or fewer.
        count: evaluations.
        rounds: of refinement after each but the last of several that are left out.
        progress: called with the relative squared error after each of these rounds.

    Returns:
        the name, and the solver; one that still has more evaluations where the model has no answer there.
    """
    if len(leap.timesteps) < count:
        return LENGTHENED, _lengthened(fitter, leap, count)
    leap = shortened(fitter, leap)
    while len(leap.timesteps) > count and math.isfinite(leap.error):
        leap = shortened(fitter, refine(fitter, leap, rounds, progress))
    return SHORTENED, leap
