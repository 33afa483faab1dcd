"""The handle of a model whose attention goes through a stream."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from torch import nn

from hasten.errors import ConfigError
from hasten.pipeline.hooks import Forward, Hook, attach
from hasten.pipeline.summary import Summary
from hasten.streaming.method import StreamingMethod
from hasten.streaming.policy import KVStream
from hasten.streaming.stats import StreamStats

__all__ = ["StreamingRun"]


class _Known(Hook):
    """Lets calls through; by it `hasten.summary` and `hasten.remove` find the handle."""

    kind = "streaming"

    def call(self, module: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return forward(*args, **kwargs)


class StreamingRun:
    """An attached stream; a context manager that takes itself off.

    Args:
        model: whose attention it is.
        stream: what the model attends to.
        undo: gives the model its own attention back.

    Raises:
        AlreadyAcceleratedError: if the model has a stream already.
    """

    def __init__(self, model: nn.Module, stream: KVStream, undo: Callable[[], None]) -> None:
        self.stream = stream
        self._undo: Callable[[], None] | None = undo
        hook = _Known()
        hook.handle = self
        self._leave = attach(model, hook)

    @property
    def method(self) -> StreamingMethod:
        """What decides."""
        return self.stream.method

    def stats(self) -> StreamStats:
        """What was done since the model was attached."""
        return self.stream.stats()

    def summary(self, run: int = -1) -> Summary:
        """What was saved since the model was attached; a stream keeps no runs apart.

        Raises:
            ConfigError: if nothing ran yet.
        """
        stats = self.stats()
        if not stats.forwards or run not in (0, -1):
            raise ConfigError(f"there is no run {run} to sum up: call the pipeline first")
        held, most, whole = (n / 2**20 for n in (stats.cache_bytes, stats.peak_bytes, stats.full_cache_bytes))
        text = (
            f"{stats.work_ratio:.2f}x fewer pairs of query and key, "
            f"{stats.full_kv_bytes / stats.kv_bytes:.2f}x fewer bytes of keys and values read; "
            f"{held:.1f} MiB held, {most:.1f} MiB at most, of {whole:.1f} MiB for the whole history"
        )
        return Summary(
            method=type(self.method).__name__,
            steps=0,
            computed_steps=0,
            skipped_steps=0,
            passes=(),
            flops_ratio=1.0,
            cache_bytes=stats.peak_bytes,
            computed_ms=None,
            skipped_ms=None,
            history=text,
        )

    def remove(self) -> None:
        """Give the model its own attention back and free the memory. A second time does nothing."""
        if self._undo is not None:
            self._undo()
            self._undo = None
            self._leave()
            self.stream.reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
