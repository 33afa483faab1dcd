"""Which hooks do what the attached ones would, and in which calls: nothing is attached or taken away.

An *entry* holds in the context (thread or task) that made it, until it is closed, in whichever order. One that was made
within a generator holds wherever that generator runs, and nowhere while it is suspended: its consumer has calls of its
own, and servers go on with generators in contexts of their own. A generator that awaits what another thread does in a
copy of its context (`asyncio.to_thread`) runs, and the entry holds there, too.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from types import AsyncGeneratorType, FrameType, GeneratorType
from typing import Any

__all__ = ["Entry", "active", "generator_around", "instead"]

_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_order = count()


class Entry:
    """Lets other hooks do what some attached ones would, until it is closed.

    Args:
        hooks: by the attached ones.
        within: the generator's frame within which it holds; None for this context.
    """

    def __init__(self, hooks: Mapping[Any, Any], within: FrameType | None = None) -> None:
        self.hooks, self.within = dict(hooks), within
        self.number = next(_order)
        self._generator: weakref.ref[Any] | None = None  # whose frame it is, once it was asked for
        _in_context.set((*_in_context.get(()), self))
        if within is not None:
            _in_generators.append(self)

    def holds(self, here: bool) -> bool:
        """Whether it holds on this thread; `here` says that it is in this context, or in one that this is a copy of."""
        return self.within is None or _is_running(self.within) or (here and self._goes_on(self.within))

    def _goes_on(self, within: FrameType) -> bool:
        """Whether the generator is at work, perhaps on another thread, and not suspended between two results."""
        if self._generator is None:
            known = (one for one in gc.get_referrers(within) if isinstance(one, GeneratorType | AsyncGeneratorType))
            found = next(known, None)
            self._generator = None if found is None else weakref.ref(found)
        generator = None if self._generator is None else self._generator()
        return bool(getattr(generator, "gi_running", False) or getattr(generator, "ag_running", False))

    def close(self) -> None:
        """Hold no more, in no context, and let go of the hooks."""
        self.hooks, self.within, self._generator = {}, None, None
        # Another context may have it still, where it does nothing.
        _in_context.set(tuple(entry for entry in _in_context.get(()) if entry.hooks))
        if self in _in_generators:
            _in_generators.remove(self)


_in_context: ContextVar[tuple[Entry, ...]] = ContextVar("hasten hooks of single calls")
_in_generators: list[Entry] = []  # of all threads


def active(hook: Any) -> Any:
    """What does now what an attached hook would; the hook itself unless an entry holds."""
    entries = _in_context.get(())
    if not entries and not _in_generators:
        return hook
    found = [entry for entry in {*entries, *_in_generators} if hook in entry.hooks]
    for entry in sorted(found, key=lambda entry: entry.number, reverse=True):  # the innermost first
        other = entry.hooks.get(hook)
        if other is not None and entry.holds(entry in entries):
            return other
    return hook


def _is_running(within: FrameType) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not within:
        frame = frame.f_back
    return frame is not None


def generator_around() -> FrameType | None:
    """The frame of the nearest generator that this thread is in; one that makes a context manager is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        outer = frame.f_back
        managed = outer is not None and outer.f_code.co_filename == contextlib.__file__
        if frame.f_code.co_flags & _GENERATOR and not managed:
            return frame
        frame = outer
    return None


@contextmanager
def instead(hooks: Mapping[Any, Any]) -> Iterator[None]:
    """Let other hooks do what some attached ones would, in this context and within the `with` alone."""
    entry = Entry(hooks)
    try:
        yield
    finally:
        entry.close()
