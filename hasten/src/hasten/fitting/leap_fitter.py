"""Fits solvers to reference trajectories, evaluation after evaluation, at the states that they reach themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from hasten.fitting.evaluator import Evaluator
from hasten.fitting.references import References
from hasten.fitting.symbolic import PlainSolver, first_order
from hasten.solvers.multistep import NormalEquations, Row, combine

__all__ = ["Fitter", "Leap"]


@dataclass(frozen=True)
class Leap:
    """A solver, and how near it comes to the references.

    Attributes:
        timesteps: where the model is evaluated, as the model counts time.
        rows: see `hasten.solvers.multistep`.
        errors: squared error of the final states of each call, relative to the size of those of all calls; infinite
            where the model gave no finite answer.
        columns: for each call `x_0, g_0, (d_0,) ...`.
        calls: numbers of the calls that it was fitted to.
    """

    timesteps: tuple[float, ...]
    rows: list[Row]
    errors: tuple[float, ...]
    columns: list[list[Tensor]] = field(default_factory=list, repr=False)
    calls: tuple[int, ...] = ()

    @property
    def error(self) -> float:
        """Squared error of the final states of all calls, relative to their size."""
        return sum(self.errors)


class Fitter:
    """Fits solvers to references.

    Args:
        evaluator: evaluates the model.
        references: the trajectories.
        ridge: how strongly coefficients are drawn to their prior, see `NormalEquations`.
        width: columns per evaluation: 1, or 2 with the differences of the passes.
    """

    def __init__(self, evaluator: Evaluator, references: References, ridge: float, width: int) -> None:
        self.evaluator, self.references, self.width = evaluator, references, width
        self._ridge = ridge
        self.calls = tuple(range(len(references.states)))

    def narrowed(self, width: int) -> Fitter:
        """A fitter of the same references with another number of columns."""
        return Fitter(self.evaluator, self.references, self._ridge, width)

    def restricted(self, calls: Sequence[int]) -> Fitter:
        """A fitter that looks at some of the calls alone."""
        made = self.narrowed(self.width)
        made.calls = tuple(calls)
        return made

    def elsewhere(self, timesteps: Sequence[float]) -> float:
        """Squared error of closed forms on calls that they were not fitted to: half of the calls, and the other half.

        A single call has to be both.
        """
        halves = [self.calls[::2], self.calls[1::2] or self.calls]
        found = [self.restricted(half).fit(timesteps).rows for half in halves]
        return sum(
            self.restricted(half).exact(timesteps, rows).error for half, rows in zip(halves[::-1], found, strict=True)
        )

    def follow(
        self, call: int, timesteps: Sequence[float], rows: Sequence[Row], known: Sequence[Tensor]
    ) -> list[Tensor]:
        """All columns of a call along a solver's own path; the first ones may be known already.

        Args:
            call: number of the call.
            timesteps: where to evaluate.
            rows: of the solver, all but the last one.
            known: `x_0` and columns of the first evaluations; may be empty.
        """
        columns = list(known) or [self.references.states[call][0]]
        for k in range((len(columns) - 1) // self.width, len(timesteps)):
            state = combine(columns, rows[k - 1]) if k else columns[0]
            output, apart = self.evaluator(call, state, timesteps[k])
            columns.append(output)
            if self.width == 2:
                assert apart is not None
                columns.append(apart)
        return columns

    # --- coefficients

    def prior(self, timesteps: Sequence[float], levels: Sequence[float]) -> list[Row]:
        """Rows of the first-order solver (Euler, DDIM) at some times, with zeros for the differences."""
        return [self.widened(row) for row in first_order(self.references.kind, levels)]

    def widened(self, row: Row) -> Row:
        """A row over outputs alone with zeros for the differences."""
        return [row[0], *(number for output in row[1:] for number in (output, *[0.0] * (self.width - 1)))]

    def fit(self, timesteps: Sequence[float], prior: Sequence[Row] | None = None) -> Leap:
        """The closed form for a list of times: each row brings the state as near to the references' as it can.

        Args:
            timesteps: falling; the first is where the references begin.
            prior: rows that the ridge draws to; those of the first-order solver by default.
        """
        times = tuple(timesteps)
        levels = [*(self.references.level_at(t) for t in times), 0.0]
        prior = self.prior(times, levels) if prior is None else prior
        columns: list[list[Tensor]] = [[] for _ in self.calls]
        rows: list[Row] = []
        for k in range(len(times)):
            for i, call in enumerate(self.calls):
                columns[i] = self.follow(call, times[: k + 1], rows, columns[i])
            rows.append(self._row(1 + self.width * (k + 1), levels[k + 1], columns, prior[k]))
        return self._leap(times, rows, columns)

    def score(self, timesteps: Sequence[float], rows: Sequence[Row], known: Leap | None = None, at: int = 0) -> Leap:
        """A solver with these times and rows, its last row fitted anew unless that is worse.

        Args:
            timesteps: of the evaluations.
            rows: of the solver.
            known: a solver that has its first `at` evaluations in common.
            at: their number.
        """
        times = tuple(timesteps)
        columns = []
        for i, call in enumerate(self.calls):
            first = known.columns[i][: 1 + self.width * at] if known is not None and at else []
            columns.append(self.follow(call, times, rows, first))
        given = self._leap(times, [list(row) for row in rows], columns)
        last = self._row(len(rows[-1]), 0.0, columns, rows[-1])
        fitted = self._leap(times, [*given.rows[:-1], last], columns)
        return fitted if fitted.error < given.error else given

    def plain(self, solver: PlainSolver) -> Leap:
        """A plain solver as it is."""
        return self.exact(solver.timesteps, [self.widened(row) for row in solver.rows])

    def exact(self, timesteps: Sequence[float], rows: Sequence[Row]) -> Leap:
        """A solver as it is."""
        times = tuple(timesteps)
        columns = [self.follow(call, times, rows, []) for call in self.calls]
        return self._leap(times, [list(row) for row in rows], columns)

    def _row(self, size: int, level: float, columns: Sequence[Sequence[Tensor]], prior: Row) -> Row:
        equations = NormalEquations(size)
        for i, call in enumerate(self.calls):
            equations.add(columns[i][:size], self.references.goal(call, level))
        if not bool(equations.gram.isfinite().all()):  # the model has no answer there; the solver's error says so
            return list(prior)
        return equations.solve(prior, self._ridge)

    def _leap(self, times: tuple[float, ...], rows: list[Row], columns: list[list[Tensor]]) -> Leap:
        errors, size = [], 0.0
        for i, call in enumerate(self.calls):
            goal = self.references.states[call][-1]
            errors.append(float((combine(columns[i], rows[-1]) - goal).double().square().sum()))
            size += float(goal.double().square().sum())
        relative = [error / size for error in errors]
        return Leap(
            times, rows, tuple(one if math.isfinite(one) else math.inf for one in relative), columns, self.calls
        )
