"""Where latents lie: tokens as pixels that can be resized, and coarse grids inside a full one.

`B` images or clips, `C` channels, `T`, `H`, `W` frames, rows and columns of the full grid, `t`, `h`, `w` of a coarse
one. A *grid* is `(frames, rows, columns)` in latent pixels; an *axis* is the list of full-size coordinates that the
cells of a coarse grid stand at along one dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from hasten.resolution.positions import pack, unpack

__all__ = [
    "LATENT_PIXELS",
    "Axes",
    "Grid",
    "PixelLayout",
    "block_noise",
    "enlarge",
    "gather",
    "nested_axes",
    "nested_axis",
    "pick",
    "smooth",
    "spread",
]

Grid = tuple[int, int, int]
Axis = tuple[int, ...]
Axes = tuple[Axis, Axis, Axis]


# --- tokens as pixels


@dataclass(frozen=True)
class PixelLayout:
    """How packed tokens become an image that can be resized pixel by pixel.

    A token is 2x2 latent pixels. A latent pixel of a learned VAE stands for a patch of the image, and four copies of it
    for a larger patch. A VAE that only rearranges pixels into channels (space-to-depth) makes latents of which that is
    not true: a copied latent pixel repeats the pattern of its patch. There the image's own pixels are taken.

    Shapes: tokens `[B, n, C]`, pixels `[B, C / (2 s)^2, 2 s h, 2 s w]` for `(h, w)` tokens and the factor `s`.

    Attributes:
        factor: pixels along each side that the VAE rearranged into the channels of a latent pixel; 1 for a learned VAE.
    """

    factor: int = 1

    @classmethod
    def of(cls, vae: Any) -> Self:
        """The layout of a VAE, which says `space_to_depth` if it only rearranges pixels."""
        return cls(int(getattr(vae, "space_to_depth", 1)))

    def to_pixels(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Pixels of the tokens on a grid of `size`."""
        return functional.pixel_shuffle(unpack(tokens, size), self.factor)

    def to_tokens(self, pixels: Tensor) -> Tensor:
        """Undo `to_pixels`."""
        return pack(functional.pixel_unshuffle(pixels, self.factor))

    def enlarge(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Every pixel copied to 2x2: `[B, n, C]` on a coarse grid of `size` to `[B, 4 n, C]`.

        Copying whole tokens instead would tile each token's pixels.
        """
        return self.to_tokens(self.to_pixels(tokens, size).repeat_interleave(2, 2).repeat_interleave(2, 3))

    def shrink(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """The mean of 2x2 pixels: `[B, 4 n, C]` on a fine grid of `size` to `[B, n, C]`."""
        return self.to_tokens(functional.avg_pool2d(self.to_pixels(tokens, size), 2))


LATENT_PIXELS = PixelLayout()


# --- coarse grids inside a full one


def nested_axis(finer: Sequence[int], size: int, held: Sequence[int] = ()) -> Axis:
    """`size` of a finer stage's coordinates, evenly spread, with both ends.

    Args:
        finer: coordinates of the finer stage, increasing.
        size: how many to take; at most as many as there are.
        held: coordinates that have to be among them (those of a coarser stage); each takes the place of its nearest
            neighbour.
    """
    last = len(finer) - 1
    taken = [finer[round(i * last / max(size - 1, 1))] for i in range(size)]
    for wanted in held:
        if wanted not in taken:
            free = [place for place, value in enumerate(taken) if value not in held]
            taken[min(free, key=lambda place: abs(taken[place] - wanted))] = wanted
    return tuple(sorted(taken))


def nested_axes(grids: Sequence[Grid], first: Axes | None = None) -> list[Axes]:
    """Axes of all stages; each stage's coordinates are among those of the next one.

    Args:
        grids: of the stages, coarse to fine; the last one is full.
        first: axes of the first stage where they are decided already.
    """
    per_dimension = []
    for dimension in range(3):
        held = () if first is None else first[dimension]
        axes = [tuple(range(grids[-1][dimension]))]
        for grid in reversed(grids[:-1]):
            axes.insert(0, nested_axis(axes[0], grid[dimension], held))
        per_dimension.append(axes)
    return [(frames, rows, columns) for frames, rows, columns in zip(*per_dimension, strict=True)]


@lru_cache(maxsize=256)
def _index(places: tuple[int, ...], device: torch.device) -> Tensor:
    """Places as an index on a device; made once, since every forward of a stage asks for the same ones."""
    with torch.inference_mode(False):
        return torch.tensor(places, device=device)


def pick(values: Tensor, places: Sequence[Sequence[int]]) -> Tensor:
    """Values at places along the last three dimensions of `[B, C, T, H, W]`; as many places as there are mean all."""
    for dimension, chosen in enumerate(places, start=2):
        if len(chosen) != values.shape[dimension]:
            values = values.index_select(dimension, _index(tuple(chosen), values.device))
    return values


@lru_cache(maxsize=256)
def _owners(full: int, size: int) -> tuple[int, ...]:
    """For each full-size cell, the coarse cell whose block it lies in."""
    return tuple(place * size // full for place in range(full))


@lru_cache(maxsize=256)
def _starts(full: int, size: int) -> tuple[int, ...]:
    """For each coarse cell, the first full-size cell of its block."""
    return tuple(-(-place * full // size) for place in range(size))


def spread(coarse: Tensor, grid: Grid) -> Tensor:
    """Every value of `[B, C, t, h, w]` copied to its block of the full grid: `[B, C, T, H, W]`."""
    return pick(coarse, [_owners(full, size) for full, size in zip(grid, coarse.shape[2:], strict=True)])


def gather(copied: Tensor, grid: Grid) -> Tensor:
    """Undo `spread`: one value per block, exactly the one that was copied."""
    return pick(copied, [_starts(full, size) for full, size in zip(copied.shape[2:], grid, strict=True)])


def block_noise(noise: Tensor, axes: Axes) -> Tensor:
    """Noise of a coarse grid as the low-pass of the full one: `[B, C, T, H, W]` to `[B, C, t, h, w]`.

    Each coarse cell is the sum over its block of rows and columns, divided by the root of their number, which is
    unit-variance and independent again. Frames are taken at their coordinates, since a shorter clip is a choice of
    frames and not their mean.
    """
    frames, rows, columns = axes
    noise = pick(noise, (frames, tuple(range(noise.shape[3])), tuple(range(noise.shape[4]))))
    for dimension, size in ((3, len(rows)), (4, len(columns))):
        if size < noise.shape[dimension]:
            owners = _index(_owners(noise.shape[dimension], size), noise.device)
            summed = noise.new_zeros([*noise.shape[:dimension], size, *noise.shape[dimension + 1 :]])
            counts = owners.bincount(minlength=size).to(noise.dtype).sqrt()
            shape = [-1 if at == dimension else 1 for at in range(noise.dim())]
            noise = summed.index_add_(dimension, owners, noise) / counts.reshape(shape)
    return noise


def enlarge(clean: Tensor, old: Axes, new: Axes) -> Tensor:
    """A clean estimate on a finer grid: `[B, C, t, h, w]` on `old` to the grid of `new`, which holds `old`.

    Rows and columns: area resize, then the source's own values at their own coordinates. Frames: linear between the
    source's. DVG's "temporal_interp_spatial_restore".
    """
    batch, _, frames = clean.shape[:3]
    if (len(new[1]), len(new[2])) != clean.shape[3:]:
        rows, columns = (_index(_places(old[axis], new[axis]), clean.device) for axis in (1, 2))
        flat = clean.transpose(1, 2).flatten(0, 1)
        larger = functional.interpolate(flat, size=(len(new[1]), len(new[2])), mode="area")
        larger[:, :, rows[:, None], columns[None]] = flat
        clean = larger.unflatten(0, (batch, frames)).transpose(1, 2)
    if len(new[0]) != frames:
        clean = _between_frames(clean, old[0], new[0])
    return clean


def _places(old: Axis, new: Axis) -> Axis:
    where = {coordinate: place for place, coordinate in enumerate(new)}
    return tuple(where[coordinate] for coordinate in old)


def _between_frames(clean: Tensor, old: Axis, new: Axis) -> Tensor:
    """Linear interpolation in time between the frames at `old`; held beyond them."""
    source = torch.tensor(old, dtype=torch.float32, device=clean.device)
    target = torch.tensor(new, dtype=torch.float32, device=clean.device)
    after = torch.searchsorted(source, target).clamp(max=len(old) - 1)
    before = (after - 1).clamp(min=0)
    gap = (source[after] - source[before]).clamp(min=1)
    weight = ((target - source[before]) / gap).clamp(0, 1)[:, None, None]
    return torch.lerp(clean[:, :, before], clean[:, :, after], weight.to(clean.dtype))


def smooth(clean: Tensor, share: float) -> Tensor:
    """Blend every frame of `[B, C, T, H, W]` with its 3x3 mean; the mean at the border is over the pixels there are."""
    mean = functional.avg_pool3d(clean, (1, 3, 3), stride=1, padding=(0, 1, 1), count_include_pad=False)
    return torch.lerp(clean, mean, share)
