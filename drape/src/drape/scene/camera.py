"""Fixed pinhole cameras.

World: z up, metres; the ground is z = 0. Azimuth is the side of the person that the camera sees, in degrees: 0 the
front, 90 the person's left side, 180 the back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from drape.errors import ConfigError
from drape.scene.arrays import Floats

__all__ = ["AIM", "HIGHEST", "LOWEST", "Camera", "azimuth_of", "holding"]

AIM = 0.95  # metres over the world's origin, the point that cameras look at
TALLEST, WIDEST = 2.0, 0.65  # metres that a walking person takes up: height, and to each side
MARGIN = 0.03  # share of the image's side that stays free around the person
FARTHEST = 40.0  # metres
LOWEST, HIGHEST = 0.25, 30.0  # metres over the ground that a camera stands


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole camera that stands still and looks at the height of a person's trunk over the world's origin.

    Args:
        distance: from the origin, metres, along the ground.
        elevation: degrees that it looks down by, -5 to 60.
        fov: vertical and horizontal field of view, degrees.
        height: metres over the ground where that is known, as of a photograph's camera; it then looks past the origin.
    """

    distance: float = 4.6
    elevation: float = 8.0
    fov: float = 36.0
    height: float | None = None

    def __post_init__(self) -> None:
        if not self.distance > 1.2:
            raise ConfigError(
                f"distance={self.distance} m; expected more than 1.2, or the person walks into the camera."
            )
        if not -5 <= self.elevation <= 60 or not 5 <= self.fov <= 100:
            raise ConfigError(f"elevation={self.elevation}, fov={self.fov} degrees; expected -5 to 60 and 5 to 100.")
        if self.height is not None and not LOWEST <= self.height <= HIGHEST:
            raise ConfigError(f"height={self.height} m; expected {LOWEST:g} to {HIGHEST:g}.")

    def position(self) -> Floats:
        """The camera's place, metres, `[3]`; it stands on the -y side, and not below the ground."""
        if self.height is not None:
            return np.array([0.0, -self.distance, self.height])
        height = AIM + self.distance * np.tan(np.radians(self.elevation))
        return np.array([0.0, -self.distance, max(float(height), LOWEST)])

    def axes(self) -> Floats:
        """Directions to the right, down and forwards in the image, as columns `[3, 3]`."""
        forward = np.array([0.0, 0.0, AIM]) - self.position()
        if self.height is not None:
            down = np.radians(self.elevation)
            forward = np.array([0.0, np.cos(down), -np.sin(down)])
        forward /= np.linalg.norm(forward)
        right = np.array([1.0, 0.0, 0.0])
        return np.stack([right, np.cross(forward, right), forward], axis=1)

    def focal(self, size: int) -> float:
        """Focal length in pixels of a square image."""
        return float(0.5 * size / np.tan(np.radians(self.fov) / 2))

    def project(self, points: Floats, size: int) -> Floats:
        """Pixel x, pixel y (down) and depth in metres of points `[..., 3]` in a square image, `[..., 3]`."""
        seen = (points - self.position()) @ self.axes()
        depth = np.maximum(seen[..., 2:], 1e-3)
        return np.concatenate([seen[..., :2] / depth * self.focal(size) + size / 2, depth], axis=-1)

    def rays(self, size: int) -> Floats:
        """Unit directions of the pixels' centres, `[size * size, 3]`, row by row."""
        centre = (np.arange(size) + 0.5 - size / 2) / self.focal(size)
        x, y = np.meshgrid(centre, centre)
        seen = np.stack([x.ravel(), y.ravel(), np.ones(size * size)], axis=1) @ self.axes().T
        return np.asarray(seen / np.linalg.norm(seen, axis=1, keepdims=True))


def holding(camera: Camera, places: Floats, zoom: float = 1.0) -> Camera:
    """The camera moved to where it holds a person at all `places` `[N, 2]`, `zoom` times as far as it has to be.

    Raises:
        ConfigError: no distance up to 40 m is enough.
    """
    corners = [(x, y, z) for x in (-WIDEST, WIDEST) for y in (-WIDEST, WIDEST) for z in (0.0, TALLEST)]
    points = (np.pad(places, ((0, 0), (0, 1)))[:, None] + np.array(corners)).reshape(-1, 3)
    for distance in np.arange(2.4, FARTHEST, 0.1):
        moved = replace(camera, distance=float(distance))
        found = moved.project(points, 1)
        inside = (found[:, :2] > MARGIN).all() and (found[:, :2] < 1 - MARGIN).all()
        if inside and found[:, 2].min() > 1.0:
            return replace(camera, distance=round(float(distance * zoom), 1))
    raise ConfigError(f"no camera up to {FARTHEST:g} m away holds the whole walk; shorten it or widen the view.")


def azimuth_of(camera: Camera, place: Floats, heading: Floats) -> Floats:
    """Which side of a person at `place` `[T, 2]` the camera sees, degrees in [0, 360), `[T]`."""
    to_camera = camera.position()[:2] - place[:, :2]
    seen_from = np.degrees(np.arctan2(to_camera[:, 0], -to_camera[:, 1]))
    return np.asarray((seen_from - heading) % 360.0)
