"""From clusters back to tokens: which member stands for a drawn cluster.

* `"uniform"`: any member, all alike (the paper's default).
* `"frequency"`: any member, as often as it occurs in the training tokens, `p(token | cluster)`.
* `"medoid"`: the member with the smallest mean distance to the other members; no chance involved.
* `"centroid"`: the member nearest to the mean of the members.

Tokens that never occur are no members. The trained choice is `hasten.tokens.refiner`.

Shapes: `N` tokens, `U` used tokens, `D` width, `k` clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist

from hasten.errors import ConfigError, unknown
from hasten.parameters import Range, accepted
from hasten.tokens.arrays import as_numbers, as_whole_numbers
from hasten.tokens.codebook import as_codebook, prepare_codes
from hasten.tokens.mapping import TokenMap

__all__ = ["MEMBER_KINDS", "MemberSampler"]

Kind = Literal["uniform", "frequency", "medoid", "centroid"]
MEMBER_KINDS = ("uniform", "frequency", "medoid", "centroid")


@dataclass(frozen=True, eq=False)
class MemberSampler:
    """Draws a member for each cluster.

    Attributes:
        mapping: the clusters.
        weights: `[N]` float64, how likely each token is among its cluster's members; kept with 1 as the largest of
            each cluster.

    Raises:
        ConfigError: if the weights leave a cluster without a member, or let a token occur that never does.
    """

    mapping: TokenMap
    weights: NDArray[np.float64]

    def __post_init__(self) -> None:
        accepted("MemberSampler", "mapping", TokenMap, self.mapping)
        weights = as_numbers(self.weights, "weights").astype(np.float64)
        if weights.shape != (self.mapping.tokens,):
            raise ConfigError(f"one weight for each of the {self.mapping.tokens} tokens is needed, got {weights.shape}")
        if not np.isfinite(weights).all() or weights.min() < 0:
            raise ConfigError("weights must be finite and not negative")
        stray = np.flatnonzero((weights > 0) & ~self.mapping.used)
        if len(stray):
            raise ConfigError(
                f"token {stray[0]} never occurs by the map, but has a weight ({len(stray)} such tokens); "
                "give it none, or make the map of the data in which it occurs"
            )
        largest = np.zeros(self.mapping.clusters)
        np.maximum.at(largest, self.mapping.labels, weights)
        if not largest.min() > 0:
            raise ConfigError(f"no member of cluster {int(largest.argmin())} has a positive weight; give one to some")
        object.__setattr__(self, "weights", weights / largest[self.mapping.labels])  # sums would be infinite

    @classmethod
    def make(
        cls,
        mapping: TokenMap,
        kind: Kind = "uniform",
        *,
        codebook: Any = None,
        counts: ArrayLike | None = None,
    ) -> Self:
        """A sampler of one of the kinds.

        Args:
            mapping: the clusters.
            kind: see the module.
            codebook: `[N, D]`, for `"medoid"` and `"centroid"`; the one that the map was made of.
            counts: `[N]`, how often each token occurs, for `"frequency"`; clusters that never occur are uniform.

        Raises:
            ConfigError: if what the kind needs is missing or does not fit.
            ModelError: if it is another codebook.
            UnknownNameError: if there is no such kind.
        """
        accepted("MemberSampler.make", "mapping", TokenMap, mapping)
        if not isinstance(kind, str) or kind not in MEMBER_KINDS:
            raise unknown("way to choose members", kind, MEMBER_KINDS)
        if kind == "uniform":
            return cls(mapping, np.asarray(mapping.used, np.float64))
        if kind == "frequency":
            return cls(mapping, _frequencies(mapping, counts))
        if codebook is None:
            raise ConfigError(f"{kind} needs the codebook: give codebook=")
        codes = as_codebook(codebook)
        mapping.check(codes)
        points = np.zeros_like(codes)
        points[mapping.used] = prepare_codes(codes[mapping.used], mapping.normalize)
        weights = np.zeros(mapping.tokens)
        for cluster in range(mapping.clusters):
            tokens = mapping.of(cluster)
            others = points[tokens] if kind == "medoid" else points[tokens].mean(axis=0, keepdims=True)
            weights[tokens[cdist(points[tokens], others).sum(axis=1).argmin()]] = 1.0
        return cls(mapping, weights)

    def __call__(self, clusters: ArrayLike, seed: int | np.random.Generator = 0) -> NDArray[np.int64]:
        """Tokens for clusters of any shape.

        Raises:
            ConfigError: if they are no clusters of the map.
        """
        if not isinstance(seed, np.random.Generator):
            seed = accepted("MemberSampler", "seed", Annotated[int, Range(0)], seed)
        clusters = as_whole_numbers(clusters, "clusters")
        k = self.mapping.clusters
        if clusters.size and (clusters.min() < 0 or clusters.max() >= k):
            raise ConfigError(f"clusters {clusters.min()} .. {clusters.max()} are not all in 0 .. {k - 1}")
        first, last = self.mapping.offsets[clusters], self.mapping.offsets[clusters + 1] - 1
        drawn = clusters + np.random.default_rng(seed).random(clusters.shape)  # each cluster has the mass 1
        place = np.searchsorted(self._upto, drawn, side="right")
        token = self.mapping.members[np.clip(place, first, last)]
        return np.where(self.weights[token] > 0, token, self._likeliest[clusters])  # rounding at a cluster's edge

    @cached_property
    def _upto(self) -> NDArray[np.float64]:
        """Running sum of `p(token | cluster)` over the member list, `[U]`: cluster c has the stretch `c .. c + 1`."""
        members, labels = self.mapping.members, self.mapping.labels
        mass = np.bincount(labels, self.weights)
        return np.cumsum(self.weights[members] / mass[labels[members]])

    @cached_property
    def _likeliest(self) -> NDArray[np.int64]:
        """The member of the largest weight of each cluster, `[k]`."""
        members = self.mapping.members
        order = np.lexsort((-self.weights[members], self.mapping.labels[members]))
        return members[order[self.mapping.offsets[:-1]]]


def _frequencies(mapping: TokenMap, counts: ArrayLike | None) -> NDArray[np.float64]:
    if counts is None:
        raise ConfigError("frequency needs how often each token occurs: give counts=")
    weights = as_numbers(counts, "counts").astype(np.float64)
    if weights.shape != (mapping.tokens,):
        raise ConfigError(f"counts needs one number for each of the {mapping.tokens} tokens, got {weights.shape}")
    never = np.bincount(mapping.labels, weights) == 0
    weights[never[mapping.labels] & mapping.used] = 1.0
    return weights
