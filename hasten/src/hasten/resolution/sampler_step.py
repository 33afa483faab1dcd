"""The call of `scheduler.step`, in whose place an engine takes the step on the true latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from hasten.pipeline.scheduler import skip_step

__all__ = ["SamplerStep", "SamplerSteps"]


class SamplerStep:
    """One call of `scheduler.step`, as the pipeline makes it.

    Attributes:
        prediction: the guided prediction at full size, every coarse value copied.
        sample: the latents that the pipeline has.
    """

    def __init__(
        self,
        scheduler: Any,
        own_step: Any,
        prediction: Tensor,
        timestep: Any,
        sample: Tensor,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        self.prediction, self.sample = prediction, sample
        self._scheduler, self._own_step, self._timestep = scheduler, own_step, timestep
        self._args, self._kwargs = args, kwargs

    def solve(self, velocity: Tensor, latents: Tensor) -> Tensor:
        """The scheduler's own step on other latents."""
        kwargs = {**self._kwargs, "return_dict": False}
        solved: Tensor = self._own_step(velocity, self._timestep, latents, *self._args, **kwargs)[0]
        return solved

    def skip(self) -> None:
        """Let the scheduler pass the step, which the engine takes."""
        skip_step(self._scheduler, self._timestep)

    def plain(self) -> Any:
        """What the scheduler's own step gives the pipeline."""
        return self._own_step(self.prediction, self._timestep, self.sample, *self._args, **self._kwargs)

    def output(self, latents: Tensor) -> Any:
        """Latents in the form in which the pipeline asked for them."""
        return SchedulerOutput(prev_sample=latents) if self._kwargs.get("return_dict", True) else (latents,)


class SamplerSteps:
    """What is called for the `step` of a scheduler; it keeps the scheduler, so that a removed engine need not.

    Args:
        scheduler: whose steps they are.
        take: of the engine.

    Attributes:
        own: the scheduler's own step.
    """

    own: Callable[..., Any]

    def __init__(self, scheduler: Any, take: Callable[[SamplerStep], Any]) -> None:
        self._scheduler, self._take = scheduler, take

    def __call__(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._take(SamplerStep(self._scheduler, self.own, model_output, timestep, sample, args, kwargs))
