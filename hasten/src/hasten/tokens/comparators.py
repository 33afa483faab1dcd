"""What MASC is compared with: the flat vocabulary, k-means, and random clusters of given sizes; and measures of a map.

Shapes: `N` codes, `D` width, `k` clusters.
"""

from __future__ import annotations

import warnings
from typing import Annotated, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.cluster.vq import kmeans2

from hasten.errors import ConfigError
from hasten.parameters import Range, accepted
from hasten.tokens.arrays import as_whole_numbers
from hasten.tokens.codebook import (
    MOST_TOKENS,
    Normalize,
    as_codebook,
    codebook_fingerprint,
    nearest_used,
    prepared,
    used_codes,
)
from hasten.tokens.mapping import TokenMap

__all__ = ["adjusted_rand", "flat_map", "kmeans_map", "mean_within_distance", "random_map"]


def flat_map(n: int) -> TokenMap:
    """Each of `n` tokens a cluster of its own."""
    n = accepted("flat_map", "n", Annotated[int, Range(1, MOST_TOKENS)], n)
    return TokenMap(np.arange(n, dtype=np.int32), "flat")


def kmeans_map(
    codebook: Any,
    k: int,
    *,
    normalize: Normalize = "unit",
    used: ArrayLike | None = None,
    seed: int = 0,
    runs: int = 1,
    iterations: int = 50,
) -> TokenMap:
    """Lloyd's k-means from `k` random codes, the best of `runs`; empty clusters get the farthest codes.

    `normalize` and `used` are as for `SemanticTree.fit`: unused codes join the cluster of their nearest used code.

    Raises:
        ConfigError: if the codebook cannot be clustered so.
    """
    k, seed = accepted("kmeans_map", "k", int, k), accepted("kmeans_map", "seed", Annotated[int, Range(0)], seed)
    runs = accepted("kmeans_map", "runs", Annotated[int, Range(1)], runs)
    iterations = accepted("kmeans_map", "iterations", Annotated[int, Range(1)], iterations)
    codes = as_codebook(codebook)
    leaves = used_codes(used, len(codes))
    if not 1 <= k <= len(leaves):
        raise ConfigError(f"k must be 1 .. {len(leaves)} (the used codes), got {k}")
    everything = prepared(codes, leaves, normalize)
    points = everything[leaves]
    best: tuple[float, NDArray[np.int64]] | None = None
    for run in range(runs):
        rng = np.random.default_rng([seed, run])
        start = points[rng.choice(len(points), k, replace=False)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "One of the clusters is empty")  # filled below
            centres, labels = kmeans2(points, start, minit="matrix", iter=iterations)
        distance = np.linalg.norm(points - centres[labels], axis=1)
        labels = _fill_empty(labels.astype(np.int64), distance, k)
        inertia = float((distance**2).sum())
        if best is None or inertia < best[0]:
            best = inertia, labels
    assert best is not None
    labels = best[1][nearest_used(everything, leaves)].astype(np.int32)
    flags = np.zeros(len(codes), bool)
    flags[leaves] = True
    return TokenMap(labels, "k-means", codebook_fingerprint(codes), normalize, flags)


def _fill_empty(labels: NDArray[np.int64], distance: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """Give each empty cluster the code that is farthest from its centre and does not empty another cluster."""
    counts = np.bincount(labels, minlength=k)
    far = iter(np.argsort(-distance, kind="stable").tolist())
    for empty in np.flatnonzero(counts == 0):
        token = next(t for t in far if counts[labels[t]] > 1)
        counts[labels[token]] -= 1
        labels[token] = empty
        counts[empty] = 1
    return labels


def random_map(like: TokenMap, seed: int = 0) -> TokenMap:
    """Clusters of the same sizes as those of `like`, of used tokens drawn at random; the others stay where they are."""
    accepted("random_map", "like", TokenMap, like)
    seed = accepted("random_map", "seed", Annotated[int, Range(0)], seed)
    labels = like.labels.copy()
    labels[like.used] = np.random.default_rng(seed).permutation(labels[like.used])
    return TokenMap(labels, "random", like.fingerprint, like.normalize, like.used)


def adjusted_rand(a: ArrayLike, b: ArrayLike) -> float:
    """Adjusted Rand index of two labelings `[N]`: 1 if they agree, about 0 by chance (Hubert and Arabie 1985)."""
    a, b = as_whole_numbers(a, "labelings"), as_whole_numbers(b, "labelings")
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ConfigError(f"two labelings of the same two or more items are needed, got {a.shape} and {b.shape}")

    def pairs(counts: NDArray[np.int64]) -> float:
        return float((counts * (counts - 1) // 2).sum())

    both = pairs(np.unique(np.stack([a, b]), axis=1, return_counts=True)[1])
    in_a, in_b = pairs(np.unique(a, return_counts=True)[1]), pairs(np.unique(b, return_counts=True)[1])
    chance = in_a * in_b / (len(a) * (len(a) - 1) / 2)
    most = (in_a + in_b) / 2
    return 1.0 if most == chance else (both - chance) / (most - chance)


def mean_within_distance(codebook: Any, mapping: TokenMap) -> float:
    """Mean Euclidean distance over all pairs of used codes in a common cluster; 0 if there is no such pair.

    Raises:
        ModelError: if the map was made of another codebook.
    """
    accepted("mean_within_distance", "mapping", TokenMap, mapping)
    codes = as_codebook(codebook)
    mapping.check(codes)
    points = prepared(codes, np.flatnonzero(mapping.used), mapping.normalize)
    from scipy.spatial.distance import pdist

    total, count = 0.0, 0
    for cluster in np.flatnonzero(mapping.sizes > 1).tolist():
        distances = pdist(points[mapping.of(cluster)])
        total, count = total + float(distances.sum()), count + len(distances)
    return total / count if count else 0.0
