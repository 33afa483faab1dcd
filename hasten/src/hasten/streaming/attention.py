"""Attention of a chunk to itself and to the chosen part of its history, in several ways that agree.

* `"grouped"`: one dense batch for each group of heads; portable and exact. The chosen frames are copied once per
  selection and serve all steps for which it holds.
* `"masked"`: dense attention with a mask. The plain reference; saves nothing.
* `"flex"`: `torch.nn.attention.flex_attention` with a mask read from the table of frames.
* `"varlen"`: one sequence for each (batch, query frame, head), for a flash kernel of sequences of unequal length.

Where everything is chosen all of them are the same call of full attention, bit for bit.

Shape legend: `B` batch, `q` frames of the current chunk, `F` frames held, `L` tokens of a frame, `H` heads, `D` width
of a head, `X` further tokens that all attend to, `Q` query frames that choose for themselves (`q` or 1), `n` heads of a
group, `T` tokens chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache as remember
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from hasten.errors import ConfigError, unknown
from hasten.streaming.cache import FrameCache
from hasten.streaming.selection import HeadGroup, Selection, index_of

__all__ = [
    "BACKENDS",
    "Backend",
    "Current",
    "PackedGroup",
    "StreamStats",
    "attend",
    "attention_pairs",
    "kv_bytes",
    "pack",
    "varlen",
]

Backend = Literal["grouped", "masked", "flex", "varlen"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

VarlenKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]
"""(q, k, v, starts of q, starts of k, longest q, longest k) of `[tokens, heads, D]` and int32 `[sequences + 1]`."""


@dataclass
class StreamStats:
    """What was done, and what full attention to the whole history would have taken; sums over forwards and layers.

    Attributes:
        forwards: of a layer.
        pairs, full_pairs: of a query and a key that were compared, over batch and heads.
        kv_bytes, full_kv_bytes: of keys and values read.
        select_seconds: spent on scores and choices.
        pack_seconds: spent on copying the chosen frames together.
        attention_seconds: spent on attention, without the former two.
        cache_bytes: held now.
        packed_bytes: held now in copies of chosen frames.
        frames: held now, in the layer that holds most.
    """

    forwards: int = 0
    pairs: int = 0
    full_pairs: int = 0
    kv_bytes: int = 0
    full_kv_bytes: int = 0
    select_seconds: float = 0.0
    pack_seconds: float = 0.0
    attention_seconds: float = 0.0
    cache_bytes: int = 0
    packed_bytes: int = 0
    frames: int = 0

    def __add__(self, other: StreamStats) -> StreamStats:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return StreamStats(**sums | {"frames": max(self.frames, other.frames)})

    @property
    def work_ratio(self) -> float:
        """How many times less attention work than with the whole history (1 while nothing ran)."""
        return self.full_pairs / self.pairs if self.pairs else 1.0

    @property
    def overhead(self) -> float:
        """Time for choosing as a share of the time for attention (0 while nothing ran)."""
        busy = self.attention_seconds + self.pack_seconds
        return self.select_seconds / busy if busy else 0.0


@dataclass(frozen=True, eq=False)
class Current:
    """The chunk that is being made, and other tokens that every query attends to.

    Attributes:
        queries, keys, values: `[B, q, L, H, D]`, rotated if the cache's keys are.
        extra: keys and values `[B, X, H, D]` that are neither of the chunk nor of the frames to choose from.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    extra: tuple[Tensor, Tensor] | None = None

    @property
    def visible(self) -> int:
        """Tokens that every query attends to: `q * L + X`."""
        q, L = self.keys.shape[1:3]
        return q * L + (0 if self.extra is None else self.extra[0].shape[1])

    def by_head(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, H, q * L + X, D]`."""
        parts = [t.flatten(1, 2) for t in (self.keys, self.values)]
        if self.extra is not None:
            parts = [torch.cat([more, own], 1) for more, own in zip(self.extra, parts, strict=True)]
        return parts[0].transpose(1, 2), parts[1].transpose(1, 2)

    def after(self, cache: FrameCache) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole history and then of these, `[B, H, F * L + q * L + X, D]`."""
        if self.extra is None:
            keys, values = cache.with_current(self.keys, self.values)
            return keys.flatten(2, 3), values.flatten(2, 3)
        keys, values = self.by_head()
        if not len(cache):
            return keys, values
        return torch.cat([cache.keys.flatten(2, 3), keys], 2), torch.cat([cache.values.flatten(2, 3), values], 2)


@dataclass(frozen=True, eq=False)
class PackedGroup:
    """The chosen history of one group, copied together; room for the current chunk behind it.

    Attributes:
        heads: of the group, as an index; None for all of them in order.
        keys, values: `[B * Q * n, T + q * L, D]`.
        history: `T`.
        choosers: `Q`.
    """

    heads: Tensor | None
    keys: Tensor
    values: Tensor
    history: int
    choosers: int

    def own(self, by_head: Tensor) -> Tensor:
        """The group's part of `[B, H, ...]`."""
        return by_head if self.heads is None else by_head.index_select(1, self.heads)


def attend(
    backend: Backend,
    current: Current,
    cache: FrameCache,
    selection: Selection | None,
    packed: list[PackedGroup] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of the current chunk to itself and to what was selected of the history.

    Args:
        backend: how.
        current: the chunk.
        cache: the history.
        selection: None, like a selection of everything, is full attention.
        packed: what `pack` made of the selection, for the grouped back-end; made on the spot if missing.
        scale: of the logits; `1 / sqrt(D)` by default.

    Returns:
        `[B, q, L, H, D]`.

    Raises:
        UnknownNameError: for another back-end.
        ConfigError: if the back-end cannot run here.
    """
    if backend not in BACKENDS:
        raise unknown("attention back-end", backend, BACKENDS)
    if selection is None or selection.everything:
        return _dense(current, cache, scale)
    if backend == "grouped":
        return _grouped(current, packed if packed is not None else pack(cache, selection, current.visible), scale)
    if backend == "masked":
        return _dense(current, cache, scale, _visible(current, cache, selection))
    if backend == "flex":
        return _flex(current, cache, selection, scale)
    return varlen(current, cache, selection, scale, _flash(current.queries))


def _dense(current: Current, cache: FrameCache, scale: float | None, visible: Tensor | None = None) -> Tensor:
    """Attention to everything, or to what `visible` `[B, q, H, keys]` says."""
    B, q, L, H, D = current.queries.shape
    mask = None if visible is None else visible.transpose(1, 2).repeat_interleave(L, 2)
    own = current.queries.permute(0, 3, 1, 2, 4).flatten(2, 3)
    out = scaled_dot_product_attention(own, *current.after(cache), mask, scale=scale)
    return out.view(B, H, q, L, D).permute(0, 2, 3, 1, 4)


def _visible(current: Current, cache: FrameCache, selection: Selection) -> Tensor:
    """`[B, q, H, F * L + q * L + X]` bool: which keys each query frame and head attends to."""
    B, q, _, H, _ = current.queries.shape
    history = selection.token_table(cache.tokens).expand(B, q, H, -1)
    return torch.cat([history, history.new_ones(B, q, H, current.visible)], 3)


def _gather(cache: FrameCache, group: HeadGroup) -> tuple[Tensor, Tensor]:
    """Chosen keys and values of one group, `[B, Q, n, T, D]`."""
    heads = index_of(group.heads, group.frames.device)
    return cache.frames_of(heads, group.frames) if group.tokens is None else cache.tokens_of(heads, group.tokens)


def pack(cache: FrameCache, selection: Selection, room: int) -> list[PackedGroup]:
    """Copy the chosen history of every group together, with room for `room` tokens that every query attends to."""
    packed = []
    for group in selection.groups:
        keys, values = _gather(cache, group)
        everyone = group.heads == tuple(range(selection.heads))
        heads = None if everyone else index_of(group.heads, keys.device)
        packed.append(PackedGroup(heads, _roomy(keys, room), _roomy(values, room), keys.shape[3], keys.shape[1]))
    return packed


def _roomy(chosen: Tensor, room: int) -> Tensor:
    """`[B * Q * n, T + room, D]`; the room is not filled."""
    B, Q, n, T, D = chosen.shape
    buffer = chosen.new_empty(B * Q * n, T + room, D)
    buffer[:, :T] = chosen.reshape(B * Q * n, T, D)
    return buffer


def _grouped(current: Current, packed: list[PackedGroup], scale: float | None) -> Tensor:
    B, q, L, _, D = current.queries.shape
    by_head = current.queries.permute(0, 3, 1, 2, 4)  # [B, H, q, L, D]
    now = current.by_head()
    parts = []
    for group in packed:
        Q, n = group.choosers, len(group.keys) // (B * group.choosers)
        own = group.own(by_head).reshape(B, n, Q, -1, D).transpose(1, 2)
        k, v = (
            _completed(buffer, group, group.own(new))
            for buffer, new in zip((group.keys, group.values), now, strict=True)
        )
        out = scaled_dot_product_attention(own.flatten(0, 2)[:, None], k[:, None], v[:, None], scale=scale)
        parts.append(out.view(B, Q, n, -1, D).transpose(1, 2).reshape(B, n, q, L, D))
    heads = [group.heads for group in packed if group.heads is not None]
    out = torch.cat(parts, 1).index_select(1, torch.cat(heads).argsort()) if heads else parts[0]
    return out.permute(0, 2, 3, 1, 4)


def _completed(buffer: Tensor, group: PackedGroup, now: Tensor) -> Tensor:
    """The group's history and what every query attends to, `[B, n, q * L + X, D]`, written into the room behind it."""
    B, n, length, D = now.shape
    rows = now[:, None].expand(B, group.choosers, n, length, D)
    if torch.is_grad_enabled():
        return torch.cat([buffer[:, : group.history], rows.reshape(-1, length, D)], 1)
    buffer.view(B, group.choosers, n, -1, D)[:, :, :, group.history :] = rows
    return buffer


@remember
def _flex_kernel(on_gpu: bool) -> Any:
    """Compiled on a GPU, where that saves work; as written elsewhere, where it shows that the mask is right."""
    return torch.compile(flex_attention, dynamic=True) if on_gpu else flex_attention


def _flex(current: Current, cache: FrameCache, selection: Selection, scale: float | None) -> Tensor:
    B, q, L, H, D = current.queries.shape
    table = _visible(current, cache, selection)

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return table[b, query // L, h, key]

    keys, values = current.after(cache)
    own = current.queries.permute(0, 3, 1, 2, 4).flatten(2, 3)
    mask = create_block_mask(visible, B, H, q * L, keys.shape[2], device=own.device)
    out: Tensor = _flex_kernel(own.is_cuda)(own, keys, values, block_mask=mask, scale=scale)
    return out.view(B, H, q, L, D).permute(0, 2, 3, 1, 4)


def _flash(queries: Tensor) -> VarlenKernel:
    """The flash kernel for sequences of unequal length."""
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ConfigError(
            'the back-end "varlen" needs the package flash-attn, which is not installed; install it or take "grouped"'
        ) from error
    if not queries.is_cuda or queries.dtype not in (torch.float16, torch.bfloat16):
        raise ConfigError(
            f'the back-end "varlen" needs float16 or bfloat16 on a CUDA device, got {queries.dtype} on '
            f'{queries.device}; take "grouped"'
        )
    kernel: VarlenKernel = flash_attn_varlen_func
    return kernel


def varlen(
    current: Current, cache: FrameCache, selection: Selection, scale: float | None, kernel: VarlenKernel
) -> Tensor:
    """Every (batch, query frame, head) as a sequence of `L` queries, packed end to end with its keys.

    Args:
        kernel: as `flash_attn_varlen_func`: (q, k, v, starts of q, starts of k, longest q, longest k) of
            `[tokens, 1, D]` and int32 `[sequences + 1]`; it divides logits by `sqrt(D)`.
    """
    B, q, L, _, D = current.queries.shape
    queries: list[Tensor] = []
    history: tuple[list[Tensor], list[Tensor]] = ([], [])
    lengths: list[int] = []
    for group in selection.groups:
        n, heads = len(group.heads), list(group.heads)
        queries.append(current.queries.permute(0, 1, 3, 2, 4)[:, :, heads].reshape(-1, D))
        for part, chosen, now in zip(history, _gather(cache, group), current.by_head(), strict=True):
            attended = now[:, None, heads].expand(B, q, n, -1, D)
            part.append(torch.cat([chosen.expand(B, q, n, -1, D), attended], 3).reshape(-1, D))
        lengths += [group.history_tokens(L) + current.visible] * (B * q * n)
    starts_q = torch.arange(len(lengths) + 1, dtype=torch.int32, device=current.queries.device) * L
    starts_k = torch.tensor([0, *lengths], device=current.queries.device).cumsum(0).to(torch.int32)
    factor = 1.0 if scale is None else scale * D**0.5
    keys, values = (torch.cat(part)[:, None] for part in history)
    out = kernel(torch.cat(queries)[:, None] * factor, keys, values, starts_q, starts_k, L, max(lengths))
    return _unpacked(out[:, 0], selection, current.queries)


def _unpacked(out: Tensor, selection: Selection, like: Tensor) -> Tensor:
    """Sequences end to end back to `[B, q, L, H, D]`."""
    B, q, L, H, D = like.shape
    result, at = out.new_empty(B, q, H, L, D), 0
    for group in selection.groups:
        size = B * q * len(group.heads) * L
        result[:, :, list(group.heads)] = out[at : at + size].view(B, q, -1, L, D)
        at += size
    return result.transpose(2, 3)


def attention_pairs(selection: Selection | None, current: Current, held: int) -> int:
    """Pairs of a query and a key that one forward of one layer compares, over batch and heads.

    Args:
        selection: None for all of the history.
        held: frames of history.
    """
    B, q, L, H, _ = current.queries.shape
    if selection is None:
        return B * H * q * L * (held * L + current.visible)
    return B * q * L * sum(len(g.heads) * (g.history_tokens(L) + current.visible) for g in selection.groups)


def kv_bytes(selection: Selection | None, current: Current, held: int) -> int:
    """Bytes of keys and values that one forward of one layer reads.

    Query frames that choose for themselves read their frames and the current chunk each; a choice for the whole chunk
    is read once.
    """
    B, _, L, H, D = current.queries.shape
    if selection is None:
        tokens = H * (held * L + current.visible)
    else:
        tokens = sum(
            g.frames.shape[1] * len(g.heads) * (g.history_tokens(L) + current.visible) for g in selection.groups
        )
    return 2 * B * tokens * D * current.keys.element_size()
