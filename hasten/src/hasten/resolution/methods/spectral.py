"""Spectral progressive diffusion: coarse until details begin to show, then all of the spectrum. arXiv:2605.18736.

Clean latents have the power `A w^-b`; frequencies beyond the coarse grid begin to show below the level at which
`delta` of their power does (`switch_level`). There the state is enlarged in its DCT-II coefficients, with
noise in the place of those that it does not have, and goes back to `2 sigma / (1 + sigma)`.

Departures: the noise of both grids is the pipeline's own, the coarse one's its lower coefficients, where the method
draws it again; the levels after the switch are spread with `shift`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from hasten.errors import ConfigError, ScheduleError
from hasten.parameters import Range
from hasten.registry import method
from hasten.resolution.noise import Rewind, dct_enlarge, dct_low, descend
from hasten.resolution.packed import MixedState
from hasten.resolution.positions import TokenSet
from hasten.resolution.regions import Promotion, PromotionInput, RegionMethod

__all__ = ["Spectral", "switch_level"]


@method("spectral", kind="resolution", paper="Spectral progressive diffusion, arXiv:2605.18736")
@dataclass(frozen=True, kw_only=True)
class Spectral(RegionMethod):
    """Coarse until details begin to show, then all of the spectrum (spectral progressive diffusion)."""

    delta: Annotated[
        float, Range(above=0), "how much of a detail's power counts as showing; larger keeps the run coarse for longer"
    ] = 0.05
    power: Annotated[
        tuple[float, float],
        Range(above=0),
        "(A, b) of the clean latents' spectrum A w^-b; FLUX.1's by default, (219.485, 2.4227) for Wan",
    ] = (203.615, 1.9155)
    stages: Annotated[
        tuple[int, int] | None,
        Range(1),
        "steps of the coarse and of the full-size stage, instead of a switch by `delta`",
    ] = None
    shift: Annotated[float, Range(above=0), "of the levels after the switch"] = 3.0

    @property
    def num_inference_steps(self) -> int | None:
        """Steps of a run; None for any number."""
        return None if self.stages is None else sum(self.stages)

    def promotions(self, sigmas: Tensor, size: tuple[int, int]) -> tuple[Promotion, ...]:
        if self.stages is not None:
            return (Promotion(self.stages[0]),)
        level = switch_level(min(size), self.delta, self.power)  # half the tokens, of two latent pixels each
        done = int((sigmas[1:-1] >= level).sum())
        if not 1 <= done < len(sigmas) - 1:
            raise ScheduleError(
                f"details show below sigma {level:.3f}, which leaves no coarse step in this run; take another delta, "
                "or the steps of both stages, stages=(...)"
            )
        return (Promotion(done),)

    def coarse_noise(self, noise: Tensor) -> Tensor:
        return dct_low(noise)

    def levels(self, step: int, level: float, sigmas: Tensor) -> Tensor | None:
        return descend(level, 0.0, len(sigmas) - 1 - step, self.shift) if step else None

    def promote(self, state: MixedState, new: Tensor, promotion: PromotionInput) -> float:
        pixels = promotion.pixels
        noise = pixels.to_pixels(state.noise, promotion.fine_size)
        coarse = pixels.to_pixels(state.coarse, promotion.size)
        state.fine = pixels.to_tokens(dct_enlarge(coarse, noise, promotion.level))
        state.tokens = TokenSet(torch.ones_like(state.tokens.fine))
        return Rewind(promotion.level).level


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
