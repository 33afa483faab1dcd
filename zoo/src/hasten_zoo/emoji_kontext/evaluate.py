"""How often `emoji-kontext` does what its instruction asks for, on compositions that it was not trained on.

    python -m hasten_zoo.emoji_kontext.evaluate --edits 64

Applies each held-out edit with 50 plain steps at both resolutions. Writes `evaluation.json` and `contact_sheet.png`
(columns of source, target and result) beside the model's card, or into `--out`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from hasten.bench.sheet import image_grid
from hasten.bench.subject import Edit, Subject
from hasten.quality.metrics import psnr
from torch import Tensor
from torch.nn import functional

from hasten_zoo.command import at_least_one, told
from hasten_zoo.emoji_kontext import WEIGHTS, call_arguments, load_emoji_kontext
from hasten_zoo.evaluation import add_folders, out_of, write_evaluation

__all__ = ["apply_edits", "evaluate"]

BATCH = 8


def apply_edits(model: Subject, edits: list[Edit], side: int, steps: int, seed: int) -> Tensor:
    """The pipeline's answers `[B, 3, side, side]` in [0, 1]; every edit has its own seed, `seed` and following."""
    results = []
    call = call_arguments(side) | {"num_inference_steps": steps}
    for start in range(0, len(edits), BATCH):
        batch = edits[start : start + BATCH]
        sources = functional.avg_pool2d(torch.stack([edit.source for edit in batch]), 64 // side)
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        prompts = [edit.prompt for edit in batch]
        results.append(model.pipe(sources, prompts, generator=generators, output_type="pt", **call).images)
    return torch.cat(results)


def evaluate(
    weights: Path, edits: int, steps: int, seed: int, out: Path, sides: tuple[int, ...] = (32, 64)
) -> dict[str, object]:
    """Edit, compare, write; returns what `evaluation.json` holds."""
    model = load_emoji_kontext(weights)
    model.pipe.set_progress_bar_config(disable=True)
    assert model.grade is not None
    chosen = model.edits[:edits]
    prompts = [edit.prompt for edit in chosen]
    result: dict[str, object] = {"edits": len(chosen), "steps": steps, "seed": seed}
    for side in sides:
        images = apply_edits(model, chosen, side, steps, seed)
        done = model.grade(images, prompts)
        targets = functional.avg_pool2d(torch.stack([edit.target for edit in chosen]), 64 // side)
        distances = [psnr(a, b) for a, b in zip(images, targets, strict=True)]
        shares = {
            kind: round(sum(flags) / len(flags), 3)
            for kind in ("local", "global")
            if (flags := [ok for ok, edit in zip(done, chosen, strict=True) if edit.kind == kind])
        }
        result[f"{side}x{side}"] = {
            "done": shares,
            "median_psnr_to_target": round(float(torch.tensor(distances).median()), 2),
            "failed": [prompt for ok, prompt in zip(done, prompts, strict=True) if not ok],
        }
    sources = functional.avg_pool2d(torch.stack([edit.source for edit in chosen]), 64 // sides[-1])
    triples = torch.stack([sources, targets, images], 1).flatten(0, 1)
    sheet = image_grid(triples, columns=12)
    write_evaluation(out, result, sheet)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser, WEIGHTS)
    parser.add_argument("--edits", type=at_least_one, default=64)
    parser.add_argument("--steps", type=at_least_one, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(json.dumps(evaluate(args.weights, args.edits, args.steps, args.seed, out_of(args)), indent=1))


if __name__ == "__main__":
    told(main)
