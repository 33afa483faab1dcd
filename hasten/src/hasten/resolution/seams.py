"""Where coarse and fine tokens meet: locking to a source, blending over a ring, and how large a seam is left."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from hasten.errors import ConfigError

__all__ = ["blend", "locked_velocity", "ring_weights", "seam_steps"]


def locked_velocity(state: Tensor, source: Tensor, sigma: float) -> Tensor:
    """The velocity that leads from a noisy state at `sigma` straight to the source: `(x - source) / sigma`."""
    return (state - source) / sigma


def ring_weights(inside: Tensor, ring: int) -> Tensor:
    """Weights that fall from 1 inside a region to 0 beyond a ring around it, as cos^2 of the distance.

    Args:
        inside: `[h, w]` bool.
        ring: width in cells; a cell `d` cells away has the weight `cos^2(pi/2 d / (ring + 1))`. 0 for a hard edge.

    Returns:
        `[h, w]` float32.
    """
    if inside.dim() != 2 or inside.dtype != torch.bool or ring < 0:
        raise ConfigError(
            f"a ring lies around a bool map [h, w] and has a width of 0 or more, got {list(inside.shape)}, {ring}"
        )
    weights, grown = inside.float(), inside
    for distance in range(1, ring + 1):
        wider = functional.max_pool2d(grown[None, None].float(), 3, stride=1, padding=1)[0, 0] > 0
        weights[wider & ~grown] = math.cos(math.pi / 2 * distance / (ring + 1)) ** 2
        grown = wider
    return weights


def blend(inner: Tensor, outer: Tensor, inside: Tensor, ring: int) -> Tensor:
    """`inner` in a region, `outer` beyond the ring around it, and a cos^2 blend of the two on the ring.

    Args:
        inner: `[..., H, W]`.
        outer: the same shape.
        inside: `[h, w]` bool; `H` and `W` are multiples of `h` and `w`.
        ring: width in cells of `inside`; the blend is as smooth as the pixels of `inner`.
    """
    cells = _cells(inner.shape[-2:], inside)
    mask = inside.repeat_interleave(cells[0], 0).repeat_interleave(cells[1], 1)
    return torch.lerp(outer, inner, ring_weights(mask, ring * max(cells)).to(inner))


def seam_steps(image: Tensor, inside: Tensor) -> tuple[float, float]:
    """Mean step between neighbouring pixels across a region's border, and across the cells' other borders.

    Both are measured at borders of cells only, so that the image's own detail weighs the same in both. An image
    without seams has no larger a step across the region's border than elsewhere.

    Args:
        image: `[C, H, W]`; the step is the mean absolute difference over channels.
        inside: `[h, w]` bool, one cell for `H/h x W/w` pixels.

    Returns:
        the step across the region's border, and the step elsewhere.

    Raises:
        ConfigError: if the sizes do not fit, or there is nothing on one of the sides.
    """
    if image.dim() != 3:
        raise ConfigError(f"seams are measured on an image [C, H, W], got {list(image.shape)}")
    cells = _cells(image.shape[-2:], inside)
    across, within = [], []
    for dimension, cell in ((0, cells[0]), (1, cells[1])):
        lines, mask = image.movedim(1 + dimension, 1), inside.movedim(dimension, 0)
        before, after = lines[:, cell - 1 : -1 : cell], lines[:, cell::cell]
        steps = (after.float() - before.float()).abs().mean(0)
        other = cells[1 - dimension]
        border = (mask[1:] != mask[:-1]).repeat_interleave(other, 1)
        across.append(steps[border])
        within.append(steps[~border])
    seam, rest = torch.cat(across), torch.cat(within)
    if not len(seam) or not len(rest):
        raise ConfigError("there is no seam to measure: the region needs a border, and cells on both of its sides")
    return float(seam.mean()), float(rest.mean())


def _cells(size: torch.Size, inside: Tensor) -> tuple[int, int]:
    height, width = size
    if inside.dim() != 2 or height % inside.shape[0] or width % inside.shape[1]:
        raise ConfigError(f"{height}x{width} pixels cannot be divided into the cells of a map {list(inside.shape)}")
    return height // inside.shape[0], width // inside.shape[1]
