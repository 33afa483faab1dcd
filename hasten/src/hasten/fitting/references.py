"""Trajectories of the plain sampler: what LEAP is fitted to, checked against the scheduler's own formula."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.errors import CalibrationError
from hasten.fitting.symbolic import PlainSolver, kind_of, prepared, read_off, relative_error, scales_of, why_not_linear
from hasten.pipeline.replay import Replay
from hasten.solvers.formula import level_at
from hasten.solvers.passes import difference, mixture_of, watch_passes

__all__ = ["References", "record_references", "squares"]

EXACT = 1e-4  # largest relative error of a state where everything is float32
ROUNDINGS = 40  # of half precision, in which some schedulers keep the state


@dataclass(frozen=True)
class References:
    """Trajectories of the plain sampler.

    Attributes:
        states: for each call `[T + 1, B, ...]` on the CPU in float32, from noise to image, as the model gets them.
        outputs: for each call `[T, B, ...]`, the model's answers with guidance.
        differences: likewise of the two passes of a step; empty where there were not two.
        plain: times, noise levels and rows of the scheduler.
        kind: prediction type.
        error: of the scheduler's rows, the largest relative error of a state.
        mu: the resolution-dependent shift that the pipeline used, if any.
        mixture: weight of the first pass in the mixture; None where it is no plain mixture of two.
        forwards: calls of the denoiser in a step.
        arguments: of the scheduler's `set_timesteps`.
        digest: of the prompts, the noise and what was made of it: of all that the calls are made of.
        rounding: relative, of the least exact number in the model's answers.
    """

    states: list[Tensor]
    outputs: list[Tensor]
    differences: list[Tensor]
    plain: PlainSolver
    kind: str
    error: float
    mu: float | None
    mixture: float | None
    forwards: int
    arguments: dict[str, Any]
    digest: str
    rounding: float

    @property
    def total(self) -> int:
        """Steps of the plain sampler."""
        return len(self.plain.timesteps)

    @property
    def prompts(self) -> int:
        """How many images there are."""
        return sum(path.shape[1] for path in self.states)

    @cached_property
    def sizes(self) -> list[Tensor]:
        """Squares of the final images of each call, summed, `[B]`."""
        return [squares(path[-1]) for path in self.states]

    @property
    def noise(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Times of the plain sampler and noise levels there, rising from 0; other solvers may begin earlier."""
        times, levels = self.plain.timesteps[::-1], self.plain.levels[::-1]
        beyond = max(1.1 * times[-1], times[-1] + 1)
        if times[0] == 0:  # a last step at time 0 with noise left
            levels = levels[1:]
        else:
            times = [0.0, *times]
        return (*times, beyond), (*levels, 1.0)

    def level_at(self, timestep: float) -> float:
        """Noise level at a time."""
        return level_at(timestep, *self.noise, self.kind)

    def at(self, position: float) -> float:
        """The timestep at a position counted in steps of the plain sampler, `0 <= position < T`."""
        return float(np.interp(position, np.arange(self.total + 1), [*self.plain.timesteps, 0.0]))

    def goal(self, call: int, level: float) -> Tensor:
        """The state of a call at a noise level, `[B, ...]`: on the plain sampler's own path between its steps."""
        levels, path = self.plain.levels, self.states[call]
        later = next((i for i, own in enumerate(levels) if own <= level), len(levels) - 1)
        if later == 0 or levels[later] == level:
            return path[later]
        before, after = levels[later - 1], levels[later]
        if self.kind == "flow_prediction":
            share = (before - level) / (before - after)
            return torch.lerp(path[later - 1], path[later], share)
        # The model's answer being held, states run along an arc: x = A cos + B sin, with level = sin.
        angles = [math.asin(min(1.0, s)) for s in (before, level, after)]
        width = math.sin(angles[0] - angles[2])
        return path[later - 1] * (math.sin(angles[1] - angles[2]) / width) + path[later] * (
            math.sin(angles[0] - angles[1]) / width
        )


def squares(states: Tensor) -> Tensor:
    """The sum of the squares of each image, `[B]`, on the CPU in float64."""
    return states.double().flatten(1).square().sum(1).cpu()


def _digest(calls: Replay, states: Sequence[Tensor]) -> str:
    prompts = json.dumps([call.get("prompt") for call in calls], default=str)
    # The image differs with whatever a call is made of: embeddings in the place of prompts, images, what it denies.
    ends = b"".join(path[k].numpy().tobytes() for path in states for k in (0, -1))
    return hashlib.sha256(prompts.encode() + ends).hexdigest()[:16]


def _kept(tensor: Tensor) -> Tensor:
    """A copy, since pipelines write latents in place."""
    return tensor.detach().to("cpu", torch.float32, copy=True)


class _Recorder:
    """Watches a pipeline's scheduler and denoisers for the length of a `with`."""

    def __init__(self, pipe: Any) -> None:
        self._pipe, self.scheduler = pipe, pipe.scheduler
        self.arguments: dict[str, Any] = {}
        self.forwards: list[int] = []
        self.mixtures: list[float] = []
        self.dtype = torch.float32
        self.rounding = torch.finfo(torch.float32).eps  # of the answers, which pipelines may widen for the scheduler
        self.start()

    def start(self) -> None:
        """A call of the pipeline begins."""
        self.states: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.differences: list[Tensor | None] = []
        self._answers: list[Tensor] = []

    def __enter__(self) -> _Recorder:
        plain_step, plain_set = self.scheduler.step, self.scheduler.set_timesteps

        @wraps(plain_step)  # pipelines read the signature
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._before(model_output, sample)
            result = plain_step(model_output, timestep, sample, *args, **kwargs)
            self.states.append(_kept(result[0] if isinstance(result, tuple) else result.prev_sample))
            return result

        @wraps(plain_set)
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            self.arguments = dict(zip(("num_inference_steps", "device"), args, strict=False)) | kwargs
            return plain_set(*args, **kwargs)

        self.scheduler.step, self.scheduler.set_timesteps = step, set_timesteps
        _, self._unhook = watch_passes(self._pipe, self._answers_append)
        return self

    def __exit__(self, *_: object) -> None:
        self._unhook()
        del self.scheduler.step, self.scheduler.set_timesteps

    def _answers_append(self, answer: Tensor) -> None:
        self._answers.append(answer)

    def _before(self, output: Tensor, sample: Tensor) -> None:
        answers, self._answers = self._answers, []
        apart = difference(answers, output)
        if apart is not None:
            self.mixtures.append(mixture_of(answers, output, apart))
        self.forwards.append(len(answers))
        self.dtype = output.dtype
        self.rounding = max(torch.finfo(one.dtype).eps for one in (*answers, output))
        if not self.states:
            self.states.append(_kept(sample))
        self.outputs.append(_kept(output))
        self.differences.append(None if apart is None else _kept(apart))

    @property
    def mixture(self) -> float | None:
        """The weight of the first pass, if it is the same in all steps."""
        if not self.mixtures:
            return None
        middle = float(np.median(self.mixtures))
        return middle if np.ptp(self.mixtures) <= 0.02 * max(1.0, abs(middle)) else None


def record_references(
    pipe: Any, calls: Replay, progress: Callable[[int, int], None] = lambda done, total: None
) -> References:
    """Draw the plain trajectories, watching scheduler and denoisers of this pipeline, and check that its scheduler is
    a formula that reproduces them.

    Raises:
        CalibrationError: if the calls do not make one scheduler step for each timestep, they ask for different ones, a
            state is not finite, or the scheduler is none that LEAP can follow (it draws noise, clips, or evaluates
            twice in a step).
        ConfigError: for a prediction type that LEAP does not know.
    """
    kind = kind_of(pipe.scheduler)
    states, outputs, differences = [], [], []
    error, plain = 0.0, None
    first: dict[str, Any] = {}
    with _Recorder(pipe) as recorder:
        for number, call in enumerate(calls):
            recorder.start()
            pipe(**call)
            if not recorder.states:
                raise CalibrationError(f"call {number} made no step of the pipeline's scheduler; LEAP needs them")
            bad = [k for k, state in enumerate(recorder.states) if not bool(state.isfinite().all())]
            if bad:
                raise CalibrationError(
                    f"call {number}: the state after {bad[0]} steps is not finite; leave out "
                    "that call, or run the model in a wider precision"
                )
            first = first or recorder.arguments
            _check_alike(number, recorder.arguments, first)
            plain = plain or _formula(recorder, kind)
            path = _as_inputs(recorder, kind)
            if len(path) != len(plain.timesteps) + 1:
                raise CalibrationError(
                    f"call {number} made {len(path) - 1} steps of the {len(plain.timesteps)} of "
                    f"{type(pipe.scheduler).__name__}: it starts later (image to image), or makes several runs; give "
                    "calls that go through the schedule once from its start"
                )
            error = max(error, relative_error(plain.rows, path, recorder.outputs))
            states.append(torch.stack(path))
            outputs.append(torch.stack(recorder.outputs))
            if all(one is not None for one in recorder.differences):
                differences.append(torch.stack([one for one in recorder.differences if one is not None]))
            progress(number + 1, len(calls))
    rounding = torch.finfo(recorder.dtype).eps
    if not error <= max(EXACT, ROUNDINGS * rounding if rounding > 1e-6 else 0.0):
        raise CalibrationError(
            f"LEAP cannot follow {type(pipe.scheduler).__name__}: its formula misses its own trajectories by "
            f"{100 * error:.2g} %{why_not_linear(pipe.scheduler)}"
        )
    assert plain is not None
    mu = recorder.arguments.get("mu")
    return References(
        states,
        outputs,
        differences if len(differences) == len(states) else [],
        plain,
        kind,
        error,
        None if mu is None else float(mu),
        recorder.mixture,
        max(recorder.forwards),
        recorder.arguments,
        _digest(calls, states),
        recorder.rounding,
    )


def _check_alike(number: int, own: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    """Compare what a call asked of the scheduler with what the first one did.

    Raises:
        CalibrationError: if it is something else.
    """
    steps, asked = (
        next((len(given[name]) for name in ("sigmas", "timesteps") if given.get(name) is not None), None)
        or given.get("num_inference_steps")
        for given in (first, own)
    )
    if steps != asked:
        differs = f"has another number of steps ({asked}) than call 0 ({steps})"
    elif not _same(own.get("mu"), first.get("mu")):
        differs = f"is of another size than call 0 (its shift mu is {own.get('mu')}, there {first.get('mu')})"
    elif not all(_same(own.get(name), first.get(name)) for name in ("sigmas", "timesteps")):
        differs = "has other sigmas or timesteps than call 0"
    else:
        return
    raise CalibrationError(f"call {number} {differs}, and one fit serves one schedule: fit that call by itself")


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments of `set_timesteps` are the same number or list."""
    if one is None or other is None:
        return one is other
    return np.shape(one) == np.shape(other) and bool(np.allclose(one, other))


def _formula(recorder: _Recorder, kind: str) -> PlainSolver:
    """The formula of the scheduler as the pipeline prepared it."""
    own = recorder.scheduler
    step, set_timesteps = own.__dict__.pop("step"), own.__dict__.pop("set_timesteps")  # a copy takes its own steps
    try:
        return read_off(prepared(own, recorder.arguments), kind)
    finally:
        own.step, own.set_timesteps = step, set_timesteps


def _as_inputs(recorder: _Recorder, kind: str) -> list[Tensor]:
    """The states of a call as the model gets them."""
    _, scales = scales_of(recorder.scheduler, kind)
    if len(scales) != len(recorder.states):
        return recorder.states
    return [scale * state for scale, state in zip(scales, recorder.states, strict=True)]
