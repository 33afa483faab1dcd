"""The engine for video hosts whose stages are uniform: smaller latents on the way, full-size ones for the pipeline.

The pipeline's loop stays as it is. The engine keeps the true latents of a coarse stage and stands at two places: around
the transformer's forward, which gets the coarse latents and whose prediction is copied to full size (guidance is linear
and does not notice), and around `scheduler.step`, where the guided prediction is taken back and the scheduler's own
step is done on the coarse latents. Where stages meet, the clean estimate is enlarged and noised anew. The model makes
its positions from the shape of the latents.

Noise levels of a later stage are written into the scheduler's own `sigmas` and `timesteps` (made anew for each run), so
that the loop, the choice between two experts and the scheduler's step all go by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers.hooks import ModelHook
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor, nn

from hasten.errors import AdapterError, AlreadyAcceleratedError, ConfigError, TargetError
from hasten.pipeline.hooks import hook_forward, wrap_step
from hasten.pipeline.scheduler import check_scheduler, own_shift, set_levels, skip_step
from hasten.resolution.axes import Axes, block_noise, enlarge, gather, nested_axes, pick, smooth, spread
from hasten.resolution.plan import Grid, Plan, StagedMethod, switch_steps

__all__ = ["StageRecord", "StagesEngine"]

HOOK_NAME = "hasten-stages"
PIPELINES = ("WanPipeline", "HunyuanVideoPipeline")
EXPERTS = ("transformer", "transformer_2")
PURE = 0.99  # least noise level that a run may begin at


@dataclass(frozen=True)
class StageRecord:
    """One sampler step.

    Attributes:
        run: counts runs from 0.
        step: counts steps from 0.
        stage: whose grid the transformer saw, from 0.
        grid: frames, height and width of the latents that it saw.
        sigma: noise level of these latents.
        next_sigma: noise level after the step.
        switched: whether the next stage's latents were made at the end of the step.
    """

    run: int
    step: int
    stage: int
    grid: Grid
    sigma: float
    next_sigma: float
    switched: bool


@dataclass
class _Run:
    """What is remembered of the call under way."""

    number: int
    total: int
    sigmas: Tensor  # the pipeline's own, [total + 1]
    full: Grid
    patch: Grid
    switches: tuple[int, ...]
    ratios: tuple[float, ...]
    layouts: list[Axes]  # of the stages, as far as they are planned
    step: int = 0
    stage: int = 0
    field: Tensor | None = None  # the full-size noise, [B, C, T, H, W], float32
    latents: Tensor | None = None  # the true latents of a coarse stage, float32; None where the pipeline's are true
    shown: Tensor | None = None  # what the pipeline was given instead

    @property
    def axes(self) -> Axes:
        return self.layouts[self.stage]

    @property
    def grid(self) -> Grid:
        frames, rows, columns = self.axes
        return len(frames), len(rows), len(columns)

    @property
    def coarse(self) -> bool:
        return self.grid != self.full


class _Forward(ModelHook):
    """Stands before and after the transformer's forward. Not `new_forward`: a hook inside may be removed first."""

    def __init__(self, engine: StagesEngine) -> None:
        super().__init__()
        self.engine = engine

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return self.engine.enter(module, args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return self.engine.leave(output)


class StagesEngine:
    """Runs one pipeline in stages; also a context manager that removes itself at the end.

    Args:
        pipe: a text-to-video pipeline of Wan (also with two experts) or HunyuanVideo.
        method: the stages.

    Raises:
        TargetError: for another pipeline, or a compiled transformer.
        ConfigError: for a scheduler that cannot be served.
        AlreadyAcceleratedError: if the pipeline runs in stages already.
    """

    def __init__(self, pipe: Any, method: StagedMethod) -> None:
        self.pipe, self.method = pipe, method
        self.records: list[StageRecord] = []
        self.plans: list[Plan] = []
        self._run: _Run | None = None
        self._number = 0
        self._inside = False
        self._modules = _transformers(pipe)
        self.scheduler = check_scheduler(pipe.scheduler)
        method.ratios(own_shift(self.scheduler))
        # Holding the tensor keeps its identity from being given to another one.
        self._timesteps = self.scheduler.timesteps
        self._attach()

    # --- attaching and detaching

    def _attach(self) -> None:
        for module in self._modules:
            registry = getattr(module, "_diffusers_hook", None)
            if registry is not None and registry.get_hook(HOOK_NAME) is not None:
                raise AlreadyAcceleratedError(
                    f"this {type(self.pipe).__name__} runs in stages already; call .remove() on its engine first"
                )
        hooked = [hook_forward(module, _Forward(self), HOOK_NAME) for module in self._modules]
        self._own_step, unwrap = wrap_step(self.scheduler, self._step)
        self._removals = [*hooked, unwrap]

    def remove(self) -> None:
        """Take the engine away and leave pipeline and scheduler as they were found; records stay readable."""
        self._run = None
        while self._removals:
            self._removals.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    # --- around the transformer

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Arguments of the transformer's forward, with the latents of the stage in the place of the pipeline's."""
        if self._inside:  # the last forward did not come to its end
            self._run = None
        self._inside = True
        self._check_place(module)
        arguments = dict(zip(("hidden_states", "timestep"), args, strict=False)) | kwargs
        hidden, timestep = arguments["hidden_states"], arguments["timestep"]
        if self.scheduler.timesteps is not self._timesteps:
            self._run, self._timesteps = None, self.scheduler.timesteps
            self._run = self._begin(module, hidden)
        run = self._run
        if run is None or not run.coarse:
            return args, kwargs
        self._check_timestep(run, timestep)
        latents = self._read(run, hidden.float()) if run.latents is None else run.latents
        latents = latents.to(hidden.dtype).repeat(len(hidden) // len(latents), 1, 1, 1, 1)
        if timestep.dim() == 2:  # one for each token; all the same in text to video
            tokens = [size // patch for size, patch in zip(run.grid, run.patch, strict=True)]
            timestep = timestep[:, :1].expand(-1, tokens[0] * tokens[1] * tokens[2])
        return args[2:], kwargs | {"hidden_states": latents, "timestep": timestep}

    def leave(self, output: Any) -> Any:
        """The transformer's result at full size, every coarse value copied to its block."""
        self._inside = False
        run = self._run
        if run is None or not run.coarse:
            return output
        if isinstance(output, tuple):
            return (spread(output[0], run.full), *output[1:])
        return type(output)(sample=spread(output.sample, run.full))

    def _begin(self, module: nn.Module, hidden: Tensor) -> _Run:
        sigmas = self.scheduler.sigmas.clone()
        if self.scheduler.begin_index or float(sigmas[0]) < PURE:
            raise ConfigError(
                f"stages need a run that begins with pure noise, but this one begins at sigma {float(sigmas[0]):.3f}, "
                f"index {self.scheduler.begin_index or 0}; video to video is not served"
            )
        full: Grid = (hidden.shape[2], hidden.shape[3], hidden.shape[4])
        patch, total = _patch(module), len(sigmas) - 1
        first = self.method.first(full, patch, total)
        run = _Run(
            number=self._number,
            total=total,
            sigmas=sigmas,
            full=full,
            patch=patch,
            switches=switch_steps(total, self.method.rates),
            ratios=self.method.ratios(own_shift(self.scheduler)),
            layouts=nested_axes([first, full])[:1],
        )
        self._number += 1
        self._set_levels(run)
        return run

    def _check_place(self, module: Any) -> None:
        if self.pipe.scheduler is not self.scheduler:
            raise ConfigError(
                "the pipeline was given another scheduler after it was set to run in stages; "
                "remove the engine, set the scheduler, and attach it again"
            )
        if module._diffusers_hook._hook_order[-1] != HOOK_NAME:
            raise ConfigError(
                "another hook was put around the transformer after it was set to run in stages, "
                "and would see full-size latents; attach caching first, and the stages last"
            )

    def _check_timestep(self, run: _Run, timestep: Tensor) -> None:
        expected, given = float(self.scheduler.timesteps[run.step]), float(timestep.flatten()[0])
        if abs(expected - given) > 1 + 0.01 * expected:
            raise AdapterError(
                f"at step {run.step} the transformer was called with timestep {given:.1f}, but the scheduler is at "
                f"{expected:.1f}; stages need a loop over scheduler.timesteps"
            )

    # --- around the scheduler

    def _step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._run is None:
            return self._own_step(model_output, timestep, sample, *args, **kwargs)
        try:
            return self._advance(self._run, model_output, timestep, sample, *args, **kwargs)
        except BaseException:
            self._run = None
            raise

    def _advance(
        self, run: _Run, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        before, stage = run.grid, run.stage
        if run.step == 0:
            run.field = sample.float()
            run.latents = self._read(run, run.field) if run.coarse else None
        elif run.latents is not None:
            _check_shown(run, sample)
        sigma = float(self.scheduler.sigmas[run.step])
        switched = self._switch(run, model_output, timestep, sample) if run.step in run.switches else None
        if switched is not None:
            latents = switched
        elif run.latents is None:
            output = self._own_step(model_output, timestep, sample, *args, **kwargs)
            self._finish(run, before, stage, sigma, switched=False)
            return output
        else:
            velocity = gather(model_output, run.grid).float()
            latents = self._own_step(velocity, timestep, run.latents, *args, **kwargs | {"return_dict": False})[0]
        run.latents = latents if run.coarse else None
        run.shown = spread(latents, run.full).to(model_output.dtype)
        shown = run.shown
        self._finish(run, before, stage, sigma, switched=switched is not None)
        return SchedulerOutput(prev_sample=shown) if kwargs.get("return_dict", True) else (shown,)

    def _finish(self, run: _Run, grid: Grid, stage: int, sigma: float, *, switched: bool) -> None:
        after = float(self.scheduler.sigmas[run.step + 1])
        self.records.append(StageRecord(run.number, run.step, stage, grid, sigma, after, switched))
        run.step += 1
        if run.step == run.total:
            self._run = None

    def _switch(self, run: _Run, model_output: Tensor, timestep: Any, sample: Tensor) -> Tensor | None:
        """Latents of the next stage at the next step's noise level; None if the next stage is the same as this one."""
        latents = sample.float() if run.latents is None else run.latents
        velocity = gather(model_output, run.grid).float()
        clean = latents - float(self.scheduler.sigmas[run.step]) * velocity
        old, old_ratio = run.axes, run.ratios[run.stage]
        if run.stage == 0:
            plan = self.method.plan(clean, run.full, run.patch, run.total)
            self.plans.append(plan)
            run.layouts = nested_axes(plan.grids, first=old)
        run.stage += 1
        if run.axes == old and run.ratios[run.stage] == old_ratio:
            return None
        self._set_levels(run)
        clean = enlarge(clean, old, run.axes)
        if run.stage == 1 and run.axes != old:
            clean = smooth(clean, self.method.smooth)
        sigma = float(self.scheduler.sigmas[run.step + 1])
        skip_step(self.scheduler, timestep)
        assert run.field is not None
        return (1 - sigma) * clean + sigma * self._read(run, run.field)

    def _set_levels(self, run: _Run) -> None:
        if set(run.ratios) != {1.0}:
            set_levels(self.scheduler, run.sigmas, run.ratios[run.stage], run.step + 1)

    def _read(self, run: _Run, field: Tensor) -> Tensor:
        """Unit noise for the grid of the stage."""
        if self.method.noise == "field":
            return block_noise(field, run.axes)
        if self.method.noise == "anchor" or run.stage == 0:
            return pick(field, run.axes)
        # The seed hangs on the user's own noise, so that a seeded call can be repeated.
        generator = torch.Generator().manual_seed(int(field.flatten()[:1].cpu().view(torch.int32)) + run.stage)
        return torch.randn((*field.shape[:2], *run.grid), generator=generator).to(field.device)


def _transformers(pipe: Any) -> list[Any]:
    """The pipeline's transformers, if it is one whose latents alone make the model's input."""
    if not {cls.__name__ for cls in type(pipe).__mro__} & set(PIPELINES):
        raise TargetError(
            f"{type(pipe).__name__} cannot run in stages: the latents must be all that has a size, and the positions "
            f"made from their shape. Served: {', '.join(PIPELINES)}"
        )
    modules = [module for module in (getattr(pipe, name, None) for name in EXPERTS) if module is not None]
    for module in modules:
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise TargetError(
                "the transformer is compiled as a whole, which passes hooks by; "
                "compile its blocks instead: transformer.compile_repeated_blocks(dynamic=True)"
            )
    return modules


def _patch(module: Any) -> Grid:
    """Latent pixels that make one token, along frames, rows and columns."""
    size = module.config.patch_size
    return (module.config.patch_size_t, size, size) if isinstance(size, int) else tuple(size)


def _check_shown(run: _Run, sample: Tensor) -> None:
    if sample is not run.shown and not (run.shown is not None and torch.equal(sample, run.shown)):
        raise ConfigError(
            f"the latents were changed between steps {run.step - 1} and {run.step}, perhaps by a callback, "
            f"but the true ones are on the grid {run.grid}; change them in the last stage only"
        )
