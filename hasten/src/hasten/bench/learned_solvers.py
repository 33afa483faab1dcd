"""Learned solvers of the literature, fitted by our means to the same references: what LEAP has to win against.

All of them are points of LEAP's family of rows with part of the numbers fixed, learned from the error of the final
image. Their papers take gradients through the model; here the same numbers are found by Gauss-Newton steps with finite
differences (`hasten.fitting.refine`), from the same calls, by the same errors (relative to each image's yardstick, see
`hasten.fitting.leap_fitter`) and at the same cost, so what differs is the family.

* `bns`: bespoke non-stationary solvers (Shaul et al., arXiv:2403.01329): `x_{k+1} = a_k x_0 + sum_{j<=k} b_kj u_j`, all
  numbers free, and the times; from Euler's.
* `s4s`: solving for the solver (Frankel et al., arXiv:2502.17423), its multistep form of order 3 with learned
  coefficients and the times (S4S-Alt, which takes them in turn): `x_{k+1} = x_k + sum_{j=k-2..k} b_kj u_j`.
* `dyweight` (Zhao et al., arXiv:2603.11607): weights of the latest four answers that need not sum to one and so scale
  the step as well, and a shift of each time; `x_{k+1} = x_k + h_k sum_{j=k-3..k} w_kj u_j`.
* `optimal-steps`: times alone (Pei et al., OptimalSteps, arXiv:2503.21774): the list for which the plain sampler's
  shortcuts along the reference trajectory lose least, by dynamic programming; no model is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hasten.errors import ConfigError, unknown
from hasten.fitting.leap_fitter import Fitter, Leap
from hasten.fitting.refine import Move, refine
from hasten.fitting.symbolic import first_order
from hasten.solvers.formula import carried
from hasten.solvers.multistep import combine

__all__ = ["SOLVERS", "fit_learned_solver", "optimal_steps"]

WINDOWS: Mapping[str, int | None] = {"bns": None, "s4s": 3, "dyweight": 4}
SOLVERS = (*WINDOWS, "optimal-steps")


def optimal_steps(fitter: Fitter, count: int) -> list[float]:
    """The times of OptimalSteps: least summed squared loss of first-order shortcuts along the references."""
    references = fitter.references
    total, levels = references.total, references.plain.levels
    losses: dict[tuple[int, int], float] = {}
    for i in range(total):
        for j in range(i + 1, total + 1):
            kept, own = first_order(references.kind, [levels[i], levels[j]])[0]
            lost = 0.0
            for call in fitter.calls:
                path = references.states[call]
                made = combine([path[i], references.outputs[call][i]], [kept, own])
                lost += float((made - path[j]).double().square().sum())
            losses[i, j] = lost
    best: dict[tuple[int, int], tuple[float, int]] = {(0, 0): (0.0, -1)}
    for n in range(1, count + 1):
        for j in range(1, total + 1):
            options = [(best[n - 1, i][0] + losses[i, j], i) for i in range(j) if (n - 1, i) in best]
            if options:
                best[n, j] = min(options)
    steps, j = [], total
    for n in range(count, 0, -1):
        j = best[n, j][1]
        steps.append(j)
    return [references.plain.timesteps[step] for step in reversed(steps)]


def _moves(fitter: Fitter, leap: Leap, window: int | None) -> list[Move]:
    """What a family may change: weights of the answers in the window of every step, and the times."""
    levels = [*(fitter.references.level_at(time) for time in leap.timesteps), 0.0]
    size = sum(float(fitter.references.states[call][0].double().square().sum()) for call in fitter.calls) ** 0.5
    moves = []
    for k in range(len(leap.rows)):
        first = 0 if window is None else max(0, k + 1 - window)
        for j in ([-1] if window is None else []) + list(range(first, k + 1)):
            column = sum(float(known[1 + j].double().square().sum()) for known in leap.columns) ** 0.5
            along, reach = [], 1.0
            for later in range(k, len(leap.rows)):
                reach = (
                    reach if later == k else reach * carried(levels[later], levels[later + 1], fitter.references.kind)
                )
                row = [0.0] * len(leap.rows[later])
                row[1 + j] = reach * size / column
                along.append(row)
                if window is None:
                    break  # rows are free of each other
            moves.append(Move(k, tuple(map(tuple, along))))
    return moves + [Move(k, None) for k in range(1, len(leap.timesteps))]


def fit_learned_solver(name: str, fitter: Fitter, count: int, rounds: int) -> Leap:
    """Fit a solver of the literature.

    Args:
        name: of `SOLVERS`.
        fitter: over the guided outputs alone, while its evaluator is probing.
        count: evaluations.
        rounds: of the refinement; the papers' hundreds of gradient steps would cost more than LEAP's whole fit.

    Raises:
        UnknownNameError: for another name.
        ConfigError: for a variance-preserving model, in whose variables single coefficients are too far apart in size.
    """
    if name not in SOLVERS:
        raise unknown("learned solver", name, SOLVERS)
    references = fitter.references
    if references.kind != "flow_prediction":
        raise ConfigError("learned solvers of the literature are compared on flow-matching models alone")
    times: Sequence[float]
    if name == "optimal-steps":
        times = optimal_steps(fitter, count)
    else:
        times = [references.at(references.total * k / count) for k in range(count)]
    levels = [*(references.level_at(time) for time in times), 0.0]
    start = fitter.exact(times, first_order(references.kind, levels))
    if name == "optimal-steps":
        return start
    window = WINDOWS[name]
    return refine(fitter, start, rounds, moves=lambda leap: _moves(fitter, leap, window))
