"""What resolution needs of a scheduler: which ones can be served, their noise levels, a step that is taken for it."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from hasten.errors import ConfigError

__all__ = ["NoiseLevels", "check_scheduler", "own_shift", "shift_levels", "skip_step"]


def check_scheduler(scheduler: Any, name: str, *, multistep: bool) -> None:
    """Refuse a scheduler whose steps cannot be taken on latents of another size.

    Args:
        scheduler: the pipeline's.
        name: of who asks, for the message.
        multistep: whether a UniPC with flow sigmas will do.

    Raises:
        ConfigError: if it cannot be served; the message says what to set.
    """
    config = scheduler.config
    if multistep and isinstance(scheduler, UniPCMultistepScheduler):
        if config.use_flow_sigmas and config.prediction_type == "flow_prediction":
            return
        wrong = "a UniPC that does not sample flows (use_flow_sigmas=True, prediction_type='flow_prediction')"
    elif not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        wrong = type(scheduler).__name__
    elif config.stochastic_sampling or config.invert_sigmas:
        wrong = "stochastic_sampling or invert_sigmas"
    else:
        return
    other = ", or a UniPC with flow sigmas" if multistep else ""
    raise ConfigError(
        f"{name} cannot be run with {wrong}; set pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config("
        f"pipe.scheduler.config){other}, without stochastic_sampling and invert_sigmas"
    )


def own_shift(scheduler: Any) -> float | None:
    """The shift of the scheduler's noise levels, None where it depends on the size of the image."""
    if scheduler.config.get("use_dynamic_shifting"):
        return None
    return float(scheduler.config.flow_shift if isinstance(scheduler, UniPCMultistepScheduler) else scheduler.shift)


def skip_step(scheduler: Any, timestep: Any) -> None:
    """Let the scheduler pass a step that was taken in its place; what a multistep solver remembers is dropped."""
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    scheduler._step_index += 1
    if isinstance(scheduler, UniPCMultistepScheduler):
        order = scheduler.config.solver_order
        scheduler.model_outputs, scheduler.timestep_list = [None] * order, [None] * order
        scheduler.lower_order_nums, scheduler.last_sample = 0, None


def shift_levels(sigmas: Tensor, ratio: float) -> Tensor:
    """Noise levels under another shift: a shift `h` maps `t` to `h t / (1 + (h - 1) t)`.

    Args:
        sigmas: levels under the scheduler's own shift.
        ratio: the wanted shift over the scheduler's own, since two shifts in turn are one by their product.
    """
    return ratio * sigmas / (1 + (ratio - 1) * sigmas)


class NoiseLevels:
    """Noise levels of one run: read from the scheduler once, kept on the host, and written from here alone.

    Args:
        scheduler: after its `set_timesteps`.

    Attributes:
        sigmas: `[steps + 1]` on the host, in the scheduler's dtype.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self.sigmas: Tensor = scheduler.sigmas.detach().cpu().clone()
        self._values: list[float] = self.sigmas.tolist()

    def __len__(self) -> int:
        """Steps of the run."""
        return len(self._values) - 1

    def __getitem__(self, step: int) -> float:
        """The noise level before a step."""
        return self._values[step]

    def write(self, start: int, sigmas: Tensor) -> None:
        """Write levels into the scheduler's own lists, in place, since the pipeline's loop goes by them.

        Args:
            start: index of the first level to write.
            sigmas: `[steps + 1 - start]`.
        """
        self.sigmas[start:] = sigmas.to(self.sigmas)
        self._values = self.sigmas.tolist()
        scheduler = self._scheduler
        timesteps = sigmas[:-1] * scheduler.config.num_train_timesteps
        scheduler.sigmas[start:] = self.sigmas[start:].to(scheduler.sigmas)
        scheduler.timesteps[start:] = timesteps.to(scheduler.timesteps)
