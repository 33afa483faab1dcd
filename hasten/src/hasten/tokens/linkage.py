"""Exact average linkage (UPGMA) by nearest-neighbour chains.

The distance between two clusters is the mean over all pairs of their members, and merging follows Lance and Williams:

    D[s+t, u] = (|s| D[s, u] + |t| D[t, u]) / (|s| + |t|)

With weights (the density of the codes) `|s|` is the sum of the weights in `s`, and pairs count by both their weights.
Average linkage is reducible, so that merging mutual nearest neighbours as they are met, and sorting the merges by
height afterwards, gives the tree of the greedy algorithm (Murtagh 1983; Müllner, arXiv:1109.2378). Time O(N^2), memory
N (N - 1) / 2 float64: 1.07 GB for 16,384 points. `scipy.cluster.hierarchy.linkage` gives the same tree, but copies the
distances and does not tell how far it is.

Shapes: `N` points, `D` width. Nodes are numbered as in scipy: points `0 .. N-1`, merge `m` makes node `N + m`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import pdist, squareform

__all__ = ["SQUARE", "Progress", "average_linkage", "link_distances", "relabel"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Progress = Callable[[int, int], None]
REPORT_EVERY = 64
SMALLEST_TABLE = 128  # rows of a table that is not worth compacting
SQUARE = 4096  # rows of a table of which both triangles are kept
KEPT = 0.5  # share of rows that are left when a table is compacted
LEAST = 2.0**-53  # share of a cluster in a merge
READ = 64  # rows that are kept as they were read; a chain goes back to those that it read last


def average_linkage(
    points: Floats, weights: Floats | None = None, progress: Progress | None = None
) -> tuple[Ints, Floats]:
    """Merges `[N-1, 2]` (pairs of nodes) and heights `[N-1]`, ascending, for points `[N, D]`; Euclidean.

    Args:
        points: float64.
        weights: `[N]`, how much each point counts in the mean distance; all alike by default.
        progress: called with the merges done and the merges in all.
    """
    return link_distances(pdist(points), np.ones(len(points)) if weights is None else weights, progress)


def link_distances(distances: Floats, weights: Floats, progress: Progress | None = None) -> tuple[Ints, Floats]:
    """Average linkage of clusters whose mean distances are known.

    Args:
        distances: condensed, `[N (N - 1) / 2]` float64 as scipy's `pdist` gives them; overwritten.
        weights: how much each counts in the mean, `[N]`: the points in it, or their density.
        progress: called with the merges done and the merges in all.

    Returns:
        Merges `[N-1, 2]` and heights `[N-1]` in ascending order.
    """
    n = len(weights)
    pairs = np.empty((max(0, n - 1), 2), np.int64)
    heights = np.empty(max(0, n - 1))
    table = _Square(distances, n) if n <= SQUARE else _Condensed(distances, n)
    del distances  # a square has them twice
    weight = weights.astype(np.float64).copy()
    chain: list[int] = []
    for merged in range(n - 1):
        if not chain:
            chain.append(table.first())
        i, j, row = _mutual_neighbours(table, chain)
        a, b = pairs[merged] = table.points[[i, j]]
        heights[merged] = row[i]
        share = weight[a] / (weight[a] + weight[b])
        share = min(max(share, LEAST), 1 - LEAST)  # none times infinity is no number
        row *= 1 - share
        row += share * table.row(i)
        table.merge(i, j, row)
        weight[b] += weight[a]
        if table.alive <= KEPT * table.size and table.size > SMALLEST_TABLE:
            chain = table.compact(chain)
        if progress is not None and (merged % REPORT_EVERY == 0 or merged == n - 2):
            progress(merged + 1, n - 1)
    order = np.argsort(heights, kind="stable")
    return relabel(pairs[order], n), heights[order]


class _Table(ABC):
    """A symmetric matrix of distances by rows; merged clusters are infinitely far.

    Attributes:
        size: rows, those of merged clusters among them.
        alive: rows without them.
        points: `[size]`, a point of the cluster of each row.
        merged: `[size]`, infinity for merged clusters, else 0.
    """

    def __init__(self, n: int) -> None:
        self.points = np.arange(n)
        self._measure(n)

    def _measure(self, n: int) -> None:
        self.size = self.alive = n
        self.merged = np.zeros(n)
        self._rows: dict[int, Floats] = {}  # read lately

    def first(self) -> int:
        """The first row that is no merged cluster's."""
        return int(self.merged.argmin())

    def row(self, i: int) -> Floats:
        """Distances of `i` to all, `[size]`; infinite to itself and to merged clusters."""
        row = self._rows.get(i)
        if row is None:
            if len(self._rows) == READ:
                del self._rows[next(iter(self._rows))]
            row = self._rows[i] = self._read(i)
        return row

    @abstractmethod
    def _read(self, i: int) -> Floats:
        """The row, as new."""

    @abstractmethod
    def _write(self, j: int, row: Floats) -> None:
        """Let the distances of `j` be these."""

    @abstractmethod
    def _keep(self, rows: Ints) -> None:
        """Drop all other rows, in place."""

    def merge(self, i: int, j: int, both: Floats) -> None:
        """Let row `j` be that of both, `[size]`; `i` is merged."""
        self._write(j, both)
        for merged in (i, j):
            self._rows.pop(merged, None)
        for other, row in self._rows.items():
            row[i], row[j] = np.inf, both[other]
        self.merged[i] = np.inf
        self.alive -= 1

    def compact(self, chain: list[int]) -> list[int]:
        """Drop the rows of merged clusters; the rows of the chain under their new numbers."""
        kept = np.flatnonzero(self.merged == 0)
        self._keep(kept)
        self.points = self.points[kept]
        self._measure(len(kept))
        renumbered: list[int] = np.searchsorted(kept, chain).tolist()
        return renumbered


class _Square(_Table):
    """All of the matrix: rows in one piece, for tables that are small."""

    def __init__(self, values: Floats, n: int) -> None:
        super().__init__(n)
        self.values = squareform(values, checks=False)
        np.fill_diagonal(self.values, np.inf)

    def _read(self, i: int) -> Floats:
        return self.values[i] + self.merged

    def _write(self, j: int, row: Floats) -> None:
        self.values[j] = row
        self.values[:, j] = row

    def _keep(self, rows: Ints) -> None:
        for i, row in enumerate(rows.tolist()):
            self.values[i, : len(rows)] = self.values[row, rows]
        self.values = self.values[: len(rows), : len(rows)]


class _Condensed(_Table):
    """The upper triangle: half the memory."""

    def __init__(self, values: Floats, n: int) -> None:
        super().__init__(n)
        self.values = values

    def _measure(self, n: int) -> None:
        super()._measure(n)
        rows = np.arange(n, dtype=np.int64)
        self.start = n * rows - rows * (rows + 1) // 2 - rows - 1  # the distance to u > i lies at start[i] + u
        self._where = np.empty(n, np.int64)

    def _read(self, i: int) -> Floats:
        out = np.empty(self.size)
        where = np.add(self.start[:i], i, out=self._where[:i])
        self.values.take(where, out=out[:i], mode="clip")  # another mode would copy
        out[i] = np.inf
        out[i + 1 :] = self.values[self.start[i] + i + 1 : self.start[i] + self.size]
        out += self.merged
        return out

    def _write(self, j: int, row: Floats) -> None:
        self.values[np.add(self.start[:j], j, out=self._where[:j])] = row[:j]
        self.values[self.start[j] + j + 1 : self.start[j] + self.size] = row[j + 1 :]

    def _keep(self, rows: Ints) -> None:
        end = 0
        for i, row in enumerate(rows.tolist()):  # what is written lies before what is still to be read
            begin, end = end, end + len(rows) - i - 1
            self.values[begin:end] = self.values[self.start[row] + rows[i + 1 :]]
        self.values = self.values[:end]


def _mutual_neighbours(table: _Table, chain: list[int]) -> tuple[int, int, Floats]:
    """Extend the chain until its last two rows are nearest to each other; takes these off: `i`, `j` and row `j`."""
    while True:
        last = chain[-1]
        row = table.row(last)
        best = int(row.argmin())
        if len(chain) > 1 and row[chain[-2]] <= row[best]:  # of equals, the one before ends the chain
            before = chain[-2]
            del chain[-2:]
            return before, last, row
        chain.append(best)


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
