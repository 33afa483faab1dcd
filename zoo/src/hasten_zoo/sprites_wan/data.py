"""The clips that `sprites-wan` learns: one emoji of the set that `emoji-flux` ships, moving over a background.

A caption names the object, the motion and the background, such as "red apple moving right slowly on sky", so that
prompts differ in how much motion and how much texture they ask for. The start is moved by a few random pixels. One
caption in nine is never trained on.

Clips are `[F, 3, 48, 48]` float32 in [0, 1]; their frames are spread evenly over the same motion, however many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from random import Random

import torch
from torch import Tensor
from torch.nn import functional

from hasten_zoo.emoji_flux.data import load_emoji_set
from hasten_zoo.emoji_kontext.data import cutouts

__all__ = ["BACKGROUNDS", "MOTIONS", "OBJECTS", "SIDE", "Clip", "all_clips", "draw", "jittered", "path"]

SIDE, SPRITE, CUTOUT, JITTER = 48, 20.0, 24, 3.0
OBJECTS = (
    *("lemon", "banana", "strawberry", "grapes", "tomato", "carrot", "doughnut", "cookie", "butterfly", "fish"),
    *("crab", "penguin", "dog face", "pig face", "sunflower", "frog face"),
)
BACKGROUNDS = ("white", "sky", "meadow", "checks")
DIRECTIONS = {"left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0)}
SPEEDS = {"slowly": 8.0, "fast": 22.0}  # pixels from the first frame to the last
MOTIONS = (
    "still",
    *(f"moving {direction} {speed}" for direction in DIRECTIONS for speed in SPEEDS),
    "circling",
    "zooming in",
    "falling and bouncing",
)
RADIUS, DROP, ZOOM = 10.0, 22.0, (12.0, 34.0)


@dataclass(frozen=True)
class Clip:
    """A clip before it is drawn; indices in `OBJECTS`, `MOTIONS` and `BACKGROUNDS`, `start` in pixels (y, x)."""

    item: int
    motion: int
    background: int
    start: tuple[float, float] = (0.0, 0.0)

    @property
    def caption(self) -> str:
        return f"{OBJECTS[self.item]} {MOTIONS[self.motion]} on {BACKGROUNDS[self.background]}"

    @property
    def held_out(self) -> bool:
        """Whether training leaves this caption out; each word of it is seen in other captions."""
        return (self.item + 2 * self.motion + 4 * self.background) % 9 == 0


def all_clips() -> list[Clip]:
    """One clip for each caption, without jitter."""
    return [
        Clip(item, motion, background)
        for item in range(len(OBJECTS))
        for motion in range(len(MOTIONS))
        for background in range(len(BACKGROUNDS))
    ]


def jittered(clip: Clip, rng: Random) -> Clip:
    """The clip from another start."""
    start = (rng.uniform(-JITTER, JITTER), rng.uniform(-JITTER, JITTER))
    return Clip(clip.item, clip.motion, clip.background, start)


def path(clip: Clip, frames: int) -> tuple[Tensor, Tensor]:
    """Centres `[F, 2]` (y, x) and sizes `[F]` of the object in pixels."""
    u = torch.linspace(0, 1, frames)
    offset, size, name = torch.zeros(frames, 2), torch.full((frames,), SPRITE), MOTIONS[clip.motion]
    if name.startswith("moving"):
        _, direction, speed = name.split()
        offset = (u - 0.5)[:, None] * torch.tensor(DIRECTIONS[direction]) * SPEEDS[speed]
    elif name == "circling":
        angle = 2 * math.pi * u
        offset = RADIUS * torch.stack([-angle.cos(), angle.sin()], 1)
    elif name == "zooming in":
        size = ZOOM[0] + (ZOOM[1] - ZOOM[0]) * u
    elif name == "falling and bouncing":
        offset = torch.stack([DROP / 2 - DROP * (1.5 * math.pi * u).cos().abs(), torch.zeros(frames)], 1)
    return SIDE / 2 + offset + torch.tensor(clip.start), size


@cache
def _sprites() -> Tensor:
    """`[16, 4, 24, 24]`: colours times opacity, and opacity."""
    data = load_emoji_set()
    sprites = cutouts(data.images[[data.captions.index(name) for name in OBJECTS]], CUTOUT)
    return torch.cat([sprites[:, :3] * sprites[:, 3:], sprites[:, 3:]], 1)


@cache
def background(index: int) -> Tensor:
    """`[3, 48, 48]`: plain white, two vertical gradients, or checks of three pixels."""
    down = torch.linspace(0, 1, SIDE)[None, :, None].expand(3, SIDE, SIDE)
    if BACKGROUNDS[index] == "white":
        return torch.ones(3, SIDE, SIDE)
    if BACKGROUNDS[index] == "checks":
        cell = torch.arange(SIDE) // 3 % 2
        return (0.75 + 0.2 * (cell[:, None] ^ cell[None]).float()).expand(3, -1, -1)
    first, last = (
        ((0.4, 0.65, 1.0), (0.9, 0.95, 1.0)) if BACKGROUNDS[index] == "sky" else ((0.8, 0.95, 0.7), (0.3, 0.7, 0.3))
    )
    top, bottom = torch.tensor(first)[:, None, None], torch.tensor(last)[:, None, None]
    return top + (bottom - top) * down


def place(items: Tensor, centres: Tensor, sizes: Tensor) -> Tensor:
    """Premultiplied colours and opacity `[N, 4, 48, 48]` of sprites `[N]` at centres `[N, 2]` of sizes `[N]`."""
    pixel = torch.arange(SIDE) + 0.5
    y = (pixel[None] - centres[:, :1]) / (sizes[:, None] / 2)
    x = (pixel[None] - centres[:, 1:]) / (sizes[:, None] / 2)
    grid = torch.stack([x[:, None, :].expand(-1, SIDE, -1), y[:, :, None].expand(-1, -1, SIDE)], -1)
    return functional.grid_sample(_sprites()[items], grid, mode="bilinear", align_corners=False)


def draw(clip: Clip, frames: int) -> Tensor:
    """The clip as `[F, 3, 48, 48]`."""
    layer = place(torch.full((frames,), clip.item), *path(clip, frames))
    return layer[:, :3] + (1 - layer[:, 3:]) * background(clip.background)
