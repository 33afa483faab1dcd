"""Nodes: accelerate a MODEL, sample with LEAP, load a calibration, show what a run saved.

Four interfaces of ComfyUI are used: `ModelPatcher.clone` and `add_wrapper_with_key`, the outer sample wrapper,
`comfy.samplers.KSAMPLER`, and `folder_paths`. They are imported when a node needs them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten import registry
from hasten.acceleration import accelerate
from hasten.caching.method import ScheduledMethod
from hasten.calibration import Calibration
from hasten.errors import CalibrationError, ConfigError
from hasten.integrations.comfyui import adapters as _adapters  # noqa: F401  (registers ComfyUI's classes)
from hasten.integrations.listed import listed
from hasten.pipeline.summary import Summary
from hasten.solvers import LeapScheduler
from hasten.solvers.content import LEAP

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "Session"]

log = logging.getLogger("hasten")

KEY = "hasten"
CATEGORY = "hasten"
SIGMA_TOLERANCE = 1e-4


@dataclass
class Session:
    """What the latest run of an accelerated MODEL saved; None before the first."""

    summary: Summary | None = None


def _files() -> list[str]:
    """Names of the files in `models/hasten`."""
    import folder_paths  # type: ignore[import-not-found]

    if KEY not in folder_paths.folder_names_and_paths:
        folder = Path(folder_paths.models_dir) / KEY
        folder.mkdir(parents=True, exist_ok=True)
        folder_paths.folder_names_and_paths[KEY] = ([str(folder)], {".safetensors"})
    return list(folder_paths.get_filename_list(KEY))


def _load(name: str) -> Calibration:
    import folder_paths

    path = folder_paths.get_full_path(KEY, name)
    if path is None:
        raise CalibrationError(f"{name} is not in models/{KEY}; put the file there that `hasten tune` wrote")
    return Calibration.load(path)


class LoadCalibration:
    """Reads a file of `models/hasten`."""

    RETURN_TYPES = ("HASTEN_CALIBRATION",)
    FUNCTION = "load"
    CATEGORY = CATEGORY
    DESCRIPTION = "A file that `hasten calibrate` or `hasten tune` wrote, from models/hasten."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        return {"required": {"file": (_files(),)}}

    def load(self, file: str) -> tuple[Calibration]:
        """The calibration in a file."""
        return (_load(file),)


class Accelerate:
    """Gives a MODEL a cache: it computes some steps and forecasts the rest."""

    RETURN_TYPES = ("MODEL", "HASTEN_RUN")
    RETURN_NAMES = ("model", "run")
    FUNCTION = "apply"
    CATEGORY = CATEGORY
    DESCRIPTION = "Computes so many of the sampler's steps and forecasts the others."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        names = [info.name for info in registry.methods() if issubclass(info.config, ScheduledMethod)]
        return {
            "required": {
                "model": ("MODEL",),
                "method": (names, {"default": "foca"}),
                "computed_steps": ("INT", {"default": 9, "min": 1, "max": 1000}),
                "schedule": (["even", "auto", "uniform", "early", "last"], {"default": "even"}),
            },
            "optional": {"calibration": ("HASTEN_CALIBRATION",)},
        }

    def apply(
        self, model: Any, method: str, computed_steps: int, schedule: str, calibration: Calibration | None = None
    ) -> tuple[Any, Session]:
        """A copy of the MODEL that is accelerated while it is sampled, and where the run's summary will be.

        Raises:
            ConfigError: for a method, number or calibration that cannot work.
        """
        from comfy.patcher_extension import WrappersMP  # type: ignore[import-not-found]

        params: dict[str, Any] = {"computed_steps": computed_steps, "schedule": schedule}
        if calibration is not None:
            params["calibration"] = calibration
        chosen = registry.build(method, **params)
        session = Session()

        def sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
            return _accelerated(executor, chosen, session, args, kwargs)

        patched = model.clone()
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, sample)
        return patched, session


def _accelerated(
    executor: Any, chosen: ScheduledMethod, session: Session, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """One sampling with the denoiser accelerated; it is as it was afterwards, whatever happens."""
    sigmas: Tensor = kwargs["sigmas"] if "sigmas" in kwargs else args[3]
    total = len(sigmas) - 1
    if total < 1:  # nothing is left to sample
        return executor(*args, **kwargs)
    denoiser = executor.class_obj.model_patcher.model.diffusion_model
    with accelerate(denoiser, listed(chosen, total)) as run:
        result = executor(*args, **kwargs)
        if run.records:
            session.summary = run.summary()
            log.info("%s", session.summary)
            if session.summary.steps != total:
                log.warning(
                    "the sampler called the model at %d noise levels, not at %d as its sigmas: it evaluates more than "
                    "once per step, and computed_steps counts levels; a sampler of one evaluation (euler, dpmpp_2m, "
                    "uni_pc) suits a cache better",
                    session.summary.steps,
                    total,
                )
    return result


class Summarise:
    """Shows what the latest run of an accelerated MODEL saved."""

    RETURN_TYPES = ("STRING", "LATENT")
    RETURN_NAMES = ("summary", "latent")
    FUNCTION = "show"
    CATEGORY = CATEGORY
    OUTPUT_NODE = True
    DESCRIPTION = "What the run that made this LATENT saved."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"run": ("HASTEN_RUN",), "latent": ("LATENT",)}}

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:  # noqa: N802
        """Never the same, so that it is asked after every run."""
        return float("nan")

    def show(self, run: Session, latent: Any) -> dict[str, Any]:
        """The summary as text, and the latent as it came."""
        text = "no run yet" if run.summary is None else str(run.summary)
        return {"ui": {"text": [text]}, "result": (text, latent)}


class LeapSample:
    """LEAP: learned times and coefficients, as a SAMPLER with the SIGMAS that belong to it."""

    RETURN_TYPES = ("SAMPLER", "SIGMAS")
    FUNCTION = "make"
    CATEGORY = CATEGORY
    DESCRIPTION = "A sampler that `hasten tune` learned; connect both outputs to SamplerCustom."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        about = "the guider's CFG, for a file that serves a range: change both together; 0 for a file with one scale"
        guidance = ("FLOAT", {"default": 0.0, "min": 0.0, "max": 100.0, "step": 0.05, "tooltip": about})
        count = ("INT", {"default": 9, "min": 1, "max": 1000})
        return {"required": {"file": (_files(),), "evaluations": count}, "optional": {"guidance": guidance}}

    def make(self, file: str, evaluations: int, guidance: float = 0.0) -> tuple[Any, Tensor]:
        """The sampler, and its noise levels `[evaluations + 1]` float32.

        Raises:
            CalibrationError: for a file that holds no LEAP.
            ConfigError: for a model that is no flow, or a guidance that was not learned.
            ScheduleError: for evaluations that were not learned, or a range of guidance without a scale.
        """
        from comfy.samplers import KSAMPLER  # type: ignore[import-not-found]

        calibration = Calibration.of(LEAP, _load(file))
        scheduler = LeapScheduler.of(calibration, guidance=guidance or None)
        if not str(scheduler.config.prediction_type).startswith("flow"):
            raise ConfigError(f"{file} is for a variance-preserving model; this node samples flow-matching models")
        scheduler.set_timesteps(evaluations)
        options = {"calibration": calibration, "evaluations": evaluations, "guidance": guidance or None}
        return KSAMPLER(leap_sample, options), scheduler.sigmas.clone()


@torch.no_grad()
def leap_sample(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Any = None,
    disable: Any = None,
    *,
    calibration: Calibration,
    evaluations: int,
    guidance: float | None = None,
) -> Tensor:
    """Sample a flow-matching model; the interface is that of ComfyUI's samplers.

    Args:
        model: from `x` `[B, ...]` and the noise level `[B]` to the denoised `x`.
        x: noise, or noised latents, at the first level.
        sigmas: `[evaluations + 1]`, those of the node.
        extra_args: of the model.
        callback: called with a dictionary per step.
        disable: of the progress bar, which is ComfyUI's.
        calibration: LEAP's fit.
        evaluations: which of its tables.
        guidance: the scale, for a fit that serves a range.

    Raises:
        ConfigError: for other noise levels.
    """
    scheduler = LeapScheduler.of(calibration, guidance=guidance)  # its state is this run's own
    scheduler.set_timesteps(evaluations)
    own = scheduler.sigmas
    if len(sigmas) != len(own) or float((sigmas.cpu().float() - own).abs().max()) > SIGMA_TOLERANCE:
        raise ConfigError("these SIGMAS are not those of the LEAP node; connect both of its outputs to the sampler")
    for step, timestep in enumerate(scheduler.timesteps):
        level = sigmas[step]
        denoised = model(x, level * x.new_ones(len(x)), **(extra_args or {}))
        if callback is not None:
            callback({"x": x, "i": step, "sigma": level, "sigma_hat": level, "denoised": denoised})
        x = scheduler.step((x - denoised) / level, timestep, x, return_dict=False)[0]
    return x


NODE_CLASS_MAPPINGS: dict[str, type[Any]] = {
    "HastenAccelerate": Accelerate,
    "HastenLeap": LeapSample,
    "HastenLoadCalibration": LoadCalibration,
    "HastenSummary": Summarise,
}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "HastenAccelerate": "Accelerate (hasten)",
    "HastenLeap": "LEAP sampler (hasten)",
    "HastenLoadCalibration": "Load calibration (hasten)",
    "HastenSummary": "Summary (hasten)",
}
