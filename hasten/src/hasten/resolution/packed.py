"""Tokens of two sizes in the loop of a packed-token pipeline (FLUX, Qwen-Image): what all such methods share.

The true latents are tokens of two sizes, in float32. The pipeline gets predictions with every coarse token copied to
the four that it covers, and latents at full size as a preview.

Each image of a batch has a state and a token set of its own, so that it is what it is when generated alone. Models have
one list of positions per forward: images whose token sets are equal share a forward, others have their own.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from hasten.errors import AdapterError, ConfigError, ScheduleError
from hasten.models.key_bias import with_key_bias
from hasten.models.rope import PositionProxy, position_proxy, use_positions
from hasten.pipeline.hooks import Forward
from hasten.pipeline.scheduler import NoiseLevels
from hasten.resolution.engine import Plan, Record, ResolutionEngine, ResolutionRun, with_sample
from hasten.resolution.layouts import LATENT_PIXELS, PixelLayout
from hasten.resolution.positions import TokenSet, Units, children, flux_ids, grid_sizes, qwen_positions
from hasten.resolution.report import ForwardSize
from hasten.resolution.sampler_step import SamplerStep

__all__ = ["MixedState", "PackedEngine", "PackedRun", "check_even", "check_total"]

# Arguments of a forward that have an entry per image of the batch, and tensors that all images share.
BATCHED = (
    "hidden_states",
    "encoder_hidden_states",
    "encoder_hidden_states_mask",
    "pooled_projections",
    "timestep",
    "guidance",
    "img_shapes",
    "txt_seq_lens",
)
SHARED = ("img_ids", "txt_ids")
EMBEDDED_IMAGES = "ip_adapter_image_embeds"  # of IP adapters, in a dictionary: a list of tensors [B, ...]


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
        states: the true tokens of each image of the batch, `B` being 1; none where the pipeline's own latents are true.
        groups: the images of the batch by token set.
    """

    grids: Sequence[tuple[int, int]]
    states: list[MixedState] = field(default_factory=list)
    groups: list[_Group] = field(default_factory=list)

    @property
    def coarse(self) -> bool:
        return bool(self.states)

    @property
    def counts(self) -> tuple[int, int]:
        """Coarse and fine tokens of the generated image, the mean over the batch."""
        if not self.states:
            return 0, self.grids[0][0] * self.grids[0][1]
        sets = [state.tokens for state in self.states]
        return _mean([tokens.coarse_count for tokens in sets]), _mean([tokens.fine_count for tokens in sets])


Run = TypeVar("Run", bound=PackedRun)


@dataclass(frozen=True)
class _Group:
    """Images of a batch that have the same tokens, and their positions in the model's own form.

    Attributes:
        images: numbers within the batch.
        tokens: of the generated image.
        units: the frame of the positions.
        references: token set of each reference image.
        counts: tokens of each image, the generated one first.
        bias: on the keys of all images' tokens in attention, `[S]`; None for none.
        ids: FLUX's, `[S, 3]`; None for a model that makes its positions from `img_shapes`.
        proxy: what makes positions for such a model.
    """

    images: tuple[int, ...]
    tokens: TokenSet
    units: Units
    references: Sequence[TokenSet]
    counts: tuple[int, ...]
    bias: Tensor | None = None
    ids: Tensor | None = None
    proxy: PositionProxy | None = None


class PackedEngine(ResolutionEngine[Run, Record, Plan]):
    """Base of the engines for packed tokens; see `ResolutionEngine`."""

    def __init__(self, pipe: Any, method: Any) -> None:
        super().__init__(pipe, method)
        self.pixels = PixelLayout.of(pipe.vae)

    # --- what a method decides

    @property
    def coarse_weight(self) -> float:
        """Weight in attention of a coarse token of the generated image beside fine ones, 1 being that of any other.

        Another one needs a transformer that `check_key_bias` lets pass.
        """
        return 1.0

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
    def reference_sets(self, run: Run, own: TokenSet) -> Sequence[TokenSet]:
        """Token sets of the reference images at this step.

        Args:
            run: the run.
            own: token set of the generated image that they stand beside.
        """

    @abstractmethod
    def reference_tokens(self, run: Run, hidden: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """Coarse tokens `[B, n, C]` and fine ones `[B, 4 n, C]` of the reference images.

        Args:
            run: the run.
            hidden: the transformer's tokens as the pipeline made them.
        """

    @abstractmethod
    def units(self, run: Run, own: TokenSet) -> Units:
        """The frame of the positions at this step, of images with these tokens."""

    @abstractmethod
    def move(self, run: Run, image: int, velocity: tuple[Tensor, Tensor]) -> None:
        """Take a step on the true tokens of one image; its state is changed in place.

        Args:
            run: the run, whose levels say from which noise level to which.
            image: number within the batch.
            velocity: of all coarse tokens and of all fine ones, zero where the sequence has none.
        """

    def moved(self, run: Run) -> None:
        """All images have taken the step, after which noise levels may be written."""

    # --- the base's questions

    def begin(self, number: int, levels: NoiseLevels, module: Any, arguments: Mapping[str, Any]) -> Run:
        return self.begin_tokens(number, levels, grid_sizes(arguments), arguments["hidden_states"].float())

    def coarse_forward(self, run: Run, module: Any, forward: Forward, arguments: Mapping[str, Any]) -> Any:
        given = arguments["hidden_states"]
        if len(run.states) != len(given):
            raise AdapterError(
                f"{self.name} began with {len(run.states)} images, and the transformer is called with {len(given)}; "
                "guidance in one batch is not served"
            )
        self._regroup(run, module, shapes=arguments.get("img_shapes") is not None)
        references = self.reference_tokens(run, given)
        output, predictions = None, dict[int, Tensor]()
        for group in run.groups:
            output = self._group_forward(run, group, references, module, forward, arguments)
            # Whole tokens are copied, not latent pixels: Qwen-Image's guidance rescales each token to its own length.
            full = group.tokens.spread(output[0][:, : group.tokens.count])
            if len(run.groups) == 1:
                return with_sample(output, full)
            predictions |= {image: full[row : row + 1] for row, image in enumerate(group.images)}
        return with_sample(output, _cat([predictions[image] for image in range(len(given))]))

    def _group_forward(
        self,
        run: Run,
        group: _Group,
        references: Sequence[tuple[Tensor, Tensor]],
        module: Any,
        forward: Forward,
        arguments: Mapping[str, Any],
    ) -> Any:
        own = [run.states[image] for image in group.images]
        parts = [group.tokens.gather(_cat([state.coarse for state in own]), _cat([state.fine for state in own]))]
        for tokens, (coarse, fine) in zip(group.references, references, strict=True):
            parts.append(tokens.gather(_rows(coarse, group.images), _rows(fine, group.images)))
        given = arguments["hidden_states"]
        hidden = torch.cat([part.float() for part in parts], 1).to(given.dtype)
        replaced = _of_images(arguments, group.images, len(given)) | {"hidden_states": hidden}
        if group.bias is not None:
            replaced = with_key_bias(replaced, group.bias.to(given.dtype))
        if group.proxy is None:
            return forward(**{**replaced, "img_ids": group.ids})
        shapes = [[(1, 1, count) for count in group.counts]] * len(hidden)
        with use_positions(module, group.proxy):
            return forward(**{**replaced, "img_shapes": shapes})

    def _regroup(self, run: Run, module: Any, *, shapes: bool) -> None:
        """Make the groups again if an image's tokens or the frame of the positions changed."""
        now = {image: group for group in run.groups for image in group.images}
        if now and all(
            now[image].tokens is state.tokens and now[image].units == self.units(run, state.tokens)
            for image, state in enumerate(run.states)
        ):
            return
        alike: dict[bytes, list[int]] = {}
        for image, state in enumerate(run.states):
            alike.setdefault(state.tokens.key if len(run.states) > 1 else b"", []).append(image)
        run.groups = []
        for images in alike.values():
            tokens = run.states[images[0]].tokens
            for image in images:
                run.states[image].tokens = tokens
            references, units = self.reference_sets(run, tokens), self.units(run, tokens)
            placed = [each.image_tokens(units) for each in (tokens, *references)]
            counts, device = tuple(each.count for each in (tokens, *references)), tokens.fine.device
            ids = None if shapes else flux_ids(placed, device)
            proxy = position_proxy(module, *qwen_positions(placed), device) if shapes else None
            bias = None
            if self.coarse_weight != 1 and tokens.coarse_count and tokens.fine_count:
                bias = torch.zeros(sum(counts), device=device)
                bias[: tokens.coarse_count] = math.log(self.coarse_weight)
            run.groups.append(_Group(tuple(images), tokens, units, references, counts, bias, ids, proxy))

    def size(self, run: Run, arguments: Mapping[str, Any]) -> ForwardSize:
        text = arguments.get("encoder_hidden_states")
        others = 0 if text is None else text.shape[1]
        full, images = run.grids[0][0] * run.grids[0][1], arguments["hidden_states"].shape[1]
        if not run.states:
            return ForwardSize(full, full, images + others, images + others)
        counts = [group.counts for group in run.groups for _ in group.images]
        return ForwardSize(
            tokens=_mean([own for own, *_ in counts]),
            full_tokens=full,
            sequence=_mean([sum(each) for each in counts]) + others,
            full_sequence=images + others,
        )

    def advance(self, run: Run, step: SamplerStep) -> tuple[Tensor | None, bool]:
        if not run.states:
            return None, False
        before = [state.tokens.count for state in run.states]
        for image, state in enumerate(run.states):
            velocity = state.tokens.collect(step.prediction[image : image + 1]).float()
            self.move(run, image, state.tokens.scatter(velocity))
        self.moved(run)
        step.skip()
        preview = _cat([state.preview() for state in run.states])
        switched = [state.tokens.count for state in run.states] != before
        if all(state.complete for state in run.states):
            run.states, run.groups = [], []  # the pipeline is given the true latents from here on
        return preview, switched


# --- images of a batch


def _of_images(arguments: Mapping[str, Any], images: tuple[int, ...], batch: int) -> dict[str, Any]:
    """A forward's arguments for some images of the batch."""
    if len(images) == batch:
        return dict(arguments)
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        found[name] = value
        if isinstance(value, Tensor) and name in BATCHED:
            if value.dim() and len(value) == batch:
                found[name] = _rows(value, images)
        elif isinstance(value, (list, tuple)) and name in BATCHED and len(value) == batch:
            found[name] = [value[image] for image in images]
        elif isinstance(value, dict) and EMBEDDED_IMAGES in value:
            found[name] = {**value, EMBEDDED_IMAGES: [_rows(each, images) for each in value[EMBEDDED_IMAGES]]}
        elif isinstance(value, Tensor) and name not in SHARED:
            raise AdapterError(
                f"the transformer was called with {name}, and it is not known what of it belongs to which image; "
                "generate one image at a time"
            )
    return found


def _rows(values: Tensor, images: Sequence[int]) -> Tensor:
    return values if len(images) == len(values) else _cat([values[image : image + 1] for image in images])


def _cat(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.cat(list(values))


def _mean(values: Sequence[int]) -> int:
    return round(sum(values) / len(values))


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
