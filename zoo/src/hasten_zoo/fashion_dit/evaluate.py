"""How good `fashion-dit` is, as a distribution, against the 10,000 images that it never saw.

    python -m hasten_zoo.fashion_dit.evaluate --data runs/fashion-dit/data

Writes `evaluation.json` and `contact_sheet.png` beside the card: for each guidance the Frechet distance of 2,000
generated images (classes in turn) to the test images in the features of `features.py`, precision and recall against
2,000 of them, how often the classifier finds the class asked for, and how many images hardly differ from a training
image. `floor` is what as many real images, of the training set, reach.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiTPipeline
from PIL import Image
from torch import Tensor

from hasten_zoo.command import at_least_one, told
from hasten_zoo.evaluation import add_folders, out_of, write_evaluation
from hasten_zoo.fashion_dit import CLASSES, WEIGHTS
from hasten_zoo.fashion_dit.data import FashionData, load_fashion_data, scaled
from hasten_zoo.fashion_dit.distances import frechet, precision_recall
from hasten_zoo.fashion_dit.features import FashionFeatures
from hasten_zoo.fashion_dit.model import load_pipeline

__all__ = ["Judge", "generate"]

BATCH = 100
COPY = 0.05  # root mean square of the pixel difference, where the range is 2


def generate(pipe: DiTPipeline, count: int, guidance: float, steps: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images `[count, 1, 32, 32]` in [-1, 1], classes in turn, and their labels; image i has seed `seed + i`."""
    labels = torch.arange(count) % len(CLASSES)
    images = []
    for start in range(0, count, BATCH):
        part = labels[start : start + BATCH].tolist()
        noise = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        made = pipe(part, guidance_scale=guidance, generator=noise, num_inference_steps=steps, output_type="pt")
        images.append(made.images)
    return torch.cat(images) * 2 - 1, labels


class Judge:
    """Compares sets of images with the test images.

    Args:
        data: real images.
        compared: how many test images precision and recall are taken against.
    """

    def __init__(self, data: FashionData, compared: int = 2000) -> None:
        self.network = FashionFeatures.load()
        self.train = scaled(data.train)
        self.real = self.network.of(scaled(data.test))
        self.compared = self.real[:compared]  # the published order is random

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Frechet distance, precision, recall and the share of images with the right class."""
        features = self.network.of(images)
        precision, recall = precision_recall(features, self.compared)
        right = (self.network.logits(features).argmax(1) == labels).float().mean()
        return {
            "frechet": round(frechet(features, self.real), 3),
            "precision": round(precision, 3),
            "recall": round(recall, 3),
            "right_class": round(float(right), 3),
        }

    def nearest(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest training image of each, `[N]` root mean square differences and `[N]` rows."""
        distances = torch.cdist(images.flatten(1), self.train.flatten(1)) / images[0].numel() ** 0.5
        return distances.min(1)


def sheet(rows: Sequence[Tensor], scale: int = 2) -> Image.Image:
    """Batches `[B, 1, 32, 32]` in [-1, 1] as rows of an image, enlarged."""
    lines = [torch.cat(list(batch[:, 0]), dim=1) for batch in rows]
    pixels = ((torch.cat(lines).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    return Image.fromarray(np.kron(pixels, np.ones((scale, scale), np.uint8)))


@torch.inference_mode()
def evaluate(weights: Path, data: FashionData, out: Path, images: int, steps: int) -> dict[str, Any]:
    """Generate, measure, write; returns what `evaluation.json` holds."""
    pipe = load_pipeline(weights)
    pipe.set_progress_bar_config(disable=True)
    judge = Judge(data, images)
    result: dict[str, Any] = {
        "trained_on_samples": json.loads((weights / "training.json").read_text())["samples"],
        "images": images,
        "steps": steps,
        "floor": judge(scaled(data.train[:images]), data.train_labels[:images]),
    }
    rows = []
    for guidance in (1.0, 1.5, 4.0):
        made, labels = generate(pipe, images, guidance, steps)
        distances, nearest = judge.nearest(made)
        result[f"guidance_{guidance:g}"] = judge(made, labels) | {
            "near_copies": int((distances < COPY).sum()),
            "rms_to_nearest_training_image": round(float(distances.median()), 4),
        }
        rows += [made[i : i + 10] for i in (0, 10, 20)]
        if guidance == 1.5:
            rows.append(judge.train[nearest[:10]])
    write_evaluation(out, result, sheet(rows))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/fashion-dit/data"))
    add_folders(parser, WEIGHTS)
    parser.add_argument("--images", type=at_least_one, default=2000)
    parser.add_argument("--steps", type=at_least_one, default=50)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        json.dumps(
            evaluate(args.weights, load_fashion_data(args.data), out_of(args), args.images, args.steps), indent=1
        )
    )


if __name__ == "__main__":
    told(main)
