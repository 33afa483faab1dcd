"""LEAP: least-squares extrapolation along the path. Our own method; related in spirit to learned non-stationary
solvers (Shaul et al., BNS, 2024).

With the plain sampler `x_{i+1} = x_i + (sigma_{i+1} - sigma_i) v_i`, a sampler with few evaluations at the steps
`s_0 = 0 < s_1 < ... < s_{n-1}` is any choice of coefficients in

    x(s_{k+1}) = X_0 + sum_{j<=k} c_kj v_j,      v_k = model(x(s_k), sigma_{s_k})

Reference trajectories of the plain sampler are drawn once. Then, evaluation after evaluation, the model is asked at
the state that the fast sampler itself has reached, and `c_k` brings it as near to the reference's state at `s_{k+1}` as
the known velocities allow: a small linear system for the whole training batch. No gradient passes through the model,
and training sees what it will meet in use. The steps themselves are searched by local moves, each judged by the final
error; what comes before the first changed step need not be evaluated again.

The pipeline evaluates the model, with its own guidance: each evaluation is a call of it with one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from hasten.acceleration import accelerate
from hasten.caching.calibration import Calibration
from hasten.caching.schedule import spread
from hasten.errors import CalibrationError, ConfigError
from hasten.recording import fingerprint_of
from hasten.search import Search, figures, search_steps
from hasten.solvers.fit import NormalEquations, advance
from hasten.solvers.scheduler import LEAP

__all__ = ["Leap", "References", "fit_leap"]

Steps = tuple[int, ...]
Progress = Callable[[int, int, int, float], None]
START = 1.15  # power of the spread that a search starts from: a little denser early


@dataclass(frozen=True)
class References:
    """Trajectories of the plain sampler.

    Attributes:
        states: for each call `[T + 1, B, ...]`, from noise to picture, in the variables in which the sampler is linear.
        timesteps: `[T]`.
        sigmas: `[T + 1]`, the last one 0.
        mu: the resolution-dependent shift that the pipeline used, if any.
        prediction_type: as in `LeapScheduler`.
    """

    states: list[Tensor]
    timesteps: list[float]
    sigmas: list[float]
    mu: float | None
    prediction_type: str


@dataclass
class Leap:
    """A solver for one list of steps, and how near it comes.

    Attributes:
        steps: where the model is evaluated.
        coefficients: row `k` has `k + 1` numbers.
        error: mean squared error of the final states, relative to their mean square.
    """

    steps: Steps
    coefficients: list[list[float]]
    error: float
    velocities: list[list[Tensor]] = field(default_factory=list, repr=False)


class _Probe(SchedulerMixin, ConfigMixin):
    """Stands in for a scheduler, for one evaluation at one time; keeps what the pipeline hands to `step`."""

    config_name = "scheduler_config.json"
    order = 1
    init_noise_sigma = 1.0

    def __init__(self, config: Any) -> None:
        self._internal_dict = config
        self.timesteps = torch.zeros(1)
        self.sigmas = torch.zeros(2)
        self.seen: Tensor | None = None
        self.begin_index: int | None = None

    def at(self, timestep: float) -> None:
        """The next call of the pipeline evaluates the model at this time."""
        self._timestep = timestep

    def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, **_: Any) -> None:
        self.timesteps = torch.tensor([self._timestep], dtype=torch.float32, device=device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        self.begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **_: Any) -> Any:
        self.seen = model_output
        return (sample,)


def _prediction_type(scheduler: Any) -> str:
    kind = scheduler.config.get("prediction_type")
    if kind in (None, "flow_prediction"):
        return "flow"
    if kind not in ("epsilon", "v_prediction"):
        raise ConfigError(f"LEAP knows flow, epsilon and v_prediction models, got prediction_type {kind!r}")
    return str(kind)


def record_references(pipe: Any, calls: Sequence[Mapping[str, Any]]) -> References:
    """Draw the plain trajectories, watching the scheduler of this pipeline."""
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
        mu = kwargs.get("mu")
        return plain_set(*args, **kwargs)

    scheduler.step, scheduler.set_timesteps = step, set_timesteps
    try:
        for call in calls:
            path.clear()
            pipe(**{**call, "output_type": "latent"})
            states.append(torch.stack(path))
    finally:
        del scheduler.step, scheduler.set_timesteps
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
    return References(states, timesteps, sigmas, mu, kind)


class Fitter:
    """Fits solvers to references; evaluations that two lists of steps share are made once."""

    def __init__(self, pipe: Any, calls: Sequence[Mapping[str, Any]], references: References, ridge: float) -> None:
        self._pipe, self._calls, self._references, self._ridge = pipe, calls, references, ridge
        self._best: Leap | None = None
        self.evaluations = 0

    @contextmanager
    def probing(self) -> Iterator[Fitter]:
        """While this lasts, the pipeline's scheduler is a probe."""
        original = self._pipe.scheduler
        self._probe = _Probe(original.config)
        self._pipe.scheduler = self._probe
        try:
            yield self
        finally:
            self._pipe.scheduler = original

    def _evaluate(self, call: Mapping[str, Any], state: Tensor, step: int) -> Tensor:
        """The velocity at a state, with the pipeline's guidance."""
        references = self._references
        self._probe.at(references.timesteps[step])
        sigma, kind = references.sigmas[step], references.prediction_type
        alpha = 1.0 if kind == "flow" else (1 + sigma * sigma) ** -0.5
        latents = alpha * state
        self._pipe(**{**call, "latents": latents, "num_inference_steps": 1, "output_type": "latent"})
        assert self._probe.seen is not None
        output = self._probe.seen.float().cpu()
        self.evaluations += 1
        return alpha * output + sigma * alpha * latents if kind == "v_prediction" else output

    def fit(self, steps: Steps) -> Leap:
        """Coefficients for a list of steps, evaluation after evaluation."""
        references = self._references
        sigmas = references.sigmas
        goals = (*steps[1:], len(references.timesteps))
        shared = self._shared(steps)
        velocities = (
            [list(known[:shared]) for known in self._best.velocities] if self._best else [[] for _ in self._calls]
        )
        states, rows = [s[0] for s in references.states], []
        for k, (step, goal) in enumerate(zip(steps, goals, strict=True)):
            equations = NormalEquations(k + 1)
            for known, state, call, reference in zip(velocities, states, self._calls, references.states, strict=True):
                if k >= len(known):
                    known.append(self._evaluate(call, state, step))
                equations.add(reference[0], known[: k + 1], reference[goal])
            prior = [sigmas[b] - sigmas[a] for a, b in zip(steps[: k + 1], goals[: k + 1], strict=True)]
            rows.append(equations.solve(prior, self._ridge))
            before = rows[-2] if k else ()
            states = [
                advance(state, known[: k + 1], rows[-1], before)
                for state, known in zip(states, velocities, strict=True)
            ]
        error = sum(float((s - r[-1]).square().sum()) for s, r in zip(states, references.states, strict=True))
        size = sum(float(r[-1].square().sum()) for r in references.states)
        return Leap(steps, rows, error / size, velocities)

    def _shared(self, steps: Steps) -> int:
        """How many evaluations the best list so far has in common: coefficients before the last of them agree too."""
        if self._best is None:
            return 0
        own = self._best.steps
        return next((i for i, (a, b) in enumerate(zip(own, steps, strict=False)) if a != b), min(len(own), len(steps)))

    def loss(self, steps: Steps) -> float:
        """The final error of a list of steps; the best list is remembered."""
        found = self.fit(steps)
        if self._best is None or found.error < self._best.error:
            self._best = found
        return found.error

    def search(
        self, count: int, trials: int, seed: int, progress: Callable[[int, int, float], None] | None
    ) -> tuple[Leap, Search]:
        """The best list of `count` steps that a search finds, and how it went."""
        self._best = None
        total = len(self._references.timesteps)
        found = search_steps(spread(count, total, START), total, self.loss, trials=trials, seed=seed, progress=progress)
        assert self._best is not None
        return self._best, found


def fit_leap(
    pipe: Any,
    calls: Sequence[Mapping[str, Any]],
    evaluations: Sequence[int],
    *,
    trials: int = 80,
    ridge: float = 1e-6,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Learn a solver for each number of evaluations.

    Args:
        pipe: a text-to-image or text-to-video pipeline that takes `latents`.
        calls: arguments of its calls, with the steps, size and guidance that the references are to have, each with
            generators or latents. Give batches: each evaluation of the fit runs every call once.
        evaluations: numbers of evaluations.
        trials: lists of steps to look at for each number; 1 takes the spread that a search would start from.
        ridge: see `solvers/fit.py`.
        seed: of the search.
        progress: called with (number of evaluations, trials so far, trials, best relative squared error).

    Returns:
        a calibration to save, or to make a scheduler of: `LeapScheduler.of(calibration, pipe)`.

    Raises:
        CalibrationError: if there are no calls, or they cannot be followed.
        ConfigError: if a number does not fit the run.
    """
    if not calls:
        raise CalibrationError("there is nothing to learn from: give at least one call")
    references = record_references(pipe, calls)
    total = len(references.timesteps)
    with accelerate(pipe, "reuse", interval=1) as run:
        pipe(**{**calls[0], "output_type": "latent"})
        fingerprint = fingerprint_of(pipe, run, "output")
    tensors, report = {}, {}
    fitter = Fitter(pipe, calls, references, ridge)
    with fitter.probing():
        for count in evaluations:
            if not 1 <= count <= total:
                raise ConfigError(f"evaluations must be between 1 and the {total} steps of the references, got {count}")

            def tick(done: int, most: int, best: float, count: int = count) -> None:
                if progress is not None:
                    progress(count, done, most, best)

            found, search = fitter.search(count, trials, seed, tick)
            rows = torch.zeros(count, count, dtype=torch.float64)
            for k, row in enumerate(found.coefficients):
                rows[k, : k + 1] = torch.tensor(row, dtype=torch.float64)
            tensors[f"{count}/coefficients"] = rows
            tensors[f"{count}/timesteps"] = torch.tensor([references.timesteps[s] for s in found.steps])
            tensors[f"{count}/sigmas"] = torch.tensor([references.sigmas[s] for s in found.steps])
            report[str(count)] = figures(search)
    options = {
        "prediction_type": references.prediction_type,
        "num_train_timesteps": int(pipe.scheduler.config.num_train_timesteps),
        "shift_mu": None if references.mu is None else float(references.mu),
        "calls": len(calls),
        "trials": trials,
        "model_evaluations": fitter.evaluations,
    }
    return Calibration(LEAP, tensors, fingerprint, report, options)
