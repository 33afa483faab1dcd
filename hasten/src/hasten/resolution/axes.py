"""Coordinates of uniform coarse grids inside the full one, and how tensors go from grid to grid.

An *axis* is the list of full-size coordinates that a stage's cells stand at; a grid has three, for frames, rows and
columns. `B` batch, `C` channels, `T`, `H`, `W` full frames, rows and columns, `t`, `h`, `w` those of a stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from hasten.resolution.plan import Grid

__all__ = ["Axes", "block_noise", "enlarge", "gather", "nested_axes", "nested_axis", "pick", "smooth", "spread"]

Axis = tuple[int, ...]
Axes = tuple[Axis, Axis, Axis]


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
        first: axes of the first stage where they are settled already.
    """
    per_dimension = []
    for dimension in range(3):
        held = () if first is None else first[dimension]
        axes = [tuple(range(grids[-1][dimension]))]
        for grid in reversed(grids[:-1]):
            axes.insert(0, nested_axis(axes[0], grid[dimension], held))
        per_dimension.append(axes)
    return [(frames, rows, columns) for frames, rows, columns in zip(*per_dimension, strict=True)]


def pick(values: Tensor, places: Sequence[Sequence[int]]) -> Tensor:
    """Values at places along the last three dimensions of `[B, C, T, H, W]`; as many places as there are mean all."""
    for dimension, chosen in enumerate(places, start=2):
        if len(chosen) != values.shape[dimension]:
            values = values.index_select(dimension, torch.tensor(chosen, device=values.device))
    return values


def _owners(full: int, size: int) -> list[int]:
    """For each full-size cell, the coarse cell whose block it lies in."""
    return [place * size // full for place in range(full)]


def spread(coarse: Tensor, grid: Grid) -> Tensor:
    """Every value of `[B, C, t, h, w]` copied to its block of the full grid: `[B, C, T, H, W]`."""
    owners = [_owners(full, size) for full, size in zip(grid, coarse.shape[2:], strict=True)]
    return pick(coarse, owners)


def gather(copied: Tensor, grid: Grid) -> Tensor:
    """Undo `spread`: one value of each block, exactly the one that was copied."""
    starts = [
        [-(-place * full // size) for place in range(size)] for full, size in zip(copied.shape[2:], grid, strict=True)
    ]
    return pick(copied, starts)


def block_noise(noise: Tensor, axes: Axes) -> Tensor:
    """Noise of a coarse grid as the low-pass of the full one: `[B, C, T, H, W]` to `[B, C, t, h, w]`.

    Each coarse cell is the sum over its block of rows and columns, divided by the root of their number, which is
    unit-variance and independent again. Frames are taken at their coordinates, since a shorter clip shows a choice of
    frames and not their mean.
    """
    frames, rows, columns = axes
    noise = pick(noise, (frames, tuple(range(noise.shape[3])), tuple(range(noise.shape[4]))))
    for dimension, size in ((3, len(rows)), (4, len(columns))):
        if size < noise.shape[dimension]:
            owners = torch.tensor(_owners(noise.shape[dimension], size), device=noise.device)
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
    rows, columns = _places(old[1], new[1]), _places(old[2], new[2])
    if (len(new[1]), len(new[2])) != clean.shape[3:]:
        flat = clean.transpose(1, 2).flatten(0, 1)
        larger = functional.interpolate(flat, size=(len(new[1]), len(new[2])), mode="area")
        larger[:, :, torch.tensor(rows)[:, None], torch.tensor(columns)[None]] = flat
        clean = larger.unflatten(0, (batch, frames)).transpose(1, 2)
    if len(new[0]) != frames:
        clean = _between_frames(clean, old[0], new[0])
    return clean


def _places(old: Axis, new: Axis) -> list[int]:
    where = {coordinate: place for place, coordinate in enumerate(new)}
    return [where[coordinate] for coordinate in old]


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
    """Blend every frame of `[B, C, T, H, W]` with its 3x3 mean; the mean at the border is over what is there."""
    mean = functional.avg_pool3d(clean, (1, 3, 3), stride=1, padding=(0, 1, 1), count_include_pad=False)
    return torch.lerp(clean, mean, share)
