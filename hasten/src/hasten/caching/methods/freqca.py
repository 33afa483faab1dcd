"""FreqCa: low frequencies of the image are reused, high ones forecast. Liu et al., "FreqCa: Accelerating Diffusion
Models via Frequency-Aware Caching", arXiv:2510.08669.

    F = P_low F + P_high F over the grid of image tokens
    F^(a_0 + x) = P_low F(a_0) + P_high (Hermite forecast of order 2, sigma = 0.71)

The paper's observation is that low bands are similar from step to step but not continuous, high bands continuous but
not similar. It does not hold everywhere: measure before you believe it.

`split="dct"` keeps low what lies within `cutoff` of the largest radius of a DCT-II over the grid, `"fft"` what lies
within `cutoff` of the largest frequency of a Fourier transform along the flattened tokens, `"none"` forecasts all.
Both splits are orthogonal projections and linear, so that one history of whole features serves both bands, and a
skipped step transforms one tensor: `F^ = high forecast + P_low (low forecast - high forecast)`.

Departures: the DCT takes non-square grids and clips (three axes), with radius `sqrt(sum (u_i / (n_i - 1))^2)`, which on
square grids is the paper's. Tokens that do not belong to the image (text in a joint sequence, reference images) are
forecast whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from hasten.caching.components import Components, FeatureKey
from hasten.caching.method import ScheduledMethod
from hasten.caching.predictors import Hermite, Ladder, Order, Predictor, Scale
from hasten.caching.projectors import Projector, Whole, weighted_sum
from hasten.errors import ConfigError
from hasten.models import TokenLayout
from hasten.parameters import Range
from hasten.pipeline.transforms import dct_matrix
from hasten.registry import method

__all__ = ["Bands", "FreqCa"]

Split = Literal["dct", "fft", "none"]


@lru_cache(maxsize=32)
def low_mask(grid: tuple[int, ...], cutoff: float) -> Tensor:
    """Which DCT coefficients of a grid are low, as 0 and 1, shaped like the grid."""
    axes = [torch.arange(n, dtype=torch.float64) / max(n - 1, 1) for n in grid]
    radius = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0).sqrt()
    return (radius <= cutoff * radius.max()).float()


class Bands:
    """Splits the tokens of an image into low and high frequencies; tokens outside it count as high.

    Args:
        layout: where the image's tokens lie.
        split: `"dct"` or `"fft"`.
        cutoff: share of the largest radius or frequency that is low.
    """

    components: tuple[str, ...] = ("low", "high")

    def __init__(self, layout: TokenLayout, split: str, cutoff: float) -> None:
        self._layout, self._split, self._cutoff = layout, split, cutoff
        self._count = math.prod(layout.grid)

    def low(self, tokens: Tensor) -> Tensor:
        """The low band of the image's tokens `[B, n, D]` (float32)."""
        if self._split == "fft":
            spectrum = torch.fft.rfft(tokens, dim=1)
            frequency = torch.fft.rfftfreq(tokens.shape[1], device=tokens.device)
            spectrum[:, frequency > self._cutoff * frequency.max()] = 0
            return torch.fft.irfft(spectrum, n=tokens.shape[1], dim=1)
        grid = self._layout.grid
        field = tokens.unflatten(1, grid)
        for axis, n in enumerate(grid, start=1):
            field = torch.tensordot(field, dct_matrix(n, tokens.device), dims=([axis], [1])).movedim(-1, axis)
        field = field * low_mask(grid, self._cutoff).to(tokens.device)[None, ..., None]
        for axis, n in enumerate(grid, start=1):
            field = torch.tensordot(field, dct_matrix(n, tokens.device), dims=([axis], [0])).movedim(-1, axis)
        return field.flatten(1, len(grid))

    def combine(self, features: Sequence[Tensor], weights: Mapping[str, Sequence[float]]) -> Tensor:
        first, end = self._layout.offset, self._layout.offset + self._count
        if features[0].ndim != 3 or features[0].shape[1] < end:
            grid = "x".join(map(str, self._layout.grid))
            raise ConfigError(
                f"FreqCa expects tokens [B, N, D] with a {grid} grid from token {first} on, "
                f"got {tuple(features[0].shape)}; where devices share the tokens of an image, use another method"
            )
        whole = weighted_sum([f.float() for f in features], weights["high"])
        image = [f[:, first:end].float() for f in features]
        gap = [low - high for low, high in zip(weights["low"], weights["high"], strict=True)]
        whole[:, first:end] += self.low(weighted_sum(image, gap))
        return whole.to(features[0].dtype)


@method("freqca", kind="caching", paper="FreqCa, arXiv:2510.08669")
@dataclass(frozen=True, kw_only=True)
class FreqCa(ScheduledMethod):
    """Reuse the low frequencies of the image's tokens and forecast the high ones (FreqCa)."""

    needs_layout: ClassVar[bool] = True

    site: Literal["hidden"] = "hidden"
    split: Annotated[Split, "transform that tells the bands apart; none forecasts all of the feature"] = "dct"
    cutoff: Annotated[float, Range(0, 1), "share of the largest radius or frequency that counts as low"] = 0.1
    low_order: Annotated[Order, "of the low band's Hermite forecast; 0 is reuse, as in the paper"] = 0
    order: Annotated[Order, "of the high band's Hermite forecast"] = 2
    sigma: Annotated[Scale, "of both forecasts"] = 0.71
    ladder: Annotated[Ladder, "the official differences, or the true ones at irregular gaps (divided)"] = "recursive"

    def _bands(self) -> dict[str, Predictor]:
        first = self.first_difference
        return {
            "low": Hermite(self.low_order, first=first, ladder=self.ladder, sigma=self.sigma),
            "high": Hermite(self.order, first=first, ladder=self.ladder, sigma=self.sigma),
        }

    def components(self, key: FeatureKey) -> Components:
        bands = self._bands()
        if self.split == "none" or key.layout is None:
            return Components(Whole(), {"whole": bands["high"]})
        projector: Projector = Bands(key.layout, self.split, self.cutoff)
        return Components(projector, bands)
