"""A module that takes the place of another for the length of one forward."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["Proxy"]


class Proxy(nn.Module):
    """Base of the proxies: whatever one does not define itself, it takes from the module that it stands for.

    Models read attributes of their submodules (an attention's processor, the norm of the first block), and a proxy
    must have them. They walk their tree as well, inside a forward (the strength of LoRA layers is set so), and so the
    original is a child of its proxy.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.__dict__["original"] = original  # where it is found at once
        self._modules["original"] = original

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """For models that call their blocks' forward themselves; a proxy defines this or `__call__`."""
        return self(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)
