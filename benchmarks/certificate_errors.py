"""Real errors per request, for the simulation of certificates (`certificates.py`): every setting on the same requests.

python benchmarks/certificate_errors.py     writes benchmarks/certificate-errors.json; the same command goes on after a
                                            stop, with the requests that are missing
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hasten.bench.arms import Accelerated, Solved
from hasten.bench.environment import environment
from hasten.bench.requests import parse_request
from hasten.bench.sampling import Attach, call_arguments, plain
from hasten.bench.subject import Subject, open_model
from hasten.io import write_atomically
from hasten.quality.metrics import PSNR_CEILING, Lpips, psnr

OUT = Path(__file__).with_name("certificate-errors.json")
STEPS = 50
# By cost, the most expensive first.
SETTINGS = (
    *(f"foca:schedule=even:computed_steps={count}" for count in (25, 16, 12, 9, 7, 6, 5, 4)),
    *(f"hicache:schedule=even:computed_steps={count}" for count in (12, 9, 7)),
    *(f"leap-{count}" for count in (12, 9, 7, 5)),
)


def draw(model: Subject, attach: Attach, steps: int, prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
    """Images `[B, 3, H, W]` in [0, 1]; each has a generator of its own."""
    arguments = call_arguments(model, list(prompts), {}) | {"num_inference_steps": steps, "output_type": "pt"}
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    with attach(model.pipe):
        return model.pipe(prompt=list(prompts), generator=generators, **arguments).images.float().cpu()


def attached(model: Subject, setting: str) -> tuple[Attach, int]:
    """How to switch a setting on, and the steps to call the pipeline with."""
    if setting.startswith("leap-"):
        count = int(setting.removeprefix("leap-"))
        return Solved(parse_request("leap").fit(model)), count
    return Accelerated(parse_request(setting).caching), STEPS


def measure(model: Subject, prompts: Sequence[str], seeds: Sequence[int], lpips: Lpips) -> list[dict[str, Any]]:
    """One record per request: prompt, seed, and for each setting PSNR (dB, at most 100) and LPIPS."""
    references = draw(model, plain, STEPS, prompts, seeds)
    records: list[dict[str, Any]] = [
        {"prompt": p, "seed": s, "errors": {}} for p, s in zip(prompts, seeds, strict=True)
    ]
    for setting in SETTINGS:
        attach, steps = attached(model, setting)
        for record, image, reference in zip(
            records, draw(model, attach, steps, prompts, seeds), references, strict=True
        ):
            value = psnr(image, reference)
            record["errors"][setting] = [
                round(PSNR_CEILING if math.isinf(value) else value, 4),
                round(lpips(image, reference), 6),
            ]
    return records


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=490)
    parser.add_argument("--batch", type=int, default=7)
    parser.add_argument("--model", default="emoji-flux")
    given = parser.parse_args()
    model, lpips = open_model(given.model), Lpips()
    known = json.loads(OUT.read_text())["requests"] if OUT.exists() else []
    for first in range(len(known), given.requests, given.batch):
        numbers = range(first, min(first + given.batch, given.requests))
        prompts = [model.prompts[i % len(model.prompts)] for i in numbers]
        known += measure(model, prompts, [5000 + i for i in numbers], lpips)
        head = {"model": model.name, "steps": STEPS, "metrics": ["psnr", "lpips"], "environment": environment()}
        write_atomically(OUT, json.dumps({**head, "requests": known}) + "\n")
        print(f"{len(known)} of {given.requests}", flush=True)


if __name__ == "__main__":
    main()
