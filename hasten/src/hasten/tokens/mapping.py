"""A partition of a token vocabulary: token -> cluster, clusters -> members.

A token that never occurs (a dead code) has a cluster, so that every token can be mapped, but is no member of it: it has
no weight and nothing is decoded to it.

Shapes: `N` tokens, `U` used tokens, `k` clusters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hasten.errors import ConfigError, ModelError, unknown
from hasten.io import Array, Kind, check_arrays, read_tensors, write_tensors
from hasten.parameters import accepted
from hasten.tokens.arrays import as_numbers, as_whole_numbers
from hasten.tokens.codebook import NORMALIZE, Normalize, as_codebook, check_codebook

__all__ = ["TokenMap"]


@dataclass(frozen=True)
class _Content:
    """What the header of a map's file holds."""

    map: str
    fingerprint: str
    normalize: Normalize


KIND = Kind("token map", _Content, ModelError, "Make it again with `hasten tokens map`.", 256 << 20)
ARRAYS = {
    "labels": Array("integer", ("N",), low=0),
    "used": Array("integer", ("N",), low=0, high=1),
    "members": Array("integer", ("U",)),
    "offsets": Array("integer", ("k + 1",)),
}


@dataclass(frozen=True, eq=False)
class TokenMap:
    """Which cluster each token is in.

    Attributes:
        labels: `[N]` int32, cluster of each token; every cluster `0 .. k-1` has a member.
        kind: how it was made: `"masc"`, `"k-means"`, `"random"`, `"flat"`.
        fingerprint: of the codebook that it was made of; empty if of none.
        normalize: what was done to the codebook's rows.
        used: `[N]` bool, which tokens occur; none given means all.

    Raises:
        ConfigError: if the labels are no such partition.
    """

    labels: NDArray[np.int32]
    kind: str = "masc"
    fingerprint: str = ""
    normalize: Normalize = "none"
    used: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, bool))

    def __post_init__(self) -> None:
        labels = as_whole_numbers(self.labels, "labels")
        if labels.ndim != 1 or not len(labels):
            raise ConfigError(f"labels must be one whole number a token, [N]; got {labels.dtype} of {labels.shape}")
        if labels.min() < 0 or labels.max() >= len(labels):  # before memory for that many clusters is asked for
            raise ConfigError(
                f"the labels of {len(labels)} tokens lie within 0 .. {len(labels) - 1}, "
                f"got {labels.min()} .. {labels.max()}"
            )
        if not isinstance(self.normalize, str) or self.normalize not in NORMALIZE:
            raise unknown("normalization", self.normalize, NORMALIZE)
        used = as_numbers(self.used, "used")
        used = used if used.size else np.ones(len(labels), bool)
        if used.shape != labels.shape or used.dtype != bool:
            raise ConfigError(f"used must be one bool per token, {labels.shape}; got {used.dtype} of {used.shape}")
        empty = np.flatnonzero(np.bincount(labels[used], minlength=int(labels.max()) + 1) == 0)
        if len(empty):
            raise ConfigError(
                f"cluster {empty[0]} has no used member, so no token can stand for it; number clusters 0 .. k-1"
            )
        object.__setattr__(self, "labels", labels.astype(np.int32))
        object.__setattr__(self, "used", used)

    @property
    def tokens(self) -> int:
        """Tokens of the fine vocabulary, `N`."""
        return len(self.labels)

    @property
    def clusters(self) -> int:
        """Size of the coarse vocabulary, `k`."""
        return int(self.labels.max()) + 1

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Members of each cluster, `[k]`: tokens that occur."""
        return np.bincount(self.labels[self.used], minlength=self.clusters)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """`[k + 1]`: the members of cluster c are `members[offsets[c] : offsets[c + 1]]`."""
        return np.concatenate([[0], np.cumsum(self.sizes)])

    @cached_property
    def members(self) -> NDArray[np.int64]:
        """Used tokens by cluster, `[U]`; ascending within a cluster."""
        tokens = np.flatnonzero(self.used)
        return tokens[np.argsort(self.labels[tokens], kind="stable")]

    def of(self, cluster: int) -> NDArray[np.int64]:
        """Members of one cluster: its tokens that occur."""
        if not 0 <= accepted("TokenMap.of", "cluster", int, cluster) < self.clusters:
            raise ConfigError(f"there are clusters 0 .. {self.clusters - 1}, asked for {cluster}")
        return self.members[self.offsets[cluster] : self.offsets[cluster + 1]]

    def __call__(self, tokens: ArrayLike) -> NDArray[np.int32]:
        """Clusters of tokens of any shape.

        Raises:
            ConfigError: if they are no whole numbers in `0 .. N-1`.
        """
        tokens = as_whole_numbers(tokens, "tokens")
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self.tokens):
            raise ConfigError(
                f"tokens {tokens.min()} .. {tokens.max()} do not fit a vocabulary of {self.tokens}; "
                "the map belongs to another codebook, or the tokens hold special ids"
            )
        return self.labels[tokens]

    def check(self, codebook: Any) -> None:
        """Refuse another codebook.

        Raises:
            ModelError: if this map was made of another, or has another number of tokens.
        """
        codes = as_codebook(codebook)
        if len(codes) != self.tokens:
            raise ModelError(f"the map has {self.tokens} tokens, the codebook {len(codes)} codes")
        check_codebook(codes, self.fingerprint, "map")

    def refines(self, coarser: TokenMap) -> bool:
        """Whether each cluster lies within one cluster of `coarser`."""
        if self.tokens != accepted("TokenMap.refines", "coarser", TokenMap, coarser).tokens:
            return False
        first = coarser.labels[self.members[self.offsets[:-1]]]
        return bool((coarser.labels == first[self.labels]).all())

    def save(self, path: str | Path) -> Path:
        """Write labels and member lists to one safetensors file; returns its path."""
        tensors: dict[str, NDArray[Any]] = {name: getattr(self, name) for name in ARRAYS}
        tensors["used"] = self.used.astype(np.uint8)
        facts = {"map": self.kind, "fingerprint": self.fingerprint, "normalize": self.normalize}
        return write_tensors(path, KIND, tensors, facts)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ModelError: if the file is missing, damaged or no map.
        """
        tensors, content = read_tensors(path, KIND)
        try:
            check_arrays(tensors, ARRAYS)
            mapping = cls(tensors["labels"], content.map, content.fingerprint, content.normalize, tensors["used"] == 1)
            if not all(np.array_equal(tensors[name], getattr(mapping, name)) for name in ("members", "offsets")):
                raise ValueError("its lists of members are not those of its labels")
        except ValueError as error:
            raise ModelError(f"{path}: no usable map ({error}). {KIND.remedy}") from error
        return mapping
