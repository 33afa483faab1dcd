"""Fixed pinhole cameras, and the ways a person walks past them.

World: z up, metres. A person at heading 0 faces -y. Azimuth is the side of the person that the camera sees, in degrees:
0 the front, 90 the person's left side, 180 the back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from drape.errors import ConfigError, unknown
from drape.scene.body import Floats

__all__ = ["PATHS", "Camera", "azimuth_of", "place_on_path"]

PATHS = ("past", "towards", "away", "diagonal", "circle")


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole camera that stands still and looks at the height of a person's trunk over the world's origin.

    Args:
        distance: from the origin, metres, along the ground.
        elevation: degrees above the horizontal, -5 to 60.
        fov: vertical and horizontal field of view, degrees.
    """

    distance: float = 4.6
    elevation: float = 8.0
    fov: float = 36.0

    def __post_init__(self) -> None:
        if not self.distance > 1.2:
            raise ConfigError(
                f"distance={self.distance} m; expected more than 1.2, or the person walks into the camera."
            )
        if not -5 <= self.elevation <= 60 or not 5 <= self.fov <= 100:
            raise ConfigError(f"elevation={self.elevation}, fov={self.fov} degrees; expected -5 to 60 and 5 to 100.")

    def position(self) -> Floats:
        """The camera's place, metres, `[3]`; it stands on the -y side."""
        return np.array([0.0, -self.distance, 0.95 + self.distance * np.tan(np.radians(self.elevation))])

    def project(self, points: Floats, size: int) -> Floats:
        """Pixel x, pixel y (down) and depth in metres of points `[..., 3]` in a square image, `[..., 3]`."""
        place = self.position()
        forward = np.array([0.0, 0.0, 0.95]) - place
        forward /= np.linalg.norm(forward)
        right = np.array([1.0, 0.0, 0.0])
        down = np.cross(forward, right)
        seen = (points - place) @ np.stack([right, down, forward], axis=1)
        focal = 0.5 * size / np.tan(np.radians(self.fov) / 2)
        depth = np.maximum(seen[..., 2:], 1e-3)
        return np.concatenate([seen[..., :2] / depth * focal + size / 2, depth], axis=-1)


def place_on_path(path: str, walked: Floats) -> tuple[Floats, Floats]:
    """Place `[T, 3]` and heading `[T]` (degrees about z) of a person who has walked so many metres.

    The middle of the walk lies near the origin, where the camera looks.
    """
    if path not in PATHS:
        raise unknown("path", path, PATHS)
    way = walked - walked[-1] / 2
    if path == "circle":
        radius = max(float(walked[-1]), 0.5) / (2 * np.pi)
        angle = way / radius
        place = radius * np.stack([np.sin(angle), -np.cos(angle), np.zeros_like(angle)], axis=1)
        return place, np.degrees(angle) + 90.0
    heading = {"past": 90.0, "towards": 0.0, "away": 180.0, "diagonal": 45.0}[path]
    forward = np.array([np.sin(np.radians(heading)), -np.cos(np.radians(heading)), 0.0])
    return way[:, None] * forward, np.full(len(way), heading)


def azimuth_of(camera: Camera, place: Floats, heading: Floats) -> Floats:
    """Which side of the person the camera sees, degrees in [0, 360), `[T]`."""
    to_camera = camera.position()[:2] - place[:, :2]
    seen_from = np.degrees(np.arctan2(to_camera[:, 0], -to_camera[:, 1]))
    return np.asarray((seen_from - heading) % 360.0)
