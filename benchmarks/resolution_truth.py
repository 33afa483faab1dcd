"""Resolution methods, caches and both at equal operations, against what should have been drawn.

    python benchmarks/resolution_truth.py --model emoji-flux --json benchmarks/resolution-truth.json
    python benchmarks/resolution_truth.py --model emoji-kontext --json benchmarks/resolution-truth.json

A method that draws another good image is far from the plain sampler's. The bundled models know one image for a
caption (the one they were trained on), and one for an edit (made by code): figures are distances to it, beside those to
the plain sampler's 50 steps. For emoji-flux there is also what another seed makes of the distance to the full run, and
how far the model's own image at half size is from the mean of its full one, with the low-pass of the same noise.
Each command replaces its model's part of the file. Settings were chosen on prompts from number 32 (emoji-flux) and from
16 (emoji-kontext) on, and are measured on those before.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from arms import STEPS, arm_of, drawn
from hasten.bench import subject
from hasten.bench.edits import edit_figures, edit_of
from hasten.bench.environment import environment
from hasten.io import write_atomically
from hasten.quality.metrics import Lpips, psnr
from hasten.resolution.layouts import PixelLayout
from hasten_zoo.emoji_flux.data import load_emoji_set
from rich.progress import track
from torch import Tensor
from torch.nn import functional

FLOAT = 1e-5
PROMPTS = {"emoji-flux": 16, "emoji-kontext": 12}
EDIT = "specedit:discrepancy=latent:draft={}:mixed={}:final=0:coverage={}"
# What a run saves with, and the arm; `name@n` is a sampler with n steps, or a cache with n computed steps.
ARMS: dict[str, list[tuple[str, str]]] = {
    "emoji-flux": [
        *(("steps", f"euler@{n}") for n in (50, 30, 18, 12, 11, 10, 6, 5, 4)),
        *(("steps", f"unipc@{n}") for n in (11, 6, 5)),
        *(("cache", f"foca:schedule=even@{n}") for n in (10, 6, 5, 4)),
        *(("cache", f"taylorseer:schedule=even@{n}") for n in (6, 5)),
        *(("resolution", f"fresco:preset={n}") for n in ("30", "18", "11", "9")),
        ("resolution", "fresco:stages=6/2/10:shares=0.3"),
        ("resolution", "fresco:preset=18:jump=r1"),
        ("resolution", "ralu:preset=18"),
        *(("resolution", f"spectral:stages={n}") for n in ("6/12", "6/6", "3/4", "3/3")),
        *(("resolution", f"bottleneck:stages={n}") for n in ("9/9", "5/6", "4/5", "4/4", "3/3")),
        ("both", "fresco:preset=30+foca:interval=3:warmup=1"),
        ("both", "fresco:preset=18+foca:interval=2:warmup=1"),
        ("both", "spectral:stages=12/12+foca:interval=4:warmup=1"),
        ("both", "spectral:stages=12/18+foca:interval=5:warmup=1"),
        ("both", "bottleneck:stages=9/9+foca:interval=2:warmup=1"),
        ("both", "bottleneck:stages=9/9+foca:interval=3:warmup=1"),
    ],
    "emoji-kontext": [
        *(("steps", f"euler@{n}") for n in (50, 10, 7, 5, 4, 3)),
        ("steps", "unipc@5"),
        *(("cache", f"foca:schedule=even@{n}") for n in (9, 6, 5, 4, 3)),
        ("resolution", "fresco:preset=18"),
        ("resolution", "spectral:stages=6/12"),
        ("resolution", "bottleneck:stages=9/9"),
        ("resolution", "ralu:preset=18"),
        ("resolution", "specedit:discrepancy=latent"),
        ("resolution", "specedit:discrepancy=latent:restore=false"),
        ("resolution", "specedit:discrepancy=latent:units=lr_units"),
        ("resolution", EDIT.format(8, 8, 4)),
        ("resolution", EDIT.format(8, 8, 3)),
        ("resolution", EDIT.format(7, 5, 3)),
        ("resolution", EDIT.format(6, 4, 3)),
        ("resolution", EDIT.format(4, 3, 3)),
        ("both", "specedit:discrepancy=latent+foca:interval=2:warmup=1"),
        ("both", EDIT.format(18, 14, 3) + "+foca:interval=2:warmup=1"),
        ("both", EDIT.format(14, 11, 3) + "+foca:interval=2:warmup=1"),
        ("both", EDIT.format(12, 8, 3) + "+foca:interval=2:warmup=1"),
        ("both", EDIT.format(12, 9, 3) + "+foca:interval=3:warmup=1"),
    ],
}


def truths(model: subject.Subject, prompts: list[str]) -> list[Tensor]:
    """What should be drawn, `[3, H, W]` in [0, 1] each."""
    edits = [edit_of(model, prompt) for prompt in prompts]
    if model.edits:
        return [edit.target for edit in edits if edit is not None]
    known = load_emoji_set()
    return [known.at(64)[known.captions.index(prompt)] for prompt in prompts]


def kept(model: subject.Subject, prompt: str, image: Tensor) -> float | None:
    """Share of the pixels outside the edit's mask that are the source's to float precision; None where it has none."""
    edit = edit_of(model, prompt)
    assert edit is not None
    same = (image - edit.source).abs().amax(0)[~edit.mask.reshape(image.shape[1:])] < FLOAT
    return float(same.float().mean()) if len(same) else None


def summary(values: list[float | None]) -> dict[str, float]:
    """Mean and median."""
    known = [value for value in values if value is not None]
    return {
        "mean": round(statistics.fmean(known), 4),
        "median": round(statistics.median(known), 4),
    }


def rows(model: subject.Subject, prompts: list[str]) -> list[dict[str, Any]]:
    """A row for each arm; the first is the full run."""
    targets, lpips, found = truths(model, prompts), Lpips(), list[dict[str, Any]]()
    full: list[Tensor] = []
    base: list[int] = []
    for kind, text in track(ARMS[model.name], description=model.name):
        steps = arm_of(text)[1]
        images, flops = drawn(model, text, prompts, {})
        if not found:
            full, base = images, flops
        edits = [edit_figures(model, p, image) for p, image in zip(prompts, images, strict=True)]
        figures: dict[str, list[float | None]] = {
            "truth_psnr": [psnr(*pair) for pair in zip(images, targets, strict=True)],
            "truth_lpips": [lpips(*pair) for pair in zip(images, targets, strict=True)],
            "full_psnr": [None if not found else psnr(*pair) for pair in zip(images, full, strict=True)],
        } | {key: [edit[key] for edit in edits] for key in edits[0]}
        if model.edits:
            figures["unedited_exact"] = [kept(model, *pair) for pair in zip(prompts, images, strict=True)]
        right = None if model.grade is None else model.grade(torch.stack(images), prompts)
        found.append(
            {
                "kind": kind,
                "method": text.partition("@")[0],
                "steps": steps,
                "count": int(text.partition("@")[2] or steps),
                "flops_ratio": round(statistics.fmean(base) / statistics.fmean(flops), 4),
                "top1": None if right is None else round(statistics.fmean(right), 4),
                **{key: summary(values) for key, values in figures.items() if any(v is not None for v in values)},
            }
        )
    return found


def scale(model: subject.Subject, prompts: list[str]) -> dict[str, dict[str, float]]:
    """PSNR in dB between images of other seeds, and between those of two sizes."""
    pixels, side = PixelLayout.of(model.pipe.vae), model.call["height"]
    tokens = side // 4

    def draw(prompt: str, noise: Tensor, size: int) -> Tensor:
        call = model.call | {
            "height": size,
            "width": size,
            "num_inference_steps": STEPS,
            "output_type": "pt",
        }
        image: Tensor = model.pipe(prompt, latents=noise, **call).images[0]
        return image

    def noise_of(count: int, seed: int) -> Tensor:
        return torch.randn(1, count, 48, generator=torch.Generator().manual_seed(seed))

    figures: dict[str, list[float | None]] = {}
    for seed, prompt in enumerate(track(prompts, description="seeds and sizes")):
        noise, paint = noise_of(tokens**2, seed), partial(draw, prompt)
        low = 2 * pixels.shrink(noise, (tokens, tokens))
        one, other = paint(noise, side), paint(noise_of(tokens**2, seed + 1000), side)
        small, elsewhere = (
            paint(low, side // 2),
            paint(noise_of(tokens**2 // 4, seed + 1000), side // 2),
        )
        mean = functional.avg_pool2d(one, 2)
        pairs = {
            "two seeds": (one, other),
            "two seeds at half size": (small, elsewhere),
            "half size, low-pass noise, to the mean of the full run": (small, mean),
            "half size, other noise, to the mean of the full run": (elsewhere, mean),
        }
        for name, pair in pairs.items():
            figures.setdefault(name, []).append(psnr(*pair))
    return {name: summary(values) for name, values in figures.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=ARMS, required=True)
    parser.add_argument("--prompts", type=int, help="how many of the first prompts")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    model = subject.load(options.model)
    model.pipe.set_progress_bar_config(disable=True)
    prompts = model.prompts[: options.prompts or PROMPTS[options.model]]
    part: dict[str, Any] = {"environment": environment(), "prompts": len(prompts)}
    part["rows"] = rows(model, prompts)
    if options.model == "emoji-flux":
        part["scale"] = scale(model, prompts)
    whole = json.loads(options.json.read_text()) if options.json.exists() else {}
    whole[options.model] = part
    write_atomically(options.json, json.dumps({name: whole[name] for name in ARMS if name in whole}, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
