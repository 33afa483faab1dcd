"""Tokens of two sizes in the loop of a packed-token pipeline (FLUX, Qwen-Image): what all such methods share.

The pipeline's loop stays. The engine holds the true tokens, in float32, and stands around the transformer's forward,
which gets them, and around `scheduler.step`, where the guided prediction is taken back. The pipeline itself sees
full-size tensors: predictions with every coarse token copied to the four that it covers, and latents to look at.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from diffusers.hooks import ModelHook
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor, nn

from hasten.errors import AdapterError, AlreadyAcceleratedError, ConfigError, ScheduleError, TargetError
from hasten.pipeline.hooks import hook_forward, wrap_step
from hasten.pipeline.scheduler import check_scheduler, skip_step
from hasten.resolution.pixel_layout import Canvas
from hasten.resolution.positions import Image, TokenSet, Units, flux_ids, grid_sizes, position_proxies
from hasten.resolution.seams import MixedState

__all__ = ["PackedEngine", "PackedRun", "Part", "check_even", "check_total"]

HOOK_NAME = "hasten-packed"
PURE = 0.99  # least noise level that a run may begin at
Part = tuple[TokenSet, Units, Tensor]  # a image's tokens, the frame of their positions, their values [B, S, C]


@dataclass
class PackedRun:
    """What is remembered of the call under way.

    Attributes:
        number: counts runs from 0.
        total: steps.
        state: the true tokens; None where the pipeline's own latents are true.
        step: counts steps from 0.
        shown: the latents that the pipeline was given to look at.
        layout: the positions of the last step.
    """

    number: int
    total: int
    state: MixedState | None
    step: int = 0
    shown: Tensor | None = None
    layout: _Layout | None = None


@dataclass(frozen=True)
class _Layout:
    """Images of a step, and their ids where the model takes ids; they stay the same until tokens are promoted."""

    parts: Sequence[tuple[TokenSet, Units]]
    images: Sequence[Image]
    ids: Tensor

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Self:
        kept = [(tokens, units) for tokens, units, _ in parts]
        images = [tokens.image(units) for tokens, units in kept]
        return cls(kept, images, flux_ids(images, parts[0][2].device))

    def fits(self, parts: Sequence[Part]) -> bool:
        """Whether the images are those of `parts`."""
        return len(parts) == len(self.parts) and all(
            units == own and (tokens is mine or torch.equal(tokens.fine, mine.fine))
            for (tokens, units, _), (mine, own) in zip(parts, self.parts, strict=True)
        )


Run = TypeVar("Run", bound=PackedRun)


class _Forward(ModelHook):
    """Stands before and after the transformer's forward. Not `new_forward`: a hook inside may be removed first."""

    def __init__(self, engine: PackedEngine[Any]) -> None:
        super().__init__()
        self.engine = engine

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return args, self.engine.enter(module, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return self.engine.leave(output)


class PackedEngine(ABC, Generic[Run]):
    """Base of the engines; also a context manager that removes itself at the end.

    Args:
        pipe: one of `pipelines`.
        name: of the method, for messages.

    Raises:
        TargetError: for another pipeline, or a compiled transformer.
        ConfigError: for a scheduler that cannot be served.
        AlreadyAcceleratedError: if the pipeline has such an engine already.
    """

    pipelines: ClassVar[tuple[str, ...]]

    def __init__(self, pipe: Any, name: str) -> None:
        self.pipe, self.name = pipe, name
        self._run: Run | None = None
        self._number = 0
        self._inside, self._forward = False, ExitStack()
        self._check_pipeline()
        self.scheduler = pipe.scheduler
        self.canvas = Canvas.of(pipe.vae)
        # Holding the tensor keeps its identity from being given to another one.
        self._timesteps = self.scheduler.timesteps
        unhook = hook_forward(pipe.transformer, _Forward(self), HOOK_NAME)
        self._own_step, unwrap = wrap_step(self.scheduler, self._step)
        self._removals = [unhook, unwrap]

    def remove(self) -> None:
        """Take the engine away and leave pipeline and scheduler as they were found; records stay readable."""
        self._run = None
        self._forward.close()
        while self._removals:
            self._removals.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    # --- what a method decides

    @abstractmethod
    def begin(self, number: int, total: int, sizes: Sequence[tuple[int, int]], hidden: Tensor) -> Run:
        """A run whose first forward is about to happen.

        Args:
            number: of the run.
            total: its steps.
            sizes: rows and columns of tokens of each image, the one that is made first.
            hidden: the transformer's tokens, float32: unit noise, then the references.
        """

    @abstractmethod
    def references(self, run: Run, hidden: Tensor) -> Sequence[Part]:
        """The tokens of the reference images at this step.

        Args:
            run: the run.
            hidden: the transformer's tokens as the pipeline made them.
        """

    @abstractmethod
    def units(self, run: Run) -> Units:
        """The frame of the positions at this step."""

    @abstractmethod
    def move(self, run: Run, state: MixedState, velocity: tuple[Tensor, Tensor], sigma: float, after: float) -> None:
        """Take a step on the true tokens: the state is changed in place, and set to None in the run when complete.

        Args:
            run: the run.
            state: tokens at `sigma`.
            velocity: of all coarse tokens and of all fine ones, zero where the sequence has none.
            sigma: noise level before the step.
            after: the scheduler's level after it.
        """

    @abstractmethod
    def record(self, run: Run, coarse: int, fine: int, sigma: float, after: float, switched: bool) -> None:
        """Remember a step: tokens that the transformer saw, noise levels, whether tokens were promoted at its end."""

    # --- around the transformer

    def enter(self, module: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the transformer's forward, with the true tokens and their positions."""
        self._forward.close()
        if self._inside:  # the last forward did not come to its end
            self._run = None
        self._inside = True
        self._check_place(module)
        if self.scheduler.timesteps is not self._timesteps:
            self._run, self._timesteps = None, self.scheduler.timesteps
            self._run = self._begin(arguments)
        run = self._run
        if run is None or run.state is None:
            return arguments
        own = (run.state.tokens, self.units(run), run.state.tokens.gather(run.state.coarse, run.state.fine))
        parts = [own, *self.references(run, arguments["hidden_states"])]
        if run.layout is None or not run.layout.fits(parts):
            run.layout = _Layout.of(parts)
        images = run.layout.images
        hidden = torch.cat([values.float() for _, _, values in parts], 1).to(arguments["hidden_states"].dtype)
        if len(hidden) != len(arguments["hidden_states"]):
            raise AdapterError(
                f"{self.name} began with {len(hidden)} images, and the transformer is called with "
                f"{len(arguments['hidden_states'])}; guidance in one batch is not served"
            )
        if arguments.get("img_shapes") is None:
            return arguments | {"hidden_states": hidden, "img_ids": run.layout.ids}
        self._forward.enter_context(position_proxies(module, images))
        shapes = [[(1, 1, len(image.anchors)) for image in images]] * len(hidden)
        return arguments | {"hidden_states": hidden, "img_shapes": shapes}

    def leave(self, output: Any) -> Any:
        """The transformer's result at full size, every coarse token copied to the four that it covers.

        Whole tokens are copied, not latent pixels: Qwen-Image's guidance rescales each token to its own length.
        """
        self._inside = False
        self._forward.close()
        if self._run is None or self._run.state is None:
            return output
        tokens = self._run.state.tokens
        if isinstance(output, tuple):
            return (tokens.spread(output[0][:, : tokens.count]), *output[1:])
        return type(output)(sample=tokens.spread(output.sample[:, : tokens.count]))

    def _begin(self, arguments: dict[str, Any]) -> Run:
        sigmas = self.scheduler.sigmas
        if self.scheduler.begin_index or float(sigmas[0]) < PURE:
            raise ConfigError(
                f"{self.name} needs a run that begins with pure noise, but this one begins at sigma "
                f"{float(sigmas[0]):.3f}, index {self.scheduler.begin_index or 0}; a start from a image is not served"
            )
        number = self._number
        self._number += 1
        return self.begin(number, len(sigmas) - 1, grid_sizes(arguments), arguments["hidden_states"].float())

    def _check_place(self, module: Any) -> None:
        if self.pipe.scheduler is not self.scheduler:
            raise ConfigError(
                f"the pipeline was given another scheduler after {self.name} was put on it; "
                "remove the acceleration, set the scheduler, and switch it on again"
            )
        if module._diffusers_hook._hook_order[-1] != HOOK_NAME:
            raise ConfigError(
                f"another hook was put around the transformer after {self.name}, and would see full-size latents; "
                f"attach caching first, and {self.name} last"
            )

    # --- around the scheduler

    def _step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = self._run
        if run is None:
            return self._own_step(model_output, timestep, sample, *args, **kwargs)
        try:
            output = self._advance(run, model_output, timestep, sample, *args, **kwargs)
        except BaseException:
            self._run = None
            raise
        run.step += 1
        if run.step == run.total:
            self._run = None
        return output

    def _advance(self, run: Run, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        sigma, after = (float(level) for level in self.scheduler.sigmas[run.step : run.step + 2])
        state = run.state
        if state is None:
            self.record(run, 0, sample.shape[1], sigma, after, switched=False)
            return self._own_step(model_output, timestep, sample, *args, **kwargs)
        self._check_shown(run, sample)
        coarse, fine = state.tokens.coarse_count, state.tokens.fine_count
        velocity = state.tokens.scatter(state.tokens.collect(model_output).float())
        self.move(run, state, velocity, sigma, after)
        after = float(self.scheduler.sigmas[run.step + 1])  # a promotion may have raised it
        self.record(run, coarse, fine, sigma, after, switched=state.tokens.coarse_count < coarse)
        skip_step(self.scheduler, timestep)
        if state.complete:
            run.state = None  # the pipeline is given the true latents from here on
        run.shown = state.shown().to(model_output.dtype)
        return SchedulerOutput(prev_sample=run.shown) if kwargs.get("return_dict", True) else (run.shown,)

    @staticmethod
    def _check_shown(run: PackedRun, sample: Tensor) -> None:
        if run.step and sample is not run.shown and not (run.shown is not None and torch.equal(sample, run.shown)):
            raise ConfigError(
                f"the latents were changed between steps {run.step - 1} and {run.step}, perhaps by a callback, but the "
                "true ones are in part coarse; change them where all tokens are fine"
            )

    # --- checks

    def _check_pipeline(self) -> None:
        pipe, kind = self.pipe, type(self.pipe).__name__
        if not {cls.__name__ for cls in type(pipe).__mro__} & set(self.pipelines):
            raise TargetError(f"{kind} cannot run {self.name}; served: {', '.join(self.pipelines)}")
        module = pipe.transformer
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise TargetError(
                "the transformer is compiled as a whole, which passes hooks by; "
                "compile its blocks instead: transformer.compile_repeated_blocks(dynamic=True)"
            )
        check_scheduler(pipe.scheduler, self.name, multistep=False)
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and registry.get_hook(HOOK_NAME) is not None:
            raise AlreadyAcceleratedError(
                f"this {kind} has tokens of two sizes already; call .remove() on its acceleration first"
            )


def check_total(name: str, split: str, evaluations: int, total: int) -> None:
    """Raises ScheduleError if a run has another number of steps than a method."""
    if total != evaluations:
        raise ScheduleError(
            f"{name} has {split} = {evaluations} steps, but the run has {total}; call the pipeline with "
            f"num_inference_steps={evaluations}, or change the split"
        )


def check_even(name: str, sizes: Sequence[tuple[int, int]]) -> None:
    """Raises ConfigError if a image's tokens cannot be counted in coarse tokens of 2x2."""
    odd = [f"{rows}x{columns}" for rows, columns in sizes if rows % 2 or columns % 2]
    if odd:
        raise ConfigError(
            f"{name} cannot begin in half size with images of {' and '.join(odd)} tokens; use heights and widths "
            "with an even number of tokens (multiples of 32 pixels for FLUX and Qwen-Image)"
        )
