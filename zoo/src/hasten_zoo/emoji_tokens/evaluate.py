"""How good a map and drawn images are: semantic replacement, Fréchet distance, precision and recall.

Features are those of `features.FeatureNet`. Fréchet distances and precision are against `reference()`, images that
nothing is trained on. A Fréchet distance of few images is biased upwards: compare those of equally many only.

Shapes: images `[N, 3, 32, 32]` float32 in [0, 1], features `[N, F]` float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from hasten.errors import ConfigError
from hasten.quality.metrics import Lpips, ssim
from hasten.tokens import MemberSampler, TokenMap
from numpy.typing import NDArray
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from torch import Tensor

from hasten_zoo.emoji_tokens.data import MEASURE, images
from hasten_zoo.emoji_tokens.features import FeatureNet
from hasten_zoo.emoji_tokens.tokenizer import VQTokenizer

__all__ = ["Quality", "Replacement", "ReplacementTest", "frechet", "precision_recall", "quality", "reference"]

Floats = NDArray[np.float64]
REFERENCE = 4096  # images of the Fréchet distance
NEIGHBOURS = 2048  # of them for precision and recall
FIRST = 128  # images whose structural similarity and perceptual distance are taken, as they are slow


@cache
def reference() -> Floats:
    """Features of the images that others are compared with, `[4096, 64]`."""
    return FeatureNet.load().describe(images(REFERENCE, MEASURE).pixels)


def frechet(a: Floats, b: Floats) -> float:
    """Squared Fréchet distance of the normal distributions that fit two sets of features (Heusel et al. 2017).

    Raises:
        ConfigError: if a set has fewer than two features.
    """
    if min(len(a), len(b)) < 2:
        raise ConfigError(f"at least two features a set are needed, got {len(a)} and {len(b)}")
    of_a, of_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    shift = a.mean(axis=0) - b.mean(axis=0)
    both = np.trace(sqrtm(of_a @ of_b)).real  # the product has real, non-negative eigenvalues
    return float(shift @ shift + np.trace(of_a) + np.trace(of_b) - 2 * both)


def precision_recall(real: Floats, drawn: Floats, k: int = 3) -> tuple[float, float]:
    """Shares of drawn features near real ones, and of real ones near drawn ones (Kynkäänniemi et al. 2019).

    Near means: within the distance of a feature to its `k`-th neighbour in its own set.

    Raises:
        ConfigError: if a set has no `k`-th neighbours.
    """
    if min(len(real), len(drawn)) <= k:
        raise ConfigError(f"more than {k} features a set are needed, got {len(real)} and {len(drawn)}")
    between = cdist(real, drawn)
    reach_real, reach_drawn = (np.sort(cdist(x, x), axis=1)[:, k] for x in (real, drawn))
    precision = (between <= reach_real[:, None]).any(axis=0).mean()
    recall = (between <= reach_drawn[None]).any(axis=1).mean()
    return float(precision), float(recall)


@dataclass(frozen=True)
class Quality:
    """Drawn images against `reference()`.

    Attributes:
        frechet: squared Fréchet distance.
        precision, recall: as in `precision_recall`.
        objects: share of images on which the network sees the object that was asked for.
    """

    frechet: float
    precision: float
    recall: float
    objects: float


def quality(drawn: Tensor, classes: Tensor) -> Quality:
    """How good drawn images of objects `[N]` are."""
    net = FeatureNet.load()
    made, real = net.describe(drawn), reference()
    precision, recall = precision_recall(real[:NEIGHBOURS], made)
    objects = float((net.objects(drawn) == classes).float().mean())
    return Quality(frechet(real, made), precision, recall, objects)


@dataclass(frozen=True)
class Replacement:
    """Images decoded with every token replaced by a random member of its cluster, against the images themselves.

    Attributes:
        psnr: dB, over all images together.
        psnr_to_reconstruction: dB, against what the tokenizer makes of the images; 120 if they are the same.
        ssim: mean structural similarity of the first 128 images.
        lpips: mean perceptual distance of the first 128 images, as `hasten bench` takes it; None without its weights.
        feature_distance: mean Euclidean distance of the features.
        frechet: squared Fréchet distance to `reference()`.
    """

    psnr: float
    psnr_to_reconstruction: float
    ssim: float
    lpips: float | None
    feature_distance: float
    frechet: float


class ReplacementTest:
    """The semantic replacement test on some images, for any number of maps.

    Args:
        tokenizer: whose tokens are replaced.
        pixels: `[N, 3, 32, 32]`.
    """

    def __init__(self, tokenizer: VQTokenizer, pixels: Tensor) -> None:
        self.tokenizer, self.pixels, self.net = tokenizer, pixels, FeatureNet.load()
        self.tokens = torch.cat([tokenizer.encode(part) for part in pixels.split(256)])
        self.plain = self._decoded(self.tokens)
        self.features = self.net.describe(pixels)
        self.lpips = Lpips() if Lpips.available() else None

    def __call__(self, mapping: TokenMap, seed: int = 0) -> Replacement:
        """Measure a map; `flat_map` measures the tokenizer alone."""
        mates = MemberSampler.make(mapping)(mapping(self.tokens.numpy()), seed)
        drawn = self._decoded(torch.from_numpy(mates))
        made = self.net.describe(drawn)
        pairs = list(zip(drawn[:FIRST], self.pixels[:FIRST], strict=True))
        lpips = self.lpips
        return Replacement(
            psnr=self._psnr(drawn, self.pixels),
            psnr_to_reconstruction=self._psnr(drawn, self.plain),
            ssim=float(np.mean([ssim(a, b) for a, b in pairs])),
            lpips=None if lpips is None else float(np.mean([lpips(a, b) for a, b in pairs])),
            feature_distance=float(np.linalg.norm(made - self.features, axis=1).mean()),
            frechet=frechet(reference(), made),
        )

    @torch.no_grad()
    def _decoded(self, tokens: Tensor) -> Tensor:
        return torch.cat([self.tokenizer.decode(part) for part in tokens.split(256)])

    @staticmethod
    def _psnr(drawn: Tensor, target: Tensor) -> float:
        return -10 * float((drawn - target).square().mean().clamp_min(1e-12).log10())
