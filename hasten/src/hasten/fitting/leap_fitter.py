"""Fits solvers to reference trajectories, evaluation after evaluation, at the states that they reach themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hasten.fitting.evaluator import Evaluator
from hasten.fitting.references import References, squares
from hasten.fitting.symbolic import PlainSolver, first_order
from hasten.solvers.multistep import NormalEquations, Row, combine

__all__ = ["Fitter", "Leap", "yardsticks"]

ERROR = "relative_to_first_order"  # in a report: what is made small
YARDSTICK = 8  # evaluations of the first-order solver that errors of an image are relative to
FLOOR = 1e-2  # of the median yardstick: none is less, so that an image which costs nothing does not count for all
NEGLIGIBLE = 1e-6  # of an image's own size: nor is it less than this
TINY = 1e-100  # for images of zeros


@dataclass(frozen=True)
class Leap:
    """A solver, and how near it comes to the references.

    Attributes:
        timesteps: where the model is evaluated, as the model counts time.
        rows: see `hasten.solvers.multistep`.
        errors: squared error of the final states of each call, each image's relative to its yardstick, over the number
            of images of all calls; infinite where the model gave no finite answer.
        relative_squared_error: of all final states, relative to their size.
        columns: for each call `x_0, g_0, (d_0,) ...`.
        calls: numbers of the calls that it was fitted to.
    """

    timesteps: tuple[float, ...]
    rows: list[Row]
    errors: tuple[float, ...]
    relative_squared_error: float
    columns: list[list[Tensor]] = field(default_factory=list, repr=False)
    calls: tuple[int, ...] = ()

    @property
    def error(self) -> float:
        """Squared error of the final states, each image's relative to its yardstick: the mean over all images."""
        return sum(self.errors)

    @property
    def figures(self) -> dict[str, float]:
        """Both errors of all calls, as a report has them."""
        return {"relative_squared_error": self.relative_squared_error, ERROR: self.error}


class Fitter:
    """Fits solvers to references.

    Some images are harder than others: a few hold most of a sum of squared errors, and dozens of numbers can be fitted
    to those few. So errors of an image are relative to its *yardstick*, the squared error of the first-order solver
    with eight evaluations, and every image counts the same.

    Args:
        evaluator: evaluates the model; not while it is probing, where yardsticks are to be measured.
        references: the trajectories.
        ridge: how strongly coefficients are drawn to their prior, see `NormalEquations`.
        width: columns per evaluation: 1, or 2 with the differences of the passes.
        roots: of the weights of the images, see below; by default the yardsticks are measured.

    Attributes:
        roots: square roots of the weights of the images of each call, `[B]`: of the inverse of their yardsticks.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        references: References,
        ridge: float,
        width: int,
        roots: Sequence[Tensor] | None = None,
    ) -> None:
        self.evaluator, self.references, self.width = evaluator, references, width
        self._ridge = ridge
        self.calls = tuple(range(len(references.states)))
        self.roots = [yardstick.rsqrt() for yardstick in self._yardsticks()] if roots is None else roots

    def _yardsticks(self) -> list[Tensor]:
        """What errors of images are divided by: from runs of the first-order solver on steps of the plain sampler."""
        total = self.references.total
        count = min(YARDSTICK, max(1, total // 2))
        times = [self.references.plain.timesteps[round(total * k / count)] for k in range(count)]
        rows = self.prior(times, [*(self.references.level_at(time) for time in times), 0.0])
        with self.evaluator.probing():
            left = [self._left(call, self.follow(call, times, rows, []), rows[-1]) for call in self.calls]
        return yardsticks(left, self.references.sizes)

    def _left(self, call: int, columns: Sequence[Tensor], row: Row) -> Tensor:
        """The squared error of the final state of each image of a call, `[B]`, on the CPU."""
        return squares(combine(columns, row) - self.references.states[call][-1])

    def narrowed(self, width: int) -> Fitter:
        """A fitter of the same references with another number of columns."""
        return Fitter(self.evaluator, self.references, self._ridge, width, self.roots)

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
            equations.add(columns[i][:size], self.references.goal(call, level), self.roots[call])
        if not equations.is_finite():  # the model has no answer there; the solver's error says so
            return list(prior)
        return equations.solve(prior, self._ridge)

    def _leap(self, times: tuple[float, ...], rows: list[Row], columns: list[list[Tensor]]) -> Leap:
        left = [self._left(call, own, rows[-1]) for call, own in zip(self.calls, columns, strict=True)]
        images = sum(map(len, left))
        size = sum(float(self.references.sizes[call].sum()) for call in self.calls)
        relative = [
            float((own * self.roots[call].square()).sum()) / images for call, own in zip(self.calls, left, strict=True)
        ]
        errors = tuple(one if math.isfinite(one) else math.inf for one in relative)
        return Leap(times, rows, errors, float(torch.cat(left).sum()) / size, columns, self.calls)


def yardsticks(left: Sequence[Tensor], sizes: Sequence[Tensor]) -> list[Tensor]:
    """What errors of images are divided by.

    Args:
        left: squared errors of the images of each call, `[B]`; may be without end.
        sizes: sums of squares of the images themselves, which no yardstick exceeds.
    """
    capped = [torch.minimum(own.nan_to_num(nan=math.inf), size) for own, size in zip(left, sizes, strict=True)]
    middle = FLOOR * torch.cat(capped).median()
    return [
        torch.maximum(own, NEGLIGIBLE * size).clamp_min(middle.clamp_min(TINY))
        for own, size in zip(capped, sizes, strict=True)
    ]
