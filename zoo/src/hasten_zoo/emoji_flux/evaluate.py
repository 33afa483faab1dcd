"""How often `emoji-flux` draws what its prompt asks for.

    python -m hasten_zoo.emoji_flux.evaluate --prompts 100

Draws each prompt with 50 plain steps at both resolutions and asks which training image is nearest (mean squared
error over pixels). Writes `evaluation.json` and `contact_sheet.png` beside the weights' card, or into `--out`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from hasten.bench.sheet import image_grid
from hasten.quality.metrics import psnr
from rich.progress import track

from hasten_zoo.command import at_least_one, told
from hasten_zoo.emoji_flux import WEIGHTS, load_emoji_flux, nearest_captions
from hasten_zoo.emoji_flux.data import load_emoji_set
from hasten_zoo.evaluation import add_folders, out_of, write_evaluation

BATCH = 10


def evaluate(weights: Path, prompts: int, steps: int, seed: int, out: Path) -> dict[str, object]:
    """Draw, compare, write; returns what `evaluation.json` holds."""
    model = load_emoji_flux(weights)
    model.pipe.set_progress_bar_config(disable=True)
    data = load_emoji_set()
    chosen = model.prompts[:prompts]
    result: dict[str, object] = {"prompts": len(chosen), "captions": len(data.captions), "steps": steps, "seed": seed}
    for resolution in (32, 64):
        drawn = []
        batches = [chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH)]
        for batch in track(batches, description=f"{resolution}x{resolution}"):
            call = model.call | {"height": resolution, "width": resolution, "num_inference_steps": steps}
            generators = [torch.Generator().manual_seed(seed + chosen.index(prompt)) for prompt in batch]
            drawn.append(model.pipe(batch, generator=generators, output_type="pt", **call).images)
        images = torch.cat(drawn)
        nearest = nearest_captions(images)
        own = data.at(resolution)[[data.captions.index(prompt) for prompt in chosen]]
        distances = [psnr(a, b) for a, b in zip(images, own, strict=True)]
        result[f"{resolution}x{resolution}"] = {
            "top1": sum(a == b for a, b in zip(nearest, chosen, strict=True)) / len(chosen),
            "median_psnr_to_own_training_image": round(float(torch.tensor(distances).median()), 2),
            "mistaken": [
                f"{prompt} -> {found}" for prompt, found in zip(chosen, nearest, strict=True) if prompt != found
            ],
        }
    sheet = image_grid(images, columns=10)
    write_evaluation(out, result, sheet)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser, WEIGHTS)
    parser.add_argument("--prompts", type=at_least_one, default=100)
    parser.add_argument("--steps", type=at_least_one, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(json.dumps(evaluate(args.weights, args.prompts, args.steps, args.seed, out_of(args)), indent=1))


if __name__ == "__main__":
    told(main)
