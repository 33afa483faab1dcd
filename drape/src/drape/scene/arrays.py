"""Arrays of the scene, and rotations."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "about", "dots", "lengths", "rotation"]

Floats = NDArray[np.float64]


def dots(first: Floats, second: Floats) -> Floats:
    """Scalar products of vectors `[..., 3]`, `[...]`; a sum over so short an axis is slow as numpy has it."""
    return np.asarray(np.einsum("...i,...i->...", first, second))


def lengths(vectors: Floats) -> Floats:
    """Lengths of vectors `[..., 3]`, `[...]`."""
    return np.sqrt(dots(vectors, vectors))


def rotation(axis: str, degrees: float) -> Floats:
    """Rotation about the world's x, y or z axis, `[3, 3]`."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    first, second = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3)
    matrix[[first, second, first, second], [first, second, second, first]] = c, c, -s, s
    return matrix


def about(axis: Floats, degrees: float) -> Floats:
    """Rotation about an axis of any length through the origin, `[3, 3]` (Rodrigues' formula)."""
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    angle = np.radians(degrees)
    return np.asarray(np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross)
