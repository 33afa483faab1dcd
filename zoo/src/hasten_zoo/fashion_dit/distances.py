"""How far two sets of images are apart as distributions, from features of both.

The Frechet distance of Gaussians (Dowson and Landau 1982; as FID uses it, arXiv:1706.08500), and precision and recall
by nearest neighbours (arXiv:1904.06991).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["frechet", "precision_recall"]


def frechet(first: Tensor, second: Tensor) -> float:
    """Squared Frechet distance of the Gaussians of two sets of features `[N, D]` and `[M, D]`, computed in float64."""
    a, b = first.double(), second.double()
    root = _root(a.T.cov())
    values = torch.linalg.eigvalsh(root @ b.T.cov() @ root).clamp(min=0)
    traces = a.var(0).sum() + b.var(0).sum() - 2 * values.sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + traces)


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
