"""Tokens of two sizes in the loop of a packed-token pipeline (FLUX, Qwen-Image): what all such methods share.

The true latents are tokens of two sizes, in float32. The pipeline gets predictions with every coarse token copied to
the four that it covers, and latents at full size as a preview.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from hasten.errors import AdapterError, ConfigError, ScheduleError
from hasten.models.rope import PositionProxy, position_proxy, use_positions
from hasten.pipeline.scheduler import NoiseLevels
from hasten.resolution.engine import Plan, Record, ResolutionEngine, ResolutionRun, SamplerStep
from hasten.resolution.layouts import LATENT_PIXELS, PixelLayout
from hasten.resolution.positions import (
    ImageTokens,
    TokenSet,
    Units,
    children,
    flux_ids,
    grid_sizes,
    qwen_positions,
)
from hasten.resolution.report import ForwardSize

__all__ = ["MixedState", "PackedEngine", "PackedRun", "Part", "check_even", "check_total"]

Part = tuple[TokenSet, Units, Tensor]  # an image's tokens, the frame of their positions, their values [B, S, C]


@dataclass
class MixedState:
    """All tokens of an image in both resolutions, of which those in `tokens` are the true ones.

    Attributes:
        tokens: which ones are true.
        noise: unit noise of the fine grid, `[B, 4 n, C]`; all tensors are float32.
        coarse: `[B, n, C]`.
        fine: `[B, 4 n, C]`.
        pixels: how tokens are pixels.
    """

    tokens: TokenSet
    noise: Tensor
    coarse: Tensor
    fine: Tensor
    pixels: PixelLayout = LATENT_PIXELS

    @classmethod
    def begin(cls, noise: Tensor, size: tuple[int, int], pixels: PixelLayout = LATENT_PIXELS) -> MixedState:
        """All tokens coarse, at sigma 1: the low-pass of the fine noise, which is unit noise again.

        Args:
            noise: `[B, 4 n, C]`.
            size: of the fine grid of tokens.
            pixels: how tokens are pixels.
        """
        tokens = TokenSet(torch.zeros(size[0] // 2, size[1] // 2, dtype=torch.bool, device=noise.device))
        low = pixels.shrink(noise, size) * 2  # the sum of 4 over the root of 4
        return cls(tokens, noise, low, torch.zeros_like(noise), pixels)

    @property
    def complete(self) -> bool:
        """Whether every token is fine."""
        return self.tokens.coarse_count == 0

    def move(self, coarse: Tensor, fine: Tensor, change: float) -> None:
        """An Euler step along the velocities `coarse` and `fine`, by a change of the noise level."""
        self.coarse, self.fine = self.coarse + change * coarse, self.fine + change * fine

    def promote(self, new: Tensor, clean: Tensor, sigma: float) -> None:
        """Replace coarse tokens by fine ones: `x = (1 - sigma) clean + sigma noise`.

        Args:
            new: `[h, w]` bool.
            clean: estimate of the clean fine tokens, `[B, 4 n, C]`.
            sigma: noise level of the state.
        """
        self.fine = torch.where(children(new), (1 - sigma) * clean + sigma * self.noise, self.fine)
        self.tokens = TokenSet(self.tokens.fine | new)

    def preview(self) -> Tensor:
        """The state at full size, `[B, 4 n, C]`, with every coarse pixel copied to 2x2."""
        size = self.tokens.fine.shape
        return torch.where(children(self.tokens.fine), self.fine, self.pixels.enlarge(self.coarse, (size[0], size[1])))


@dataclass(kw_only=True)
class PackedRun(ResolutionRun):
    """What is remembered of the call under way.

    Attributes:
        grids: rows and columns of tokens of each image, the generated one first.
        state: the true tokens; None where the pipeline's own latents are true.
        layout: positions of the last forward's tokens.
    """

    grids: Sequence[tuple[int, int]]
    state: MixedState | None = None
    layout: _Layout | None = None

    @property
    def coarse(self) -> bool:
        return self.state is not None


Run = TypeVar("Run", bound=PackedRun)


@dataclass(frozen=True)
class _Layout:
    """Token sets of a forward and their positions in the model's own form, until tokens are promoted.

    Attributes:
        sets: token set and frame of each image.
        counts: tokens of each image.
        ids: FLUX's, `[S, 3]`; None for a model that makes its positions from `img_shapes`.
        proxy: what makes positions for such a model.
    """

    sets: Sequence[tuple[TokenSet, Units]]
    counts: tuple[int, ...]
    ids: Tensor | None = None
    proxy: PositionProxy | None = None

    def fits(self, parts: Sequence[Part]) -> bool:
        """Whether the layout is that of `parts`; an engine keeps a token set until it changes."""
        return len(parts) == len(self.sets) and all(
            units == own_units and tokens is own
            for (tokens, units, _), (own, own_units) in zip(parts, self.sets, strict=True)
        )


class PackedEngine(ResolutionEngine[Run, Record, Plan]):
    """Base of the engines for packed tokens; see `ResolutionEngine`."""

    def __init__(self, pipe: Any, method: Any) -> None:
        super().__init__(pipe, method)
        self.pixels = PixelLayout.of(pipe.vae)

    # --- what a method decides

    @abstractmethod
    def begin_tokens(self, number: int, levels: NoiseLevels, grids: Sequence[tuple[int, int]], hidden: Tensor) -> Run:
        """A run whose first forward is about to happen.

        Args:
            number: of the run.
            levels: its noise levels.
            grids: rows and columns of tokens of each image, the generated one first.
            hidden: the transformer's tokens, float32: unit noise, then the references.
        """

    @abstractmethod
    def references(self, run: Run, hidden: Tensor) -> Sequence[Part]:
        """The tokens of the reference images at this step.

        A token set stays the same object until it changes, since positions are made again for another object.

        Args:
            run: the run.
            hidden: the transformer's tokens as the pipeline made them.
        """

    @abstractmethod
    def units(self, run: Run) -> Units:
        """The frame of the positions at this step."""

    @abstractmethod
    def move(self, run: Run, state: MixedState, velocity: tuple[Tensor, Tensor]) -> None:
        """Take a step on the true tokens; the state is changed in place.

        Args:
            run: the run, whose levels say from which noise level to which; a promotion may write other levels.
            state: tokens at `run.levels[run.step]`.
            velocity: of all coarse tokens and of all fine ones, zero where the sequence has none.
        """

    # --- the base's questions

    def begin(self, number: int, levels: NoiseLevels, module: Any, arguments: Mapping[str, Any]) -> Run:
        return self.begin_tokens(number, levels, grid_sizes(arguments), arguments["hidden_states"].float())

    def true_inputs(self, run: Run, module: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
        assert run.state is not None
        given = arguments["hidden_states"]
        own = (run.state.tokens, self.units(run), run.state.tokens.gather(run.state.coarse, run.state.fine))
        parts = [own, *self.references(run, given)]
        if run.layout is None or not run.layout.fits(parts):
            run.layout = _layout(module, parts, shapes=arguments.get("img_shapes") is not None)
        hidden = torch.cat([values.float() for _, _, values in parts], 1).to(given.dtype)
        if len(hidden) != len(given):
            raise AdapterError(
                f"{self.name} began with {len(hidden)} images, and the transformer is called with {len(given)}; "
                "guidance in one batch is not served"
            )
        if run.layout.proxy is None:
            return {"hidden_states": hidden, "img_ids": run.layout.ids}
        shapes = [[(1, 1, count) for count in run.layout.counts]] * len(hidden)
        return {"hidden_states": hidden, "img_shapes": shapes}

    def positions(self, run: Run, module: Any) -> AbstractContextManager[None]:
        proxy = None if run.layout is None else run.layout.proxy
        return nullcontext() if proxy is None else use_positions(module, proxy)

    def full_size(self, run: Run, prediction: Tensor) -> Tensor:
        """Whole tokens are copied, not latent pixels: Qwen-Image's guidance rescales each token to its own length."""
        assert run.state is not None
        tokens = run.state.tokens
        return tokens.spread(prediction[:, : tokens.count])

    def size(self, run: Run, arguments: Mapping[str, Any]) -> ForwardSize:
        text = arguments.get("encoder_hidden_states")
        others = 0 if text is None else text.shape[1]
        full, images = run.grids[0][0] * run.grids[0][1], arguments["hidden_states"].shape[1]
        if run.state is None or run.layout is None:
            return ForwardSize(full, full, images + others, images + others)
        return ForwardSize(run.layout.counts[0], full, sum(run.layout.counts) + others, images + others)

    def advance(self, run: Run, step: SamplerStep) -> tuple[Tensor | None, bool]:
        state = run.state
        if state is None:
            return None, False
        before = state.tokens
        self.move(run, state, before.scatter(before.collect(step.prediction).float()))
        step.skip()
        if state.complete:
            run.state = None  # the pipeline is given the true latents from here on
        return state.preview(), state.tokens.coarse_count < before.coarse_count


def _layout(module: Any, parts: Sequence[Part], *, shapes: bool) -> _Layout:
    sets = [(tokens, units) for tokens, units, _ in parts]
    images: list[ImageTokens] = [tokens.image_tokens(units) for tokens, units in sets]
    counts, device = tuple(tokens.count for tokens, _ in sets), parts[0][2].device
    if not shapes:
        return _Layout(sets, counts, ids=flux_ids(images, device))
    return _Layout(sets, counts, proxy=position_proxy(module, *qwen_positions(images), device))


def check_total(name: str, split: str, wanted: int, total: int) -> None:
    """Raises ScheduleError if a run has another number of steps than a method."""
    if total != wanted:
        raise ScheduleError(
            f"{name} has {split} = {wanted} steps, but the run has {total}; call the pipeline with "
            f"num_inference_steps={wanted}, or change the split"
        )


def check_even(name: str, grids: Sequence[tuple[int, int]]) -> None:
    """Raises ConfigError if an image's tokens cannot be counted in coarse tokens of 2x2."""
    odd = [f"{rows}x{columns}" for rows, columns in grids if rows % 2 or columns % 2]
    if odd:
        raise ConfigError(
            f"{name} cannot begin in half size with images of {' and '.join(odd)} tokens; use heights and widths "
            "with an even number of tokens (multiples of 32 pixels for FLUX and Qwen-Image)"
        )
