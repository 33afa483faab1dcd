"""A small z-buffer rasteriser for CPUs: triangles to buffers, vectorised over all candidate pixels of a frame.

Shapes: `V` vertices, `F` triangles, `S` side of the image in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from drape.scene.arrays import Floats

__all__ = ["Hits", "rasterise"]


@dataclass(frozen=True)
class Hits:
    """The visible triangle of every covered pixel, `P` of them.

    Attributes:
        row, column: int64 `[P]`.  face: int64 `[P]`.
        weights: float64 `[P, 3]`, perspective-correct barycentric coordinates.
        depth: float64 `[P]`, metres.
        area: float64 `[F]`, the triangles' areas in pixels.
    """

    row: NDArray[np.int64]
    column: NDArray[np.int64]
    face: NDArray[np.int64]
    weights: Floats
    depth: Floats
    area: Floats


def candidates(low: NDArray[np.int64], high: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
    """Face, column and row of every pixel in every triangle's bounding box `[F, 2]`, both ends included."""
    extent = np.maximum(high - low + 1, 0)
    count = extent[:, 0] * extent[:, 1]
    face = np.repeat(np.arange(len(count)), count)
    inside = np.arange(len(face)) - np.repeat(np.cumsum(count) - count, count)
    width = extent[face, 0]
    return face, low[face, 0] + inside % width, low[face, 1] + inside // width


def rasterise(screen: Floats, faces: NDArray[np.int64], size: int, under: Floats | float = 0.0) -> Hits:
    """Find what each pixel centre sees.

    Args:
        screen: `[V, 3]`, pixel x, pixel y and depth, from `Camera.project`.
        faces: `[F, 3]`; seen from both sides.
        size: S.
        under: `[F]` or one for all, metres that triangles are taken to lie deeper by where others cover them.
    """
    corners = screen[faces]
    a, b, c = corners[:, 0], corners[:, 1], corners[:, 2]
    signed = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (c[:, 0] - a[:, 0]) * (b[:, 1] - a[:, 1])
    low = np.clip(np.ceil(corners[..., :2].min(axis=1) - 0.5), 0, size).astype(np.int64)
    high = np.clip(np.floor(corners[..., :2].max(axis=1) - 0.5), -1, size - 1).astype(np.int64)
    high[np.abs(signed) < 1e-12] = -1
    face, x, y = candidates(low, high)
    px, py = x + 0.5, y + 0.5
    fa, fb, fc, total = a[face], b[face], c[face], signed[face]
    wb = ((px - fa[:, 0]) * (fc[:, 1] - fa[:, 1]) - (fc[:, 0] - fa[:, 0]) * (py - fa[:, 1])) / total
    wc = ((fb[:, 0] - fa[:, 0]) * (py - fa[:, 1]) - (px - fa[:, 0]) * (fb[:, 1] - fa[:, 1])) / total
    flat = np.stack([1 - wb - wc, wb, wc], axis=1)
    inside = flat.min(axis=1) >= 0
    face, x, y, flat = face[inside], x[inside], y[inside], flat[inside]
    inverse = flat / corners[face, :, 2]
    depth = 1 / inverse.sum(axis=1)
    order = np.lexsort((depth + np.broadcast_to(under, len(faces))[face], y * size + x))
    pixel = (y * size + x)[order]
    first = order[np.concatenate([[True], pixel[1:] != pixel[:-1]])] if len(order) else order
    return Hits(y[first], x[first], face[first], inverse[first] * depth[first, None], depth[first], np.abs(signed) / 2)
