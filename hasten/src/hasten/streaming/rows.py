"""Frames of the right shape, and as rows of a buffer: which to exchange, where a head's begin, and copies of some.

Shape legend: `B` batch, `Q` query frames that choose for themselves, `H` heads, `n` some of them, `b` frames of each,
`F` frames held, `C` frames that there is room for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.errors import ConfigError

__all__ = ["check_frames", "exchanges", "row_starts", "rows_at"]


def check_frames(name: str, tensor: Tensor, like: Tensor | None = None) -> None:
    """Refuse what is not `[B, F, L, H, D]`, or does not match another tensor but in its number of frames."""
    if tensor.ndim != 5 or 0 in tensor.shape:
        raise ConfigError(
            f"expected {name} of shape [B, F, L, H, D] (batch, frames, tokens of a frame, heads, width of a head), "
            f"none of them 0, got {list(tensor.shape)}; split the tokens into frames with unflatten"
        )
    if like is None:
        return
    heads, known = tensor.shape[3], like.shape[3]
    if heads != known and max(heads, known) % min(heads, known) == 0 and tensor.shape[4] == like.shape[4]:
        raise ConfigError(
            f"{name} have {heads} heads where {known} were expected; grouped-query attention is not served: give keys "
            f"and values a head per query head, with repeat_interleave({max(heads, known) // min(heads, known)}, dim=3)"
        )
    same = [axis for axis in range(5) if axis != 1]
    if any(tensor.shape[axis] != like.shape[axis] for axis in same):
        raise ConfigError(
            f"expected {name} to agree in batch, tokens, heads and width with {list(like.shape)}, got "
            f"{list(tensor.shape)}; a cache serves one layer and one size of frame, so call reset() for another"
        )
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise ConfigError(
            f"expected {name} in {like.dtype} on {like.device}, got {tensor.dtype} on {tensor.device}; convert it first"
        )


def exchanges(where: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Slots `[B, n, b]` to exchange with each other, so that what is at `where` comes to be at `first` and behind.

    All slots of one head differ but for pairs that are exchanged with themselves: what is at the end already.
    """
    b = where.shape[2]
    inside = where >= first
    taken = torch.zeros(*where.shape[:2], b + 1, dtype=torch.bool, device=where.device)
    taken.scatter_(2, torch.where(inside, where - first, b), True)
    free = first + taken[..., :b].int().argsort(dim=2, stable=True)  # those that are free come first
    outside = where.gather(2, inside.int().argsort(dim=2, stable=True))
    moving = torch.arange(b, device=where.device) < (~inside).sum(2, keepdim=True)
    return torch.where(moving, outside, free), free


def row_starts(buffer: Tensor, heads: Tensor | None) -> Tensor:
    """`[B, n]`: the row of each head's first slot, of a buffer `[B, H, C, ...]` as rows `[B * H * C, ...]`."""
    B, H, C = buffer.shape[:3]
    batch = torch.arange(B, device=buffer.device)[:, None] * H
    return (batch + (torch.arange(H, device=buffer.device) if heads is None else heads)) * C


def rows_at(held: Tensor, heads: Tensor, positions: Tensor) -> Tensor:
    """`[B, Q, n, positions, ...]` of a tensor `[B, H, F, ...]`."""
    B, H, F = held.shape[:3]
    batch = torch.arange(B, device=held.device)[:, None, None, None]
    if not held.is_contiguous():  # somebody else's cache, of which a copy would cost more than is gained
        return held[batch, heads[:, None], positions]
    rows = (batch * H + heads[:, None]) * F + positions  # whole rows are copied three times as fast as single numbers
    return held.flatten(0, 2).index_select(0, rows.flatten()).view(*positions.shape, *held.shape[3:])
