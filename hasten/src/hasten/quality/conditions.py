"""Under which conditions something was certified, and whether a call has them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import nn

from hasten.calibration import TIMESTEP_TOLERANCE
from hasten.pipeline.caller import Caller
from hasten.pipeline.guidance import denies_something
from hasten.pipeline.runs import Run
from hasten.quality.model_facts import ModelFacts

__all__ = ["SCALES", "Call", "Conditions", "pipeline_name", "scheduler_facts"]

# Arguments of pipelines' calls: of guidance, and how much noise an image is given.
SCALES = ("guidance_scale", "true_cfg_scale", "guidance_scale_2", "strength")
# Those that choose the timesteps, where a scheduler of ours does not show them.
SPACING = ("sigmas", "timesteps", "denoising_start", "denoising_end")
OTHER_TIMES = "certified at other timesteps"
FOR_ATTENTION = ("attention_kwargs", "joint_attention_kwargs", "cross_attention_kwargs")


@dataclass(frozen=True)
class Call:
    """What is known of a pipeline's call at its first forward; None for what its pipeline does not have.

    Attributes:
        height, width: in pixels.
        frames: of a clip.
        guidance: scales by the name of the argument, `strength` too; 1 where the pipeline leaves guidance out.
        timesteps: of the run, of all transformers together.
        steps: that are asked for.
        adapters: strength that the call gives adapters such as LoRA.
        autocast: dtype that the call computes in, whatever its weights have; empty without autocast.
    """

    height: int | None
    width: int | None
    frames: int | None
    guidance: dict[str, float]
    timesteps: tuple[float, ...] | None = None
    steps: int | None = None
    adapters: float = 1.0
    autocast: str = ""

    @classmethod
    def of(cls, run: Run) -> Call:
        """The call that a run, whose first forward is about to happen, belongs to."""
        timesteps = _timesteps(run)
        steps = None if timesteps is None else len(timesteps)
        return replace(cls.under_way(), timesteps=timesteps, steps=steps)

    @classmethod
    def under_way(cls, steps: int | None = None) -> Call:
        """What shows of the pipeline's call that this thread is in; nothing in a loop of the user's own."""
        return replace(cls.given(Caller().arguments), steps=steps, autocast=_autocast())

    @classmethod
    def given(cls, given: Mapping[str, Any]) -> Call:
        """A call with these arguments, as far as they decide."""

        def whole(name: str) -> int | None:
            value = given.get(name)
            return int(value) if isinstance(value, Integral) else None

        guidance = {name: _scale(given[name]) for name in SCALES if given.get(name) is not None}
        if "true_cfg_scale" in guidance and denies_something(given) is False:
            guidance["true_cfg_scale"] = 1.0
        strengths = [(given.get(name) or {}).get("scale") for name in FOR_ATTENTION]
        return cls(
            height=whole("height"),
            width=whole("width"),
            frames=whole("num_frames"),
            guidance=guidance,
            steps=whole("num_inference_steps"),
            adapters=next((float(one) for one in strengths if one is not None), 1.0),
        )


@dataclass(frozen=True)
class Conditions:
    """What was the same in all requests of a certificate.

    Attributes:
        pipeline: class of the pipeline, for what is done beside the denoiser: one that inpaints may share it.
        models: facts of each transformer by its name in the pipeline.
        scheduler: class of the pipeline's own scheduler.
        scheduler_config: its configuration, as far as it is plain.
        steps: that the pipeline is called with.
        timesteps: of the full run.
        height, width: in pixels.
        frames: of a clip.
        guidance: least and largest scale of each argument that has one.
    """

    pipeline: str
    models: dict[str, ModelFacts]
    scheduler: str
    scheduler_config: dict[str, Any]
    steps: int
    timesteps: tuple[float, ...]
    height: int | None
    width: int | None
    frames: int | None
    guidance: dict[str, tuple[float, float]]

    def pipeline_differences(self, pipe: Any) -> list[str]:
        """What is different about the pipeline's class, as text."""
        name = pipeline_name(pipe)
        return [] if name == self.pipeline else [f"certified for {self.pipeline}, this is {name}"]

    def model_differences(self, modules: Mapping[str, nn.Module]) -> list[str]:
        """What is different about the transformers, as text."""
        if set(modules) != set(self.models):
            return [f"certified for a pipeline with {_listed(self.models)}, this one has {_listed(modules)}"]
        found = (self.models[name].differences(ModelFacts.of(module)) for name, module in modules.items())
        return [text for texts in found for text in texts]

    def recast(self, modules: Mapping[str, nn.Module]) -> bool:
        """Whether these denoisers may be the certified ones in another dtype."""
        facts = {name: ModelFacts.of(module) for name, module in modules.items()}
        return set(facts) == set(self.models) and all(
            (one.model, one.config) == (self.models[name].model, self.models[name].config)
            and one.dtype != self.models[name].dtype
            for name, one in facts.items()
        )

    def scheduler_differences(self, scheduler: Any) -> list[str]:
        """What is different about the pipeline's own scheduler, as text; entries that only one version has are not."""
        name, config = scheduler_facts(scheduler)
        if name != self.scheduler:
            return [f"certified with {self.scheduler}, this pipeline has {name}"]
        return [
            f"certified with {key}={self.scheduler_config[key]!r} of the {name}, here it is {config[key]!r}"
            for key in sorted(self.scheduler_config.keys() & config.keys())
            if self.scheduler_config[key] != config[key]
        ]

    def call_differences(self, call: Call) -> list[str]:
        """What is different about a call's size, guidance and steps, as text: what could be certified, too."""
        found = []
        for name in ("height", "width", "frames"):
            own, here = getattr(self, name), getattr(call, name)
            if own is not None and here is not None and own != here:
                found.append(f"certified for {name} {own}, this call has {here}")
        for name, (low, high) in self.guidance.items():
            here = call.guidance.get(name)
            if here is not None and not low - 1e-6 <= here <= high + 1e-6:
                scales = f"{low:g}" if low == high else f"{low:g} to {high:g}"
                found.append(f"certified for {name} {scales}, this call has {here:g}")
        # A sampler of second order has more timesteps than it is asked for; where they are known, they are compared.
        steps = self.steps if call.timesteps is None else len(self.timesteps)
        if call.steps is not None and call.steps != steps:
            found.append(f"certified for {steps} steps, this call has {call.steps}")
        return found

    def manner_differences(self, call: Call) -> list[str]:
        """What a call does that nothing is certified for, as text that says what to leave."""
        found = []
        if call.adapters != 1:
            found.append(
                f"certified with adapters at strength 1, this call has {call.adapters:g}; leave scale out of its "
                "attention_kwargs"
            )
        if call.autocast:
            found.append(f"certified without autocast, this call computes in {call.autocast}; leave torch.autocast")
        return found

    def asked_differences(self, given: Mapping[str, Any]) -> list[str]:
        """What a call, by the arguments that it was made with, asks of a scheduler that has timesteps of its own."""
        asked = [name for name in SPACING if given.get(name) is not None]
        return [f"{OTHER_TIMES}; leave {', '.join(asked)} out"] if asked else []

    def spacing_differences(self, timesteps: tuple[float, ...] | None) -> list[str]:
        """What is different about the timesteps of as many steps, as text that says what to do."""
        if timesteps is None:
            return ["the scheduler does not tell its steps; call the pipeline itself, and not its parts"]
        largest = max(map(abs, self.timesteps)) or 1.0
        if len(timesteps) == len(self.timesteps) and all(
            abs(a - b) <= TIMESTEP_TOLERANCE * largest for a, b in zip(timesteps, self.timesteps, strict=True)
        ):
            return []
        return [f"{OTHER_TIMES}; leave sigmas, timesteps and strength out, so that they are the model's"]

    @property
    def options(self) -> str:
        """Size and steps as options of `hasten certify`, to tell certificates apart by."""
        size = [f"--{name} {value}" for name in ("height", "width") if (value := getattr(self, name)) is not None]
        return " ".join([*size, f"--steps {self.steps}"])


def _autocast() -> str:
    kinds = [kind for kind in ("cuda", "xpu", "mps", "cpu") if torch.is_autocast_enabled(kind)]
    return str(torch.get_autocast_dtype(kinds[0])).removeprefix("torch.") if kinds else ""


def _timesteps(run: Run) -> tuple[float, ...] | None:
    if run.sampler_timesteps is None or run.view is None:
        return None
    return tuple(run.sampler_timesteps[run.view.begin_index :].tolist())


def _scale(value: Any) -> float:
    """A number of whatever type as a float; what is none as one that lies in no range."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # several, where each image of a call has its own
        return math.nan


def pipeline_name(pipe: Any) -> str:
    """The class of a pipeline as diffusers calls it, whatever of the user's own is derived from it."""
    kinds = (kind for kind in type(pipe).__mro__ if kind.__module__.startswith("diffusers"))
    return next(kinds, type(pipe)).__name__


def scheduler_facts(scheduler: Any) -> tuple[str, dict[str, Any]]:
    """Class of a scheduler and its configuration, without what is private or no plain value."""
    config = {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}
    plain = {}
    for key, value in config.items():
        try:
            plain[key] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            plain[key] = str(value)
    return type(scheduler).__name__, plain


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "no transformer"
