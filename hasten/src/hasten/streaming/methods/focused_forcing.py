"""Focused Forcing: each frame and head attends to the past that it needs. "Focused Forcing", arXiv:2605.18346.

For a query frame `q`, a head `h` and a history frame `k`, with mean queries and keys of frames (see `scores`):

    A[q,h,k] = <mean_l Q, mean_l K> / sqrt(D)                          relevance
    R[h,k]   = mean_l cos(K_l^k, mean_k' K_l^k')                       redundancy
    S = lambda A~ + (1 - lambda) D~,   D = -R,   ~ standardised over k

Head `h` keeps the `b_h` frames of the highest `S`. Every query attends to the whole current chunk. Redundancy depends
neither on the query nor on the noise, so it is computed once per chunk; frames up to the budget need no score at all.

Departures: neither the paper's text nor its code was at hand, only a reading note of it, which does not give the
numbers `b_min`, `b_max`, `gamma` and `lambda`; the defaults are ours. Frames are compared by keys without their
rotation along time (`diversity_on="unrotated"`), because with it equal frames look different and far ones always
diverse; `"cached"` is the formula as printed. The choice of a chunk's first forward holds for the chunk
(`refresh_every`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import torch
from torch import Tensor

from hasten.parameters import Range
from hasten.registry import method
from hasten.streaming.budgets import HeadBudgets
from hasten.streaming.methods.sliding_window import sink_and_window
from hasten.streaming.policy import LayerView, RefreshedMethod
from hasten.streaming.scores import relevance, standardised
from hasten.streaming.selection import Selection, index_of, top_frames

__all__ = ["FocusedForcing"]

Choice = Literal["frame", "chunk"]
DiversityOn = Literal["unrotated", "cached"]
FORCED_FROM = 3  # the smallest budget of which one frame can be given to the first


@method("focused-forcing", kind="streaming", paper="Focused Forcing, arXiv:2605.18346")
@dataclass(frozen=True, kw_only=True)
class FocusedForcing(RefreshedMethod):
    """Each frame and head attends to the frames that matter to it and differ from each other (Focused Forcing)."""

    budget: Annotated[
        int | HeadBudgets | str, Range(0), "frames of history for every head, or for each: `HeadBudgets` or their file"
    ] = 6
    mix: Annotated[float, Range(0, 1), "`lambda`, the weight of relevance against diversity; 1 is relevance alone"] = (
        0.5
    )
    choice: Annotated[Choice, "whether every query frame chooses for itself, or the chunk as one"] = "frame"
    diversity_on: Annotated[
        DiversityOn, "keys by which frames are compared: without their rotation along time, or as they are cached"
    ] = "unrotated"
    diversity_tokens: Annotated[
        int | None,
        Range(1),
        "tokens of a frame, evenly spread, by which frames are compared, at the most; None for all",
    ] = None
    keep_first: Annotated[
        bool, "heads with a budget of three or more always attend to the first frame, which holds identity"
    ] = False
    window: Annotated[
        int | None, Range(1), "frames to choose from, beside the first; older ones are evicted; None keeps all"
    ] = None

    def check(self) -> None:
        super().check()
        _ = self._table  # reads the file now, not in the middle of a rollout

    @cached_property
    def _table(self) -> HeadBudgets | None:
        if isinstance(self.budget, int):
            return None
        return self.budget if isinstance(self.budget, HeadBudgets) else HeadBudgets.load(self.budget)

    def budgets(self, layer: int, heads: int) -> tuple[int, ...]:
        """Frames for each head of a layer."""
        if isinstance(self.budget, int):
            return (self.budget,) * heads
        assert self._table is not None
        return self._table.of(layer, heads)

    def check_model(self, layers: int, facts: Mapping[str, object]) -> None:
        if self._table is not None:
            self._table.check(layers, facts)

    def retained(self, view: LayerView) -> Sequence[int]:
        frames = view.cache.frames
        return range(len(frames)) if self.window is None else sink_and_window(frames, 1, self.window)

    def score(self, view: LayerView, queries: Tensor) -> Tensor:
        """`S` of every frame: `[B, q, H, F]`, or `[B, 1, H, F]` where the chunk chooses as one."""
        fit = relevance(queries, view.cache.means)
        if self.choice == "chunk":
            fit = fit.mean(1, keepdim=True)
        if self.mix == 1:
            return standardised(fit)
        return torch.lerp(self._diversity(view), standardised(fit), self.mix)

    def _diversity(self, view: LayerView) -> Tensor:
        """`D~`, `[B, 1, H, F]`, once per chunk."""
        if "diversity" not in view.memo:
            tokens = view.cache.tokens
            step = 1 if self.diversity_tokens is None else math.ceil(tokens / self.diversity_tokens)
            # All tokens of all layers at once would take too much memory; a few of them take little time together.
            layers = view.together() if step > 1 else [view]
            if any("diversity" in layer.memo for layer in layers):
                layers = [view]  # the last of layers that were ready one by one
            first, *others = layers
            similarity = first.cache.redundancy(
                step, rotated=self.diversity_on == "cached", others=[other.cache for other in others]
            )
            for layer, diversity in zip(layers, standardised(-similarity)[:, :, None], strict=True):
                layer.memo["diversity"] = diversity
        known: Tensor = view.memo["diversity"]
        return known

    def select(self, view: LayerView, queries: Tensor, keys: Tensor) -> Selection | None:
        budgets = self.budgets(view.layer, queries.shape[3])
        if len(view.cache) <= min(budgets):
            return None
        scores = self.score(view, queries)
        if self.keep_first and view.cache.frames[0] == 0:
            able = tuple(head for head, budget in enumerate(budgets) if budget >= FORCED_FROM)
            scores[..., 0].index_fill_(2, index_of(able, scores.device), torch.inf)
        return top_frames(scores, budgets)
