"""DVG: dynamic video generation in four stages, planned in space and time. "DVG", arXiv:2605.21042.

A run has four stages, at rates (0.28, 0.50, 0.72) of its steps. Side of the image: 0.5, s, 1, 1 of the full one;
frames: t1, f, f, T with `t1 = round(0.8 B T)`. At the end of the first stage `s` and `f` are chosen so that tokens
times steps are the share `B` of a full run (within 0.02), by how much the clip moves and how much fine texture it has:

    M_s = softmax(2.6 m_s, 2.6 m_t)[0],   M_t = 1 - M_s,   m_t = motion / (1 + motion)
    choice = argmax -(g_s - M_s)^2 / 2 - (g_t - M_t)^2 / 2

with `g` the gains of a plan, scaled to [0, 1] over the plans that meet the budget. Between stages the clean estimate
`x0 = x - sigma v` is enlarged and noised again, `x' = (1 - sigma') x0 + sigma' E`, with noise `E` that is bound to the
coordinate. Each stage has its own shift of the noise levels; see `plan.py` and `layouts.py`.

Departures:
    the noise of all stages is read from the pipeline's own noise (`noise="anchor"` at DVG's coordinates, `"field"` as
    its low-pass), the first stage included, where DVG draws the first stage apart and hashes the rest with one seed;
    `shifts="raised"` adds 0, 2, 4, 4 to the scheduler's shift, which is DVG's table at its shifts of 7 and 5;
    coordinates of later stages are moved by a cell where they would miss one of the first stage's;
    the border is smoothed over the pixels that are there; density counts whole patches;
    one plan serves a batch, by the mean of its demands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

from torch import Tensor

from hasten.errors import ConfigError
from hasten.parameters import Range
from hasten.registry import method
from hasten.resolution.layouts import Grid
from hasten.resolution.plan import Plan, choose, demands, density, feasible, motion, stage_grid, texture
from hasten.resolution.planned import PlannedEngine, PlannedMethod, stage_lengths

__all__ = ["DVG"]

STAGES = 4
TENTHS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # candidates for the side of the second stage
TWENTIETHS = tuple(side / 20 for side in range(1, 21))
Compress = Literal["both", "space", "time"]


@method("dvg", kind="resolution", paper="DVG, arXiv:2605.21042")
@dataclass(frozen=True, kw_only=True)
class DVG(PlannedMethod):
    """Begin with few frames and pixels and refine in planned stages (DVG)."""

    budget: Annotated[float, Range(above=0, most=1), "tokens times steps, relative to a run at full size"] = 0.5
    start: Annotated[float, Range(above=0, most=1), "side of the first stage's image, relative to the full one"] = 0.5
    lead: Annotated[float, Range(above=0), "frames of the first stage, relative to `budget` times all frames"] = 0.8
    spatial: Annotated[
        float | Literal["plan"], Range(above=0, most=1), "side of the second stage, relative to the full one"
    ] = "plan"
    temporal: Annotated[int | Literal["plan"], Range(1), "latent frames of the second and third stage"] = "plan"
    compress: Annotated[
        Compress, "for comparison at equal density: less space alone (all frames), or less time alone (full images)"
    ] = "both"
    stages: Annotated[
        tuple[tuple[float, float], ...] | None,
        Range(above=0, most=1),
        "explicit (spatial, temporal) shares for the four stages instead of all that",
    ] = None

    def check(self) -> None:
        super().check()
        if len(self.rates) != STAGES - 1:
            raise ConfigError(f"DVG has {STAGES} stages and needs {STAGES - 1} rates, got {self.rates}")
        if self.spatial != "plan" and self.spatial < self.start:
            raise ConfigError(f"spatial must be 'plan' or a share from start={self.start:g} to 1, got {self.spatial}")
        if self.compress != "both" and (self.spatial, self.temporal) != ("plan", "plan"):
            raise ConfigError(f"compress={self.compress!r} determines the stages; leave spatial and temporal at 'plan'")
        self._check_stages()

    def _check_stages(self) -> None:
        if self.stages is None:
            return
        pairs = [*self.stages, (1.0, 1.0)]
        rising = all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(pairs))
        if len(self.stages) != STAGES or self.stages[-1] != (1.0, 1.0) or not rising:
            raise ConfigError(
                f"stages needs {STAGES} pairs (spatial, temporal) of shares "
                f"that do not fall and end at (1, 1), got {self.stages}"
            )

    def engine(self, pipe: Any) -> PlannedEngine:
        return PlannedEngine(pipe, self)

    def first(self, full: Grid, patch: Grid, steps: int) -> Grid:
        plans = self._candidates(full, patch, steps)
        _, height, width = plans[0].grids[0]
        side = self.stages[0][0] if self.stages else (1.0 if self.compress == "time" else self.start)
        if side < 1 and (height == full[1] or width == full[2]):
            raise ConfigError(
                f"latents of {full[1]}x{full[2]} in patches of {patch[1]}x{patch[2]} cannot be made {side:g} times as "
                "large; use a larger height and width"
            )
        if self.stages is None:
            plans = feasible(plans, self.budget)  # before anything is computed
        return self._nearest(plans).grids[0]

    def plan(self, clean: Tensor, full: Grid, patch: Grid, steps: int) -> Plan:
        plans = self._candidates(full, patch, steps)
        if self.stages is not None or self.compress != "both":
            return self._nearest(plans)
        moved = motion(clean)
        # A single frame says nothing about motion, and the two demands are then taken as equal.
        space, time = (0.5, 0.5) if clean.shape[2] < 2 else demands(texture(clean), moved / (1 + moved))
        return choose(plans, self.budget, space, time)

    def _nearest(self, plans: list[Plan]) -> Plan:
        """The plan nearest to the budget; all have the same first stage where there is a choice by demands."""
        return min(plans, key=lambda plan: (abs(plan.density - self.budget), -plan.density))

    def _candidates(self, full: Grid, patch: Grid, steps: int) -> list[Plan]:
        lengths = stage_lengths(steps, self.rates)
        if self.stages is not None:
            frames = [max(1, round(full[0] * share)) for _, share in self.stages]
            return [_plan(full, patch, lengths, [side for side, _ in self.stages], frames)]
        if self.compress == "space":
            sides = [side for side in TWENTIETHS if side >= self.start]
            return [_plan(full, patch, lengths, (self.start, s, s, 1), (full[0],) * STAGES) for s in sides]
        if self.compress == "time":
            return [_plan(full, patch, lengths, (1.0,) * STAGES, (f, f, f, full[0])) for f in range(1, full[0] + 1)]
        first = min(max(round(full[0] * self.lead * self.budget), 1), full[0])
        return [
            _plan(full, patch, lengths, (self.start, s, 1, 1), (first, f, f, full[0]))
            for s in ([s for s in TENTHS if s >= self.start] if self.spatial == "plan" else [self.spatial])
            for f in (range(first, full[0] + 1) if self.temporal == "plan" else [self._frames(first, full[0])])
        ]

    def _frames(self, first: int, most: int) -> int:
        assert self.temporal != "plan"
        if not first <= self.temporal <= most:
            raise ConfigError(f"temporal must be between the {first} frames of the first stage and all {most}")
        return self.temporal


def _plan(full: Grid, patch: Grid, lengths: Sequence[int], sides: Sequence[float], frames: Sequence[int]) -> Plan:
    grids: list[Grid] = []
    for side, count in zip(sides, frames, strict=True):
        grids.append(stage_grid(full, side, count, patch, grids[-1] if grids else (1, 1, 1)))
    return Plan(tuple(grids), density(grids, lengths), sides[1], frames[1])
