"""How good a map and drawn pictures are: semantic replacement, Fréchet distance, precision and recall.

Feature space: each picture at 16x16 pixels with its mean absolute differences along both axes, projected onto the 48
principal components of the training pictures, each scaled to unit variance. It is computed from the shipped pictures,
so that it is the same everywhere; it sees colour, layout and edges, not what a trained classifier sees.

Shapes: pictures `[N, 3, 64, 64]` float32 in [0, 1], features `[N, F]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from torch import Tensor
from torch.nn.functional import avg_pool2d

from hasten.errors import ConfigError
from hasten.tokens import MemberSampler, TokenMap
from hasten.zoo.emoji_tokens.tokenizer import VQTokenizer

__all__ = ["FeatureSpace", "frechet", "precision_recall", "replacement_test"]

SIDE = 16
Floats = NDArray[np.float64]


def _described(pictures: Tensor) -> Floats:
    """Colours and edges `[N, 9 * 256]`."""
    pool = pictures.shape[-1] // SIDE
    dx = (pictures - pictures.roll(1, -1)).abs()
    dy = (pictures - pictures.roll(1, -2)).abs()
    parts = [avg_pool2d(part, pool).flatten(1) for part in (pictures, dx, dy)]
    return torch.cat(parts, dim=1).double().numpy()


@dataclass(frozen=True, eq=False)
class FeatureSpace:
    """Principal components of some pictures.

    Attributes:
        mean: `[9 * 256]`.
        axes: `[9 * 256, F]`, scaled so that features have unit variance.
    """

    mean: Floats
    axes: Floats

    @classmethod
    def of(cls, pictures: Tensor, components: int = 48) -> Self:
        """The space of the pictures.

        Raises:
            ConfigError: if there are not more pictures than components.
        """
        if len(pictures) <= components:
            raise ConfigError(f"{components} components need more pictures than {len(pictures)}")
        described = _described(pictures)
        mean = described.mean(axis=0)
        _, scale, rows = np.linalg.svd(described - mean, full_matrices=False)
        axes = rows[:components].T / scale[:components] * np.sqrt(len(pictures) - 1)
        return cls(mean, axes)

    def __call__(self, pictures: Tensor) -> Floats:
        """Features `[N, F]`."""
        return (_described(pictures) - self.mean) @ self.axes


def frechet(a: Floats, b: Floats) -> float:
    """Squared Fréchet distance of the normal distributions that fit two sets of features (Heusel et al. 2017).

    Raises:
        ConfigError: if a set has fewer than two features.
    """
    if min(len(a), len(b)) < 2:
        raise ConfigError(f"at least two features a set are needed, got {len(a)} and {len(b)}")
    of_a, of_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(of_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    both = np.sqrt(np.linalg.eigvalsh(root @ of_b @ root).clip(0)).sum()
    shift = a.mean(axis=0) - b.mean(axis=0)
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


@torch.no_grad()
def replacement_test(
    tokenizer: VQTokenizer, mapping: TokenMap, pictures: Tensor, space: FeatureSpace, seed: int = 0
) -> dict[str, float]:
    """Decode with each token replaced by a random member of its cluster.

    Returns:
        `psnr` (dB, over all pictures) and `psnr_to_reconstruction`, against the pictures and against what the
        tokenizer makes of them; `feature_distance`, mean Euclidean distance in the feature space to the pictures.
    """
    tokens = tokenizer.encode(pictures)
    mates = MemberSampler.make(mapping)(mapping(tokens.numpy()), seed)
    drawn, plain = tokenizer.decode(torch.from_numpy(mates)), tokenizer.decode(tokens)

    def psnr(target: Tensor) -> float:
        return -10 * float((drawn - target).square().mean().clamp_min(1e-12).log10())

    distance = np.linalg.norm(space(drawn) - space(pictures), axis=1).mean()
    return {"psnr": psnr(pictures), "psnr_to_reconstruction": psnr(plain), "feature_distance": float(distance)}
