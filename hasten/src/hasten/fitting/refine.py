"""Joint refinement of a LEAP solver on the error of the final image, by Gauss-Newton steps without gradients.

The closed form brings every state near to the reference's, but only the last one is seen. So coefficients and times are
moved together: with `x_T(theta)` the final states of the training batch,

    (J^T W J + damping diag(J^T W J)) delta = J^T W (X_T - x_T(theta))

(Levenberg and Marquardt; `W` makes every image count the same, see `leap_fitter.py`). The columns of `J` for the last
row are the solver's columns themselves; the others come from finite differences: one parameter is moved, and the
evaluations that follow it are made again, about `n^3 / 6` per image and round for all of them; where that is too many,
a row is moved along the directions that move its state most. A Jacobian serves several steps.

Dozens of numbers fit a few images better than they fit others. So each round leaves a part of the calls out of its
equations, and a step is taken only as far as the error of all calls, those included, falls. The parts take turns.
(Learning from all calls: at five evaluations of `emoji-flux` an error smaller by a sixth on the training's prompts,
and larger by an eighth on others. Asking that those left out gain, too, ended a round without any step there.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hasten.fitting.leap_fitter import Fitter, Leap
from hasten.solvers.multistep import NormalEquations, Row, combine

__all__ = ["Jacobian", "Move", "kept_apart", "learning", "moves_of", "on_the_way", "passable_share", "refine"]

Times = tuple[float, ...]

STEPS = 4  # with one Jacobian
DAMPING = 1e-2  # of the first step of a round
TRIES = 4  # dampings in a step, each ten times the one before
PARTS = 4  # of the calls, of which one is left out of a round's equations
SMALLEST_GAIN = 0.02  # a step that lowers the error by a smaller share is the last of its round
DIRECTIONS = 3  # where rows have numbers for both passes: those that move the state most
SIZE = 0.25  # of the move of a finite difference along a row, in the cube root of the answers' rounding


@dataclass(frozen=True)
class Move:
    """A direction in which a solver is moved: along its rows, or one time.

    Attributes:
        row: number of the first row that is moved; or of the time.
        along: the change of this row, and of those after it as far as they change; None for a time.
    """

    row: int
    along: tuple[tuple[float, ...], ...] | None

    def applied(self, timesteps: Times, rows: list[Row], by: float) -> tuple[Times, list[Row]]:
        """Times and rows after a move."""
        if self.along is None:
            return (*timesteps[: self.row], timesteps[self.row] + by, *timesteps[self.row + 1 :]), rows
        moved = list(rows)
        for k, change in enumerate(self.along, start=self.row):
            moved[k] = [number + by * step for number, step in zip(rows[k], change, strict=True)]
        return timesteps, moved

    def size(self, timesteps: Times, rounding: float) -> float:
        """The step of a finite difference: the best one as far as rounding lets it be small.

        Args:
            timesteps: of the solver.
            rounding: relative, of the model's answers.
        """
        step = rounding ** (1 / 3)
        if self.along is not None:
            return SIZE * step
        before, own, later = (*timesteps, 0.0)[self.row - 1 : self.row + 2]
        gaps = [gap for gap in (before - own, own - later) if gap > 0]  # the last time may be 0
        return min(4 * step, 0.25) * min(gaps)


def refine(
    fitter: Fitter,
    leap: Leap,
    rounds: int,
    progress: Callable[[float], None] | None = None,
    *,
    first: int = 0,
    times: bool = True,
    directions: int | None = None,
    moves: Callable[[Leap], list[Move]] | None = None,
) -> Leap:
    """Improve a solver by a few rounds; never worse on the training batch than it was.

    Args:
        fitter: of the calls that the solver was fitted to, while its evaluator is probing.
        leap: what to start from.
        rounds: at most; each leaves a part of the calls out of its equations, where there are several.
        progress: called with the relative squared error after each round.
        first: number of the first round, which says what part of the calls it leaves out.
        times: whether the times are moved, too; the first one stays.
        directions: most directions of each row but the last; None for all.
        moves: what may be moved, instead of these directions, the whole last row and the times.
    """
    free, idle = moves is None, 0
    for turn in range(first, first + rounds):
        start, damping = leap, DAMPING
        learn = learning(len(fitter.calls), turn)
        chosen = moves_of(fitter, start, times, directions) if moves is None else moves(start)
        jacobian = {i: Jacobian(fitter, start, i, chosen) for i in learn}
        for _ in range(STEPS):
            before = leap.error
            leap, damping = _step(fitter, leap, chosen, jacobian, damping, free)
            if leap.error > (1 - SMALLEST_GAIN) * before:
                break
        if progress is not None:
            progress(leap.relative_squared_error)
        idle = idle + 1 if leap is start else 0
        if idle == min(2, len(fitter.calls)):
            break
    return leap


def learning(calls: int, turn: int) -> list[int]:
    """Numbers of the calls that a round learns from: all but a part, or the only one."""
    parts = min(calls, PARTS)
    return [i for i in range(calls) if parts == 1 or i % parts != turn % parts]


def _step(
    fitter: Fitter,
    leap: Leap,
    moves: list[Move],
    jacobian: Mapping[int, Jacobian],
    damping: float,
    free: bool,
) -> tuple[Leap, float]:
    """The solver after one step, and the next damping; `free`: the last row is moved as a whole, too."""
    last = len(leap.rows[-1]) if free else 0
    equations = NormalEquations(len(moves) + last)
    for i, derivatives in jacobian.items():
        goal = fitter.references.states[fitter.calls[i]][-1]
        missing = goal - combine(leap.columns[i], leap.rows[-1])
        equations.add([*derivatives.columns, *leap.columns[i][:last]], missing, fitter.roots[fitter.calls[i]])
    for _ in range(TRIES):
        found = _tried(fitter, leap, moves, equations.damped(damping), free)
        if found.error < leap.error:
            return found, max(damping / 10, 1e-8)
        damping *= 10
    return leap, damping


def _tried(fitter: Fitter, leap: Leap, moves: list[Move], delta: Row, free: bool) -> Leap:
    timesteps, rows = leap.timesteps, leap.rows
    for move, by in zip(moves, delta, strict=False):
        timesteps, rows = move.applied(timesteps, rows, by)
    timesteps = kept_apart(leap.timesteps, timesteps)
    if free:
        rows = [*rows[:-1], [a + b for a, b in zip(rows[-1], delta[len(moves) :], strict=True)]]
    return fitter.exact(timesteps, rows)


def kept_apart(before: Times, after: Times) -> Times:
    """Times on the way from some to others, as far as `passable_share` says; the last one stops at 0."""
    after = (*after[:-1], max(after[-1], 0.0))
    return on_the_way(before, after, passable_share(before, after))


def on_the_way(before: Times, after: Times, share: float) -> Times:
    """Times that are a share of the way from some to others."""
    return tuple(a + share * (b - a) for a, b in zip(before, after, strict=True))


def passable_share(before: Times, after: Times) -> float:
    """The share of the way from some times to others on which no distance between two, or to the end, falls below half.

    A step that would let times cross is a step too far, and not one in a wrong direction.
    """
    gaps = [(a - b, c - d) for (a, b), (c, d) in zip(pairwise([*before, 0.0]), pairwise([*after, 0.0]), strict=True)]
    return min((0.5 * old / (old - new) for old, new in gaps if new < 0.5 * old), default=1.0)


def moves_of(fitter: Fitter, leap: Leap, times: bool, directions: int | None) -> list[Move]:
    """The directions of all rows but the last, each of which moves the state by the same length, and the times."""
    moves = []
    size = sum(float(fitter.references.states[call][0].double().square().sum()) for call in fitter.calls) ** 0.5
    for k, row in enumerate(leap.rows[:-1]):
        equations = NormalEquations(len(row))
        for columns in leap.columns:
            equations.add(columns[: len(row)], columns[0])
        if not equations.is_finite():  # an answer that is none has the coefficient zero, and stays there
            continue
        scale = equations.gram.diagonal().clamp_min(1e-300).sqrt()
        strengths, vectors = torch.linalg.eigh(equations.gram / scale[:, None] / scale)
        for i in range(1, min(directions or len(row), len(row)) + 1):
            along = vectors[:, -i] / scale * size / strengths[-i].clamp_min(1e-12).sqrt()
            moves.append(Move(k, (tuple(along.tolist()),)))
    return moves + [Move(k, None) for k in range(1, len(leap.timesteps)) if times]


class Jacobian:
    """Derivatives of the final state of one call with respect to the moves."""

    def __init__(self, fitter: Fitter, leap: Leap, index: int, moves: list[Move]) -> None:
        known = leap.columns[index]
        final = combine(known, leap.rows[-1])
        self.columns: list[Tensor] = []
        for move in moves:
            size = move.size(leap.timesteps, fitter.references.rounding)
            timesteps, rows = move.applied(leap.timesteps, leap.rows, size)
            shared = move.row + (move.along is not None)  # a row is used by the evaluation after it
            first = known[: 1 + fitter.width * shared]
            after = fitter.follow(fitter.calls[index], timesteps, rows, first)
            column = (combine(after, rows[-1]) - final) / size
            self.columns.append(column if bool(column.isfinite().all()) else torch.zeros_like(column))
