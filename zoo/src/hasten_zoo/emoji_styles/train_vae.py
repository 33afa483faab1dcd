"""Train the autoencoder of `emoji-styles` and write it as a folder that diffusers loads.

    python -m hasten_zoo.emoji_styles.train_vae --data runs/emoji-styles/data --out runs/emoji-styles/vae

L1 and squared error, LPIPS on parts of some images, noise on the latents (so that the decoder forgives a sampler's
errors), and in a part of the batches the decoded half-size latents against the half-size image: coarse stages, which
resize latents, then see what FLUX's autoencoder shows them. Images are of all three sizes, from the training pairs.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from hasten.io import write_atomically, write_sealed
from torch import Tensor
from torch.nn import functional as F

from hasten_zoo.command import told
from hasten_zoo.emoji_styles.augment import draw_views, plain_views, render
from hasten_zoo.emoji_styles.data import EmojiStyles, load_emoji_styles_data
from hasten_zoo.emoji_styles.perceptual import Perceptual
from hasten_zoo.emoji_styles.vae import EmojiVAE
from hasten_zoo.training import Loss, Settings, Training, read_checkpoint, run

BATCH = 8  # images of 128 pixels; the same number of pixels for other sizes
CROP = 64  # pixels; side of the part that LPIPS sees
LATENT_NOISE = 0.2  # largest standard deviation, against the latents' one
HALF_SHARE = 0.25  # of the batches also decode half-size latents
SQUARED, PERCEPTUAL, HALF = 1.0, 0.15, 0.5  # weights against L1


class Objective:
    """Draws a batch and gives its loss."""

    def __init__(self, vae: EmojiVAE, data: EmojiStyles, batch: int = BATCH, device: str = "cpu") -> None:
        self.vae, self.data, self.batch = vae, data, batch
        self.rows = data.rows(held_out=False)
        self.perceptual = Perceptual().to(device)
        self.device = device

    def __call__(self, generator: torch.Generator) -> Loss:
        chance = float(torch.rand((), generator=generator))
        size = 128 if chance < 0.7 else 64 if chance < 0.85 else 192
        images = self._images(size, generator).to(self.device)
        z: Tensor = self.vae.encode(images, return_dict=False)[0]
        sigma = LATENT_NOISE * torch.rand(len(z), 1, 1, 1, generator=generator)
        noisy = z + (sigma * torch.randn(z.shape, generator=generator)).to(self.device)
        decoded = self.vae.decode(noisy, return_dict=False)[0].float()
        parts = {"l1": F.l1_loss(decoded, images), "mse": F.mse_loss(decoded, images)}
        top, left = torch.randint(images.shape[-1] - CROP + 1, (2,), generator=generator).tolist()
        crop = (slice(self.batch // 2), slice(None), slice(top, top + CROP), slice(left, left + CROP))
        parts["lpips"] = self.perceptual(decoded[crop], images[crop]).mean()
        value = parts["l1"] + SQUARED * parts["mse"] + PERCEPTUAL * parts["lpips"]
        if float(torch.rand((), generator=generator)) < HALF_SHARE:
            small = self.vae.decode(F.avg_pool2d(z.float(), 2), return_dict=False)[0].float()
            parts["half"] = F.l1_loss(small, F.avg_pool2d(images, 2))
            value = value + HALF * parts["half"]
        return Loss(value, len(images) * images.shape[-1] ** 2 // 128**2, str(size), parts)

    def _images(self, size: int, generator: torch.Generator) -> Tensor:
        """A batch of one size; of the largest, parts of 128 pixels."""
        count = self.batch * (4 if size == 64 else 1)
        rows = self.rows[torch.randint(len(self.rows), (count,), generator=generator)]
        images = render(self.data, rows, draw_views(self.data.pairs, rows, generator), size)
        if size == 192:
            top, left = torch.randint(65, (2,), generator=generator).tolist()
            images = images[:, :, top : top + 128, left : left + 128]
        return images


@torch.no_grad()
def round_trip(vae: EmojiVAE, data: EmojiStyles, size: int, limit: int = 256) -> tuple[Tensor, Tensor]:
    """`[n]` PSNR in dB of held-out images on white, and those images with their round trips, `[n, 2, 3, R, R]`."""
    rows = data.rows(held_out=True)
    rows = rows[torch.linspace(0, len(rows) - 1, min(limit, len(rows))).long()]
    vae.eval()
    decibels, shown = [], []
    for part in rows.split(32):
        images = render(data, part, plain_views(len(part)), size)
        z = vae.encode(images, return_dict=False)[0]
        decoded = vae.decode(z, return_dict=False)[0].clamp(-1, 1)
        squares = ((decoded - images) / 2).square().mean((1, 2, 3))
        decibels.append(-10 * squares.log10())
        shown.append(torch.stack([images, decoded], 1))
    return torch.cat(decibels), torch.cat(shown)


@torch.no_grad()
def export(average: dict[str, Tensor], vae: EmojiVAE, data: EmojiStyles, out: Path) -> dict[str, float]:
    """Write the averaged weights in half precision, latents scaled to unit variance; returns what was measured."""
    vae.load_state_dict(average)
    vae.eval()
    rows = data.rows(held_out=False)
    generator = torch.Generator().manual_seed(0)
    rows = rows[torch.randperm(len(rows), generator=generator)[:512]]
    images = render(data, rows, draw_views(data.pairs, rows, generator), 128)
    z = torch.cat([vae.encode(part, return_dict=False)[0] for part in images.split(32)])
    vae.register_to_config(shift_factor=float(z.mean()), scaling_factor=float(1 / z.std()))
    measured = {f"psnr_{size}": round(float(round_trip(vae, data, size)[0].mean()), 2) for size in (64, 128, 192)}

    def fill(folder: Path) -> None:
        vae.half().save_pretrained(folder)
        write_atomically(folder / "round_trip.json", json.dumps(measured) + "\n")

    write_sealed(out, fill)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/emoji-styles/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/emoji-styles/vae"))
    parser.add_argument("--samples", type=int, default=30_000, help="images of 128 pixels to see, in total")
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--export", action="store_true", help="only write the averaged weights of the last checkpoint")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    data, vae = load_emoji_styles_data(args.data), EmojiVAE()
    if not args.export:
        cooldown = (round(0.6 * args.samples), round(0.4 * args.samples))
        settings = Settings(lr=args.lr, cooldown=cooldown, ema=0.995, bfloat16=True)
        training = Training(vae, Objective(vae, data, device=args.device), settings, args.device)
        run(training, args.out, args.samples, args.minutes, checkpoint_minutes=2)
    state = read_checkpoint(args.out)
    print(json.dumps(export(state["average"], EmojiVAE(), data, args.out / "weights")))


if __name__ == "__main__":
    told(main)
