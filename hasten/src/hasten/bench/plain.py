"""The plain samplers that every method has to win against: Euler, UniPC and DPM-Solver++ 2M, each with its spacings.

A model's own spacing is what its pipeline asks the scheduler for. The others are those that scheduler classes of
diffusers offer: Karras, exponential and beta spacing of the noise levels, and steps uniform in lambda (half the
logarithm of the signal-to-noise ratio). For a flow-matching model the class of its own scheduler makes the noise
levels, and every solver follows them; for a variance-preserving one each solver makes its own.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from hasten.bench.arms import Arm, one_line
from hasten.bench.sampling import Attach, plain
from hasten.bench.thresholds import Trials
from hasten.errors import ConfigError, unknown

__all__ = ["SPACINGS", "Sampler", "best_plain_arms", "plain_arms"]

log = logging.getLogger(__name__)

OWN = ("euler", "unipc")  # which stand in every table, with the model's own spacing
SOLVERS = ("euler", "unipc", "dpmpp")
SPACINGS = {
    "": "",
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
    "lambda": "use_lu_lambdas",
}
NEARLY_ONE = 1 - 1e-6  # of noise: at 1 the signal-to-noise ratio has no logarithm


@contextmanager
def _unipc(pipe: Any) -> Iterator[None]:
    """UniPC of order 2 in place of the pipeline's scheduler, with the same noise levels where the model is a flow."""
    original = pipe.scheduler
    extra = {
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "flow_shift": original.config.get("shift", 1.0),
    }
    pipe.scheduler = UniPCMultistepScheduler.from_config(
        original.config, solver_order=2, **(extra if _is_flow(original) else {})
    )
    try:
        yield
    finally:
        pipe.scheduler = original


def _is_flow(scheduler: Any) -> bool:
    return scheduler.config.get("prediction_type") is None  # flow-matching schedulers have no prediction type


class _Following:
    """A multistep solver of a flow that takes its noise levels from another scheduler."""

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


class _UniPC(_Following, UniPCMultistepScheduler):
    """UniPC along another scheduler's noise levels."""

    shifted: ClassVar[dict[str, float]] = {"mu": 0.0}


class _DPMSolver(_Following, DPMSolverMultistepScheduler):
    """DPM-Solver++ 2M along another scheduler's noise levels."""


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

    @contextmanager
    def __call__(self, pipe: Any) -> Iterator[None]:
        original = pipe.scheduler
        pipe.scheduler = self._flow(original) if _is_flow(original) else self._variance_preserving(original)
        try:
            yield
        finally:
            pipe.scheduler = original

    def _flow(self, original: Any) -> Any:
        leader = _spaced(type(original), original.config, self.spacing)
        if self.solver == "euler":
            return leader
        # The solver keeps the pipeline's settings, from which pipelines compute a shift; the leader heeds them.
        follower = FOLLOWING[self.solver].from_config(
            {**original.config, "use_dynamic_shifting": False, **dict.fromkeys(filter(None, SPACINGS.values()), False)},
            solver_order=2,
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
        )
        follower.register_to_config(use_dynamic_shifting=original.config.get("use_dynamic_shifting", False))
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
    if flag and flag not in inspect.signature(kind.__init__).parameters:
        raise ConfigError(f"{kind.__name__} has no {spacing} spacing")
    return kind.from_config(config, **({flag: True} if flag else {}), **more)


_PLAIN: dict[str, Attach] = {"euler": plain, "unipc": _unipc}


def plain_arms(counts: Sequence[int], samplers: Sequence[str] = OWN) -> list[Arm]:
    """The plain sampler with as many steps as the methods compute: the comparison that every method has to win.

    `"euler"` is the pipeline's own scheduler (Euler for flow-matching models), `"unipc"` a second-order multistep
    solver.

    Raises:
        UnknownNameError: for another sampler.
    """
    for name in samplers:
        if name not in _PLAIN:
            raise unknown("sampler", name, _PLAIN)
    return [Arm(f"{name}-{n}", name, "plain", {}, n, n, _PLAIN[name]) for n in counts for name in samplers]


def best_plain_arms(counts: Sequence[int], trials: Trials) -> tuple[list[Arm], dict[str, dict[str, float | None]]]:
    """The best plain sampler for each number of steps, and what all of them came to.

    Args:
        counts: numbers of steps.
        trials: draws its prompts with every solver and spacing.

    Returns:
        an arm for each number whose best sampler is none that stands in the table anyway, and by number of steps and
        sampler the mean PSNR in dB over the trial's prompts; None for one that the model or the class does not have.
    """
    arms, found = [], {}
    for count in counts:
        figures: dict[str, float | None] = {}
        for sampler in (Sampler(solver, spacing) for solver in SOLVERS for spacing in SPACINGS):
            trials.progress(f"plain {sampler.label}, {count} steps")
            figures[sampler.label] = _quality(sampler, count, trials)
        found[str(count)] = figures
        known = {label: value for label, value in figures.items() if value is not None}
        best = max(known, key=lambda label: known[label], default=OWN[0])
        if best not in OWN:
            solver, _, spacing = best.partition(":spacing=")
            params = {"spacing": spacing} if spacing else {}
            arms.append(Arm(f"{best}-{count}", best, "plain", params, count, count, Sampler(solver, spacing)))
    return arms, found


def _quality(sampler: Sampler, count: int, trials: Trials) -> float | None:
    """Mean PSNR of a sampler; None if the model or the scheduler's class does not have it."""

    def compute() -> tuple[float, ...]:
        try:
            return trials.sample(_PLAIN.get(sampler.label, sampler), count)[1:]
        except Exception as error:  # whatever schedulers raise that do not fit a pipeline
            log.info("plain %s: %s", sampler.label, one_line(error))
            return ()

    return next(iter(trials.recall(f"plain {sampler.label} at {count}", compute)), None)
