"""How good `emoji-styles` is, against the true images.

    python -m hasten_zoo.emoji_styles.evaluate --data runs/emoji-styles/data
    python -m hasten_zoo.emoji_styles.evaluate --curve MILESTONE MILESTONE ...     # weights folders

Needs the images (`data.py`) and the judge's networks. Writes `evaluation.json` and `contact_sheet.webp`, by default
beside the card. What is measured:

- *held out*, *known*: images of pairs that were held out or trained on, generated with guidance; how often the judge
  finds the concept and the style of the caption, and what it finds in the true images (its ceiling);
- *diversity*: LPIPS between two seeds of a caption without style, against that between different captions;
- *near copies*: generated images that hardly differ (LPIPS) from an image that was trained on;
- *hardness*: PSNR of 9 plain Euler steps against 50, of the same seed;
- *round trip*: PSNR of held-out images through the autoencoder.

`--curve` measures what can be measured from few images (held-out pairs recognised, diversity, hardness) for weights of
several moments of the training, and adds a row for each to the `curve` in `evaluation.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from hasten.io import write_atomically
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hasten_zoo.command import at_least_one, told
from hasten_zoo.emoji_styles import HERE, WEIGHTS
from hasten_zoo.emoji_styles.augment import caption, nearest_views, plain_views, render
from hasten_zoo.emoji_styles.data import EmojiStyles, Pair, load_emoji_styles_data
from hasten_zoo.emoji_styles.judge import Judge
from hasten_zoo.emoji_styles.model import load_pipeline
from hasten_zoo.emoji_styles.perceptual import Perceptual
from hasten_zoo.emoji_styles.train_vae import round_trip
from hasten_zoo.evaluation import FIGURES, add_folders, curve_of, curve_with, out_of, write_evaluation

BATCH = 16
SIZE = 128
NEAR_COPY = 0.08  # LPIPS; a round trip through the autoencoder, shifted by two pixels, is about this far
CANDIDATES = 8  # training images compared by LPIPS, those nearest in coarse pixels


def generate(
    pipe: FluxPipeline, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float, size: int = SIZE
) -> Tensor:
    """Images `[B, 3, R, R]` in [-1, 1], each from its own seed."""
    images = []
    for start in range(0, len(prompts), BATCH):
        part = list(prompts[start : start + BATCH])
        noise = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + BATCH]]
        call: dict[str, Any] = {"height": size, "width": size, "num_inference_steps": steps, "output_type": "pt"}
        if guidance != 1:
            call |= {"true_cfg_scale": guidance, "negative_prompt": [""] * len(part)}
        images.append(pipe(part, generator=noise, **call).images)
    return torch.cat(images) * 2 - 1


def through(pipe: FluxPipeline, images: Tensor) -> Tensor:
    """Images `[B, 3, R, R]` in [-1, 1] after the autoencoder."""
    vae = pipe.vae
    parts = [vae.decode(vae.encode(part, return_dict=False)[0], return_dict=False)[0] for part in images.split(BATCH)]
    return torch.cat(parts).clamp(-1, 1)


def psnr(first: Tensor, second: Tensor) -> list[float]:
    """PSNR in dB of each of two batches `[B, 3, R, R]` in [-1, 1]."""
    decibels: list[float] = (-10 * ((first - second) / 2).square().mean((1, 2, 3)).log10()).tolist()
    return decibels


def recognised(judge: Judge, images: Tensor, pairs: Sequence[Pair]) -> dict[str, float]:
    """Shares of images in which the judge finds the concept (also without knowing held-out images), style, and both."""
    styles, concepts = judge(images)
    blind = judge.from_training_pairs(images)
    style = [found == pair.style for found, pair in zip(styles, pairs, strict=True)]
    concept = [found == pair.concept for found, pair in zip(concepts, pairs, strict=True)]
    both = [a and b for a, b in zip(style, concept, strict=True)]
    strict = [found == pair.concept for found, pair in zip(blind, pairs, strict=True)]
    shares = {"concept_top1": concept, "concept_top1_blind": strict, "style_top1": style, "both": both}
    return {name: round(sum(hits) / len(hits), 3) for name, hits in shares.items()}


def diversity(pipe: FluxPipeline, lpips: Perceptual, concepts: Sequence[str], steps: int, guidance: float) -> Any:
    """Median LPIPS between two seeds of a caption without style, and between different captions."""
    seeds = list(range(len(concepts)))
    first = generate(pipe, concepts, seeds, steps, guidance)
    second = generate(pipe, concepts, [seed + 10_000 for seed in seeds], steps, guidance)
    within = float(lpips(first, second).median())
    between = float(lpips(first, second.roll(len(concepts) // 2, 0)).median())  # neighbours are alike: they are sorted
    medians = {"two_seeds": round(within, 4), "two_captions": round(between, 4)}
    return medians | {"ratio": round(within / between, 3), "captions": len(concepts)}


def near_copies(data: EmojiStyles, lpips: Perceptual, images: Tensor) -> tuple[list[float], Tensor]:
    """LPIPS of each image to the nearest training image (either way round), and those images `[B, 3, R, R]`."""
    rows = data.taught(held_out=False)
    coarse = []
    for part in rows.split(256):
        small = F.avg_pool2d(render(data, part, plain_views(len(part)), 64), 4)
        coarse.append(torch.stack([small.flatten(1), small.flip(-1).flatten(1)], 1))
    known = torch.cat(coarse).flatten(0, 1)  # two orientations per row
    distances, nearest = [], []
    for image in images:
        own = F.avg_pool2d(image[None], SIZE // 16).flatten(1)
        chosen = (known - own).square().sum(1).topk(CANDIDATES, largest=False).indices
        candidates = render(data, rows[chosen // 2], plain_views(CANDIDATES), SIZE)
        candidates = torch.where((chosen % 2 == 1)[:, None, None, None], candidates.flip(-1), candidates)
        distance = lpips(image[None].expand_as(candidates), candidates)
        distances.append(float(distance.min()))
        nearest.append(candidates[distance.argmin()])
    return distances, torch.stack(nearest)


def sheet(rows: Sequence[Tensor], columns: int) -> Image.Image:
    """Batches `[B, 3, R, R]` in [-1, 1], one beneath the other, in rows of a number of columns."""
    strips = []
    for batch in rows:
        blank = -(-len(batch) // columns) * columns - len(batch)
        full = torch.cat([batch, batch.new_ones(blank, *batch.shape[1:])])
        strips.append(full.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1))
    pixels = ((torch.cat(strips).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.numpy()))


def spread(rows: Tensor, count: int) -> Tensor:
    """`count` of the rows, the same every time, in no order of the data."""
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(7))[:count]]


def diversity_of(pipe: FluxPipeline, lpips: Perceptual, data: EmojiStyles, steps: int, guidance: float) -> Any:
    """`diversity` for the concepts of 32 known pairs."""
    concepts = sorted({data.pairs[i].concept for i in spread(data.taught(held_out=False), 32).tolist()})
    return diversity(pipe, lpips, concepts, steps, guidance)


def hardness(pipe: FluxPipeline, data: EmojiStyles, guidance: float) -> float:
    """Median PSNR in dB of 9 plain Euler steps to 50 steps, for captions of 32 known pairs."""
    prompts = [caption(data.pairs[i]) for i in spread(data.taught(held_out=False), 32).tolist()]
    few, many = (generate(pipe, prompts, list(range(len(prompts))), n, guidance) for n in (9, 50))
    return round(statistics.median(psnr(few, many)), 2)


@torch.inference_mode()
def moment(weights: Path, data: EmojiStyles, judge: Judge, images: int, steps: int, guidance: float) -> dict[str, Any]:
    """The row of the curve for one weights folder."""
    pipe = load_pipeline(weights)
    pipe.set_progress_bar_config(disable=True)
    rows = spread(data.taught(held_out=True), images).tolist()
    pairs = [data.pairs[i] for i in rows]
    drawn = generate(pipe, [caption(pair) for pair in pairs], list(range(len(pairs))), steps, guidance)
    row = {"samples": json.loads((weights / "training.json").read_text())["samples"], "images": len(pairs)}
    row["of"] = len(data.taught(held_out=True))  # pairs; rows of others cannot be compared with these
    row |= {"steps": steps, "guidance": guidance} | recognised(judge, drawn, pairs)
    row["diversity"] = diversity_of(pipe, Perceptual(), data, steps, guidance)["ratio"]
    return row | {"euler_9_against_50_steps_db": hardness(pipe, data, guidance)}


def add_to_curve(out: Path, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Put a row into the curve of `evaluation.json`, in the place of the same measurement; returns the curve."""
    path = out / FIGURES
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    result["curve"] = curve_with(out, row, ("samples", "images", "of", "steps", "guidance"))
    write_atomically(path, json.dumps(result, indent=1) + "\n")
    return list(result["curve"])


@torch.inference_mode()
def evaluate(weights: Path, data: EmojiStyles, out: Path, images: int, steps: int, guidance: float) -> dict[str, Any]:
    """Generate, measure, write; returns what `evaluation.json` holds."""
    pipe = load_pipeline(weights)
    pipe.set_progress_bar_config(disable=True)
    judge, lpips = Judge.load(HERE), Perceptual()
    position = json.loads((weights / "training.json").read_text())
    result: dict[str, Any] = {
        "trained_on_samples": position["samples"],
        "images": {},
        "steps": steps,
        "guidance": guidance,
        "judge": judge.description,
    }
    shown: dict[str, Tensor] = {}
    for kind in ("held_out", "known"):
        rows = spread(data.taught(held_out=kind == "held_out"), images)
        pairs = [data.pairs[i] for i in rows.tolist()]
        result["images"][kind] = len(pairs)  # there may be fewer than are asked for
        true = render(data, rows, plain_views(len(rows)), SIZE)
        drawn = generate(pipe, [caption(pair) for pair in pairs], list(range(len(pairs))), steps, guidance)
        views = nearest_views(drawn, true, [pair.mirror for pair in pairs])
        distances, nearest = near_copies(data, lpips, torch.cat([drawn, true]))
        of_drawn, of_true = distances[: len(drawn)], distances[len(drawn) :]
        result[kind] = {
            "generated": recognised(judge, drawn, pairs),
            "true_images": recognised(judge, true, pairs),
            "true_images_after_round_trip": recognised(judge, through(pipe, true), pairs),
            "lpips_to_true_image": round(float(lpips(drawn, views).median()), 4),
            "db_to_true_image": round(statistics.median(psnr(drawn, views)), 2),
            "near_copies": sum(distance < NEAR_COPY for distance in of_drawn),
            "true_images_that_are_near_copies": sum(distance < NEAR_COPY for distance in of_true),
            "lpips_to_nearest_training_image": round(statistics.median(of_drawn), 4),
        }
        shown |= {kind: drawn, f"{kind}/true": true, f"{kind}/nearest": nearest[: len(drawn)]}
    result["near_copy_below_lpips"] = NEAR_COPY
    result["diversity"] = diversity_of(pipe, lpips, data, steps, guidance)
    for scale in (1.0, guidance):
        result[f"euler_9_against_50_steps_db_guidance_{scale:g}"] = hardness(pipe, data, scale)
    result["round_trip_db"] = {str(n): round(float(round_trip(pipe.vae, data, n)[0].mean()), 2) for n in (64, 128, 192)}
    seeds_of_one = generate(pipe, ["red apple"] * 12, list(range(12)), steps, guidance)
    rows_shown = [shown[name][:12] for name in ("held_out", "held_out/true", "known", "known/nearest")]
    page = sheet([*rows_shown, seeds_of_one], columns=12)
    if curve := curve_of(out):
        result["curve"] = curve
    write_evaluation(out, result, page, "webp")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/emoji-styles/data"))
    add_folders(parser, WEIGHTS)
    parser.add_argument("--images", type=at_least_one, default=200, help="of held-out pairs and of known ones, at most")
    parser.add_argument("--steps", type=at_least_one, default=50)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--curve", type=Path, nargs="+", metavar="WEIGHTS", help="only add these to the curve")
    parser.add_argument("--threads", type=at_least_one, default=1)
    args = parser.parse_args()
    for folder in args.curve or [args.weights]:
        if not (folder / "training.json").is_file():
            parser.error(f"no weights in {folder}: name a folder that the training script's --export wrote")
    torch.set_num_threads(args.threads)
    data = load_emoji_styles_data(args.data)
    if args.curve:
        judge = Judge.load(HERE)
        for weights in args.curve:
            row = moment(weights, data, judge, args.images, args.steps, args.guidance)
            add_to_curve(out_of(args), row)
            print(json.dumps(row))
        return
    result = evaluate(args.weights, data, out_of(args), args.images, args.steps, args.guidance)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    told(main)
