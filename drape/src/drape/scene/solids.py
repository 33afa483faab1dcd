"""Solids that places are built of: boxes that may be turned about the vertical, and balls; and rays that meet them.

Shapes: `N` rays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from drape.scene.arrays import Floats, rotation

__all__ = ["Ball", "Box", "Solid"]


@dataclass(frozen=True)
class Box:
    """A box: the middle of its base, width, depth and height in metres, a material, and degrees about the vertical."""

    middle: tuple[float, float, float]
    size: tuple[float, float, float]
    material: str
    turn: float = 0.0

    def meet(self, origin: Floats, rays: Floats) -> Floats:
        """Distances along rays `[N, 3]` from `origin` (`[3]` or `[N, 3]`), `[N]`; inf where they miss."""
        back = rotation("z", -self.turn).T
        start, along = (origin - np.array(self.middle)) @ back, rays @ back
        low, high = self.bounds()
        with np.errstate(divide="ignore", invalid="ignore"):
            first, second = (low - start) / along, (high - start) / along
        near = np.nanmax(np.minimum(first, second), axis=-1)
        far = np.nanmin(np.maximum(first, second), axis=-1)
        return np.where((near <= far) & (near > 1e-4), near, np.inf)

    def bounds(self) -> tuple[Floats, Floats]:
        """Lowest and highest corner in the box's own frame."""
        width, depth, height = self.size
        return np.array([-width / 2, -depth / 2, 0.0]), np.array([width / 2, depth / 2, height])

    def surface(self, points: Floats) -> tuple[Floats, Floats]:
        """Unit normals `[N, 3]` and coordinates in metres `[N, 2]` at points on the surface."""
        local = (points - np.array(self.middle)) @ rotation("z", -self.turn).T
        low, high = self.bounds()
        away = np.abs((local - (low + high) / 2) / np.maximum((high - low) / 2, 1e-6))
        axis = away.argmax(axis=1)
        sign = np.sign(np.take_along_axis(local - (low + high) / 2, axis[:, None], axis=1)[:, 0])
        normals = np.eye(3)[axis] * sign[:, None] @ rotation("z", self.turn).T
        across = np.where(axis == 0, local[:, 1], local[:, 0])
        up = np.where(axis == 2, local[:, 1], -local[:, 2])
        return normals, np.stack([across, up], axis=1)


@dataclass(frozen=True)
class Ball:
    """A ball: its middle, its radius in metres, a material."""

    middle: tuple[float, float, float]
    radius: float
    material: str

    def meet(self, origin: Floats, rays: Floats) -> Floats:
        """As `Box.meet`."""
        start = origin - np.array(self.middle)
        half = (start * rays).sum(axis=-1)
        inside = half**2 - ((start**2).sum(axis=-1) - self.radius**2)
        near = -half - np.sqrt(np.maximum(inside, 0.0))
        return np.where((inside > 0) & (near > 1e-4), near, np.inf)

    def surface(self, points: Floats) -> tuple[Floats, Floats]:
        """As `Box.surface`."""
        normals = (points - np.array(self.middle)) / self.radius
        turn = np.arctan2(normals[:, 1], normals[:, 0])
        return normals, np.stack([turn, np.arcsin(np.clip(normals[:, 2], -1, 1))], axis=1) * self.radius


Solid = Box | Ball
