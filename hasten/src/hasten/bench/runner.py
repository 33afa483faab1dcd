"""`hasten bench`: runs every arm on every prompt, interleaved, and writes what it measured as JSON and pictures.

All arms see the same prompts and seeds in one process; for each prompt the arms take turns in a rotating order, so
that the machine's drift hits all alike. The reference of every quality figure is the plain sampler's picture of the
same prompt and seed in the same run.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import hasten
from hasten import zoo
from hasten.bench import metrics
from hasten.bench.arms import Arm, method_arms, plain_arms
from hasten.bench.schema import SCHEMA
from hasten.bench.sheet import to_pil
from hasten.errors import ConfigError, ModelError, unknown
from hasten.files import write_whole
from hasten.zoo import ReferenceModel

__all__ = ["BenchSettings", "environment", "open_model", "run_bench"]

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class BenchSettings:
    """What to measure.

    Args:
        methods: as `parse_method` reads them.
        full_steps: numbers of full steps.
        prompts: how many prompts (the model's first ones, or those of `prompt_list`).
        prompt_list: own prompts instead of the model's.
        seed: prompt `i` is drawn with seed `seed + i`.
        steps: steps of the baseline and of every cached method.
        call: further arguments of the pipeline's call, such as `true_cfg_scale`.
    """

    methods: tuple[str, ...] = ("reuse", "taylorseer", "hicache", "foca")
    full_steps: tuple[int, ...] = (12, 9, 7)
    prompts: int = 16
    prompt_list: tuple[str, ...] = ()
    seed: int = 0
    steps: int = 50
    call: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prompts < 1:
            raise ConfigError(f"--prompts must be at least 1, got {self.prompts}")
        if not self.methods or not self.full_steps:
            raise ConfigError("give at least one method and one number of full steps")


@dataclass
class _Shot:
    """One picture of one arm."""

    picture: Tensor
    latents: list[Tensor]
    seconds: float
    cache_bytes: int


def open_model(name: str, *, dtype: torch.dtype | None = None, device: str | None = None) -> ReferenceModel:
    """A reference model by name, or any diffusers pipeline by folder or hub id.

    Raises:
        UnknownNameError: if the name is neither a reference model, nor a folder, nor of the form `owner/model`.
        ModelError: if the pipeline cannot be loaded.
    """
    if name in zoo.names():
        model = zoo.load(name)
    elif Path(name).is_dir() or "/" in name:
        try:
            pipe = diffusers.DiffusionPipeline.from_pretrained(name, torch_dtype=dtype or torch.bfloat16)
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot load the pipeline {name!r}: {error}") from error
        prompts = [
            "a red apple on a wooden table",
            "a lighthouse at dusk",
            "a cat reading a newspaper",
            "a bowl of ramen",
        ]
        model = ReferenceModel(name=name, pipe=pipe, prompts=prompts)
    else:
        raise unknown("model", name, zoo.names())
    model.pipe.set_progress_bar_config(disable=True)
    if device is not None:
        model.pipe.to(device)
    return model


def _sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _shoot(model: ReferenceModel, arm: Arm, prompt: str, seed: int, call: dict[str, Any]) -> _Shot:
    latents: list[Tensor] = []

    def keep(_pipe: Any, _step: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        latents.append(kwargs["latents"])
        return kwargs

    arguments = {**model.call, **call, "num_inference_steps": arm.steps, "output_type": "pt"}
    generator = torch.Generator("cpu").manual_seed(seed)
    with arm.attach(model.pipe) as acceleration:
        _sync()
        started = time.perf_counter()
        pictures = model.pipe(prompt, generator=generator, callback_on_step_end=keep, **arguments).images
        _sync()
        seconds = time.perf_counter() - started
        held = acceleration.summary().cache_bytes if acceleration is not None else 0
    return _Shot(pictures[0].float().cpu(), [x.float().cpu() for x in latents], seconds, held)


def _flops(model: ReferenceModel, arm: Arm, prompt: str, seed: int, call: dict[str, Any]) -> int:
    """Counted operations of one whole call (matrix products, attention); also the arm's warm-up."""
    with FlopCounterMode(display=False) as counter:
        _shoot(model, arm, prompt, seed, call)
    return int(counter.get_total_flops())


def _device() -> str:
    if torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"cpu: {name}, {torch.get_num_threads()} threads"


def environment() -> dict[str, str]:
    """Versions and device, as every result states them."""
    return {
        "hasten": hasten.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "device": _device(),
    }


def _save(picture: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil(picture).save(path)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 6)


def _top1(model: ReferenceModel, shots: list[_Shot], prompts: list[str]) -> float | None:
    if model.grade is None:
        return None
    return statistics.fmean(model.grade(torch.stack([shot.picture for shot in shots]), prompts))


def run_bench(
    model: ReferenceModel, settings: BenchSettings, out: Path, progress: Progress | None = None
) -> dict[str, Any]:
    """Measure and write `out` (JSON) and a folder of pictures beside it; returns the JSON's content.

    Args:
        model: from `open_model`.
        settings: what to measure.
        out: path of the JSON file; pictures go to `<stem>.images/`.
        progress: called with (done, total, label) as the work goes on.
    """
    available = list(settings.prompt_list) or model.prompts
    if settings.prompts > len(available):
        raise ConfigError(f"--prompts {settings.prompts} asks for more than the {len(available)} prompts there are")
    prompts = available[: settings.prompts]
    methods = method_arms(list(settings.methods), list(settings.full_steps), settings.steps)
    counts = list(dict.fromkeys(arm.full_steps for arm in methods))
    (plain,) = plain_arms([settings.steps], ("euler",))
    baseline = replace(plain, id="baseline")
    arms = [baseline, *plain_arms(counts), *methods]
    arms = list({arm.id: arm for arm in arms}.values())  # two requests may come to the same schedule
    total = len(arms) * (len(prompts) + 1)
    done = 0

    def tick(label: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total, label)

    flops: dict[str, int] = {}
    for arm in arms:
        flops[arm.id] = _flops(model, arm, prompts[0], settings.seed, settings.call)
        tick(f"warm-up: {arm.id}")

    shots: dict[str, list[_Shot]] = {arm.id: [] for arm in arms}
    for i, prompt in enumerate(prompts):
        turn = i % len(arms)
        for arm in arms[turn:] + arms[:turn]:
            shots[arm.id].append(_shoot(model, arm, prompt, settings.seed + i, settings.call))
            tick(f"{prompt}: {arm.id}")

    images = out.parent / f"{out.stem}.images"
    for arm in arms:
        for i, shot in enumerate(shots[arm.id]):
            _save(shot.picture, images / _file_name(arm.id) / f"{i:02d}.png")

    lpips = metrics.Lpips() if metrics.Lpips.available() else None
    seconds = statistics.median(shot.seconds for shot in shots["baseline"])
    rows = []
    for arm in arms[1:]:
        own = shots[arm.id]
        per_prompt = [
            _per_prompt(shot, reference, prompt, settings.seed + i, lpips)
            for i, (shot, reference, prompt) in enumerate(zip(own, shots["baseline"], prompts, strict=True))
        ]
        spread = {
            key: metrics.summary_statistics(p[key] for p in per_prompt)
            for key in ("psnr", "ssim", "lpips", "flip", "seconds")
        }
        own_seconds = statistics.median(shot.seconds for shot in own)
        rows.append(
            {
                "id": arm.id,
                "method": arm.method,
                "library": arm.library,
                "params": arm.params,
                "steps": arm.steps,
                "full_steps": arm.full_steps,
                "flops": flops[arm.id],
                "flops_ratio": round(settings.steps / arm.full_steps, 4),
                "flops_ratio_measured": round(flops["baseline"] / flops[arm.id], 4),
                "seconds": round(own_seconds, 6),
                "latency_ratio": round(seconds / own_seconds, 4),
                "cache_bytes": max(shot.cache_bytes for shot in own),
                **{key: _finite(spread[key]["median"]) for key in ("psnr", "ssim", "lpips", "flip")},
                "top1": _top1(model, own, prompts),
                "spread": spread,
                "error_per_step": _error_per_step(own, shots["baseline"]),
                "per_prompt": [
                    {k: _finite(v) if isinstance(v, float) else v for k, v in p.items()} for p in per_prompt
                ],
                "images": _image_paths(images, arm, len(own)),
                "note": "",
            }
        )
    height, width = shots["baseline"][0].picture.shape[-2:]
    result = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "model": model.name,
        "settings": {
            "prompts": prompts,
            "seed": settings.seed,
            "height": height,
            "width": width,
            "steps": settings.steps,
            "guidance": float(settings.call.get("true_cfg_scale", settings.call.get("guidance_scale", 1.0))),
            "call": settings.call,
        },
        "baseline": {
            "steps": settings.steps,
            "seconds": round(seconds, 6),
            "flops": flops["baseline"],
            "top1": _top1(model, shots["baseline"], prompts),
            "images": _image_paths(images, baseline, len(prompts)),
        },
        "rows": rows,
    }
    write_whole(out, json.dumps(result, indent=1) + "\n")
    return result


def _file_name(arm_id: str) -> str:
    return arm_id.replace(":", "_").replace("=", "_")


def _image_paths(images: Path, arm: Arm, count: int) -> list[str]:
    return [f"{images.name}/{_file_name(arm.id)}/{i:02d}.png" for i in range(count)]


def _per_prompt(shot: _Shot, reference: _Shot, prompt: str, seed: int, lpips: metrics.Lpips | None) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "seed": seed,
        "psnr": metrics.psnr(shot.picture, reference.picture),
        "ssim": metrics.ssim(shot.picture, reference.picture),
        "lpips": None if lpips is None else lpips(shot.picture, reference.picture),
        "flip": metrics.flip(shot.picture, reference.picture),
        "seconds": shot.seconds,
    }


def _error_per_step(own: list[_Shot], reference: list[_Shot]) -> list[float | None] | None:
    """Median over prompts of the latents' relative error after each step; None where the steps do not correspond."""
    if len(own[0].latents) != len(reference[0].latents):
        return None
    steps = range(len(own[0].latents))
    pairs = list(zip(own, reference, strict=True))
    return [
        _finite(statistics.median(metrics.relative_l2(a.latents[s], b.latents[s]) for a, b in pairs)) for s in steps
    ]
