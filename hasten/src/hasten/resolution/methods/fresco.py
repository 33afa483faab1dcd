"""Fresco: begin coarse, refine first where the image has converged. "Fresco", arXiv:2601.07462, CVPR 2026.

    coarse   N1 steps on a quarter of the tokens, from the low-pass of the noise field E
    mixed    the share rho of the coarse tokens that has converged is promoted to four fine ones each; N2 steps
    fine     all others are promoted; N3 steps at full size

A promotion, with the field `E` bound to the coordinates, and `sigma'` the level after the step:

    jump="r1"   x' = (1 - sigma') Up(x0) + sigma' E,  x0 = x - sigma v; the others take their Euler step
    jump="r2"   the state goes back to sigma'' = 2 sigma' / (1 + sigma') with its noise exchanged for the field's: the
                Hadamard children of the paper with the right norm; the levels that follow are spread again

Promotions: one after each stage but the last, which takes all that are left. How many tokens the others take is a
share; or, with a threshold, those that have settled by then, whose clean estimate changed over the last steps by less
than so many standard deviations of the image's. A preset's mixed stage then has three parts.

Scores: the variance of a token's clean estimate over the last steps, the least first ("temporal_low", the paper's), or
the greatest; variance over its channels; for comparison edges of the decoded estimate, and chance.

Attention in mixed stages counts a coarse token once; with `coarse_weight=4`, which adds log 4 to the scores of its key,
it counts as much as four tokens would (not of the paper).

The paper's text was not available: the split of the steps comes from its FLOPs, rules and score from two readings
of it. Departure: pixels are enlarged, not packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Annotated, Literal

import torch
from torch import Tensor

from hasten.errors import ConfigError
from hasten.parameters import Range
from hasten.registry import method
from hasten.resolution.layouts import smooth
from hasten.resolution.noise import Rewind, anchor_noise, descend, exchange_noise, low_noise, up
from hasten.resolution.packed import MixedState
from hasten.resolution.positions import TokenSet, Units, children, unpack
from hasten.resolution.regions import (
    Promotion,
    PromotionInput,
    RegionMethod,
    channel_variance,
    edge_share,
    temporal_variance,
)

__all__ = ["Fresco", "relative_change"]

Preset = Literal["30", "18", "11", "9"]
PRESETS: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {
    "30": ((11, 9, 10), (0.3,)),
    "18": ((6, 6, 6), (0.3,)),
    "11": ((3, 4, 4), (0.2,)),
    "9": ((3, 3, 3), (0.2,)),
}
Score = Literal["temporal_low", "temporal_high", "channel_low", "channel_high", "edges", "random"]
Snapshot = Literal["x0", "z", "v"]
Jump = Literal["r1", "r2"]
Noise = Literal["dc", "anchor", "independent"]


@method("fresco", kind="resolution", paper="Fresco, arXiv:2601.07462")
@dataclass(frozen=True, kw_only=True)
class Fresco(RegionMethod):
    """Begin coarse and refine first where the image has converged (Fresco).

    Call the pipeline with `num_inference_steps=method.num_inference_steps`: 18 for the preset "18".
    """

    preset: Annotated[
        Preset, "number of steps of a published setting; `stages` and `shares` take precedence over it"
    ] = "18"
    stages: Annotated[
        tuple[int, ...] | None, Range(0), "steps of each stage, coarse ones first; 0 coarse ones is the plain pipeline"
    ] = None
    shares: Annotated[
        tuple[float, ...] | float | None,
        Range(above=0, below=1),
        "of the coarse tokens that are fine from each promotion on, one for each stage between the first and the last",
    ] = None
    score: Annotated[Score, "which tokens are promoted first"] = "temporal_low"
    snapshot_of: Annotated[
        Snapshot, "what the variance over steps is taken of: clean estimates, states or velocities"
    ] = "x0"
    window: Annotated[int, Range(2), "number of last steps in that variance"] = 4
    threshold: Annotated[
        float | None,
        Range(0),
        "relative change over the last steps below which a token is promoted at the end of any stage but the last two, "
        "instead of shares; with jump='r1'",
    ] = None
    jump: Annotated[
        Jump, "a promotion: the clean estimate noised again (r1), or the state taken back with its noise exchanged (r2)"
    ] = "r2"
    noise: Annotated[
        Noise, "coarse noise: the low-pass of the fine one (dc), one of four (anchor); or other noise at promotions"
    ] = "dc"
    units: Annotated[Units, "frame of the positions in mixed stages"] = "lr_units"
    coarse_weight: Annotated[
        float,
        Range(1, 4),
        "weight of a coarse token in attention in mixed stages: that of a fine one (1) to that of the four for which "
        "it stands (4); FLUX alone takes another than 1",
    ] = 1.0
    smooth: Annotated[float, Range(0, 1), "share of a 3x3 mean in promoted clean estimates, with jump='r1'"] = 0.0
    shift: Annotated[float, Range(above=0), "of the levels that follow a promotion with jump='r2'"] = 3.0

    def check(self) -> None:
        super().check()
        stages, shares = self._split
        if self.threshold is not None:
            self._check_threshold(stages)
        elif self.shares is None and len(stages) > len(PRESETS[self.preset][0]):
            raise ConfigError(f"stages={self.stages} need shares, one for each of the {len(stages) - 2} between")
        if len(stages) != len(shares) + 2 or min(stages[1:]) < 1:
            raise ConfigError(
                f"stages are two or more numbers of steps, all but the first from 1, and shares one for each stage "
                f"between the first and the last; got stages={stages}, shares={shares}"
            )
        if any(a is not None and b is not None and a >= b for a, b in pairwise(shares)):
            raise ConfigError(f"shares must rise, got {shares}")
        if shares and self.score.startswith("temporal") and stages[0] == 1:
            raise ConfigError("a variance over steps needs 2 coarse steps; give stages with more, or another score")
        if self.coarse_weight != 1 and not shares:
            raise ConfigError(
                f"coarse_weight={self.coarse_weight:g} is for stages of coarse and fine tokens, which two stages have "
                "none of; leave it out, or give three stages"
            )
        if self.noise == "independent" and self.jump == "r2":
            raise ConfigError("noise='independent' is for jump='r1'; the rewind exchanges the field's noise")

    def _check_threshold(self, stages: tuple[int, ...]) -> None:
        if self.shares is not None:
            raise ConfigError("threshold decides how many tokens are promoted; leave shares out, or the threshold")
        if self.score != "temporal_low":
            raise ConfigError(f"threshold promotes what changes least and knows no score={self.score!r}; leave it out")
        if self.snapshot_of != "x0":
            raise ConfigError(
                f"threshold is a change of clean estimates, not of snapshot_of={self.snapshot_of!r}; leave that out"
            )
        if self.jump == "r2":
            raise ConfigError(
                "threshold is for jump='r1': with r2 every promotion takes the whole image back, however few tokens "
                "have settled"
            )
        if len(stages) < 3 or stages[0] < 2:
            raise ConfigError(
                f"threshold needs three stages or more, of which the first has 2 steps or more, got stages={stages}"
            )

    @property
    def _split(self) -> tuple[tuple[int, ...], tuple[float | None, ...]]:
        """Steps of each stage, and the share of each promotion but the last; None where the threshold decides."""
        stages, shares = PRESETS[self.preset]
        if self.threshold is not None:
            first, mixed, last = stages
            given = self.stages or (first, *_parts(mixed), last)
            return given, (None,) * (len(given) - 2)
        stages = self.stages or stages
        if self.shares is None:
            return stages, shares if len(stages) > 2 else ()
        return stages, (self.shares,) if isinstance(self.shares, float) else self.shares

    @property
    def num_inference_steps(self) -> int:
        """Steps of a run."""
        return sum(self._split[0])

    def promotions(self, sigmas: Tensor, size: tuple[int, int]) -> tuple[Promotion, ...]:
        stages, shares = self._split
        if stages[0] == 0:
            return ()
        done = list(accumulate(stages[:-1]))
        return tuple(Promotion(*pair) for pair in zip(done, (*shares, 1.0), strict=True))

    def _latest(self, promotion: PromotionInput) -> Sequence[Tensor]:
        return promotion.snapshots[-self.window :]

    def settled(self, promotion: PromotionInput, coarse: Tensor) -> Tensor:
        change = relative_change(self._latest(promotion), coarse)
        assert self.threshold is not None
        return change.reshape(coarse.shape) < self.threshold

    def coarse_noise(self, noise: Tensor) -> Tensor:
        return anchor_noise(noise) if self.noise == "anchor" else low_noise(noise)

    def levels(self, step: int, level: float, sigmas: Tensor) -> Tensor | None:
        return descend(level, 0.0, len(sigmas) - 1 - step, self.shift) if step else None

    def snapshot(self, coarse: Tensor, velocity: Tensor, clean: Tensor) -> Tensor:
        return {"x0": clean, "z": coarse, "v": velocity}[self.snapshot_of]

    def scores(self, promotion: PromotionInput) -> Tensor:
        clean = promotion.clean
        if self.score == "edges":
            return edge_share(promotion.pipe, unpack(clean, promotion.size))
        if self.score == "random":
            return promotion.fresh_noise()[:, : clean.shape[1], 0]
        kind, direction = self.score.split("_")
        scores = temporal_variance(self._latest(promotion)) if kind == "temporal" else channel_variance(clean)
        return scores if direction == "high" else -scores

    def promote(self, state: MixedState, new: Tensor, promotion: PromotionInput) -> float:
        if self.jump == "r2":
            return self._rewind(state, new, promotion)
        clean = up(promotion.pixels.to_pixels(promotion.clean, promotion.size))
        if self.smooth:
            clean = smooth(clean[:, :, None], self.smooth)[:, :, 0]
        if self.noise == "independent":
            state.noise = promotion.fresh_noise()
        state.promote(new, promotion.pixels.to_tokens(clean), promotion.level)
        return promotion.level

    def _rewind(self, state: MixedState, new: Tensor, promotion: PromotionInput) -> float:
        pixels, sigma, level = promotion.pixels, promotion.level, Rewind(promotion.level).level
        noise = pixels.to_pixels(state.noise, promotion.fine_size)
        coarse, low = pixels.to_pixels(state.coarse, promotion.size), self.coarse_noise(noise)
        promoted = pixels.to_tokens(exchange_noise(up(coarse), up(low), noise, sigma, level))
        remaining = exchange_noise(state.fine, state.noise, state.noise, sigma, level)
        state.coarse = pixels.to_tokens(exchange_noise(coarse, low, low, sigma, level))
        state.fine = torch.where(children(new), promoted, remaining)
        state.tokens = TokenSet(state.tokens.fine | new)
        return level


def _parts(steps: int) -> tuple[int, ...]:
    """A mixed stage in three parts of nearly equal length, the longer ones first."""
    return tuple((steps + 2 - part) // 3 for part in range(3))


def relative_change(snapshots: Sequence[Tensor], coarse: Tensor) -> Tensor:
    """How much each token changed over the last steps, in standard deviations of the image.

    The deviation of a token over the steps (root mean square over its channels), over that of the image's coarse
    tokens in the last step: 0 for a token that stands still, near 1 for one that becomes another.

    Args:
        snapshots: `[1, n, C]` each.
        coarse: tokens whose values say how much there is in the image, `[h, w]` bool; without one the change is none
            that a threshold is above.

    Returns:
        `[1, n]`.

    Raises:
        ConfigError: for fewer than two snapshots.
    """
    counted = coarse.reshape(1, -1, 1)
    last = snapshots[-1]
    # Sums over the mask: choosing the tokens by it would wait for the device.
    count = (counted.sum() * last.shape[-1]).clamp(min=1)
    mean = (last * counted).sum() / count
    spread = ((last - mean).square() * counted).sum() / count
    return (temporal_variance(snapshots) / spread.clamp(min=torch.finfo(last.dtype).tiny)).sqrt()
