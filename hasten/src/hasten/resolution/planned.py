"""Video pipelines whose stages are uniform grids: their methods' base, and their engine.

The true latents of a coarse stage are a smaller clip. Where stages meet, the clean estimate is enlarged and noised
again. The model makes its positions from the shape of the latents. Noise levels of a later stage are written into the
scheduler's own lists (made again for each run), so that the loop, the choice between two experts and the scheduler's
step all go by them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor

from hasten.errors import AdapterError, ConfigError, ScheduleError
from hasten.models import patch_size
from hasten.parameters import Range
from hasten.pipeline.hooks import Forward
from hasten.pipeline.scheduler import NoiseLevels, own_shift, shift_levels
from hasten.resolution.engine import ResolutionEngine, ResolutionMethod, ResolutionRun, with_sample
from hasten.resolution.layouts import Axes, Grid, block_noise, enlarge, gather, nested_axes, pick, smooth, spread
from hasten.resolution.noise import fresh_noise, image_generators
from hasten.resolution.plan import Plan
from hasten.resolution.report import ForwardSize, ResolutionRecord
from hasten.resolution.sampler_step import SamplerStep

__all__ = ["PlannedEngine", "PlannedMethod", "PlannedRecord", "stage_lengths", "switch_steps"]

NoiseName = Literal["field", "anchor", "independent"]
RAISED = (0.0, 2.0, 4.0, 4.0)  # gives 7, 9, 11, 11 for HunyuanVideo's 7 and 5, 7, 9, 9 for Wan's 5


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


@dataclass(frozen=True, kw_only=True)
class PlannedMethod(ResolutionMethod):
    """Base of the methods whose stages are uniform grids."""

    rates: Annotated[
        tuple[float, ...], Range(above=0, below=1), "share of the run at which each stage but the last one ends, rising"
    ] = (0.28, 0.5, 0.72)
    shifts: Annotated[
        tuple[float, ...] | Literal["raised"] | None,
        Range(above=0),
        "of the noise levels, one for each stage; raised is the scheduler's plus 0, 2, 4 and 4; None the pipeline's",
    ] = "raised"
    noise: Annotated[
        NoiseName,
        "where a stage's noise is read: the pipeline's own as its low-pass (field) or at the coordinates of the cells "
        "(anchor), or fresh at each switch",
    ] = "field"
    smooth: Annotated[float, Range(0, 1), "share of a 3x3 mean in the clean estimate at the end of the first stage"] = (
        0.3
    )

    def check(self) -> None:
        super().check()
        if list(self.rates) != sorted(set(self.rates)):
            raise ConfigError(f"rates must increase, such as (0.28, 0.5, 0.72), got {self.rates}")
        stages = len(self.rates) + 1
        if self.shifts == "raised" and stages != len(RAISED):
            raise ConfigError(f"shifts='raised' is made for 4 stages; give the {stages} shifts, or None")
        if isinstance(self.shifts, tuple) and len(self.shifts) != stages:
            raise ConfigError(f"shifts needs one value for each of the {stages} stages, got {self.shifts}")

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


@dataclass(frozen=True, kw_only=True)
class PlannedRecord(ResolutionRecord):
    """One sampler step; see `ResolutionRecord`.

    Attributes:
        stage: whose grid the transformer ran on, from 0.
        grid: frames, height and width of the latents that it ran on.
    """

    stage: int
    grid: Grid

    @property
    def stage_name(self) -> str:
        return "x".join(map(str, self.grid))


@dataclass(kw_only=True)
class PlannedRun(ResolutionRun):
    """What is remembered of the call under way.

    Attributes:
        own_levels: the pipeline's own noise levels, `[steps + 1]`.
        full: the full grid.
        patch: latent pixels of one token, along each dimension.
        switches: steps at whose end the next stage takes over.
        ratios: each stage's shift over the scheduler's own.
        layouts: axes of the stages, as far as they are planned.
        stage: from 0.
        noise: the full-size noise that the pipeline began with, `[B, C, T, H, W]`, float32.
        latents: the true latents of a coarse stage, float32; None where the pipeline's are true, and before the first
            step is taken.
        unchecked: whether levels were written since the transformer's timestep was last compared with them.
    """

    own_levels: Tensor
    full: Grid
    patch: Grid
    switches: tuple[int, ...]
    ratios: tuple[float, ...]
    layouts: list[Axes]
    stage: int = 0
    noise: Tensor | None = None
    latents: Tensor | None = None
    unchecked: bool = True

    @property
    def axes(self) -> Axes:
        """Coordinates of the stage's cells."""
        return self.layouts[self.stage]

    @property
    def grid(self) -> Grid:
        """Grid of the stage."""
        frames, rows, columns = self.axes
        return len(frames), len(rows), len(columns)

    @property
    def coarse(self) -> bool:
        return self.grid != self.full


class PlannedEngine(ResolutionEngine[PlannedRun, PlannedRecord, Plan]):
    """Runs one video pipeline in planned stages; see `ResolutionEngine`.

    Args:
        pipe: a text-to-video pipeline of Wan (also with two experts) or HunyuanVideo: the latents are all that has a
            size, and the positions are made from their shape.
        method: the stages.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("WanPipeline", "HunyuanVideoPipeline")
    transformers: ClassVar[tuple[str, ...]] = ("transformer", "transformer_2")
    multistep: ClassVar[bool] = True
    method: PlannedMethod

    def check(self) -> None:
        self.method.ratios(own_shift(self.pipe.scheduler))

    def begin(self, number: int, levels: NoiseLevels, module: Any, arguments: Mapping[str, Any]) -> PlannedRun:
        full: Grid = tuple(arguments["hidden_states"].shape[2:])
        patch = patch_size(module.config)
        run = PlannedRun(
            number=number,
            levels=levels,
            own_levels=levels.sigmas.clone(),
            full=full,
            patch=patch,
            switches=switch_steps(len(levels), self.method.rates),
            ratios=self.method.ratios(own_shift(self.scheduler)),
            layouts=nested_axes([self.method.first(full, patch, len(levels)), full])[:1],
        )
        self._write_levels(run, 1)  # pure noise is the same under any shift
        return run

    def coarse_forward(self, run: PlannedRun, module: Any, forward: Forward, arguments: Mapping[str, Any]) -> Any:
        hidden, timestep = arguments["hidden_states"], arguments["timestep"]
        self._check_timestep(run, timestep)
        latents = self._stage_noise(run, hidden.float()) if run.latents is None else run.latents
        latents = latents.to(hidden.dtype).repeat(len(hidden) // len(latents), 1, 1, 1, 1)
        if timestep.dim() == 2:  # one per token; all the same in text to video
            timestep = timestep[:, :1].expand(-1, _tokens(run.grid, run.patch))
        output = forward(**{**arguments, "hidden_states": latents, "timestep": timestep})
        return with_sample(output, spread(output[0], run.full))

    def size(self, run: PlannedRun, arguments: Mapping[str, Any]) -> ForwardSize:
        text = arguments.get("encoder_hidden_states")
        others = 0 if text is None else text.shape[1]
        own, full = _tokens(run.grid, run.patch), _tokens(run.full, run.patch)
        return ForwardSize(own, full, own + others, full + others)

    def record(self, run: PlannedRun, common: dict[str, Any]) -> PlannedRecord:
        return PlannedRecord(**common, stage=run.stage, grid=run.grid)

    def advance(self, run: PlannedRun, step: SamplerStep) -> tuple[Tensor | None, bool]:
        if run.step == 0:
            run.noise = step.sample.float()
            run.latents = self._stage_noise(run, run.noise) if run.coarse else None
        latents = self._switch(run, step) if run.step in run.switches else None
        switched = latents is not None
        if latents is None:
            if run.latents is None:
                return None, False
            latents = step.solve(gather(step.prediction, run.grid).float(), run.latents)
        run.latents = latents if run.coarse else None
        return spread(latents, run.full), switched

    def _switch(self, run: PlannedRun, step: SamplerStep) -> Tensor | None:
        """Latents of the next stage at the next step's noise level; None if the next stage is the same as this one."""
        latents = step.sample.float() if run.latents is None else run.latents
        clean = latents - run.levels[run.step] * gather(step.prediction, run.grid).float()
        old, old_ratio = run.axes, run.ratios[run.stage]
        if run.stage == 0:
            plan = self.method.plan(clean, run.full, run.patch, run.total)
            self.plans.append(plan)
            run.layouts = nested_axes(plan.grids, first=old)
        run.stage += 1
        if run.axes == old and run.ratios[run.stage] == old_ratio:
            return None
        self._write_levels(run, run.step + 1)
        clean = enlarge(clean, old, run.axes)
        if run.stage == 1 and run.axes != old:
            clean = smooth(clean, self.method.smooth)
        sigma = run.levels[run.step + 1]
        step.skip()
        assert run.noise is not None
        return (1 - sigma) * clean + sigma * self._stage_noise(run, run.noise)

    def _write_levels(self, run: PlannedRun, start: int) -> None:
        if set(run.ratios) != {1.0}:
            run.levels.write(start, shift_levels(run.own_levels, run.ratios[run.stage])[start:])
            run.unchecked = True

    def _stage_noise(self, run: PlannedRun, noise: Tensor) -> Tensor:
        """Unit noise for the grid of the stage, from the full-size noise `[B, C, T, H, W]`."""
        if self.method.noise == "field":
            return block_noise(noise, run.axes)
        if self.method.noise == "anchor" or run.stage == 0:
            return pick(noise, run.axes)
        return fresh_noise(image_generators(noise, offset=run.stage), (noise.shape[1], *run.grid), noise.device)

    def _check_timestep(self, run: PlannedRun, timestep: Tensor) -> None:
        """Raises AdapterError if the loop does not go by the levels that were written; one read per stage."""
        if not run.unchecked:
            return
        run.unchecked = False
        expected, given = float(self.scheduler.timesteps[run.step]), float(timestep.flatten()[0])
        if abs(expected - given) > 1 + 0.01 * expected:
            raise AdapterError(
                f"at step {run.step} the transformer was called with timestep {given:.1f}, but the scheduler is at "
                f"{expected:.1f}; {self.name} needs a loop over scheduler.timesteps"
            )


def _tokens(grid: Grid, patch: Grid) -> int:
    return math.prod(size // step for size, step in zip(grid, patch, strict=True))
