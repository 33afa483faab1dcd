"""DVG's plan: how long each stage is, how coarse, and which of the plans that meet the budget suits the clip.

A *grid* is `(frames, height, width)` in latent pixels. DVG, arXiv:2605.21042; the figures were read in its code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from torch import Tensor

from hasten.errors import ConfigError, ScheduleError, unknown
from hasten.resolution.method import ResolutionMethod

__all__ = [
    "Grid",
    "Plan",
    "StagedMethod",
    "choose",
    "density",
    "feasible",
    "stage_grid",
    "stage_lengths",
    "switch_steps",
]

Grid = tuple[int, int, int]
NoiseName = Literal["field", "anchor", "independent"]
RAISED = (0.0, 2.0, 4.0, 4.0)  # gives 7, 9, 11, 11 for HunyuanVideo's 7 and 5, 7, 9, 9 for Wan's 5
TOLERANCE = 0.02  # how far a plan's density may be from the budget
NEAREST = 3  # plans that an error names


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


def switch_steps(steps: int, rates: Sequence[float]) -> tuple[int, ...]:
    """The steps at whose end the next stage takes over, for instance 14, 25 and 36 of 50.

    Raises:
        ScheduleError: if the run is too short to have all stages.
    """
    switches = tuple(int(steps * rate) for rate in rates)
    if switches[0] < 1 or len(set(switches)) != len(switches):
        fewest = next(n for n in range(1, 10_000) if _distinct([int(n * rate) for rate in rates]))
        raise ScheduleError(
            f"a run of {steps} steps is too short for {len(rates) + 1} stages with rates={tuple(rates)}; "
            f"use at least {fewest} steps"
        )
    return switches


def _distinct(switches: list[int]) -> bool:
    return switches[0] >= 1 and len(set(switches)) == len(switches)


def stage_lengths(steps: int, rates: Sequence[float]) -> tuple[int, ...]:
    """Steps of each stage; the step at which a stage ends counts as the first one of the next stage.

    Its forward still runs on the coarser grid, so that a run computes slightly less than its density says.
    """
    edges = (0, *switch_steps(steps, rates), steps)
    return tuple(end - start for start, end in pairwise(edges))


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
        space: demand of space; see `demand.shares`.
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


@dataclass(frozen=True, kw_only=True)
class StagedMethod(ResolutionMethod):
    """Base of the methods whose stages are uniform grids.

    Args:
        rates: share of the run at which each stage but the last one ends.
        shifts: of the noise levels in each stage. `"raised"`: the scheduler's own, plus 0, 2, 4 and 4; a value for each
            stage; None keeps the pipeline's own levels throughout.
        noise: where the noise of a stage is read. `"field"`: from the full-size noise that the pipeline began with, as
            its low-pass; `"anchor"`: from the same, at the coordinates of the cells; `"independent"`: fresh at each
            switch.
        smooth: share of a 3x3 mean in the clean estimate at the end of the first stage.
    """

    rates: tuple[float, ...] = (0.28, 0.5, 0.72)
    shifts: tuple[float, ...] | Literal["raised"] | None = "raised"
    noise: NoiseName = "field"
    smooth: float = 0.3

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", tuple(self.rates))
        if not self.rates or list(self.rates) != sorted(set(self.rates)) or not 0 < self.rates[0] <= self.rates[-1] < 1:
            raise ConfigError(
                f"rates must be increasing and between 0 and 1, such as (0.28, 0.5, 0.72), got {self.rates}"
            )
        if self.noise not in get_args(NoiseName):
            raise unknown("noise", self.noise, get_args(NoiseName))
        if not 0 <= self.smooth <= 1:
            raise ConfigError(f"smooth is a share between 0 and 1, got {self.smooth}")
        self._check_shifts()

    def _check_shifts(self) -> None:
        stages = len(self.rates) + 1
        if isinstance(self.shifts, str):
            if self.shifts != "raised":
                raise unknown("shifts", self.shifts, ("raised",))
            if stages != len(RAISED):
                raise ConfigError(f"shifts='raised' is made for 4 stages; give the {stages} shifts, or None")
        elif self.shifts is not None:
            object.__setattr__(self, "shifts", tuple(self.shifts))
            if len(self.shifts) != stages or min(self.shifts) <= 0:
                raise ConfigError(f"shifts needs a positive value for each of the {stages} stages, got {self.shifts}")

    def first(self, full: Grid, patch: Grid, steps: int) -> Grid:
        """The grid of the first stage.

        Raises:
            ConfigError, ScheduleError: if the method cannot serve latents of this size or a run of this length.
        """
        raise NotImplementedError

    def plan(self, clean: Tensor, full: Grid, patch: Grid, steps: int) -> Plan:
        """The grids of all stages, decided at the end of the first one.

        Args:
            clean: estimate of the clean latents on the first stage's grid, `[B, C, t, h, w]`, float32.
            full: the full grid.
            patch: latent pixels that make one token, along each dimension.
            steps: of the run.
        """
        raise NotImplementedError

    def ratios(self, own: float | None) -> tuple[float, ...]:
        """Each stage's shift over the scheduler's own; 1 keeps the pipeline's noise levels."""
        if self.shifts is None:
            return (1.0,) * (len(self.rates) + 1)
        if own is None:
            raise ConfigError(
                "the scheduler shifts its noise levels by the image's size, so that a stage's shift has no meaning; "
                "use shifts=None, or a scheduler with use_dynamic_shifting=False"
            )
        wanted = tuple(own + more for more in RAISED) if isinstance(self.shifts, str) else self.shifts
        return tuple(shift / own for shift in wanted)
