"""Which frames of the history each head attends to.

A selection is a list of groups of heads that attend to equally many tokens, so that each group is one dense batch. The
current chunk is no part of it: every query attends to the whole current chunk.

Shape legend: `B` batch, `Q` query frames, or 1 where all frames of the chunk share a choice, `H` heads, `n` heads of a
group, `b` frames chosen, `F` frames held, `L` tokens of a frame, `T` tokens chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import torch
from torch import Tensor

from hasten.errors import ConfigError, brief
from hasten.parameters import Range, accepted

__all__ = ["MARGIN", "HeadGroup", "Selection", "frames_at", "index_of", "ranked", "top_frames"]

MARGIN = 2.0**-8  # of a deviation: by so much rounding changes scores that frames owe to nearly equal keys


@dataclass(frozen=True, eq=False)
class HeadGroup:
    """Heads that attend to the same number of tokens of the history.

    Attributes:
        heads: their numbers.
        frames: positions in the cache `[B, Q, n, b]`, rising; `b` may be 0.
        tokens: positions in the cache's tokens `[B, Q, n, T]` (frame times `L` plus token) where only parts of the
            frames are chosen; None where they are chosen whole.
    """

    heads: tuple[int, ...]
    frames: Tensor
    tokens: Tensor | None = None

    def __post_init__(self) -> None:
        if type(self.heads) is not tuple or any(type(head) is not int for head in self.heads):  # the text can wait
            accepted("HeadGroup", "heads", tuple[Annotated[int, Range(0)], ...], self.heads)
        for name, places in (("frames", self.frames), ("tokens", self.tokens)):
            if places is None and name == "tokens":
                continue
            if places is None or not isinstance(places, Tensor):
                raise ConfigError(f"HeadGroup: {name} must be a Tensor, got {brief(places)}")
            if places.ndim != 4 or places.shape[2] != len(self.heads) or places.dtype != torch.long:
                raise ConfigError(
                    f"expected {name} of a group of {len(self.heads)} heads as int64 [B, Q, heads, places], got "
                    f"{places.dtype} {list(places.shape)}"
                )

    def history_tokens(self, tokens: int) -> int:
        """Tokens of the history that one query attends to, given the tokens of a frame."""
        return self.frames.shape[3] * tokens if self.tokens is None else self.tokens.shape[3]

    def token_positions(self, tokens: int) -> Tensor:
        """`[B, Q, n, T]`: the positions of all tokens chosen, in order of time."""
        if self.tokens is not None:
            return self.tokens
        within = torch.arange(tokens, device=self.frames.device)
        return (self.frames[..., None] * tokens + within).flatten(3)


@dataclass(frozen=True, eq=False)
class Selection:
    """The choice of one layer for one forward.

    Attributes:
        groups: each head is in exactly one.
        held: frames that there were to choose from, `F`.

    Raises:
        ConfigError: if a head is missing or there twice.
    """

    groups: tuple[HeadGroup, ...]
    held: int

    def __post_init__(self) -> None:
        if type(self.groups) is not tuple or any(type(group) is not HeadGroup for group in self.groups):
            accepted("Selection", "groups", tuple[HeadGroup, ...], self.groups)
        if type(self.held) is not int or self.held < 0:
            accepted("Selection", "held", Annotated[int, Range(0)], self.held)
        heads = sorted(head for group in self.groups for head in group.heads)
        if heads != list(range(len(heads))):
            raise ConfigError(f"expected each head in one group of the selection, got heads {heads}")

    @property
    def everything(self) -> bool:
        """Whether every head attends to every token of the history."""
        return all(g.tokens is None and g.frames.shape[3] == self.held for g in self.groups)

    @property
    def heads(self) -> int:
        """How many heads the groups have together."""
        return sum(len(group.heads) for group in self.groups)

    def table(self) -> Tensor:
        """`[B, Q, H, F]` bool: which frames are chosen, whole or in part. `Q` is 1 if every group shares its choice."""
        return self._spread([g.frames for g in self.groups], self.held)

    def token_table(self, tokens: int) -> Tensor:
        """`[B, Q, H, F * L]` bool: which tokens are chosen."""
        return self._spread([g.token_positions(tokens) for g in self.groups], self.held * tokens)

    def chosen(self) -> Tensor:
        """`[F]` bool: which frames any query frame, head or batch entry attends to."""
        table = torch.zeros(self.held, dtype=torch.bool, device=self.groups[0].frames.device)
        for group in self.groups:
            table.index_fill_(0, group.frames.flatten(), True)
        return table

    def _spread(self, positions: Sequence[Tensor], size: int) -> Tensor:
        B = positions[0].shape[0]
        Q = max(p.shape[1] for p in positions)
        table = torch.zeros(B, Q, self.heads, size, dtype=torch.bool, device=positions[0].device)
        for group, chosen in zip(self.groups, positions, strict=True):
            n = len(group.heads)
            part = torch.zeros(B, Q, n, size, dtype=torch.bool, device=table.device)
            part.scatter_(3, chosen.expand(B, Q, n, chosen.shape[3]), True)
            table[:, :, list(group.heads)] = part
        return table


@lru_cache(maxsize=512)
def index_of(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers as an index, which nobody may write to; made once, because all layers ask for it and a GPU would wait."""
    with torch.inference_mode(False):  # or it could not be used where there are gradients, later
        return torch.tensor(numbers, dtype=torch.long, device=device)


def frames_at(positions: Sequence[int], heads: Sequence[int], batch: int, device: torch.device) -> HeadGroup:
    """A group whose heads all attend to the frames at these positions."""
    index = index_of(tuple(sorted(positions)), device)
    return HeadGroup(tuple(heads), index.expand(batch, 1, len(heads), len(index)))


def ranked(scores: Tensor, margin: float) -> Tensor:
    """Places of the last axis, highest score first; scores no further apart than `margin` count as equal, older first.

    A number rounded to a grid would not do: equal scores may lie on both sides of a step. Those that follow each other
    within the margin are one rank, so that only a gap that is the margin itself, up to rounding, is left to chance.
    """
    held = scores.shape[-1]
    values, order = scores.sort(dim=-1, descending=True)
    lower = (values[..., :-1] - values[..., 1:]) > margin  # never between two that are infinite
    order[..., 1:].add_(lower.cumsum(-1), alpha=held)
    return order.sort(dim=-1).values.remainder_(held)


def top_frames(scores: Tensor, budgets: Sequence[int]) -> Selection:
    """Each head's best frames, as many as its budget (all of them if there are no more), in order of time.

    Scores that are equal up to rounding go to the older frame, so that every device makes the same choice.

    Args:
        scores: `[B, Q, H, F]`, in deviations (see `scores.standardised`), or infinite.
        budgets: frames for each of the `H` heads; 0 and more.
    """
    H, F = scores.shape[2:]
    order = ranked(scores, MARGIN)
    groups = []
    for size, heads in _by_size(tuple(budgets), H, F):
        best = order if len(heads) == H else order.index_select(2, index_of(heads, order.device))
        groups.append(HeadGroup(heads, best[..., :size].sort(dim=3).values))
    return Selection(tuple(groups), F)


@lru_cache(maxsize=512)
def _by_size(budgets: tuple[int, ...], heads: int, held: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """The heads that attend to equally many frames, by that number; worked out once, because all layers ask."""
    if len(budgets) != heads or min(budgets) < 0:
        raise ConfigError(f"expected a budget of 0 or more frames for each of {heads} heads, got {list(budgets)}")
    sizes = [min(budget, held) for budget in budgets]
    return tuple((size, tuple(h for h in range(heads) if sizes[h] == size)) for size in sorted(set(sizes)))
