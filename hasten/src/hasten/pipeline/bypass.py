"""Calls that pass the hooks by: `transformer.forward(...)` in the place of `transformer(...)`."""

from __future__ import annotations

import inspect
import sys
import warnings
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import nn

from hasten.errors import HastenWarning

__all__ = ["Watch"]


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
        children = {name: child for name, child in module.named_children() if not isinstance(child, nn.ModuleList)}
        self._handles = {name: child.register_forward_pre_hook(self._look_at(name)) for name, child in children.items()}
        self._settled = False

    def remove(self) -> None:
        """Look no more."""
        while self._handles:
            self._handles.popitem()[1].remove()

    def _look_at(self, name: str) -> Callable[[nn.Module, Any], None]:
        def look(_module: nn.Module, _arguments: Any) -> None:
            if not torch.compiler.is_compiling():
                self._look(name)

        return look

    def _look(self, name: str) -> None:
        if self._hooked():
            if not self._settled:
                self._settled = True
                for other in set(self._handles) - {name}:
                    self._handles.pop(other).remove()
        elif self._within_forward():
            self.remove()
            kind = type(self._module()).__name__
            warnings.warn(
                f"{kind}.forward(...) was called directly, past the acceleration of hasten: such calls are computed in "
                "full; call the transformer itself, transformer(...)",
                HastenWarning,
                stacklevel=5,
            )

    def _within_forward(self) -> bool:
        """Whether the module's forward is under way, or a submodule is called on its own."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code is self._code:
                return True
            frame = frame.f_back
        return False
