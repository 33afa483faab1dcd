"""FreqCa: low frequencies of the image are reused, high ones forecast. Liu et al., "FreqCa: Accelerating Diffusion
Models via Frequency-Aware Caching", arXiv:2510.08669.

    F = P_low F + P_high F over the grid of image tokens
    F^(a_0 + x) = P_low F(a_0) + P_high (Hermite forecast of order 2, sigma = 0.71)

The paper's observation is that low bands are similar from step to step but not continuous, high bands continuous but
not similar. Whether it holds is a property of the model; on the small trained models here it is the other way round.
`hasten tune --method freqca` finds by whole runs which band to reuse (an order of 0), which to forecast, and where to
split; `mode="paper"` is the published rule as it stands.

Features are those behind the model's final norm where that is known (`domain`): the norm passes on the ratio of the
bands alone, which holding one and moving the other would change.

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
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from hasten.caching.components import Components, FeatureKey
from hasten.caching.effects import Effects, With
from hasten.caching.method import ScheduledMethod
from hasten.caching.predictors import Hermite, Ladder, Order, Predictor, Scale
from hasten.caching.projectors import Projector, Whole, gap
from hasten.caching.sums import Weight, finite, weighted_sum
from hasten.calibration import Domain
from hasten.errors import ConfigError
from hasten.models import TokenLayout
from hasten.parameters import Range
from hasten.pipeline.transforms import dct_matrix
from hasten.registry import method

__all__ = ["Bands", "FreqCa"]

Split = Literal["dct", "fft", "none"]
PAPERS = ("split", "cutoff", "low_order", "order", "sigma", "ladder", "domain")  # what mode="paper" decides
OWN = With("mode", ("given",))
# In which channels are taken where a transform works in float32: Fourier's has no other, and coefficients of a DCT, up
# to sqrt(n) times as large as the numbers that they are made of, may be more than float16 holds.
CHANNEL_PARTS = 16


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
        # Each axis' low rows of the DCT and the mask of the low coefficients among them.
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], Tensor]] = {}

    def combine(self, features: Sequence[Tensor], weights: Mapping[str, Sequence[Weight]]) -> Tensor:
        first, end = self._layout.offset, self._layout.offset + self._count
        if features[0].ndim != 3 or features[0].shape[1] < end:
            grid = "x".join(map(str, self._layout.grid))
            raise ConfigError(
                f"FreqCa expects tokens [B, N, D] with a {grid} grid from token {first} on, "
                f"got {tuple(features[0].shape)}; where devices share the tokens of an image, use another method"
            )
        # An infinity would come out of a transform as NaN.
        whole = finite(weighted_sum(features, weights["high"]))
        change = finite(weighted_sum(features, gap(weights, "low", "high")))
        self._add_low(whole[:, first:end], change[:, first:end])
        return whole

    def _add_low(self, total: Tensor, tokens: Tensor) -> None:
        """Add the low band of `tokens` `[B, n, D]`, some channels at a time where that takes float32."""
        if self._split == "dct" and tokens.dtype is not torch.float16:
            self._add_low_coefficients(total, tokens)
            return
        width = tokens.shape[-1]
        size = -(-width // CHANNEL_PARTS)
        for start in range(0, width, size):
            channels = slice(start, start + size)
            part = tokens[..., channels].float().contiguous()
            if self._split == "fft":
                low = self._low_frequencies(part)
            else:
                low = torch.zeros_like(part)
                self._add_low_coefficients(low, part)
            total[..., channels] += finite(low.to(total.dtype))

    def _add_low_coefficients(self, total: Tensor, tokens: Tensor) -> None:
        """Add the low band of `tokens` `[B, n, D]` by a DCT of which only low rows are computed."""
        place = (tokens.device, tokens.dtype)
        tables = self._tables.get(place)
        if tables is None:
            tables = self._tables[place] = self._low_rows(*place)
        (first, *others), mask = tables
        batch, _, width = tokens.shape
        grid, kept = self._layout.grid, mask.shape
        field = first @ tokens.view(batch, grid[0], -1)  # [B, m0, n1 ... D]
        for axis, rows in enumerate(others, start=1):
            field = rows @ field.view(batch * math.prod(kept[:axis]), grid[axis], -1)
        field = field.view(batch, *kept, width) * mask[..., None]
        for axis, rows in reversed(list(enumerate(others, start=1))):
            field = rows.T @ field.view(batch * math.prod(kept[:axis]), kept[axis], -1)
        back = first.T.expand(batch, -1, -1)
        total.view(batch, grid[0], -1).baddbmm_(back, field.view(batch, kept[0], -1))

    def _low_rows(self, device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
        grid, mask = self._layout.grid, low_mask(self._layout.grid, self._cutoff)
        # Along its own axis a row is low where it is low at zero frequency of the others.
        kept = [int(mask.movedim(axis, 0).flatten(1)[:, 0].sum()) for axis in range(len(grid))]
        rows = [dct_matrix(n, device, dtype)[:m] for n, m in zip(grid, kept, strict=True)]
        return rows, mask[tuple(map(slice, kept))].to(device, dtype)

    def _low_frequencies(self, tokens: Tensor) -> Tensor:
        """The low band of `tokens` `[B, n, d]` along the sequence."""
        count = tokens.shape[1]
        kept = math.floor(self._cutoff * (count // 2) + 1e-9) + 1
        spectrum = torch.fft.rfft(tokens, dim=1)
        spectrum[:, kept:] = 0
        return torch.fft.irfft(spectrum, n=count, dim=1)


@method("freqca", kind="caching", paper="FreqCa, arXiv:2510.08669")
@dataclass(frozen=True, kw_only=True)
class FreqCa(ScheduledMethod):
    """Reuse the low frequencies of the image's tokens and forecast the high ones (FreqCa)."""

    needs_layout: ClassVar[bool] = True
    tried: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "low_order": (0, 1, 2),
        "order": (0, 1, 2),
        "split": ("dct", "fft", "none"),
        "cutoff": (0.05, 0.1, 0.2, 0.4),
        "domain": ("normed", "plain"),
    }

    effects: ClassVar[Effects] = {
        **dict.fromkeys(PAPERS, (OWN,)),
        **dict.fromkeys(("cutoff", "low_order"), (OWN, With("split", ("dct", "fft")))),
    }

    site: Literal["hidden"] = "hidden"
    mode: Annotated[
        Literal["paper", "given"], "the published rule, or the other parameters; both are the same bands by default"
    ] = "given"
    split: Annotated[Split, "transform that tells the bands apart; none forecasts all of the feature"] = "dct"
    cutoff: Annotated[float, Range(0, 1), "share of the largest radius or frequency that counts as low"] = 0.1
    low_order: Annotated[Order, "of the low band's Hermite forecast; 0 is reuse, as in the paper"] = 0
    order: Annotated[Order, "of the high band's Hermite forecast; 0 is reuse"] = 2
    sigma: Annotated[Scale, "of both forecasts"] = 0.71
    ladder: Annotated[Ladder, "the official differences, or the true ones at irregular gaps (divided)"] = "recursive"
    domain: Domain | None = None

    @property
    def kept(self) -> Domain | None:
        return "plain" if self.mode == "paper" else super().kept

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
