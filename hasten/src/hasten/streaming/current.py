"""The chunk that is being made, and what of the history it attends to.

Shape legend: `B` batch, `q` frames of the current chunk, `F` frames held, `L` tokens of a frame, `H` heads, `D` width
of a head, `X` further tokens that all attend to, `Q` query frames that choose for themselves (`q` or 1), `n` heads of a
group, `T` tokens chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.streaming.cache import FrameCache
from hasten.streaming.selection import HeadGroup, Selection, index_of

__all__ = ["Current", "gathered", "visible"]


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
        stored = cache.stored
        return torch.cat([stored[0].flatten(2, 3), keys], 2), torch.cat([stored[1].flatten(2, 3), values], 2)


def visible(current: Current, cache: FrameCache, selection: Selection) -> Tensor:
    """`[B, q, H, F * L + q * L + X]` bool: the stored keys that each query frame and head attends to."""
    B, q, _, H, _ = current.queries.shape
    history = cache.in_storage_order(selection.token_table(cache.tokens)).expand(B, q, H, -1)
    return torch.cat([history, history.new_ones(B, q, H, current.visible)], 3)


def gathered(cache: FrameCache, group: HeadGroup) -> tuple[Tensor, Tensor]:
    """Chosen keys and values of one group, `[B, Q, n, T, D]`."""
    heads = index_of(group.heads, group.frames.device)
    return cache.frames_of(heads, group.frames) if group.tokens is None else cache.tokens_of(heads, group.tokens)
