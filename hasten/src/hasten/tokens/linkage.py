"""Exact average linkage (UPGMA) by nearest-neighbour chains.

The distance between two clusters is the mean over all pairs of their members, and merging follows Lance and Williams:

    D[s+t, u] = (|s| D[s, u] + |t| D[t, u]) / (|s| + |t|)

Average linkage is reducible, so that merging mutual nearest neighbours as they are met, and sorting the merges by
height afterwards, gives the tree of the greedy algorithm (Murtagh 1983; Müllner, arXiv:1109.2378). Time O(N^2), memory
N (N - 1) / 2 float64: 1.07 GB for 16,384 points. `scipy.cluster.hierarchy.linkage` gives the same tree, but copies the
distances and does not tell how far it is.

Shapes: `N` points, `D` width. Nodes are numbered as in scipy: points `0 .. N-1`, merge `m` makes node `N + m`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import pdist

__all__ = ["Progress", "average_linkage", "link_distances", "relabel"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Progress = Callable[[int, int], None]
REPORT_EVERY = 64


def average_linkage(points: Floats, progress: Progress | None = None) -> tuple[Ints, Floats]:
    """Merges `[N-1, 2]` (pairs of nodes) and heights `[N-1]`, ascending, for points `[N, D]`; Euclidean."""
    return link_distances(pdist(points), np.ones(len(points)), progress)


def link_distances(distances: Floats, sizes: Floats, progress: Progress | None = None) -> tuple[Ints, Floats]:
    """Average linkage of clusters whose mean distances are known.

    Args:
        distances: condensed, `[N (N - 1) / 2]` float64 as scipy's `pdist` gives them; overwritten.
        sizes: points in each cluster, `[N]`.
        progress: called with the merges done and the merges in all.

    Returns:
        Merges `[N-1, 2]` and heights `[N-1]` in ascending order.
    """
    n = len(sizes)
    pairs = np.empty((max(0, n - 1), 2), np.int64)
    heights = np.empty(max(0, n - 1))
    table = _Condensed(distances, n)
    weight = sizes.astype(np.float64).copy()
    active = np.arange(n)
    chain: list[int] = []
    for merged in range(n - 1):
        if not chain:
            chain.append(int(active[0]))
        i, j, height = _mutual_neighbours(table, active, chain)
        pairs[merged] = i, j
        heights[merged] = height
        active = active[active != i]  # j stands for the merged cluster from here on
        others = active[active != j]
        share = weight[i] / (weight[i] + weight[j])
        table.write(j, others, share * table.row(i, others) + (1 - share) * table.row(j, others))
        weight[j] += weight[i]
        if progress is not None and (merged % REPORT_EVERY == 0 or merged == n - 2):
            progress(merged + 1, n - 1)
    order = np.argsort(heights, kind="stable")
    return relabel(pairs[order], n), heights[order]


class _Condensed:
    """The upper triangle of a symmetric `[N, N]` matrix, read and written by rows."""

    def __init__(self, values: Floats, n: int) -> None:
        self.values = values
        rows = np.arange(n, dtype=np.int64)
        self.start = n * rows - rows * (rows + 1) // 2 - rows - 1

    def _where(self, i: int, others: Ints) -> Ints:
        """Positions of `(i, other)`; `others` ascending and without `i`."""
        split = int(np.searchsorted(others, i))
        return np.concatenate([self.start[others[:split]] + i, self.start[i] + others[split:]])

    def row(self, i: int, others: Ints) -> Floats:
        return self.values[self._where(i, others)]

    def write(self, i: int, others: Ints, row: Floats) -> None:
        self.values[self._where(i, others)] = row


def _mutual_neighbours(table: _Condensed, active: Ints, chain: list[int]) -> tuple[int, int, float]:
    """Extend the chain until its last two clusters are nearest to each other; takes these two off."""
    while True:
        last = chain[-1]
        others = active[active != last]
        row = table.row(last, others)
        best = int(np.argmin(row))
        if len(chain) > 1:
            before = chain[-2]
            if row[int(np.searchsorted(others, before))] <= row[best]:  # of equals, the one before ends the chain
                del chain[-2:]
                return min(last, before), max(last, before), float(row[best])
        chain.append(int(others[best]))


def relabel(pairs: Ints, n: int) -> Ints:
    """Merges given by any point of either side as merges of nodes."""
    parent = np.arange(n)
    node = np.arange(n)

    def root(point: int) -> int:
        while parent[point] != point:
            parent[point] = parent[parent[point]]
            point = int(parent[point])
        return point

    merges = np.empty_like(pairs)
    for m, (i, j) in enumerate(pairs.tolist()):
        a, b = root(i), root(j)
        merges[m] = sorted((int(node[a]), int(node[b])))
        parent[a] = b
        node[b] = n + m
    return merges
