"""Two uniform stages: coarse, then full size. What region-wise methods are compared with.

In the manner of "Bottleneck Sampling", arXiv:2503.18940, of which only the abstract was read: low resolution at first,
then the clean estimate is enlarged and noised again for the rest of the steps. Departures: its first stage at full size
is left out, which costs more than it gives where the noise of both stages is bound together; `noise="independent"` is
the method's own, `"field"` takes the pipeline's noise, of which the coarse one is the low-pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor

from hasten.parameters import Range
from hasten.registry import method
from hasten.resolution.packed import MixedState
from hasten.resolution.regions import Promotion, PromotionInput, RegionMethod

__all__ = ["Bottleneck"]

Noise = Literal["independent", "field"]


@method("bottleneck", kind="resolution", paper="Bottleneck Sampling, arXiv:2503.18940")
@dataclass(frozen=True, kw_only=True)
class Bottleneck(RegionMethod):
    """Some steps coarse, the rest at full size (uniform two-stage sampling)."""

    stages: Annotated[tuple[int, int], Range(1), "steps of the coarse and of the full-size stage"] = (9, 9)
    noise: Annotated[
        Noise, "what noises the enlarged image: noise of its own, or the pipeline's, whose low-pass is the coarse one"
    ] = "independent"

    @property
    def num_inference_steps(self) -> int:
        """Steps of a run."""
        return sum(self.stages)

    def promotions(self, sigmas: Tensor, size: tuple[int, int]) -> tuple[Promotion, ...]:
        return (Promotion(self.stages[0]),)

    def promote(self, state: MixedState, new: Tensor, promotion: PromotionInput) -> float:
        if self.noise == "independent":
            state.noise = promotion.fresh_noise()
        state.promote(new, promotion.pixels.enlarge(promotion.clean, promotion.size), promotion.level)
        return promotion.level
