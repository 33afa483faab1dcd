"""Under which conditions something was certified, and whether a call has them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from hasten.calibration import TIMESTEP_TOLERANCE, model_digest, weights_digest
from hasten.pipeline.runs import Run
from hasten.pipeline.view import call_arguments

__all__ = ["GUIDANCE", "Call", "Conditions", "ModelFacts", "scheduler_facts"]

GUIDANCE = ("guidance_scale", "true_cfg_scale", "guidance_scale_2")  # arguments of pipelines' calls
PROMPTS_AGAINST = ("negative_prompt", "negative_prompt_embeds")  # without one, pipelines leave true guidance out


@dataclass(frozen=True)
class ModelFacts:
    """A transformer: its class, and digests of its architecture and of a sample of its weights."""

    model: str
    config: str
    weights: str

    @classmethod
    def of(cls, module: nn.Module) -> ModelFacts:
        """The facts of a module."""
        return cls(type(module).__name__, model_digest(module), weights_digest(module))

    def differences(self, here: ModelFacts) -> list[str]:
        """What is different here, as text."""
        if here.model != self.model:
            return [f"certified for {self.model}, this is {here.model}"]
        if here.config != self.config:
            return [f"certified for a {self.model} of another configuration (size, depth, or adapters such as LoRA)"]
        if here.weights != self.weights and here.weights:
            return ["certified for other weights of the same architecture"]
        return []


@dataclass(frozen=True)
class Call:
    """What is known of a pipeline's call at its first forward; None for what its pipeline does not have.

    Attributes:
        height, width: in pixels.
        frames: of a clip.
        guidance: scales by the name of the argument; 1 where the pipeline leaves guidance out.
        timesteps: of the run, of all transformers together.
    """

    height: int | None
    width: int | None
    frames: int | None
    guidance: dict[str, float]
    timesteps: tuple[float, ...] | None

    @classmethod
    def of(cls, run: Run) -> Call:
        """The call that a run, whose first forward is about to happen, belongs to."""
        given = call_arguments(run.owner)

        def whole(name: str) -> int | None:
            value = given.get(name)
            return value if isinstance(value, int) else None

        guidance = {name: float(given[name]) for name in GUIDANCE if isinstance(given.get(name), (int, float))}
        against = [name for name in PROMPTS_AGAINST if name in given]
        if "true_cfg_scale" in guidance and against and all(given[name] is None for name in against):
            guidance["true_cfg_scale"] = 1.0
        return cls(whole("height"), whole("width"), whole("num_frames"), guidance, _timesteps(run))


@dataclass(frozen=True)
class Conditions:
    """What was the same in all requests of a certificate.

    Attributes:
        models: facts of each transformer by its name in the pipeline.
        scheduler: class of the pipeline's own scheduler.
        scheduler_config: its configuration, as far as it is plain.
        steps: that the pipeline is called with.
        timesteps: of the full run.
        height, width: in pixels.
        frames: of a clip.
        guidance: least and largest scale of each argument that has one.
    """

    models: dict[str, ModelFacts]
    scheduler: str
    scheduler_config: dict[str, Any]
    steps: int
    timesteps: tuple[float, ...]
    height: int | None
    width: int | None
    frames: int | None
    guidance: dict[str, tuple[float, float]]

    def model_differences(self, modules: Mapping[str, nn.Module]) -> list[str]:
        """What is different about the transformers, as text."""
        if set(modules) != set(self.models):
            return [f"certified for a pipeline with {_listed(self.models)}, this one has {_listed(modules)}"]
        found = (self.models[name].differences(ModelFacts.of(module)) for name, module in modules.items())
        return [text for texts in found for text in texts]

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
        """What is different about a call's size and guidance, as text."""
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
        return found

    def step_differences(self, timesteps: tuple[float, ...] | None) -> list[str]:
        """What is different about the steps of a full run, as text."""
        if timesteps is None:
            return ["the scheduler does not tell its steps"]
        if len(timesteps) != len(self.timesteps):
            return [f"certified for {len(self.timesteps)} steps, this call has {len(timesteps)}"]
        largest = max(map(abs, self.timesteps)) or 1.0
        if any(abs(a - b) > TIMESTEP_TOLERANCE * largest for a, b in zip(timesteps, self.timesteps, strict=True)):
            return ["certified at other timesteps: another shift, spacing or strength"]
        return []

    @property
    def options(self) -> str:
        """Options of `hasten certify` for these conditions."""
        size = [f"--{name} {value}" for name in ("height", "width") if (value := getattr(self, name)) is not None]
        return " ".join([*size, f"--steps {self.steps}"])


def _timesteps(run: Run) -> tuple[float, ...] | None:
    if run.sampler_timesteps is None or run.view is None:
        return None
    return tuple(run.sampler_timesteps[run.view.begin_index :].tolist())


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
