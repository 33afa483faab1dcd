"""Token sets as memory-mapped shards: a folder of `.npy` files and an `index.json`.

Each shard is `[images, L]` of the smallest unsigned type that holds the vocabulary; nothing is read before it is
needed. `labels-*.npy` hold one class an image, if there are classes.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hasten.errors import ConfigError, ModelError
from hasten.io import write_whole
from hasten.tokens.mapping import TokenMap

__all__ = ["TokenShards", "write_shards"]

FORMAT = 1
ROWS = 65_536


def write_shards(
    folder: str | Path, tokens: ArrayLike, vocabulary: int, labels: ArrayLike | None = None, rows: int = ROWS
) -> TokenShards:
    """Write tokens `[images, L]` (and classes `[images]`) in shards of `rows` images.

    Raises:
        ConfigError: if the arrays do not fit the vocabulary or each other.
    """
    values = np.asarray(tokens)
    classes = None if labels is None else np.asarray(labels)
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.integer):
        raise ConfigError(f"tokens must be whole numbers [images, L], got {values.dtype} of {values.shape}")
    if classes is not None and classes.shape != values.shape[:1]:
        raise ConfigError(f"one class an image is needed, {len(values)}, got the shape {classes.shape}")
    if rows < 1:
        raise ConfigError(f"rows must be at least 1, got {rows}")
    pieces = (
        (values[first : first + rows], None if classes is None else classes[first : first + rows])
        for first in range(0, len(values), rows)
    )
    return _write(Path(folder), pieces, values.shape[1], vocabulary, classes is not None)


def _write(
    folder: Path, pieces: Iterator[tuple[Any, Any]], length: int, vocabulary: int, labelled: bool
) -> TokenShards:
    dtype = np.min_scalar_type(max(0, vocabulary - 1))
    folder.mkdir(parents=True, exist_ok=True)
    counts = []
    for i, (tokens, classes) in enumerate(pieces):
        if tokens.size and (tokens.min() < 0 or tokens.max() >= vocabulary):
            raise ConfigError(f"tokens {tokens.min()} .. {tokens.max()} do not fit a vocabulary of {vocabulary}")
        np.save(folder / f"tokens-{i:05d}.npy", tokens.astype(dtype))
        if labelled:
            np.save(folder / f"labels-{i:05d}.npy", classes.astype(np.int32))
        counts.append(len(tokens))
    index = {"format": FORMAT, "vocabulary": vocabulary, "length": length, "counts": counts, "labels": labelled}
    write_whole(folder / "index.json", json.dumps(index) + "\n")  # last, so that a folder with an index is whole
    return TokenShards.open(folder)


@dataclass(frozen=True, eq=False)
class TokenShards:
    """Images of tokens on disk; `shards[i]` and `shards.take(indices)` read what they need.

    Attributes:
        folder: where the shards are.
        vocabulary: number of tokens that there are.
        length: tokens of an image, `L`.
        counts: images of each shard.
        arrays: the shards, memory-mapped.
        classes: one class an image, memory-mapped; empty without classes.
    """

    folder: Path
    vocabulary: int
    length: int
    counts: tuple[int, ...]
    arrays: tuple[NDArray[Any], ...]
    classes: tuple[NDArray[Any], ...]

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Map the shards of a folder.

        Raises:
            ModelError: if files are missing, damaged or do not fit the index.
        """
        folder = Path(folder)
        try:
            index = json.loads((folder / "index.json").read_text())
            counts, length = tuple(index["counts"]), int(index["length"])
            arrays = tuple(np.load(folder / f"tokens-{i:05d}.npy", mmap_mode="r") for i in range(len(counts)))
            names = [f"labels-{i:05d}.npy" for i in range(len(counts))] if index["labels"] else []
            classes = tuple(np.load(folder / name, mmap_mode="r") for name in names)
            vocabulary = int(index["vocabulary"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{folder}: no usable token shards ({error}); write them again") from error
        if any(a.shape != (n, length) for a, n in zip(arrays, counts, strict=True)):
            raise ModelError(f"{folder}: a shard has another shape than the index says; write them again")
        return cls(folder, vocabulary, length, counts, arrays, classes)

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, i: int) -> NDArray[np.int64]:
        return self.take([i])[0]

    def _places(self, indices: ArrayLike) -> list[tuple[int, int]]:
        upto = [0, *accumulate(self.counts)]
        places = []
        for i in np.asarray(indices, np.int64).tolist():
            if not 0 <= i < len(self):
                raise IndexError(f"image {i} of {len(self)}")
            shard = bisect.bisect_right(upto, i) - 1
            places.append((shard, i - upto[shard]))
        return places

    def take(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Tokens `[B, L]` of some images."""
        rows = [self.arrays[shard][row] for shard, row in self._places(indices)]
        return np.asarray(rows, np.int64).reshape(-1, self.length)

    def labels(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Classes `[B]` of some images; zeros without classes."""
        if not self.classes:
            return np.zeros(len(np.asarray(indices)), np.int64)
        return np.asarray([self.classes[shard][row] for shard, row in self._places(indices)], np.int64)

    def token_counts(self) -> NDArray[np.int64]:
        """How often each token occurs, `[vocabulary]`."""
        counts = np.zeros(self.vocabulary, np.int64)
        for array in self.arrays:
            counts += np.bincount(array.reshape(-1), minlength=self.vocabulary)
        return counts

    def mapped(
        self, mapping: TokenMap, folder: str | Path, progress: Callable[[int, int], None] | None = None
    ) -> TokenShards:
        """Write the shards with clusters for tokens, one shard in memory at a time.

        Raises:
            ConfigError: if the map is of another vocabulary, or the folder is the shards' own.
        """
        if mapping.tokens != self.vocabulary:
            raise ConfigError(f"the map has {mapping.tokens} tokens, the shards a vocabulary of {self.vocabulary}")
        if Path(folder).resolve() == self.folder.resolve():
            raise ConfigError(f"{folder} holds the fine tokens; write the clusters to another folder")

        def pieces() -> Iterator[tuple[Any, Any]]:
            for i, array in enumerate(self.arrays):
                yield mapping(array), self.classes[i] if self.classes else None
                if progress is not None:
                    progress(i + 1, len(self.arrays))

        return _write(Path(folder), pieces(), self.length, mapping.clusters, bool(self.classes))
