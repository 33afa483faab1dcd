"""A codebook: its vectors, which of them are used, and how it is told from others.

Shapes: `N` codes, `D` width, `U` used codes.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from hasten.errors import ConfigError, ModelError, unknown
from hasten.tokens.arrays import as_numbers

__all__ = [
    "MOST_TOKENS", "NORMALIZE", "Normalize", "as_codebook", "check_codebook", "codebook_fingerprint", "nearest_used",
    "prepare_codes", "prepared", "used_codes",
]  # fmt: skip

Normalize = Literal["none", "unit"]
NORMALIZE = ("none", "unit")
FLOAT32 = np.finfo(np.float32)
MOST_TOKENS = 1 << 24  # in a vocabulary


def as_codebook(codebook: Any) -> NDArray[np.float64]:
    """A codebook `[N, D]` (array, or tensor on any device) as float64.

    Raises:
        ConfigError: if it is no finite matrix of at least two rows, or float32 cannot hold it: codebooks are kept and
            told apart in float32, and the squares of larger values leave float64.
    """
    codes = as_numbers(codebook, "a codebook").astype(np.float64)
    if codes.ndim != 2 or len(codes) < 2 or not codes.shape[1]:
        raise ConfigError(f"a codebook is a matrix [codes, width] of at least two codes, got the shape {codes.shape}")
    bad = np.flatnonzero(~np.isfinite(codes).all(axis=1))
    if len(bad):
        raise ConfigError(f"code {bad[0]} has a value that is not finite ({len(bad)} such codes); repair the codebook")
    largest = np.abs(codes).max(axis=1)
    bad = np.flatnonzero((largest > FLOAT32.max) | ((largest > 0) & (largest < FLOAT32.smallest_subnormal)))
    if len(bad):
        raise ConfigError(
            f"code {bad[0]} has values of about {largest[bad[0]]:.3g}, which float32 cannot hold ({len(bad)} such "
            "codes); scale the codebook, the tree stays the same"
        )
    return codes


def prepare_codes(codes: NDArray[np.float64], normalize: Normalize) -> NDArray[np.float64]:
    """The vectors whose distances count, `[N, D]`.

    Raises:
        ConfigError: if a row of zeros is to have unit length.
    """
    if not isinstance(normalize, str) or normalize not in NORMALIZE:
        raise unknown("normalization", normalize, NORMALIZE)
    if normalize == "none":
        return codes
    lengths = np.linalg.norm(codes, axis=1, keepdims=True)
    zero = np.flatnonzero(lengths[:, 0] == 0)
    if len(zero):
        raise ConfigError(f"code {zero[0]} is zero and has no direction; use normalize='none' or mark it as unused")
    return codes / lengths


def codebook_fingerprint(codebook: Any) -> str:
    """Digest of a codebook: its shape and its values as float32."""
    codes = as_codebook(codebook).astype(np.float32)
    return hashlib.sha256(repr(codes.shape).encode() + codes.tobytes()).hexdigest()[:16]


def check_codebook(codebook: Any, fingerprint: str, what: str) -> None:
    """Refuse another codebook than the one that something was made of; an empty fingerprint is of none.

    Raises:
        ModelError: if it is another.
    """
    if fingerprint and (other := codebook_fingerprint(codebook)) != fingerprint:
        raise ModelError(
            f"the {what} was made of the codebook {fingerprint}, this one is {other}; "
            f"give the codebook that it was made of, or make the {what} of this one"
        )


def used_codes(used: ArrayLike | None, n: int) -> NDArray[np.int64]:
    """Tokens of the used codes, ascending.

    Args:
        used: `[N]` bool, or how often each code occurs; all by default.
        n: codes.

    Raises:
        ConfigError: if it is not one value per code, or fewer than two are used.
    """
    if used is None:
        return np.arange(n)
    flags = as_numbers(used, "used")
    if flags.shape != (n,):
        raise ConfigError(f"used needs one value for each of the {n} codes, got the shape {flags.shape}")
    if not (flags >= 0).all():
        raise ConfigError("used must be True or False, or a count of 0 or more, of each code")
    leaves = np.flatnonzero(flags > 0)
    if len(leaves) < 2:
        raise ConfigError(f"at least two used codes are needed, {len(leaves)} are marked as used")
    return leaves


def prepared(codes: NDArray[np.float64], leaves: NDArray[np.int64], normalize: Normalize) -> NDArray[np.float64]:
    """As `prepare_codes`, but unused codes may be zero: they have a place all the same."""
    points = codes.copy()
    points[leaves] = prepare_codes(codes[leaves], normalize)
    if normalize == "unit":
        dead = np.setdiff1d(np.arange(len(codes)), leaves)
        points[dead] /= np.maximum(np.linalg.norm(points[dead], axis=1, keepdims=True), 1e-30)
    return points


def nearest_used(points: NDArray[np.float64], leaves: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each code `[N]` the number of a used code in `leaves`: its own, or for unused codes the nearest's."""
    nearest = np.empty(len(points), np.int64)
    nearest[leaves] = np.arange(len(leaves))
    dead = np.setdiff1d(np.arange(len(points)), leaves)
    if len(dead):
        nearest[dead] = cKDTree(points[leaves]).query(points[dead])[1]
    return nearest
