"""One solver for a range of guidance: times and coefficients at some scales, between which both are interpolated.

Solvers that were looked for at each scale alone lie anywhere in the flat valley of their error, and a polynomial
through them misses it between the scales. So what a range begins with hangs together. There are two such ways: from the
highest scale, where errors are largest, each solver goes on from its neighbour; or times move with the scale between
those of the solvers for the two ends, and each scale has the closed form of its times, which depends on them smoothly.
The first fits more to its prompts: on `emoji-flux` both are as near to the references that they learned from, and on
others the second is nearer by nearly two decibels at guidance 1.5. So the first is taken where a round of refinement of
both leaves it clearly less error.

All are refined together, by the Gauss-Newton steps of `refine.py`, on the paths that the interpolated solver makes at
the scales and halfway between them. What a number at one scale does to a path at another is its weight in the
interpolation, so a Jacobian for each path is all that this takes. Errors differ by orders of magnitude over a range (at
guidance 5 seventy times that at 1.5, on `emoji-flux`), and what counts is by how much each falls: the sum of their
logarithms is made small.

Polynomials go over the logarithm of the scale, for what a solver needs changes the faster the smaller the scale is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import geometric_mean

from torch import Tensor

from hasten.errors import CalibrationError
from hasten.fitting.group import GUIDED, PASSES, Group
from hasten.fitting.leap_fitter import Fitter, Leap
from hasten.fitting.refine import (
    DAMPING,
    DIRECTIONS,
    SMALLEST_GAIN,
    STEPS,
    TRIES,
    Jacobian,
    Move,
    learning,
    moves_of,
    on_the_way,
    passable_share,
    refine,
)
from hasten.solvers.multistep import NormalEquations, Row, combine
from hasten.solvers.tables import Axis, interpolated, times_at

__all__ = ["Family", "Place", "axis_of", "families_from", "halfway", "refined_together"]

Times = tuple[float, ...]
Columns = Mapping[int, Sequence[Tensor]]  # of a Jacobian, for the calls that are learned from
SMALLEST = 1e-14  # is added to the squared errors whose logarithms are summed
RIDGE = 1e-8  # damping where last rows alone are fitted
CLEARLY = 0.7  # of an error, in the mean of logarithms over a range: less is no accident of the prompts


def axis_of(scales: Sequence[float]) -> Axis:
    """How to go between guidance scales: over their logarithm, or over the scale itself where one of them is 0."""
    return Axis(tuple(sorted(scales)), min(scales) > 0)


def halfway(axis: Axis) -> list[float]:
    """The scales in the middle between neighbours."""
    return [axis.between(low, high, 0.5) for low, high in pairwise(axis.scales)]


@dataclass(frozen=True)
class Family:
    """Solvers with as many evaluations, one for each of some guidance scales.

    Attributes:
        axis: with the scales, rising.
        timesteps: of each solver.
        rows: of each solver.
    """

    axis: Axis
    timesteps: tuple[Times, ...]
    rows: tuple[list[Row], ...]

    def times(self, scale: float) -> Times:
        """Times at a scale."""
        return times_at(self.timesteps, self.axis, scale)

    def is_passable(self) -> bool:
        """Whether times fall, and not below 0, all over the range, from the same one everywhere."""
        if len({times[0] for times in self.timesteps}) > 1:
            return False
        found = map(self.times, self.axis.looks())
        return all(times[-1] >= 0 and all(a > b for a, b in pairwise(times)) for times in found)

    def moved(self, moves: Sequence[Move], delta: Row) -> Family:
        """The family after a step: for each scale the moves, then what is added to the last row.

        Times go only as far as they stay apart all over the range. A last time of 0 stays.
        """
        size = len(delta) // len(self.axis.scales)
        times, rows = [], []
        for i, (old, own_rows) in enumerate(zip(self.timesteps, self.rows, strict=True)):
            part, new = delta[i * size : (i + 1) * size], old
            for move, by in zip(moves, part, strict=False):
                new, own_rows = move.applied(new, own_rows, by)
            last = [a + b for a, b in zip(own_rows[-1], part[len(moves) :], strict=True)]
            times.append((*new[:-1], max(new[-1], 0.0) if old[-1] > 0 else old[-1]))
            rows.append([*own_rows[:-1], last])
        whole = Family(self.axis, tuple(times), tuple(rows))
        share = min(passable_share(self.times(scale), whole.times(scale)) for scale in self.axis.looks())
        short = tuple(on_the_way(old, new, share) for old, new in zip(self.timesteps, times, strict=True))
        return replace(whole, timesteps=short)


@dataclass(frozen=True)
class Place:
    """A scale at which a family is judged.

    Attributes:
        scale: of the guidance.
        fitter: of calls with it.
    """

    scale: float
    fitter: Fitter

    def run(self, family: Family) -> Leap:
        """What the family does here."""
        rows = interpolated(family.rows, family.axis, self.scale)
        with self.fitter.evaluator.probing():
            return self.fitter.exact(family.times(self.scale), rows)


def families_from(
    lowest: Times,
    highest: tuple[Times, list[Row]],
    fitted: Mapping[float, Group],
    between: Mapping[float, Group],
    rounds: int,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Family]:
    """Solvers for a range of guidance from those for its ends, by form.

    Args:
        lowest: times of the solver for the lowest scale; the first is that of `highest`.
        highest: times and rows over the guided outputs for the highest scale.
        fitted: calls at each scale that is to have numbers of its own, rising.
        between: calls at further scales, where the interpolated solver is judged as well.
        rounds: of the refinement of each, and of all together.
        progress: see `refined_together`; of the guided outputs.
    """
    axis, groups = axis_of(list(fitted)), list(fitted.values())
    judged = sorted([*fitted.items(), *between.items()], key=lambda one: one[0])

    def places(form: str) -> list[Place]:
        return [Place(scale, group.fitters[form]) for scale, group in judged]

    begins = [
        _smooth(lowest, highest[0], axis, groups),
        _continued(highest, axis, groups, rounds),
        Family(axis, (highest[0],) * len(groups), (highest[1],) * len(groups)),
    ]
    found = {GUIDED: _best_refined(begins, places(GUIDED), rounds, progress)}
    if PASSES in groups[-1].fitters:
        starts = _wide_starts(found[GUIDED], groups)
        fitted_starts = (with_last_rows(one, places(PASSES)) for one in starts)
        begin = min(fitted_starts, key=lambda one: _score(one[1]))[0]  # what the starts do is large, and goes
        found[PASSES] = refined_together(begin, places(PASSES), min(rounds, 1), times=False, directions=DIRECTIONS)
    return found


def _continued(highest: tuple[Times, list[Row]], axis: Axis, groups: Sequence[Group], rounds: int) -> Family:
    """Solvers that each go on from their neighbour above."""
    found = [highest]
    for group in reversed(groups[:-1]):
        fitter = group.fitters[GUIDED]
        with fitter.evaluator.probing():
            leap = refine(fitter, fitter.score(*found[0]), rounds)
        found.insert(0, (leap.timesteps, leap.rows))
    return Family(axis, tuple(times for times, _ in found), tuple(rows for _, rows in found))


def _smooth(lowest: Times, highest: Times, axis: Axis, groups: Sequence[Group]) -> Family:
    """Closed forms of times between those of the two ends."""
    ends = Axis((axis.scales[0], axis.scales[-1]), axis.logarithmic)
    times = tuple(times_at((lowest, highest), ends, scale) for scale in axis.scales)
    return Family(axis, times, _closed_forms(times, groups, GUIDED))


def _best_refined(
    begins: Sequence[Family],
    places: Sequence[Place],
    rounds: int,
    progress: Callable[[float], None] | None,
) -> Family:
    """The family that is the best after a round of refinement, refined further.

    Args:
        begins: the first is taken unless another leaves less than a share `CLEARLY` of its error; the last one is
            looked at where no other has an answer at all places.
        places, rounds, progress: see `refined_together`.
    """
    able = [one for one in begins[:-1] if _run(one, places) is not None] or begins[-1:]
    first = min(1, rounds)
    tried = [refined_together(one, places, first) for one in able]
    scores = [_score(_run(one, places)) for one in tried]
    best = min(range(len(tried)), key=lambda i: scores[i])
    chosen = tried[best if scores[best] < scores[0] + math.log(CLEARLY) else 0]
    return refined_together(chosen, places, rounds, progress, begin=first)


def _closed_forms(times: Sequence[Times], groups: Sequence[Group], form: str) -> tuple[list[Row], ...]:
    """The rows of the closed form for each scale's times."""
    rows = []
    for group, own in zip(groups, times, strict=True):
        with group.evaluator.probing():
            rows.append(group.fitters[form].fit(own).rows)
    return tuple(rows)


def _wide_starts(guided: Family, groups: Sequence[Group]) -> list[Family]:
    """Families that know what each pass says: from zero, and from closed forms if they are nearer on other calls."""
    hardest, times = groups[-1], guided.timesteps[-1]
    wide, narrow = hardest.fitters[PASSES], hardest.fitters[GUIDED]
    found = [replace(guided, rows=tuple([wide.widened(row) for row in rows] for rows in guided.rows))]
    with hardest.evaluator.probing():
        nearer = wide.elsewhere(times) < narrow.elsewhere(times)
    if nearer:
        found.append(replace(guided, rows=_closed_forms(guided.timesteps, groups, PASSES)))
    return found


def with_last_rows(family: Family, places: Sequence[Place]) -> tuple[Family, list[Leap] | None]:
    """The family with last rows that are fitted together, unless that is worse, and what it does; see `_run`."""
    leaps = _run(family, places)
    if leaps is not None:
        every: list[Columns] = [dict.fromkeys(range(len(place.fitter.calls)), ()) for place in places]
        step = _equations(family, places, leaps, every, 0).damped(RIDGE)
        family, leaps = _better(family, leaps, family.moved([], step), places)
    return family, leaps


def refined_together(
    family: Family,
    places: Sequence[Place],
    rounds: int,
    progress: Callable[[float], None] | None = None,
    *,
    begin: int = 0,
    times: bool = True,
    directions: int | None = None,
) -> Family:
    """A family that is nearer to the references at all places together.

    Args:
        family: with times that fall all over its range.
        places: where to look; the one in their middle says in which directions rows are moved.
        rounds: at most; see `refine`. Last rows are fitted together without any.
        progress: called with the geometric mean of the relative squared errors after each round.
        begin: the round to begin with; each leaves other calls out of its equations.
        times, directions: see `refine`.

    Raises:
        CalibrationError: if the model gave no finite answer at some scale.
    """
    family, leaps = with_last_rows(family, places)
    idle = 0
    if leaps is None:
        known = ", ".join(f"{scale:g}" for scale in family.axis.scales)
        raise CalibrationError(f"the model's answers are not finite somewhere in guidance {known}; fit a smaller range")
    for turn in range(begin, rounds):
        start, damping = family, DAMPING
        chosen = moves_of(places[len(places) // 2].fitter, leaps[len(places) // 2], times, directions)
        jacobians = [_jacobian(place.fitter, leap, chosen, turn) for place, leap in zip(places, leaps, strict=True)]
        for _ in range(STEPS):
            before, own = _score(leaps), family
            equations = _equations(family, places, leaps, jacobians, len(chosen))
            for _ in range(TRIES):
                family, leaps = _better(own, leaps, own.moved(chosen, equations.damped(damping)), places)
                damping = damping * 10 if family is own else max(damping / 10, RIDGE)
                if family is not own:
                    break
            if _score(leaps) > before + math.log(1 - SMALLEST_GAIN):
                break
        if progress is not None:
            progress(geometric_mean([leap.relative_squared_error + SMALLEST for leap in leaps]))
        idle = idle + 1 if family is start else 0
        if idle == min(2, max(len(place.fitter.calls) for place in places)):
            break
    return family


def _better(family: Family, leaps: list[Leap], other: Family, places: Sequence[Place]) -> tuple[Family, list[Leap]]:
    found = _run(other, places)
    return (family, leaps) if found is None or _score(found) >= _score(leaps) else (other, found)


def _run(family: Family, places: Sequence[Place]) -> list[Leap] | None:
    """What a family does at all places; None where its times do not fall, or the model has no answer."""
    if not family.is_passable():
        return None
    found: list[Leap] = []
    for place in places:
        found.append(place.run(family))
        if not math.isfinite(found[-1].error):
            return None
    return found


def _score(leaps: Sequence[Leap] | None) -> float:
    if leaps is None:
        return math.inf
    return sum(math.log(leap.error + SMALLEST) for leap in leaps) / len(leaps)


def _jacobian(fitter: Fitter, leap: Leap, moves: list[Move], turn: int) -> Columns:
    with fitter.evaluator.probing():
        return {i: Jacobian(fitter, leap, i, moves).columns for i in learning(len(fitter.calls), turn)}


def _equations(
    family: Family, places: Sequence[Place], leaps: Sequence[Leap], jacobians: Sequence[Columns], moves: int
) -> NormalEquations:
    """In the moves and the last row of all scales, each place weighted by the inverse of its error."""
    last = len(leaps[0].rows[-1])
    whole = NormalEquations(len(family.axis.scales) * (moves + last))
    for place, leap, columns in zip(places, leaps, jacobians, strict=True):
        own, images = NormalEquations(moves + last), 0
        for i, known in columns.items():
            call = place.fitter.calls[i]
            goal, images = place.fitter.references.states[call][-1], images + len(place.fitter.roots[call])
            missing = goal - combine(leap.columns[i], leap.rows[-1])
            own.add([*known, *leap.columns[i][:last]], missing, place.fitter.roots[call])
        whole.include(own, family.axis.weights(place.scale), 1 / (images * (leap.error + SMALLEST)))
    return whole
