"""Where coarse and fine tokens meet: their state side by side, blending over a ring, and how large a seam is left."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hasten.errors import ConfigError
from hasten.resolution.pixel_layout import LATENTS, Canvas
from hasten.resolution.positions import TokenSet

__all__ = ["MixedState", "blend", "children", "locked_velocity", "ring_weights", "seam_steps"]


def children(mask: Tensor) -> Tensor:
    """The fine tokens of coarse ones: `[h, w]` bool to `[4 h w, 1]`, in raster order."""
    return mask.repeat_interleave(2, 0).repeat_interleave(2, 1).reshape(-1, 1)


def locked_velocity(state: Tensor, source: Tensor, sigma: float) -> Tensor:
    """The velocity that leads from a noisy state at `sigma` straight to the source: `(x - source) / sigma`."""
    return (state - source) / sigma


@dataclass
class MixedState:
    """All tokens of a image in both resolutions, of which those in `tokens` are the true ones.

    Attributes:
        tokens: which ones are true.
        noise: unit noise of the fine grid, `[B, 4 n, C]`; all tensors are float32.
        coarse: `[B, n, C]`.
        fine: `[B, 4 n, C]`.
        canvas: how tokens are a image.
    """

    tokens: TokenSet
    noise: Tensor
    coarse: Tensor
    fine: Tensor
    canvas: Canvas = LATENTS

    @classmethod
    def begin(cls, noise: Tensor, size: tuple[int, int], canvas: Canvas = LATENTS) -> MixedState:
        """All tokens coarse, at sigma 1: the low-pass of the fine noise, which is unit noise again.

        Args:
            noise: `[B, 4 n, C]`.
            size: of the fine grid of tokens.
            canvas: how tokens are a image.
        """
        tokens = TokenSet(torch.zeros(size[0] // 2, size[1] // 2, dtype=torch.bool, device=noise.device))
        low = canvas.shrink(noise, size) * 2  # the sum of 4 over the root of 4
        return cls(tokens, noise, low, torch.zeros_like(noise), canvas)

    @property
    def complete(self) -> bool:
        """Whether every token is fine."""
        return bool(self.tokens.fine.all())

    def move(self, coarse: Tensor, fine: Tensor, change: float) -> None:
        """An Euler step along the velocities `coarse` and `fine`, by a change of the noise level."""
        self.coarse, self.fine = self.coarse + change * coarse, self.fine + change * fine

    def promote(self, new: Tensor, clean: Tensor, sigma: float) -> None:
        """Replace coarse tokens by fine ones: `x = (1 - sigma) clean + sigma noise`.

        Args:
            new: `[h, w]` bool.
            clean: estimate of the clean fine tokens, `[B, 4 n, C]`.
            sigma: noise level of the state.
        """
        self.fine = torch.where(children(new), (1 - sigma) * clean + sigma * self.noise, self.fine)
        self.tokens = TokenSet(self.tokens.fine | new)

    def shown(self) -> Tensor:
        """The state at full size, `[B, 4 n, C]`, to look at."""
        size = self.tokens.fine.shape
        return torch.where(children(self.tokens.fine), self.fine, self.canvas.enlarge(self.coarse, (size[0], size[1])))


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
    large = inside.repeat_interleave(cells[0], 0).repeat_interleave(cells[1], 1)
    return torch.lerp(outer, inner, ring_weights(large, ring * max(cells)).to(inner))


def seam_steps(image: Tensor, inside: Tensor) -> tuple[float, float]:
    """Mean step between neighbouring pixels across a region's border, and across the cells' other borders.

    Both are measured at borders of cells only, so that the image's own detail weighs the same in both. A image
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
        raise ConfigError(f"seams are measured on a image [C, H, W], got {list(image.shape)}")
    cells = _cells(image.shape[-2:], inside)
    across, within = [], []
    for dimension, cell in ((0, cells[0]), (1, cells[1])):
        turned, mask = (image.movedim(1 + dimension, 1), inside.movedim(dimension, 0))
        before, after = turned[:, cell - 1 : -1 : cell], turned[:, cell::cell]
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
