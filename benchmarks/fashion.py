"""All kinds of methods judged by the distribution of their images: Frechet distance to real ones, at equal steps.

    python benchmarks/fashion.py --data runs/fashion-dit/data --json benchmarks/fashion-dit.json
    python benchmarks/fashion.py --guidance 1.5 --counts 9 --arms default leap foca:schedule=even --json try.json

2,000 images of fashion-dit per arm, classes in turn, the same noise for all arms; distances to the 10,000 test images
in the features of the model's own classifier (not FID), precision, recall, and the mean PSNR to the full run. The
`floor` is what as many real images reach. Intervals are 95 % of a bootstrap over the generated images, which draws the
same rows in all arms: `against` has what an arm's distance is below that of the best plain sampler with as many steps,
resample by resample. Its best is chosen on the same images, so that it is rather too good than too bad.

Calibrations and thresholds are fitted for each guidance, in `--work`, from images that no arm draws (seeds of their
own). A gate decides for a whole batch. Every arm is written as soon as it is measured, and the same command goes on
where it was stopped. Arms are read by `fits.py`; those of other libraries are `peer:NAME`. An
arm without figures has the reason in their place, `refused` or (an error that nobody expected) `failed`, and is tried
again on another commit.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fits import DEFAULT, PEER, Fits, check_texts
from hasten.bench.arms import one_line
from hasten.bench.environment import environment
from hasten.bench.peers import PEERS
from hasten.bench.sampling import Attach, Sample, counting, flop_counter, plain
from hasten.bench.subject import Subject, check_device
from hasten.bench.thresholds import Trials
from hasten.errors import HastenWarning
from hasten.io import write_atomically
from hasten_zoo.fashion_dit import CLASSES, WEIGHTS
from hasten_zoo.fashion_dit.data import load_fashion_data, scaled
from hasten_zoo.fashion_dit.distances import Gaussian
from hasten_zoo.fashion_dit.evaluate import Judge, generate
from hasten_zoo.fashion_dit.model import load_pipeline
from held_out import check_asked, check_weights, is_settled, weights_of
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

STEPS = 50
COUNTS = (12, 9, 7, 5)
PLAIN = ("euler", "unipc", "unipc:spacing=lambda", "dpmpp", "dpmpp:spacing=lambda", "dpmpp:spacing=karras")
SCHEDULED = ("reuse", "taylorseer", "taylorseer:order=2", "hicache", "foca", "freqca", "svdcache", "hyca", "l2p")
GATED = ("fbcache", "teacache", "magcache", "easycache", "speca")
# The default's line on the papers' schedule, and with a smaller slope on even steps.
TUNED = ("hicache:order=1:sigma=0.66:schedule=uniform", "hicache:order=1:sigma=0.55:schedule=even")
ARMS = (
    *PLAIN,
    DEFAULT,
    "leap",
    *(f"{name}:schedule=even" for name in SCHEDULED),
    *(f"{name}:schedule=uniform" for name in SCHEDULED),
    *TUNED,
    *GATED,
    *(f"{PEER}{peer.name}" for peer in PEERS),
)
LEARNED, LEARNED_SEED = 40, 1_000_000  # images that fits learn from, classes in turn
TRIED_SEED = 2_000_000  # of the one batch on which thresholds are matched
RESAMPLINGS = 200


@dataclass
class BatchTrials(Trials):
    """Trials whose only prompt is a batch of all classes."""

    batch: int = 50

    def draw(self, attach: Attach, index: int, steps: int) -> Sample:
        """The batch as the frames of a sample, grey as three equal colours."""
        started = time.perf_counter()
        with counting(self.model.pipe, attach) as (_, calls):
            images, _ = generate(self.model.pipe, self.batch, self.call["guidance_scale"], steps, TRIED_SEED)
        seconds = time.perf_counter() - started
        frames = (images.cpu().expand(-1, 3, -1, -1) + 1) / 2
        return Sample(frames, [], seconds, None, calls["layer"], calls["forward"])


class Bed:
    """The model at one guidance: its full run, and what arms draw."""

    def __init__(self, model: Subject, guidance: float, options: argparse.Namespace) -> None:
        self.model, self.guidance = model, guidance
        self.count, self.batch = options.images, options.batch
        folder = options.work / f"{weights_of(model)}-guidance-{guidance:g}"
        trials = partial(BatchTrials, model, [""], 0, STEPS, {"guidance_scale": guidance}, batch=options.batch)
        self.fits = Fits(model.pipe, self.calls(), options.counts, trials, folder)
        self.kept = folder / f"full-{self.count}-by-{self.batch}.safetensors"  # whose cost is a batch's
        self.labels = torch.arange(self.count) % len(CLASSES)

    def calls(self) -> list[dict[str, Any]]:
        """Calls to learn from: all classes in each."""
        calls = []
        for start in range(0, LEARNED, len(CLASSES)):
            noise = [torch.Generator().manual_seed(LEARNED_SEED + start + i) for i in range(len(CLASSES))]
            calls.append({
                "class_labels": list(range(len(CLASSES))),
                "guidance_scale": self.guidance,
                "generator": noise,
                "num_inference_steps": STEPS,
                "output_type": "pt",
            })  # fmt: skip
        return calls

    def draw(self, attach: Attach, steps: int) -> tuple[Tensor, dict[str, float]]:
        """Images `[N, 1, 32, 32]` in [-1, 1] of an arm, and its cost: operations are counted in the first batch.

        Each batch is a call of its own: what is switched on for one, such as a peer, begins anew.
        """
        images: list[Tensor] = []
        started = time.process_time()
        with counting(self.model.pipe, attach) as (_, calls), flop_counter() as counter:
            images.append(generate(self.model.pipe, self.batch, self.guidance, steps)[0].cpu())
        flops = counter.get_total_flops()
        layers = calls["layer"]
        for start in range(self.batch, self.count, self.batch):
            many = min(self.batch, self.count - start)
            with counting(self.model.pipe, attach) as (_, calls):
                images.append(generate(self.model.pipe, many, self.guidance, steps, start)[0].cpu())
            layers += calls["layer"]
        cost = {
            "flops": flops,
            "layer_calls": layers / len(images),
            "cpu_seconds": round(time.process_time() - started, 1),
        }
        return torch.cat(images), cost

    def full(self) -> tuple[Tensor, dict[str, float]]:
        """The full run's images, drawn once, and its cost."""
        if not self.kept.exists():
            images, cost = self.draw(plain, STEPS)
            write_atomically(self.kept, save({"images": images.contiguous()}, {"cost": json.dumps(cost)}))
        with safe_open(self.kept, "pt") as file:
            return file.get_tensor("images"), json.loads(file.metadata()["cost"])


def resampled(features: Tensor, real: Gaussian) -> list[float]:
    """Frechet distances of resampled images, the same rows for every arm."""
    random = torch.Generator().manual_seed(0)
    draws = (torch.randint(len(features), (len(features),), generator=random) for _ in range(RESAMPLINGS))
    return [round(real.distance(Gaussian.of(features[rows])), 4) for rows in draws]


def interval(values: Sequence[float]) -> list[float]:
    """The middle 95 % of some values."""
    found = torch.tensor(values)
    return [round(float(found.quantile(q)), 3) for q in (0.025, 0.975)]


def key_of(row: dict[str, Any]) -> tuple[float, str, int]:
    """What a row is of."""
    return row["guidance"], row["arm"], row["computed_steps"]


def against(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """How far a row's distance is below that of the best plain sampler with as many steps, above 0 where it is better;
    None where there is none."""
    same = (row["guidance"], row["computed_steps"])
    beside = [
        other
        for other in rows
        if other["arm"] in PLAIN and (other["guidance"], other["computed_steps"]) == same and "frechet" in other
    ]
    if "frechet" not in row or row["arm"] in (*PLAIN, "full") or not beside:
        return None
    best = min(beside, key=lambda other: other["frechet"])
    ahead = [theirs - own for own, theirs in zip(row["resampled"], best["resampled"], strict=True)]
    return {"best": best["arm"], "ahead": round(best["frechet"] - row["frechet"], 3), "interval": interval(ahead)}


class Measure:
    """The file of results and what goes into it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        pipe = load_pipeline(options.weights)
        pipe.set_progress_bar_config(disable=True)
        self.model = Subject("fashion-dit", pipe.to(options.device), list(CLASSES))
        known: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
        check_weights(known, self.model, options.json)
        asked = {"images": options.images, "batch": options.batch}
        check_asked(known, asked, options.json, "--json")
        data = load_fashion_data(options.data)
        self.judge = Judge(data, options.images)
        self.real = Gaussian.of(self.judge.real)
        self.rows: list[dict[str, Any]] = known.get("rows", [])
        self.about = {"command": "python benchmarks/fashion.py", "weights": weights_of(self.model)} | asked
        self.about["trained_on_samples"] = json.loads((options.weights / "training.json").read_text())["samples"]
        images = options.images
        self.about["floor"] = self.judge(scaled(data.train[:images]), data.train_labels[:images])

    def run(self) -> None:
        """Measure what is not there yet."""
        for guidance in self.options.guidance:
            here = [row for row in self.rows if row["guidance"] == guidance]
            known = {(row["arm"], row["computed_steps"]) for row in here if is_settled(row, environment()["commit"])}
            wanted = [(arm, count) for count in self.options.counts for arm in self.options.arms]
            if missing := [key for key in wanted if key not in known]:
                bed = Bed(self.model, guidance, self.options)
                full, cost = bed.full()
                if ("full", STEPS) not in known:
                    self.note({"guidance": guidance, "arm": "full", "computed_steps": STEPS} | cost, full, bed.labels)
                for arm, count in track(missing, description=f"guidance {guidance:g}"):
                    self.arm(bed, arm, count, full, cost)

    def arm(self, bed: Bed, name: str, count: int, full: Tensor, whole: dict[str, float]) -> None:
        """Measure an arm, or note why it cannot run."""
        row: dict[str, Any] = {"guidance": bed.guidance, "arm": name, "computed_steps": count}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", HastenWarning)  # which thresholds skip too much, while it is searched
                arm = bed.fits.arm(f"{name}@{count}")
            if arm.error:
                self.write(row | {"refused": arm.error})
                return
            if arm.computed_steps != count:
                self.write(row | {"refused": f"{arm.computed_steps} steps would be computed, not {count}"})
                return
            images, cost = bed.draw(arm.attach, arm.steps)
        except Exception as error:  # of whatever kind in a fit or another library; the other arms can be measured
            self.write(row | {"failed": one_line(error)})
            return
        row |= cost | {"flops_ratio": round(whole["flops"] / cost["flops"], 3), "note": arm.note, "params": arm.params}
        row["really_computed"] = round(STEPS * cost["layer_calls"] / whole["layer_calls"], 2)
        error = ((images - full) / 2).square().mean((1, 2, 3)).clamp(min=1e-10)
        self.note(row | {"psnr": round(float((-10 * error.log10()).mean()), 2)}, images, bed.labels)

    def note(self, row: dict[str, Any], images: Tensor, labels: Tensor) -> None:
        """Judge images and keep their row."""
        if not bool(images.isfinite().all()):
            self.write(row | {"psnr": None, "failed": "values that are not finite"})
            return
        found = resampled(self.judge.network.of(images), self.real)
        self.write(row | self.judge(images, labels) | {"frechet_interval": interval(found), "resampled": found})

    def write(self, row: dict[str, Any]) -> None:
        """Keep a row in the place of an older one, with the commit that it was measured on, and write all of them."""
        here = environment()
        if reason := {kind: row[kind] for kind in ("refused", "failed") if kind in row}:
            print(f"{row['arm']}@{row['computed_steps']} at guidance {row['guidance']:g}: {reason}", flush=True)
        self.rows = [other for other in self.rows if key_of(other) != key_of(row)] + [row | {"commit": here["commit"]}]
        for one in self.rows:
            one["against"] = against(one, self.rows)
        content = {"environment": here} | self.about | {"rows": self.rows}
        write_atomically(self.options.json, json.dumps(content, indent=1) + "\n")


def main() -> None:
    """Measure what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/fashion-dit/data"))
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/fashion-dit.json"))
    parser.add_argument("--work", type=Path, default=Path("runs/fashion-dit/fits"))
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.5, 4.0, 1.0], help="1 is none")
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS), help="computed steps, in this order")
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--batch", type=int, default=50, help="images per call, a multiple of the classes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.batch % len(CLASSES) or args.batch < 1:
        parser.error(f"--batch must be a multiple of {len(CLASSES)}, the number of classes, got {args.batch}")
    if args.images < 2 * args.batch:
        parser.error(f"--images must be at least two batches, {2 * args.batch}, got {args.images}")
    if bad := [count for count in args.counts if not 1 <= count <= STEPS]:
        parser.error(f"--counts must be from 1 to {STEPS}, got {bad[0]}")
    check_texts([f"{arm}@{count}" for arm in args.arms for count in args.counts])
    check_device(args.device)
    torch.set_num_threads(args.threads)
    Measure(args).run()


if __name__ == "__main__":
    main()
