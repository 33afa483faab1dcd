"""The orthonormal DCT-II, along single axes and over the last two axes of a field."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["dct", "dct_matrix", "inverse_dct"]


@lru_cache(maxsize=64)
def dct_matrix(size: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The orthonormal DCT-II as `[size, size]`, made once per size, device and dtype; rows are frequencies."""
    with torch.inference_mode(False):  # the table outlives the call, and an inference tensor could not be saved later
        k, i = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)[None]
        matrix = torch.cos(math.pi * (2 * i + 1) * k / (2 * size)) * math.sqrt(2 / size)
        matrix[0] /= math.sqrt(2)
        return matrix.to(device, dtype)


def dct(field: Tensor) -> Tensor:
    """Coefficients `[..., H, W]` of a field `[..., H, W]`."""
    rows, columns = (dct_matrix(side, field.device, field.dtype) for side in field.shape[-2:])
    return rows @ field @ columns.T


def inverse_dct(spectrum: Tensor) -> Tensor:
    """Undo `dct`."""
    rows, columns = (dct_matrix(side, spectrum.device, spectrum.dtype) for side in spectrum.shape[-2:])
    return rows.T @ spectrum @ columns
