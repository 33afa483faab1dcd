"""The formulas that `LeapScheduler` advances by: the learned one, and one for runs that start in the middle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from hasten.solvers.multistep import Row

__all__ = ["Formula", "Learned", "SecondOrder", "carried", "level_at", "signal"]


def signal(level: float, kind: str) -> float:
    """The share of the clean sample where that of the noise is `level`."""
    return 1.0 - level if kind == "flow_prediction" else math.sqrt(max(0.0, 1.0 - level * level))


def carried(level: float, later: float, kind: str) -> float:
    """The share of a state that a step of the plain sampler hands on, the model's answer being held."""
    if kind == "flow_prediction":
        return 1.0
    before, after = signal(level, kind), signal(later, kind)
    return after / before if kind == "epsilon" else before * after + level * later


def level_at(timestep: float, times: Sequence[float], levels: Sequence[float], kind: str) -> float:
    """Noise level at a time: between those of a flow in proportion, else along the arc of signal and noise.

    Args:
        timestep: the time.
        times, levels: known ones, rising.
        kind: prediction type.
    """
    if kind == "flow_prediction":
        return float(np.interp(timestep, times, levels))
    return float(np.sin(np.interp(timestep, times, np.arcsin(levels))))


class Formula(Protocol):
    """Brings a state from one evaluation to the next; `columns` says whether it needs both passes (2)."""

    columns: int

    def advance(self, k: int, state: Tensor, output: Tensor, apart: Tensor | None) -> Tensor:
        """The state after evaluation `k`.

        Args:
            k: number of the evaluation.
            state: `[B, ...]` before it, float32.
            output: of the model there, with guidance.
            apart: difference of the passes.
        """
        ...


class Learned:
    """The learned rows, in steps: what others do to a state between two of them (inpainting, callbacks) is kept.

    Args:
        rows: row `k` over `x_0, g_0, (d_0,) ...`.
        levels: noise levels of the evaluations and of the end.
        kind: prediction type.
        columns: per evaluation: 2 with the differences of the passes.
    """

    def __init__(self, rows: Sequence[Row], levels: Sequence[float], kind: str, columns: int) -> None:
        self._rows, self._levels, self._kind, self.columns = rows, levels, kind, columns
        self._known: list[Tensor] = []

    def advance(self, k: int, state: Tensor, output: Tensor, apart: Tensor | None) -> Tensor:
        # Copies: fixed buffers of a loop and of captured graphs are written over by the next evaluation.
        self._known = self._known or [state.clone()]
        self._known.append(output.clone())
        if self.columns == 2:
            assert apart is not None
            self._known.append(apart)
        kept = carried(self._levels[k], self._levels[k + 1], self._kind)
        before = self._rows[k - 1] if k else [1.0]
        result = state if kept == 1.0 else kept * state
        for j, (column, now) in enumerate(zip(self._known, self._rows[k], strict=True)):
            change = now - kept * (before[j] if j < len(before) else 0.0)
            if change != 0.0:
                result = result + change * column
        return result


class SecondOrder:
    """DPM-Solver++ 2M (arXiv:2211.01095), which needs no memory of where a run began."""

    columns = 1

    def __init__(self, levels: Sequence[float], kind: str) -> None:
        self._levels, self._kind = levels, kind
        self._before: tuple[float, Tensor] | None = None

    def _clean(self, k: int, state: Tensor, output: Tensor) -> Tensor:
        level, share = self._levels[k], signal(self._levels[k], self._kind)
        if self._kind == "flow_prediction":
            return state - level * output
        return (state - level * output) / share if self._kind == "epsilon" else share * state - level * output

    def advance(self, k: int, state: Tensor, output: Tensor, apart: Tensor | None) -> Tensor:
        clean, level, later = self._clean(k, state, output), self._levels[k], self._levels[k + 1]
        here = _half_log_ratio(level, self._kind)
        before, self._before = self._before, (here, clean)
        if later == 0.0:
            return clean
        step = _half_log_ratio(later, self._kind) - here
        ahead = clean
        if before is not None:
            ahead = clean + 0.5 * step / (here - before[0]) * (clean - before[1])
        return later / level * state - signal(later, self._kind) * math.expm1(-step) * ahead


def _half_log_ratio(level: float, kind: str) -> float:
    """Half the logarithm of the signal-to-noise ratio."""
    return math.log(max(signal(level, kind), 1e-12) / level)
