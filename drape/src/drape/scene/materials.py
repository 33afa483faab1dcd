"""What surfaces of places look like: photographs of scikit-image (grass, gravel, brick) and simple patterns, tinted.

A material gives an albedo for coordinates in metres on a surface. Detail finer than a pixel fades out (a mip-map), so
that surfaces far away neither shimmer nor alias.

Shapes: `N` points.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates, zoom
from skimage import data

from drape.errors import unknown
from drape.scene.arrays import Floats

__all__ = ["MATERIALS", "albedo"]

SIDE = 512  # pixels of a pattern


def photograph(name: str) -> Floats:
    """One of scikit-image's photographs of ground, grey, with a mean of 1."""
    grey = np.asarray(getattr(data, name)(), dtype=np.float64)
    grey = grey.mean(axis=2) if grey.ndim == 3 else grey
    grey = zoom(grey, SIDE / np.array(grey.shape), order=1)
    flat = grey / gaussian_filter(grey, SIDE / 6, mode="wrap")  # without the photograph's own shading
    return np.asarray(flat / flat.mean())


def speckle(blur: float) -> Floats:
    """Smooth noise with a mean of 1."""
    noise = gaussian_filter(np.random.default_rng(7).normal(size=(SIDE, SIDE)), blur, mode="wrap")
    return np.asarray(1 + 0.25 * noise / noise.std())


def mottled() -> Floats:
    """Noise of all scales alike, with a mean of 1: stains, wear and grain of ground that was poured or trodden."""
    rng = np.random.default_rng(11)
    scales = [gaussian_filter(rng.normal(size=(SIDE, SIDE)), 2.0**octave, mode="wrap") for octave in range(-1, 6)]
    noise = np.sum([scale / scale.std() for scale in scales], axis=0)
    return np.asarray(1 + 0.2 * noise / noise.std())


def slabs() -> Floats:
    """Poured slabs with joints between them; two by two of them."""
    image = mottled() * np.kron(np.array([[1.0, 0.95], [0.93, 1.03]]), np.ones((SIDE // 2, SIDE // 2)))
    joints = np.arange(SIDE) % (SIDE // 2) < 2
    image[joints] *= 0.4
    image[:, joints] *= 0.4
    return np.asarray(image / image.mean())


def tarred() -> Floats:
    """Chippings in tar, worn unevenly."""
    image = (1 + 0.45 * (photograph("gravel") - 1)) * (1 + 0.5 * (mottled() - 1))
    return np.asarray(image / image.mean())


def tiles(count: int, joint: int, shade: float) -> Floats:
    """Square tiles of slightly different greys, with darker joints."""
    rng = np.random.default_rng(count)
    each = SIDE // count
    image = np.kron(rng.uniform(0.92, 1.08, (count, count)), np.ones((each, each)))
    image = np.pad(image, (0, SIDE - count * each), mode="edge")
    joints = np.arange(SIDE) % each < joint
    image[joints] *= shade
    image[:, joints] *= shade
    return np.asarray(image * (0.9 + 0.1 * speckle(2)))


def bond() -> Floats:
    """Small stones in courses, each shifted by half a stone, with dark joints."""
    rng = np.random.default_rng(5)
    tall, wide = SIDE // 16, SIDE // 8
    rows, columns = np.indices((SIDE, SIDE))
    course = rows // tall
    shifted = (columns + course % 2 * (wide // 2)) % SIDE
    image = rng.uniform(0.8, 1.2, (16, 8))[course, shifted // wide] * mottled()
    image[(rows % tall < 4) | (shifted % wide < 4)] *= 0.6
    return np.asarray(image / image.mean())


def planks() -> Floats:
    """Boards of different browns with a grain along them."""
    rng = np.random.default_rng(3)
    image = np.repeat(rng.uniform(0.82, 1.18, 8), SIDE // 8)[:, None] * np.ones(SIDE)
    grain = gaussian_filter(rng.normal(size=(SIDE, SIDE)), (1.0, 30.0), mode="wrap")
    image = image * (1 + 0.07 * grain / grain.std())
    image[np.arange(SIDE) % (SIDE // 8) < 3] *= 0.55
    return np.asarray(image)


def panes() -> Floats:
    """One window in a wall: dark glass in a light frame; the middle of the pattern is the window."""
    image = np.ones((SIDE, SIDE))
    low, high = SIDE // 4, 3 * SIDE // 4
    image[low - 14 : high + 14, low - 14 : high + 14] = 1.35
    image[low:high, low:high] = np.linspace(0.62, 0.3, high - low)[:, None]
    image[:, SIDE // 2 - 5 : SIDE // 2 + 5] = np.where(image[:, SIDE // 2 - 5 : SIDE // 2 + 5] == 1.0, 1.0, 1.3)
    return image


Colour = tuple[float, float, float]
# pattern, how strong it is, metres that it covers, colour
MATERIALS: dict[str, tuple[Callable[[], Floats], float, float, Colour]] = {
    "grass": (lambda: photograph("grass"), 0.8, 2.2, (0.33, 0.42, 0.2)),
    "dry grass": (lambda: photograph("grass"), 0.8, 1.8, (0.52, 0.48, 0.28)),
    "leaves": (lambda: photograph("grass"), 1.0, 1.1, (0.2, 0.3, 0.13)),
    "light leaves": (lambda: photograph("grass"), 1.0, 0.8, (0.27, 0.37, 0.16)),
    "gravel": (lambda: photograph("gravel"), 0.7, 1.6, (0.56, 0.52, 0.46)),
    "asphalt": (tarred, 0.7, 1.6, (0.36, 0.36, 0.37)),
    "concrete": (slabs, 0.35, 5.0, (0.6, 0.59, 0.56)),
    "brick": (lambda: photograph("brick"), 0.8, 1.5, (0.56, 0.34, 0.27)),
    "yellow brick": (lambda: photograph("brick"), 0.7, 1.4, (0.66, 0.56, 0.4)),
    "plaster": (mottled, 0.12, 3.0, (0.78, 0.75, 0.68)),
    "grey plaster": (mottled, 0.14, 3.0, (0.6, 0.62, 0.65)),
    "paving": (lambda: tiles(4, 6, 0.7), 0.8, 2.0, (0.58, 0.56, 0.53)),
    "setts": (bond, 0.7, 2.0, (0.46, 0.44, 0.43)),
    "tiles": (lambda: tiles(5, 3, 0.85), 0.6, 2.5, (0.72, 0.7, 0.66)),
    "planks": (planks, 0.9, 1.3, (0.55, 0.38, 0.24)),
    "facade": (panes, 1.0, 3.2, (0.68, 0.62, 0.54)),
    "dark facade": (panes, 1.0, 2.9, (0.46, 0.36, 0.32)),
    "metal": (lambda: speckle(60), 0.1, 3.0, (0.42, 0.46, 0.5)),
    "red": (lambda: speckle(60), 0.1, 3.0, (0.56, 0.16, 0.13)),
    "blue": (lambda: speckle(60), 0.1, 3.0, (0.18, 0.28, 0.48)),
    "white": (lambda: speckle(60), 0.06, 3.0, (0.84, 0.84, 0.82)),
    "bark": (lambda: photograph("gravel"), 0.8, 0.5, (0.3, 0.24, 0.18)),
    "cloth": (lambda: speckle(3), 0.2, 0.6, (0.4, 0.3, 0.34)),
}


@cache
def levels(name: str) -> list[Floats]:
    """A material's pattern, and its halvings down to one pixel."""
    pattern, strength, _, _ = MATERIALS[name]
    result = [1 + strength * (pattern() - 1)]
    while len(result[-1]) > 1:
        fine = result[-1]
        result.append(fine.reshape(len(fine) // 2, 2, len(fine) // 2, 2).mean(axis=(1, 3)))
    return result


def albedo(name: str, uv: Floats, pixel: Floats) -> Floats:
    """Colours `[N, 3]` of a material at `uv` `[N, 2]`, metres on the surface, in pixels of so many metres `[N]`."""
    if name not in MATERIALS:
        raise unknown("material", name, MATERIALS)
    _, _, covers, colour = MATERIALS[name]
    images = levels(name)
    level = np.clip(np.ceil(np.log2(np.maximum(pixel / covers * SIDE, 1.0))), 0, len(images) - 1).astype(int)
    share = (uv / covers) % 1.0
    grey = np.empty(len(uv))
    for number in np.unique(level):
        chosen = level == number
        at = share[chosen].T[::-1] * len(images[number]) - 0.5
        grey[chosen] = map_coordinates(images[number], at, order=1, mode="grid-wrap")
    return np.clip(grey[:, None] * np.array(colour), 0.0, 1.0)
