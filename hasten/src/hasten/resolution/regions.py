"""Images that begin coarse and are refined region by region: the engine of Fresco and of what it is compared with.

A method says after which steps tokens are promoted, how large a share, which ones, and how coarse latents become fine
ones. Everything else is in `packed.py`. A batch shares its layout.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.errors import ConfigError
from hasten.resolution.method import ResolutionMethod
from hasten.resolution.noise import low_noise
from hasten.resolution.packed import PackedEngine, PackedRun, Part, check_even, check_total
from hasten.resolution.pixel_layout import LATENTS, Canvas
from hasten.resolution.positions import TokenSet, Units
from hasten.resolution.scores import first
from hasten.resolution.seams import MixedState

__all__ = ["Layout", "Promotion", "RegionEngine", "RegionMethod", "RegionRecord", "Stage"]


@dataclass(frozen=True)
class Promotion:
    """When tokens are promoted, and how many.

    Attributes:
        after: steps that are done by then.
        share: of all coarse tokens that are fine from then on; 1 for all.
    """

    after: int
    share: float = 1.0


@dataclass(frozen=True)
class Layout:
    """Which coarse tokens are fine, `[h, w]` bool, from the end of a step on."""

    run: int
    step: int
    fine: Tensor

    def __str__(self) -> str:
        return f"{int(self.fine.sum())} of {self.fine.numel()} coarse tokens fine after step {self.step}"


@dataclass(frozen=True)
class RegionRecord:
    """One sampler step.

    Attributes:
        run: counts runs from 0.
        step: counts steps from 0.
        coarse: coarse tokens that the transformer saw.
        fine: fine tokens.
        sigma: noise level before the step.
        next_sigma: noise level after it, that of a promotion included.
        switched: whether tokens were promoted at the end of the step.
    """

    run: int
    step: int
    coarse: int
    fine: int
    sigma: float
    next_sigma: float
    switched: bool


@dataclass(frozen=True)
class Stage:
    """What a method knows when tokens are promoted.

    Attributes:
        pipe: the pipeline.
        size: rows and columns of the coarse grid of tokens.
        clean: estimate of the clean coarse tokens, `[B, n, C]`.
        snapshots: what was remembered of the coarse tokens in the steps so far, `[B, n, C]` each.
        level: noise level of the state.
        draw: makes unit noise like the fine tokens', `[B, 4 n, C]`, that is bound to nothing.
        canvas: how tokens are a image.
    """

    pipe: Any
    size: tuple[int, int]
    clean: Tensor
    snapshots: Sequence[Tensor]
    level: float
    draw: Callable[[], Tensor]
    canvas: Canvas = LATENTS

    @property
    def fine_size(self) -> tuple[int, int]:
        """Rows and columns of the fine grid of tokens."""
        return 2 * self.size[0], 2 * self.size[1]


class RegionMethod(ResolutionMethod):
    """Base of the methods, frozen dataclasses."""

    units: Units = "lr_units"

    @abstractmethod
    def promotions(self, sigmas: Tensor, size: tuple[int, int]) -> tuple[Promotion, ...]:
        """The promotions of a run, whose last one has the share 1; none for everything fine from the start.

        Args:
            sigmas: the scheduler's levels, `[steps + 1]`.
            size: rows and columns of the fine grid of tokens.
        """

    def coarse_noise(self, noise: Tensor) -> Tensor:
        """Unit noise that the coarse image begins with, from the fine one; `[B, C, H, W]`."""
        return low_noise(noise)

    def levels(self, step: int, level: float, sigmas: Tensor) -> Tensor | None:
        """Noise levels from a step on, `[steps - step + 1]`; None to leave the scheduler's as they are.

        Args:
            step: 0, or the step that follows a promotion.
            level: noise level of the state.
            sigmas: the scheduler's levels, `[steps + 1]`.
        """
        return None

    def snapshot(self, coarse: Tensor, velocity: Tensor, clean: Tensor) -> Tensor:
        """What of the coarse tokens is remembered at a step, all `[B, n, C]`."""
        return clean

    @abstractmethod
    def scores(self, stage: Stage) -> Tensor:
        """`[B, n]`, the highest are promoted first; not asked for when all tokens are."""

    @abstractmethod
    def promote(self, state: MixedState, new: Tensor, stage: Stage) -> float:
        """Make tokens fine.

        Args:
            state: at `stage.level`; changed in place.
            new: `[h, w]` bool.
            stage: what is known.

        Returns:
            the noise level of the state afterwards.
        """

    def attach(self, pipe: Any) -> RegionEngine:
        """Make the pipeline begin coarse, until `.remove()` or the end of the `with`."""
        return RegionEngine(pipe, self)


@dataclass
class _Run(PackedRun):
    promotions: dict[int, float] = field(default_factory=dict)
    snapshots: list[Tensor] = field(default_factory=list)
    sizes: Sequence[tuple[int, int]] = ()
    generator: torch.Generator | None = None


class RegionEngine(PackedEngine[_Run]):
    """Runs one image pipeline coarse first; also a context manager that removes itself at the end.

    Args:
        pipe: a pipeline of FLUX.1 or Qwen-Image, from text or editing images.
        method: what to do.

    Raises:
        TargetError: for another pipeline, or a compiled transformer.
        ConfigError: for a scheduler that cannot be served.
        AlreadyAcceleratedError: if the pipeline has such an engine already.
    """

    pipelines: ClassVar[tuple[str, ...]] = (
        "FluxPipeline",
        "FluxKontextPipeline",
        "QwenImagePipeline",
        "QwenImageEditPipeline",
        "QwenImageEditPlusPipeline",
    )

    def __init__(self, pipe: Any, method: RegionMethod) -> None:
        self.method = method
        self.records: list[RegionRecord] = []
        self.plans: list[Layout] = []
        super().__init__(pipe, type(method).__name__)

    def begin(self, number: int, total: int, sizes: Sequence[tuple[int, int]], hidden: Tensor) -> _Run:
        method, rows, columns = self.method, *sizes[0]
        if method.evaluations is not None:
            check_total(self.name, "its stages", method.evaluations, total)
        levels = method.levels(0, 1.0, self.scheduler.sigmas)
        promotions = method.promotions(self.scheduler.sigmas if levels is None else levels, sizes[0])
        run = _Run(number, total, None, promotions={p.after: p.share for p in promotions}, sizes=sizes)
        if not promotions:
            return run
        _check_promotions(self.name, promotions, total)
        check_even(self.name, sizes[:1])
        if levels is not None:
            self._set_levels(0, levels)
        noise = hidden[:, : rows * columns]
        tokens = TokenSet(torch.zeros(rows // 2, columns // 2, dtype=torch.bool, device=noise.device))
        low = self.canvas.read(method.coarse_noise(self.canvas.paint(noise, sizes[0])))
        run.state = MixedState(tokens, noise, low, torch.zeros_like(noise), self.canvas)
        return run

    def references(self, run: _Run, hidden: Tensor) -> Sequence[Part]:
        """Reference images stay fine, in the frame of the tokens that are made."""
        parts, start = [], run.sizes[0][0] * run.sizes[0][1]
        for rows, columns in run.sizes[1:]:
            # A TokenSet counts coarse tokens, of which an odd grid has no whole number; such a image is refused.
            check_even(self.name, [(rows, columns)])
            tokens = TokenSet(torch.ones(rows // 2, columns // 2, dtype=torch.bool, device=hidden.device))
            parts.append((tokens, self.units(run), hidden[:, start : start + rows * columns]))
            start += rows * columns
        return parts

    def units(self, run: _Run) -> Units:
        return self.method.units if run.step >= min(run.promotions) else "lr_units"

    def move(self, run: _Run, state: MixedState, velocity: tuple[Tensor, Tensor], sigma: float, after: float) -> None:
        coarse, fine = velocity
        clean = state.coarse - sigma * coarse
        run.snapshots.append(self.method.snapshot(state.coarse, coarse, clean))
        state.move(coarse, fine, after - sigma)
        share = run.promotions.get(run.step + 1)
        if share is None:
            return
        mask = state.tokens.fine
        size = (mask.shape[0], mask.shape[1])
        draw = partial(self._draw, run, state)
        stage = Stage(self.pipe, size, clean, run.snapshots, after, draw, self.canvas)
        level = self.method.promote(state, self._chosen(state, share, stage), stage)
        self.plans.append(Layout(run.number, run.step, state.tokens.fine))
        if level != after:
            levels = self.method.levels(run.step + 1, level, self.scheduler.sigmas)
            assert levels is not None
            self._set_levels(run.step + 1, levels)

    def record(self, run: _Run, coarse: int, fine: int, sigma: float, after: float, switched: bool) -> None:
        self.records.append(RegionRecord(run.number, run.step, coarse, fine, sigma, after, switched))

    def _chosen(self, state: MixedState, share: float, stage: Stage) -> Tensor:
        taken = state.tokens.fine
        if share >= 1:
            return ~taken
        count = int(share * taken.numel()) - int(taken.sum())
        if count < 1:
            raise ConfigError(f"{self.name} would promote {share:.0%} of {taken.numel()} coarse tokens, which is none")
        return first(self.method.scores(stage), count, taken)

    def _set_levels(self, start: int, levels: Tensor) -> None:
        """Write noise levels into the scheduler's own lists, in place, since the loop goes by them."""
        scheduler = self.scheduler
        scheduler.sigmas[start:] = levels.to(scheduler.sigmas)
        timesteps = levels[:-1] * scheduler.config.num_train_timesteps
        scheduler.timesteps[start:] = timesteps.to(scheduler.timesteps)

    @staticmethod
    def _draw(run: _Run, state: MixedState) -> Tensor:
        # The seed hangs on the user's own noise, so that a seeded call can be repeated.
        if run.generator is None:
            run.generator = torch.Generator().manual_seed(int(state.noise.flatten()[:1].cpu().view(torch.int32)))
        return torch.randn(state.noise.shape, generator=run.generator).to(state.noise.device)


def _check_promotions(name: str, promotions: Sequence[Promotion], total: int) -> None:
    after, shares = [p.after for p in promotions], [p.share for p in promotions]
    if shares[-1] < 1 or after != sorted(set(after)) or not 0 < after[0] <= after[-1] < total:
        steps = ", ".join(f"{share:.0%} after {done}" for share, done in zip(shares, after, strict=True))
        raise ConfigError(
            f"{name} promotes {steps} of {total} steps; the last promotion has to take all tokens, and a step at full "
            "size has to follow it"
        )
