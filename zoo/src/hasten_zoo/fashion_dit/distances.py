"""How far two sets of images are apart as distributions, from features of both.

The Frechet distance of Gaussians (Dowson and Landau 1982; as FID uses it, arXiv:1706.08500), and precision and recall
by nearest neighbours (arXiv:1904.06991).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Gaussian", "frechet", "precision_recall"]


@dataclass(frozen=True)
class Gaussian:
    """The Gaussian of a set of features, in float64: what a set that is compared often is kept as.

    Attributes:
        mean: `[D]`.
        covariance: `[D, D]`.
    """

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """That of features `[N, D]`."""
        wide = features.double()
        return cls(wide.mean(0), wide.T.cov())

    @cached_property
    def root(self) -> Tensor:
        """Square root of the covariance."""
        return _root(self.covariance)

    def distance(self, other: Gaussian) -> float:
        """Squared Frechet distance."""
        values = torch.linalg.eigvalsh(self.root @ other.covariance @ self.root).clamp(min=0)
        traces = self.covariance.trace() + other.covariance.trace() - 2 * values.sqrt().sum()
        return float((self.mean - other.mean).square().sum() + traces)


def frechet(first: Tensor, second: Tensor) -> float:
    """Squared Frechet distance of the Gaussians of two sets of features `[N, D]` and `[M, D]`, computed in float64."""
    return Gaussian.of(first).distance(Gaussian.of(second))


def _root(matrix: Tensor) -> Tensor:
    """Square root of a symmetric positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def precision_recall(generated: Tensor, real: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Shares of generated features within the real manifold, and of real features within the generated one.

    Args:
        generated: `[N, D]`.
        real: `[M, D]`; take `M` close to `N`.
        neighbours: a set's manifold is the union of balls that reach to each point's neighbour of this rank.
    """

    def within(points: Tensor, manifold: Tensor) -> float:
        radii = torch.cdist(manifold, manifold).kthvalue(neighbours + 1).values  # the nearest is the point itself
        return float((torch.cdist(points, manifold) <= radii).any(1).float().mean())

    return within(generated, real), within(real, generated)
