"""Which style and which concept an image shows.

    python -m hasten_zoo.emoji_styles.judge --data runs/emoji-styles/data    # writes judge.safetensors

Features are those of EfficientNet-lite0 (ImageNet), nothing is trained by gradient:

- *concept*: late activations, the mean over both orientations, projected so that images of one concept in different
  styles come together (whitened by the scatter within concepts). The concept of an image is that of the most similar
  published image; for a stricter question, that of the most similar mean over the images that were trained on, so that
  nothing is known about held-out ones.
- *style*: early activations' statistics and a histogram of colours, ridge regression on the training pairs, before
  and after the autoencoder.

Shapes: images `[B, 3, R, R]` in [-1, 1], on white; any R.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from hasten.errors import ModelError
from hasten.io import Array, Kind, check_arrays, read_tensors, write_tensors
from torch import Tensor
from torch.nn import functional as F

from hasten_zoo.command import told
from hasten_zoo.emoji_styles.augment import plain_views, render
from hasten_zoo.emoji_styles.data import EmojiStyles, PackedPairs, Pair, load_emoji_styles_data, packed
from hasten_zoo.emoji_styles.efficientnet import EfficientNetLite0, weights_path
from hasten_zoo.emoji_styles.vae import EmojiVAE

__all__ = ["Judge"]

EARLY = 4  # stages of the network whose statistics tell the style
SIDE = 128  # pixels at which images are looked at
DIMENSIONS = 192  # of the space of concepts
COLOURS = 9  # steps per channel of the histogram
SHRINKAGE = 0.1  # of the scatter within concepts, towards its mean
RIDGE = 0.1  # against the mean square of the features
DESCRIPTION = "EfficientNet-lite0 (ImageNet), whitened within concepts; style: ridge on early statistics and colours"


def features(network: EfficientNetLite0, images: Tensor) -> tuple[Tensor, Tensor]:
    """For concepts `[B, 1728]`, and for styles `[B, 1369]`."""
    images = _sized(images)
    taps = network(torch.cat([images, images.flip(-1)]))
    late = [F.adaptive_avg_pool2d(taps[-1], 1), F.adaptive_avg_pool2d(taps[5], 2)]
    late = [tap.flatten(1).unflatten(0, (2, -1)).mean(0) for tap in late]
    concept = torch.cat([F.normalize(tap.sign() * tap.abs().sqrt(), dim=1) for tap in late], 1)
    return concept, _style_features([tap[: len(images)] for tap in taps[:EARLY]], images)


def _sized(images: Tensor) -> Tensor:
    if images.shape[-1] == SIDE:
        return images
    return F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True).clamp(-1, 1)


def _style_features(taps: list[Tensor], images: Tensor) -> Tensor:
    statistics = [f for tap in taps for f in (tap.mean((2, 3)), tap.std((2, 3)), tap.amax((2, 3)), tap.amin((2, 3)))]
    return torch.cat([*statistics, _histogram(images)], 1)


def _histogram(images: Tensor) -> Tensor:
    """`[B, 729]` roots of the shares of colours, white left out."""
    steps = ((images + 1) / 2 * (COLOURS - 1)).clamp(0, COLOURS - 1).round().long()
    number = ((steps[:, 0] * COLOURS + steps[:, 1]) * COLOURS + steps[:, 2]).flatten(1)
    shares = torch.zeros(len(images), COLOURS**3).scatter_add(1, number, torch.ones(number.shape)) / number.shape[1]
    shares[:, -1] = 0
    return shares.sqrt()


FILE = "judge.safetensors"
KIND = Kind(
    "judge", PackedPairs, ModelError, "Reinstall hasten-zoo, or fit it with python -m hasten_zoo.emoji_styles.judge."
)
ARRAYS = {
    "mean": Array("float", ("features",)),
    "projection": Array("float", ("features", "dimensions")),
    "references": Array("integer", ("pairs", "dimensions")),
    "style_mean": Array("float", ("statistics",)),
    "style_scale": Array("float", ("statistics",)),
    "style_weight": Array("float", ("statistics", "styles")),
    "style_bias": Array("float", ("styles",)),
}


@dataclass(frozen=True)
class Judge:
    """Made by `fit`, kept by `save` and `load`; called with images, gives their styles and concepts.

    Attributes:
        pairs: the published images, in the order of the rows of `tensors["references"]`.
        tensors: `mean` and `projection` into the space of concepts, `references` there (int8), `style_mean`,
            `style_scale`, `style_weight` and `style_bias`.
        network: gives the features.
    """

    pairs: list[Pair]
    tensors: dict[str, Tensor]
    network: EfficientNetLite0

    description = DESCRIPTION

    @staticmethod
    def available(folder: Path) -> bool:
        """Whether the network's weights are installed, and `save` has written to the folder."""
        return weights_path() is not None and (folder / FILE).is_file()

    @property
    def styles(self) -> list[str]:
        """In the order of the columns of the style's weights."""
        return sorted({pair.style for pair in self.pairs})

    def __call__(self, images: Tensor) -> tuple[list[str], list[str]]:
        """The style of each image, and the concept of the published image that is most similar."""
        place, style = self._placed(images)
        nearest = (place @ F.normalize(self.tensors["references"].float(), dim=1).T).argmax(1)
        concepts = [self.pairs[i].concept for i in nearest.tolist()]
        return [self.styles[i] for i in style.tolist()], concepts

    def from_training_pairs(self, images: Tensor) -> list[str]:
        """The concept of each image as far as the training pairs tell: held-out images are not used."""
        known = [i for i, pair in enumerate(self.pairs) if not pair.held_out]
        concepts = sorted({self.pairs[i].concept for i in known})
        number = {concept: i for i, concept in enumerate(concepts)}
        labels = torch.tensor([number[self.pairs[i].concept] for i in known])
        places = F.normalize(self.tensors["references"][known].float(), dim=1)
        means = F.normalize(torch.zeros(len(concepts), places.shape[1]).index_add(0, labels, places), dim=1)
        place, _ = self._placed(images)
        return [concepts[i] for i in (place @ means.T).argmax(1).tolist()]

    def _placed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors `[B, 192]` in the space of concepts, and numbers of styles `[B]`."""
        t = {name: tensor.float() for name, tensor in self.tensors.items() if name != "references"}
        parts = [features(self.network, part.float().cpu()) for part in images.split(32)]
        concept, style = (torch.cat(part) for part in zip(*parts, strict=True))
        scores = (style - t["style_mean"]) * t["style_scale"] @ t["style_weight"] + t["style_bias"]
        return F.normalize((concept - t["mean"]) @ t["projection"], dim=1), scores.argmax(1)

    @classmethod
    @torch.inference_mode()
    def fit(cls, data: EmojiStyles, vae: EmojiVAE) -> Judge:
        """Fitted on the training pairs; all pairs are references.

        Styles are learned from images as published and after the autoencoder, whose faint traces in the colours are
        enough to mislead a classifier that has never seen them.
        """
        network = EfficientNetLite0()
        parts = []
        for rows in torch.arange(len(data.pairs)).split(32):
            images = render(data, rows, plain_views(len(rows)), SIDE)
            latents = vae.encode(images, return_dict=False)[0]
            through = vae.decode(latents, return_dict=False)[0].clamp(-1, 1)
            parts.append((*features(network, images), _style_features(network(through, EARLY), through)))
        concept, style, style_through = (torch.cat(part) for part in zip(*parts, strict=True))
        known = data.rows(held_out=False)
        pairs = [data.pairs[i] for i in known.tolist()]
        mean, projection = _whitening(concept[known], [pair.concept for pair in pairs])
        references = F.normalize((concept - mean) @ projection, dim=1)
        references = (references / references.abs().amax(1, keepdim=True) * 127).round().to(torch.int8)
        styles = torch.cat([style[known], style_through[known]])
        tensors = {"mean": mean, "projection": projection, **_ridge(styles, [pair.style for pair in pairs] * 2)}
        halves = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
        return cls(list(data.pairs), halves | {"references": references}, network)

    def save(self, folder: Path) -> None:
        """Write `judge.safetensors`; the order of the pairs becomes that of the file."""
        pairs = packed(self.pairs)
        row = {(pair.style, pair.concept): i for i, pair in enumerate(self.pairs)}
        order = [row[pair.style, pair.concept] for pair in pairs.unpacked()]
        tensors = self.tensors | {"references": self.tensors["references"][order]}
        write_tensors(folder / FILE, KIND, {name: tensor.numpy() for name, tensor in tensors.items()}, asdict(pairs))

    @classmethod
    def load(cls, folder: Path) -> Judge:
        """What `save` wrote.

        Raises:
            ModelError: if the file is missing or damaged.
            FileNotFoundError: if the network's weights are missing.
        """
        pairs, tensors = read_judge(folder)
        return cls(pairs, tensors, EfficientNetLite0())


def read_judge(folder: Path) -> tuple[list[Pair], dict[str, Tensor]]:
    """The pairs and the tensors that `Judge.save` wrote, which need no network.

    Raises:
        ModelError: if the file is missing or damaged.
    """
    arrays, packed_pairs = read_tensors(folder / FILE, KIND)
    pairs = packed_pairs.unpacked()
    try:
        check_arrays(arrays, ARRAYS, {"pairs": len(pairs), "styles": len({pair.style for pair in pairs})})
    except ValueError as error:
        raise ModelError(f"{folder / FILE}: no usable judge ({error}). {KIND.remedy}") from error
    return pairs, {name: torch.from_numpy(array) for name, array in arrays.items()}


def _whitening(concept: Tensor, labels: list[str]) -> tuple[Tensor, Tensor]:
    """Mean `[D]` and projection `[D, 192]` to main directions in which the scatter within concepts is round."""
    mean = concept.mean(0)
    centred = concept - mean
    size = min(DIMENSIONS, *concept.shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the decomposition starts at random
        _, _, main = torch.svd_lowrank(centred, size, niter=4)
    placed = centred @ main
    number = {label: i for i, label in enumerate(sorted(set(labels)))}
    own = torch.tensor([number[label] for label in labels])
    sums = torch.zeros(len(number), size).index_add(0, own, placed)
    within = placed - (sums / torch.bincount(own)[:, None])[own]
    scatter = within.T @ within / len(within)
    scatter = (1 - SHRINKAGE) * scatter + SHRINKAGE * scatter.diagonal().mean() * torch.eye(size)
    values, vectors = torch.linalg.eigh(scatter)
    projection = main @ vectors @ torch.diag(values.rsqrt())
    return mean, projection / projection.abs().max()  # only directions matter, and half precision has a range


def _ridge(style: Tensor, labels: list[str]) -> dict[str, Tensor]:
    """Weights of a linear classifier of styles; statistics are standardised, the histogram only centred and scaled."""
    mean = style.mean(0)
    scale = 1 / (style.std(0) + 1e-3)
    scale[-(COLOURS**3) :] = 1 / style[:, -(COLOURS**3) :].std()
    x = (style - mean) * scale
    names = sorted(set(labels))
    target = F.one_hot(torch.tensor([names.index(label) for label in labels]), len(names)).float()
    bias = target.mean(0)
    penalty = RIDGE * x.square().mean() * torch.eye(x.shape[1])
    weight = torch.linalg.solve(x.T @ x / len(x) + penalty, x.T @ (target - bias) / len(x))
    return {"style_mean": mean, "style_scale": scale, "style_weight": weight, "style_bias": bias}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/emoji-styles/data"))
    parser.add_argument("--vae", type=Path, default=Path(__file__).parent / "weights" / "vae")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    Judge.fit(load_emoji_styles_data(args.data), EmojiVAE.from_pretrained(args.vae).eval()).save(args.out)


if __name__ == "__main__":
    told(main)
