"""Noise levels of stages: shifted schedules that go on from a level, RALU's stages, the spectral switch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from hasten.errors import ConfigError
from hasten.resolution.noise import Rewind

__all__ = ["Stages", "descend", "fit_stages", "mismatch", "switch_level"]

Floats = NDArray[np.float64]
REFERENCE_SHIFT = 3.0  # of the schedule that a fit imitates
GRID = 1000


def descend(start: float, end: float, steps: int, shift: float) -> Tensor:
    """`[steps + 1]` noise levels from `start` to `end`, even in `t` of `sigma = h t / (1 + (h - 1) t)`, `h` the shift.

    Args:
        start: up to 1.
        end: from 0, below `start`.
        steps: at least 1.
        shift: above 0.
    """
    first, last = (level / (shift - (shift - 1) * level) for level in (start, end))
    t = torch.linspace(first, last, steps + 1, dtype=torch.float64)
    return (shift * t / (1 + (shift - 1) * t)).float()


@dataclass(frozen=True)
class Stages:
    """RALU's stages: each has its own shift and ends at a noise level, from which a jump goes back.

    Attributes:
        steps: of each stage.
        ends: noise level at the end of each stage, 0 last.
        shifts: of each stage.
        z: how far the jumps go back, see `jumps.py`.
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


def _density(t: Floats, shift: float, start: float, end: float) -> Floats:
    """How densely a shifted schedule looks at the times of a stage, `t = 1 - sigma`; its sum is 1."""
    inside = (t >= start) & (t <= end)
    density = np.where(inside, shift / (1 + (shift - 1) * t) ** 2, 0.0)
    return np.asarray(density / density.sum())


def mismatch(stages: Stages) -> float:
    """Jensen-Shannon distance between the noise levels that stages look at and a schedule with shift 3.

    The schedule looks again at what the jumps go back over.
    """
    t = np.linspace(0, 1, GRID)
    starts, ends = ([1 - level for level in levels] for levels in (stages.starts, stages.ends))
    looked, wanted = np.zeros(GRID), _density(t, REFERENCE_SHIFT, 0.0, 1.0)
    for steps, shift, start, end in zip(stages.steps, stages.shifts, starts, ends, strict=True):
        looked += steps * _density(t, shift, start, end) / sum(stages.steps)
    for start, end in zip(starts[1:], ends[:-1], strict=True):
        wanted = wanted + (end - start) * _density(t, REFERENCE_SHIFT, start, end)
    return float(jensenshannon(looked, wanted / wanted.sum()))


def fit_stages(steps: Sequence[int], ends: Sequence[float]) -> Stages:
    """Stages whose shifts and `z` make `mismatch` small (RALU's fit).

    Args:
        steps: of each stage.
        ends: noise level at the end of each stage, 0 last.
    """

    def stages(parameters: Floats) -> Stages:
        *shifts, z = (float(value) for value in parameters)
        return Stages(tuple(steps), tuple(ends), tuple(shifts), z)

    start = np.array([REFERENCE_SHIFT] * len(steps) + [2.0])
    bounds = [(0.5, 10.0)] * len(steps) + [(2.0, 100.0)]
    return stages(minimize(lambda x: mismatch(stages(x)), start, method="L-BFGS-B", bounds=bounds).x)


def switch_level(side: int, delta: float, power: tuple[float, float]) -> float:
    """The noise level below which details beyond a coarse grid begin to show (spectral progressive diffusion).

    Args:
        side: shorter side of the coarse grid in latent pixels; its highest frequency is half of it.
        delta: how much of a detail's power counts as showing.
        power: `(A, b)` of the clean latents' power spectrum `A w^-b`.

    Raises:
        ConfigError: if the latents have less power than `delta` there.
    """
    amplitude, slope = power
    detail = amplitude * (side // 2) ** -slope
    if not 0 < delta < 1 + detail:
        raise ConfigError(f"delta must be above 0 and below 1 + {detail:.3g}, got {delta}")
    return 1 / (1 + math.sqrt(delta / (detail * (1 + detail - delta))))
