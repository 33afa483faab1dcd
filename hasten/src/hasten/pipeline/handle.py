"""The handle of an accelerated pipeline: it reports, and takes the acceleration away again."""

from __future__ import annotations

import html
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import nn

from hasten.errors import ConfigError, HastenWarning
from hasten.pipeline.hooks import still
from hasten.pipeline.records import StepRecord
from hasten.pipeline.summary import Summary
from hasten.pipeline.view import PipelineView, unwrap

__all__ = ["Acceleration", "CachingPart", "RequestsPart", "ResolutionPart", "SolverPart"]


class CachingPart(Protocol):
    """What skips steps of one transformer."""

    model: nn.Module
    method: Any

    @property
    def records(self) -> list[StepRecord]: ...
    def detach(self) -> None: ...
    def forget(self) -> None: ...
    def estimate_bytes(
        self, image_tokens: int, text_tokens: int, batch: int, passes: int, dtype: torch.dtype
    ) -> int: ...


class ResolutionPart(Protocol):
    """What runs a pipeline in coarse and fine stages."""

    method: Any
    records: list[Any]
    plans: list[Any]

    def report(self, run: int = -1) -> Any: ...
    def remove(self) -> None: ...


class RequestsPart(Protocol):
    """What gives single calls settings of their own, and knows the setting of all others."""

    @property
    def audit(self) -> Any: ...
    def using(self, quality: str | None, computed_steps: int | None) -> AbstractContextManager[Any]: ...
    def describe(
        self, quality: str | None, computed_steps: int | None, call: Mapping[str, Any] | None
    ) -> dict[str, Any]: ...
    @property
    def text(self) -> str | None: ...
    @property
    def plain_scheduler(self) -> Any: ...
    def setting_of(self, run: int) -> tuple[str, int | None]: ...
    def save(self, path: str | Path) -> Path: ...
    def close(self) -> None: ...


class SolverPart(Protocol):
    """What solves with another scheduler."""

    method: Any

    @property
    def records(self) -> list[Any]: ...
    @property
    def plain_scheduler(self) -> Any: ...
    def forget(self) -> None: ...
    def remove(self) -> None: ...


class Acceleration:
    """Handle of an accelerated pipeline or transformer; also a context manager that removes itself at the end."""

    def __init__(
        self,
        engines: Mapping[str, CachingPart],
        stages: ResolutionPart | None,
        modules: Mapping[str, nn.Module],
        home: PipelineView | None,
        requests: RequestsPart,
        solver: SolverPart | None = None,
    ) -> None:
        self._requests = requests
        self._engines, self._stages, self._solver = dict(engines), stages, solver
        self._modules, self._home = dict(modules), home
        for part in self._parts:
            part.handle = self

    @property
    def _parts(self) -> list[Any]:
        return [*self._engines.values(), *(part for part in (self._stages, self._solver) if part is not None)]

    @property
    def engines(self) -> dict[str, Any]:
        """What forecasts features on each transformer, by its name in the pipeline; empty without a cache."""
        return dict(self._engines)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What it is at work on, by its name in the pipeline; empty once it was removed."""
        return dict(self._modules)

    @property
    def stages(self) -> Any:
        """What runs the pipeline in coarse and fine stages, with `.records` and `.plans`; None without it."""
        return self._stages

    @property
    def method(self) -> Any:
        """The caching method at work.

        Raises:
            ConfigError: if there is none, but stages alone.
        """
        if not self._engines:
            raise ConfigError("no caching method is at work here; the stages and their plan are in .stages")
        return next(iter(self._engines.values())).method

    @property
    def methods(self) -> list[Any]:
        """The methods at work: a caching method, a resolution method, or one of each."""
        own = [self.method] if self._engines else []
        return [*own, *(part.method for part in (self._stages, self._solver) if part is not None)]

    @property
    def records(self) -> list[StepRecord]:
        """One record per forward, run by run, of the latest runs since `accelerate` or `reset`."""
        return [record for engine in self._engines.values() for record in engine.records]

    def summary(self, run: int = -1) -> Summary:
        """What a run saved; the latest one unless told otherwise. With two transformers their steps add up.

        Raises:
            ConfigError: if there was no such run; it says so if the pipeline calls another transformer by now.
        """
        astray = self._astray()
        cached = {name: _pick(engine.records, run) for name, engine in self._engines.items()}
        staged = _pick([] if self._stages is None else self._stages.records, run)
        staged = staged or _pick([] if self._solver is None else self._solver.records, run)
        if not staged and not any(cached.values()):
            raise ConfigError(astray or f"there is no run {run} to sum up: call the pipeline first")
        if astray:
            warnings.warn(astray, HastenWarning, stacklevel=2)
        stages = self._stages.report(run).described if self._stages is not None and staged else None
        number = next((records[0].run for records in cached.values() if records), None)
        name, replaced = ("", None) if number is None else self._requests.setting_of(number)
        names = [name] if name else []
        names += [type(part.method).__name__ for part in (self._stages, self._solver) if part is not None]
        return Summary.of(names, cached, staged, stages, replaced)

    def using(self, *, quality: str | None = None, computed_steps: int | None = None) -> AbstractContextManager[Any]:
        """Give the calls within a `with` a setting of their own; calls of the pipeline on other threads keep theirs.

        Args:
            quality: a tier that is certified for the model, the path of a certificate, or `"exact"` for the full run.
            computed_steps: steps to compute with the method at work; of a full run, with the default method.

        Returns:
            what gives a pipeline to call: it shares all models with the accelerated one and has a scheduler and
            tokenizers of this thread's own, so that calls of several threads do not disturb each other; its calls have
            the setting wherever they are made, until the `with` ends. Within a generator the accelerated pipeline
            itself has the setting only while the generator runs, and not in its consumer's calls. Of a bare
            transformer it gives the transformer. With neither argument the setting stays. A resolution method or LEAP
            is for all calls alike, and gives the accelerated pipeline itself, for one call at a time.

        Raises:
            ConfigError: if both are given, or the method cannot compute so many steps.
            CertificateError: if nothing is certified for the model, or a call is outside of the certificate's range.

        Example:
            >>> with run.using(quality="draft") as pipe:
            ...     image = pipe("a red apple").images[0]
        """
        return self._requests.using(quality, computed_steps)

    def describe(
        self,
        *,
        quality: str | None = None,
        computed_steps: int | None = None,
        call: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The setting that `using` would give, as plain data: method, and digest of the certificate if it has one.

        Args:
            quality, computed_steps: as for `using`.
            call: arguments of the pipeline's call that the setting is for, to hear now what the call would be refused
                for.

        Raises:
            ConfigError, CertificateError: as `using`.
        """
        return self._requests.describe(quality, computed_steps, call)

    @property
    def audit(self) -> Any:
        """What checks calls against the full run, with the metrics in `.checked`; None without `audit=`."""
        return self._requests.audit

    def save(self, path: str | Path) -> Path:
        """Write the setting as a configuration, YAML or JSON by the name's ending; `hasten.load` reads it.

        Raises:
            ConfigError: if the setting holds what was not read from a file.
            FileError: if it cannot be written.
        """
        return self._requests.save(path)

    @property
    def plain_scheduler(self) -> Any:
        """The pipeline's own scheduler, while another one stands in its place; None where it is there itself."""
        return self._requests.plain_scheduler if self._solver is None else self._solver.plain_scheduler

    def _astray(self) -> str | None:
        """Whether the pipeline calls a transformer that is not the accelerated one, as text."""
        pipe = None if self._home is None else self._home.pipe
        if pipe is None:
            return None
        for name, module in self._modules.items():
            if unwrap(getattr(pipe, name, None)) is not module:
                return (
                    f"pipe.{name} is not the transformer that was accelerated, so its calls are not: "
                    "call .remove() and accelerate the pipeline again"
                )
        return None

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
        if self._stages is not None:
            self._stages.records.clear()
            self._stages.plans.clear()
        if self._solver is not None:
            self._solver.forget()

    def remove(self) -> None:
        """Take the acceleration away and leave the modules as they were found; records stay readable."""
        with still(self._modules.values()):  # a forward on another thread comes to its end
            self._requests.close()
            for part in (self._stages, self._solver):
                if part is not None:
                    part.remove()
            for engine in self._engines.values():
                engine.detach()
            for part in self._parts:
                part.handle = None
            self._modules, self._home = {}, None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Acceleration({self._requests.text or ', '.join(map(repr, self.methods))})"

    def _repr_html_(self) -> str:
        """What is at work and what the latest run saved, for notebooks."""
        head = f"<code>{html.escape(repr(self))}</code>"
        try:
            return head + self.summary()._repr_html_()
        except ConfigError as error:
            return f"{head}<p>{html.escape(str(error))}</p>"


def _pick(records: list[Any], run: int) -> list[Any]:
    """The records of a run, counted from the first one or from the last."""
    runs = list(dict.fromkeys(record.run for record in records))
    if not -len(runs) <= run < len(runs):
        return []
    return [record for record in records if record.run == runs[run]]
