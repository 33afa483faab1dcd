"""What callers hand in as numbers: lists, arrays, or tensors on any device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.errors import ConfigError, brief

__all__ = ["as_numbers", "as_whole_numbers"]


def as_numbers(value: Any, name: str) -> NDArray[Any]:
    """Real numbers as an array of their own type; `name` is what an error calls them.

    Raises:
        ConfigError: for text, ragged lists, complex numbers, and tensors that are not plain ones.
    """
    array = _array(value, name, "real numbers")
    if array.dtype.kind not in "biuf":
        raise ConfigError(f"{name} must be real numbers, got {array.dtype} ({brief(value)}); convert them first")
    return array


def as_whole_numbers(value: Any, name: str) -> NDArray[Any]:
    """As `as_numbers`, for whole ones."""
    array = _array(value, name, "whole numbers")
    if not array.size and isinstance(value, (list, tuple)):
        return array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise ConfigError(f"{name} must be whole numbers, got {array.dtype} ({brief(value)})")
    return array


def _array(value: Any, name: str, expected: str) -> NDArray[Any]:
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_meta or value.is_quantized:
            kind = "without numbers" if value.is_meta else "that is quantized or sparse"
            raise ConfigError(f"{name} must be {expected}, got a tensor {kind}; give a plain one")
        value = value.detach().cpu()
        known = value.dtype in (torch.float32, torch.float64) or not value.is_floating_point()
        value = (value if known else value.float()).numpy()
    try:
        return np.asarray(value)
    except Exception as error:  # whatever numpy raises, these are no numbers
        what = "rows of unequal length, or no numbers"
        raise ConfigError(f"{name} must be {expected} in an array or a tensor, got {what} ({brief(value)})") from error
