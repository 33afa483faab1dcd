"""Schedulers exchanged while a call is under way: the call goes on with the one that it began with.

Pipelines ask `self.scheduler` anew at every step. Until the next call sets its timesteps, the scheduler that has come
hands on what belongs to a call of the one that has gone: a call goes through that one's list of timesteps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor

from hasten.pipeline.view import Caller, same_memory

__all__ = ["hand_over"]

# What loops ask a scheduler for, and what begins the next call.
ASKED = ("step", "scale_model_input", "add_noise", "scale_noise")
NEXT = "set_timesteps"


def hand_over(gone: Any, come: Any) -> None:
    """Let a call that began with a scheduler go on with it, though another one is in the pipeline.

    Nothing happens where no call can be under way: the scheduler had no timesteps to set, or took its last step.

    Args:
        gone: the scheduler that was taken out.
        come: the one that is in its place; only its instance is changed, until the next call begins.
    """
    before = _handover_on(gone)
    if before is not None and before.gone is come:  # it comes back
        before.end()
        before = None
    if before is None and not _may_go_on(gone):
        return
    handover = _Handover(gone, come)
    for name in (*ASKED, NEXT):
        if hasattr(come, name):
            handover.methods[name] = _Method(handover, name)
    come.__dict__.update(handover.methods)


def _may_go_on(scheduler: Any) -> bool:
    """Whether a call may be going by it."""
    timesteps = scheduler.timesteps
    if getattr(scheduler, "num_inference_steps", None) is None or not isinstance(timesteps, Tensor):
        return False
    return getattr(scheduler, "step_index", None) != len(timesteps)


def _handover_on(scheduler: Any) -> _Handover | None:
    method = scheduler.__dict__.get(NEXT)
    return method.handover if isinstance(method, _Method) else None


class _Handover:
    """What stands for some methods of the scheduler that has come."""

    def __init__(self, gone: Any, come: Any) -> None:
        self.gone, self.come, self._timesteps = gone, come, gone.timesteps
        self.methods: dict[str, _Method] = {}

    def concerns(self, arguments: tuple[Any, ...]) -> bool:
        """Whether a call that began before asks, by the list that it goes through or the entry that it gives."""
        given = (Caller().timesteps, *arguments)
        if any(isinstance(one, Tensor) and same_memory(one, self._timesteps) for one in given):
            return True
        before = _handover_on(self.gone)
        return before is not None and before.concerns(arguments)

    def end(self) -> None:
        """Leave the scheduler as it was, but for what somebody put there meanwhile."""
        for name, method in self.methods.items():
            if self.come.__dict__.get(name) is method:
                del self.come.__dict__[name]
                if method.before is not None:
                    self.come.__dict__[name] = method.before


class _Method:
    """What stands for one method on the instance; a copy of the scheduler has its own."""

    def __init__(self, handover: _Handover, name: str) -> None:
        self.handover, self._name = handover, name
        self.before: Callable[..., Any] | None = handover.come.__dict__.get(name)
        self._own: Callable[..., Any] = getattr(handover.come, name)
        functools.update_wrapper(self, self._own)  # pipelines look at signatures

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._name == NEXT:
            ended: _Handover | None = self.handover
            while ended is not None:
                ended.end()
                ended = _handover_on(ended.gone)
        elif self.handover.concerns((*args, *kwargs.values())):
            return getattr(self.handover.gone, self._name)(*args, **kwargs)
        return self._own(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self.handover.come))
        return self if copied is None else MethodType(getattr(type(copied), self._name), copied)
