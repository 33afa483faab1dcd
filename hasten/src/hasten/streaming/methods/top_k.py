"""Top-k attention over frames: each head and query frame attends to the `k` frames of the highest mean logit.

The relevance half of Focused Forcing (arXiv:2605.18346) alone, with the same budget for every head: what is left of it
without diversity and without head budgets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from hasten.parameters import Range
from hasten.registry import method
from hasten.streaming.method import LayerView, RefreshedMethod
from hasten.streaming.scores import LEAST_RELEVANCE, relevance, standardised
from hasten.streaming.selection import Selection, top_frames

__all__ = ["TopKAttention"]


@method("topk-attention", kind="streaming", paper="ablation of Focused Forcing, arXiv:2605.18346")
@dataclass(frozen=True, kw_only=True)
class TopKAttention(RefreshedMethod):
    """Each head attends to the frames that its queries agree with most."""

    k: Annotated[int, Range(0), "frames of history"] = 6

    def score(self, view: LayerView, queries: Tensor) -> Tensor:
        return relevance(queries, view.cache.means)

    def select(self, view: LayerView, queries: Tensor, keys: Tensor) -> Selection | None:
        if len(view.cache) <= self.k:
            return None
        return top_frames(standardised(self.score(view, queries), LEAST_RELEVANCE), [self.k] * queries.shape[3])
