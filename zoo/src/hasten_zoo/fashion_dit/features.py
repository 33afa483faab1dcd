"""A small classifier of Fashion-MNIST, in whose features distributions are compared.

    python -m hasten_zoo.fashion_dit.features --data runs/fashion-dit/data

trains one (five minutes on one core) into `runs/fashion-dit`. The one that comes with the model lies beside the card:
distances in its features are comparable only with each other, so it stays. They are not FID, which is defined by
another network.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from hasten.errors import ModelError
from hasten.io import Kind
from torch import Tensor, nn
from torch.nn import functional as F

from hasten_zoo.command import at_least_one, told
from hasten_zoo.fashion_dit import CLASSES, HERE
from hasten_zoo.fashion_dit.data import FashionData, load_fashion_data, scaled
from hasten_zoo.weights import read_weights, write_weights

__all__ = ["FILE", "FashionFeatures"]

FILE = HERE / "features.safetensors"
BATCH = 128
KIND = Kind("classifier", dict[str, str], ModelError, "Train it with python -m hasten_zoo.fashion_dit.features.")


class FashionFeatures(nn.Module):
    """`[B, 1, 32, 32]` images in [-1, 1] to `[B, 128]` features (`forward`) and `[B, 10]` logits (`logits`)."""

    def __init__(self) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int) -> list[nn.Module]:
            return [
                nn.Conv2d(inputs, outputs, 3, padding=1),
                nn.GroupNorm(8, outputs),
                nn.GELU(),
                nn.Conv2d(outputs, outputs, 3, padding=1),
                nn.GroupNorm(8, outputs),
                nn.GELU(),
                nn.MaxPool2d(2),
            ]

        self.stages = nn.Sequential(*stage(1, 16), *stage(16, 32), *stage(32, 64))
        self.project = nn.Linear(64 * 4 * 4, 128)
        self.head = nn.Linear(128, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = F.gelu(self.project(self.stages(images).flatten(1)))
        return features

    def logits(self, features: Tensor) -> Tensor:
        """Class scores `[B, 10]` of features `[B, 128]`."""
        scores: Tensor = self.head(features)
        return scores

    @torch.no_grad()
    def of(self, images: Tensor) -> Tensor:
        """Features `[N, 128]` of any number of images in [-1, 1], in parts."""
        return torch.cat([self(part) for part in images.split(250)])

    @classmethod
    def load(cls, file: Path = FILE) -> FashionFeatures:
        """The trained classifier.

        Raises:
            ModelError: if the file is missing, damaged or of another network.
        """
        return read_weights(file, KIND, lambda _: cls()).eval()

    def save(self, file: Path) -> Path:
        """Write the weights in half precision; returns the path."""
        return write_weights(file, KIND, self, {})


def train(data: FashionData, epochs: int, seed: int = 0) -> FashionFeatures:
    """Fit the classifier: AdamW, one cycle of the rate, label smoothing, shifts of up to two pixels."""
    torch.manual_seed(seed)
    network = FashionFeatures().train()
    steps = epochs * (len(data.train) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.02)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        rows = torch.randint(len(data.train), (BATCH,))
        shift = torch.randint(-2, 3, (2,)).tolist()
        images = scaled(data.train[rows]).roll(shift, (2, 3))  # the border is black
        with torch.autocast("cpu", torch.bfloat16):
            logits = network.logits(network(images))
        loss = F.cross_entropy(logits.float(), data.train_labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if step % 100 == 0:
            print(json.dumps({"step": step, "of": steps, "loss": round(float(loss.detach()), 4)}), flush=True)
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/fashion-dit/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/fashion-dit/features.safetensors"))
    parser.add_argument("--epochs", type=at_least_one, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = load_fashion_data(args.data)
    network = train(data, args.epochs)
    found = network.logits(network.of(scaled(data.test))).argmax(1)
    print(json.dumps({"test_accuracy": round(float((found == data.test_labels).float().mean()), 4)}))
    network.save(args.out)


if __name__ == "__main__":
    told(main)
