"""Why a certified setting is not to be had, and the command that would certify it, which runs as it is printed."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from torch import nn

from hasten.errors import CertificateError
from hasten.parameters import PRECISIONS
from hasten.quality.certificate import Certificate
from hasten.quality.conditions import Call
from hasten.quality.tolerance import TIERS, Tolerance

__all__ = ["certify_command", "model_name", "refusal"]

SUBJECTS = "hasten.subjects"  # entry points of models that come with prompts
FOLDER = "my-model"
WITH_IMAGES = {"strength", "mask_image", "control_image"}  # arguments of calls that go on from an image, or follow one


def model_name(pipe: Any) -> str:
    """Where a pipeline was loaded from, as far as it knows; empty if it does not."""
    config = getattr(pipe, "config", None)
    return str(getattr(config, "_name_or_path", "") or getattr(config, "get", lambda _: "")("_name_or_path") or "")


def refusal(certificate: Certificate, differences: Sequence[str], remedy: str) -> CertificateError:
    """The error of a setting that does not hold here."""
    return CertificateError(f"quality {certificate.quality!r}: {'; '.join(differences)}. {remedy}")


def certify_command(
    quality: str,
    modules: Mapping[str, nn.Module],
    name: str,
    *,
    pipe: Any,
    certificate: Certificate | None = None,
    call: Call | None = None,
    changed: bool = False,
) -> str:
    """A sentence with what would certify a quality.

    Args:
        quality: its name.
        modules: the denoisers by name.
        name: that the pipeline was loaded by; empty if it is not known.
        pipe: the pipeline, as far as it is known.
        certificate: of this quality, for another pipeline or call.
        call: to certify for; None where there is none yet.
        changed: whether the pipeline is not, or perhaps not, what the name loads.
    """
    words = ["hasten", "certify", "--model", FOLDER if changed or not name else name, *_precision(modules)]
    words += ["--quality", quality, *_bounds(quality, None if certificate is None else certificate.tolerance)]
    if call is not None:
        words += _options(call, {} if certificate is None else certificate.conditions.guidance)
    own_prompts = changed or not name or name not in {entry.name for entry in entry_points(group=SUBJECTS)}
    if own_prompts and pipe is not None and WITH_IMAGES & set(inspect.signature(type(pipe).__call__).parameters):
        return f"`hasten certify` draws from prompts alone, and a {type(pipe).__name__} is called with images"
    first = "certify it"
    if FOLDER in words:
        fused = "fuse its adapters, pipe.fuse_lora() and pipe.unload_lora_weights(), " if _adapted(modules) else ""
        first = f"{fused}save the pipeline, pipe.save_pretrained({FOLDER!r}), and certify it"
    last = ""
    if own_prompts:
        words += ["--prompts-file", "prompts.txt"]
        last = " (108 or more of your prompts, one per line)"
    return f"{first[0].upper()}{first[1:]}: {shlex.join(words)}{last}"


def _adapted(modules: Mapping[str, nn.Module]) -> bool:
    return any("lora_A" in part._modules for module in modules.values() for part in module.modules())


def _precision(modules: Mapping[str, nn.Module]) -> list[str]:
    """The option for the dtype of the parameters, where it is one that pipelines are loaded in."""
    kinds = {str(one.dtype).removeprefix("torch.") for module in modules.values() for one in module.parameters()}
    return ["--dtype", *kinds] if len(kinds) == 1 and kinds <= set(PRECISIONS) else []


def _bounds(quality: str, tolerance: Tolerance | None) -> list[str]:
    """Options for a tolerance that is not the one that the quality's name stands for."""
    if tolerance is None or tolerance == TIERS.get(quality):
        return []
    words = []
    for metric in () if quality in TIERS else tolerance.bounds:
        side = "max" if getattr(tolerance, f"max_{metric}", None) is not None else "min"
        words += [f"--{side}-{metric}", f"{tolerance.bounds[metric]:g}"]
    words += ["--mean"] if tolerance.share is None else ["--share", f"{tolerance.share:g}"]
    return [*words, "--confidence", f"{tolerance.confidence:g}"]


def _options(call: Call, certified: Mapping[str, tuple[float, float]]) -> list[str]:
    """Options for the size, the steps and the guidance of a call."""
    words = []
    for name in ("height", "width", "steps"):
        value = getattr(call, name)
        words += [] if value is None else [f"--{name}", str(value)]
    if call.frames is not None:
        words += ["--set", f"num_frames={call.frames}"]
    for scale, value in call.guidance.items():
        low, high = certified.get(scale, (1.0, 1.0))
        if scale == "true_cfg_scale" and value != 1:
            words += ["--guidance", f"{value:g}"]
        elif scale != "true_cfg_scale" and not low <= value <= high:
            words += ["--set", f"{scale}={value:g}"]
    return words
