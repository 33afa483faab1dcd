"""Average linkage for codebooks whose distances do not fit into memory.

1. k-means splits the codes into cells of about `cell` codes; each cell gets its exact tree.
2. Of all cells' merges the lowest ones are taken, until `groups` clusters are left.
3. The mean distances between these clusters are computed over all pairs of their members, and linked exactly.

The one difference from the exact tree: in step 2 codes merge only within their cell. Heights ascend within step 2 and
within step 3, not from one to the other. Memory `groups^2 / 2` float64; time O(N^2 D) with a small constant.

Shapes: `N` codes, `D` width.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from scipy.spatial.distance import cdist, squareform

from hasten.errors import ConfigError
from hasten.tokens.linkage import Floats, Ints, Progress, average_linkage, link_distances, relabel

__all__ = ["approximate_linkage"]

BLOCK = 512  # rows of distances at a time
MOST_DISTANCES = 1 << 25  # numbers at a time, so that many codes take fewer rows
CELL, GROUPS = 2048, 8192


def approximate_linkage(
    points: Floats,
    weights: Floats | None = None,
    progress: Progress | None = None,
    cell: int = CELL,
    groups: int = GROUPS,
) -> tuple[Ints, Floats]:
    """Merges `[N-1, 2]` and heights `[N-1]` for points `[N, D]`; as `average_linkage`, nearly.

    Args:
        points: float64.
        weights: `[N]`, how much each point counts in the mean distance; all alike by default.
        progress: called with the merges done and the merges in all.
        cell: codes of a cell, on average.
        groups: clusters that are linked exactly; at most half the codes are.

    Raises:
        ConfigError: if `cell` or `groups` is below 2.
    """
    if cell < 2 or groups < 2:
        raise ConfigError(f"cell and groups must be at least 2, got {cell} and {groups}")
    n = len(points)
    weights = np.ones(n) if weights is None else weights
    groups = min(groups, max(2, n // 2))
    low_pairs, low_heights = _within_cells(points, weights, max(1, round(n / cell)), n - groups)
    if progress is not None:
        progress(len(low_pairs), n - 1)
    labels = _roots(low_pairs, n)
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    done = len(low_pairs)
    merges, heights = link_distances(
        _mean_distances(points[order], weights[order], starts),
        np.add.reduceat(weights[order], starts),
        None if progress is None else lambda now, total: progress(done + now, done + total),
    )
    top_pairs = _as_points(merges, order[starts])
    return relabel(np.concatenate([low_pairs, top_pairs]), n), np.concatenate([low_heights, heights])


def _within_cells(points: Floats, weights: Floats, cells: int, wanted: int) -> tuple[Ints, Floats]:
    """The `wanted` lowest merges of all cells' trees, as pairs of points, by height."""
    start = points[np.random.default_rng(0).choice(len(points), cells, replace=False)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "One of the clusters is empty")  # a cell fewer
        _, labels = kmeans2(points, start, minit="matrix", iter=20)
    pairs, heights = [np.empty((0, 2), np.int64)], [np.empty(0)]
    for cell in np.unique(labels):
        tokens = np.flatnonzero(labels == cell)
        if len(tokens) > 1:
            merges, height = average_linkage(points[tokens], weights[tokens])
            pairs.append(_as_points(merges, tokens))
            heights.append(height)
    every = np.concatenate(heights)
    lowest = np.argsort(every, kind="stable")[:wanted]
    return np.concatenate(pairs)[lowest], every[lowest]


def _as_points(merges: Ints, points: Ints) -> Ints:
    """Merges of nodes as merges of any point of either side."""
    n = len(points)
    some = np.empty(n + len(merges), np.int64)
    some[:n] = points
    for m, (a, _) in enumerate(merges.tolist()):
        some[n + m] = some[a]
    return some[merges]


def _roots(pairs: Ints, n: int) -> NDArray[np.int64]:
    """The cluster of each point after the merges, `[N]`, named by one of its nodes."""
    merges = relabel(pairs, n)
    root = np.arange(n + len(merges))
    for m in range(len(merges) - 1, -1, -1):
        root[merges[m]] = root[n + m]
    return root[:n]


def _mean_distances(points: Floats, weights: Floats, starts: Ints) -> Floats:
    """Condensed weighted mean distances between groups of neighbouring rows; `starts` are the first rows."""
    groups, n = len(starts), len(points)
    sums = np.zeros((groups, groups))
    group = np.repeat(np.arange(groups), np.diff(np.append(starts, n)))
    shares = weights / np.maximum.reduceat(weights, starts)[group]  # products of small weights would be zero
    shares /= np.add.reduceat(shares, starts)[group]
    block = max(1, min(BLOCK, MOST_DISTANCES // n))
    for first in range(0, n, block):
        rows = slice(first, min(n, first + block))
        distances = cdist(points[rows], points)
        distances *= shares
        distances *= shares[rows, None]
        np.add.at(sums, group[rows], np.add.reduceat(distances, starts, axis=1))
    np.fill_diagonal(sums, 0.0)
    return squareform(sums, checks=False)
