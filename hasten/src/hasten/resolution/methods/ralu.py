"""RALU: coarse, then edges fine, then all; each jump goes back in time. "RALU", CVPR 2026 (code read).

Three stages with shifts of their own, which end at noise levels from which a jump goes back by the factor `z` with
independent noise (`noise.py`). Edges of the decoded clean estimate (Canny) are promoted first.

Departures: tokens that do not jump get noise of `sigma' sqrt(1 - 1/z^2)`, with which they arrive at `sigma'` (the
code's is too much by `1/z^2` of its variance); latent pixels are enlarged instead of packed tokens; no noise is added
to the scores, equal ones go by their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.errors import ConfigError
from hasten.parameters import Range
from hasten.registry import method
from hasten.resolution.noise import Rewind, anchor_noise, descend, fresh_children
from hasten.resolution.packed import MixedState
from hasten.resolution.positions import TokenSet, children, unpack
from hasten.resolution.regions import Promotion, PromotionInput, RegionMethod, edge_share

__all__ = ["RALU", "Stages", "fit_stages", "mismatch"]

Floats = NDArray[np.float64]
REFERENCE_SHIFT = 3.0  # of the schedule that a fit imitates
GRID = 1000


@dataclass(frozen=True)
class Stages:
    """RALU's stages: each has its own shift and ends at a noise level, from which a jump goes back.

    Attributes:
        steps: of each stage.
        ends: noise level at the end of each stage, 0 last.
        shifts: of each stage.
        z: how far the jumps go back, see `noise.py`.
    """

    steps: tuple[int, ...]
    ends: tuple[float, ...]
    shifts: tuple[float, ...]
    z: float

    def __post_init__(self) -> None:
        if not len(self.steps) == len(self.ends) == len(self.shifts) or len(self.steps) < 2:
            raise ConfigError(
                f"stages have as many steps, ends and shifts, two or more: {self.steps}, {self.ends}, {self.shifts}"
            )
        if min(self.steps) < 1 or self.ends[-1] != 0 or any(not 0 < end < 1 for end in self.ends[:-1]):
            raise ConfigError(f"stages have steps from 1 and end at levels in (0, 1), the last at 0: {self}")
        if any(begin <= end for begin, end in zip(self.starts, self.ends, strict=True)):
            raise ConfigError(f"a stage of {self} would begin below the level that it ends at")

    @property
    def starts(self) -> tuple[float, ...]:
        """Noise level at the start of each stage."""
        return (1.0, *(Rewind(end, self.z).level for end in self.ends[:-1]))

    def levels(self, step: int) -> Tensor:
        """Noise levels from a step on; where a stage ends the level is that before the jump, but for the first."""
        lists = [descend(*stage) for stage in zip(self.starts, self.ends, self.steps, self.shifts, strict=True)]
        whole = torch.cat([lists[0], *(levels[1:] for levels in lists[1:])])
        done = 0
        for levels, steps in zip(lists, self.steps, strict=True):
            if step == done:
                return torch.cat([levels[:1], whole[done + 1 :]])
            done += steps
        raise ConfigError(f"no stage of {self} begins at step {step}")


PRESETS = {
    "18": (Stages((5, 6, 7), (0.7, 0.55, 0.0), (5.019, 2.589, 2.226), 6.317), 0.3),
    "10": (Stages((2, 3, 5), (0.8, 0.7, 0.0), (8.141, 2.856, 2.193), 6.261), 0.1),
}


@method("ralu", kind="resolution", paper="RALU, CVPR 2026")
@dataclass(frozen=True, kw_only=True)
class RALU(RegionMethod):
    """Coarse, then edges fine, then all, with jumps that go back in time (RALU)."""

    preset: Annotated[Literal["18", "10"], "number of steps of a published setting: the paper's 4x or its 7x"] = "18"
    stages: Annotated[
        Stages | None, "other stages, such as `fit_stages((3, 4, 4), (0.75, 0.6, 0.0))`, in place of the preset's"
    ] = None
    share: Annotated[
        float | None,
        Range(above=0, below=1),
        "of the coarse tokens that is fine in the second stage; the preset's by default",
    ] = None

    def check(self) -> None:
        super().check()
        if len(self._stages.steps) != 3:
            raise ConfigError(f"RALU has three stages, got {self.stages}")

    @property
    def _stages(self) -> Stages:
        return PRESETS[self.preset][0] if self.stages is None else self.stages

    @property
    def num_inference_steps(self) -> int:
        """Steps of a run."""
        return sum(self._stages.steps)

    def promotions(self, sigmas: Tensor, size: tuple[int, int]) -> tuple[Promotion, ...]:
        coarse, mixed, _ = self._stages.steps
        share = PRESETS[self.preset][1] if self.share is None else self.share
        return Promotion(coarse, share), Promotion(coarse + mixed)

    def coarse_noise(self, noise: Tensor) -> Tensor:
        return anchor_noise(noise)

    def levels(self, step: int, level: float, sigmas: Tensor) -> Tensor | None:
        return self._stages.levels(step)

    def scores(self, promotion: PromotionInput) -> Tensor:
        return edge_share(promotion.pipe, unpack(promotion.clean, promotion.size))

    def promote(self, state: MixedState, new: Tensor, promotion: PromotionInput) -> float:
        rewind = Rewind(promotion.level, self._stages.z)
        noise, pixels = promotion.fresh_noise(), promotion.pixels
        fine_noise = pixels.to_pixels(noise, promotion.fine_size)
        coarse_noise = pixels.to_tokens(anchor_noise(fine_noise))
        coarse = pixels.to_pixels(state.coarse, promotion.size)
        promoted = pixels.to_tokens(fresh_children(coarse, fine_noise, rewind))
        remaining = rewind.beta * state.fine + rewind.staying * noise
        state.coarse = rewind.beta * state.coarse + rewind.staying * coarse_noise
        state.fine = torch.where(children(new), promoted, remaining)
        state.tokens = TokenSet(state.tokens.fine | new)
        return rewind.level


# --- the fit of stages


def _density(t: Floats, shift: float, start: float, end: float) -> Floats:
    """Density of a shifted schedule over the times of a stage, `t = 1 - sigma`; its sum is 1."""
    inside = (t >= start) & (t <= end)
    density = np.where(inside, shift / (1 + (shift - 1) * t) ** 2, 0.0)
    return np.asarray(density / density.sum())


def mismatch(stages: Stages) -> float:
    """Jensen-Shannon distance between the noise levels that stages pass and those of a schedule with shift 3.

    The schedule passes again what the jumps go back over.
    """
    from scipy.spatial.distance import jensenshannon

    t = np.linspace(0, 1, GRID)
    starts, ends = ([1 - level for level in levels] for levels in (stages.starts, stages.ends))
    passed, wanted = np.zeros(GRID), _density(t, REFERENCE_SHIFT, 0.0, 1.0)
    for steps, shift, start, end in zip(stages.steps, stages.shifts, starts, ends, strict=True):
        passed += steps * _density(t, shift, start, end) / sum(stages.steps)
    for start, end in zip(starts[1:], ends[:-1], strict=True):
        wanted = wanted + (end - start) * _density(t, REFERENCE_SHIFT, start, end)
    return float(jensenshannon(passed, wanted / wanted.sum()))


def fit_stages(steps: Sequence[int], ends: Sequence[float]) -> Stages:
    """Stages whose shifts and `z` make `mismatch` small (RALU's fit).

    Args:
        steps: of each stage.
        ends: noise level at the end of each stage, 0 last.
    """

    from scipy.optimize import minimize  # heavy, and needed by the fit alone

    def stages(parameters: Floats) -> Stages:
        *shifts, z = (float(value) for value in parameters)
        return Stages(tuple(steps), tuple(ends), tuple(shifts), z)

    start = np.array([REFERENCE_SHIFT] * len(steps) + [2.0])
    bounds = [(0.5, 10.0)] * len(steps) + [(2.0, 100.0)]
    return stages(minimize(lambda x: mismatch(stages(x)), start, method="L-BFGS-B", bounds=bounds).x)
