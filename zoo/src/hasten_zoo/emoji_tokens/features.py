"""A fixed feature space for images of `data`: a small network that tells what is on an image and how damaged it is.

It learns the object, the background, the place and size of the object, and, as half of its images are spoiled (noise,
blur, squares of 4x4 pixels taken from elsewhere or tinted), the size of the error. So its features change with what is
on an image and with how well it is drawn. The weights come with the package; distances in this space compare with
nothing but each other.

    python -m hasten_zoo.emoji_tokens.features --out runs/emoji-tokens     train it again, about 2 processor minutes

Shapes: images `[B, 3, 32, 32]` float32 in [0, 1], features `[B, 64]`.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np
import torch
from hasten.errors import ModelError
from hasten.io import Kind, write_atomically
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from hasten_zoo.command import told
from hasten_zoo.emoji_tokens.data import BACKGROUNDS, HELD_OUT, OBJECTS, TRAIN, Images, images
from hasten_zoo.weights import read_weights, write_weights

__all__ = ["FEATURES", "FeatureNet", "spoiled", "train"]

FEATURES = 64
WEIGHTS = Path(__file__).parent / "weights" / "features.safetensors"
KIND = Kind("feature network", dict[str, str], ModelError, "Reinstall hasten-zoo, or train it.")
LR, WARMUP, BATCH = 2e-3, 100, 64
CELL = 4


class FeatureNet(nn.Module):
    """Features of images, and the answers that they were trained for."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 48, 64, 96)
        stages: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(widths)):
            stages += [nn.Conv2d(a, b, 3, stride=1 if i == 0 else 2, padding=1), nn.GroupNorm(8, b), nn.SiLU()]
        self.body = nn.Sequential(*stages, nn.Flatten(), nn.Linear(16 * widths[-1], FEATURES))
        answers = {"object": len(OBJECTS), "background": len(BACKGROUNDS), "place": 3, "damage": 1}
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, width) for name, width in answers.items()})

    def forward(self, pixels: Tensor) -> Tensor:
        """Features `[B, 64]`."""
        return self.body(pixels * 2 - 1)

    def answers(self, pixels: Tensor) -> dict[str, Tensor]:
        """Logits of `object` and `background`, `place` as in `Images`, `damage`: log10 of the mean squared error."""
        features = functional.silu(self(pixels))
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def describe(self, pixels: Tensor, batch: int = 256) -> NDArray[np.float64]:
        """Features of any number of images, `[N, 64]` float64."""
        return torch.cat([self(part) for part in pixels.split(batch)]).double().numpy()

    @torch.no_grad()
    def objects(self, pixels: Tensor, batch: int = 256) -> Tensor:
        """The likeliest object on each image, `[N]` int64, indices in `OBJECTS`."""
        return torch.cat([self.answers(part)["object"].argmax(-1) for part in pixels.split(batch)])

    def loss(self, image: Images, pixels: Tensor) -> Tensor:
        """Of the answers for `pixels`, which are the spoiled image."""
        answers = self.answers(pixels)
        error = (pixels - image.pixels).square().flatten(1).mean(1, keepdim=True)
        return (
            functional.cross_entropy(answers["object"], image.classes)
            + functional.cross_entropy(answers["background"], image.backgrounds)
            + 10 * functional.mse_loss(answers["place"], image.places)
            + functional.mse_loss(answers["damage"], (error + 1e-4).log10())
        )

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file in half precision; returns its path."""
        return write_weights(path, KIND, self, {})

    @classmethod
    def load(cls, path: str | Path = WEIGHTS) -> Self:
        """Read what `save` wrote; by default the weights that come with the package.

        Raises:
            ModelError: if the file is missing, damaged or of another network.
        """
        return read_weights(path, KIND, lambda _: cls()).eval().requires_grad_(False)


def spoiled(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """The images, every second one spoiled in one of four ways by a random amount."""
    n, _, height, width = pixels.shape
    amount = torch.rand(n, 1, 1, 1, generator=generator)
    noisy = pixels + 0.2 * amount * torch.randn(pixels.shape, generator=generator)
    blurred = pixels + amount * (functional.avg_pool2d(pixels, 5, 1, 2, count_include_pad=False) - pixels)
    cells = (n, 1, height // CELL, width // CELL)
    hit = (torch.rand(cells, generator=generator) < 0.5 * amount).repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)
    moved = torch.where(hit, pixels.roll((CELL, CELL), (2, 3)), pixels)
    tint = 0.15 * torch.randn(n, 3, *cells[2:], generator=generator)
    tinted = torch.where(hit, pixels + tint.repeat_interleave(CELL, 2).repeat_interleave(CELL, 3), pixels)
    ways = torch.stack([noisy, blurred, moved, tinted], 1)
    chosen = ways[torch.arange(n), torch.randint(4, (n,), generator=generator)].clamp(0, 1)
    return torch.where(torch.rand(n, 1, 1, 1, generator=generator) < 0.5, pixels, chosen)


@torch.no_grad()
def _accuracy(net: FeatureNet, count: int) -> dict[str, float]:
    """Shares of held-out images whose object and background are told."""
    seen = images(count, HELD_OUT)
    answers = net.answers(seen.pixels)
    right = {"object": seen.classes, "background": seen.backgrounds}
    return {name: round(float((answers[name].argmax(-1) == truth).float().mean()), 4) for name, truth in right.items()}


def train(out: Path, steps: int, every: int = 250) -> FeatureNet:
    """Train for some steps; writes `features.safetensors` and `features_log.jsonl` to the folder."""
    torch.manual_seed(0)
    net = FeatureNet()
    optimizer = torch.optim.AdamW(net.parameters(), LR, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    rows, started = [], time.process_time()
    for step in range(1, steps + 1):
        seen = images(BATCH, TRAIN + step)
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, step / WARMUP, max(0.02, 2 * (1 - step / steps)))
        loss = net.loss(seen, spoiled(seen.pixels, torch.Generator().manual_seed(step)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % every == 0 or step == steps:
            row = {"step": step, "loss": round(float(loss.detach()), 4), **_accuracy(net, 1024)}
            rows.append(json.dumps({**row, "cpu_seconds": round(time.process_time() - started)}))
    write_atomically(out / "features_log.jsonl", "\n".join(rows) + "\n")
    net.save(out / "features.safetensors")
    return net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji-tokens"))
    parser.add_argument("--steps", type=int, default=800)
    args = parser.parse_args()
    train(args.out, args.steps)


if __name__ == "__main__":
    told(main)
