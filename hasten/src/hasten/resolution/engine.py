"""The base of the resolution engines, which stand between a pipeline's loop, its transformer and its scheduler.

The pipeline's loop stays as it is. The engine holds the true latents, coarse in part, and stands at two places: around
the transformer's forward, which gets the true latents and whose prediction is copied to full size (guidance is linear
and does not notice), and around `scheduler.step`, where the guided prediction is taken back and the step is taken on
the true latents. The pipeline itself sees full-size tensors only.
Two layouts stand on this base: packed tokens of two sizes (`packed.py`) and uniform coarse grids (`planned.py`).
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor

from hasten.errors import ConfigError, HastenWarning, TargetError
from hasten.models.blocks import argument_names
from hasten.parameters import Declared
from hasten.pipeline.hooks import Forward, Hook, Remove, attach, compiled_call, pass_name, wrap_step
from hasten.pipeline.numbers import FiniteCheck
from hasten.pipeline.records import KEPT
from hasten.pipeline.runs import Runs, StepInfo
from hasten.pipeline.scheduler import NoiseLevels, check_scheduler
from hasten.pipeline.view import PipelineView
from hasten.resolution.report import ForwardSize, ResolutionRecord, ResolutionReport
from hasten.resolution.sampler_step import SamplerStep, SamplerSteps

__all__ = ["ResolutionEngine", "ResolutionMethod", "ResolutionRun", "with_sample"]

PLANS = 4 * KEPT  # that are kept; a run has one, or one for each image and change of resolution
PURE = 0.99  # least noise level that a run may begin at


class ResolutionMethod(Declared, ABC):
    """Base of the resolution methods, frozen dataclasses."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def num_inference_steps(self) -> int | None:
        """Steps that the pipeline has to be called with; None for any number."""
        return None

    @abstractmethod
    def engine(self, pipe: Any) -> ResolutionEngine[Any, Any, Any]:
        """What runs a pipeline with this method, not yet attached; raises the errors of `ResolutionEngine`."""

    def attach(self, pipe: Any) -> ResolutionEngine[Any, Any, Any]:
        """Put the method on a pipeline, around what is there, until `.remove()` or the end of the `with`."""
        engine = self.engine(pipe)
        engine.attach()
        return engine


@dataclass(kw_only=True)
class ResolutionRun:
    """What is remembered of the call under way.

    Attributes:
        number: counts runs from 0.
        levels: noise levels.
        step: counts steps from 0.
        preview: the full-size latents that the pipeline was given in the place of the true ones.
        size: of the last forward.
        cost: of the last forward, see `ResolutionRecord`.
        label: of the last forward.
    """

    number: int
    levels: NoiseLevels
    step: int = 0
    preview: Tensor | None = None
    size: ForwardSize | None = None
    cost: float = 1.0
    label: StepInfo | None = None

    @property
    def total(self) -> int:
        """Steps of the run."""
        return len(self.levels)

    @property
    def coarse(self) -> bool:
        """Whether the true latents are the engine's; elsewhere the pipeline's own are true."""
        raise NotImplementedError


Run = TypeVar("Run", bound=ResolutionRun)
Record = TypeVar("Record", bound=ResolutionRecord)
Plan = TypeVar("Plan")


# --- the engine


class ResolutionEngine(Hook, Generic[Run, Record, Plan]):
    """Base of the engines; also a context manager that removes itself at the end.

    Args:
        pipe: one of `pipelines`.
        method: what to do.

    Attributes:
        records: one per sampler step, of the latest runs.
        plans: what was decided in the latest ones, such as grids, layouts and edit maps.

    Raises:
        TargetError: for another pipeline, or a compiled transformer.
        ConfigError: for a scheduler that cannot be served.
    """

    kind: ClassVar[str] = "resolution"
    level: ClassVar[int] = 1  # outside of caches, which are given the true latents
    pipelines: ClassVar[tuple[str, ...]]
    transformers: ClassVar[tuple[str, ...]] = ("transformer",)
    multistep: ClassVar[bool] = False  # whether a UniPC will do

    def __init__(self, pipe: Any, method: Any) -> None:
        self.pipe, self.method, self.name = pipe, method, type(method).__name__
        self.records: list[Record] = []
        self.plans: list[Plan] = []
        self._number = 0
        self._numbers = FiniteCheck(self.name)
        self._runs: Runs | None = None
        self._begun: Tensor | None = None
        self._before: Tensor | None = None
        self._removals: list[Remove] = []
        self._modules = self._checked_modules()
        self.check()

    def attach(self) -> None:
        """Stand around the transformer's calls and the scheduler's step.

        Raises:
            AlreadyAcceleratedError: if the transformer has a resolution method already.
        """
        self.scheduler = self.pipe.scheduler
        self._runs = Runs(self._modules[0], PipelineView(self.pipe))
        # The list that the last run began with; holding it keeps its identity from being given to another one.
        self._begun = self._before = self.scheduler.timesteps
        try:
            for module in self._modules:
                self._removals.append(attach(module, self))
        except BaseException:
            self.remove()
            raise
        steps = SamplerSteps(self.scheduler, self._step)
        steps.own, unwrap = wrap_step(self.scheduler, steps)
        self._removals.append(unwrap)

    def remove(self) -> None:
        """Take the engine away and leave pipeline and scheduler as they were found; records stay readable."""
        under_way = () if self._runs is None else self._runs.under_way
        if any(run.state is not None and run.state.coarse for run in under_way if self._removals):
            warnings.warn(
                f"{self.name} was removed in the middle of a call that is still coarse: its image has lost what the "
                "coarse tokens held; call the pipeline again",
                HastenWarning,
                stacklevel=3,
            )
        self._numbers.settle()
        while self._removals:
            self._removals.pop()()
        self.pipe = self.scheduler = self._runs = self._begun = self._before = None  # it keeps no model
        self._modules.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def report(self, run: int = -1) -> ResolutionReport:
        """What a run saved; the latest one unless told otherwise.

        Raises:
            ConfigError: if there was no such run.
        """
        numbers = sorted({record.run for record in self.records})
        if not -len(numbers) <= run < len(numbers):
            raise ConfigError(f"there is no run {run} of {self.name} to report on: call the pipeline first")
        return ResolutionReport.of(self.name, [record for record in self.records if record.run == numbers[run]])

    # --- what an engine for a layout of latents does

    def check(self) -> None:
        """Refuse what the engine cannot serve, before anything is changed."""

    @abstractmethod
    def begin(self, number: int, levels: NoiseLevels, module: Any, arguments: Mapping[str, Any]) -> Run:
        """A run whose first forward is about to happen.

        Args:
            number: of the run.
            levels: its noise levels, from pure noise on.
            module: the transformer.
            arguments: of its forward, by name.
        """

    @abstractmethod
    def coarse_forward(self, run: Run, module: Any, forward: Forward, arguments: Mapping[str, Any]) -> Any:
        """The transformer's result at full size, from a forward on the true latents.

        Args:
            run: the run, which is coarse.
            module: the transformer.
            forward: runs it.
            arguments: the pipeline's own, by name.
        """

    @abstractmethod
    def size(self, run: Run, arguments: Mapping[str, Any]) -> ForwardSize:
        """Sequence lengths of the forward that has happened; `arguments` are the pipeline's own."""

    @abstractmethod
    def record(self, run: Run, common: dict[str, Any]) -> Record:
        """The record of the step that is about to be taken.

        Args:
            run: the run.
            common: fields of `ResolutionRecord`.
        """

    @abstractmethod
    def advance(self, run: Run, step: SamplerStep) -> tuple[Tensor | None, bool]:
        """Take a step on the true latents.

        Args:
            run: the run, changed in place.
            step: what the pipeline asked for.

        Returns:
            full-size latents for the pipeline to have, or None to leave the step to the scheduler; and whether the
            resolution changed.
        """

    def finish(self, run: Run, latents: Tensor) -> Tensor:
        """The latents that the pipeline is given at the end of the run."""
        return latents

    # --- around the transformer

    def call(self, module: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the transformer on the true latents, with the result at full size."""
        if torch.is_grad_enabled():
            self.tell_of_gradients(module)
            return forward(*args, **kwargs)
        arguments = dict(zip(argument_names(type(module)), args, strict=False)) | kwargs  # type: ignore[arg-type]
        run = self._run_of(module, arguments)
        if run is None:
            return forward(*args, **kwargs)
        try:
            output = self.coarse_forward(run, module, forward, arguments) if run.coarse else forward(*args, **kwargs)
            run.size = self.size(run, arguments)
            run.cost = run.size.cost(module)
            assert run.label is not None
            self._numbers.forward(run.label, True, arguments.get("hidden_states"), output[0])
            return output
        except BaseException:
            self.end_run()
            raise

    def end_run(self) -> None:
        """Forget what is remembered of this thread's run."""
        self._numbers.settle()
        if self._runs is not None and self._runs.current is not None:
            self._runs.current.state = None

    def _run_of(self, module: Any, arguments: Mapping[str, Any]) -> Run | None:
        """The run that a forward belongs to; None where it is not one of this pipeline's runs."""
        assert self._runs is not None
        labelled = self._runs.label(arguments.get("timestep"), arguments.get("hidden_states"), pass_name(module))
        if labelled is None:
            return None
        found, label = labelled
        scheduler = None if found.view is None else found.view.scheduler
        if label.first_step:
            home = found.view is not None and found.view.pipe is self.pipe
            if home and scheduler is not self.scheduler:
                raise ConfigError(
                    f"the pipeline was given another scheduler after {self.name} was put on it; "
                    "remove the acceleration, set the scheduler, and switch it on again"
                )
            if home and found.sampler_timesteps is not self._begun:
                self._begun = found.sampler_timesteps
                found.state = self._begin(module, arguments)
            elif home and found.owner.frame is not None and not (found.late and self._begun is self._before):
                raise ConfigError(
                    f"the scheduler was set for another run in the middle of one with {self.name}, by a call from a "
                    f"callback or on another thread, or {self.name} came in its first step; give each pipeline a "
                    "scheduler of its own"
                )
            elif scheduler is self.scheduler:  # another pipeline goes by it, which a run under way must not miss
                self._begun = found.sampler_timesteps
        state: Run | None = found.state
        if state is not None:
            state.label = label
        return state

    def _begin(self, module: Any, arguments: Mapping[str, Any]) -> Run:
        self._numbers.settle()  # of a run before that no pipeline ended
        levels = NoiseLevels(self.scheduler)
        if self.scheduler.begin_index or levels[0] < PURE:
            raise ConfigError(
                f"{self.name} needs a run that begins with pure noise, but this one begins at sigma {levels[0]:.3f}, "
                f"index {self.scheduler.begin_index or 0}; a start from an image or a clip is not served"
            )
        number = self._number
        self._number += 1
        self._forget_oldest(number)
        return self.begin(number, levels, module, arguments)

    def _forget_oldest(self, number: int) -> None:
        """Drop records and plans of runs that are long over; runs under way may count on the place of a plan."""
        assert self._runs is not None
        self.records[:] = [record for record in self.records if record.run > number - KEPT]
        if all(run.state is None for run in self._runs.under_way):
            del self.plans[:-PLANS]

    # --- around the scheduler

    def _step(self, step: SamplerStep) -> Any:
        found = None if self._runs is None else self._runs.current  # None: wrapped again by others, then removed
        if found is None or found.state is None or found.sampler_timesteps is not self.scheduler.timesteps:
            return step.plain()
        run: Run = found.state
        try:
            output = self._advance(run, step)
        except BaseException:
            found.state = None
            raise
        run.step += 1
        if run.step == run.total:
            found.state = None
        return output

    def _advance(self, run: Run, step: SamplerStep) -> Any:
        if run.coarse and run.step:
            self._check_preview(run, step.sample)
        assert run.size is not None
        record = self.record(
            run,
            {
                "run": run.number,
                "step": run.step,
                "sigma": run.levels[run.step],
                "next_sigma": run.levels[run.step + 1],
                "switched": False,
                "tokens": run.size.tokens,
                "full_tokens": run.size.full_tokens,
                "cost": run.cost,
            },
        )
        latents, switched = self.advance(run, step)
        # A change of resolution may have raised the level after the step.
        self.records.append(replace(record, next_sigma=run.levels[run.step + 1], switched=switched))
        if latents is None:
            output = step.plain()
        else:
            run.preview = latents.to(step.prediction.dtype)
            output = step.output(run.preview)
        if run.step + 1 < run.total:
            return output
        final = self.finish(run, output[0])
        return output if final is output[0] else step.output(final)

    def _check_preview(self, run: Run, sample: Tensor) -> None:
        if sample is not run.preview and not (run.preview is not None and torch.equal(sample, run.preview)):
            raise ConfigError(
                f"the latents were changed between steps {run.step - 1} and {run.step}, perhaps by a callback, but the "
                f"true ones are coarse; with {self.name} change them in steps at full size only"
            )

    # --- checks

    def _checked_modules(self) -> list[Any]:
        pipe, kind = self.pipe, type(self.pipe).__name__
        if not {cls.__name__ for cls in type(pipe).__mro__} & set(self.pipelines):
            raise TargetError(f"{kind} cannot run {self.name}; served: {', '.join(self.pipelines)}")
        modules = [module for name in self.transformers if (module := getattr(pipe, name, None)) is not None]
        for module in modules:
            if hasattr(module, "_orig_mod") or compiled_call(module) is not None:
                raise TargetError(
                    "the transformer is compiled as a whole, which passes hooks by; "
                    "compile its blocks instead: transformer.compile_repeated_blocks(dynamic=True)"
                )
        check_scheduler(pipe.scheduler, self.name, multistep=self.multistep)
        return modules


def with_sample(output: Any, sample: Tensor) -> Any:
    """A transformer's output, a tuple or a model output, with another prediction in it."""
    return (sample, *output[1:]) if isinstance(output, tuple) else type(output)(sample=sample)
