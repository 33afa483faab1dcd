"""MASC: the semantic tree of a token codebook. "A Flat Vocabulary or a Rich Hierarchy?", arXiv:2510.04220.

Average linkage on the code vectors: the distance of two clusters is the mean Euclidean distance over all pairs of
their members, and the closest two merge. The whole merge list is kept, so that any number of clusters is a cut of the
same tree and finer cuts refine coarser ones.

Departures: rows are scaled to unit length first (`normalize="unit"`), as tokenizers with `l2_norm` look codes up; the
published script takes the raw rows (`"none"`). Codes that are never used are left out of the tree and join the cluster
of their nearest used code, which keeps cuts nested; they are no members, so that nothing is decoded to them. A cap on
the size of a cluster skips the merges beyond it. Codes can count by their density (`weights`).

Shapes: `N` codes, `U` used codes, `D` width, `k` clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hasten.errors import ConfigError, ModelError
from hasten.io import Array, Kind, check_arrays, increasing, read_tensors, write_tensors
from hasten.parameters import Range, accepted
from hasten.tokens.approximate import approximate_linkage
from hasten.tokens.arrays import as_numbers
from hasten.tokens.codebook import (
    Normalize,
    as_codebook,
    check_codebook,
    codebook_fingerprint,
    nearest_used,
    prepared,
    used_codes,
)
from hasten.tokens.cost import TreeCost, tree_cost
from hasten.tokens.linkage import Progress, average_linkage
from hasten.tokens.mapping import TokenMap

__all__ = ["SemanticTree"]

EXACT_LIMIT = 32_768  # 4.3 GB of distances
SMALLEST = float(np.finfo(np.float64).tiny)  # of a weight as a share of the largest


@dataclass(frozen=True)
class _Content:
    """What the header of a tree's file holds."""

    normalize: Normalize
    exact: bool
    fingerprint: str


KIND = Kind("semantic tree", _Content, ModelError, "Make it again with `hasten tokens fit`.", 1 << 30)
ARRAYS = {
    "merges": Array("integer", ("U - 1", 2), low=0),
    "heights": Array("float", ("U - 1",), low=0),
    "used": Array("integer", ("U",), (increasing,), low=0),
    "nearest": Array("integer", ("N",), low=0),
}


@dataclass(frozen=True, eq=False)
class SemanticTree:
    """The merge list of a codebook.

    Attributes:
        merges: `[U-1, 2]` int64; nodes `0 .. U-1` are the used codes, merge `m` makes node `U + m`.
        heights: `[U-1]` float64, mean distance at which the two merged; ascending where `exact`.
        used: `[U]` int64, token of each leaf.
        nearest: `[N]` int64, leaf of each token: its own, or for unused codes the nearest.
        normalize: what was done to the rows.
        exact: whether it is the tree of the greedy algorithm.
        fingerprint: digest of the codebook.
    """

    merges: NDArray[np.int64]
    heights: NDArray[np.float64]
    used: NDArray[np.int64]
    nearest: NDArray[np.int64]
    normalize: Normalize
    exact: bool
    fingerprint: str

    @classmethod
    def fit(
        cls,
        codebook: Any,
        *,
        normalize: Normalize = "unit",
        used: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        exact: bool | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Cluster the codes `[N, D]`.

        Args:
            codebook: array or tensor; computed in float64.
            normalize: `"unit"` for tokenizers that look codes up by direction (LlamaGen's), `"none"` for those that
                do by distance. Where lengths differ, the wrong one costs most where codes are looked up by direction,
                which is why that is the default (measured in `docs/tokens.md`).
            used: `[N]` bool, or how often each code occurs; all codes by default.
            weights: `[N]`, how much each code counts in mean distances, such as how often it occurs; by default all
                alike, as in the paper.
            exact: whether to keep all distances, `U^2 / 2` float64; by default up to 32,768 codes, beyond that the
                approximate way of `hasten.tokens.approximate`.
            progress: called with the merges done and the merges in all.

        Raises:
            ConfigError: if the codebook or `used` cannot be clustered, or the memory for it is not there.
        """
        accepted("SemanticTree.fit", "exact", bool | None, exact)
        codes = as_codebook(codebook)
        leaves = used_codes(used, len(codes))
        density = _density(weights, leaves, len(codes))
        points = prepared(codes, leaves, normalize)
        cost = cls.cost(len(leaves), codes.shape[1], exact)
        cost.refuse_unless_it_fits(codes.shape[1])
        link = average_linkage if cost.exact else approximate_linkage
        merges, heights = link(points[leaves], density, progress=progress)
        nearest = nearest_used(points, leaves)
        return cls(merges, heights, leaves, nearest, normalize, cost.exact, codebook_fingerprint(codes))

    @staticmethod
    def cost(codes: int, width: int, exact: bool | None = None) -> TreeCost:
        """What `fit` will cost for so many used codes of so many numbers; `exact` as there."""
        return tree_cost(codes, width, codes <= EXACT_LIMIT if exact is None else exact)

    @property
    def leaves(self) -> int:
        """Used codes, `U`."""
        return len(self.used)

    def cut(self, k: int, max_size: int | None = None) -> NDArray[np.int32]:
        """Cluster of each token, `[N]`, for exactly `k` clusters, numbered by their first used token.

        Args:
            k: clusters.
            max_size: most used codes of a cluster. Merges beyond it are skipped, so that large clusters are cut lower
                and others higher; unused codes come on top of it.

        Raises:
            ConfigError: if there is no such cut.
        """
        k = accepted("SemanticTree.cut", "k", int, k)
        max_size = accepted("SemanticTree.cut", "max_size", Annotated[int | None, Range(1)], max_size)
        if not 1 <= k <= self.leaves:
            raise ConfigError(f"k must be 1 .. {self.leaves} (the used codes), got {k}")
        taken = np.flatnonzero(self.sizes <= (max_size or self.leaves))
        if self.leaves - len(taken) > k:
            raise ConfigError(
                f"with at most {max_size} codes a cluster the tree has no fewer than {self.leaves - len(taken)} "
                f"clusters, asked for {k}; raise max_size or k"
            )
        return self._labels(taken[: self.leaves - k])

    def _labels(self, taken: NDArray[np.int64]) -> NDArray[np.int32]:
        root = np.arange(self.leaves + len(self.merges))
        for m in taken[::-1].tolist():  # from the top, so that a child sees its parent's final root
            root[self.merges[m]] = root[self.leaves + m]
        _, first, inverse = np.unique(root[: self.leaves], return_index=True, return_inverse=True)
        rank = np.empty(len(first), np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        return rank[inverse][self.nearest].astype(np.int32)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Used codes below each merge, `[U-1]`."""
        counts = np.ones(self.leaves + len(self.merges), np.int64)
        for m, (a, b) in enumerate(self.merges.tolist()):
            counts[self.leaves + m] = counts[a] + counts[b]
        return counts[self.leaves :]

    def map(self, k: int, max_size: int | None = None) -> TokenMap:
        """The cut as a `TokenMap`; arguments and errors as in `cut`."""
        used = np.zeros(len(self.nearest), bool)
        used[self.used] = True
        return TokenMap(self.cut(k, max_size), "masc", self.fingerprint, self.normalize, used)

    def check(self, codebook: Any) -> None:
        """Refuse another codebook.

        Raises:
            ModelError: if this tree was not made of `codebook`.
        """
        check_codebook(codebook, self.fingerprint, "tree")

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, atomically; returns its path."""
        tensors = {"merges": self.merges, "heights": self.heights, "used": self.used, "nearest": self.nearest}
        facts = {"normalize": self.normalize, "exact": self.exact, "fingerprint": self.fingerprint}
        return write_tensors(path, KIND, tensors, facts)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ModelError: if the file is missing, damaged or no tree.
        """
        t, content = read_tensors(path, KIND)
        try:
            check_arrays(t, ARRAYS)
            arrays = (t["merges"], t["heights"], t["used"], t["nearest"])
            tree = cls(*arrays, content.normalize, content.exact, content.fingerprint)
            tree._check_merges()
        except ValueError as error:
            raise ModelError(f"{path}: no usable semantic tree ({error}). {KIND.remedy}") from error
        return tree

    def _check_merges(self) -> None:
        """Raise ValueError unless the merges make one tree of all leaves, and each token has its leaf."""
        leaves, merges = self.leaves, len(self.merges)
        if merges != leaves - 1:
            raise ValueError(f"it has {merges} merges of {leaves} used codes")
        if not np.array_equal(np.sort(self.merges, axis=None), np.arange(2 * merges)):
            raise ValueError("a node is merged more than once, or never")
        if (self.merges >= leaves + np.arange(merges)[:, None]).any():
            raise ValueError("a node is merged before it is made")
        if self.exact and (np.diff(self.heights) < 0).any():
            raise ValueError("the heights of an exact tree do not ascend")
        if self.used[-1] >= len(self.nearest) or self.nearest.max() >= leaves:
            raise ValueError("a token or a leaf is beyond those that there are")
        if not np.array_equal(self.nearest[self.used], np.arange(leaves)):
            raise ValueError("a used code is not its own leaf")


def _density(weights: ArrayLike | None, leaves: NDArray[np.int64], n: int) -> NDArray[np.float64] | None:
    """Weights of the used codes."""
    if weights is None:
        return None
    values = as_numbers(weights, "weights").astype(np.float64)
    if values.shape != (n,):
        raise ConfigError(f"weights needs one value for each of the {n} codes, got the shape {values.shape}")
    if not np.isfinite(values).all() or not (values[leaves] > 0).all():
        raise ConfigError("the weights of used codes must be positive and finite; leave the others out with used=")
    values = values[leaves] / values[leaves].max()  # only ratios count, and sums of large ones would be infinite
    return np.maximum(values, SMALLEST)
