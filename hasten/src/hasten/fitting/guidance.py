"""One solver for a range of guidance: times and coefficients at some scales, between which both are interpolated.

Solvers that were fitted at each scale alone lie anywhere in the flat valley of their error, and a polynomial through
them misses it between the scales. So each goes on from its neighbour, beginning in the middle; then all are refined
together, by the Gauss-Newton steps of `refine.py`, on the paths that the interpolated solver makes at the scales and
halfway between them. What a number at one scale does to a path at another is its weight in the interpolation, so a
Jacobian for each path is all that this takes. Errors differ by orders of magnitude over a range (at guidance 5 seventy
times that at 1.5, on `emoji-flux`), and what counts is by how much each falls: the sum of their logarithms is made
small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from hasten.fitting.group import DIRECTIONS, GUIDED, PASSES, Group
from hasten.fitting.leap_fitter import Fitter, Leap
from hasten.fitting.refine import (
    DAMPING,
    SMALLEST_GAIN,
    STEPS,
    TRIES,
    Jacobian,
    Move,
    learning,
    moves_of,
    passable_share,
    refine,
)
from hasten.solvers.multistep import NormalEquations, Row, combine
from hasten.solvers.tables import interpolated, lagrange

__all__ = ["Family", "Path", "continued", "families_from", "halfway", "refined_together"]

Times = tuple[float, ...]
SMALLEST = 1e-14  # of the squared errors whose logarithms are summed


def halfway(scales: Sequence[float]) -> list[float]:
    """The scales in the middle between neighbours."""
    return [0.5 * (a + b) for a, b in pairwise(sorted(scales))]


@dataclass(frozen=True)
class Family:
    """Solvers with as many evaluations, one for each of some guidance scales.

    Attributes:
        scales: rising.
        timesteps: of each solver.
        rows: of each solver.
    """

    scales: tuple[float, ...]
    timesteps: tuple[Times, ...]
    rows: tuple[list[Row], ...]

    def at(self, scale: float) -> tuple[Times, list[Row]]:
        """Times and rows at a scale."""
        (times,) = interpolated([[one] for one in self.timesteps], self.scales, scale)
        return tuple(times), interpolated(self.rows, self.scales, scale)

    def moved(self, moves: Sequence[Move], delta: Row) -> Family:
        """The family after a step: for each scale the moves, then what is added to the last row."""
        size = len(delta) // len(self.scales)
        times, rows = [], []
        for i, (own_times, own_rows) in enumerate(zip(self.timesteps, self.rows, strict=True)):
            part = delta[i * size : (i + 1) * size]
            for move, by in zip(moves, part, strict=False):
                own_times, own_rows = move.applied(own_times, own_rows, by)
            last = [a + b for a, b in zip(own_rows[-1], part[len(moves) :], strict=True)]
            times.append((*own_times[:-1], max(own_times[-1], 0.0)))
            rows.append([*own_rows[:-1], last])
        return Family(self.scales, tuple(times), tuple(rows))

    def kept_apart(self, before: Family, scales: Sequence[float]) -> Family:
        """The family with times on the way from those of another, as far as those at some scales stay apart."""
        share = min(passable_share(before.at(scale)[0], self.at(scale)[0]) for scale in scales)
        times = (
            tuple(a + share * (b - a) for a, b in zip(old, new, strict=True))
            for old, new in zip(before.timesteps, self.timesteps, strict=True)
        )
        return replace(self, timesteps=tuple(times))


@dataclass(frozen=True)
class Path:
    """A scale at which a family is judged.

    Attributes:
        scale: of the guidance.
        fitter: of calls with it.
    """

    scale: float
    fitter: Fitter

    def is_passable(self, family: Family) -> bool:
        """Whether the family's times fall here."""
        times, _ = family.at(self.scale)
        return all(a > b for a, b in pairwise(times)) and times[-1] >= 0

    def run(self, family: Family) -> Leap | None:
        """What the family does here; None where its times do not fall."""
        if not self.is_passable(family):
            return None
        times, rows = family.at(self.scale)
        with self.fitter.evaluator.probing():
            return self.fitter.exact(times, rows)


def families_from(
    best: Leap, fitted: Mapping[float, Group], between: Mapping[float, Group], rounds: int
) -> dict[str, Family]:
    """Solvers for a range of guidance from that for the scale in its middle, by form.

    Args:
        best: the solver over guided outputs for the scale in the middle.
        fitted: calls at each scale that is to have numbers of its own, rising.
        between: calls at further scales, where the interpolated solver is judged as well.
        rounds: of the refinement of each, and of all together.
    """
    scales, groups, middle = tuple(fitted), list(fitted.values()), (len(fitted) - 1) // 2
    judged = sorted([*fitted.items(), *between.items()], key=lambda one: one[0])

    def paths(form: str) -> list[Path]:
        return [Path(scale, group.fitters[form]) for scale, group in judged]

    known = [best if i == middle else None for i in range(len(groups))]
    leaps = continued(known, [group.fitters[GUIDED] for group in groups], rounds)
    chain = Family(scales, tuple(leap.timesteps for leap in leaps), tuple(leap.rows for leap in leaps))
    same = Family(scales, (best.timesteps,) * len(scales), (best.rows,) * len(scales))
    del leaps  # columns are large
    begin = min((chain, same), key=lambda one: _score(_run(one, paths(GUIDED))))
    found = {GUIDED: refined_together(begin, paths(GUIDED), rounds)}
    wider = groups[middle].fitters.get(PASSES)
    if wider is not None:
        rows = tuple([wider.widened(row) for row in own] for own in found[GUIDED].rows)
        wide = replace(found[GUIDED], rows=rows)
        found[PASSES] = refined_together(wide, paths(PASSES), min(rounds, 1), times=False, directions=DIRECTIONS)
    return found


def continued(leaps: Sequence[Leap | None], fitters: Sequence[Fitter], rounds: int) -> list[Leap]:
    """Solvers for all scales, each going on from its neighbour on the side of the one that is known.

    Args:
        leaps: that for one scale, and None for the others.
        fitters: at the scales.
        rounds: of the refinement of each.
    """
    found = list(leaps)
    known = next(i for i, leap in enumerate(found) if leap is not None)
    for i in [*range(known + 1, len(found)), *range(known - 1, -1, -1)]:
        before, fitter = found[i - 1 if i > known else i + 1], fitters[i]
        assert before is not None
        with fitter.evaluator.probing():
            found[i] = refine(fitter, fitter.score(before.timesteps, before.rows), rounds)
    return [leap for leap in found if leap is not None]


def refined_together(
    family: Family,
    paths: Sequence[Path],
    rounds: int,
    progress: Callable[[float], None] | None = None,
    *,
    times: bool = True,
    directions: int | None = None,
) -> Family:
    """A family that is nearer to the references at all paths together.

    Args:
        family: with times that fall at all paths.
        paths: where to look; the one nearest to the middle says in which directions rows are moved.
        rounds: at most; see `refine`.
        progress: called with the mean of the relative squared errors' logarithms after each round.
        times, directions: see `refine`.
    """
    middle = len(paths) // 2
    leaps = _run(family, paths)
    assert leaps is not None
    for turn in range(rounds):
        start, damping = family, DAMPING
        chosen = moves_of(paths[middle].fitter, leaps[middle], times, directions)
        jacobians = [_jacobians(path.fitter, leap, chosen, turn) for path, leap in zip(paths, leaps, strict=True)]
        for _ in range(STEPS):
            before = _score(leaps)
            equations = _equations(family, paths, leaps, jacobians, len(chosen))
            for _ in range(TRIES):
                moved = family.moved(chosen, equations.damped(damping))
                tried = moved.kept_apart(family, [path.scale for path in paths])
                found = _run(tried, paths)
                if found is not None and _score(found) < before:
                    family, leaps, damping = tried, found, max(damping / 10, 1e-8)
                    break
                damping *= 10
            if _score(leaps) > before + math.log(1 - SMALLEST_GAIN):
                break
        if progress is not None:
            progress(_score(leaps))
        if family is start and turn:
            break
    return family


def _run(family: Family, paths: Sequence[Path]) -> list[Leap] | None:
    found: list[Leap] = []
    for path in paths:
        leap = path.run(family)
        if leap is None or not math.isfinite(leap.error):
            return None
        found.append(leap)
    return found


def _score(leaps: Sequence[Leap] | None) -> float:
    if leaps is None:
        return math.inf
    return sum(math.log(leap.error + SMALLEST) for leap in leaps) / len(leaps)


def _jacobians(fitter: Fitter, leap: Leap, moves: list[Move], turn: int) -> Mapping[int, Jacobian]:
    with fitter.evaluator.probing():
        return {i: Jacobian(fitter, leap, i, moves) for i in learning(len(fitter.calls), turn)}


def _equations(
    family: Family,
    paths: Sequence[Path],
    leaps: Sequence[Leap],
    jacobians: Sequence[Mapping[int, Jacobian]],
    moves: int,
) -> NormalEquations:
    """In the moves and the last row of all scales, each path weighted by the inverse of its error."""
    last = len(leaps[0].rows[-1])
    whole = NormalEquations(len(family.scales) * (moves + last))
    for path, leap, derivatives in zip(paths, leaps, jacobians, strict=True):
        states = path.fitter.references.states
        size = sum(float(states[call][-1].double().square().sum()) for call in path.fitter.calls)
        own = NormalEquations(moves + last)
        for i, known in derivatives.items():
            goal = states[path.fitter.calls[i]][-1]
            own.add([*known.columns, *leap.columns[i][:last]], goal - combine(leap.columns[i], leap.rows[-1]))
        whole.include(own, lagrange(family.scales, path.scale), 1 / (size * (leap.error + SMALLEST)))
    return whole
