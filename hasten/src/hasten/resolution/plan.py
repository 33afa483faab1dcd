"""DVG's plan: how long each stage is, how coarse, and which of the plans that meet the budget suits the clip.

A clip demands pixels by its fine texture and frames by its motion. Shapes: `[B, C, T, H, W]`, batch, channels, frames,
height and width of the latents. DVG, arXiv:2605.21042; the constants were read in its code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hasten.errors import ConfigError
from hasten.resolution.layouts import Grid

__all__ = ["Plan", "choose", "demands", "density", "feasible", "motion", "stage_grid", "texture"]

TOLERANCE = 0.02  # how far a plan's density may be from the budget
NEAREST = 3  # plans that an error names
FLAT = 1e-6  # least standard deviation and determinant
TEMPERATURE = 2.6  # of the softmax between the two demands
FINE = 0.5  # radius of the spectrum, as a part of the largest one, from which on detail counts as fine


@dataclass(frozen=True)
class Plan:
    """The grids of all stages.

    Attributes:
        grids: one for each stage, each at least as fine as the one before.
        density: tokens times steps, relative to a run at full size.
        spatial: side of the second stage, relative to the full one.
        frames: frames of the second stage.
    """

    grids: tuple[Grid, ...]
    density: float
    spatial: float
    frames: int

    def __str__(self) -> str:
        sizes = ", ".join(f"{t}x{h}x{w}" for t, h, w in self.grids)
        return f"{sizes} (spatial {self.spatial:g}, {self.frames} frames, density {self.density:.3f})"


def stage_grid(full: Grid, spatial: float, frames: int, patch: Grid, least: Grid = (1, 1, 1)) -> Grid:
    """The grid of a stage: `size * spatial`, rounded down to whole patches, no coarser than `least`, at most full."""
    wanted = (frames, round(full[1] * spatial), round(full[2] * spatial))
    aligned = (max(size // p * p, p) for size, p in zip(wanted, patch, strict=True))
    frames, height, width = (min(max(size, low), high) for size, low, high in zip(aligned, least, full, strict=True))
    return frames, height, width


def density(grids: Sequence[Grid], lengths: Sequence[int]) -> float:
    """Tokens times steps of a run, relative to the same run at the size of its last stage."""
    work = sum(math.prod(grid) * length for grid, length in zip(grids, lengths, strict=True))
    return work / (math.prod(grids[-1]) * sum(lengths))


def feasible(plans: Sequence[Plan], budget: float) -> list[Plan]:
    """The plans whose density is within 0.02 of the budget.

    Raises:
        ConfigError: if there is none; it names the three nearest.
    """
    fitting = [plan for plan in plans if abs(plan.density - budget) <= TOLERANCE + 1e-9]
    if not fitting:
        different = {plan.grids: plan for plan in plans}.values()  # small clips round to the same grids
        nearest = sorted(different, key=lambda plan: abs(plan.density - budget))[:NEAREST]
        when = "later" if nearest[0].density > budget else "earlier"
        listed = "".join(f"\n  {plan}: {_parameters(plan)}" for plan in nearest)
        raise ConfigError(
            f"no plan has a density within {TOLERANCE} of budget={budget:g}; the nearest are these, which you get with "
            f"the parameters beside them, or let the stages end {when} (rates=):{listed}"
        )
    return fitting


def _parameters(plan: Plan) -> str:
    """A smaller budget means fewer frames in the first stage, too, unless `lead` makes up for it."""
    lead = plan.grids[0][0] / (plan.grids[-1][0] * plan.density)
    return f"budget={plan.density:.3f}, lead={lead:.3f}"


def choose(plans: Sequence[Plan], budget: float, space: float, time: float) -> Plan:
    """Of the plans that meet the budget, the one whose gains in space and time are nearest to the demands.

    Args:
        plans: every plan that may be chosen.
        budget: the density to be met.
        space: demand of space; see `demands`.
        time: demand of time.

    Raises:
        ConfigError: if no plan meets the budget.
    """
    fitting = feasible(plans, budget)
    pixels, frames = [plan.spatial**2 for plan in fitting], [plan.frames for plan in fitting]
    pixel_range, frame_range = max(max(pixels) - min(pixels), 1e-8), max(max(frames) - min(frames), 1)

    def rank(plan: Plan) -> tuple[float, ...]:
        spatial_gain = (plan.spatial**2 - min(pixels)) / pixel_range
        temporal_gain = (plan.frames - min(frames)) / frame_range
        score = -0.5 * (spatial_gain - space) ** 2 - 0.5 * (temporal_gain - time) ** 2
        return score, -abs(plan.density - budget), plan.density, plan.spatial, plan.frames

    return max(fitting, key=rank)


# --- demands of a clip


def motion(clean: Tensor) -> float:
    """How far the image moves from frame to frame, in latent pixels: one Lucas-Kanade vector per pair.

    Args:
        clean: estimate of the clean latents, `[B, C, T, H, W]`.

    Returns:
        the mean length of the vectors over pairs and batch; 0 for a clip of one frame.
    """
    frames = clean.float().mean(dim=1)
    if frames.shape[1] < 2:
        return 0.0
    std, mean = torch.std_mean(frames, dim=(-2, -1), keepdim=True, correction=0)
    frames = (frames - mean) / std.clamp(min=FLAT)
    earlier, change = frames[:, :-1].flatten(0, 1), (frames[:, 1:] - frames[:, :-1]).flatten(0, 1)
    sobel = clean.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=torch.float32) / 8
    kernels = torch.stack([sobel, sobel.T])[:, None]
    gx, gy = functional.conv2d(earlier[:, None], kernels, padding=1).unbind(dim=1)

    def total(product: Tensor) -> Tensor:
        return product.sum(dim=(-2, -1))

    a11, a22, a12 = total(gx * gx), total(gy * gy), total(gx * gy)
    b1, b2 = -total(gx * change), -total(gy * change)
    det = (a11 * a22 - a12 * a12).clamp(min=FLAT)
    u, v = (b1 * a22 - b2 * a12) / det, (b2 * a11 - b1 * a12) / det
    return float((u * u + v * v).sqrt().mean())


def texture(clean: Tensor) -> float:
    """The share of a clip's power at fine spatial frequencies: 0.607 for white noise, near 0 for smooth images.

    Args:
        clean: estimate of the clean latents, `[B, C, T, H, W]`.
    """
    clean = clean.float()
    std, mean = torch.std_mean(clean, dim=(-3, -2, -1), keepdim=True, correction=0)
    spectrum = torch.fft.fft2((clean - mean) / std.clamp(min=FLAT), norm="ortho")
    power = torch.fft.fftshift(spectrum, dim=(-2, -1)).abs().square().sum(dim=(0, 1, 2))
    # The zero frequency of an even size lies half a bin beside the middle of this grid; DVG's does, too.
    fy, fx = (torch.linspace(-1, 1, size, device=clean.device) for size in power.shape)
    radius = (fy[:, None].square() + fx[None].square()).sqrt() / math.sqrt(2)
    return float(power[radius >= FINE].sum() / power.sum().clamp(min=FLAT))


def demands(fine: float, moved: float) -> tuple[float, float]:
    """Demands of space and of time, which add up to 1.

    Args:
        fine: as `texture` measures it; in `[0, 1]`.
        moved: bounded motion `m / (1 + m)`; in `[0, 1]`.
    """
    space = 1 / (1 + math.exp(TEMPERATURE * (moved - fine)))
    return space, 1 - space
