"""The clips that `sprites-wan` learns: one emoji of the set that `emoji-flux` ships, moving over a background.

A caption names the object, the motion and the background, such as "red apple moving right slowly on sky", so that
prompts differ in how much motion and how much texture they ask for. The start is moved by a few random pixels. One
caption in nine is never trained on.

Clips are `[F, 3, S, S]` float32 in [0, 1], S the side of their canvas; their frames are spread evenly over the same
motion, however many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

import torch
from torch import Tensor
from torch.nn import functional

from hasten_zoo.emoji_flux.data import load_emoji_set
from hasten_zoo.emoji_kontext.data import cutouts

__all__ = [
    "BACKGROUNDS",
    "CANVAS",
    "MOTIONS",
    "OBJECTS",
    "Canvas",
    "Clip",
    "all_clips",
    "background",
    "draw",
    "draw_batch",
    "jittered",
    "path",
    "place",
]


@dataclass(frozen=True)
class Canvas:
    """Where and how large things are drawn; all lengths in pixels.

    Attributes:
        side: height and width of a frame.
        frames: of a whole clip.
        sprite: height and width of the object, unless it is zoomed at.
        cutout: height and width of the picture that the object is drawn from.
        jitter: largest shift of the start along each axis.
        slow: from the first frame to the last.
        fast: likewise.
        radius: of circles.
        drop: height of falls.
        zoom: size of the object in the first and in the last frame.
        cell: of the checks.
    """

    side: int
    frames: int
    sprite: float
    cutout: int
    jitter: float
    slow: float
    fast: float
    radius: float
    drop: float
    zoom: tuple[float, float]
    cell: int


CANVAS = Canvas(64, 33, 28.0, 40, 4.0, 11.0, 28.0, 12.0, 28.0, (16.0, 46.0), 4)
OBJECTS = (
    *("lemon", "banana", "strawberry", "grapes", "tomato", "carrot", "doughnut", "cookie", "butterfly", "fish"),
    *("crab", "penguin", "dog face", "pig face", "sunflower", "frog face"),
)
BACKGROUNDS = ("white", "sky", "meadow", "checks")
DIRECTIONS = {"left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0)}
MOTIONS = (
    "still",
    *(f"moving {direction} {speed}" for direction in DIRECTIONS for speed in ("slowly", "fast")),
    "circling",
    "zooming in",
    "falling and bouncing",
)


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
    start = (rng.uniform(-CANVAS.jitter, CANVAS.jitter), rng.uniform(-CANVAS.jitter, CANVAS.jitter))
    return Clip(clip.item, clip.motion, clip.background, start)


def path(clip: Clip, frames: int) -> tuple[Tensor, Tensor]:
    """Centres `[F, 2]` (y, x) and sizes `[F]` of the object in pixels."""
    return _path_at(clip, torch.linspace(0, 1, frames))


def _path_at(clip: Clip, u: Tensor) -> tuple[Tensor, Tensor]:
    """As `path`, at times `[F]` in [0, 1]."""
    frames = len(u)
    offset, size, name = torch.zeros(frames, 2), torch.full((frames,), CANVAS.sprite), MOTIONS[clip.motion]
    if name.startswith("moving"):
        _, direction, speed = name.split()
        way = CANVAS.slow if speed == "slowly" else CANVAS.fast
        offset = (u - 0.5)[:, None] * torch.tensor(DIRECTIONS[direction]) * way
    elif name == "circling":
        angle = 2 * math.pi * u
        offset = CANVAS.radius * torch.stack([-angle.cos(), angle.sin()], 1)
    elif name == "zooming in":
        size = CANVAS.zoom[0] + (CANVAS.zoom[1] - CANVAS.zoom[0]) * u
    elif name == "falling and bouncing":
        height = CANVAS.drop / 2 - CANVAS.drop * (1.5 * math.pi * u).cos().abs()
        offset = torch.stack([height, torch.zeros(frames)], 1)
    return CANVAS.side / 2 + offset + torch.tensor(clip.start), size


@cache
def _sprites(side: int) -> Tensor:
    """`[16, 4, side, side]`: colours times opacity, and opacity."""
    data = load_emoji_set()
    sprites = cutouts(data.images[[data.captions.index(name) for name in OBJECTS]], side)
    return torch.cat([sprites[:, :3] * sprites[:, 3:], sprites[:, 3:]], 1)


@cache
def background(index: int, canvas: Canvas = CANVAS) -> Tensor:
    """`[3, S, S]`: plain white, two vertical gradients, or checks."""
    side = canvas.side
    down = torch.linspace(0, 1, side)[None, :, None].expand(3, side, side)
    if BACKGROUNDS[index] == "white":
        return torch.ones(3, side, side)
    if BACKGROUNDS[index] == "checks":
        cell = torch.arange(side) // canvas.cell % 2
        return (0.75 + 0.2 * (cell[:, None] ^ cell[None]).float()).expand(3, -1, -1)
    first, last = (
        ((0.4, 0.65, 1.0), (0.9, 0.95, 1.0)) if BACKGROUNDS[index] == "sky" else ((0.8, 0.95, 0.7), (0.3, 0.7, 0.3))
    )
    top, bottom = torch.tensor(first)[:, None, None], torch.tensor(last)[:, None, None]
    return top + (bottom - top) * down


def place(items: Tensor, centres: Tensor, sizes: Tensor, canvas: Canvas = CANVAS) -> Tensor:
    """Premultiplied colours and opacity `[N, 4, S, S]` of sprites `[N]` at centres `[N, 2]` of sizes `[N]`."""
    side = canvas.side
    pixel = torch.arange(side, device=centres.device) + 0.5
    y = (pixel[None] - centres[:, :1]) / (sizes[:, None] / 2)
    x = (pixel[None] - centres[:, 1:]) / (sizes[:, None] / 2)
    grid = torch.stack([x[:, None, :].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], -1)
    sprites = _sprites(canvas.cutout).to(centres.device)[items]
    return functional.grid_sample(sprites, grid, mode="bilinear", align_corners=False)


def draw(clip: Clip, frames: int) -> Tensor:
    """The clip as `[F, 3, S, S]`."""
    layer = place(torch.full((frames,), clip.item), *path(clip, frames))
    return layer[:, :3] + (1 - layer[:, 3:]) * background(clip.background)


def draw_batch(clips: Sequence[Clip], times: Tensor, device: str = "cpu") -> Tensor:
    """Clips as `[B, F, 3, S, S]` at times `[F]` or, each at its own, `[B, F]` in [0, 1]; faster than one by one."""
    if times.ndim == 1:
        ways = [_path_at(Clip(0, motion, 0), times) for motion in range(len(MOTIONS))]
        motions = torch.tensor([clip.motion for clip in clips])
        starts = torch.tensor([clip.start for clip in clips])
        centres = torch.stack([way[0] for way in ways])[motions] + starts[:, None]
        sizes = torch.stack([way[1] for way in ways])[motions]
    else:
        ways = [_path_at(clip, u) for clip, u in zip(clips, times, strict=True)]
        centres, sizes = torch.stack([way[0] for way in ways]), torch.stack([way[1] for way in ways])
    items = torch.tensor([clip.item for clip in clips]).repeat_interleave(times.shape[-1])
    layer = place(items.to(device), centres.flatten(0, 1).to(device), sizes.flatten().to(device))
    behind = torch.stack([background(i) for i in range(len(BACKGROUNDS))]).to(device)
    behind = behind[torch.tensor([clip.background for clip in clips], device=device)]
    layer = layer.unflatten(0, sizes.shape)
    return layer[:, :, :3] + (1 - layer[:, :, 3:]) * behind[:, None]
