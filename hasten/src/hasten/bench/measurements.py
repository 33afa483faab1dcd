"""From images to the rows of a result: metrics of each image, then medians and spread over the prompts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hasten.bench.arms import Arm
from hasten.bench.edits import edit_figures
from hasten.bench.row import Baseline, Row
from hasten.bench.sampling import Sample
from hasten.bench.sheet import film_strip, to_pil
from hasten.bench.subject import Subject
from hasten.io import write_atomically
from hasten.quality import metrics

__all__ = [
    "Measurement",
    "baseline_row",
    "failed_row",
    "image_name",
    "measure",
    "measured_row",
    "missing_columns",
    "save_image",
]

COMPARED = ("psnr", "ssim", "lpips", "flip")
EXTRA = ("psnr_unedited", "psnr_edited", "temporal_error")  # of editing and video models; None of others


@dataclass(frozen=True)
class Measurement:
    """What was measured on one image or clip of one arm.

    Attributes:
        prompt: the prompt's number.
        metrics: as they stand in `per_prompt`.
        errors: relative error of the latents after each step; None where the steps do not correspond.
        cache_bytes: most bytes of features held at once; None where the library does not tell.
        computed: steps that were computed.
        evaluations: forwards of the model whose blocks ran.
        right: whether the image is what the prompt asks for; None if the model has no ground truth.
        size: (height, width) in pixels.
        frames: of a clip; None of an image.
        flops: counted operations of the call, where they depend on the image.
    """

    prompt: int
    metrics: dict[str, Any]
    errors: list[float] | None
    cache_bytes: int | None
    computed: float
    evaluations: int
    right: bool | None
    size: tuple[int, int]
    frames: int | None = None
    flops: int | None = None


def _lpips() -> metrics.Lpips | None:
    return metrics.lpips() if metrics.Lpips.available() else None


def missing_columns() -> dict[str, str]:
    """Columns that cannot be measured here, and why."""
    if _lpips() is not None:
        return {}
    return {"lpips": "its weights are not installed: pip install stlpips-pytorch"}


def measure(
    model: Subject,
    sample: Sample,
    reference: Sample,
    prompt: str,
    number: int,
    seed: int,
    steps: int,
    flops: int | None = None,
) -> Measurement:
    """Compare an image, or the frames of a clip, with the plain sampler's of the same prompt and seed.

    Args:
        model: grades the image, if it can, and knows the edit that was asked for.
        sample: the image.
        reference: the plain sampler's.
        prompt: what was to be drawn.
        number: the prompt's number.
        seed: what it was drawn with.
        steps: of the plain sampler.
        flops: counted operations, where they depend on the image.
    """
    lpips = _lpips()
    pair = (sample.image, reference.image)
    height, width = sample.image.shape[-2:]
    grade = model.grade if prompt in model.prompts else None
    return Measurement(
        prompt=number,
        metrics={
            "prompt": prompt,
            "seed": seed,
            "psnr": metrics.over_frames(metrics.psnr, *pair),
            "ssim": metrics.over_frames(metrics.ssim, *pair),
            "lpips": None if lpips is None else metrics.over_frames(lpips, *pair),
            "flip": metrics.over_frames(metrics.flip, *pair),
            "seconds": sample.seconds,
        }
        | _extra(model, sample, reference, prompt)
        | ({} if flops is None else {"flops": flops}),
        errors=_errors(sample, reference),
        cache_bytes=sample.cache_bytes,
        computed=steps * sample.layer_calls / reference.layer_calls,
        evaluations=sample.layer_calls,
        right=None if grade is None else grade(torch.stack([sample.image]), [prompt])[0],
        size=(int(height), int(width)),
        frames=len(sample.image) if sample.image.ndim == 4 else None,
        flops=flops,
    )


def _extra(model: Subject, sample: Sample, reference: Sample, prompt: str) -> dict[str, Any]:
    """Measurement of a clip, an edit, or a run in planned stages."""
    figures: dict[str, Any] = {}
    if sample.image.ndim == 4 and len(sample.image) > 1:
        figures["temporal_error"] = metrics.temporal_error(sample.image, reference.image)
    if sample.image.ndim == 3:
        figures |= edit_figures(model, prompt, sample.image)
    return figures | ({"plan": sample.plan} if sample.plan else {})


def _errors(sample: Sample, reference: Sample) -> list[float] | None:
    if len(sample.latents) != len(reference.latents):
        return None
    return [metrics.relative_l2(a, b) for a, b in zip(sample.latents, reference.latents, strict=True)]


def save_image(sample: Sample, path: Path) -> None:
    """Write an image as PNG; of a clip, a few frames in a row."""
    image = (to_pil if sample.image.ndim == 3 else film_strip)(sample.image)
    write_atomically(path, lambda file: image.save(file, format="png"))


def image_name(arm: Arm) -> str:
    """Folder of an arm's images."""
    return "".join("_" if sign in ":=/\\+" else sign for sign in arm.id)


def _image_paths(images: Path, arm: Arm, count: int) -> list[str]:
    """An arm's images, relative to the JSON file."""
    return [f"{images.name}/{image_name(arm)}/{i:02d}.png" for i in range(count)]


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 6)


def _median_seconds(own: Sequence[Measurement]) -> float:
    """Median time of an arm's calls."""
    return statistics.median(m.metrics["seconds"] for m in own)


def _top1(own: Sequence[Measurement]) -> float | None:
    """Share of the images that are what their prompt asks for."""
    right = [m.right for m in own if m.right is not None]
    return statistics.fmean(right) if right else None


def _spread(own: Sequence[Measurement], key: str) -> dict[str, float | int | None]:
    return metrics.summary_statistics(m.metrics.get(key) for m in own)


def _errors_per_step(own: Sequence[Measurement]) -> list[float | None] | None:
    """Median over the prompts."""
    known = [m.errors for m in own if m.errors is not None]
    return [_finite(statistics.median(at_step)) for at_step in zip(*known, strict=True)] if known else None


def _identity(arm: Arm) -> dict[str, Any]:
    return {
        "id": arm.id,
        "method": arm.method,
        "library": arm.library,
        "params": arm.params,
        "steps": arm.steps,
        "budget": arm.computed_steps,
        "groups": list(arm.groups or (arm.computed_steps,)),
        "staged": arm.staged,
        "note": arm.note,
    }


def _figures(
    arm: Arm, own: Sequence[Measurement], plain: Sequence[Measurement], steps: int, flops: tuple[int, int], images: Path
) -> dict[str, Any]:
    """The fields that a measured row and the baseline share; see `measured_row`."""
    extra = [key for key in EXTRA if any(key in m.metrics for m in own)]
    spread = {key: _spread(own, key) for key in (*COMPARED, "seconds", *extra)}
    seconds, computed = _median_seconds(own), statistics.fmean(m.computed for m in own)
    held = [m.cache_bytes for m in own if m.cache_bytes is not None]
    nothing = 0 if arm.library == "plain" else None
    own_flops = statistics.fmean([m.flops for m in own if m.flops is not None] or [flops[0]])
    counted, faster = flops[1] / own_flops, _median_seconds(plain) / seconds
    return {
        "computed_steps": round(computed, 4),
        "nfe": round(statistics.fmean(m.evaluations for m in own), 4),
        "flops": round(own_flops),
        "flops_ratio": round(counted, 4),
        "steps_ratio": round(steps / computed, 4),
        "seconds": round(seconds, 6),
        "latency_ratio": round(faster, 4),
        "latency_share": round(faster / counted, 4),
        "cache_bytes": max(held) if held else nothing,
        **{key: _finite(spread[key]["median"]) for key in (*COMPARED, *extra)},
        "top1": _top1(own),
        "spread": spread,
        "error_per_step": None if arm.staged else _errors_per_step(own),
        "per_prompt": [{k: _finite(v) if isinstance(v, float) else v for k, v in m.metrics.items()} for m in own],
        "images": _image_paths(images, arm, len(own)),
    }


def measured_row(
    arm: Arm, own: Sequence[Measurement], plain: Sequence[Measurement], steps: int, flops: tuple[int, int], images: Path
) -> Row:
    """The row of an arm.

    Args:
        arm: what was measured.
        own: its measurements, one per prompt.
        plain: the baseline's.
        steps: of the baseline.
        flops: counted operations of one call of the arm and of the baseline; where they depend on the image, the mean
            over the prompts takes the place of the arm's.
        images: folder of the images.
    """
    return Row(**_identity(arm), **_figures(arm, own, plain, steps, flops, images))


def baseline_row(
    arm: Arm, plain: Sequence[Measurement], flops: int, images: Path, vae: Sequence[float | None]
) -> Baseline:
    """The row of the plain sampler with all its steps, which nothing is compared with.

    Args:
        arm: the plain sampler.
        plain: its measurements.
        flops: counted operations of one call.
        images: folder of the images.
        vae: `psnr_unedited` of each prompt after the way through the VAE alone; none for other models.
    """
    figures = _figures(arm, plain, plain, arm.steps, (flops, flops), images)
    figures |= dict.fromkeys(COMPARED) | {"error_per_step": None}
    return Baseline(**_identity(arm), **figures, psnr_unedited_vae=metrics.summary_statistics(vae)["median"])


def failed_row(arm: Arm, error: str) -> Row:
    """The row of an arm that could not run: no figures, and why."""
    return Row(**_identity(arm), failed=error)
