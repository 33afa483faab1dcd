"""Schedulers as multistep formulas: each is run once on symbols, and its coefficients are read off.

A linear scheduler makes of the noise `x_0` and the model's outputs `y_j` states `x_{k+1} = r_k x_0 + sum_j a_kj y_j`.
So it is given unit vectors for them, and every state that it returns *is* a row. What is not linear (clipping), draws
noise, or evaluates twice in a step shows, since the rows do not reproduce its trajectories then.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hasten.errors import CalibrationError, ConfigError
from hasten.solvers.formula import carried, signal
from hasten.solvers.multistep import Row, combine
from hasten.solvers.plain import is_flow

__all__ = [
    "PlainSolver",
    "first_order",
    "kind_of",
    "prepared",
    "read_off",
    "relative_error",
    "scales_of",
    "why_not_linear",
]


@dataclass(frozen=True)
class PlainSolver:
    """A scheduler's times and formula.

    Attributes:
        timesteps: `[n]`.
        levels: `[n + 1]` noise levels, see `Table`; the last one is 0.
        rows: row `k` over `x_0, y_0 .. y_k`.
        noise_scale: of the noise that the run begins with, in the variables of the model's input.
    """

    timesteps: list[float]
    levels: list[float]
    rows: list[Row]
    noise_scale: float


def kind_of(scheduler: Any) -> str:
    """What the model predicts.

    Raises:
        ConfigError: for a prediction that LEAP does not know.
    """
    if is_flow(scheduler):
        return "flow_prediction"
    kind = scheduler.config.get("prediction_type")
    if kind not in ("flow_prediction", "epsilon", "v_prediction"):
        raise ConfigError(
            f"LEAP cannot follow {type(scheduler).__name__}: it knows flow, epsilon and v_prediction models, got "
            f"prediction_type {kind!r}; give the pipeline another scheduler, or a cache in place of LEAP"
        )
    return str(kind)


def prepared(scheduler: Any, arguments: Mapping[str, Any], begin: int | None = None) -> Any:
    """A copy of a scheduler at the start of a run.

    Args:
        scheduler: stays as it is.
        arguments: of `set_timesteps`; those that it does not take are left out.
        begin: where the run begins.
    """
    own = copy.deepcopy(scheduler)
    known = inspect.signature(own.set_timesteps).parameters
    own.set_timesteps(**{name: value for name, value in arguments.items() if name in known})
    if hasattr(own, "set_begin_index"):
        own.set_begin_index(begin or 0)
    return own


def scales_of(scheduler: Any, kind: str) -> tuple[list[float], list[float]]:
    """Noise levels of a prepared scheduler, and by what its states have to be multiplied to be the model's input.

    Returns:
        `[n + 1]` each.
    """
    count = len(scheduler.timesteps)
    if kind == "flow_prediction" and not hasattr(scheduler, "sigmas"):
        raise CalibrationError(f"{type(scheduler).__name__} has no noise levels, and LEAP cannot follow it; {_OTHERS}")
    if kind == "flow_prediction":
        return [min(1.0, float(s)) for s in scheduler.sigmas[:count]] + [0.0], [1.0] * (count + 1)
    if hasattr(scheduler, "sigmas"):
        ratios = [float(s) for s in scheduler.sigmas[:count]]
        shares = [(1 + s * s) ** -0.5 for s in ratios]
        levels = [s * share for s, share in zip(ratios, shares, strict=True)] + [0.0]
        scaled = abs(_noise_scale(scheduler) - 1) > 1e-6  # the states are not variance-preserving
        return levels, [*shares, 1.0] if scaled else [1.0] * (count + 1)
    kept = [float(scheduler.alphas_cumprod[round(float(t))]) for t in scheduler.timesteps]
    return [(1 - a) ** 0.5 for a in kept] + [0.0], [1.0] * (count + 1)


def _noise_scale(scheduler: Any) -> float:
    """Of the noise that a run begins with; schedulers of flows do not say."""
    return float(getattr(scheduler, "init_noise_sigma", 1.0))


def read_off(scheduler: Any, kind: str) -> PlainSolver:
    """Times and rows of a prepared scheduler.

    Raises:
        CalibrationError: if it cannot be run on symbols, or its times do not fall.
    """
    timesteps = [float(t) for t in scheduler.timesteps]
    if scheduler.order != 1 or not all(a > b for a, b in pairwise(timesteps)):
        raise CalibrationError(
            f"{type(scheduler).__name__} does not take one evaluation for each step, and LEAP cannot follow it; "
            f"{_OTHERS}"
        )
    levels, scales = scales_of(scheduler, kind)
    if timesteps[-1] < 0 or not all(a > b for a, b in pairwise(levels)):
        raise CalibrationError(
            f"{type(scheduler).__name__} does not count time and noise from 0 upwards as most models do, "
            f"and LEAP cannot follow it; {_OTHERS}"
        )
    symbols = torch.eye(len(timesteps) + 1, dtype=torch.float64)[:, None, None, :, None]
    state, rows = symbols[0] / scales[0], []
    try:
        for k, t in enumerate(scheduler.timesteps):
            state = scheduler.step(symbols[k + 1], t, state, return_dict=False)[0]
            rows.append((scales[k + 1] * state).double().flatten()[: k + 2].tolist())
    except Exception as error:
        raise CalibrationError(
            f"{type(scheduler).__name__} cannot be followed ({' '.join(str(error).split())[:120]}); {_OTHERS}"
        ) from error
    return PlainSolver(timesteps, levels, rows, _noise_scale(scheduler) * scales[0])


_OTHERS = "give the pipeline a linear, deterministic scheduler, such as FlowMatchEuler, DDIM, UniPC or DPM-Solver++"


def relative_error(rows: Sequence[Row], states: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """How far rows are from a trajectory: the largest relative error of a state.

    Args:
        rows: of all steps.
        states: `x_0 .. x_T`, each `[B, ...]`.
        outputs: of the model, `y_0 .. y_{T-1}`.
    """
    columns = [states[0].double(), *(output.double() for output in outputs)]
    worst = 0.0
    for row, state in zip(rows, states[1:], strict=True):
        worst = max(worst, float((combine(columns, row) - state).norm() / state.double().norm().clamp_min(1e-30)))
    return worst


def why_not_linear(scheduler: Any) -> str:
    """The likely reason why a scheduler's rows do not reproduce it, and what to do, as text."""
    config = scheduler.config
    flags = [
        name
        for name in ("clip_sample", "thresholding", "stochastic_sampling", "use_stochastic_sampling", "s_churn")
        if config.get(name)
    ]
    if flags:
        found = f" with {', '.join(f'{name}={config[name]!r}' for name in flags)}"
        return f"{found}; set {', '.join(f'{name}=False' for name in flags)} if the model allows it, or {_OTHERS}"
    return f" (it draws noise, clips, or keeps a state of its own); {_OTHERS}"


def first_order(kind: str, levels: Sequence[float]) -> list[Row]:
    """Rows of the first-order solver (Euler for a flow, DDIM else) at some noise levels, the last of which is 0."""
    rows: list[Row] = []
    for level, later in pairwise(levels):
        kept = carried(level, later, kind)
        before = rows[-1] if rows else [1.0]
        if kind == "flow_prediction":
            own = later - level
        elif kind == "epsilon":
            own = later - level * kept
        else:
            own = signal(level, kind) * later - level * signal(later, kind)
        rows.append([kept * number for number in before] + [own])
    return rows
