"""Trajectories of the plain sampler, in the variables in which it is linear: what LEAP is fitted to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.errors import CalibrationError, ConfigError
from hasten.pipeline.replay import Replay

__all__ = ["References", "record_references"]


@dataclass(frozen=True)
class References:
    """Trajectories of the plain sampler.

    Attributes:
        states: for each call `[T + 1, B, ...]`, from noise to image, in the variables in which the sampler is linear.
        timesteps: `[T]`.
        sigmas: `[T + 1]`, the last one 0.
        mu: the resolution-dependent shift that the pipeline used, if any.
        prediction_type: as in `LeapScheduler`.
        digest: of the prompts and the noise that they were drawn from.
    """

    states: list[Tensor]
    timesteps: list[float]
    sigmas: list[float]
    mu: float | None
    prediction_type: str
    digest: str

    @property
    def total(self) -> int:
        """Steps of the plain sampler."""
        return len(self.timesteps)

    @property
    def prompts(self) -> int:
        """How many images there are."""
        return sum(path.shape[1] for path in self.states)

    def sigma_at(self, timestep: float) -> float:
        """Noise level between the steps of a flow-matching sampler, where it is proportional to the timestep."""
        return float(np.interp(timestep, [0.0, *self.timesteps[::-1]], self.sigmas[::-1]))


def _prediction_type(scheduler: Any) -> str:
    kind = scheduler.config.get("prediction_type")
    if kind in (None, "flow_prediction"):
        return "flow"
    if kind not in ("epsilon", "v_prediction"):
        raise ConfigError(f"LEAP knows flow, epsilon and v_prediction models, got prediction_type {kind!r}")
    return str(kind)


def _digest(calls: Replay, states: Sequence[Tensor]) -> str:
    prompts = json.dumps([call.get("prompt") for call in calls], default=str)
    noise = b"".join(path[0].numpy().tobytes() for path in states)
    return hashlib.sha256(prompts.encode() + noise).hexdigest()[:16]


def record_references(
    pipe: Any, calls: Replay, progress: Callable[[int, int], None] = lambda done, total: None
) -> References:
    """Draw the plain trajectories, watching the scheduler of this pipeline.

    Args:
        pipe: the pipeline.
        calls: of which each draws some images.
        progress: called with (calls that are done, all calls).

    Raises:
        CalibrationError: if the calls do not make one scheduler step for each timestep, or a state is not finite.
        ConfigError: for a prediction type that LEAP does not know.
    """
    scheduler, plain_step, plain_set = pipe.scheduler, pipe.scheduler.step, pipe.scheduler.set_timesteps
    kind, mu = _prediction_type(scheduler), None
    states: list[Tensor] = []
    path: list[Tensor] = []

    @wraps(plain_step)  # pipelines read the signature
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = plain_step(model_output, timestep, sample, *args, **kwargs)
        if not path:
            path.append(sample.float().cpu())
        path.append((result[0] if isinstance(result, tuple) else result.prev_sample).float().cpu())
        return result

    @wraps(plain_set)
    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        nonlocal mu
        mu = None if kwargs.get("mu") is None else float(kwargs["mu"])
        return plain_set(*args, **kwargs)

    scheduler.step, scheduler.set_timesteps = step, set_timesteps
    try:
        for call in calls:
            path.clear()
            pipe(**call)
            if not path:
                raise CalibrationError(f"call {len(states)} made no step of the pipeline's scheduler; LEAP needs them")
            states.append(torch.stack(path))
            bad = [k for k, state in enumerate(path) if not bool(state.isfinite().all())]
            if bad:
                raise CalibrationError(
                    f"call {len(states) - 1}: the state after {bad[0]} steps is not finite; leave out "
                    "that call, or run the model in a wider precision"
                )
            progress(len(states), len(calls))
    finally:
        del scheduler.step, scheduler.set_timesteps
    digest = _digest(calls, states)
    timesteps = [float(t) for t in scheduler.timesteps]
    if kind == "flow":
        sigmas = [float(s) for s in scheduler.sigmas]
    else:
        kept = [float(scheduler.alphas_cumprod[round(t)]) for t in timesteps]
        sigmas = [((1 - a) / a) ** 0.5 for a in kept] + [0.0]
        scale = torch.tensor([(1 + s * s) ** 0.5 for s in sigmas])
        states = [path_ * scale.view(-1, *[1] * (path_.ndim - 1)) for path_ in states]
    if len(sigmas) != len(timesteps) + 1 or any(len(s) != len(sigmas) for s in states):
        raise CalibrationError(
            "the calls did not make one scheduler step for each timestep; give alike text-to-image calls"
        )
    return References(states, timesteps, sigmas, mu, kind, digest)
