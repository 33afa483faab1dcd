"""Fits solvers to reference trajectories; the pipeline evaluates the model, with its own guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from hasten.caching.schedule import spread
from hasten.search import Search, search_steps
from hasten.solvers.fit import NormalEquations, advance
from hasten.solvers.references import References

__all__ = ["START", "Fitter", "Leap"]

Steps = tuple[int, ...]
Rows = list[list[float]]
START = 1.15  # power of the spread that a search starts from: a little denser early


@dataclass(frozen=True)
class Leap:
    """A solver, and how near it comes to the references.

    Attributes:
        steps: the plain sampler's steps that the times came from.
        timesteps: where the model is evaluated, as the model counts time; between the steps after a refinement.
        sigmas: noise levels there.
        coefficients: row `k` has `k + 1` numbers.
        error: squared error of the final states, relative to their size.
        velocities: for each call `v_0 .. v_{n-1}`.
    """

    steps: Steps
    timesteps: list[float]
    sigmas: list[float]
    coefficients: Rows
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


class Fitter:
    """Fits solvers to references; evaluations that two lists of steps share are made once.

    Args:
        pipe: the pipeline; its scheduler is changed only while `probing()` lasts.
        calls: the arguments that the references were drawn with.
        references: the trajectories.
        ridge: pull of the coefficients towards the plain sampler's, see `fit.py`.
    """

    def __init__(self, pipe: Any, calls: Sequence[Mapping[str, Any]], references: References, ridge: float) -> None:
        self._pipe, self._calls, self._ridge = pipe, calls, ridge
        self.references = references
        self._best: Leap | None = None
        self.dtype = torch.float32  # of the model's outputs, known after the first evaluation
        self.evaluations = 0  # of the model's step, a picture each

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

    def _evaluate(self, call: Mapping[str, Any], state: Tensor, timestep: float, sigma: float) -> Tensor:
        """The velocity at a state, with the pipeline's guidance: a call of the pipeline with one step."""
        kind = self.references.prediction_type
        self._probe.at(timestep)
        alpha = 1.0 if kind == "flow" else (1 + sigma * sigma) ** -0.5
        latents = (alpha * state).to(self.dtype)
        self._pipe(**{**call, "latents": latents, "num_inference_steps": 1, "output_type": "latent"})
        assert self._probe.seen is not None
        self.dtype = self._probe.seen.dtype
        output = self._probe.seen.float().cpu()
        self.evaluations += len(state)
        return alpha * output + sigma * alpha * latents.float() if kind == "v_prediction" else output

    def follow(
        self, call: int, timesteps: Sequence[float], sigmas: Sequence[float], rows: Rows, known: Sequence[Tensor]
    ) -> list[Tensor]:
        """All velocities of a call along a solver's own path; the first ones may be known already."""
        start, velocities = self.references.states[call][0], list(known)
        for k in range(len(velocities), len(timesteps)):
            state = advance(start, velocities, rows[k - 1], ()) if k else start
            velocities.append(self._evaluate(self._calls[call], state, timesteps[k], sigmas[k]))
        return velocities

    def score(self, steps: Steps, timesteps: list[float], sigmas: list[float], rows: Rows) -> Leap:
        """A solver with given times and coefficients, where the last row alone is fitted."""
        velocities = [self.follow(i, timesteps, sigmas, rows, ()) for i in range(len(self._calls))]
        last = self._fit_row(len(steps), self.references.total, velocities, rows[-1])
        return self._leap(steps, timesteps, sigmas, [*rows[:-1], last], velocities)

    def fit(self, steps: Steps) -> Leap:
        """Coefficients for a list of steps, evaluation after evaluation."""
        references = self.references
        timesteps, sigmas = [references.timesteps[s] for s in steps], [references.sigmas[s] for s in steps]
        goals = (*steps[1:], references.total)
        shared = self._shared(steps)
        velocities = (
            [list(known[:shared]) for known in self._best.velocities] if self._best else [[] for _ in self._calls]
        )
        rows: Rows = []
        for k, goal in enumerate(goals):
            for call, known in enumerate(velocities):
                if len(known) == k:
                    known[:] = self.follow(call, timesteps[: k + 1], sigmas[: k + 1], rows, known)
            plain = [references.sigmas[b] - references.sigmas[a] for a, b in zip(steps[: k + 1], goals, strict=False)]
            rows.append(self._fit_row(k + 1, goal, velocities, plain))
        return self._leap(steps, timesteps, sigmas, rows, velocities)

    def _fit_row(self, size: int, goal: int, velocities: list[list[Tensor]], prior: Sequence[float]) -> list[float]:
        """How far to move along each velocity from the start, to come near the reference's state at a step."""
        equations = NormalEquations(size)
        for known, reference in zip(velocities, self.references.states, strict=True):
            equations.add(reference[0], known[:size], reference[goal])
        return equations.solve(prior, self._ridge)

    def _leap(
        self, steps: Steps, timesteps: list[float], sigmas: list[float], rows: Rows, velocities: list[list[Tensor]]
    ) -> Leap:
        paths = self.references.states
        finals = [advance(path[0], known, rows[-1], ()) for path, known in zip(paths, velocities, strict=True)]
        error = sum(float((x - path[-1]).square().sum()) for x, path in zip(finals, paths, strict=True))
        size = sum(float(path[-1].square().sum()) for path in paths)
        return Leap(steps, timesteps, sigmas, rows, error / size, velocities)

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
        total = self.references.total
        found = search_steps(spread(count, total, START), total, self.loss, trials=trials, seed=seed, progress=progress)
        assert self._best is not None
        return self._best, found
