"""`accelerate`: one line that makes a pipeline faster, and the handle that reports on it and takes it away again."""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from hasten import registry
from hasten.caching.engine import WHOLE, CachingEngine
from hasten.caching.method import CachingMethod
from hasten.errors import ConfigError, HastenWarning, TargetError, unknown
from hasten.pipeline.steps import StepRecord, StepTracker
from hasten.registry import methods
from hasten.resolution.engine import ResolutionEngine, ResolutionMethod
from hasten.solvers import scheduler as _solvers  # noqa: F401
from hasten.streaming.policy import StreamingMethod

__all__ = ["Acceleration", "Summary", "accelerate", "methods"]

TRANSFORMERS = ("transformer", "transformer_2")


@dataclass(frozen=True)
class Summary:
    """What one run saved.

    Attributes:
        method: name of the method's class.
        steps: sampler steps of the run.
        computed_steps: steps whose blocks ran.
        skipped_steps: steps whose features were forecast.
        passes: names of the forwards within a step.
        flops_ratio: `steps / computed_steps`, the figure that papers call the FLOPs ratio (it leaves out the embeddings and the
            final layer that a skipped step still runs).
        cache_bytes: most bytes of features held at once.
        computed_ms: median milliseconds of a computed forward.
        skipped_ms: median milliseconds of a skipped forward, None if there was none.
    """

    method: str
    steps: int
    computed_steps: int
    skipped_steps: int
    passes: tuple[str, ...]
    flops_ratio: float
    cache_bytes: int
    computed_ms: float
    skipped_ms: float | None

    def __str__(self) -> str:
        skipped = "-" if self.skipped_ms is None else f"{self.skipped_ms:.2f} ms"
        return (
            f"{self.method}: {self.computed_steps} of {self.steps} steps computed ({self.flops_ratio:.2f}x fewer), "
            f"{self.skipped_steps} forecast; computed {self.computed_ms:.2f} ms, skipped {skipped}; "
            f"cache {self.cache_bytes / 2**20:.2f} MiB; passes {', '.join(self.passes)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain data."""
        return asdict(self)


def _median(values: list[float]) -> float | None:
    return float(torch.tensor(values, dtype=torch.float64).median()) if values else None


class Acceleration:
    """Handle of an accelerated pipeline or transformer; also a context manager that removes itself at the end."""

    def __init__(
        self, engines: dict[str, CachingEngine], stages: ResolutionEngine[Any, Any, Any] | None = None
    ) -> None:
        self._engines, self._stages = engines, stages

    @property
    def engines(self) -> dict[str, CachingEngine]:
        """What forecasts features on each transformer, by its name in the pipeline; empty without a cache."""
        return self._engines

    @property
    def stages(self) -> ResolutionEngine[Any, Any, Any] | None:
        """What runs the pipeline in coarse and fine stages, with `.records` and `.plans`; None without it."""
        return self._stages

    @property
    def method(self) -> CachingMethod:
        """The caching method at work.

        Raises:
            ConfigError: if there is none, but stages alone.
        """
        if not self._engines:
            raise ConfigError("no caching method is at work here; the stages and their plan are in .stages")
        return next(iter(self._engines.values())).method

    @property
    def records(self) -> list[StepRecord]:
        """One record for each forward since `accelerate` or `reset`, in order."""
        return [record for engine in self._engines.values() for record in engine.records]

    def summary(self, run: int = -1) -> Summary:
        """What a run saved; the latest one unless told otherwise. With two transformers their steps add up.

        Raises:
            ConfigError: if there was no such run.
        """
        chosen: list[StepRecord] = []
        steps: dict[tuple[str, int], bool] = {}
        held: defaultdict[str, int] = defaultdict(int)
        for name, engine in self._engines.items():
            runs = sorted({record.run for record in engine.records})
            if not -len(runs) <= run < len(runs):
                continue
            for record in engine.records:
                if record.run == runs[run]:
                    chosen.append(record)
                    # A pass that comes late has to run though the step is cached; the step counts as cached.
                    steps[name, record.step] = steps.get((name, record.step), True) and record.computed
                    held[name] = max(held[name], record.cache_bytes)
        if not chosen:
            raise ConfigError(f"there is no run {run} to sum up: call the pipeline first")
        computed = sum(steps.values())
        return Summary(
            method=type(self.method).__name__,
            steps=len(steps),
            computed_steps=computed,
            skipped_steps=len(steps) - computed,
            passes=tuple(dict.fromkeys(record.pass_name for record in chosen)),
            flops_ratio=len(steps) / max(computed, 1),
            cache_bytes=sum(held.values()),
            computed_ms=_median([record.ms for record in chosen if record.computed]) or 0.0,
            skipped_ms=_median([record.ms for record in chosen if not record.computed]),
        )

    def estimate_bytes(
        self,
        image_tokens: int,
        *,
        text_tokens: int = 0,
        batch: int = 1,
        passes: int = 1,
        dtype: torch.dtype = torch.bfloat16,
    ) -> int:
        """Bytes of features that a run will hold, before it is run.

        Args:
            image_tokens: tokens of the image between the blocks (FLUX.1 at 1024x1024: 4096).
            text_tokens: tokens of the prompt (the module site keeps features of them, and the hidden site where a model
                puts text and image in one sequence).
            batch: images at a time.
            passes: forwards within a step (2 with classifier-free guidance in two calls).
            dtype: of the model's activations.
        """
        return sum(
            engine.estimate_bytes(image_tokens, text_tokens, batch, passes, dtype) for engine in self._engines.values()
        )

    def reset(self) -> None:
        """Forget all features and records: the next forward starts a new run."""
        for engine in self._engines.values():
            engine.forget()
            engine.records.clear()
        if self._stages is not None:
            self._stages.records.clear()
            self._stages.plans.clear()

    def remove(self) -> None:
        """Take the acceleration away and leave the modules as they were found; records stay readable."""
        if self._stages is not None:
            self._stages.remove()
        for engine in self._engines.values():
            engine.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        own = [repr(self.method)] if self._engines else []
        own += [repr(self._stages.method)] if self._stages is not None else []
        return f"Acceleration({', '.join(own)})"


def _transformers(target: Any) -> dict[str, nn.Module]:
    if isinstance(target, nn.Module):
        return {type(target).__name__: target}
    found = {name: getattr(target, name, None) for name in TRANSFORMERS}
    modules = {name: module for name, module in found.items() if isinstance(module, nn.Module)}
    if not modules:
        kind = type(target).__name__
        has = (
            " (it has a `unet`, which hasten does not accelerate)" if getattr(target, "unet", None) is not None else ""
        )
        raise TargetError(
            f"{kind} has no transformer{has}; give a diffusers pipeline with a `transformer`, or the transformer itself"
        )
    return modules


def _methods(methods: tuple[Any, ...], params: dict[str, Any]) -> tuple[CachingMethod | None, ResolutionMethod | None]:
    """The caching method and the method with stages, of which there may be one each."""
    if len(methods) > 1 and params:
        raise ConfigError(f"with several methods, give each its own parameters: {', '.join(params)} could be of any")
    chosen = [_method(method, params) for method in methods]
    caching = [method for method in chosen if isinstance(method, CachingMethod)]
    staged = [method for method in chosen if isinstance(method, ResolutionMethod)]
    if not chosen or len(caching) > 1 or len(staged) > 1:
        given = ", ".join(map(str, methods)) or "none"
        raise ConfigError(f"give one caching method, one resolution method (dvg, fresco), or one of each; got {given}")
    return next(iter(caching), None), next(iter(staged), None)


def _method(chosen: Any, params: dict[str, Any]) -> CachingMethod | ResolutionMethod:
    if isinstance(chosen, str):
        chosen = registry.build(chosen, **params)
    elif isinstance(chosen, (CachingMethod, ResolutionMethod)) and params:
        for name in params:
            if name not in chosen.__dataclass_fields__:
                raise unknown(f"parameter of {type(chosen).__name__}", name, chosen.__dataclass_fields__)
        chosen = replace(chosen, **params)
    if isinstance(chosen, StreamingMethod):
        raise ConfigError(
            f"{type(chosen).__name__} chooses the history of a streaming model; put it on one with "
            "hasten.streaming.adapters.attach_anyflow or attach_causal_wan, or call hasten.KVStream in your own loop"
        )
    if not isinstance(chosen, (CachingMethod, ResolutionMethod)):
        raise ConfigError(f"a method is a name or a method object such as hasten.HiCache(), got {chosen!r}")
    return chosen


def accelerate(target: Any, *methods: Any, **params: Any) -> Acceleration:
    """Make a diffusers pipeline (or a bare transformer) faster. The pipeline is called as before.

    Args:
        target: a pipeline with a `transformer` (and perhaps a `transformer_2`), or a transformer.
        methods: a method's name or object, such as `"hicache"` or `hasten.HiCache(interval=7)`; or a caching method and
            one with stages, `hasten.DVG(), hasten.FoCa(interval=3)`: the cache then starts afresh in each stage.
        params: parameters of a single method; common ones of caches are `interval`, `warmup`, `site` and `steps`.

    Returns:
        a handle with `.records`, `.summary()`, `.stages`, `.estimate_bytes()`, `.reset()` and `.remove()`; also a
        context manager.

    Raises:
        UnknownNameError, ConfigError: for a method or parameter that cannot work.
        TargetError: if there is no transformer.
        AdapterError: if the transformer's wiring is not known and cannot be found out.
        AlreadyAcceleratedError: if it is accelerated already.

    Example:
        >>> run = hasten.accelerate(pipe, "hicache", interval=7)
        >>> image = pipe("a red apple").images[0]
        >>> print(run.summary())
        >>> run.remove()
    """
    method, staged = _methods(methods, params)

    def timesteps() -> Tensor | None:
        return getattr(getattr(target, "scheduler", None), "timesteps", None)

    def begin_index() -> int | None:
        return getattr(getattr(target, "scheduler", None), "begin_index", None)

    def share(name: str, timesteps: Tensor) -> Tensor:
        """The timesteps at which this transformer runs."""
        if type(target.scheduler).__name__ == "SCMScheduler":  # its list ends with the time of the finished image
            return timesteps[:-1]
        # Two experts take over from each other at a boundary (Wan 2.2).
        ratio = getattr(getattr(target, "config", None), "boundary_ratio", None)
        if ratio is None or None in (getattr(target, expert, None) for expert in TRANSFORMERS):
            return timesteps
        first = timesteps >= ratio * target.scheduler.config.num_train_timesteps
        return timesteps[first if name == "transformer" else ~first]

    def guidance() -> float | None:
        scale = getattr(target, "_guidance_scale", None)
        return float(scale) if isinstance(scale, (int, float)) else None

    def engine(name: str, module: nn.Module, method: CachingMethod) -> CachingEngine:
        if hasattr(module, "_orig_mod"):
            warnings.warn(WHOLE, HastenWarning, stacklevel=3)
            module = module.get_submodule("_orig_mod")
        bare = isinstance(target, nn.Module)
        tracker = StepTracker() if bare else StepTracker(timesteps, begin_index, partial(share, name))
        return CachingEngine(module, method, tracker, guidance)

    engines: dict[str, CachingEngine] = {}
    try:
        if method is not None:
            for name, module in _transformers(target).items():
                engines[name] = engine(name, module, method)
        stages = staged.attach(target) if staged is not None else None  # around the caches, hence after them
    except BaseException:
        for attached in engines.values():
            attached.detach()
        raise
    return Acceleration(engines, stages)
