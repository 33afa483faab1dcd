"""How well `emoji-styles-edit` follows its instructions, on images that no training has seen.

    python -m hasten_zoo.emoji_styles_edit.evaluate --data runs/emoji-styles/data

Needs the images and the judge's networks. For each sort of edit: distance of the result to the true target, and of
the target after the autoencoder (the ceiling) and of the source (what doing nothing gives) to it, medians; how often an
edit is done (see `is_done`), and how often it would be by what takes no model (`stand_ins`): under the mask the target
after the autoencoder, the target's mean colour, or the source blurred; for objects the same for those added and those
removed, and the PSNR to the source outside the mask; for styles how often the judge finds the style asked for. Writes
`evaluation.json` and `contact_sheet.webp` (from above: source, target, result, for styles, backgrounds and objects), by
default beside the card.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxKontextPipeline
from hasten.bench.subject import Edit
from torch import Tensor
from torch.nn import functional

from hasten_zoo.command import at_least_one, told
from hasten_zoo.emoji_styles import HERE as STYLES
from hasten_zoo.emoji_styles import WEIGHTS as STYLES_WEIGHTS
from hasten_zoo.emoji_styles.data import EmojiStyles, load_emoji_styles_data
from hasten_zoo.emoji_styles.evaluate import BATCH, psnr, recognised, sheet, through
from hasten_zoo.emoji_styles.judge import Judge
from hasten_zoo.emoji_styles.perceptual import Perceptual
from hasten_zoo.emoji_styles_edit import CALL, WEIGHTS, is_done
from hasten_zoo.emoji_styles_edit.edits import COUNTS, held_out_edits
from hasten_zoo.emoji_styles_edit.model import load_pipeline
from hasten_zoo.evaluation import add_folders, out_of, write_evaluation

SHOWN = 12
BLUR = 31  # pixels, of the blurred source


def apply_edits(
    pipe: FluxKontextPipeline, sources: Tensor, prompts: list[str], steps: int, guidance: float = 1.0, seed: int = 0
) -> Tensor:
    """Results `[B, 3, 128, 128]` in [0, 1] for sources alike; every edit has its own seed, `seed` and following."""
    results = []
    call = CALL | {"num_inference_steps": steps, "output_type": "pt"}
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        noise = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        guided = {"true_cfg_scale": guidance, "negative_prompt": [""] * len(part)} if guidance != 1 else {}
        results.append(pipe(sources[start : start + BATCH], part, generator=noise, **guided, **call).images)
    return torch.cat(results)


def stand_ins(pipe: FluxKontextPipeline, edits: Sequence[Edit]) -> dict[str, Tensor]:
    """Images in [0, 1] that need no editing model, by name, to know what being done is worth."""
    targets = torch.stack([edit.target for edit in edits])
    blurred = torch.stack([edit.source for edit in edits])
    blurred = functional.avg_pool2d(functional.pad(blurred, (BLUR // 2,) * 4, mode="replicate"), BLUR, 1)
    patches = [edit.target[:, edit.mask].mean(1)[:, None, None].expand_as(edit.target) for edit in edits]
    found = {
        "target_after_autoencoder": (through(pipe, 2 * targets - 1) + 1) / 2,
        "mean_colour_of_target": torch.stack(patches),
        "source_blurred": blurred,
    }
    masks, sources = (torch.stack([getattr(edit, name) for edit in edits]) for name in ("mask", "source"))
    return {name: torch.where(masks[:, None], images, sources) for name, images in found.items()}


def verdicts(pipe: FluxKontextPipeline, edits: Sequence[Edit], images: Tensor) -> dict[str, list[bool]]:
    """For each edit whether images in [0, 1] do it, and whether stand-ins do, by name."""
    every = {"result": images, **stand_ins(pipe, edits)}
    return {name: [is_done(*pair) for pair in zip(edits, of, strict=True)] for name, of in every.items()}


def done(found: Mapping[str, Sequence[bool]], places: Sequence[int]) -> dict[str, Any]:
    """How many edits there are at some places, and the shares of them that are done."""
    shares = {name: round(sum(of[i] for i in places) / len(places), 3) for name, of in found.items()}
    return {"edits": len(places), "done": shares.pop("result"), "done_by_stand_ins": shares}


def _middle(values: list[float]) -> float:
    return round(statistics.median(values), 2)


@torch.inference_mode()
def evaluate(
    weights: Path, styles: Path, data: EmojiStyles, out: Path, edits: int, steps: int, guidance: float
) -> dict[str, Any]:
    """Edit, measure, write; returns what `evaluation.json` holds."""
    pipe = load_pipeline(weights, styles)
    pipe.set_progress_bar_config(disable=True)
    judge, lpips = Judge.load(STYLES), Perceptual()
    position = json.loads((weights / "training.json").read_text())
    result: dict[str, Any] = {"trained_on_edits": position["samples"], "steps": steps}
    result |= {"guidance": guidance, "judge": judge.description}
    rows: list[Tensor] = []
    for what in COUNTS:
        chosen = held_out_edits(data, {what: edits})
        true = [one.edit for one in chosen]
        sources, targets = (torch.stack([getattr(edit, name) for edit in true]) for name in ("source", "target"))
        drawn = apply_edits(pipe, sources, [edit.prompt for edit in true], steps, guidance)
        before, after, made = (2 * images - 1 for images in (sources, targets, drawn))
        found = verdicts(pipe, true, drawn)
        row: dict[str, Any] = {
            **done(found, range(len(true))),
            "psnr_to_target_db": _middle(psnr(made, after)),
            "psnr_of_target_after_autoencoder_db": _middle(psnr(through(pipe, after), after)),
            "psnr_of_source_to_target_db": _middle(psnr(before, after)),
            "lpips_to_target": round(float(lpips(made, after).median()), 4),
            "lpips_of_source_to_target": round(float(lpips(before, after).median()), 4),
        }
        if what == "object":
            for name, verb in (("added", "add "), ("removed", "remove ")):
                some = [i for i, edit in enumerate(true) if edit.prompt.startswith(verb)]
                if some:
                    row[name] = done(found, some)
            kept = through(pipe, before)
            for name, images in (("result", made), ("source_after_autoencoder", kept)):
                errors = [((a - b) / 2).square().mean(0)[~edit.mask].mean() for a, b, edit in
                          zip(images, before, true, strict=True)]  # fmt: skip
                row[f"psnr_unedited_{name}_db"] = _middle([-10 * float(error.log10()) for error in errors])
        if what == "style":
            pairs = [one.pair for one in chosen]
            row |= {"found": recognised(judge, made, pairs), "found_in_targets": recognised(judge, after, pairs)}
        result[what] = row
        rows += [before[:SHOWN], after[:SHOWN], made[:SHOWN]]
    page = sheet(rows, columns=SHOWN)
    write_evaluation(out, result, page, "webp")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/emoji-styles/data"))
    add_folders(parser, WEIGHTS)
    parser.add_argument("--styles", type=Path, default=STYLES_WEIGHTS, help="weights of emoji-styles")
    parser.add_argument("--edits", type=at_least_one, default=64, help="of each kind, at most")
    parser.add_argument("--steps", type=at_least_one, default=50)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--threads", type=at_least_one, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = load_emoji_styles_data(args.data)
    result = evaluate(args.weights, args.styles, data, out_of(args), args.edits, args.steps, args.guidance)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    told(main)
