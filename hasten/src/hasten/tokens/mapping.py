"""A partition of a token vocabulary: token -> cluster, clusters -> members.

Shapes: `N` tokens, `k` clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hasten.errors import ConfigError, ModelError
from hasten.io import Array, Kind, check_arrays, read_tensors, write_tensors

__all__ = ["TokenMap"]


@dataclass(frozen=True)
class _Content:
    """What the header of a map's file holds."""

    map: str
    fingerprint: str


KIND = Kind("token map", _Content, ModelError, "Make it again with `hasten tokens map`.", 256 << 20)
ARRAYS = {
    "labels": Array("integer", ("N",), low=0),
    "members": Array("integer", ("N",)),
    "offsets": Array("integer", ("k + 1",)),
}


@dataclass(frozen=True, eq=False)
class TokenMap:
    """Which cluster each token is in.

    Attributes:
        labels: `[N]` int32, cluster of each token; every cluster `0 .. k-1` has a member.
        kind: how it was made: `"masc"`, `"k-means"`, `"random"`, `"flat"`.
        fingerprint: of the codebook that it was made of; empty if of none.

    Raises:
        ConfigError: if the labels are no such partition.
    """

    labels: NDArray[np.int32]
    kind: str = "masc"
    fingerprint: str = ""

    def __post_init__(self) -> None:
        labels = np.asarray(self.labels)
        if labels.ndim != 1 or not len(labels) or not np.issubdtype(labels.dtype, np.integer):
            raise ConfigError(f"labels must be one whole number a token, [N]; got {labels.dtype} of {labels.shape}")
        if labels.min() < 0 or labels.max() >= len(labels):  # before memory for that many clusters is asked for
            raise ConfigError(
                f"the labels of {len(labels)} tokens lie within 0 .. {len(labels) - 1}, "
                f"got {labels.min()} .. {labels.max()}"
            )
        empty = np.flatnonzero(np.bincount(labels) == 0)
        if len(empty):
            raise ConfigError(f"cluster {empty[0]} has no member, so no token can stand for it; number them 0 .. k-1")
        object.__setattr__(self, "labels", labels.astype(np.int32))

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
        """Members of each cluster, `[k]`."""
        return np.bincount(self.labels, minlength=self.clusters)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """`[k + 1]`: the members of cluster c are `members[offsets[c] : offsets[c + 1]]`."""
        return np.concatenate([[0], np.cumsum(self.sizes)])

    @cached_property
    def members(self) -> NDArray[np.int64]:
        """All tokens by cluster, `[N]`; ascending within a cluster."""
        return np.argsort(self.labels, kind="stable")

    def of(self, cluster: int) -> NDArray[np.int64]:
        """Tokens of one cluster."""
        if not 0 <= cluster < self.clusters:
            raise ConfigError(f"there are clusters 0 .. {self.clusters - 1}, asked for {cluster}")
        return self.members[self.offsets[cluster] : self.offsets[cluster + 1]]

    def __call__(self, tokens: ArrayLike) -> NDArray[np.int32]:
        """Clusters of tokens of any shape.

        Raises:
            ConfigError: if they are no whole numbers in `0 .. N-1`.
        """
        tokens = np.asarray(tokens)
        if not np.issubdtype(tokens.dtype, np.integer):
            raise ConfigError(f"tokens must be whole numbers, got {tokens.dtype}")
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self.tokens):
            raise ConfigError(
                f"tokens {tokens.min()} .. {tokens.max()} do not fit a vocabulary of {self.tokens}; "
                "the map belongs to another codebook, or the tokens hold special ids"
            )
        return self.labels[tokens]

    def refines(self, coarser: TokenMap) -> bool:
        """Whether each cluster lies within one cluster of `coarser`."""
        if self.tokens != coarser.tokens:
            return False
        first = coarser.labels[self.members[self.offsets[:-1]]]
        return bool((coarser.labels == first[self.labels]).all())

    def save(self, path: str | Path) -> Path:
        """Write labels and member lists to one safetensors file; returns its path."""
        tensors: dict[str, NDArray[Any]] = {"labels": self.labels, "members": self.members, "offsets": self.offsets}
        return write_tensors(path, KIND, tensors, {"map": self.kind, "fingerprint": self.fingerprint})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ModelError: if the file is missing, damaged or no map.
        """
        tensors, content = read_tensors(path, KIND)
        try:
            check_arrays(tensors, ARRAYS)
            mapping = cls(tensors["labels"], content.map, content.fingerprint)
            if not all(np.array_equal(tensors[name], getattr(mapping, name)) for name in ("members", "offsets")):
                raise ValueError("its lists of members are not those of its labels")
        except ValueError as error:
            raise ModelError(f"{path}: no usable map ({error}). {KIND.remedy}") from error
        return mapping
