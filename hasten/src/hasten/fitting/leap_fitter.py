"""Fits solvers to reference trajectories; the pipeline evaluates the model, with its own guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor, nn

from hasten.caching.schedule import spread
from hasten.errors import CalibrationError
from hasten.fitting.references import References
from hasten.fitting.search import Search, search_steps
from hasten.pipeline.replay import Replay
from hasten.pipeline.view import denoisers
from hasten.solvers.multistep import NormalEquations, advance

__all__ = ["STARTS", "Fitter", "Leap"]

Steps = tuple[int, ...]
Rows = list[list[float]]
STARTS = (1.15, 1.0, 1.3)  # powers of the spreads that a search chooses its start from; the first alone for one trial


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
    """Stands in for a scheduler, for a run of two steps at one time: the first puts a state into the pipeline's loop in
    the place of the noise that it drew, the second shows what the pipeline makes of the model's answer to it.

    A pipeline's `latents` argument would do the same, but not every pipeline takes there what it hands to its
    scheduler, and one that is given latents draws other random numbers for the rest (encoded images).
    """

    config_name = "scheduler_config.json"
    order = 1
    init_noise_sigma = 1.0

    def __init__(self, config: Any) -> None:
        self._internal_dict = config
        self.timesteps = torch.zeros(2)
        self.sigmas = torch.zeros(3)
        self.begin_index: int | None = None
        self.mu: float | None = None

    def at(self, timestep: float, state: Tensor) -> None:
        """The next call of the pipeline evaluates the model at this time and state."""
        self._timestep, self._state = timestep, state
        self.waiting = True  # whether the state has still to be put in
        self.seen: Tensor | None = None

    def set_timesteps(
        self,
        num_inference_steps: Any = None,
        device: Any = None,
        sigmas: Any = None,
        timesteps: Any = None,
        mu: float | None = None,
        **_: Any,
    ) -> None:
        self.mu = None if mu is None else float(mu)
        self.timesteps = torch.full((2,), self._timestep, dtype=torch.float32, device=device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        self.begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **_: Any) -> Any:
        if self.waiting:
            self.waiting = False
            sample = self._state.to(sample)
        else:
            self.seen = model_output
        return SchedulerOutput(prev_sample=sample) if return_dict else (sample,)


class _Bypass:
    """Lets a transformer answer the probe's first step with an earlier answer, since nothing is made of it."""

    def __init__(self, model: nn.Module, probe: _Probe) -> None:
        self._model, self._probe = model, probe
        self._own = vars(model).get("forward")  # of an offload hook, perhaps
        self._forward = model.forward
        self._answers: dict[int, Any] = {}
        self.call = 0

    def __enter__(self) -> None:
        @wraps(self._forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._probe.waiting and self.call in self._answers:
                return self._answers[self.call]
            answer = self._forward(*args, **kwargs)
            self._answers.setdefault(self.call, answer)
            return answer

        self._model.forward = forward

    def __exit__(self, *_: object) -> None:
        del self._model.forward
        if self._own is not None:
            self._model.forward = self._own


class Fitter:
    """Fits solvers to references; evaluations that two lists of steps share are made once.

    Args:
        pipe: the pipeline; its scheduler is changed only while `probing()` lasts.
        calls: those that the references were drawn with.
        references: the trajectories.
        ridge: pull of the coefficients towards the plain sampler's, see `fit.py`.
    """

    def __init__(self, pipe: Any, calls: Replay, references: References, ridge: float) -> None:
        self._pipe, self._calls, self._ridge = pipe, calls, ridge
        self.references = references
        self._best: Leap | None = None
        self.dtype = torch.float32  # of the model's outputs, known after the first evaluation
        self.evaluations = 0  # of the model's step, an image each

    @contextmanager
    def probing(self) -> Iterator[Fitter]:
        """While this lasts, the pipeline's scheduler is a probe."""
        original = self._pipe.scheduler
        self._probe = _Probe(original.config)
        models = [getattr(self._pipe, name) for name in denoisers(self._pipe)]
        self._bypasses = [_Bypass(model, self._probe) for model in models]
        with ExitStack() as stack:
            stack.callback(setattr, self._pipe, "scheduler", original)
            self._pipe.scheduler = self._probe
            for bypass in self._bypasses:
                stack.enter_context(bypass)
            yield self

    def _evaluate(self, call: int, state: Tensor, timestep: float, sigma: float) -> Tensor:
        """The velocity at a state, with the pipeline's guidance: a call of the pipeline."""
        kind = self.references.prediction_type
        alpha = 1.0 if kind == "flow" else (1 + sigma * sigma) ** -0.5
        self._probe.at(timestep, alpha * state)
        for bypass in self._bypasses:
            bypass.call = call
        self._pipe(**{**self._calls[call], "num_inference_steps": 2})
        if self._probe.seen is None:
            raise CalibrationError(
                f"{type(self._pipe).__name__} does not take one step for each timestep of its scheduler; LEAP cannot "
                "be fitted to it"
            )
        self.dtype = self._probe.seen.dtype
        output = self._probe.seen.float().cpu()
        self.evaluations += len(state)
        return alpha * output + sigma * alpha * alpha * state if kind == "v_prediction" else output

    def shift_mu(self) -> float | None:
        """The resolution-dependent shift that the pipeline gives its scheduler, if it depends on nothing else.

        FLUX.2's depends on the number of steps too, and tells nothing of the image's size then.
        """
        references = self.references
        self._evaluate(0, references.states[0][0], references.timesteps[0], references.sigmas[0])
        return references.mu if self._probe.mu == references.mu else None

    def follow(
        self, call: int, timesteps: Sequence[float], sigmas: Sequence[float], rows: Rows, known: Sequence[Tensor]
    ) -> list[Tensor]:
        """All velocities of a call along a solver's own path; the first ones may be known already."""
        start, velocities = self.references.states[call][0], list(known)
        for k in range(len(velocities), len(timesteps)):
            state = advance(start, velocities, rows[k - 1], ()) if k else start
            velocities.append(self._evaluate(call, state, timesteps[k], sigmas[k]))
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
        starts = list(dict.fromkeys(spread(count, total, power) for power in STARTS[:trials]))
        start = min(starts, key=self.loss)
        found = search_steps(start, total, self.loss, trials=trials - len(starts) + 1, seed=seed, progress=progress)
        assert self._best is not None
        return self._best, replace(found, trials=found.trials + len(starts) - 1)
