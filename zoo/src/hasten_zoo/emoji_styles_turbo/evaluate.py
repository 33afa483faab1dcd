"""How near `emoji-styles-turbo` comes to its teacher, and whether it draws what it is asked for.

    python -m hasten_zoo.emoji_styles_turbo.evaluate

Needs the judge's networks, and no images. Captions of held-out and of known pairs are drawn by the teacher with 50, 8
and 4 guided steps and by the student with 8 and 4 steps without guidance, from the same noise. Measured are distances
to the teacher's 50 steps (medians of PSNR and LPIPS) and how often concept and style are those of the caption.
Writes `evaluation.json` and `contact_sheet.webp` (from above: teacher 50, student 8 and 4, teacher 8 and 4), by default
beside the card.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten_zoo.command import at_least_one, told
from hasten_zoo.emoji_styles import HERE as STYLES
from hasten_zoo.emoji_styles import WEIGHTS as TEACHER
from hasten_zoo.emoji_styles.augment import caption
from hasten_zoo.emoji_styles.evaluate import generate, psnr, recognised, sheet, spread
from hasten_zoo.emoji_styles.judge import Judge
from hasten_zoo.emoji_styles.model import load_pipeline as load_styles
from hasten_zoo.emoji_styles.perceptual import Perceptual
from hasten_zoo.emoji_styles_turbo import WEIGHTS
from hasten_zoo.emoji_styles_turbo.model import load_pipeline
from hasten_zoo.emoji_styles_turbo.train import GUIDANCE
from hasten_zoo.evaluation import add_folders, out_of, write_evaluation

ARMS = (("teacher", 50), ("turbo", 8), ("turbo", 4), ("teacher", 8), ("teacher", 4))
SHOWN = 12


@torch.inference_mode()
def evaluate(weights: Path, teacher: Path, out: Path, images: int) -> dict[str, Any]:
    """Generate, measure, write; returns what `evaluation.json` holds."""
    pipes = {"teacher": load_styles(teacher), "turbo": load_pipeline(weights, teacher)}
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    judge, lpips = Judge.load(STYLES), Perceptual()
    trained = {name: json.loads((folder / "training.json").read_text()) for name, folder in
               (("windows", weights), ("teacher_samples", teacher))}  # fmt: skip
    result: dict[str, Any] = {f"trained_on_{name}": position["samples"] for name, position in trained.items()}
    result |= {"images": {}, "guidance_of_teacher": GUIDANCE, "judge": judge.description}
    rows: list[Tensor] = []
    for kind in ("held_out", "known"):
        chosen = spread(
            torch.tensor([i for i, p in enumerate(judge.pairs) if p.taught and p.held_out == (kind == "held_out")]),
            images,
        )
        pairs = [judge.pairs[i] for i in chosen.tolist()]
        prompts, seeds = [caption(pair) for pair in pairs], list(range(len(pairs)))
        result["images"][kind] = len(pairs)  # there may be fewer than are asked for
        result[kind] = {}
        full: Tensor | None = None
        for name, steps in ARMS:
            drawn = generate(pipes[name], prompts, seeds, steps, GUIDANCE if name == "teacher" else 1.0)
            full = drawn if full is None else full
            arm: dict[str, Any] = {"forwards": steps * (2 if name == "teacher" else 1)}
            arm |= recognised(judge, drawn, pairs)
            if drawn is not full:
                arm["psnr_to_full_db"] = round(statistics.median(psnr(drawn, full)), 2)
                arm["lpips_to_full"] = round(float(lpips(drawn, full).median()), 4)
            result[kind][f"{name}, {steps} steps"] = arm
            rows.append(drawn[:SHOWN])
    page = sheet(rows, columns=SHOWN)
    write_evaluation(out, result, page, "webp")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser, WEIGHTS)
    parser.add_argument("--teacher", type=Path, default=TEACHER)
    parser.add_argument("--images", type=at_least_one, default=100, help="of held-out pairs, and as many of known ones")
    parser.add_argument("--threads", type=at_least_one, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(evaluate(args.weights, args.teacher, out_of(args), args.images), indent=1))


if __name__ == "__main__":
    told(main)
