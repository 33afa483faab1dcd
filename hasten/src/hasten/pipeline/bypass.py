"""Calls that pass the hooks by: `transformer.forward(...)` in the place of `transformer(...)`."""

from __future__ import annotations

import inspect
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch
from torch import nn

from hasten.errors import CopyError, HastenWarning
from hasten.pipeline.caller import first_argument

__all__ = ["Watch", "copy_error"]

_CALL = nn.Module._call_impl.__code__


def copy_error(module: Any) -> CopyError:
    """Why an accelerated module cannot be copied."""
    return CopyError(
        f"this {type(module).__name__} is accelerated, and a copy would run the original; "
        "call .remove() on the handle that accelerate() returned before you copy, pickle or replicate it"
    )


class _Look:
    """The hook on a submodule."""

    def __init__(self, watch: Watch, name: str) -> None:
        self._watch, self._name = watch, name

    def __call__(self, _module: nn.Module, _arguments: Any) -> None:
        if not torch.compiler.is_compiling():
            self._watch.look(self._name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise copy_error(self._watch.module)


class Watch:
    """Looks at a submodule that runs in every forward, and says once if a forward came past the hooks.

    Which one that is shows in the first forward: until then all submodules but lists of blocks are looked at.

    Args:
        module: the one with hooks on it.
        hooked: whether a call on this thread is within the hooks.
    """

    def __init__(self, module: nn.Module, hooked: Callable[[], bool]) -> None:
        self._module, self._hooked = weakref.ref(module), hooked
        self._code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        self._settled = False
        self._handles: dict[str, Any] = {}
        # From the first one on, another thread's forward may look.
        for name, child in module.named_children():
            if not isinstance(child, nn.ModuleList):
                self._handles[name] = child.register_forward_pre_hook(_Look(self, name))

    @property
    def module(self) -> nn.Module | None:
        """The one with hooks on it; None once it is gone."""
        return self._module()

    def remove(self) -> None:
        """Look no more."""
        self._leave(self._handles)

    def _leave(self, names: Iterable[str]) -> None:
        for name in list(names):  # another thread may be about it, too
            handle = self._handles.pop(name, None)
            if handle is not None:
                handle.remove()

    def look(self, name: str) -> None:
        """A submodule of this name is called."""
        if self._hooked():
            if not self._settled:
                self._settled = True
                self._leave(set(self._handles) - {name})
        elif self._came_past():
            self.remove()
            kind = type(self._module()).__name__
            warnings.warn(
                f"{kind}.forward(...) was called directly, past the acceleration of hasten: such calls are computed in "
                "full; call the transformer itself, transformer(...)",
                HastenWarning,
                stacklevel=5,
            )

    def _came_past(self) -> bool:
        """Whether the module's forward is under way without its call.

        It is not where a submodule is called on its own, nor in a call that began before the hooks came.
        """
        module, forward = self._module(), False
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            # Another one of its class may share submodules with it.
            forward |= frame.f_code is self._code and first_argument(frame) is module
            if forward and frame.f_code is _CALL and first_argument(frame) is module:
                return False
            frame = frame.f_back
        return forward
