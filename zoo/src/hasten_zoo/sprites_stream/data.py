"""The worlds that `sprites-stream` learns: two emoji that walk to and fro and leave the image again and again.

One walks in the upper half, one in the lower, each at its own pace; at its turning points it is out of sight for a
while. Every frame is told where both are, as a world model is told its player's moves. Who they are and where they walk
is named only in the first `NAMED` frames: whoever comes back later must be looked up in the past, often further back
than a short window reaches.

Videos are `[F, 3, 48, 48]` float32 in [0, 1], of any length; sprites and backgrounds are those of `sprites-wan`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor

from hasten_zoo.sprites_wan.data import BACKGROUNDS, CANVAS, OBJECTS, background, place

__all__ = ["NAMED", "SIDE", "SPRITE", "STREAM", "UNNAMED", "World", "conditions", "draw", "paths", "random_world"]

STREAM = replace(CANVAS, side=48, sprite=20.0, cutout=24, cell=3)
SIDE, SPRITE = STREAM.side, STREAM.sprite
NAMED = 24  # frames
PERIODS = (24, 32, 48)  # frames to and fro
REACH = 64.0  # pixels from the middle to the turning points; beyond 34 it is out of sight
ROWS = (13.0, 35.0)
UNNAMED = (len(OBJECTS), len(OBJECTS), len(BACKGROUNDS))


@dataclass(frozen=True)
class World:
    """A video before it is drawn.

    Attributes:
        items: the upper and the lower object, indices in `OBJECTS`.
        periods: indices in `PERIODS`.
        phases: share of the way to and fro at frame 0, in [0, 1).
        background: index in `BACKGROUNDS`.
    """

    items: tuple[int, int]
    periods: tuple[int, int]
    phases: tuple[float, float]
    background: int

    @property
    def held_out(self) -> bool:
        """Whether training leaves this pair of objects out; each of them is seen in other pairs."""
        return (self.items[0] + 2 * self.items[1]) % 9 == 0


def random_world(rng: Random, held_out: bool = False) -> World:
    """A world of two different objects, from those that training sees or from the others."""
    while True:
        upper, lower = rng.sample(range(len(OBJECTS)), 2)
        world = World(
            (upper, lower),
            (rng.randrange(len(PERIODS)), rng.randrange(len(PERIODS))),
            (rng.random(), rng.random()),
            rng.randrange(len(BACKGROUNDS)),
        )
        if world.held_out == held_out:
            return world


def paths(world: World, frames: int) -> Tensor:
    """Centres `[2, F, 2]` (y, x) of both objects in whole pixels; a triangle wave in x."""
    centres = torch.zeros(2, frames, 2)
    for i in range(2):
        u = (torch.arange(frames) / PERIODS[world.periods[i]] + world.phases[i]) % 1
        centres[i, :, 0] = ROWS[i]
        centres[i, :, 1] = (SIDE / 2 + REACH * (4 * (u - 0.5).abs() - 1)).round()
    return centres


def draw(world: World, frames: int) -> Tensor:
    """The video `[F, 3, 48, 48]`."""
    image = background(world.background, STREAM).expand(frames, -1, -1, -1)
    for item, centres in zip(world.items, paths(world, frames), strict=True):
        layer = place(torch.full((frames,), item), centres, torch.full((frames,), SPRITE), STREAM)
        image = layer[:, :3] + (1 - layer[:, 3:]) * image
    return image


def conditions(world: World, first: int, frames: int, named: int = NAMED) -> Tensor:
    """What the model is told of frames `first` to `first + frames`, `[F, 5]` int64.

    Upper object, lower object, background (their numbers, or `UNNAMED` from frame `named` on), and x of both objects
    in pixels.
    """
    names = torch.tensor([*world.items, world.background])
    early = torch.arange(first, first + frames) < named
    x = paths(world, first + frames)[:, first:, 1].T.long()
    return torch.cat([torch.where(early[:, None], names, torch.tensor(UNNAMED)), x], 1)
