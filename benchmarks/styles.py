"""All kinds of methods on `emoji-styles`, against the full run, the truth and the content: three measures, by name.

    python benchmarks/styles.py --json benchmarks/styles.json
    python benchmarks/styles.py --guidance 1 --json benchmarks/styles-unguided.json
    python benchmarks/styles.py --arms "fresco:preset=18;foca:schedule=even@9" --pairs 16 --json try.json
    python benchmarks/styles.py --arms "" --turbo runs/emoji-styles-turbo/weights --json benchmarks/styles.json

The prompts are combinations of style and concept that were held out, whose true images are known; prompt `i` is drawn
with seed `i`. For every image there are

- the *distance to the full run* of the same noise (PSNR in dB, LPIPS),
- the *distance to the truth* (LPIPS, and PSNR in dB), the nearest of the views that the caption leaves open,
- the *content*: whether the judge finds the style, and the concept: among all images, and (`blind`) without having seen
  the held-out ones, which finds it in a little more than half of the true images, too (`truth`).

Operations are counted. Beside every arm five plain samplers stand, with the smallest number of steps that costs at
least as much, and the best of them, by each measure, is what the arm is compared with: means and 95 % of a paired
bootstrap over the prompts. The five (`PLAIN`) were chosen by hand, so as to draw 64 images with each in hours rather
than days; the benchmarks of edits and of clips try all solvers and spacings. In the same way Fresco is compared with
the nearest Bottleneck and the nearest RALU that cost at least as much as it does. Every arm is written as soon as it is
measured, and the same command goes on where it was cut short.

What has to be fitted or matched (see `fits.py`, which reads the arms) is, in `--work`, on captions that the model was
trained on, with seeds that no arm draws. `--turbo` is a folder with weights of `emoji-styles-turbo`: its arms, with
`turbo ` before them, are measured against the same full run of the model that it was distilled from. What is added to
its four steps is compared with it alone: with the fewest steps that cost at least as much (`against`), and with its
four (`against_four`), since it was distilled for no other number. An arm that cannot run has the reason in the place of
figures, and is tried again on another commit.
Needs the images of `hasten_zoo.emoji_styles.data`.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import STEPS, drawn
from fits import PEER, Fits, check_texts
from hasten.bench.arms import one_line
from hasten.bench.peers import PEERS
from hasten.bench.subject import Subject
from hasten.bench.thresholds import Trials
from hasten.bench.tune import tuning_calls
from hasten.errors import ConfigError, HastenError, HastenWarning
from hasten.quality.metrics import Lpips, psnr
from hasten_zoo.emoji_styles import HERE, WEIGHTS, load_emoji_styles
from hasten_zoo.emoji_styles.augment import caption, nearest_views, plain_views, render
from hasten_zoo.emoji_styles.data import load_emoji_styles_data
from hasten_zoo.emoji_styles.evaluate import spread
from hasten_zoo.emoji_styles.judge import Judge
from hasten_zoo.emoji_styles_turbo import load_emoji_styles_turbo
from held_out import check_weights, weights_of
from leads import Results, Row, against_plain, leads, plain_count, rival_leads
from torch import Tensor

SIZE = 128
LEARNED, LEARNED_SEED, BATCH = 16, 1000, 4  # captions that fits learn from, the last of the model's
TRIED, TRIED_SEED = 2, 2000  # captions on which thresholds are matched, the first of the model's
PLAIN = ("euler", "unipc", "dpmpp", "unipc:spacing=beta", "dpmpp:spacing=beta")
CACHES = ("reuse", "taylorseer:order=1", "hicache", "foca", "freqca", "svdcache", "hyca", "l2p")
GATED = ("fbcache", "teacache", "magcache", "easycache", "speca")
LEAP_COUNTS = (12, 9, 7, 5)
ARMS = (
    *(f"default@{n}" for n in LEAP_COUNTS),
    *(f"leap@{n}" for n in LEAP_COUNTS),
    *(f"fresco:preset={n}" for n in (30, 18, 11, 9)),
    *(f"fresco:stages={stages}:shares=0.3" for stages in ("6/2/10", "4/4/10")),
    *(f"ralu:preset={n}" for n in (18, 10)),
    *(f"bottleneck:stages={n}" for n in ("15/14", "9/9", "5/6", "4/5")),
    *(f"spectral:stages={n}" for n in ("6/12", "6/6", "3/4")),
    *(f"{cache}:schedule=even@{n}" for n in (12, 9, 7) for cache in CACHES),
    *(f"{cache}:schedule=uniform@9" for cache in CACHES),
    *(f"{cache}@{n}" for n in (12, 9) for cache in GATED),
    *(f"{PEER}{peer.name}@{n}" for n in (12, 9) for peer in PEERS),
    "fresco:preset=18+foca:interval=2:warmup=1",
    "spectral:stages=12/12+foca:interval=4:warmup=1",
)
TURBO, TURBO_STEPS = "turbo ", 4
DISTILLED = (
    "euler@4",
    "euler@8",
    "fresco:stages=2/1/1:shares=0.5",
    "bottleneck:stages=2/2",
    "default@2",
    "taylorseer:schedule=even@3",
    "fbcache@3",
)
CONTENT = ("concept", "blind", "style")
HIGHER = {"full_psnr": 1, "full_lpips": -1, "truth_psnr": 1, "truth_lpips": -1} | dict.fromkeys(CONTENT, 1)  # is better


def _alone(method: str, text: str) -> bool:
    """Whether an arm is this method without a cache."""
    return text.startswith(f"{method}:") and "+" not in text


RIVALS = {method: partial(_alone, method) for method in ("bottleneck", "ralu")}  # of Fresco


def added_to_distilled(text: str) -> bool:
    """Whether an arm adds something to the distilled model, which is then what it is compared with."""
    return text.startswith(TURBO) and not text.startswith(f"{TURBO}euler")


class Bed:
    """The model, its prompts, and the figures of an arm."""

    def __init__(self, options: argparse.Namespace) -> None:
        data = load_emoji_styles_data(options.data)
        rows = spread(data.taught(held_out=True), options.pairs)
        self.pairs = [data.pairs[i] for i in rows.tolist()]
        self.truth = (render(data, rows, plain_views(len(rows)), SIZE) + 1) / 2
        self.model = load_emoji_styles(options.weights)
        self.turbo = None if options.turbo is None else load_emoji_styles_turbo(options.turbo, styles=options.weights)
        self.call = {} if options.guidance is None else {"true_cfg_scale": options.guidance}
        self.work: Path = options.work
        self.fits = self.prepared(self.model, STEPS, self.call, LEAP_COUNTS)
        self.judge, self.lpips = Judge.load(HERE), Lpips()
        self.full: list[Tensor] = []

    def prepared(self, model: Subject, steps: int, call: dict[str, Any], counts: Sequence[int]) -> Fits:
        """What a model's arms are fitted to: captions that it was trained on, with seeds of their own."""
        model.pipe.set_progress_bar_config(disable=True)
        calls = tuning_calls(model, model.prompts[-LEARNED:], LEARNED_SEED, steps, call, BATCH)
        trials = partial(Trials, model, model.prompts[:TRIED], TRIED_SEED, steps, call)
        scale = call.get("true_cfg_scale", "own")
        return Fits(model.pipe, calls, counts, trials, self.work / f"{weights_of(model)}-{steps}-guidance-{scale}")

    @cached_property
    def turbo_fits(self) -> Fits:
        """The same of the distilled model."""
        assert self.turbo is not None
        return self.prepared(self.turbo, TURBO_STEPS, {}, ())

    def draw(self, text: str) -> tuple[list[Tensor], list[int], dict[str, Any]]:
        """Images `[3, 128, 128]` in [0, 1] of all pairs, the operations that were counted, and the arm's parameters.

        Raises:
            ConfigError: for an arm that cannot run.
        """
        distilled = text.startswith(TURBO)
        model, fits = (self.turbo, self.turbo_fits) if distilled else (self.model, self.fits)
        assert model is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HastenWarning)  # which thresholds skip too much, while they are searched
            arm = fits.arm(text.removeprefix(TURBO))
        if arm.error:
            raise ConfigError(arm.error)
        prompts = [caption(pair) for pair in self.pairs]
        told = "".join(f":{name}={value}" for name, value in arm.params.items() if name.endswith("threshold"))
        return *drawn(model, text + told, prompts, {} if distilled else self.call, arm), arm.params

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
    parser.add_argument("--turbo", type=Path, help="weights of emoji-styles-turbo, to measure its arms as well")
    parser.add_argument("--work", type=Path, default=Path("runs/emoji-styles/fits"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    if options.turbo is not None and options.guidance is not None:
        parser.error("--turbo is with the guidance of the model that it was distilled from: leave --guidance out")
    torch.set_num_threads(options.threads)
    arms = list(ARMS) if options.arms is None else [text for text in options.arms.split(";") if text]
    check_texts(arms)
    if options.turbo is not None:
        arms += [TURBO + text for text in DISTILLED]
    bed = Bed(options)
    asked = {"pairs": options.pairs, "guidance": 3.0 if options.guidance is None else options.guidance}
    results = Results(options.json, bed.model, asked)
    rows = results.rows
    if bed.turbo is not None:
        if before := results.whole.get("turbo_weights"):
            check_weights({"weights": before}, bed.turbo, options.json)
        results.whole["turbo_weights"] = weights_of(bed.turbo)
    results.whole["plain"] = list(PLAIN)
    results.whole["trained_on_samples"] = json.loads((options.weights / "training.json").read_text())["samples"]

    def measure(text: str) -> Row:
        if results.has(text):
            return rows[text]
        try:
            images, flops, params = bed.draw(text)
            return results.add(text, flops, bed.figures(images), params=params)
        except HastenError as error:
            return results.lack(text, "refused", one_line(error))
        except Exception as error:  # of whatever kind in a fit or another library; the other arms can be measured
            return results.lack(text, "failed", one_line(error))

    def compare(text: str, row: Row) -> None:
        if not added_to_distilled(text):
            row["against"] = against_plain(text, measure, STEPS, HIGHER, PLAIN)
            return
        four = f"{TURBO}euler@{TURBO_STEPS}"
        steps = plain_count(row["flops"], lambda n: measure(f"{TURBO}euler@{n}"), TURBO_STEPS)
        beside = f"{TURBO}euler@{steps}"
        row["against"] = leads(row, {beside: rows[beside]}, HIGHER) | {"steps": steps}
        row["against_four"] = leads(row, {four: rows[four]}, HIGHER) | {"steps": TURBO_STEPS}

    full = f"euler@{STEPS}"
    reference, flops, _ = bed.draw(full)
    if full not in rows:
        results.add(full, flops, bed.figures(reference), params={})
    bed.full = reference
    of_truth = bed.figures(list(bed.truth))
    results.whole["truth"] = {name: round(float(np.mean(of_truth[name])), 4) for name in CONTENT}
    for text in arms:
        row = measure(text)
        if "figures" not in row:
            continue
        compare(text, row)
        results.write()
        print(text, round(row["ratio"], 2), row["means"], flush=True)
    for text in rows:  # rivals may have been measured after it
        if _alone("fresco", text) and "figures" in rows[text]:
            rows[text]["rivals"] = rival_leads(rows, text, RIVALS, HIGHER)
    results.write()


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
