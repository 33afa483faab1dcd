"""Joint refinement of a LEAP solver on the error of the final image, by Gauss-Newton steps without gradients.

The closed form brings every state near to the reference's, but only the last one is seen. So all coefficients and all
times are moved together: with `x_T(theta)` the final states of the training batch,

    (J^T J + damping diag(J^T J)) delta = J^T (X_T - x_T(theta))

(Levenberg and Marquardt). The columns of `J` for the last row are the velocities themselves; the others come from
finite differences: one parameter is moved, and the evaluations that follow it are made again. That is about `n^3 / 6`
evaluations an image and round, from outside, so any pipeline will do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hasten.fitting.leap_fitter import Fitter, Leap, Rows
from hasten.solvers.multistep import NormalEquations, advance

__all__ = ["refine"]

TRIES = 4  # dampings in a round
SMALLEST_GAIN = 1e-3  # a round that lowers the error by a smaller share is the last


@dataclass(frozen=True)
class _Theta:
    """What is moved: all coefficients, and the times but the first."""

    rows: Rows
    timesteps: list[float]

    def moved(self, delta: list[float], times: bool) -> _Theta:
        numbers = iter(delta)
        rows = [[c + next(numbers) for c in row] for row in self.rows]
        first, *others = self.timesteps
        return _Theta(rows, [first, *(t + next(numbers) for t in others)] if times else self.timesteps)

    @property
    def ordered(self) -> bool:
        """Whether the times still fall towards 0."""
        return all(a > b for a, b in pairwise([*self.timesteps, 0.0]))


def refine(fitter: Fitter, leap: Leap, rounds: int, progress: Callable[[float], None] | None = None) -> Leap:
    """Improve a solver by a few rounds; never worse on the training batch than it was.

    Args:
        fitter: while it is probing.
        leap: what to start from.
        rounds: at most.
        progress: called with the relative squared error after each round.

    Returns:
        the solver, whose times lie between the steps of the plain sampler where the model is a flow; for
        variance-preserving models the times stay.
    """
    damping, times = 1e-2, fitter.references.prediction_type == "flow"
    for _ in range(rounds):
        before, equations = leap.error, _linearised(fitter, leap, times)
        for _ in range(TRIES):
            found = _tried(fitter, leap, equations.damped(damping), times)
            if found is not None and found.error < leap.error:
                leap, damping = found, max(damping / 10, 1e-7)
                break
            damping *= 10
        if progress is not None:
            progress(leap.error)
        if leap.error > (1 - SMALLEST_GAIN) * before:
            break
    return leap


def _tried(fitter: Fitter, leap: Leap, delta: list[float], times: bool) -> Leap | None:
    theta = _Theta(leap.coefficients, leap.timesteps).moved(delta, times)
    if not theta.ordered:
        return None
    return fitter.score(leap.steps, theta.timesteps, _sigmas(fitter, leap, theta.timesteps), theta.rows)


def _sigmas(fitter: Fitter, leap: Leap, timesteps: list[float]) -> list[float]:
    same = timesteps == leap.timesteps
    return leap.sigmas if same else [fitter.references.sigma_at(t) for t in timesteps]


def _linearised(fitter: Fitter, leap: Leap, times: bool) -> NormalEquations:
    """The normal equations of all parameters at a solver."""
    count = len(leap.timesteps)
    equations = NormalEquations(count * (count + 1) // 2 + (count - 1 if times else 0))
    for call, reference in enumerate(fitter.references.states):
        columns = _Columns(fitter, leap, call)
        moves = [columns.coefficient(k, j) for k in range(count) for j in range(k + 1)]
        if times:
            moves += [columns.time(k) for k in range(1, count)]
        equations.add(columns.final, moves, reference[-1])
    return equations


class _Columns:
    """Derivatives of the final state of one call."""

    def __init__(self, fitter: Fitter, leap: Leap, call: int) -> None:
        self._fitter, self._leap, self._call = fitter, leap, call
        self._velocities = leap.velocities[call]
        self._start = fitter.references.states[call][0]
        self.final = self._end(self._velocities)
        # The best step of a forward difference, as far as rounding lets it be small.
        self._step = torch.finfo(fitter.dtype).eps ** (1 / 3)

    def _end(self, velocities: list[Tensor]) -> Tensor:
        return advance(self._start, velocities, self._leap.coefficients[-1], ())

    def coefficient(self, k: int, j: int) -> Tensor:
        """With respect to `c_kj`; the last row moves the final state along the velocity itself."""
        leap, velocity = self._leap, self._velocities[j]
        if k == len(leap.timesteps) - 1:
            return velocity
        move = 0.25 * self._step * float(self._start.square().mean().sqrt() / velocity.square().mean().sqrt())
        rows = [list(row) for row in leap.coefficients]
        rows[k][j] += move
        after = self._fitter.follow(self._call, leap.timesteps, leap.sigmas, rows, self._velocities[: k + 1])
        return (self._end(after) - self.final) / move

    def time(self, k: int) -> Tensor:
        """With respect to the time of evaluation `k`."""
        leap = self._leap
        later = [*leap.timesteps, 0.0][k + 1]
        move = min(4 * self._step, 0.25) * min(leap.timesteps[k - 1] - leap.timesteps[k], leap.timesteps[k] - later)
        timesteps = [*leap.timesteps[:k], leap.timesteps[k] + move, *leap.timesteps[k + 1 :]]
        sigmas = _sigmas(self._fitter, leap, timesteps)
        after = self._fitter.follow(self._call, timesteps, sigmas, leap.coefficients, self._velocities[:k])
        return (self._end(after) - self.final) / move
