"""Token sets as memory-mapped shards: a folder of `.npy` files and an `index.json`.

Each shard is `[images, L]` of the smallest unsigned type that holds the vocabulary; nothing is read before it is
needed. `labels-*.npy` hold what each image shows, if that is told: a class, or a text as ids of the model's tokenizer
with -1 in front of shorter ones. The index has the fingerprint of the codebook, if that is told, so that tokens meet no
map of another one; and the digest of each file, which is compared when the shards are opened (by reading them through
once, 1 GB in about a second).
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from hasten.errors import ConfigError, ModelError
from hasten.io import Kind, as_path, describe, open_regular, read_record, write_atomically, write_record
from hasten.parameters import Range, accepted
from hasten.tokens.arrays import as_whole_numbers
from hasten.tokens.causal import Condition
from hasten.tokens.codebook import MOST_TOKENS, as_codebook, codebook_fingerprint
from hasten.tokens.mapping import TokenMap

__all__ = ["TokenShards", "write_shards"]

ROWS = 65_536
MOST_LABEL = 2**31 - 1  # labels are kept as int32
REMEDY = "Write the shards again."
MOST_HEADER = 65_536  # bytes of a `.npy` file before its numbers
DTYPES = (np.uint8, np.uint16, np.uint32)


@dataclass(frozen=True)
class _Index:
    """What the index of a folder of shards holds."""

    vocabulary: int
    length: int
    counts: tuple[int, ...]
    labels: bool
    text: int
    codebook: str
    digests: dict[str, str]

    def __post_init__(self) -> None:
        sizes = (self.text, *self.counts)
        if not 1 <= self.vocabulary <= MOST_TOKENS or self.length < 1 or any(size < 0 for size in sizes):
            raise ValueError(f"sizes must be positive, and the vocabulary at most {MOST_TOKENS}")


KIND = Kind("token shards", _Index, ModelError, REMEDY)


def write_shards(
    folder: str | Path,
    tokens: ArrayLike,
    vocabulary: int,
    labels: ArrayLike | None = None,
    rows: int = ROWS,
    codebook: Any = None,
) -> TokenShards:
    """Write tokens in shards.

    Args:
        folder: where to.
        tokens: `[images, L]`.
        vocabulary: number of tokens that there are.
        labels: what each image shows: classes `[images]`, or texts `[images, P]` as ids with -1 in front.
        rows: images of a shard.
        codebook: that the tokens are of, `[vocabulary, width]`; its fingerprint is kept.

    Raises:
        ConfigError: if the arrays do not fit the vocabulary or each other.
    """
    vocabulary = accepted("write_shards", "vocabulary", Annotated[int, Range(1, MOST_TOKENS)], vocabulary)
    rows = accepted("write_shards", "rows", Annotated[int, Range(1)], rows)
    values = as_whole_numbers(tokens, "tokens")
    shown_labels = None if labels is None else as_whole_numbers(labels, "labels")
    if values.ndim != 2 or not values.shape[1]:
        raise ConfigError(f"tokens must be whole numbers [images, L], got {values.dtype} of {values.shape}")
    if shown_labels is not None and (shown_labels.shape[:1] != values.shape[:1] or shown_labels.ndim not in (1, 2)):
        raise ConfigError(
            f"one class per image, or the ids of one text, is needed, {len(values)}; got the shape {shown_labels.shape}"
        )
    if shown_labels is not None and shown_labels.ndim == 2:
        Condition.padded(torch.from_numpy(shown_labels.astype(np.int64)))
    least = 0 if shown_labels is None or shown_labels.ndim == 1 else -1
    if shown_labels is not None and shown_labels.size:
        low, high = int(shown_labels.min()), int(shown_labels.max())
        if low < least or high > MOST_LABEL:
            raise ConfigError(f"labels must lie within {least} .. {MOST_LABEL}, got {low} .. {high}")
    codes = None if codebook is None else as_codebook(codebook)
    if codes is not None and len(codes) != vocabulary:
        raise ConfigError(f"the codebook has {len(codes)} codes, the vocabulary {vocabulary} tokens")
    pieces = (
        (values[first : first + rows], None if shown_labels is None else shown_labels[first : first + rows])
        for first in range(0, len(values), rows)
    )
    index = {
        "vocabulary": vocabulary,
        "length": values.shape[1],
        "labels": shown_labels is not None,
        "text": shown_labels.shape[1] if shown_labels is not None and shown_labels.ndim == 2 else 0,
        "codebook": "" if codes is None else codebook_fingerprint(codes),
    }
    return _write(as_path(folder), pieces, index)


def _write(folder: Path, pieces: Iterator[tuple[Any, Any]], index: dict[str, Any]) -> TokenShards:
    vocabulary = index["vocabulary"]
    if not 1 <= vocabulary <= MOST_TOKENS:
        raise ConfigError(f"a vocabulary has 1 .. {MOST_TOKENS} tokens, got {vocabulary}")
    dtype = np.min_scalar_type(vocabulary - 1)
    counts, digests = [], {}
    for i, (tokens, labels) in enumerate(pieces):
        if tokens.size and (tokens.min() < 0 or tokens.max() >= vocabulary):
            raise ConfigError(f"tokens {tokens.min()} .. {tokens.max()} do not fit a vocabulary of {vocabulary}")
        files = {"tokens": tokens.astype(dtype)} | ({"labels": labels.astype(np.int32)} if index["labels"] else {})
        for kind, array in files.items():
            name = f"{kind}-{i:05d}.npy"
            content = _npy(array)
            write_atomically(folder / name, content)
            digests[name] = hashlib.sha256(content).hexdigest()
        counts.append(len(tokens))
    index = {**index, "counts": counts, "digests": digests}
    write_record(folder / "index.json", KIND, index)  # last, so that a folder with an index is whole
    return TokenShards.open(folder)


def _npy(array: NDArray[Any]) -> bytes:
    """The content of a `.npy` file."""
    file = BytesIO()
    np.save(file, array)
    return file.getvalue()


def _map(path: Path, digest: str | None, dtypes: tuple[type, ...], shape: tuple[int, ...]) -> NDArray[Any]:
    """A memory-mapped `.npy` file.

    Raises:
        OSError: if it is not there.
        ValueError: if it is damaged, or holds something else.
    """
    file, _ = open_regular(path, math.prod(shape) * np.dtype(dtypes[-1]).itemsize + MOST_HEADER)
    with file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
            raise ValueError(f"{path.name} is damaged: it does not have the digest that it was written with")
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r")
    except Exception as error:  # whatever numpy raises, the file is no array
        raise ValueError(f"{path.name} is no array") from error
    if array.dtype not in dtypes or array.shape != shape:
        raise ValueError(f"{path.name} holds {array.dtype} of {array.shape}, expected {shape}")
    return array


@dataclass(frozen=True, eq=False)
class TokenShards:
    """Images of tokens on disk; `shards[i]` and `shards.take(indices)` read what they need.

    Attributes:
        folder: where the shards are.
        vocabulary: number of tokens that there are.
        length: tokens per image, `L`.
        counts: images of each shard.
        arrays: the shards, memory-mapped.
        classes: one class per image, or the ids of one text `[images, P]`, memory-mapped; empty without either.
        text: ids of a text, `P`; 0 for classes.
        codebook: fingerprint of the codebook that the tokens are of; empty if that is not told.
    """

    folder: Path
    vocabulary: int
    length: int
    counts: tuple[int, ...]
    arrays: tuple[NDArray[Any], ...]
    classes: tuple[NDArray[Any], ...]
    text: int = 0
    codebook: str = ""

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Map the shards of a folder.

        Raises:
            ModelError: if files are missing, damaged or do not fit the index.
        """
        folder = as_path(folder)
        index = read_record(folder / "index.json", KIND)
        numbered = [(f"{i:05d}.npy", count) for i, count in enumerate(index.counts)]
        try:
            arrays = [
                _map(folder / (name := f"tokens-{end}"), index.digests.get(name), DTYPES, (count, index.length))
                for end, count in numbered
            ]
            for i, array in enumerate(arrays):
                if array.size and int(array.max()) >= index.vocabulary:
                    raise ValueError(f"shard {i} has the token {array.max()}, but there are {index.vocabulary}")
            classes = [
                _map(
                    folder / (name := f"labels-{end}"),
                    index.digests.get(name),
                    (np.int32,),
                    (count, index.text) if index.text else (count,),
                )
                for end, count in numbered
                if index.labels
            ]
            if any(array.size and int(array.min()) < (-1 if index.text else 0) for array in classes):
                raise ValueError("a class is negative")
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder}: no usable token shards ({describe(error)}). {REMEDY}") from error
        facts = (index.vocabulary, index.length, index.counts)
        return cls(folder, *facts, tuple(arrays), tuple(classes), index.text, index.codebook)

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, i: int) -> NDArray[np.int64]:
        return self.take([i])[0]

    def _places(self, indices: ArrayLike) -> list[tuple[int, int]]:
        upto = [0, *accumulate(self.counts)]
        places = []
        for i in as_whole_numbers(indices, "indices").reshape(-1).tolist():
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
        """Classes `[B]` or texts `[B, P]` of some images; zeros without either."""
        if not self.classes:
            return np.zeros(len(as_whole_numbers(indices, "indices")), np.int64)
        return np.asarray([self.classes[shard][row] for shard, row in self._places(indices)], np.int64)

    def token_counts(self) -> NDArray[np.int64]:
        """How often each token occurs, `[vocabulary]`."""
        counts = np.zeros(self.vocabulary, np.int64)
        for array in self.arrays:
            counts += np.bincount(array.reshape(-1), minlength=self.vocabulary)
        return counts

    def check(self, mapping: TokenMap) -> None:
        """Refuse a map of another codebook.

        Raises:
            ConfigError: if the map is of another vocabulary.
            ModelError: if it was made of another codebook than the one that the tokens are of.
        """
        accepted("TokenShards.check", "mapping", TokenMap, mapping)
        if mapping.tokens != self.vocabulary:
            raise ConfigError(f"the map has {mapping.tokens} tokens, the shards a vocabulary of {self.vocabulary}")
        if self.codebook and mapping.fingerprint and self.codebook != mapping.fingerprint:
            raise ModelError(
                f"the tokens are of the codebook {self.codebook}, the map of {mapping.fingerprint}; "
                "use the map of this tokenizer"
            )

    def mapped(
        self, mapping: TokenMap, folder: str | Path, progress: Callable[[int, int], None] | None = None
    ) -> TokenShards:
        """Write the shards with clusters for tokens, one shard in memory at a time.

        Raises:
            ConfigError: if the map is of another vocabulary, or the folder is the shards' own.
            ModelError: if the map is of another codebook.
        """
        self.check(mapping)
        if as_path(folder).resolve() == self.folder.resolve():
            raise ConfigError(f"{folder} holds the fine tokens; write the clusters to another folder")

        def pieces() -> Iterator[tuple[Any, Any]]:
            for i, array in enumerate(self.arrays):
                yield mapping(array), self.classes[i] if self.classes else None
                if progress is not None:
                    progress(i + 1, len(self.arrays))

        index = {"vocabulary": mapping.clusters, "length": self.length, "labels": bool(self.classes), "text": self.text}
        return _write(as_path(folder), pieces(), {**index, "codebook": ""})
