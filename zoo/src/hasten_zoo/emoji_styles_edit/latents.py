"""Latents of the scenes, encoded once and kept on disk.

    python -m hasten_zoo.emoji_styles_edit.latents --data runs/emoji-styles/data

`scenes-128.npy` is `[N, 2, 16, 16, 16]` int8, the first and the second image of each scene at 128 pixels, in steps of
0.1; `scenes-64.npy` is `[N, 2, 16, 8, 8]`, the same images shrunk, for coarse stages; `scenes.json` says what they
show. Another `--seed` gives others.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from hasten.io import write_atomically
from torch import Tensor
from torch.nn import functional as F

from hasten_zoo.command import told
from hasten_zoo.emoji_styles import WEIGHTS
from hasten_zoo.emoji_styles.data import EmojiStyles, load_emoji_styles_data
from hasten_zoo.emoji_styles.vae import EmojiVAE
from hasten_zoo.emoji_styles_edit.data import SIZE, Scenes, draw_scenes, render_scenes, scene_texts

__all__ = ["SIZES", "STEP", "SceneLatents", "encode", "encode_scenes", "load_scenes", "save_scenes"]

STEP = 0.1
SIZES = (SIZE, SIZE // 2)


@dataclass(frozen=True)
class SceneLatents:
    """What training needs of N scenes.

    Attributes:
        values: by size in pixels, `[N, 2, 16, S/8, S/8]` int8, latents (shifted and scaled) in steps of `STEP`.
        style: for each scene.
        concept: for each scene; scenes of one concept have their first images in the same view.
        there: the instruction from the first to the second image.
        back: the one back.
        corner: number of the corner with an object, -1 where there is none.
    """

    values: dict[int, Tensor]
    style: list[str]
    concept: list[str]
    there: list[str]
    back: list[str]
    corner: list[int]


def encode(vae: EmojiVAE, images: Tensor) -> Tensor:
    """`[B, 16, S/8, S/8]` int8 of images `[B, 3, S, S]` in [-1, 1]."""
    z: Tensor = vae.encode(images, return_dict=False)[0]
    z = (z - vae.config.shift_factor) * vae.config.scaling_factor
    return (z / STEP).round().clamp(-127, 127).to(torch.int8)


@torch.inference_mode()
def encode_scenes(vae: EmojiVAE, data: EmojiStyles, scenes: Scenes, batch: int = 64) -> SceneLatents:
    """Render and encode scenes."""
    vae.eval()
    parts: dict[int, list[Tensor]] = {size: [] for size in SIZES}
    for start in range(0, len(scenes.rows), batch):
        images = render_scenes(data, scenes.part(slice(start, start + batch)))[:2]
        for size, found in parts.items():
            found.append(torch.stack([encode(vae, F.avg_pool2d(image, SIZE // size)) for image in images], 1))
    pairs = [data.pairs[i] for i in scenes.rows.tolist()]
    there, back = scene_texts(scenes)
    corner = torch.where(scenes.item >= 0, scenes.corner, -1).tolist()
    values = {size: torch.cat(found) for size, found in parts.items()}
    return SceneLatents(values, [p.style for p in pairs], [p.concept for p in pairs], there, back, corner)


def save_scenes(scenes: SceneLatents, folder: Path) -> None:
    """Write them."""
    for size, values in scenes.values.items():
        write_atomically(folder / f"scenes-{size}.npy", partial(np.save, arr=values.numpy()))
    shown = {name: value for name, value in vars(scenes).items() if name != "values"}
    write_atomically(folder / "scenes.json", json.dumps(shown) + "\n")


def load_scenes(folder: Path) -> SceneLatents:
    """What `save_scenes` wrote.

    Raises:
        FileNotFoundError: if there is nothing.
    """
    if not (folder / "scenes.json").is_file():
        raise FileNotFoundError(f"no scenes in {folder}; run python -m hasten_zoo.emoji_styles_edit.latents first")
    shown = json.loads((folder / "scenes.json").read_text())
    values = {size: torch.from_numpy(np.load(folder / f"scenes-{size}.npy")) for size in SIZES}
    return SceneLatents(values, **shown)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/emoji-styles/data"))
    parser.add_argument("--vae", type=Path, default=WEIGHTS / "vae")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji-styles-edit/latents"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    data = load_emoji_styles_data(args.data)
    scenes = draw_scenes(data.pairs, data.taught(held_out=False), torch.Generator().manual_seed(args.seed))
    save_scenes(encode_scenes(EmojiVAE.from_pretrained(args.vae), data, scenes), args.out)


if __name__ == "__main__":
    told(main)
