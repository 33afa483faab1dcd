"""Latents of augmented views, encoded once and kept on disk, so that training does not wait for the autoencoder.

    python -m hasten_zoo.emoji_styles.latents --data runs/emoji-styles/data --vae runs/emoji-styles/vae/weights

Each training pair of a concept that is taught is encoded in several views per size (mirrored, shifted, on a colour).
Another `--seed` gives other views: a new part of the training is best given new ones.

Shapes: per size S `latents-S.npy` is `[V, N, 16, S/8, S/8]` float16 and `colours-S.npy` is `[V, N]` uint8, for V views
of N training pairs; latents are shifted and scaled, as the transformer sees them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from hasten.io import write_atomically
from torch import Tensor

from hasten_zoo.command import told
from hasten_zoo.emoji_styles import WEIGHTS
from hasten_zoo.emoji_styles.augment import draw_views, render
from hasten_zoo.emoji_styles.data import EmojiStyles, load_emoji_styles_data
from hasten_zoo.emoji_styles.vae import EmojiVAE

__all__ = ["VIEWS", "Latents", "encode_views", "load_latents"]

VIEWS = {128: 16, 64: 8, 192: 4}  # per training pair


@dataclass(frozen=True)
class Latents:
    """Views of one size: `[V, N, 16, S/8, S/8]` latents float16 and `[V, N]` numbers of their background colours."""

    values: Tensor
    colours: Tensor


def vae_folder(runs: Path = Path("runs/emoji-styles"), committed: Path = WEIGHTS) -> Path:
    """The autoencoder that `train_vae` left, or else the one that comes with the weights."""
    return next((p for p in (runs / "vae" / "weights", committed / "vae") if p.is_dir()), WEIGHTS / "vae")


@torch.inference_mode()
def encode_views(vae: EmojiVAE, data: EmojiStyles, size: int, views: int, seed: int, batch: int = 64) -> Latents:
    """Encode `views` random views of every training pair at one size."""
    generator = torch.Generator().manual_seed(seed)
    rows = data.taught(held_out=False)
    vae.eval()
    side = size // 8
    values = torch.empty(views, len(rows), vae.config.latent_channels, side, side, dtype=torch.float16)
    colours = torch.empty(views, len(rows), dtype=torch.uint8)
    for view in range(views):
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            drawn = draw_views(data.pairs, part, generator)
            images = render(data, part, drawn, size).to(vae.device)
            with torch.autocast(vae.device.type, torch.bfloat16):
                z: Tensor = vae.encode(images, return_dict=False)[0].float()
            z = (z - vae.config.shift_factor) * vae.config.scaling_factor
            values[view, start : start + batch] = z.half().cpu()
            colours[view, start : start + batch] = drawn.colour.to(torch.uint8)
    return Latents(values, colours)


def save_latents(latents: Latents, folder: Path, size: int) -> None:
    """Write one size."""
    for name, value in (("colours", latents.colours), ("latents", latents.values)):
        write_atomically(folder / f"{name}-{size}.npy", partial(np.save, arr=value.numpy()))


def load_latents(folder: Path) -> dict[int, Latents]:
    """All sizes that there are, smallest first.

    Raises:
        FileNotFoundError: if there are none.
    """
    files = sorted(folder.glob("latents-*.npy"), key=lambda file: int(file.stem.split("-")[1]))
    if not files:
        raise FileNotFoundError(f"no latents in {folder}; run python -m hasten_zoo.emoji_styles.latents first")
    found = {}
    for file in files:
        size = int(file.stem.split("-")[1])
        colours = np.load(folder / f"colours-{size}.npy")
        found[size] = Latents(torch.from_numpy(np.load(file)), torch.from_numpy(colours))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/emoji-styles/data"))
    parser.add_argument("--vae", type=Path, help="default: the folder of train_vae, else the committed one")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji-styles/latents"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--more", type=int, default=1, help="times as many views as by default (for a GPU)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = load_emoji_styles_data(args.data)
    vae = EmojiVAE.from_pretrained(args.vae or vae_folder()).to(args.device)
    for size, views in VIEWS.items():
        save_latents(encode_views(vae, data, size, args.more * views, args.seed + size), args.out, size)


if __name__ == "__main__":
    told(main)
