"""What stages need of a scheduler: which ones can be served, their noise levels, and a step that is skipped."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from hasten.errors import ConfigError

__all__ = ["check_scheduler", "own_shift", "set_levels", "skip_step"]


def check_scheduler(scheduler: Any, name: str = "stages", *, multistep: bool = True) -> Any:
    """The scheduler, if stages can stand behind what it does.

    Args:
        scheduler: the pipeline's.
        name: of who asks, for the message.
        multistep: whether a UniPC with flow sigmas will do.

    Raises:
        ConfigError: if they cannot; it says what to set.
    """
    config = scheduler.config
    if multistep and isinstance(scheduler, UniPCMultistepScheduler):
        if config.use_flow_sigmas and config.prediction_type == "flow_prediction":
            return scheduler
        wrong = "a UniPC that does not sample flows (use_flow_sigmas=True, prediction_type='flow_prediction')"
    elif not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        wrong = type(scheduler).__name__
    elif config.stochastic_sampling or config.invert_sigmas:
        wrong = "stochastic_sampling or invert_sigmas"
    else:
        return scheduler
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


def set_levels(scheduler: Any, sigmas: Tensor, ratio: float, start: int) -> None:
    """Write a stage's noise levels into the scheduler's lists from `start` on, in place, since the loop goes by them.

    Args:
        scheduler: after its `set_timesteps`.
        sigmas: the levels that `set_timesteps` made, `[steps + 1]`.
        ratio: the stage's shift over the scheduler's own. A shift `h` maps `t` to `h t / (1 + (h - 1) t)`, and two in
            turn are one by their product.
        start: index of the first level to write.
    """
    levels = ratio * sigmas / (1 + (ratio - 1) * sigmas)
    timesteps = levels[:-1] * scheduler.config.num_train_timesteps
    scheduler.sigmas[start:] = levels[start:]
    scheduler.timesteps[start:] = timesteps[start:].to(scheduler.timesteps)
