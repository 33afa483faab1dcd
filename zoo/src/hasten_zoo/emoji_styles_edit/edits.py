"""Held-out edits with their truth: what `emoji-styles-edit` is measured on.

    python -m hasten_zoo.emoji_styles_edit.edits --data runs/emoji-styles/data     # writes edits.safetensors

Each leads to the image of a pair of style and concept that no training has seen, or changes it; the concept is one that
is taught. About half of the edits of objects add one, the others lead back and remove it. The file holds what the model
comes with: latents of sources and targets (in steps of 0.1, as in training), instructions that differ from
one another, and masks. Images decoded from it are as near to the published ones as the model's own can come.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from hasten.bench.subject import Edit
from hasten.errors import ModelError
from hasten.io import Array, Kind, check_arrays, read_tensors, write_tensors
from torch import Tensor

from hasten_zoo.command import told
from hasten_zoo.emoji_styles import WEIGHTS
from hasten_zoo.emoji_styles.data import EmojiStyles, Pair, load_emoji_styles_data
from hasten_zoo.emoji_styles.vae import EmojiVAE
from hasten_zoo.emoji_styles_edit import HERE
from hasten_zoo.emoji_styles_edit.data import SIZE, draw_scenes, render_scenes, scene_texts, to_style
from hasten_zoo.emoji_styles_edit.latents import STEP, encode

__all__ = ["TrueEdit", "held_out_edits", "read_edits", "save_edits"]

What = Literal["style", "background", "object"]
BACK_SHARE = 0.5  # of the edits of objects remove one
COUNTS: dict[What, int] = {"style": 7, "background": 14, "object": 43}  # of the file; there are seven styles


@dataclass(frozen=True, eq=False)
class TrueEdit:
    """An edit, what it concerns, and which pair its target shows."""

    edit: Edit
    what: What
    pair: Pair


def _candidates(data: EmojiStyles, what: What, generator: torch.Generator) -> Iterator[TrueEdit]:
    """One edit for every held-out pair, in random order."""
    known: dict[str, list[int]] = {}
    for i in data.taught(held_out=False).tolist():
        known.setdefault(data.pairs[i].concept, []).append(i)
    rows = data.taught(held_out=True)
    for row in rows[torch.randperm(len(rows), generator=generator)].tolist():
        pair = data.pairs[row]
        if what == "style":
            others = known[pair.concept]
            source = others[int(torch.randint(len(others), (), generator=generator))]
            scenes = draw_scenes(data.pairs, torch.tensor([source, row]), generator)  # in one view
            before, after = render_scenes(data, scenes)[0]
            prompt, mask = to_style(pair.style), torch.ones(SIZE, SIZE, dtype=torch.bool)
        else:
            scenes = draw_scenes(data.pairs, torch.tensor([row]), generator, float(what == "object"))
            if what == "object" and int(scenes.item[0]) < 0:
                continue
            (before,), (after,), (mask,) = render_scenes(data, scenes)
            (there,), (back,) = scene_texts(scenes)
            prompt = there
            if what == "object" and float(torch.rand((), generator=generator)) < BACK_SHARE:
                prompt, before, after = back, after, before
            mask = mask if what == "object" else torch.ones_like(mask)
        kind: Literal["local", "global"] = "local" if what == "object" else "global"
        yield TrueEdit(Edit(prompt, (before + 1) / 2, (after + 1) / 2, mask, kind), what, pair)


def held_out_edits(data: EmojiStyles, counts: dict[What, int], seed: int = 0, distinct: bool = False) -> list[TrueEdit]:
    """So many edits of each sort, the same every time; `distinct`: of different instructions, fewer if that is all."""
    generator, found, said = torch.Generator().manual_seed(seed), list[TrueEdit](), set[str]()
    for what, count in counts.items():
        wanted = len(found) + count
        for candidate in _candidates(data, what, generator):
            if len(found) == wanted:
                break
            if not (distinct and candidate.edit.prompt in said):
                found.append(candidate)
                said.add(candidate.edit.prompt)
    return found


@dataclass(frozen=True)
class _Said:
    """The header's content: for each edit its instruction, what it concerns, and style and concept of its target."""

    prompts: list[str]
    what: list[str]
    style: list[str]
    concept: list[str]

    def __post_init__(self) -> None:
        if not len(self.prompts) == len(self.what) == len(self.style) == len(self.concept) == len(set(self.prompts)):
            raise ValueError("instructions are not as many as edits, or not distinct")
        if not set(self.what) <= set(COUNTS):
            raise ValueError(f"an edit concerns none of {', '.join(COUNTS)}")


KIND = Kind(
    "held-out edits",
    _Said,
    ModelError,
    "Reinstall hasten-zoo, or write them with python -m hasten_zoo.emoji_styles_edit.edits.",
)
LATENTS = ("edits", "channels", "side", "side")
ARRAYS = {
    "source": Array("integer", LATENTS),
    "target": Array("integer", LATENTS),
    "mask": Array("integer", ("edits", "rows", "eighths")),
}


@torch.inference_mode()
def save_edits(edits: Sequence[TrueEdit], vae: EmojiVAE, path: Path) -> None:
    """Write edits of distinct instructions."""
    tensors = {
        name: torch.cat([encode(vae, getattr(true.edit, name)[None] * 2 - 1) for true in edits]).numpy()
        for name in ("source", "target")
    }
    tensors["mask"] = np.packbits(torch.stack([true.edit.mask for true in edits]).numpy(), axis=-1)
    said = _Said(
        [true.edit.prompt for true in edits],
        [true.what for true in edits],
        [true.pair.style for true in edits],
        [true.pair.concept for true in edits],
    )
    write_tensors(path, KIND, tensors, asdict(said))


@torch.inference_mode()
def read_edits(path: Path, vae: EmojiVAE, pairs: Sequence[Pair]) -> list[Edit]:
    """What `save_edits` wrote, decoded.

    Args:
        path: of the file.
        vae: that decodes it.
        pairs: all there are of style and concept; they say which are taught, and which are held out.

    Raises:
        ModelError: if the file is missing or damaged, or an edit is of a pair that is not taught, or not held out.
    """
    arrays, said = read_tensors(path, KIND)
    measured = {(pair.style, pair.concept) for pair in pairs if pair.taught and pair.held_out}
    for style, concept in zip(said.style, said.concept, strict=True):
        if (style, concept) not in measured:
            raise ModelError(
                f"{path}: an edit is of the pair {style}, {concept}, which is not one of the {len(measured)} that are "
                f"held out of what is taught. {KIND.remedy}"
            )
    try:
        check_arrays(arrays, ARRAYS, {"edits": len(said.prompts), "channels": 16, "side": SIZE // 8, "rows": SIZE})
    except ValueError as error:
        raise ModelError(f"{path}: no usable edits ({error}). {KIND.remedy}") from error

    def images(name: str) -> Tensor:
        z = torch.from_numpy(arrays[name]).float() * STEP / vae.config.scaling_factor + vae.config.shift_factor
        decoded: Tensor = vae.decode(z, return_dict=False)[0]
        return (decoded.clamp(-1, 1) + 1) / 2

    masks = torch.from_numpy(np.unpackbits(arrays["mask"], axis=-1)).bool()
    columns = zip(said.prompts, images("source"), images("target"), masks, said.what, strict=True)
    return [
        Edit(prompt, source, target, mask, "local" if what == "object" else "global")
        for prompt, source, target, mask, what in columns
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/emoji-styles/data"))
    parser.add_argument("--vae", type=Path, default=WEIGHTS / "vae")
    parser.add_argument("--out", type=Path, default=HERE / "edits.safetensors")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    edits = held_out_edits(load_emoji_styles_data(args.data), COUNTS, distinct=True)
    save_edits(edits, EmojiVAE.from_pretrained(args.vae).eval(), args.out)


if __name__ == "__main__":
    told(main)
