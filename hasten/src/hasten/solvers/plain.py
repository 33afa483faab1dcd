"""The plain samplers: a pipeline's own solver, UniPC and DPM-Solver++ 2M, each with its spacings, as schedulers.

A model's own spacing is what its pipeline asks the scheduler for. The others are those that scheduler classes of
diffusers offer: Karras, exponential and beta spacing of the noise levels, and steps uniform in lambda (half the
logarithm of the signal-to-noise ratio). For a flow-matching model the class of its own scheduler makes the noise
levels, and every solver follows them; for a variance-preserving one each solver makes its own.

Pipelines that ask the scheduler of a flow for no levels (Wan, Stable Diffusion 3) get some that end at a thousandth
(before the shift), and lose the last of a few steps to it. The solvers of diffusers end at one n-th there, as the
linear spacing does.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from hasten.errors import ConfigError

__all__ = ["SOLVERS", "SPACINGS", "Sampler", "is_flow"]

SOLVERS = ("euler", "unipc", "dpmpp")
LINEAR = "linear"
SPACINGS = {
    "": "",
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
    "lambda": "use_lu_lambdas",
    LINEAR: "",  # from 1 to 1 / n in equal steps, before the shift; no setting of a scheduler
}
NEARLY_ONE = 1 - 1e-6  # of noise: at 1 the signal-to-noise ratio has no logarithm


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler samples a flow-matching model with a class of its own; those have no prediction type."""
    return scheduler.config.get("prediction_type") is None


class _Following:
    """A multistep solver of a flow that takes its noise levels from another scheduler.

    Its settings do not say that its levels are those of a flow: pipelines that ask for levels of their own (FLUX's
    `linspace(1, 1 / n, n)`) keep them to themselves then, and the levels would end at a thousandth instead.
    """

    leader: Any
    shifted: ClassVar[dict[str, float]] = {}  # a shift that the solver asks for and that comes to nothing

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Prepare a run; the arguments are those of the leader."""
        given = {"sigmas": sigmas, "mu": mu}
        self.leader.set_timesteps(
            num_inference_steps, device=device, **{name: value for name, value in given.items() if value is not None}
        )
        prepare: Any = super()
        prepare.set_timesteps(len(self.leader.timesteps), device=device, **self.shifted)  # forgets the last run
        levels = self.leader.sigmas.detach().to("cpu", torch.float32).clone()
        levels[0] = min(float(levels[0]), NEARLY_ONE)
        self.sigmas, self.timesteps = levels, self.leader.timesteps

    def _sigma_to_alpha_sigma_t(self, sigma: Any) -> tuple[Any, Any]:
        """Signal and noise at a noise level: `x = (1 - level) sample + level noise`."""
        return 1 - sigma, sigma


class _UniPC(_Following, UniPCMultistepScheduler):
    """UniPC along another scheduler's noise levels."""

    shifted: ClassVar[dict[str, float]] = {"mu": 0.0}


class _DPMSolver(_Following, DPMSolverMultistepScheduler):
    """DPM-Solver++ 2M along another scheduler's noise levels."""


class _Linear:
    """A scheduler of a flow with levels in equal steps from 1 to 1 / n, where its pipeline asks for none."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Prepare a run.

        Raises:
            ConfigError: if the pipeline asks for levels of its own.
        """
        if sigmas is not None or num_inference_steps is None:
            raise ConfigError("linear spacing is for pipelines that ask for no levels of their own, and this one does")
        prepare: Any = super()
        levels = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
        prepare.set_timesteps(num_inference_steps, device, sigmas=levels, **({} if mu is None else {"mu": mu}))


FOLLOWING: dict[str, Any] = {"unipc": _UniPC, "dpmpp": _DPMSolver}
VARIANCE_PRESERVING = {"unipc": UniPCMultistepScheduler, "dpmpp": DPMSolverMultistepScheduler}


@dataclass(frozen=True)
class Sampler:
    """Puts a solver with a spacing in the place of the pipeline's scheduler.

    Attributes:
        solver: of `SOLVERS`; `"euler"` is the pipeline's own.
        spacing: of `SPACINGS`; empty for the model's own.
    """

    solver: str
    spacing: str = ""

    @property
    def label(self) -> str:
        """As rows name it."""
        return f"{self.solver}:spacing={self.spacing}" if self.spacing else self.solver

    def scheduler(self, original: Any) -> Any:
        """The solver, for the model of a pipeline's own scheduler.

        Raises:
            ConfigError: if the class does not have the spacing.
        """
        return self._flow(original) if is_flow(original) else self._variance_preserving(original)

    @contextmanager
    def __call__(self, pipe: Any) -> Iterator[None]:
        original = pipe.scheduler
        pipe.scheduler = self.scheduler(original)
        try:
            yield
        finally:
            pipe.scheduler = original

    def _flow(self, original: Any) -> Any:
        kind: Any = type(original)
        if self.spacing == LINEAR and "sigmas" in inspect.signature(kind.set_timesteps).parameters:
            linear: Any = type(f"Linear{kind.__name__}", (_Linear, kind), {})
            leader = linear.from_config(original.config)
        else:
            leader = _spaced(kind, original.config, self.spacing)
        if self.solver == "euler":
            return leader
        # The solver keeps the pipeline's settings, from which pipelines compute a shift; the leader heeds them.
        own = {name: original.config.get(name, False) for name in ("use_dynamic_shifting", "use_flow_sigmas")}
        follower = FOLLOWING[self.solver].from_config(
            {**original.config, "use_dynamic_shifting": False, **dict.fromkeys(filter(None, SPACINGS.values()), False)},
            solver_order=2,
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
        )
        follower.register_to_config(**own)
        follower.leader = leader
        return follower

    def _variance_preserving(self, original: Any) -> Any:
        kind = VARIANCE_PRESERVING.get(self.solver, type(original))
        order = {} if self.solver == "euler" else {"solver_order": 2}
        return _spaced(kind, original.config, self.spacing, **order)


def _spaced(kind: Any, config: Any, spacing: str, **more: Any) -> Any:
    """A scheduler of a class with a spacing.

    Raises:
        ConfigError: if the class does not have it.
    """
    flag = SPACINGS[spacing]
    if spacing and flag not in inspect.signature(kind.__init__).parameters:
        raise ConfigError(f"{kind.__name__} has no {spacing} spacing")
    return kind.from_config(config, **({flag: True} if flag else {}), **more)
