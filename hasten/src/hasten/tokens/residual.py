"""Tokenizers with several codebooks (residual VQ): one tree per codebook, one vocabulary for the model.

Each position of an image has one token of each codebook. The model gets them one after the other, coarse to fine: ids
of codebook `c` lie behind those of the codebooks before it, and so do clusters.

Shapes: `C` codebooks, `N_c` tokens and `k_c` clusters of codebook `c`, `L` positions of an image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hasten.errors import ConfigError, ModelError
from hasten.io import Kind as FileKind
from hasten.io import as_path, check_files, read_record, write_files, write_record
from hasten.parameters import accepted
from hasten.tokens.arrays import as_whole_numbers
from hasten.tokens.codebook import Normalize
from hasten.tokens.mapping import TokenMap
from hasten.tokens.members import Kind, MemberSampler
from hasten.tokens.tree import SemanticTree

__all__ = ["ResidualMaps"]

LIST = "residual_maps.json"


@dataclass(frozen=True)
class _Set:
    """The list of a set: SHA-256 of each of its maps, coarse to fine."""

    files: dict[str, str]


KIND = FileKind("set of residual maps", _Set, ModelError, "Write the maps again.")


@dataclass(frozen=True, eq=False)
class ResidualMaps:
    """One map per codebook.

    Attributes:
        maps: of the codebooks, coarse to fine.

    Raises:
        ConfigError: if there is none.
    """

    maps: tuple[TokenMap, ...]

    def __post_init__(self) -> None:
        maps = accepted("ResidualMaps", "maps", tuple[TokenMap, ...], self.maps)
        object.__setattr__(self, "maps", maps)

    @classmethod
    def fit(
        cls,
        codebooks: Sequence[Any],
        clusters: Sequence[int],
        *,
        normalize: Normalize = "unit",
        used: Sequence[ArrayLike | None] | None = None,
        max_size: int | None = None,
    ) -> Self:
        """One tree per codebook, cut at its number of clusters; further arguments as for `SemanticTree`.

        Raises:
            ConfigError: if the numbers do not fit each other, or a codebook cannot be clustered.
        """
        clusters = as_whole_numbers(clusters, "clusters").tolist()
        if not isinstance(clusters, list) or not hasattr(codebooks, "__len__"):
            raise ConfigError("codebooks and clusters must be lists, with one codebook and one number for each tree")
        if used is not None and not hasattr(used, "__len__"):
            raise ConfigError("used must be a list, with flags or counts for each codebook; None where all are used")
        each = [None] * len(codebooks) if used is None else list(used)
        if len(clusters) != len(codebooks) or len(each) != len(codebooks):
            raise ConfigError(
                f"{len(codebooks)} codebooks need as many numbers of clusters and of used codes, got {len(clusters)} "
                f"and {len(each)}"
            )
        trees = [SemanticTree.fit(codes, normalize=normalize, used=u) for codes, u in zip(codebooks, each, strict=True)]
        return cls(tuple(tree.map(k, max_size) for tree, k in zip(trees, clusters, strict=True)))

    @property
    def codebooks(self) -> tuple[int, ...]:
        """Clusters of each codebook; what a `CausalModel` wants to know."""
        return tuple(mapping.clusters for mapping in self.maps)

    def stacked(self) -> TokenMap:
        """One map of all tokens, `sum N_c` of them: for shards, `replace_vocabulary` and training."""
        first = np.cumsum([0, *self.codebooks[:-1]])
        labels = np.concatenate([m.labels + begin for m, begin in zip(self.maps, first, strict=True)])
        used = np.concatenate([m.used for m in self.maps])
        prints = [m.fingerprint for m in self.maps]
        known = hashlib.sha256(repr(prints).encode()).hexdigest()[:16] if all(prints) else ""
        return TokenMap(labels.astype(np.int32), self.maps[0].kind, known, self.maps[0].normalize, used)

    def flat(self, tokens: ArrayLike) -> NDArray[np.int64]:
        """Tokens `[..., L, C]` as ids of the one vocabulary, `[..., L C]`.

        Raises:
            ConfigError: if they are no tokens of the codebooks.
        """
        values = as_whole_numbers(tokens, "tokens")
        if values.ndim < 2 or values.shape[-1] != len(self.maps):
            raise ConfigError(
                f"tokens must be whole numbers [..., L, {len(self.maps)}], one per codebook; got {values.dtype} of "
                f"{values.shape}"
            )
        sizes = np.array([m.tokens for m in self.maps])
        if values.size and (values.min() < 0 or (values >= sizes).any()):
            raise ConfigError(f"a token is none of its codebook's; they have {sizes.tolist()} tokens")
        first = np.cumsum([0, *sizes[:-1]])
        return (values.astype(np.int64) + first).reshape(*values.shape[:-2], -1)

    def split(self, flat: ArrayLike) -> NDArray[np.int64]:
        """What `flat` made, as tokens `[..., L, C]` again.

        Raises:
            ConfigError: if an id is of another codebook than its position.
        """
        ids = as_whole_numbers(flat, "ids")
        count = len(self.maps)
        if ids.ndim < 1 or ids.shape[-1] % count:
            raise ConfigError(f"ids of {count} codebooks come in turn, so that {count} divides their number")
        sizes = np.array([m.tokens for m in self.maps])
        tokens = ids.reshape(*ids.shape[:-1], -1, count) - np.cumsum([0, *sizes[:-1]])
        if tokens.size and ((tokens < 0) | (tokens >= sizes)).any():
            raise ConfigError("an id is of another codebook than its position")
        return tokens

    def members(
        self,
        kind: Kind = "uniform",
        *,
        codebooks: Sequence[Any] | None = None,
        counts: Sequence[ArrayLike] | None = None,
    ) -> MemberSampler:
        """Chooses members of the one vocabulary; arguments as for `MemberSampler.make`, one per codebook."""
        for name, given in (("codebooks", codebooks), ("counts", counts)):
            if given is not None and (not hasattr(given, "__len__") or len(given) != len(self.maps)):
                raise ConfigError(f"{name} must be a list with one for each of {len(self.maps)} maps")
        parts = [
            MemberSampler.make(
                mapping,
                kind,
                codebook=None if codebooks is None else codebooks[i],
                counts=None if counts is None else counts[i],
            ).weights
            for i, mapping in enumerate(self.maps)
        ]
        return MemberSampler(self.stacked(), np.concatenate(parts))

    def save(self, folder: str | Path) -> Path:
        """Write `map-0.safetensors` and so on; returns the folder.

        The list of their digests comes last, so that neither a set that was there before nor an interrupted write is
        mixed with this one.
        """
        folder = as_path(folder)

        def fill(scratch: Path) -> None:
            for i, mapping in enumerate(self.maps):
                mapping.save(scratch / f"map-{i}.safetensors")

        digests = write_files(folder, fill)
        write_record(folder / LIST, KIND, {"files": {name: digests[name] for name in _names(len(digests))}})
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ModelError: if a map is missing or damaged, or of another set than the others.
        """
        folder = as_path(folder)
        files = read_record(folder / LIST, KIND).files
        names = _names(len(files))
        if not files or set(files) != set(names):
            raise ModelError(f"{folder}: expected map-0.safetensors and so on without a gap. {KIND.remedy}")
        check_files(folder, files, ModelError, KIND.remedy)
        return cls(tuple(TokenMap.load(folder / name) for name in names))


def _names(count: int) -> list[str]:
    return [f"map-{i}.safetensors" for i in range(count)]
