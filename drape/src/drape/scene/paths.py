"""The ways that a person walks: curves on the ground by their curvature, without turns tighter than 1.5 m.

World: z up, metres. A person at heading 0 faces -y, where the camera stands; headings are degrees about z.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from drape.errors import ConfigError, unknown
from drape.scene.arrays import Floats

__all__ = ["PATHS", "TIGHTEST", "Curve", "curve"]

TIGHTEST = 1.5  # metres, the least radius of a turn
STEP = 0.01  # metres along the curve between two points of the integration
BEYOND = 12.0  # metres before and after the walk that a curve goes on for, straight on


@dataclass(frozen=True)
class Curve:
    """A way on the ground: `way` metres along it from the start of the walk, `xy` `[N, 2]` and `heading` `[N]`."""

    way: Floats
    xy: Floats
    heading: Floats

    def at(self, way: Floats) -> tuple[Floats, Floats]:
        """Places `[T, 2]` and headings `[T]`, degrees, at so many metres from the start."""
        if way.size and (way.min() < self.way[0] or way.max() > self.way[-1]):
            raise ConfigError(f"{way.min():.1f} to {way.max():.1f} m lie beyond the curve; expected a shorter walk.")
        place = np.stack([np.interp(way, self.way, self.xy[:, axis]) for axis in range(2)], axis=-1)
        return place, np.interp(way, self.way, self.heading)


def bend(share: Floats, length: float) -> Floats:
    """Curvature of a quarter turn in the middle of the walk, 1/m, where the walk is long enough for one."""
    radius = max(TIGHTEST, length / 4)
    turning = min(np.pi / 2 * radius, length) / length
    return np.where(np.abs(share - 0.5) < turning / 2, 1 / radius, 0.0)


def loop(share: Floats, length: float) -> Floats:
    """Curvature of a circle that the walk goes around once, if it is long enough for a radius of 1.5 m."""
    return np.full_like(share, 1 / max(TIGHTEST, length / (2 * np.pi)))


def sway(share: Floats, length: float) -> Floats:
    """Curvature of an S: to the left, then to the right."""
    return np.sin(2 * np.pi * share) / max(TIGHTEST, length / 3)


# heading at the start, and curvature from the share of the walk in [0, 1] and its length in metres
PATHS: dict[str, tuple[float, Callable[[Floats, float], Floats] | None]] = {
    "past": (90.0, None),
    "back past": (-90.0, None),
    "towards": (0.0, None),
    "away": (180.0, None),
    "diagonal": (45.0, None),
    "diagonal away": (-135.0, None),
    "circle": (90.0, loop),
    "circle back": (-90.0, loop),
    "bend": (40.0, bend),
    "bend away": (-140.0, bend),
    "sway": (20.0, sway),
    "sway past": (80.0, sway),
}


def curve(name: str, length: float) -> Curve:
    """The way of a walk of `length` metres; the middle of what it covers lies at the origin.

    Raises:
        UnknownNameError: for a name that is none of `PATHS`.
    """
    if name not in PATHS:
        raise unknown("path", name, PATHS)
    start, curvature = PATHS[name]
    way = np.arange(-BEYOND, length + BEYOND + STEP, STEP)
    share = way / max(length, STEP)
    bent = np.zeros_like(way)
    if curvature is not None:
        inside = (share >= 0) & (share <= 1)
        bent[inside] = curvature(share[inside], max(length, STEP))
    heading = np.radians(start) + np.cumsum(bent) * STEP
    forward = np.stack([np.sin(heading), -np.cos(heading)], axis=1)
    xy = np.cumsum(forward, axis=0) * STEP
    walked = xy[(way >= 0) & (way <= length)]
    xy = xy - (walked.min(axis=0) + walked.max(axis=0)) / 2
    return Curve(way, xy, np.degrees(heading))
