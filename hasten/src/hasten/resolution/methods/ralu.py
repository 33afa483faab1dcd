"""RALU: coarse, then edges fine, then all; each jump goes back in time. "RALU", CVPR 2026 (code read).

Three stages with shifts of their own, which end at noise levels from which a jump goes back by the factor `z` with
independent noise (`jumps.py`, `ladders.py`). Edges of the decoded clean estimate (Canny) are promoted first.

Departures: tokens that do not jump get noise of `sigma' sqrt(1 - 1/z^2)`, with which they arrive at `sigma'` (the
code's is too much by `1/z^2` of its variance); latent pixels are enlarged instead of packed tokens; no noise is added
to the scores, equal ones go by their place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hasten.errors import ConfigError, unknown
from hasten.registry import method
from hasten.resolution.ladders import Stages
from hasten.resolution.noise import Rewind, anchor_noise, fresh_children
from hasten.resolution.positions import TokenSet, unpack
from hasten.resolution.regions import Promotion, RegionMethod, Stage
from hasten.resolution.scores import edge_share
from hasten.resolution.seams import MixedState, children

__all__ = ["RALU"]

PRESETS = {
    "18": (Stages((5, 6, 7), (0.7, 0.55, 0.0), (5.019, 2.589, 2.226), 6.317), 0.3),
    "10": (Stages((2, 3, 5), (0.8, 0.7, 0.0), (8.141, 2.856, 2.193), 6.261), 0.1),
}


@method("ralu", kind="resolution", paper="RALU, CVPR 2026")
@dataclass(frozen=True, kw_only=True)
class RALU(RegionMethod):
    """Coarse, then edges fine, then all, with jumps that go back in time (RALU).

    Args:
        preset: number of evaluations of a published setting: "18" (its 4x) or "10" (its 7x).
        stages: stages of one's own, such as `fit_stages((3, 4, 4), (0.75, 0.6, 0.0))`; they go before the preset.
        share: of the coarse tokens that is fine in the second stage; the preset's by default.
    """

    preset: Literal["18", "10"] = "18"
    stages: Stages | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise unknown("preset", self.preset, PRESETS)
        stages, share = PRESETS[self.preset]
        object.__setattr__(self, "stages", self.stages or stages)
        object.__setattr__(self, "share", share if self.share is None else self.share)
        if len(self._stages.steps) != 3:
            raise ConfigError(f"RALU has three stages, got {self.stages}")
        if not 0 < self._share < 1:
            raise ConfigError(f"share is above 0 and below 1, got {self.share}")

    @property
    def _stages(self) -> Stages:
        assert self.stages is not None
        return self.stages

    @property
    def _share(self) -> float:
        assert self.share is not None
        return self.share

    @property
    def evaluations(self) -> int:
        """Steps of a run."""
        return sum(self._stages.steps)

    def promotions(self, sigmas: Tensor, size: tuple[int, int]) -> tuple[Promotion, ...]:
        coarse, mixed, _ = self._stages.steps
        return Promotion(coarse, self._share), Promotion(coarse + mixed)

    def coarse_noise(self, noise: Tensor) -> Tensor:
        return anchor_noise(noise)

    def levels(self, step: int, level: float, sigmas: Tensor) -> Tensor | None:
        return self._stages.levels(step)

    def scores(self, stage: Stage) -> Tensor:
        return edge_share(stage.pipe, unpack(stage.clean, stage.size))

    def promote(self, state: MixedState, new: Tensor, stage: Stage) -> float:
        rewind = Rewind(stage.level, self._stages.z)
        noise, canvas = stage.draw(), stage.canvas
        large = canvas.paint(noise, stage.fine_size)
        born = canvas.read(fresh_children(canvas.paint(state.coarse, stage.size), large, rewind))
        older = rewind.beta * state.fine + rewind.staying * noise
        few = canvas.read(anchor_noise(large))
        state.coarse = rewind.beta * state.coarse + rewind.staying * few
        state.fine = torch.where(children(new), born, older)
        state.tokens = TokenSet(state.tokens.fine | new)
        return rewind.level
