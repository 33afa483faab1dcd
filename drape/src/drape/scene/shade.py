"""Shadows: of the person on the ground, from the sky and from each lamp, and of the body's hollows on themselves.

The ground's shadows are made on the ground: the body's vertices are let fall, straight down in layers by their height
(what is near the ground hides more of the sky from a small spot, what is high a little from a wide one) and along
each lamp's light; each layer is a blurred mask. Hollows are darkened by how much deeper they lie than their
surroundings in the image (Luft et al. 2006, "Image Enhancement by Unsharp Masking the Depth Buffer").

Shapes: `V` vertices, `S` side of a frame in pixels, `Q` pixels with a shadow, `L` lamps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates

from drape.scene.arrays import Floats
from drape.scene.camera import Camera
from drape.scene.light import Light

__all__ = ["ground_points", "hollows", "shadows"]

CELL = 0.035  # metres of a cell on the ground
REACH = 5.0  # metres around the person within which shadows fall
# of the body: metres it reaches up to, metres that its shadow is blurred by, share of the sky that it hides
LAYERS = ((0.04, 0.025, 0.6), (0.15, 0.07, 0.4), (0.45, 0.17, 0.28), (1.0, 0.32, 0.2), (3.0, 0.5, 0.14))
PENUMBRA = 0.05  # metres of blur of a lamp's shadow per metre of height
LEAST = 0.01  # shadows below it are left out
DEPTH = 0.10  # metres of depth below the surroundings that darken a hollow fully
AROUND = 0.05  # metres of the surroundings
DARKEST = 0.45


def ground_points(camera: Camera, size: int) -> Floats:
    """The place on the ground that each pixel's centre sees, `[S * S, 2]`; nan above the horizon."""
    rays, origin = camera.rays(size), camera.position()
    with np.errstate(divide="ignore", invalid="ignore"):
        far = np.where(rays[:, 2] < -1e-3, -origin[2] / rays[:, 2], np.nan)
    return np.asarray((origin + far[:, None] * rays)[:, :2])


def mask(xy: Floats, middle: Floats, blur: float) -> Floats:
    """A blurred mask of points on the ground `[V, 2]`, around `middle`; 1 where they lie close."""
    cells = int(2 * REACH / CELL)
    at = np.round((xy - middle + REACH) / CELL).astype(int)
    inside = ((at >= 0) & (at < cells)).all(axis=1)
    hit = np.zeros((cells, cells))
    hit[at[inside, 0], at[inside, 1]] = 1.0
    spread = gaussian_filter(hit, 1.2)  # vertices lie a cell or two apart
    return np.asarray(gaussian_filter(np.clip(2.5 * spread, 0, 1), blur / CELL, mode="constant"))


def shadows(vertices: Floats, lamp: Light, ground: Floats, middle: Floats) -> tuple[NDArray[np.int32], Floats]:
    """What a person hides from the ground.

    Args:
        vertices: `[V, 3]`, of the clothed body.  ground: of `ground_points`.  middle: the person's place, `[2]`.

    Returns:
        pixels: `[Q]`, into the frame's S * S.  hidden: `[1 + L, Q]`, shares of the sky and of each lamp.
    """
    height, layers = vertices[:, 2], []
    free, below = np.ones(1), 0.0
    for up, blur, share in LAYERS:
        chosen = (height >= below) & (height < up)
        free = free * (1 - share * mask(vertices[chosen, :2], middle, blur))
        below = up
    layers.append(1 - free)
    for direction, _ in lamp.lamps:
        along = np.array(direction[:2]) / direction[2]
        fallen = vertices[:, :2] - height[:, None] * along
        parts = [(h, mask(fallen[(height >= low) & (height < h)], middle, PENUMBRA * (low + h) / 2 + 0.01))
                 for low, h in ((0.0, 0.3), (0.3, 0.9), (0.9, 3.0))]  # fmt: skip
        layers.append(np.max([part for _, part in parts], axis=0))
    near = np.flatnonzero((np.abs(ground - middle) < REACH - CELL).all(axis=1))
    at = ((ground[near] - middle + REACH) / CELL).T
    hidden = np.stack([map_coordinates(layer, at, order=1) for layer in layers])
    kept = hidden.max(axis=0) > LEAST
    return near[kept].astype(np.int32), np.clip(hidden[:, kept], 0, 1)


def hollows(row: NDArray[np.int64], column: NDArray[np.int64], depth: Floats, focal: float) -> Floats:
    """Light that is left at each pixel of the person, `[P]`: 1 in the open, less where it lies deeper than around it.

    Args:
        depth: metres `[P]`.  focal: pixels.
    """
    if not len(row):
        return np.ones(0)
    top, left = row.min(), column.min()
    shape = (row.max() - top + 1, column.max() - left + 1)
    place = (row - top, column - left)
    filled, there = np.zeros(shape), np.zeros(shape)
    filled[place], there[place] = depth, 1.0
    blur = AROUND * focal / float(np.median(depth))
    around = gaussian_filter(filled, blur)[place] / np.maximum(gaussian_filter(there, blur)[place], 1e-6)
    return np.asarray(1 - DARKEST * np.clip((depth - around) / DEPTH, 0, 1))
