"""Solids that places are built of: boxes that may be turned about the vertical, balls and heaps of balls; and rays that
meet them.

Shapes: `N` rays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from drape.scene.arrays import Floats, rotation

__all__ = ["Ball", "Box", "Heap", "Solid"]


def corners_between(low: Floats, high: Floats) -> Floats:
    """The corners `[8, 3]` of a box along the axes."""
    return np.stack(np.meshgrid(*zip(low, high, strict=True)), axis=-1).reshape(8, 3)


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
        near = np.fmax.reduce(np.minimum(first, second).T)  # of no number and a number they take the number
        far = np.fmin.reduce(np.maximum(first, second).T)
        return np.where((near <= far) & (near > 1e-4), near, np.inf)

    def bounds(self) -> tuple[Floats, Floats]:
        """Lowest and highest corner in the box's own frame."""
        width, depth, height = self.size
        return np.array([-width / 2, -depth / 2, 0.0]), np.array([width / 2, depth / 2, height])

    def corners(self) -> Floats:
        """Corners `[8, 3]` of a box around it."""
        low, high = self.bounds()
        return corners_between(low, high) @ rotation("z", self.turn).T + np.array(self.middle)

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

    def corners(self) -> Floats:
        """As `Box.corners`."""
        return corners_between(np.array(self.middle) - self.radius, np.array(self.middle) + self.radius)

    def surface(self, points: Floats) -> tuple[Floats, Floats]:
        """As `Box.surface`."""
        normals = (points - np.array(self.middle)) / self.radius
        turn = np.arctan2(normals[:, 1], normals[:, 0])
        return normals, np.stack([turn, np.arcsin(np.clip(normals[:, 2], -1, 1))], axis=1) * self.radius


@dataclass(frozen=True)
class Heap:
    """Balls of one material, at least one."""

    balls: tuple[Ball, ...]

    @property
    def material(self) -> str:
        return self.balls[0].material

    @property
    def middle(self) -> tuple[float, float, float]:
        """The mean of the balls' middles."""
        x, y, z = np.mean([ball.middle for ball in self.balls], axis=0)
        return float(x), float(y), float(z)

    def meet(self, origin: Floats, rays: Floats) -> Floats:
        """As `Box.meet`."""
        return np.asarray(np.min([ball.meet(origin, rays) for ball in self.balls], axis=0))

    def corners(self) -> Floats:
        """As `Box.corners`."""
        each = np.concatenate([ball.corners() for ball in self.balls])
        return corners_between(each.min(axis=0), each.max(axis=0))

    def surface(self, points: Floats) -> tuple[Floats, Floats]:
        """As `Box.surface`."""
        off = [np.abs(np.linalg.norm(points - np.array(ball.middle), axis=1) - ball.radius) for ball in self.balls]
        found = [ball.surface(points) for ball in self.balls]
        own = np.argmin(off, axis=0)[None, :, None]
        normals, uv = (np.take_along_axis(np.stack(parts), own, axis=0)[0] for parts in zip(*found, strict=True))
        return normals, uv


Solid = Box | Ball | Heap
