"""Frames of the right shape, and as rows of a buffer: which to exchange, where a head's begin, and copies of some.

Shape legend: `B` batch, `Q` query frames that choose for themselves, `H` heads, `n` some of them, `b` frames of each,
`F` frames held, `C` frames that there is room for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from hasten.errors import ConfigError
from hasten.parameters import Range, accepted

__all__ = ["check_alike", "check_chunk", "check_extra", "check_frames", "exchanges", "rising", "row_starts", "rows_at"]


SERVED = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def check_frames(name: str, tensor: Tensor, like: Tensor | None = None) -> None:
    """Refuse what is not `[B, F, L, H, D]`, or does not match another tensor but in its number of frames."""
    if not isinstance(tensor, Tensor):  # asked for in every forward of every layer, so that the text can wait
        accepted("streaming", name, Tensor, tensor)
    if tensor.dtype not in SERVED or tensor.layout is not torch.strided:
        raise ConfigError(
            f"expected {name} as a plain tensor of a floating-point type of 16 bits or more, got {tensor.dtype} of "
            f"layout {tensor.layout}"
        )
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


def check_chunk(queries: Tensor, keys: Tensor, values: Tensor | None, like: Tensor | None) -> None:
    """Refuse queries, keys and values that are not those of one chunk, or do not match the history's frames.

    Args:
        values: None where none are given.
        like: what the history holds, `[B, C, L, H, D]`; None while there is no history.
    """
    check_frames("queries", queries, like)
    same = all(
        isinstance(t, Tensor)
        and t.shape == queries.shape
        and t.dtype == queries.dtype
        and t.device == queries.device
        and t.layout is torch.strided
        for t in ((keys,) if values is None else (keys, values))
    )
    if same:  # all layers ask in every forward: what is right is looked at once
        return
    given = {"queries": queries, "keys": keys} | ({} if values is None else {"values": values})
    for name, tensor in given.items():
        check_frames(name, tensor, queries if like is None else like)
    raise ConfigError(
        f"{', '.join(f'{name} {list(tensor.shape)}' for name, tensor in given.items())} are not of the same frames; "
        "give those of one chunk"
    )


def check_alike(keys: Tensor, values: Tensor, plain_keys: Tensor | None) -> None:
    """Refuse values and plain keys that are not of the same frames as the keys."""
    given = {"values": values} if plain_keys is None else {"values": values, "plain keys": plain_keys}
    for name, tensor in given.items():
        check_frames(name, tensor, keys)
        if tensor.shape != keys.shape:
            raise ConfigError(f"expected {name} of the keys' shape {list(keys.shape)}, got {list(tensor.shape)}")


def check_extra(extra: tuple[Tensor, Tensor], held: Tensor) -> None:
    """Refuse keys and values that are not `[B, X, H, D]` of the same batch, heads, width and dtype as `held`."""
    B, _, _, H, D = held.shape
    extra = accepted("streaming", "extra", tuple[Tensor, Tensor], extra)
    for tensor in extra:
        X = tensor.shape[1] if tensor.ndim == 4 else 0
        fits = tensor.shape == (B, X, H, D) and tensor.shape == extra[0].shape and tensor.dtype == held.dtype and X
        if not fits or tensor.device != held.device or tensor.layout is not torch.strided:
            raise ConfigError(
                f"expected extra keys and values of one shape [{B}, X, {H}, {D}] in {held.dtype} on {held.device}, got "
                f"{[list(t.shape) for t in extra]} in {tensor.dtype} on {tensor.device}"
            )


def rising(name: str, numbers: Any) -> list[int]:
    """Whole numbers from 0 on, each larger than the one before, of a list, an array or a tensor.

    Raises:
        ConfigError: if they are not.
    """
    listed = numbers.tolist() if getattr(numbers, "ndim", 0) == 1 else numbers
    if isinstance(listed, Sequence) and not len(listed):
        return []
    found = list(accepted("streaming", name, tuple[Annotated[int, Range(0)], ...], listed))
    if found != sorted(set(found)):
        raise ConfigError(f"expected rising {name}, got {found}")
    return found


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
