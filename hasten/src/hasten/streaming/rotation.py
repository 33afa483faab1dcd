"""Keys without their rotary embedding along time.

Shape legend: as in `cache`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hasten.errors import ConfigError

__all__ = ["Unrotate", "undo_rotation", "unrotated"]

Unrotate = Callable[[Tensor, Tensor], Tensor]
"""Undoes the rotary embedding along time: keys `[B, H, F, L, D]` and absolute frame numbers `[F]` to keys."""


def undo_rotation(keys: Tensor, rotations: Tensor) -> Tensor:
    """Undo a rotation along time that takes neighbouring channels for complex numbers.

    Args:
        keys: `[B, H, F, L, D]`.
        rotations: complex64 `[F, R]`, what the first `R` pairs of channels of each frame were multiplied by.

    Returns:
        float32, of the shape of `keys`.
    """
    plain = keys.to(torch.float32, copy=True)
    pairs = torch.view_as_complex(plain[..., : 2 * rotations.shape[1]].unflatten(-1, (-1, 2)))
    pairs *= rotations.conj()[:, None]
    return plain


def unrotated(unrotate: Unrotate, keys: Tensor, numbers: Sequence[int]) -> Tensor:
    """Keys `[B, H, F, L, D]` of the frames of these numbers, as `unrotate` returns them.

    Raises:
        ConfigError: if it returns anything but a tensor of the same shape, on the same device.
    """
    plain = unrotate(keys, torch.tensor(numbers, device=keys.device))
    if isinstance(plain, Tensor) and plain.shape == keys.shape and plain.device == keys.device:
        return plain
    got = f"{list(plain.shape)} on {plain.device}" if isinstance(plain, Tensor) else type(plain).__name__
    raise ConfigError(
        f"expected unrotate to return keys of the shape {list(keys.shape)} on {keys.device}, as it was given, got {got}"
    )
