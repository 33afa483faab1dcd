"""Light: irradiance on a surface as a function of its normal, for an environment, the sun, or a room.

The environment is a sky that is brighter above and a coloured ground, the sun adds one direction to a dimmer sky, rooms
have two lamps. All lamps stand on the camera's side of the scene, so that what stands behind the walk shades no walker.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drape.errors import ConfigError, unknown

__all__ = ["LIGHTS", "Light", "light", "light_name"]

RGB = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Light:
    """Irradiance in units in which 1 shows a surface's own colour.

    Args:
        sky, ground: of a surface that looks up, and down; between them a linear blend over the normal's z.
        lamps: pairs of direction towards the lamp (x, y, z; any length) and colour.
    """

    sky: RGB
    ground: RGB
    lamps: tuple[tuple[RGB, RGB], ...] = ()

    def __post_init__(self) -> None:
        if any(value < 0 for colour in (self.sky, self.ground, *(c for _, c in self.lamps)) for value in colour):
            raise ConfigError("light cannot be negative; give colours of 0 or more.")
        if any(sum(v * v for v in direction) == 0 for direction, _ in self.lamps):
            raise ConfigError("a lamp's direction has no length; give a vector towards the lamp.")

    def scaled(self, gains: RGB) -> Light:
        """The same light, its channels so many times as strong."""

        def times(colour: RGB) -> RGB:
            return colour[0] * gains[0], colour[1] * gains[1], colour[2] * gains[2]

        lamps = tuple((direction, times(colour)) for direction, colour in self.lamps)
        return Light(sky=times(self.sky), ground=times(self.ground), lamps=lamps)

    def irradiance(self, normals: Tensor) -> Tensor:
        """Irradiance `[..., 3]` at unit normals `[..., 3]`."""
        up = (normals[..., 2:] + 1) / 2
        total = up * normals.new_tensor(self.sky) + (1 - up) * normals.new_tensor(self.ground)
        for direction, colour in self.lamps:
            towards = torch.nn.functional.normalize(normals.new_tensor(direction), dim=0)
            total = total + (normals @ towards).clamp_min(0)[..., None] * normals.new_tensor(colour)
        return total

    def reached(self, normal: Tensor, sky: Tensor, lamps: Tensor) -> Tensor:
        """Irradiance `[Q, 3]` at one normal `[3]` where shares of the sky `[Q]` and of each lamp `[L, Q]` are seen."""
        up = (normal[2] + 1) / 2
        total = (up * normal.new_tensor(self.sky) + (1 - up) * normal.new_tensor(self.ground)) * sky[:, None]
        for (direction, colour), share in zip(self.lamps, lamps, strict=True):
            towards = torch.nn.functional.normalize(normal.new_tensor(direction), dim=0)
            total = total + (normal @ towards).clamp_min(0) * share[:, None] * normal.new_tensor(colour)
        return total


LIGHTS = {
    "overcast": Light(sky=(0.98, 1.0, 1.04), ground=(0.55, 0.54, 0.52)),
    "sun": Light(sky=(0.52, 0.58, 0.68), ground=(0.34, 0.33, 0.31), lamps=(((-0.7, -0.6, 0.9), (0.72, 0.68, 0.6)),)),
    "low_sun": Light(sky=(0.46, 0.5, 0.6), ground=(0.32, 0.3, 0.28), lamps=(((0.95, -0.3, 0.35), (0.82, 0.66, 0.46)),)),
    "indoor": Light(
        sky=(0.55, 0.51, 0.45),
        ground=(0.36, 0.34, 0.31),
        lamps=(((0.4, -0.5, 1.0), (0.38, 0.35, 0.29)), ((-0.8, -0.1, 0.8), (0.24, 0.23, 0.2))),
    ),
    "dusk": Light(sky=(0.56, 0.6, 0.72), ground=(0.32, 0.33, 0.38)),
    "noon": Light(sky=(0.5, 0.56, 0.66), ground=(0.36, 0.35, 0.32), lamps=(((0.25, -0.4, 1.0), (0.7, 0.68, 0.62)),)),
    "white lamps": Light(
        sky=(0.6, 0.62, 0.64),
        ground=(0.4, 0.4, 0.41),
        lamps=(((-0.3, -0.2, 1.0), (0.3, 0.31, 0.32)), ((0.7, -0.3, 0.9), (0.22, 0.22, 0.23))),
    ),
    "hazy": Light(sky=(0.86, 0.88, 0.9), ground=(0.5, 0.5, 0.48), lamps=(((-0.5, -0.5, 1.0), (0.2, 0.19, 0.17)),)),
}


def light(name: str) -> Light:
    """A light by its name."""
    if name not in LIGHTS:
        raise unknown("light", name, LIGHTS)
    return LIGHTS[name]


def light_name(lamp: Light) -> str:
    """The name of a light of `LIGHTS`, "own" for any other."""
    return next((name for name, known in LIGHTS.items() if known == lamp), "own")
