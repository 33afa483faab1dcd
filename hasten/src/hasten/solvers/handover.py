"""Schedulers exchanged while a call is under way: the call goes on with the one that it began with.

Pipelines ask `self.scheduler` anew at every step. Until that call is over, the scheduler that has come hands on what
belongs to it to the one that has gone: a call goes through that one's list of timesteps. What belongs to other calls,
which set timesteps on the scheduler that has come, is its own. Copies and pickles of it are in no call, and hand
nothing on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from hasten.pipeline.caller import Caller, Owner, alive, current_owner
from hasten.pipeline.view import same_memory

__all__ = ["hand_over"]

# What loops ask a scheduler for, what begins the next call, and what copies and pickles are made of.
OF_A_RUN = ("step", "scale_model_input")
ASKED = (*OF_A_RUN, "add_noise", "scale_noise")
NEXT = "set_timesteps"
STATE = "__getstate__"


def hand_over(gone: Any, come: Any) -> None:
    """Let a call that began with a scheduler go on with it, though another one is in the pipeline.

    Nothing happens where no call can be under way: the scheduler had no timesteps to set, or took its last step.

    Args:
        gone: the scheduler that was taken out.
        come: the one that is in its place; only its instance is changed, until another call begins after that one.
    """
    before = _handover_on(gone)
    if before is not None and before.gone is come:  # it comes back
        before.end()
        before = None
    if before is None and not _may_go_on(gone):
        return
    handover = _Handover(gone, come)
    for name in (*ASKED, NEXT, STATE):
        if hasattr(come, name):
            handover.methods[name] = _Method(handover, name)
    come.__dict__.update(handover.methods)


def _may_go_on(scheduler: Any) -> bool:
    """Whether a call may be going by it."""
    timesteps = getattr(scheduler, "timesteps", None)
    if getattr(scheduler, "num_inference_steps", None) is None or not isinstance(timesteps, Tensor):
        return False
    return getattr(scheduler, "step_index", None) != len(timesteps)


def _listed(scheduler: Any, given: Any) -> bool:
    """Whether something is the list of timesteps that a scheduler has now, or a part of it."""
    timesteps = getattr(scheduler, "timesteps", None)
    return isinstance(given, Tensor) and isinstance(timesteps, Tensor) and same_memory(given, timesteps)


def _handover_on(scheduler: Any) -> _Handover | None:
    method = scheduler.__dict__.get(NEXT)
    return method.handover if isinstance(method, _Method) else None


class _Handover:
    """What stands for some methods of the scheduler that has come."""

    def __init__(self, gone: Any, come: Any) -> None:
        self.gone, self.come, self._timesteps = gone, come, gone.timesteps
        self.methods: dict[str, _Method] = {}
        # Whose the call is that goes on, as soon as it is known: LEAP knows it, and a callback of the call is in it.
        self._owner: Owner | None = getattr(gone, "owner", None)
        caller = Caller()
        if self._owner is None and _listed(gone, caller.timesteps):
            self._owner = caller.owner
        # Until the scheduler that has come is set for a call, steps of it belong to those before.
        self._idle, self._set = not _may_go_on(come), False

    def concerns(self, name: str, arguments: tuple[Any, ...]) -> bool:
        """Whether a call that began before asks for a method.

        That shows by the list that it goes through, or by the entry that it gives; for steps of a loop of the user's
        own over a copy of the list by its thread, or by there being no other call.
        """
        caller = Caller()
        given = (caller.timesteps, *arguments)
        if any(same_memory(one, self._timesteps) for one in given if isinstance(one, Tensor)):
            self._owner = caller.owner
            return True
        before = _handover_on(self.gone)
        if before is not None and before.concerns(name, arguments):
            return True
        if self._set or name not in OF_A_RUN or any(_listed(self.come, one) for one in given):
            return False
        return caller.owner == self._owner or (self._owner is None and self._idle)

    def begin(self, owner: Owner) -> None:
        """The scheduler that has come is set for another call: leave it as it was, if the one before is over."""
        self._set = True
        found: list[_Handover] = []
        handover: _Handover | None = self
        while handover is not None:
            if not handover._is_over(owner):
                return
            found.append(handover)
            handover = _handover_on(handover.gone)
        for one in found:
            one.end()

    def _is_over(self, owner: Owner) -> bool:
        """Whether no call goes on with the scheduler that has gone, when another one begins."""
        known = self._owner
        return known is None or known == owner or not _may_go_on(self.gone) or known not in alive([known])

    def end(self) -> None:
        """Leave the scheduler as it was, but for what somebody put there meanwhile."""
        for name, method in self.methods.items():
            if self.come.__dict__.get(name) is method:
                del self.come.__dict__[name]
                if method.before is not None:
                    self.come.__dict__[name] = method.before


class _Method:
    """What stands for one method on the instance."""

    def __init__(self, handover: _Handover, name: str) -> None:
        self.handover, self._name = handover, name
        self.before: Callable[..., Any] | None = handover.come.__dict__.get(name)
        self._own: Callable[..., Any] = getattr(handover.come, name)
        functools.update_wrapper(self, self._own)  # pipelines look at signatures

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._name == STATE:
            return _without_methods(self._own())
        if self._name == NEXT:
            self.handover.begin(current_owner())
        elif self.handover.concerns(self._name, (*args, *kwargs.values())):
            return getattr(self.handover.gone, self._name)(*args, **kwargs)
        return self._own(*args, **kwargs)


def _without_methods(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a scheduler, with what was on the instance before in the place of what hands on."""
    found = {}
    for name, value in state.items():
        own = value
        while isinstance(own, _Method):
            own = own.before
        if own is not None or own is value:
            found[name] = own
    return found
