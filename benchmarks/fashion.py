"""Methods judged by the distribution of their images: Frechet distance to real ones, at equal computed steps.

    python benchmarks/fashion.py --data runs/fashion-dit/data --json benchmarks/fashion-dit.json

2,000 images of fashion-dit per arm, classes in turn, the same noise for all arms; distances to the 10,000 test images
in the features of the model's own classifier (not FID), precision, recall, and the mean PSNR to the full run. Intervals
are 95 % of a bootstrap over the generated images. The `floor` is what as many real images reach. Arms that the file has
already are left out, so the command goes on where it was stopped. LEAP is learned first, for each guidance, from the
full runs of images that no arm draws (seeds of their own).
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from hasten import fit_leap
from hasten.bench.arms import Accelerated, Solved
from hasten.bench.environment import environment
from hasten.bench.plain import Sampler
from hasten.bench.requests import caching_method
from hasten.calibration import Calibration
from hasten.io import write_atomically
from hasten_zoo.fashion_dit import CLASSES, WEIGHTS
from hasten_zoo.fashion_dit.data import load_fashion_data, scaled
from hasten_zoo.fashion_dit.distances import frechet
from hasten_zoo.fashion_dit.evaluate import Judge, generate
from hasten_zoo.fashion_dit.model import load_pipeline
from rich.progress import track
from torch import Tensor

STEPS = 50
COUNTS = (12, 9, 7, 5)
PLAIN = ("ddim", "unipc", "unipc:lambda", "dpmpp", "dpmpp:lambda", "dpmpp:karras")
CACHES = ("reuse", "taylorseer", "hicache", "foca", "fbcache", "taylorseer:schedule=even", "foca:schedule=even")
LEARNED = 40  # images that LEAP learns from, classes in turn
LEARNED_SEED = 1_000_000
RESAMPLINGS = 200


def learned(pipe: Any, guidance: float) -> Calibration:
    """LEAP for all counts, at one guidance."""
    calls = []
    for start in range(0, LEARNED, len(CLASSES)):
        noise = [torch.Generator().manual_seed(LEARNED_SEED + start + i) for i in range(len(CLASSES))]
        calls.append({
            "class_labels": list(range(len(CLASSES))),
            "guidance_scale": guidance,
            "generator": noise,
            "num_inference_steps": STEPS,
            "output_type": "pt",
        })  # fmt: skip
    return fit_leap(pipe, calls, COUNTS)


def attachment(arm: str, count: int, leap: Calibration | None) -> tuple[Any, int]:
    """What switches an arm on for a pipeline, and the steps of its sampler."""
    if arm == "leap":
        assert leap is not None
        return Solved(leap), count
    if arm == "full":
        return lambda pipe: nullcontext(), STEPS
    if arm in PLAIN:
        solver, _, spacing = arm.partition(":")
        return Sampler("euler" if solver == "ddim" else solver, spacing), count
    return Accelerated(caching_method(arm).with_computed_steps(count, STEPS)), STEPS


def interval(features: Tensor, real: Tensor) -> list[float]:
    """The middle 95 % of Frechet distances of resampled images."""
    random = torch.Generator().manual_seed(0)
    draws = (torch.randint(len(features), (len(features),), generator=random) for _ in range(RESAMPLINGS))
    found = torch.tensor([frechet(features[rows], real) for rows in draws])
    return [round(float(found.quantile(q)), 3) for q in (0.025, 0.975)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/fashion-dit/data"))
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/fashion-dit.json"))
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.5, 4.0])
    parser.add_argument("--arms", nargs="+", default=["leap", *PLAIN, *CACHES])
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = load_fashion_data(args.data)
    judge = Judge(data, args.images)
    pipe = load_pipeline(args.weights)
    pipe.set_progress_bar_config(disable=True)
    found: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {"rows": []}
    found |= {
        "command": "python benchmarks/fashion.py",
        "environment": environment(),
        "images": args.images,
        "floor": judge(scaled(data.train[: args.images]), data.train_labels[: args.images]),
    }
    known = {(row["guidance"], row["arm"], row["computed_steps"]) for row in found["rows"]}
    for guidance in args.guidance:
        wanted = [(arm, count) for count in COUNTS for arm in args.arms]
        missing = [(arm, count) for arm, count in wanted if (guidance, arm, count) not in known]
        if not missing:
            continue
        leap = learned(pipe, guidance) if any(arm == "leap" for arm, _ in missing) else None
        full, labels = generate(pipe, args.images, guidance, STEPS)
        arms = missing if (guidance, "full", STEPS) in known else [("full", STEPS), *missing]
        for arm, count in track(arms, description=f"guidance {guidance:g}"):
            attach, steps = attachment(arm, count, leap)
            started = time.perf_counter()
            with attach(pipe):
                images = full if arm == "full" else generate(pipe, args.images, guidance, steps)[0]
            seconds = time.perf_counter() - started
            row: dict[str, Any] = {"guidance": guidance, "arm": arm, "computed_steps": count, "seconds": seconds}
            if bool(images.isfinite().all()):
                row |= judge(images, labels)
                row["frechet_interval"] = interval(judge.network.of(images), judge.real)
                error = ((images - full) / 2).square().mean((1, 2, 3)).clamp(min=1e-10)
                row["psnr"] = None if arm == "full" else round(float((-10 * error.log10()).mean()), 2)
            else:
                row["failed"] = "values that are not finite"
            found["rows"].append(row)
            write_atomically(args.json, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
