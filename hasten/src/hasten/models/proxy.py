"""A module that takes the place of another for the length of one forward."""

from __future__ import annotations

import threading
from typing import Any

from torch import nn

__all__ = ["Here", "Proxy"]


class Here(threading.local):
    """Whether the forward that proxies stand for is under way on this thread.

    The tree is one for all threads. A forward that began on another one before the proxies came meets them, and has to
    run as if they were not there. A compiler traces what reads a value of a thread's own, which it does not do for the
    identity of a thread.
    """

    inside = False


class Proxy(nn.Module):
    """Base of the proxies: whatever one does not define itself, it takes from the module that it stands for.

    Models read attributes of their submodules (an attention's processor, the norm of the first block), and a proxy
    must have them. They walk their tree as well, inside of a forward (the strength of LoRA layers is set so), and so
    the original is a child of its proxy.

    Args:
        original: the module that it stands for, which other threads' forwards run.
        here: what `swapped` tells of the forward for which it stands.
    """

    def __init__(self, original: nn.Module, here: Here) -> None:
        super().__init__()
        self.__dict__["original"] = original  # where it is found at once
        self.__dict__["here"] = here
        self._modules["original"] = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.respond(*args, **kwargs) if self.here.inside else self.original(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """For models that call their blocks' forward themselves."""
        return self(*args, **kwargs) if self.here.inside else self.original.forward(*args, **kwargs)

    def respond(self, *args: Any, **kwargs: Any) -> Any:
        """What happens in the place of a call of the original."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)
