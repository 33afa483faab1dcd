"""Whose call a forward happens in.

A run belongs to the pipeline *call* in which it happens, not to the module: several pipelines may share a transformer,
each with its own scheduler, one inside another or on several threads. Whose call it is shows in Python's frames: the
nearest one upwards that executes `__call__` of a pipeline. In a loop of the user's own the owner is the thread, or the
task of asyncio. What a callback of a call asks the transformer itself is nobody's step.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Iterable
from types import CodeType, FrameType
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline, ModularPipeline
from torch import Tensor, nn

__all__ = ["Caller", "Owner", "alive", "current_owner", "first_argument", "joined_passes"]

_CALLBACKS = ("callback_on_step_end", "callback")  # arguments of pipelines' calls
_MODULE_CALL = nn.Module._wrapped_call_impl.__code__


class Owner(NamedTuple):
    """Who a run belongs to, while it lasts.

    Attributes:
        thread: what stands for the thread; another one for a later thread, whose identifier may be the same.
        frame: identity of the frame that executes the pipeline's call; None in a loop of the user's own.
        task: in a loop of the user's own the task of asyncio, where one is under way.
    """

    thread: weakref.ref[threading.Thread]
    frame: int | None
    task: weakref.ref[Any] | None = None


def _task() -> weakref.ref[Any] | None:
    if asyncio._get_running_loop() is None:
        return None
    task = asyncio.current_task()
    return None if task is None else weakref.ref(task)


# By identity, since comparing code objects costs; holding them keeps an identity from being given to another one.
_known: dict[int, tuple[CodeType, bool]] = {}


def _executes_pipeline(frame: FrameType) -> bool:
    """Whether a frame of a function called `__call__` is one of a pipeline."""
    code = frame.f_code
    known = _known.get(id(code))
    if known is None:
        known = _known[id(code)] = (code, isinstance(first_argument(frame), (DiffusionPipeline, ModularPipeline)))
    return known[1]


def first_argument(frame: FrameType) -> Any:
    """What a frame has as its first argument, of a method its object; None without one."""
    if not frame.f_code.co_argcount:
        return None
    local = frame.f_locals
    argument = local.get(frame.f_code.co_varnames[0])
    if isinstance(local, dict):  # up to Python 3.12 a snapshot, which would keep tensors for as long as the frame lives
        local.clear()
    return argument


class Caller:
    """Who makes the forward under way on this thread.

    Attributes:
        owner: of what happens now.
        frame: that executes the pipeline's call; None in a loop of the user's own. Keep it no longer than a moment.
        callback: whether a callback of that call makes the forward, and not the pipeline.
    """

    def __init__(self) -> None:
        frame: FrameType | None = sys._getframe(1)
        called = frame
        while frame is not None and not (frame.f_code.co_name == "__call__" and _executes_pipeline(frame)):
            called, frame = frame, frame.f_back
        self.frame = frame
        direct = frame is None or called is None or called.f_code is _MODULE_CALL
        self.callback = not direct and _in_callback(frame)
        thread = weakref.ref(threading.current_thread())
        self.owner = Owner(thread, None, _task()) if frame is None else Owner(thread, id(frame))

    @property
    def pipe(self) -> Any:
        """The pipeline whose call it is; None in a loop of the user's own."""
        return None if self.frame is None else first_argument(self.frame)

    @property
    def suspends(self) -> bool:
        """Whether the pipeline's call is a generator, which others may run between the steps of."""
        return self.frame is not None and bool(self.frame.f_code.co_flags & inspect.CO_GENERATOR)

    @property
    def timesteps(self) -> Any:
        """What the pipeline's call has under that name, as its loop goes through it; None where it has nothing."""
        return self.local("timesteps")

    def local(self, name: str) -> Any:
        """What the pipeline's call has under a name; None where it has nothing."""
        return None if self.frame is None else _locals(self.frame, [name]).get(name)

    @property
    def loop(self) -> dict[str, Any]:
        """What the function that calls the module under way has as `latents` and as `do_classifier_free_guidance`.

        What it has not, the functions further out have, up to the pipeline's call.
        """
        caller, frame = self.frame, sys._getframe(1)
        while self.frame is not None and frame is not self.frame:
            assert frame.f_back is not None
            caller, frame = frame.f_back if frame.f_code is _MODULE_CALL else caller, frame.f_back
        found: dict[str, Any] = {}
        while caller is not None:
            found = _locals(caller, ["latents", "do_classifier_free_guidance"]) | found
            caller = None if caller is self.frame else caller.f_back
        return found

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the pipeline's call, as they stand now; none in a loop of the user's own.

        Pipelines fill in what was not given, such as the size, before the first forward.
        """
        if self.frame is None:
            return {}
        code = self.frame.f_code
        return _locals(self.frame, code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])

    @property
    def given(self) -> dict[str, Any] | None:
        """The arguments by name that the pipeline's call was made with; None where that does not show.

        Pipelines fill in what was not given, but `torch.no_grad`, which wraps their calls, keeps what it was handed.
        """
        outer = None if self.frame is None else self.frame.f_back
        if outer is None or outer.f_code.co_name != "decorate_context":
            return None
        return dict(_locals(outer, ["kwargs"]).get("kwargs", {}))


def _in_callback(pipeline: FrameType | None) -> bool:
    """Whether this thread is within a callback that was handed to the pipeline's call of that frame."""
    assert pipeline is not None
    codes = {_code_of(callback) for callback in _locals(pipeline, _CALLBACKS).values() if callable(callback)}
    frame: FrameType | None = sys._getframe(1)
    while codes and frame is not None and frame is not pipeline:
        if frame.f_code in codes:
            return True
        frame = frame.f_back
    return False


def _code_of(callback: Any) -> CodeType | None:
    while isinstance(callback, functools.partial):
        callback = callback.func
    function = callback if inspect.isroutine(callback) else type(callback).__call__
    return getattr(inspect.unwrap(function), "__code__", None)


def _locals(frame: FrameType, names: Iterable[str]) -> dict[str, Any]:
    local = frame.f_locals
    found = {name: local[name] for name in names if name in local}
    if isinstance(local, dict):  # see `first_argument`
        local.clear()
    return found


def joined_passes(hidden: Any) -> int:
    """How many passes, such as those of guidance, the pipeline's call has joined in the batch of the forward under way.

    It repeats the latents of its loop for each. One where that does not show, as in a loop of the user's own, and where
    the pipeline says that it does not guide: then a larger batch is one of views or frames.

    Args:
        hidden: the denoiser's latents, `[B, ...]` or a list of B of them.
    """
    caller = Caller()
    loop = caller.loop
    latents = loop.get("latents")
    if not isinstance(latents, Tensor) or not latents.numel():
        return 1
    if not loop.get("do_classifier_free_guidance", getattr(caller.pipe, "do_classifier_free_guidance", True)):
        return 1
    if isinstance(hidden, Tensor) and hidden.ndim != latents.ndim:
        return 1  # frames or views of one image in the place of images
    return max(1, len(hidden) // len(latents))


def current_owner() -> Owner:
    """The owner of what happens now on this thread."""
    return Caller().owner


def alive(owners: Iterable[Owner]) -> set[Owner]:
    """The owners that may go on: calls that this thread is in, and all of threads that have not ended.

    What another thread is in is not looked at: `sys._current_frames` may collect garbage while it holds a lock of the
    interpreter, and hangs there (CPython issue 106883). A call cut short on a thread that idles is forgotten when that
    thread starts its next run.
    """
    here = threading.current_thread()
    frames: set[int] = set()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        frames.add(id(frame))
        frame = frame.f_back

    def may_go_on(owner: Owner) -> bool:
        thread, task = owner.thread(), None if owner.task is None else owner.task()
        if thread is None or not thread.is_alive():
            return False
        if owner.frame is None:
            return owner.task is None or (task is not None and not task.done())
        return owner.frame in frames or thread is not here

    return {owner for owner in owners if may_go_on(owner)}
