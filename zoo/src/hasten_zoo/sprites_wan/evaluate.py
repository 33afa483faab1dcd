"""How often `sprites-wan` shows what its caption asks for, on captions that it was not trained on.

    python -m hasten_zoo.sprites_wan.evaluate                       # all held-out captions, with the model's guidance
    python -m hasten_zoo.sprites_wan.evaluate --bfloat16 --prompts 12 --steps 20 --weights FOLDER --out FOLDER

Generates a clip per caption. A clip is right if in each of five frames, evenly spread from the first to the last, the
nearest sprite is the object, and the way between them is that of the motion up to a twelfth of the side; see
`hasten_zoo.sprites_wan.grade`. Writes `evaluation.json` and `contact_sheet.png` (a row of five frames for each of the
first captions) beside the model's card, or into `--out`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from hasten.bench.sheet import image_grid
from hasten.bench.subject import Subject
from hasten.quality.metrics import psnr
from torch import Tensor

from hasten_zoo.command import at_least_one, told
from hasten_zoo.evaluation import add_folders, curve_with, out_of, write_evaluation
from hasten_zoo.sprites_wan import WEIGHTS, load_sprites_wan, ordered_clips
from hasten_zoo.sprites_wan.data import MOTIONS, OBJECTS
from hasten_zoo.sprites_wan.grade import Verdict, judge

__all__ = ["draw_clips", "evaluate"]

BATCH, SHEET_CLIPS, SHEET_FRAMES = 8, 24, 5
FEW_STEPS, COMPARED = 9, 4  # steps, and captions, of the comparison that tells how hard the model is to sample


def draw_clips(model: Subject, prompts: list[str], seed: int, **call: object) -> Tensor:
    """Videos `[B, F, 3, S, S]` in [0, 1]; every caption has its own seed, `seed` and following."""
    videos = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        videos.append(model.pipe(batch, generator=generators, output_type="pt", **model.call | call).frames)
    return torch.cat(videos)


def _share(answers: list[bool]) -> float:
    return round(sum(answers) / len(answers), 3)


def _figures(prompts: list[str], verdicts: list[Verdict]) -> dict[str, Any]:
    """What verdicts come to, together and by object and motion."""
    right = [verdict.object and verdict.motion for verdict in verdicts]
    clips = {clip.caption: clip for clip in ordered_clips()}
    result: dict[str, Any] = {
        "right": _share(right),
        "right_object": _share([verdict.object for verdict in verdicts]),
        "right_motion": _share([verdict.motion for verdict in verdicts]),
        "psnr_to_nearest_sprite": round(float(torch.tensor([verdict.psnr for verdict in verdicts]).median()), 2),
    }
    for name, words, part in (("right_by_object", OBJECTS, "item"), ("right_by_motion", MOTIONS, "motion")):
        groups: dict[str, list[bool]] = {}
        for prompt, answer in zip(prompts, right, strict=True):
            groups.setdefault(words[getattr(clips[prompt], part)], []).append(answer)
        result[name] = {word: _share(answers) for word, answers in sorted(groups.items())}
    result["wrong"] = [prompt for ok, prompt in zip(right, prompts, strict=True) if not ok]
    return result


def evaluate(
    weights: Path,
    prompts: int,
    steps: int,
    seed: int,
    out: Path,
    guidance: float | None = None,
    bfloat16: bool = False,
) -> dict[str, Any]:
    """Generate, judge, write; returns what `evaluation.json` holds. Without `guidance` the model's own is used.

    Raises:
        ModelError: if the weights are missing or damaged.
    """
    model = load_sprites_wan(weights)
    model.pipe.set_progress_bar_config(disable=True)
    guidance = float(model.call["guidance_scale"]) if guidance is None else guidance
    clips = ordered_clips()[:prompts]
    chosen = [clip.caption for clip in clips]
    call = {"num_inference_steps": steps, "guidance_scale": guidance}
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        videos = draw_clips(model, chosen, seed, **call).float()
        few = draw_clips(model, chosen[:COMPARED], seed, **call | {"num_inference_steps": FEW_STEPS}).float()
    position = weights / "training.json"
    result: dict[str, Any] = {
        "trained_on_samples": json.loads(position.read_text())["samples"] if position.is_file() else None,
        "prompts": len(chosen),
        "held_out": sum(clip.held_out for clip in clips),
        "steps": steps,
        "seed": seed,
        "guidance_scale": guidance,
        "products": "bfloat16" if bfloat16 else "float32",
    }
    result |= _figures(chosen, [judge(clip, video) for clip, video in zip(clips, videos, strict=True)])
    pairs = zip(few, videos[:COMPARED], strict=True)
    decibels = [psnr(a.transpose(0, 1).flatten(1, 2), b.transpose(0, 1).flatten(1, 2)) for a, b in pairs]
    result["psnr_9_steps"] = round(float(torch.tensor(decibels).median()), 2)
    about = ("trained_on_samples", "prompts", "held_out", "steps", "seed", "guidance_scale", "products")
    row = {name: result[name] for name in (*about, "right", "right_object", "right_motion")}
    result["curve"] = curve_with(out, row, about)
    shown = torch.linspace(0, videos.shape[1] - 1, SHEET_FRAMES).long()
    frames = videos[:SHEET_CLIPS, shown].flatten(0, 1)
    write_evaluation(out, result, image_grid(frames, columns=3 * SHEET_FRAMES))
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser, WEIGHTS)
    parser.add_argument("--prompts", type=at_least_one, default=86, help="captions, the held-out ones first")
    parser.add_argument("--steps", type=at_least_one, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, help="default: the model's")
    parser.add_argument("--bfloat16", action="store_true", help="matrix products in bfloat16, for a quick look")
    parser.add_argument("--threads", type=at_least_one, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    found = evaluate(args.weights, args.prompts, args.steps, args.seed, out_of(args), args.guidance, args.bfloat16)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    told(main)
