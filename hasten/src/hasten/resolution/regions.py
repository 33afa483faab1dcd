"""Images that begin coarse and are refined region by region: the engine of Fresco and of what it is compared with.

A method says after which steps tokens are promoted, how large a share, which ones, and how coarse latents become fine
ones. Everything else is in `packed.py`. Each image of a batch has a layout and noise of its own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from hasten.errors import ConfigError
from hasten.models.key_bias import check_key_bias
from hasten.pipeline.scheduler import NoiseLevels
from hasten.resolution.discrepancy import latents_to_vae
from hasten.resolution.engine import ResolutionMethod
from hasten.resolution.layouts import LATENT_PIXELS, PixelLayout
from hasten.resolution.noise import fresh_noise, image_generators, low_noise
from hasten.resolution.packed import MixedState, PackedEngine, PackedRun, check_even, check_total
from hasten.resolution.positions import TokenSet, Units
from hasten.resolution.report import ResolutionRecord

__all__ = [
    "Layout",
    "Promotion",
    "PromotionInput",
    "RegionEngine",
    "RegionMethod",
    "RegionRecord",
    "channel_variance",
    "edge_share",
    "highest",
    "temporal_variance",
]


@dataclass(frozen=True)
class Promotion:
    """When tokens are promoted, and how many.

    Attributes:
        after: steps that are done by then.
        share: of all coarse tokens that are fine from then on; 1 for all; None for those that have `settled`.
    """

    after: int
    share: float | None = 1.0


@dataclass(frozen=True)
class Layout:
    """Which coarse tokens of an image of the batch are fine, `[h, w]` bool, from the end of a step on."""

    run: int
    step: int
    image: int
    fine: Tensor

    def __str__(self) -> str:
        return f"{int(self.fine.sum())} of {self.fine.numel()} coarse tokens fine after step {self.step}"


@dataclass(frozen=True, kw_only=True)
class RegionRecord(ResolutionRecord):
    """One sampler step; see `ResolutionRecord`.

    Attributes:
        coarse: coarse tokens that the transformer ran on, the mean over the batch.
        fine: fine tokens, likewise.
    """

    coarse: int
    fine: int

    @property
    def stage_name(self) -> str:
        return "mixed" if self.coarse and self.fine else "coarse" if self.coarse else "full"


@dataclass(frozen=True)
class PromotionInput:
    """What a method knows when tokens of an image are promoted; `B` is 1.

    Attributes:
        pipe: the pipeline.
        size: rows and columns of the coarse grid of tokens.
        clean: estimate of the clean coarse tokens, `[B, n, C]`.
        snapshots: what was remembered of the coarse tokens in the steps so far, `[B, n, C]` each.
        level: noise level of the state.
        fresh_noise: makes unit noise like the fine tokens', `[B, 4 n, C]`, that is bound to nothing, from
            the image's own generator.
        pixels: how tokens are pixels.
    """

    pipe: Any
    size: tuple[int, int]
    clean: Tensor
    snapshots: Sequence[Tensor]
    level: float
    fresh_noise: Callable[[], Tensor]
    pixels: PixelLayout = LATENT_PIXELS

    @property
    def fine_size(self) -> tuple[int, int]:
        """Rows and columns of the fine grid of tokens."""
        return 2 * self.size[0], 2 * self.size[1]


class RegionMethod(ResolutionMethod):
    """Base of the methods, frozen dataclasses."""

    units: Units = "lr_units"
    coarse_weight: float = 1.0

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

    def scores(self, promotion: PromotionInput) -> Tensor:
        """`[B, n]`, the highest are promoted first; not asked for when all tokens are."""
        raise AssertionError(f"{type(self).__name__} promotes all tokens at once")

    def settled(self, promotion: PromotionInput, coarse: Tensor) -> Tensor:
        """Which tokens a promotion without a share takes, as many as there may be: `[h, w]` bool on the device.

        Args:
            promotion: what is known.
            coarse: tokens that are still coarse, `[h, w]` bool; what is said of others does not count.
        """
        raise AssertionError(f"{type(self).__name__} promotes shares")

    @abstractmethod
    def promote(self, state: MixedState, new: Tensor, promotion: PromotionInput) -> float:
        """Make tokens fine.

        Args:
            state: at `promotion.level`; changed in place.
            new: `[h, w]` bool, coarse tokens; there may be none.
            promotion: what is known.

        Returns:
            the noise level of the state afterwards.
        """

    def engine(self, pipe: Any) -> RegionEngine:
        return RegionEngine(pipe, self)


@dataclass(kw_only=True)
class RegionRun(PackedRun):
    """What is remembered of the call under way.

    Attributes:
        promotions: share of the coarse tokens that are fine from then on (see `Promotion`), by the steps done.
        snapshots: of the coarse tokens in the steps so far, for each image.
        references: token set of each reference image.
        generators: of each image's own noise.
        level: noise level after the promotion that has just happened.
    """

    promotions: Mapping[int, float | None]
    snapshots: list[list[Tensor]] = field(default_factory=list)
    references: Sequence[TokenSet] = ()
    generators: Sequence[torch.Generator] = ()
    level: float = 1.0


class RegionEngine(PackedEngine[RegionRun, RegionRecord, Layout]):
    """Runs one image pipeline coarse first; see `ResolutionEngine`.

    Args:
        pipe: a pipeline of FLUX.1 or Qwen-Image, from text or editing images.
        method: what to do.
    """

    pipelines: ClassVar[tuple[str, ...]] = (
        "FluxPipeline",
        "FluxKontextPipeline",
        "QwenImagePipeline",
        "QwenImageEditPipeline",
        "QwenImageEditPlusPipeline",
    )
    method: RegionMethod

    @property
    def coarse_weight(self) -> float:
        return self.method.coarse_weight

    def check(self) -> None:
        if self.coarse_weight != 1:
            for module in self._modules:
                check_key_bias(module, f"coarse_weight of {self.name}")

    def begin_tokens(
        self, number: int, levels: NoiseLevels, grids: Sequence[tuple[int, int]], hidden: Tensor
    ) -> RegionRun:
        self.check()  # another attention may have been set
        method, (rows, columns) = self.method, grids[0]
        if method.num_inference_steps is not None:
            check_total(self.name, "its stages", method.num_inference_steps, len(levels))
        written = method.levels(0, 1.0, levels.sigmas)
        promotions = method.promotions(levels.sigmas if written is None else written, grids[0])
        run = RegionRun(number=number, levels=levels, grids=grids, promotions={p.after: p.share for p in promotions})
        if not promotions:
            return run
        _check_promotions(self.name, promotions, run.total)
        # A TokenSet counts coarse tokens, of which an odd grid has no whole number, be it of a reference.
        check_even(self.name, grids)
        if written is not None:
            levels.write(0, written)
        noise = hidden[:, : rows * columns]
        tokens = TokenSet(torch.zeros(rows // 2, columns // 2, dtype=torch.bool, device=noise.device))
        low = self.pixels.to_tokens(method.coarse_noise(self.pixels.to_pixels(noise, grids[0])))
        run.states = [
            MixedState(tokens, own, coarse, torch.zeros_like(own), self.pixels)
            for own, coarse in zip(noise.split(1), low.split(1), strict=True)
        ]
        run.snapshots = [[] for _ in run.states]
        run.references = [
            TokenSet(torch.ones(rows // 2, columns // 2, dtype=torch.bool, device=noise.device))
            for rows, columns in grids[1:]
        ]
        return run

    def reference_sets(self, run: RegionRun, own: TokenSet) -> Sequence[TokenSet]:
        """Reference images stay fine, in the frame of the generated tokens."""
        return run.references

    def reference_tokens(self, run: RegionRun, hidden: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        fine = hidden.split([rows * columns for rows, columns in run.grids], 1)[1:]
        return [(tokens[:, :0], tokens) for tokens in fine]  # no coarse ones

    def units(self, run: RegionRun, own: TokenSet) -> Units:
        return self.method.units if own.fine_count else "lr_units"

    def move(self, run: RegionRun, image: int, velocity: tuple[Tensor, Tensor]) -> None:
        state, (coarse, fine) = run.states[image], velocity
        sigma, after = run.levels[run.step], run.levels[run.step + 1]
        clean = state.coarse - sigma * coarse
        run.snapshots[image].append(self.method.snapshot(state.coarse, coarse, clean))
        state.move(coarse, fine, after - sigma)
        if run.step + 1 not in run.promotions:
            return
        mask = state.tokens.fine
        size, draw = (mask.shape[0], mask.shape[1]), partial(self._fresh_noise, run, image)
        promotion = PromotionInput(self.pipe, size, clean, run.snapshots[image], after, draw, self.pixels)
        chosen = self._chosen(state, run.promotions[run.step + 1], promotion)
        run.level = self.method.promote(state, chosen, promotion)
        self.plans.append(Layout(run.number, run.step, image, state.tokens.fine))

    def moved(self, run: RegionRun) -> None:
        if run.step + 1 in run.promotions and run.level != run.levels[run.step + 1]:
            levels = self.method.levels(run.step + 1, run.level, run.levels.sigmas)
            assert levels is not None
            run.levels.write(run.step + 1, levels)

    def record(self, run: RegionRun, common: dict[str, Any]) -> RegionRecord:
        coarse, fine = run.counts
        return RegionRecord(**common, coarse=coarse, fine=fine)

    def _chosen(self, state: MixedState, share: float | None, promotion: PromotionInput) -> Tensor:
        tokens = state.tokens
        if share is None:
            return self.method.settled(promotion, ~tokens.fine) & ~tokens.fine
        if share >= 1:
            return ~tokens.fine
        total, taken = tokens.fine.numel(), tokens.fine_count // 4
        count = int(share * total) - taken
        if count < 1:
            raise ConfigError(f"{self.name} would promote {share:.0%} of {total} coarse tokens, which is none")
        return highest(self.method.scores(promotion), count, tokens.fine)

    @staticmethod
    def _fresh_noise(run: RegionRun, image: int) -> Tensor:
        if not run.generators:
            run.generators = [image_generators(state.noise)[0] for state in run.states]
        noise = run.states[image].noise
        return fresh_noise([run.generators[image]], noise.shape[1:], noise.device)


def _check_promotions(name: str, promotions: Sequence[Promotion], total: int) -> None:
    after, shares = [p.after for p in promotions], [p.share for p in promotions]
    if shares[-1] != 1 or after != sorted(set(after)) or not 0 < after[0] <= after[-1] < total:
        named = ["what has settled" if share is None else f"{share:.0%}" for share in shares]
        steps = ", ".join(f"{what} after {done}" for what, done in zip(named, after, strict=True))
        raise ConfigError(
            f"{name} promotes {steps} of {total} steps; the last promotion has to take all tokens, and a step at full "
            "size has to follow it"
        )


# --- which tokens first


def highest(scores: Tensor, count: int, taken: Tensor) -> Tensor:
    """The `count` tokens with the highest score that are not taken yet; of equal ones the earlier.

    Args:
        scores: `[1, n]`.
        count: how many.
        taken: `[h, w]` bool.

    Returns:
        `[h, w]` bool.
    """
    order = scores[0].masked_fill(taken.flatten(), -torch.inf).argsort(descending=True, stable=True)
    chosen = torch.zeros_like(taken).flatten()
    chosen[order[:count]] = True
    return chosen.reshape(taken.shape)


def temporal_variance(snapshots: Sequence[Tensor]) -> Tensor:
    """Variance over the last steps, mean over the channels: `[B, n, C]` each to `[B, n]`.

    Raises:
        ConfigError: for fewer than two snapshots.
    """
    if len(snapshots) < 2:
        raise ConfigError(f"a variance over steps needs at least 2 coarse steps, got {len(snapshots)}")
    return torch.stack(list(snapshots)).var(0, unbiased=False).mean(-1)


def channel_variance(clean: Tensor) -> Tensor:
    """Variance over the channels of each clean token: `[B, n, C]` to `[B, n]`."""
    return clean.var(-1, unbiased=False)


def edge_share(pipe: Any, clean: Tensor) -> Tensor:
    """Share of edge pixels (Canny) under each token of the decoded estimate.

    Args:
        pipe: whose VAE decodes.
        clean: latent pixels `[B, C, H, W]` as the transformer knows them.

    Returns:
        `[B, H W / 4]`.
    """
    from skimage.feature import canny  # heavy, and needed by this score alone

    vae = pipe.vae
    latents = latents_to_vae(vae, clean).to(next(iter(vae.state_dict().values())))
    images = vae.decode(latents, return_dict=False)[0]
    images = images[:, :, 0] if images.dim() == 5 else images
    grey = images.float().mean(1).cpu().numpy()
    edges = torch.stack([torch.from_numpy(canny(image)).float() for image in grey])
    size = (clean.shape[2] // 2, clean.shape[3] // 2)
    return functional.adaptive_avg_pool2d(edges[:, None], size).flatten(1).to(clean.device)
