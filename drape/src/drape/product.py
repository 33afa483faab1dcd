"""A product's image laid out in a garment's uv square: the photograph of a garment, or a piece of cloth.

A garment is photographed flat from its front on a plain ground. Its outline is found, divided into trunk and limbs as
the garment's islands are (`drape.scene.garments`), and each part is wrapped around its cylinder: what lies in the
middle of the part comes to the front, its edges to the sides, and the back mirrors the front. A piece of cloth fills
its image; it is repeated over the square in its own proportions.

Shapes: `h, w` of the image, `H, W` of the square, `N` pixels of a part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_fill_holes, label
from scipy.spatial import cKDTree

from drape.errors import ConfigError, unknown
from drape.scene.arrays import Floats
from drape.scene.garments import GARMENTS, strips_of

__all__ = ["laid_out", "outline", "parts_of"]

DIFFERENT = 0.1  # from the ground's colour, at least
EVEN = 0.06  # deviation of the ground's colour along the image's edge, at most
FILLS = 0.9  # of its image: what fills more is a piece of cloth
LEAST = 0.05  # and what fills less is no garment
BINS = 24  # stretches along a part in which its width is measured
CROTCH, BODY = 0.35, 0.8  # of the height: where legs begin at the latest, where a shirt is as wide as its trunk
STEEP = 0.3  # a sleeve that leads less outwards hangs down
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Part:
    """Pixels of one part, int `[N]` rows and columns, and the unit direction (x, y) from its top to its hem."""

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    down: tuple[float, float]


def unit_rgb(image: NDArray[Any]) -> Floats:
    """An image of 8 bits or in [0, 1] as floats `[h, w, 3]`.

    Raises:
        ConfigError: it is no RGB image.
    """
    if image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 2:
        raise ConfigError(f"the product image has shape {image.shape}; expected [height, width, 3] RGB.")
    return np.asarray(image, dtype=np.float64) / (255.0 if image.dtype == np.uint8 else 1.0)


def outline(image: NDArray[Any]) -> Mask | None:
    """Where a garment lies on a plain ground, `[h, w]`; none if the image is a piece of cloth that fills it."""
    rgb = unit_rgb(image)
    edge = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])
    ground = np.median(edge, axis=0)
    if np.abs(edge - ground).mean() > EVEN:
        return None
    pieces, count = label(np.abs(rgb - ground).max(axis=2) > DIFFERENT)
    if count == 0:
        return None
    largest = pieces == 1 + int(np.bincount(pieces.ravel())[1:].argmax())
    mask: Mask = np.asarray(binary_fill_holes(largest))
    return mask if LEAST < mask.mean() < FILLS else None


def parts_of(name: str, mask: Mask) -> dict[str, Part]:
    """The parts of a garment's outline by the names of its islands; the wearer's left is on the image's right."""
    rows, columns = np.nonzero(mask)
    top, height = rows.min(), np.ptp(rows) + 1
    if name == "hat":
        return {"trunk": Part(rows, columns, (0.0, 1.0))}
    middle = (columns.min() + columns.max()) / 2
    if name == "trousers":
        spread = {row: np.flatnonzero(mask[row]) for row in range(int(top), int(top + height))}
        split = [row for row, found in spread.items() if len(found) and np.diff(found).max(initial=1) > 1]
        crotch = min([row for row in split if row > top + 0.15 * height], default=top + CROTCH * height)
        legs = rows >= crotch
        chosen = {"trunk": ~legs, "left": legs & (columns > middle), "right": legs & (columns <= middle)}
        return {part: Part(rows[here], columns[here], (0.0, 1.0)) for part, here in chosen.items() if here.any()}
    low = rows >= top + BODY * height
    left, right = columns[low].min(), columns[low].max()
    chosen = {
        "trunk": (columns >= left) & (columns <= right),
        "left": columns > right,
        "right": columns < left,
    }
    directions = {part: (0.0, 1.0) if part == "trunk" else axis(rows, columns, here) for part, here in chosen.items()}
    return {part: Part(rows[here], columns[here], directions[part]) for part, here in chosen.items() if here.any()}


def axis(rows: NDArray[np.int64], columns: NDArray[np.int64], chosen: Mask) -> tuple[float, float]:
    """The long direction (x, y) of a sleeve, from the trunk outwards."""
    if chosen.sum() < 3:
        return (0.0, 1.0)
    points = np.stack([columns[chosen], rows[chosen]], axis=1).astype(float)
    outwards = np.sign(points[:, 0].mean() - columns.mean())
    points -= points.mean(axis=0)
    x, y = np.linalg.svd(points, full_matrices=False)[2][0]
    sign = outwards * np.sign(x) if abs(x) > STEEP else np.sign(y)
    return float(sign * x), float(sign * y)


def wrapped(image: Floats, part: Part, height: int, width: int) -> Floats:
    """A part around its cylinder, `[height, width, 3]`: front in the middle, back at the edges, top above."""
    down = np.array(part.down)
    across = np.array([down[1], -down[0]])  # to the right where down is down
    points = np.stack([part.columns, part.rows], axis=1).astype(float)
    along, aside = points @ down, points @ across
    v = (along - along.min()) / max(float(np.ptp(along)), 1e-9)
    stretch = np.minimum((v * BINS).astype(int), BINS - 1)
    u = np.zeros(len(v))
    for number in range(BINS):  # the outline's width changes along the part
        here = stretch == number
        if here.any():
            low, high = aside[here].min(), aside[here].max()
            u[here] = (2 * aside[here] - low - high) / max(float(high - low), 1.0)
    turn = ((np.arange(width) + 0.5) / width - 0.5) * 2 * np.pi
    wanted = np.stack(np.meshgrid(np.sin(turn), (np.arange(height) + 0.5) / height), axis=-1).reshape(-1, 2)
    _, nearest = cKDTree(np.stack([u, v], axis=1)).query(wanted)
    return image[part.rows[nearest], part.columns[nearest]].reshape(height, width, 3)


def laid_out(name: str, image: NDArray[Any], height: int, width: int) -> Floats:
    """A product's image in the uv square of a garment, RGB `[height, width, 3]` in [0, 1].

    Args:
        name: one of `GARMENTS`.  image: RGB `[h, w, 3]`, uint8 or in [0, 1].
    """
    if name not in GARMENTS:
        raise unknown("garment", name, GARMENTS)
    rgb, mask = unit_rgb(image), outline(image)
    if mask is None:
        return repeated(rgb, height, width)
    square = np.empty((height, width, 3))
    square[:] = np.median(rgb[mask], axis=0)  # between the islands, and where a part is missing
    for part, pixels in parts_of(name, mask).items():
        left, right = strips_of(name)[part]
        start, end = round(left * width), round(right * width)
        square[:, start:end] = wrapped(rgb, pixels, height, end - start)
    return square


def repeated(cloth: Floats, height: int, width: int) -> Floats:
    """A piece of cloth over the square, repeated in its own proportions."""
    scale = min(cloth.shape[0] / height, cloth.shape[1] / width)
    rows, columns = ((np.arange(count) + 0.5) * scale for count in (height, width))
    return cloth[rows.astype(int)[:, None] % cloth.shape[0], columns.astype(int)[None] % cloth.shape[1]]
