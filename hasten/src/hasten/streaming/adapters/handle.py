"""The handle of a model whose attention goes through a stream."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from hasten.streaming.policy import KVStream
from hasten.streaming.stats import StreamStats

__all__ = ["StreamingRun"]


class StreamingRun:
    """An attached stream; a context manager that takes itself off.

    Args:
        stream: what the model attends to.
        undo: gives the model its own attention back.
    """

    def __init__(self, stream: KVStream, undo: Callable[[], None]) -> None:
        self.stream = stream
        self._undo: Callable[[], None] | None = undo

    def stats(self) -> StreamStats:
        """What was done since the model was attached."""
        return self.stream.stats()

    def remove(self) -> None:
        """Give the model its own attention back and free the memory. A second time does nothing."""
        if self._undo is not None:
            self._undo()
            self._undo = None
            self.stream.reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
