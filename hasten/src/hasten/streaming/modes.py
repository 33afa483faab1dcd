"""Modes of the caller that must not change what is kept and chosen: inference mode and autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

__all__ = ["in_full_precision", "of_our_own"]

P = ParamSpec("P")
T = TypeVar("T")


def of_our_own(function: Callable[P, T]) -> Callable[P, T]:
    """Makes tensors that are kept beyond a forward outside of inference mode, or none of them could be written later.

    Gradients stay as they are: off where inference mode was on.
    """

    @wraps(function)
    def kept(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():  # to leave that mode turns gradients on
            return function(*args, **kwargs)

    return kept


def in_full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast: scores are float32, and half of their digits decide."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
