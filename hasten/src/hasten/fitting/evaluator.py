"""One evaluation of a model at a state and a time of our choice, by a call of its pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor, nn

from hasten.errors import CalibrationError
from hasten.pipeline.replay import Replay
from hasten.pipeline.view import denoisers
from hasten.solvers.passes import difference, watch_passes

__all__ = ["Evaluator"]


class _AskedError(Exception):
    """Ends a pipeline's call once it has said what it asks of its scheduler."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given


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
        self.asked = False  # whether a call is made for its `set_timesteps` alone
        self.skips = True  # whether the model need not be run for the first step

    def at(self, timestep: float, state: Tensor) -> None:
        """The next call of the pipeline evaluates the model at this time and state."""
        self._timestep, self._state = timestep, state
        self.waiting = True  # whether the state has still to be put in
        self.seen: Tensor | None = None
        self.apart: Tensor | None = None
        self.answers: list[Tensor] = []

    def set_timesteps(
        self,
        num_inference_steps: Any = None,
        device: Any = None,
        sigmas: Any = None,
        timesteps: Any = None,
        mu: float | None = None,
        **_: Any,
    ) -> None:
        if self.asked:
            given = {"sigmas": sigmas, "timesteps": timesteps, "mu": mu}
            raise _AskedError({name: value for name, value in given.items() if value is not None})
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
            sample = self._state.to(sample, copy=True)  # pipelines may write into it
        else:
            self.seen, self.apart = model_output.detach().float().cpu(), difference(self.answers, model_output)
        self.answers = []
        return SchedulerOutput(prev_sample=sample) if return_dict else (sample,)


class _Bypass:
    """Lets a denoiser answer the probe's first step with an earlier answer, since nothing is made of it.

    Attributes:
        call: the number of the call that comes.
        used: whether it made use of an earlier answer.
    """

    def __init__(self, model: nn.Module, probe: _Probe) -> None:
        self._model, self._probe = model, probe
        self._own = vars(model).get("forward")  # of an offload hook, perhaps
        self._forward = model.forward
        self._answers: dict[int, Any] = {}
        self.begin(0)

    def begin(self, call: int) -> None:
        """A call of this number comes."""
        self.call, self.used = call, False

    def __enter__(self) -> None:
        @wraps(self._forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._probe.waiting and self._probe.skips and self.call in self._answers:
                self.used = True
                return self._answers[self.call]
            answer = self._forward(*args, **kwargs)
            self._answers.setdefault(self.call, answer)
            return answer

        self._model.forward = forward

    def __exit__(self, *_: object) -> None:
        del self._model.forward
        if self._own is not None:
            self._model.forward = self._own


class Evaluator:
    """Evaluates a pipeline's model at states of our choice, with the pipeline's own guidance.

    Args:
        pipe: the pipeline; its scheduler is changed only while `probing()` lasts.
        calls: arguments of its calls.

    Attributes:
        scheduler: the pipeline's own.
        made: evaluations of the model's step so far, one per image.
        skips: whether the model is left out of the step that puts the state in; not where its first forward of a call
            leaves something behind for the next one (keys of a reference image).
    """

    def __init__(self, pipe: Any, calls: Replay) -> None:
        self._pipe, self._calls = pipe, calls
        self.scheduler = pipe.scheduler
        self.made = 0
        self.skips = True

    @contextmanager
    def probing(self) -> Iterator[None]:
        """While this lasts, the pipeline's scheduler is a probe."""
        self._probe = probe = _Probe(self.scheduler.config)
        unique = {id(model): model for model in denoisers(self._pipe).values()}
        self._bypasses = [_Bypass(model, probe) for model in unique.values()]
        with ExitStack() as stack:
            stack.callback(setattr, self._pipe, "scheduler", self.scheduler)
            self._pipe.scheduler = probe
            for bypass in self._bypasses:
                stack.enter_context(bypass)
            _, unhook = watch_passes(self._pipe, lambda answer: probe.answers.append(answer))
            stack.callback(unhook)
            yield

    def __call__(self, call: int, state: Tensor, timestep: float) -> tuple[Tensor, Tensor | None]:
        """The model's answer and the difference of its passes, `[B, ...]` each, in float32 on the CPU.

        Raises:
            CalibrationError: if the pipeline does not take one step for each timestep.
        """
        try:
            self._run(call, state, timestep)
        except Exception:  # of whatever the pipeline is made of
            if not any(bypass.used for bypass in self._bypasses):
                raise
            self.skips = False
            self._run(call, state, timestep)
        if self._probe.seen is None:
            raise CalibrationError(
                f"{type(self._pipe).__name__} does not take one step for each timestep of its scheduler; LEAP cannot "
                "be fitted to it"
            )
        self.made += len(state)
        apart = self._probe.apart
        return self._probe.seen, None if apart is None else apart.cpu()

    def _run(self, call: int, state: Tensor, timestep: float) -> None:
        self._probe.at(timestep, state)
        self._probe.skips = self.skips
        for bypass in self._bypasses:
            bypass.begin(call)
        self._pipe(**{**self._calls[call], "num_inference_steps": 2})

    @property
    def mu(self) -> float | None:
        """The resolution-dependent shift that the pipeline gave its scheduler in the latest evaluation."""
        return self._probe.mu

    def arguments(self, count: int) -> dict[str, Any]:
        """What the pipeline asks of its scheduler's `set_timesteps` for a run of `count` steps; no model is run.

        Levels of the call's own are left out: they are for its own number of steps.
        """
        call = {name: value for name, value in self._calls[0].items() if name not in ("sigmas", "timesteps")}
        self._probe.asked = True
        try:
            self._pipe(**{**call, "num_inference_steps": count})
        except _AskedError as asked:
            return {"num_inference_steps": count, **asked.given}
        finally:
            self._probe.asked = False
        raise CalibrationError(
            f"{type(self._pipe).__name__} asks nothing of its scheduler; LEAP cannot be fitted to it"
        )
