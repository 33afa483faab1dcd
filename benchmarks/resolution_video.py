"""DVG against leaving out pixels alone and frames alone, at one density, clip by clip.

    python benchmarks/resolution_video.py --json benchmarks/resolution-video.json

On 9 latent frames of 8x8 tokens few densities are met by all three; 0.52 is. Settings other than the default were tried
on the clips from number 6 to 9 (`chosen`); the best of them, and the forms of compression, are measured on those from
14 to 23. Figures compare with 50 plain steps from the same noise.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

import torch
from hasten.bench import subject
from hasten.bench.arms import Accelerated
from hasten.bench.environment import environment
from hasten.bench.requests import parse_request
from hasten.bench.sampling import Sample, count_flops, draw_sample, plain
from hasten.io import write_atomically
from hasten.quality.metrics import Lpips, over_frames, psnr, temporal_error
from hasten.resolution.plan import motion, texture
from rich.progress import track

STEPS, CHOSEN, MEASURED = 50, range(6, 10), range(14, 24)
ARMS = ("dvg:budget=0.52", "dvg:budget=0.522:compress=space", "dvg:budget=0.52:compress=time")
BEST = "dvg:budget=0.52:lead=1"  # of what was tried
TRIED = (BEST, "dvg:budget=0.52:rates=0.2/0.35/0.65")


def latents(model: subject.Subject, sample: Sample) -> torch.Tensor:
    """The clip as its latents."""
    clean: torch.Tensor = model.pipe.vae.encode(2 * sample.image.transpose(0, 1)[None] - 1).latents
    return clean


def measured(model: subject.Subject, clips: range, arms: tuple[str, ...]) -> dict[str, Any]:
    """Clips with their motion and texture, and a row for each arm."""
    lpips, prompts = Lpips(), [model.prompts[clip] for clip in clips]
    full = [draw_sample(model, plain, STEPS, prompt, clip, {}) for clip, prompt in zip(clips, prompts, strict=True)]
    base = count_flops(model, plain, STEPS, prompts[0], clips[0], {})[0]
    rows = []
    for text in track(arms):
        attach = Accelerated(None, parse_request(text).resolution)
        samples = [
            draw_sample(model, attach, STEPS, prompt, clip, {}) for clip, prompt in zip(clips, prompts, strict=True)
        ]
        pairs = [(sample.image, reference.image) for sample, reference in zip(samples, full, strict=True)]
        plans = [sample.plan for sample in samples]
        flops = {  # all clips of a plan compute the same
            plan: count_flops(model, attach, STEPS, prompts[plans.index(plan)], clips[plans.index(plan)], {})[0]
            for plan in set(plans)
        }
        rows.append(
            {
                "method": text,
                "flops_ratio": round(base / statistics.fmean(flops[plan] for plan in plans), 4),
                "densities": [float(re.findall(r"density ([\d.]+)", plan)[0]) for plan in plans],
                "plans": plans,
                "psnr": [round(over_frames(psnr, *pair), 4) for pair in pairs],
                "lpips": [round(over_frames(lpips, *pair), 5) for pair in pairs],
                "temporal_error": [round(temporal_error(*pair), 4) for pair in pairs],
            }
        )
    known = [latents(model, sample) for sample in full]
    described = [
        {"prompt": prompt, "motion": round(motion(clip), 3), "texture": round(texture(clip), 4)}
        for prompt, clip in zip(prompts, known, strict=True)
    ]
    return {"clips": described, "rows": rows}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    model = subject.load("sprites-wan")
    model.pipe.set_progress_bar_config(disable=True)
    result = {"environment": environment(), "chosen": measured(model, CHOSEN, ARMS + TRIED)}
    result["measured"] = measured(model, MEASURED, (*ARMS, BEST))
    write_atomically(options.json, json.dumps(result, indent=1) + "\n")
    for part in ("chosen", "measured"):
        for row in result[part]["rows"]:
            print(f"{part} {row['method']:45} {row['flops_ratio']:.3f} {statistics.median(row['psnr']):.2f}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
