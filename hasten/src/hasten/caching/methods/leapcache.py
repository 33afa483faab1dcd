"""LEAP at a cache's site: learned weights on the computed steps, fitted on the states that the fast sampler visits.
Ours.

    F^_t = sum_k w_tk F_k        k over the computed steps before t

Every step of the sampler runs, the skipped ones as the final layer on a forecast hidden state, with the modulation of
their own step. Where L2P fits its weights to features of the uncached sampler, here `F_k` are those that the
accelerated sampler itself computes, and the goal is the uncached sampler's feature:

    w_t = argmin || sum_k w_k F_k - F*_t ||^2 + ridge mean(diag G) || w - e ||^2,      G = F F^T

with `e` the newest computed step. `hasten.fit_leapcache` makes the calibration, for lists of computed steps that were
searched before; `hasten calibrate` makes a first one of recorded features alone, in which `F_k` are the uncached
sampler's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hasten.caching.calibrated import CalibratedMethod
from hasten.caching.components import Components, FeatureKey
from hasten.caching.projectors import Whole
from hasten.caching.schedule import Explicit, Schedule, spread
from hasten.calibration import Calibration, Fit, Trace, declare_contents
from hasten.io import Array, step_list
from hasten.parameters import Range
from hasten.registry import method

__all__ = ["LeapCache", "LearnedWeights", "learned_table"]

COUNTS = (12, 9, 7, 5)  # of computed steps that a fit to a trace is made for
WINDOW = 4
RIDGE = 1e-6


class LearnedWeights:
    """Weights from a table.

    Args:
        steps: the computed steps, increasing.
        table: `[T, n]`, the weights of step `t` on the `n` computed steps.
    """

    def __init__(self, steps: Sequence[int], table: npt.NDArray[np.float64]) -> None:
        self._column = {step: k for k, step in enumerate(steps)}
        self._table = table

    @property
    def memory(self) -> int:
        """The largest number of newest computed steps that a row reaches back."""
        past = [sum(step < t for step in self._column) for t in range(len(self._table))]
        oldest = [int(np.flatnonzero(row)[0]) if row.any() else 0 for row in self._table]
        return max(1, *(p - o for p, o in zip(past, oldest, strict=True)))

    def weights(self, target: int, stored: Sequence[int]) -> list[float]:
        if target >= len(self._table):  # beyond the calibrated steps there is nothing but reuse
            return [1.0] + [0.0] * (len(stored) - 1)
        return [float(self._table[target, self._column[step]]) for step in stored]


def learned_table(
    known: Tensor, goal: Tensor, steps: Sequence[int], window: int = WINDOW, ridge: float = RIDGE
) -> Tensor:
    """Weights of all steps by least squares, `[T, n]` in float64; zeros where nothing is to be forecast.

    Args:
        known: features of the computed steps, `[S, n, ...]`.
        goal: features to be forecast, `[S, T, ...]`.
        steps: the `n` computed steps.
        window: how many newest computed steps a forecast uses.
        ridge: how far weights shrink to reuse.
    """
    own, aim = known.flatten(2).float(), goal.flatten(2).float()
    gram = torch.stack([run @ run.T for run in own]).sum(0, dtype=torch.float64).numpy()
    cross = (
        torch.stack([run @ other.T for run, other in zip(own, aim, strict=True)]).sum(0, dtype=torch.float64).numpy()
    )
    table = np.zeros((aim.shape[1], len(steps)))
    for t in range(len(table)):
        past = [k for k, step in enumerate(steps) if step < t][-window:]
        if t in steps:
            continue
        inner = gram[np.ix_(past, past)]
        weight = ridge * max(float(np.trace(inner)) / len(past), 1e-300)
        right = cross[past, t] + weight * np.eye(len(past))[-1]
        table[t, past] = np.linalg.lstsq(inner + weight * np.eye(len(past)), right, rcond=None)[0]
    return torch.from_numpy(table)


def _check_tables(calibration: Calibration) -> None:
    total, passes = calibration.fingerprint.steps, calibration.fingerprint.passes
    for name, steps in calibration.tensors.items():
        if not name.endswith("/steps"):
            continue
        if int(steps[-1]) >= total:
            raise ValueError(f"{name!r} goes beyond the {total} steps of the run")
        later = steps[None] >= torch.arange(total)[:, None]  # [T, n]
        count = len(steps)
        expected = {f"{count}/{pass_}" for pass_ in passes}
        if {other for other in calibration.tensors if other.startswith(f"{count}/")} - {name} != expected:
            raise ValueError(f"the weights for {count} computed steps are not those of the passes {', '.join(passes)}")
        if any(bool((calibration.tensors[table][later] != 0).any()) for table in expected):
            raise ValueError(f"with {count} computed steps a forecast uses later steps")


declare_contents(
    "leapcache",
    {"{n}/steps": Array("integer", ("n",), (step_list,)), "{n}/{pass_}": Array("float", ("T", "n"))},
    _check_tables,
)


@method("leapcache", kind="caching", paper="ours", needs_calibration=True)
@dataclass(frozen=True, kw_only=True)
class LeapCache(CalibratedMethod):
    """Forecast by weights and at steps that were learned on the accelerated sampler's own path (LEAP).

    The steps come with the calibration: the list of `computed_steps`, or the longest one that is no longer than the
    uniform schedule of `interval` and `warmup`.
    """

    name: ClassVar[str] = "leapcache"
    bound_to_run: ClassVar[bool] = True

    site: Literal["hidden"] = "hidden"
    schedule: Annotated[Literal["uniform"], "only this: the steps were learned together with the weights"] = "uniform"
    steps: Annotated[None, "only this: the steps were learned together with the weights"] = None
    searched: Annotated[None, "only this: the steps were learned together with the weights"] = None

    def plan(self) -> Schedule:
        return Explicit(self._list()) if self.interval != 1 else super().plan()

    def _list(self) -> tuple[int, ...]:
        lists = [steps.tolist() for name, steps in self.fitted.tensors.items() if name.endswith("/steps")]
        return self.learned_list(lists, self.fitted)

    def components(self, key: FeatureKey) -> Components:
        steps, known = self._list(), self.fitted.fingerprint.passes
        # A pass that was not calibrated is refused by check_passes, or forecast like the first one with strict=False.
        name = key.pass_name if key.pass_name in known else known[0]
        table = np.asarray(self.fitted.tensors[f"{len(steps)}/{name}"], dtype=np.float64)
        return Components(Whole(), {"whole": LearnedWeights(steps, table)})

    @staticmethod
    def fit(
        trace: Trace,
        steps: Annotated[tuple[int, ...] | None, Range(0), "computed steps to fit for; None is even spreads"] = None,
        window: Annotated[int, Range(1), "newest computed steps that a forecast uses"] = WINDOW,
        ridge: Annotated[float, Range(0), "how far weights shrink to reuse"] = RIDGE,
    ) -> Fit:
        """Weights from features of the uncached sampler, on a list of computed steps or on even spreads."""
        total = trace.fingerprint.steps
        lists = [steps] if steps is not None else [spread(count, total) for count in COUNTS if count < total]
        tensors: dict[str, Tensor] = {}
        for chosen in lists:
            tensors[f"{len(chosen)}/steps"] = torch.tensor(chosen)
            for name, features in trace.features.items():
                goal = features["hidden"]
                table = learned_table(goal[:, list(chosen)], goal, chosen, window, ridge)
                tensors[f"{len(chosen)}/{name}"] = table
        return Fit(tensors, {"lists": len(lists), "window": window})
