"""Focused Forcing: each frame and head attends to the past that it needs. "Focused Forcing", arXiv:2605.18346.

For a query frame `q`, a head `h` and a history frame `k`, with mean queries and keys of frames (see `scores`):

    A[q,h,k] = <mean_l Q, mean_l K> / sqrt(D)                          relevance
    R[h,k]   = mean_l cos(K_l^k, mean_k' K_l^k')                       redundancy
    S = lambda A~ + (1 - lambda) D~,   D = -R,   ~ standardised over k

Head `h` keeps the `b_h` frames of the highest `S`. Every query attends to the whole current chunk. Redundancy depends
neither on the query nor on the noise, so it is computed once per chunk; frames up to the budget need no score at all.

Departures: neither the paper's text nor its code was at hand, only a reading note of it, which does not give the
numbers `b_min`, `b_max`, `gamma` and `lambda`; the defaults are ours. The frames of a chunk choose as one, by the
highest `S` of any of them (`choice="maximum"`): the choice is read once and where it lies, while a choice per query
frame reads most of the history in all. Frames are compared by a few of their tokens (`diversity_tokens`), and by keys
without their rotation along time (`diversity_on="unrotated"`), because with it equal frames look different and far ones
always diverse; `"cached"` is the formula as printed. The choice of a chunk's first forward holds for the chunk
(`refresh_every`). Frames that no head of a layer has chosen for some chunks are evicted (`forget_after`).
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
from hasten.streaming.method import LayerView, RefreshedMethod
from hasten.streaming.methods.sliding_window import sink_and_window
from hasten.streaming.scores import LEAST_RELEVANCE, redundancy, relevance, standardised
from hasten.streaming.selection import Selection, index_of, top_frames

__all__ = ["FocusedForcing"]

Choice = Literal["maximum", "mean", "union", "frame"]
DiversityOn = Literal["unrotated", "cached"]
TOGETHER = 2**26  # bytes of keys and values, of all their tokens, that are compared at once
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
    choice: Annotated[
        Choice,
        "how a chunk chooses as one: by its frames' highest score, their mean, all of their choices; or per frame",
    ] = "maximum"
    diversity_on: Annotated[
        DiversityOn, "keys by which frames are compared: without their rotation along time, or as they are cached"
    ] = "unrotated"
    diversity_tokens: Annotated[
        int, Range(1), "tokens of a frame, evenly spread, by which frames are compared, at the most"
    ] = 32
    keep_first: Annotated[
        bool, "heads with a budget of three or more always attend to the first frame, which holds identity"
    ] = True
    window: Annotated[
        int | None, Range(1), "frames to choose from, beside the first; older ones are evicted; None keeps all"
    ] = None
    forget_after: Annotated[
        int | None,
        Range(1),
        "chunks in which no head of a layer chooses a frame until it is evicted; None keeps all",
    ] = 3

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
        kept = range(len(frames)) if self.window is None else sink_and_window(frames, 1, self.window)
        if self.forget_after is None:
            return kept
        used = self._used(view)
        return [position for position in kept if view.chunk - used[frames[position]] < self.forget_after]

    def _used(self, view: LayerView) -> dict[int, int]:
        """The latest chunk in which a head chose each frame held; one that nobody could choose yet counts as chosen."""
        _, choices = view.notes.pop("chosen", (None, {}))
        unused = {number for numbers in choices for number in numbers}
        for numbers, chosen in choices.items():
            unused -= {number for number, yes in zip(numbers, chosen.tolist(), strict=True) if yes}
        known = view.notes.get("used", {})
        used = {n: known.get(n, view.chunk) if n in unused else view.chunk for n in view.cache.frames}
        view.notes["used"] = used
        return used

    def score(self, view: LayerView, queries: Tensor) -> Tensor:
        """`S` of every frame: `[B, q, H, F]`, or `[B, 1, H, F]` where the chunk chooses as one."""
        scores = self._per_frame(view, queries)
        return scores.amax(1, keepdim=True) if self.choice in ("maximum", "union") else scores

    def _per_frame(self, view: LayerView, queries: Tensor) -> Tensor:
        fit = relevance(queries, view.cache.means)
        if self.choice == "mean":
            fit = fit.mean(1, keepdim=True)
        fit = standardised(fit, LEAST_RELEVANCE)
        return fit if self.mix == 1 else torch.lerp(self._diversity(view), fit, self.mix)

    def _diversity(self, view: LayerView) -> Tensor:
        """`D~`, `[B, 1, H, F]`, once per chunk."""
        if "diversity" not in view.memo:
            step = math.ceil(view.cache.tokens / self.diversity_tokens)
            # With small frames nearly all of the time goes into starting operations: as few for many layers as for one.
            layers = [layer for layer in view.together() if "diversity" not in layer.memo]
            caches = [layer.cache for layer in layers]
            if sum(map(len, caches)) * caches[0].frame_bytes > TOGETHER * step:
                layers, caches = layers[:1], caches[:1]
            first, *others = caches
            keys = (first.stored_keys if self.diversity_on == "cached" else first.plain_keys)(step, others)
            parts = [len(cache) for cache in caches]
            for layer, alike in zip(layers, redundancy(keys, parts).split(parts, 2), strict=True):
                layer.memo["diversity"] = standardised(-alike)[:, None]
        known: Tensor = view.memo["diversity"]
        return known

    def select(self, view: LayerView, queries: Tensor, keys: Tensor) -> Selection | None:
        budgets = self.budgets(view.layer, queries.shape[3])
        if len(view.cache) <= min(budgets):
            return None
        scores = self._per_frame(view, queries)
        if self.keep_first and view.cache.frames[0] == 0:
            able = tuple(head for head, budget in enumerate(budgets) if budget >= FORCED_FROM)
            scores[..., 0].index_fill_(2, index_of(able, scores.device), torch.inf)
        if self.choice == "union":
            scores, budgets = _union(scores, budgets)
        elif self.choice == "maximum":
            scores = scores.amax(1, keepdim=True)
        selection = top_frames(scores, budgets)
        if self.forget_after is not None:
            _note(view, selection.chosen())
        return selection


def _note(view: LayerView, chosen: Tensor) -> None:
    """Remember which of the frames held, `[F]` bool, were chosen in this chunk; those of earlier chunks are dropped.

    A history that the model keeps itself is never asked what to keep, so that nothing may pile up until it is.
    """
    if view.notes.get("chosen", (None,))[0] != view.chunk:
        view.notes["chosen"] = view.chunk, {}
    choices: dict[tuple[int, ...], Tensor] = view.notes["chosen"][1]
    numbers = tuple(view.cache.frames)
    choices[numbers] = choices[numbers] | chosen if numbers in choices else chosen


def _union(scores: Tensor, budgets: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """Scores `[B, 1, H, F]` and budgets by which `top_frames` takes all that any query frame would choose.

    Budgets are the same for a batch: where one has a smaller union than another, the next best frames fill it up.
    """
    table = top_frames(scores, budgets).table().any(1, keepdim=True)
    sizes = table.sum(3).amax((0, 1))  # read by the host, which has to know how much attention there will be
    return scores.amax(1, keepdim=True).masked_fill(table, torch.inf), tuple(sizes.tolist())
