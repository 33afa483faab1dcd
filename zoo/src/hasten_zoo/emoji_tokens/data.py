"""Images of the tokenizer and the autoregressive models: one of the emoji of `emoji-flux` on a background.

They are made by code, so that there are as many as wanted: 16 objects (the classes), 8 backgrounds, any place, size
and direction, and light that differs from image to image. Every image is a function of the seed of its batch;
`TRAIN`, `HELD_OUT` and `MEASURE` keep the seeds of the three uses apart.

Shapes: images `[B, 3, 32, 32]` float32 in [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from hasten.errors import ConfigError
from torch import Tensor
from torch.nn import functional

from hasten_zoo.emoji_flux.data import load_emoji_set
from hasten_zoo.emoji_kontext.data import cutouts

__all__ = ["BACKGROUNDS", "HELD_OUT", "MEASURE", "OBJECTS", "SIDE", "TRAIN", "Images", "batches", "draw", "images"]

SIDE = 32
CUTOUT = 32  # pixels of a sprite before it is placed
SIZES = (15.0, 25.0)  # pixels of a placed sprite
OBJECTS = (
    *("red apple", "lemon", "banana", "strawberry", "grapes", "carrot", "doughnut", "hamburger"),
    *("butterfly", "tropical fish", "penguin", "pig face", "frog face", "crab", "sunflower", "octopus"),
)
# Colours at the top and at the bottom, and the pattern over them.
BACKGROUNDS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float], str]] = {
    "snow": ((0.93, 0.95, 0.98), (0.98, 0.98, 0.98), "plain"),
    "sky": ((0.40, 0.65, 1.00), (0.90, 0.95, 1.00), "plain"),
    "meadow": ((0.75, 0.93, 0.65), (0.30, 0.68, 0.30), "plain"),
    "dusk": ((0.30, 0.22, 0.50), (0.95, 0.60, 0.45), "plain"),
    "night": ((0.05, 0.07, 0.20), (0.15, 0.20, 0.40), "dots"),
    "checks": ((0.85, 0.80, 0.75), (0.85, 0.80, 0.75), "checks"),
    "stripes": ((0.55, 0.80, 0.80), (0.55, 0.80, 0.80), "stripes"),
    "bricks": ((0.70, 0.40, 0.32), (0.62, 0.34, 0.28), "bricks"),
}
CONTRAST = {"plain": 0.0, "dots": 0.5, "checks": 0.16, "stripes": 0.2, "bricks": 0.22}
LIGHT = 0.06  # standard deviation of the brightness of a background
TRAIN, HELD_OUT, MEASURE = 0, 1 << 30, 2 << 30  # first seeds; batch i of a use has the seed `use + i`


@dataclass(frozen=True, eq=False)
class Images:
    """Some images and what is on them.

    Attributes:
        pixels: `[B, 3, 32, 32]`.
        classes: objects, `[B]` int64, indices in `OBJECTS`.
        backgrounds: `[B]` int64, indices in `BACKGROUNDS`.
        places: `[B, 3]`, centre (x, y) and size of the object as shares of the image.
    """

    pixels: Tensor
    classes: Tensor
    backgrounds: Tensor
    places: Tensor


@cache
def _sprites() -> Tensor:
    """`[16, 4, 32, 32]`: colours times opacity, and opacity."""
    data = load_emoji_set()
    sprites = cutouts(data.images[[data.captions.index(name) for name in OBJECTS]], CUTOUT)
    return torch.cat([sprites[:, :3] * sprites[:, 3:], sprites[:, 3:]], 1)


def _patterns(phases: Tensor) -> dict[str, Tensor]:
    """`[B, 32, 32]` in [-1, 1] for each pattern, moved by whole pixels `[B, 2]`."""
    y = torch.arange(SIDE)[None, :, None] + phases[:, :1, None]
    x = torch.arange(SIDE)[None, None] + phases[:, 1:, None]
    row = y // 5
    joint = ((x + 5 * (row % 2)) % 10 == 0) | (y % 5 == 0)
    return {
        "plain": torch.zeros(len(phases), SIDE, SIDE),
        "dots": ((y % 8 == 0) & ((x + 4 * (y // 8 % 2)) % 8 == 0)).float(),
        "checks": 2.0 * ((x // 4 + y // 4) % 2) - 1,
        "stripes": 2.0 * ((x + y) // 4 % 2) - 1,
        "bricks": joint.float(),
    }


def _backdrops(kinds: Tensor, generator: torch.Generator) -> Tensor:
    """Backgrounds `[B, 3, 32, 32]`."""
    n = len(kinds)
    ends = torch.tensor([[top, bottom] for top, bottom, _ in BACKGROUNDS.values()])[kinds]  # [B, 2, 3]
    light = LIGHT * torch.randn(n, 1, 1, generator=generator)
    tint = LIGHT / 3 * torch.randn(n, 1, 3, generator=generator)
    top, bottom = (ends + light + tint)[..., None, None].unbind(1)
    down = torch.linspace(0, 1, SIDE)[:, None]
    patterns = _patterns(torch.randint(40, (n, 2), generator=generator))
    names = [pattern for _, _, pattern in BACKGROUNDS.values()]
    drawn = torch.stack([CONTRAST[name] * patterns[name] for name in names], 1)[torch.arange(n), kinds]
    return (top + (bottom - top) * down + drawn[:, None]).clamp(0, 1)


def draw(classes: Tensor, generator: torch.Generator) -> Images:
    """Images of objects `[B]` int64; all else is drawn with the generator.

    Raises:
        ConfigError: if there is no such object.
    """
    n = len(classes)
    if n and not 0 <= int(classes.min()) <= int(classes.max()) < len(OBJECTS):
        raise ConfigError(f"objects are 0 .. {len(OBJECTS) - 1}, got {classes.unique().tolist()}")
    kinds = torch.randint(len(BACKGROUNDS), (n,), generator=generator)
    backdrop = _backdrops(kinds, generator)
    size = SIZES[0] + (SIZES[1] - SIZES[0]) * torch.rand(n, 1, generator=generator)
    centre = size / 2 + (SIDE - size) * torch.rand(n, 2, generator=generator)  # x, y; wholly inside
    mirrored = torch.where(torch.rand(n, 1, generator=generator) < 0.5, -1.0, 1.0)
    pixel = torch.arange(SIDE) + 0.5
    x = mirrored * (pixel[None] - centre[:, :1]) / (size / 2)
    y = (pixel[None] - centre[:, 1:]) / (size / 2)
    grid = torch.stack([x[:, None, :].expand(-1, SIDE, -1), y[:, :, None].expand(-1, -1, SIDE)], -1)
    layer = functional.grid_sample(_sprites()[classes], grid, mode="bilinear", align_corners=False)
    pixels = (layer[:, :3] + (1 - layer[:, 3:]) * backdrop).clamp(0, 1)
    return Images(pixels, classes, kinds, torch.cat([centre, size], 1) / SIDE)


def images(n: int, seed: int) -> Images:
    """`n` images of objects drawn evenly; a function of the arguments alone."""
    generator = torch.Generator().manual_seed(seed)
    return draw(torch.randint(len(OBJECTS), (n,), generator=generator), generator)


def batches(n: int, use: int, batch: int = 256) -> Iterator[Images]:
    """`n` images of a use (`TRAIN`, `HELD_OUT` or `MEASURE`) in batches."""
    for i, first in enumerate(range(0, n, batch)):
        yield images(min(batch, n - first), use + i)
