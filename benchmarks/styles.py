"""All kinds of methods on `emoji-styles`, against the full run, the truth and the content: three measures, by name.

    python benchmarks/styles.py --json benchmarks/styles.json
    python benchmarks/styles.py --guidance 1 --json benchmarks/styles-unguided.json
    python benchmarks/styles.py --arms "fresco:preset=18;foca:schedule=even@9" --pairs 16 --json try.json

The prompts are combinations of style and concept that were held out, whose true images are known; prompt `i` is drawn
with seed `i`. For every image there are

- the *distance to the full run* of the same noise (PSNR in dB, LPIPS),
- the *distance to the truth* (LPIPS, and PSNR in dB), the nearest of the views that the caption leaves open,
- the *content*: whether the judge finds the style, and the concept: among all images, and (`blind`) without having seen
  the held-out ones, which finds it in a little more than half of the true images, too (`truth`).

Operations are counted. Beside every arm the plain samplers stand with the smallest number of steps that costs at least
as much, and the best of them, by each measure, is what the arm is compared with: means and 95 % of a paired bootstrap
over the prompts. In the same way Fresco is compared with the nearest Bottleneck and the nearest RALU that cost at least
as much as it does. Every arm is written as soon as it is measured, and the same command goes on where it was cut short.
Needs the images of `hasten_zoo.emoji_styles.data`.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from arms import STEPS, drawn
from hasten.quality.metrics import Lpips, psnr
from hasten_zoo.emoji_styles import HERE, WEIGHTS, load_emoji_styles
from hasten_zoo.emoji_styles.augment import caption, nearest_views, plain_views, render
from hasten_zoo.emoji_styles.data import load_emoji_styles_data
from hasten_zoo.emoji_styles.evaluate import spread
from hasten_zoo.emoji_styles.judge import Judge
from leads import Results, Row, against_plain, rival_leads
from torch import Tensor

SIZE = 128
PLAIN = ("euler", "unipc", "dpmpp", "unipc:spacing=beta", "dpmpp:spacing=beta")
DEFAULT = "hicache:order=1:sigma=0.66:guided_sigma=0.55"  # what `accelerate(pipe)` takes, on even steps
CACHES = ("reuse", "taylorseer:order=1", "hicache", "foca", "freqca", DEFAULT)
ARMS = (
    *(f"fresco:preset={n}" for n in (30, 18, 11, 9)),
    *(f"ralu:preset={n}" for n in (18, 10)),
    *(f"bottleneck:stages={n}" for n in ("15/14", "9/9", "5/6", "4/5")),
    *(f"spectral:stages={n}" for n in ("6/12", "6/6", "3/4")),
    *(f"{cache}:schedule=even@{n}" for n in (12, 9, 7) for cache in CACHES),
    "fresco:preset=18+foca:interval=2:warmup=1",
    "spectral:stages=12/12+foca:interval=4:warmup=1",
)
CONTENT = ("concept", "blind", "style")
HIGHER = {"full_psnr": 1, "full_lpips": -1, "truth_psnr": 1, "truth_lpips": -1} | dict.fromkeys(CONTENT, 1)  # is better


def _alone(method: str, text: str) -> bool:
    """Whether an arm is this method without a cache."""
    return text.startswith(f"{method}:") and "+" not in text


RIVALS = {method: partial(_alone, method) for method in ("bottleneck", "ralu")}  # of Fresco


class Bed:
    """The model, its prompts, and the figures of an arm."""

    def __init__(self, options: argparse.Namespace) -> None:
        data = load_emoji_styles_data(options.data)
        rows = spread(data.rows(held_out=True), options.pairs)
        self.pairs = [data.pairs[i] for i in rows.tolist()]
        self.truth = (render(data, rows, plain_views(len(rows)), SIZE) + 1) / 2
        self.model = load_emoji_styles(options.weights)
        self.model.pipe.set_progress_bar_config(disable=True)
        self.call = {} if options.guidance is None else {"true_cfg_scale": options.guidance}
        self.judge, self.lpips = Judge.load(HERE), Lpips()
        self.full: list[Tensor] = []

    def draw(self, text: str) -> tuple[list[Tensor], list[int]]:
        """Images `[3, 128, 128]` in [0, 1] of all pairs, and the operations that were counted."""
        return drawn(self.model, text, [caption(pair) for pair in self.pairs], self.call)

    def figures(self, images: list[Tensor]) -> dict[str, list[float]]:
        """Of every image, in the order of the prompts."""
        batch = torch.stack(images) * 2 - 1
        (styles, concepts), blind = self.judge(batch), self.judge.from_training_pairs(batch)
        views = (nearest_views(batch, self.truth * 2 - 1, [pair.mirror for pair in self.pairs]) + 1) / 2
        found = {
            "truth_psnr": [psnr(*pair) for pair in zip(images, views, strict=True)],
            "truth_lpips": [self.lpips(*pair) for pair in zip(images, views, strict=True)],
            "concept": [float(a == pair.concept) for a, pair in zip(concepts, self.pairs, strict=True)],
            "blind": [float(a == pair.concept) for a, pair in zip(blind, self.pairs, strict=True)],
            "style": [float(a == pair.style) for a, pair in zip(styles, self.pairs, strict=True)],
        }
        if self.full:
            found["full_psnr"] = [psnr(*pair) for pair in zip(images, self.full, strict=True)]
            found["full_lpips"] = [self.lpips(*pair) for pair in zip(images, self.full, strict=True)]
        return found


def main() -> None:
    """Measure what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/emoji-styles/data"))
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--pairs", type=int, default=64, help="held-out combinations of style and concept")
    parser.add_argument("--guidance", type=float, help="of the pipeline's own, 3 by default")
    parser.add_argument("--arms", help="arms with semicolons, instead of all")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    bed = Bed(options)
    asked = {"pairs": options.pairs, "guidance": 3.0 if options.guidance is None else options.guidance}
    results = Results(options.json, bed.model, asked)
    rows = results.rows
    results.whole["trained_on_samples"] = json.loads((options.weights / "training.json").read_text())["samples"]

    def measure(text: str) -> Row:
        if text not in rows:
            images, flops = bed.draw(text)
            results.add(text, flops, bed.figures(images))
        return rows[text]

    full = f"euler@{STEPS}"
    reference, flops = bed.draw(full)
    if full not in rows:
        results.add(full, flops, bed.figures(reference))
    bed.full = reference
    of_truth = bed.figures(list(bed.truth))
    results.whole["truth"] = {name: round(float(np.mean(of_truth[name])), 4) for name in CONTENT}
    for text in ARMS if options.arms is None else options.arms.split(";"):
        row = measure(text)
        row["against"] = against_plain(text, measure, STEPS, HIGHER, PLAIN)
        results.write()
        print(text, round(row["ratio"], 2), row["means"], flush=True)
    for text in rows:  # rivals may have been measured after it
        if _alone("fresco", text):
            rows[text]["rivals"] = rival_leads(rows, text, RIVALS, HIGHER)
    results.write()


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
