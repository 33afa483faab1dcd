"""Attention of a chunk to itself and to the chosen part of its history, in several ways that agree.

* `"grouped"`: one dense batch for each group of heads; portable and exact. A choice of whole frames for the chunk is
  brought to the end of the cache, in place and once per selection, and is read where it lies. Other choices (one per
  query frame, or of single tokens), and caches that somebody else keeps, are copied together once per selection.
* `"masked"`: dense attention with a mask. The plain reference; saves nothing.
* `"flex"`: `torch.nn.attention.flex_attention` with a block mask from the table of frames, made once per selection.
* `"varlen"`: one sequence for each (batch, query frame, head), for a flash kernel of sequences of unequal length.

Where everything is chosen all of them are the same call of full attention, bit for bit.

Shape legend: `B` batch, `q` frames of the current chunk, `F` frames held, `L` tokens of a frame, `H` heads, `D` width
of a head, `X` further tokens that all attend to, `Q` query frames that choose for themselves (`q` or 1), `n` heads of a
group, `T` tokens chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hasten.errors import unknown
from hasten.streaming.cache import FrameCache
from hasten.streaming.current import Current, gathered, visible
from hasten.streaming.kernels import BlockMask, flash_kernel, flex, varlen
from hasten.streaming.modes import of_our_own
from hasten.streaming.selection import Selection, index_of
from hasten.streaming.stats import StreamStats

__all__ = [
    "BACKENDS",
    "Backend",
    "PackedGroup",
    "Prepared",
    "attend",
    "attention_pairs",
    "count",
    "kv_bytes",
    "pack",
    "prepare",
]

Backend = Literal["grouped", "masked", "flex", "varlen"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


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


@dataclass(eq=False)
class Prepared:
    """What a back-end makes once per selection, for all forwards for which the selection holds.

    Attributes:
        packed: copies of what was chosen, of the grouped back-end.
        arranged: whether the chosen frames are the last ones that each head stores.
        mask: of the flex back-end.
    """

    packed: list[PackedGroup] | None = None
    arranged: bool = False
    mask: BlockMask | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(group.keys.nbytes + group.values.nbytes for group in self.packed or ())


@of_our_own
def prepare(backend: Backend, cache: FrameCache, selection: Selection, current: Current) -> Prepared:
    """Bring together what was chosen, in place where that may be; nothing to do but for the grouped back-end."""
    if backend != "grouped" or selection.everything:
        return Prepared()
    whole = all(group.tokens is None and group.frames.shape[1] == 1 for group in selection.groups)
    if not whole or current.extra is not None or not cache.write_current(current.keys, current.values):
        return Prepared(packed=pack(cache, selection, current.visible))
    for group in selection.groups:
        if group.frames.shape[3]:
            every = group.heads == tuple(range(selection.heads))
            cache.bring_to_end(group.frames[:, 0], None if every else index_of(group.heads, group.frames.device))
    return Prepared(arranged=True)


def attend(
    backend: Backend,
    current: Current,
    cache: FrameCache,
    selection: Selection | None,
    prepared: Prepared | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of the current chunk to itself and to what was selected of the history.

    Args:
        backend: how.
        current: the chunk.
        cache: the history.
        selection: None, like a selection of everything, is full attention.
        prepared: what `prepare` made of the selection; made on the spot if missing.
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
    prepared = prepared if prepared is not None else prepare(backend, cache, selection, current)
    if backend == "grouped":
        if prepared.arranged and current.extra is None and cache.write_current(current.keys, current.values):
            return _in_place(current, cache, selection, scale)
        packed = prepared.packed if prepared.packed is not None else pack(cache, selection, current.visible)
        return _grouped(current, packed, scale)
    if backend == "masked":
        return _dense(current, cache, scale, visible(current, cache, selection))
    if backend == "flex":
        out, prepared.mask = flex(current, cache, selection, prepared.mask, scale)
        return out
    return varlen(current, cache, selection, scale, flash_kernel(current.queries))


def _dense(current: Current, cache: FrameCache, scale: float | None, visible: Tensor | None = None) -> Tensor:
    """Attention to everything, or to what `visible` `[B, q, H, keys]` says."""
    B, q, L, H, D = current.queries.shape
    mask = None if visible is None else visible.transpose(1, 2).repeat_interleave(L, 2)
    own = current.queries.permute(0, 3, 1, 2, 4).flatten(2, 3)
    out = scaled_dot_product_attention(own, *current.after(cache), mask, scale=scale)
    return out.view(B, H, q, L, D).permute(0, 2, 3, 1, 4)


def pack(cache: FrameCache, selection: Selection, room: int) -> list[PackedGroup]:
    """Copy the chosen history of every group together, with room for `room` tokens that every query attends to."""
    packed = []
    for group in selection.groups:
        keys, values = gathered(cache, group)
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


def _in_place(current: Current, cache: FrameCache, selection: Selection, scale: float | None) -> Tensor:
    """The last frames that each head stores, and the current chunk, which stands behind them: views."""
    B, q, L, H, D = current.queries.shape
    queries = current.queries.permute(0, 3, 1, 2, 4).flatten(2, 3)  # [B, H, q * L, D]
    if len(selection.groups) == 1:
        keys, values = cache.end(selection.groups[0].frames.shape[3], q)
        out = scaled_dot_product_attention(queries, keys, values, scale=scale)
    else:
        found: Tensor | None = None
        for group in selection.groups:
            keys, values = cache.end(group.frames.shape[3], q)
            for heads in runs(group.heads):
                part = scaled_dot_product_attention(queries[:, heads], keys[:, heads], values[:, heads], scale=scale)
                found = part.new_empty(queries.shape) if found is None else found  # in the dtype that autocast chooses
                found[:, heads] = part
        assert found is not None
        out = found
    return out.view(B, H, q, L, D).permute(0, 2, 3, 1, 4)


def runs(heads: tuple[int, ...]) -> list[slice]:
    """Rising numbers as slices of those that follow each other, so that views of them can be taken."""
    found: list[slice] = []
    for head in heads:
        if found and found[-1].stop == head:
            found[-1] = slice(found[-1].start, head + 1)
        else:
            found.append(slice(head, head + 1))
    return found


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


def count(sums: StreamStats, current: Current, selection: Selection | None, held: int, whole: int) -> None:
    """Add what one forward of one layer did, with `held` frames of `whole`, which full attention would have read."""
    sums.forwards += 1
    sums.pairs += attention_pairs(selection, current, held)
    sums.full_pairs += attention_pairs(None, current, whole)
    sums.kv_bytes += kv_bytes(selection, current, held)
    sums.full_kv_bytes += kv_bytes(None, current, whole)


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
