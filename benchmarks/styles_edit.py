"""SpecEdit on `emoji-styles-edit` against caches and plain samplers at equal operations, by the kind of edit.

    python benchmarks/styles_edit.py --json benchmarks/styles-edit.json
    python benchmarks/styles_edit.py --kinds added removed --edits 4 --arms "specedit" --json try.json
    python benchmarks/styles_edit.py --weights EDIT --styles STYLES --json try.json     # folders of one training

The edits are those that come with the model, whose true results are known; edit `i` is drawn with seed `i`. Sorts: the
`style`; the `background`'s colour; an object in a corner, `added` or `removed`. For every edit there are

- the distance of the whole image to the full run of the same noise (PSNR in dB, LPIPS),
- its distance to the truth (PSNR in dB, LPIPS), and under the edit's mask alone (`edited`, PSNR in dB),
- what is outside of the mask (PSNR in dB): to the full run (`rest_full`) and to the source (`rest_source`); edits of
  the style and of the background may change everything and have no such figure,
- whether the edit is done (`hasten_zoo.emoji_styles_edit.is_done`).

Operations are counted for each edit, since an arm computes more where more is edited. Beside every arm, for all edits
and for each sort with the operations that it takes there, stands the best of all plain samplers (solvers and spacings)
with the fewest steps that cost at least as much, by each measure: means and 95 % of a paired bootstrap over the edits.
Every arm is written as soon as it is measured, and the same command goes on where it was cut short, unless the file of
edits is another one by then. An arm that cannot run has the reason in the place of figures.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import STEPS, drawn
from fits import check_texts
from hasten.bench.arms import one_line
from hasten.bench.edits import edit_of
from hasten.bench.subject import Edit, Subject
from hasten.errors import HastenError
from hasten.quality.metrics import Lpips, psnr
from hasten_zoo.emoji_styles_edit import EDITS, STYLES, WEIGHTS, load_emoji_styles_edit
from leads import Results, Row, against_plain
from torch import Tensor

KINDS = {"style": "make it ", "background": "make the background ", "added": "add the ", "removed": "remove the "}
ARMS = (
    "specedit",
    *(f"specedit:draft={d}:mixed={m}:final=0:coverage=3" for d, m in ((8, 8), (6, 4), (4, 3))),
    "specedit:draft=12:mixed=8:final=0:coverage=3+foca:interval=2:warmup=1",
    "fresco:preset=18",
    "spectral:stages=6/12",
    "bottleneck:stages=9/9",
    "ralu:preset=18",
    *(f"foca:schedule=even@{n}" for n in (9, 6, 4)),
)
SIGNS = {
    "full_psnr": 1,
    "full_lpips": -1,
    "truth_psnr": 1,
    "truth_lpips": -1,
    "edited": 1,
    "rest_full": 1,
    "rest_source": 1,
    "done": 1,
}


def kind_of(prompt: str) -> str:
    """The sort of edit that an instruction asks for."""
    return next(kind for kind, words in KINDS.items() if prompt.startswith(words))


def chosen(model: Subject, kinds: Sequence[str], most: int | None) -> list[str]:
    """Instructions of these sorts in the model's order, so many of each at most; the program ends if there are none."""
    found: list[str] = []
    for kind in kinds:
        found += [prompt for prompt in model.prompts if kind_of(prompt) == kind][:most]
    if not found:
        limit = "" if most is None else f", at most {most} of each"
        raise SystemExit(
            f"no edits of {model.name} are {' or '.join(kinds)}{limit}: name other --kinds, or more --edits"
        )
    return found


def part(row: Row, places: Sequence[int], base: Row) -> Row:
    """The row of some of the edits, with the operations of those; that of a refused arm as it is."""
    if "refused" in row:
        return row
    figures = {name: [values[i] for i in places] for name, values in row["figures"].items()}
    known = {name: [value for value in values if value is not None] for name, values in figures.items()}
    own, full = (float(np.mean([each["operations"][i] for i in places])) for each in (row, base))
    means = {name: round(float(np.mean(values)), 4) for name, values in known.items() if values}
    return {"flops": own, "ratio": full / own, "figures": figures, "means": means}


class Bed:
    """The model, its edits, and the figures of an arm."""

    def __init__(self, model: Subject, prompts: list[str], guidance: float | None) -> None:
        self.model, self.prompts = model, prompts
        self.model.pipe.set_progress_bar_config(disable=True)
        self.call: dict[str, Any] = {}
        if guidance is not None:
            self.call = {"true_cfg_scale": guidance, "negative_prompt": ""}
        self.edits: list[Edit] = [edit for prompt in prompts if (edit := edit_of(model, prompt)) is not None]
        self.lpips = Lpips()
        self.full: list[Tensor] = []

    def draw(self, text: str) -> tuple[list[Tensor], list[int]]:
        """Results `[3, H, W]` in [0, 1] of all edits, and the operations of each."""
        images, flops = drawn(self.model, text, self.prompts, self.call)
        return images, flops if len(flops) == len(images) else flops * len(images)

    def figures(self, images: list[Tensor]) -> dict[str, list[float | None]]:
        """Of every result, in the order of the edits."""
        assert self.model.grade is not None
        pairs = list(zip(images, self.edits, strict=True))
        found: dict[str, list[float | None]] = {
            "truth_psnr": [psnr(image, edit.target) for image, edit in pairs],
            "truth_lpips": [self.lpips(image, edit.target) for image, edit in pairs],
            "edited": [psnr(image, edit.target, edit.mask) for image, edit in pairs],
            "rest_source": [_rest(edit, image, edit.source) for image, edit in pairs],
            "done": [float(done) for done in self.model.grade(torch.stack(images), self.prompts)],
        }
        if self.full:
            found["full_psnr"] = [psnr(*pair) for pair in zip(images, self.full, strict=True)]
            found["full_lpips"] = [self.lpips(*pair) for pair in zip(images, self.full, strict=True)]
            found["rest_full"] = [_rest(edit, *pair) for edit, *pair in zip(self.edits, images, self.full, strict=True)]
        return found


def _rest(edit: Edit, image: Tensor, other: Tensor) -> float | None:
    """PSNR in dB outside of an edit's mask; None where it covers everything."""
    outside = ~edit.mask
    return psnr(image, other, outside) if bool(outside.any()) else None


def asked(prompts: Sequence[str], kinds: Sequence[str], guidance: float | None, file: Path = EDITS) -> dict[str, Any]:
    """What rows depend on beside the weights: earlier ones of another file of edits are not gone on with."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    edits = {"number": len(prompts), "file": digest}
    return {"edits": edits, "kinds": list(kinds), "guidance": 1.0 if guidance is None else guidance}


def run(bed: Bed, results: Results, arms: Sequence[str]) -> None:
    """Measure what is not there yet, and compare."""
    rows, full = results.rows, f"euler@{STEPS}"
    reference, flops = bed.draw(full)
    if full not in rows:
        results.add(full, flops, bed.figures(reference), operations=flops)
    bed.full = reference

    def measure(text: str) -> Row:
        if text not in rows:
            try:
                images, flops = bed.draw(text)
            except (HastenError, ValueError) as error:
                rows[text] = {"refused": one_line(error)}
                results.write()
            else:
                results.add(text, flops, bed.figures(images), operations=flops)
        return rows[text]

    kinds = [kind_of(prompt) for prompt in bed.prompts]
    for text in arms:
        row = measure(text)
        if "refused" in row:
            print(text, row["refused"], flush=True)
            continue
        row["against"] = against_plain(text, measure, STEPS, SIGNS)
        row["by_kind"] = {}
        for kind in dict.fromkeys(kinds):
            places = [i for i, other in enumerate(kinds) if other == kind]
            row["by_kind"][kind] = against_plain(
                text, partial(lambda places, label: part(measure(label), places, rows[full]), places), STEPS, SIGNS
            )
            own = part(row, places, rows[full])
            row["by_kind"][kind] |= {"edits": len(places), "ratio": own["ratio"], "means": own["means"]}
        results.write()
        print(text, round(row["ratio"], 2), row["means"], flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--styles", type=Path, default=STYLES, help="weights of emoji-styles that it differs from")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--edits", type=int, help="of each sort at most; all that come with the model by default")
    parser.add_argument("--guidance", type=float, help="without guidance by default")
    parser.add_argument("--arms", help="arms with semicolons, instead of all")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    arms = ARMS if options.arms is None else [text for text in options.arms.split(";") if text]
    check_texts(arms)
    model = load_emoji_styles_edit(options.weights, styles=options.styles)
    prompts = chosen(model, options.kinds, options.edits)
    results = Results(options.json, model, asked(prompts, options.kinds, options.guidance))
    run(Bed(model, prompts, options.guidance), results, arms)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
