"""How a drawn world drifts from what it should show: who walks there, where, and on what background."""

from __future__ import annotations

import torch
from hasten.errors import ConfigError
from torch import Tensor

from hasten_zoo.sprites_stream.data import SIDE, SPRITE, STREAM, World, paths
from hasten_zoo.sprites_wan.data import OBJECTS, background, place

__all__ = ["grade"]

HALF = SIDE // 2
IN_SIGHT = 20.0  # pixels from the middle; most of the sprite is in the image
FAR = SPRITE / 2 + 4  # from a centre; pixels beyond are background


def _find(half: Tensor, behind: Tensor, row: float, around: Tensor, reach: float) -> tuple[int, Tensor]:
    """The object and the centre (y, x) that explain a half image `[3, 24, 48]` best, on a grid of two pixels."""
    steps = torch.arange(-reach, reach + 1, 2)
    centres = torch.cartesian_prod(steps, steps) + around
    lower = row > HALF
    rows = slice(HALF, SIDE) if lower else slice(0, HALF)
    best = (float("inf"), 0, centres[0])
    for item in range(len(OBJECTS)):
        layer = place(torch.full((len(centres),), item), centres, torch.full((len(centres),), SPRITE), STREAM)[
            :, :, rows
        ]
        errors = (layer[:, :3] + (1 - layer[:, 3:]) * behind - half).square().flatten(1).mean(1)
        least = int(errors.argmin())
        best = min(best, (float(errors[least]), item, centres[least]), key=lambda found: found[0])
    return best[1], best[2]


def grade(world: World, video: Tensor, every: int = 3, reach: float = 6.0) -> dict[str, list[float]]:
    """Three curves over the frames 0, `every`, 2 `every`, ...; NaN where there is nothing to see.

    `"identity"`: share of the objects in sight that are the right ones. `"motion"`: their distance from where they
    should be, pixels, up to `reach` along each axis. `"background"`: mean absolute error of the pixels away from both.

    Args:
        video: `[F, 3, 48, 48]` in [0, 1].

    Raises:
        ConfigError: for a video of another size.
    """
    if video.ndim != 4 or video.shape[1:] != (3, SIDE, SIDE):
        raise ConfigError(f"expected a video [F, 3, {SIDE}, {SIDE}], got {list(video.shape)}")
    centres, behind = paths(world, len(video)), background(world.background, STREAM)
    grid = torch.stack(torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij"), -1)
    curves: dict[str, list[float]] = {"identity": [], "motion": [], "background": []}
    for frame in range(0, len(video), every):
        image = video[frame].float().cpu()
        right, away = [], []
        for i, item in enumerate(world.items):
            centre = centres[i, frame]
            if abs(float(centre[1]) - SIDE / 2) > IN_SIGHT:
                continue
            rows = slice(HALF, SIDE) if centre[0] > HALF else slice(0, HALF)
            found, where = _find(image[:, rows], behind[:, rows], float(centre[0]), centre, reach)
            right.append(float(found == item))
            away.append(float((where - centre).norm()))
        far = torch.stack([(grid - centres[i, frame]).abs().amax(-1) > FAR for i in range(2)]).all(0)
        curves["identity"].append(sum(right) / len(right) if right else float("nan"))
        curves["motion"].append(sum(away) / len(away) if away else float("nan"))
        curves["background"].append(float((image - behind)[:, far].abs().mean()))
    return curves
