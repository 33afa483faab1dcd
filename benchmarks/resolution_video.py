"""DVG on `sprites-wan` against leaving out pixels alone, frames alone, and steps alone, at equal operations.

    python benchmarks/resolution_video.py --json benchmarks/video.json
    python benchmarks/resolution_video.py --guidance 1 --json try.json --prompts 8 --arms "dvg:budget=0.52"

The clips are those of captions that training left out; clip `i` is drawn with seed `i`. For every clip there are its
distance to the full run of the same noise (PSNR in dB and LPIPS, means over the frames, and the error of the change
from frame to frame), and whether it shows the object and the motion that were asked for (`sprites_wan/grade.py`).

DVG is measured at several budgets, with the paper's `lead` and with 1. It is compared, by each measure, with the best
of the plain samplers that take the fewest steps that cost at least as much, and with the form that compresses space
alone and the one that compresses time alone, each at the least cost that is not less: means and 95 % of a paired
bootstrap over the clips. All plain samplers (solvers and spacings) are tried on the first clips with half of the steps;
those that are nearest to the full run there, by any of the measures of distance, are measured on all clips. What the
frames or pixels of a clip cannot meet is written as `refused`. DVG's noise and levels, a cache inside the stages and a
cache alone are measured beside it. Every arm is written as soon as it is measured, and the same command goes on where
it was cut short.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from arms import STEPS, arm_of
from fits import check_texts
from hasten.bench.arms import one_line
from hasten.bench.plain import plain_samplers
from hasten.bench.sampling import Sample, count_flops, draw_sample
from hasten.bench.subject import Subject
from hasten.errors import HastenError
from hasten.quality.metrics import Lpips, over_frames, psnr, temporal_error
from hasten_zoo.command import at_least_one, told
from hasten_zoo.sprites_wan import WEIGHTS, load_sprites_wan, ordered_clips
from held_out import FAILS
from leads import Results, Row, against_plain, rival_leads
from rich.progress import track
from torch import Tensor

BUDGETS = (0.46, 0.52)  # that all forms can meet on the 8x8 tokens of a frame
# Of either form alone, for what costs a little more; time has to take whole frames, whose steps these are.
ALONE = {"space": (*BUDGETS, 0.6), "time": (*BUDGETS, 0.49, 0.575, 0.6)}
SCREENED, SCREENED_AT = 3, STEPS // 2  # clips on which all plain samplers are tried, and steps of each
ARMS = (
    *(f"dvg:budget={budget}{lead}" for budget in BUDGETS for lead in ("", ":lead=1")),
    *(f"dvg:budget={budget}:compress={form}" for form, budgets in ALONE.items() for budget in budgets),
    *(f"dvg:budget=0.52:lead=1{more}" for more in (":noise=anchor", ":shifts=none", "+foca:interval=3:warmup=1")),
    "foca:schedule=even@24",
)
DISTANCES = {"full_psnr": 1, "full_lpips": -1, "temporal_error": -1}
SIGNS = DISTANCES | {"right": 1}


def _form(compress: str, text: str) -> bool:
    return f"compress={compress}" in text


RIVALS = {compress: partial(_form, compress) for compress in ALONE}


class Bed:
    """The model, its captions, and the figures of an arm."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.model: Subject = load_sprites_wan(options.weights)
        self.model.pipe.set_progress_bar_config(disable=True)
        self.prompts = [clip.caption for clip in ordered_clips() if clip.held_out][: options.prompts]
        self.call = {} if options.guidance is None else {"guidance_scale": options.guidance}
        self.lpips = Lpips()
        self.full: list[Tensor] = []

    def first(self, text: str) -> list[Tensor]:
        """The first clips of a plain sampler."""
        attach, steps = arm_of(text)
        prompts = enumerate(self.prompts[:SCREENED])
        return [draw_sample(self.model, attach, steps, prompt, seed, self.call).image for seed, prompt in prompts]

    def draw(self, text: str) -> tuple[list[Sample], list[int]]:
        """All clips of an arm, and the operations of each; those of clips with one plan are counted once."""
        attach, steps = arm_of(text)
        samples, known, flops = list[Sample](), dict[str, int](), list[int]()
        for seed, prompt in enumerate(track(self.prompts, description=text, transient=True)):
            sample = draw_sample(self.model, attach, steps, prompt, seed, self.call)
            if sample.plan not in known:
                known[sample.plan] = count_flops(self.model, attach, steps, prompt, seed, self.call)[0]
            samples.append(sample)
            flops.append(known[sample.plan])
        return samples, flops

    def figures(self, clips: list[Tensor]) -> dict[str, list[float | None]]:
        """Of clips `[F, 3, H, W]` in [0, 1], in the order of the captions; there may be fewer."""
        assert self.model.grade is not None
        found: dict[str, list[float | None]] = {
            "right": [float(right) for right in self.model.grade(torch.stack(clips), self.prompts[: len(clips)])]
        }
        if self.full:
            pairs = list(zip(clips, self.full[: len(clips)], strict=True))
            found["full_psnr"] = [over_frames(psnr, *pair) for pair in pairs]
            found["full_lpips"] = [over_frames(self.lpips, *pair) for pair in pairs]
            found["temporal_error"] = [temporal_error(*pair) for pair in pairs]
        return found


def screen(bed: Bed, tried: dict[str, Any], write: Callable[[], None]) -> list[str]:
    """The plain samplers that are nearest to the full run on the first clips, one for each measure of distance.

    Args:
        bed: with its full runs drawn.
        tried: by sampler, its means or the reason why it cannot run; what is missing is measured.
        write: called after each of them.
    """
    for name in plain_samplers():
        if not isinstance(tried.get(name), dict):
            try:
                figures = bed.figures(bed.first(f"{name}@{SCREENED_AT}"))
                tried[name] = {measure: fmean(x for x in figures[measure] if x is not None) for measure in DISTANCES}
            except FAILS as error:
                tried[name] = one_line(error)
            write()
    known = [name for name, means in tried.items() if isinstance(means, dict)]
    chosen = list[str]()
    for measure, sign in DISTANCES.items():
        scores = {name: sign * tried[name][measure] for name in known}
        chosen.append(max(scores, key=scores.__getitem__))
    return list(dict.fromkeys(chosen))


def plans_of(samples: list[Sample]) -> dict[str, Any]:
    """The plan of every clip, and its density, where there are plans."""
    plans = [sample.plan for sample in samples]
    found = [re.findall(r"density ([\d.]+)", plan) for plan in plans]
    return {"plans": plans, "densities": [float(each[0]) for each in found]} if all(found) else {}


def main() -> None:
    """Measure what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--prompts", type=at_least_one, default=32, help="of the captions that training left out")
    parser.add_argument("--guidance", type=float, help="the model's own by default")
    parser.add_argument("--arms", help="arms with semicolons, instead of all")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    arms = ARMS if options.arms is None else options.arms.split(";")
    check_texts(arms)
    bed = Bed(options)
    size = [bed.model.call[name] for name in ("num_frames", "height", "width")]
    guidance = bed.model.call["guidance_scale"] if options.guidance is None else options.guidance
    asked = {"prompts": len(bed.prompts), "size": size, "guidance": guidance, "screened_on": [SCREENED, SCREENED_AT]}
    results = Results(options.json, bed.model, asked)
    rows, refused = results.rows, results.whole.setdefault("refused", {})

    def measure(text: str) -> Row:
        if not results.has(text):
            samples, flops = bed.draw(text)
            results.add(text, flops, bed.figures([sample.image for sample in samples]), **plans_of(samples))
        return rows[text]

    full = f"euler@{STEPS}"
    if full not in rows:
        samples, flops = bed.draw(full)
        results.add(full, flops, bed.figures([sample.image for sample in samples]))
    else:
        samples, _ = bed.draw(full)
    bed.full = [sample.image for sample in samples]
    samplers = screen(bed, results.whole.setdefault("screened", {}), results.write)
    for text in arms:
        try:
            row = measure(text)
        except (HastenError, ValueError) as error:
            refused[text] = one_line(error)
            print(text, "refused:", refused[text], flush=True)
            continue
        refused.pop(text, None)  # of an older commit
        row["against"] = against_plain(text, measure, STEPS, SIGNS, samplers)
        results.write()
        print(text, round(row["ratio"], 2), row["means"], flush=True)
    for text in rows:  # rivals may have been measured after it
        if text.startswith("dvg") and "compress=" not in text:
            rows[text]["rivals"] = rival_leads(rows, text, RIVALS, SIGNS)
    results.write()


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    told(main)
