"""How often `sprites-wan` shows what its caption asks for, on captions that it was not trained on.

    python -m hasten_zoo.sprites_wan.evaluate --prompts 48

Draws each caption with 50 plain steps. Writes `evaluation.json` and `contact_sheet.png` (a row of five frames for each
of the first captions) beside the model's card, or into `--out`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from hasten.bench.sheet import image_grid
from hasten.bench.subject import Subject
from torch import Tensor

from hasten_zoo.evaluation import write_evaluation
from hasten_zoo.sprites_wan import WEIGHTS, load_sprites_wan

__all__ = ["draw_clips", "evaluate"]

BATCH, SHEET_CLIPS, SHEET_FRAMES = 8, 24, 5


def draw_clips(model: Subject, prompts: list[str], seed: int, **call: object) -> Tensor:
    """Videos `[B, F, 3, 48, 48]` in [0, 1]; every caption has its own seed, `seed` and following."""
    videos = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        videos.append(model.pipe(batch, generator=generators, output_type="pt", **model.call | call).frames)
    return torch.cat(videos)


def evaluate(weights: Path, prompts: int, steps: int, seed: int, out: Path, guidance: float) -> dict[str, object]:
    """Draw, compare, write; returns what `evaluation.json` holds."""
    model = load_sprites_wan(weights)
    model.pipe.set_progress_bar_config(disable=True)
    assert model.grade is not None
    chosen = model.prompts[:prompts]
    videos = draw_clips(model, chosen, seed, num_inference_steps=steps, guidance_scale=guidance)
    right = model.grade(videos, chosen)
    result: dict[str, object] = {
        "prompts": len(chosen),
        "steps": steps,
        "seed": seed,
        "guidance_scale": guidance,
        "right": round(sum(right) / len(right), 3),
        "wrong": [prompt for ok, prompt in zip(right, chosen, strict=True) if not ok],
    }
    shown = torch.linspace(0, videos.shape[1] - 1, SHEET_FRAMES).long()
    frames = videos[:SHEET_CLIPS, shown].flatten(0, 1)
    sheet = image_grid(frames, columns=3 * SHEET_FRAMES)
    write_evaluation(out, result, sheet)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=WEIGHTS.parent)
    args = parser.parse_args()
    print(json.dumps(evaluate(args.weights, args.prompts, args.steps, args.seed, args.out, args.guidance), indent=1))
