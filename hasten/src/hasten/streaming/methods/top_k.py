"""Top-k attention over frames: each head and query frame sees the `k` frames of the highest mean logit.

The relevance half of Focused Forcing (arXiv:2605.18346) alone, with the same budget for every head: what is left of it
without diversity and without head budgets.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hasten.errors import ConfigError
from hasten.registry import method
from hasten.streaming.policy import LayerView, StreamingMethod
from hasten.streaming.scores import relevance
from hasten.streaming.selection import Selection, top_frames

__all__ = ["TopKAttention"]


@method("topk-attention", kind="streaming", paper="ablation of Focused Forcing, arXiv:2605.18346")
@dataclass(frozen=True, kw_only=True)
class TopKAttention(StreamingMethod):
    """Each head sees the frames that its queries agree with most.

    Args:
        k: frames.
    """

    k: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 0:
            raise ConfigError(f"expected k of 0 or more frames, got {self.k}")

    def score(self, view: LayerView, queries: Tensor) -> Tensor:
        return relevance(queries, view.cache.means)

    def select(self, view: LayerView, queries: Tensor, keys: Tensor) -> Selection | None:
        if len(view.cache) <= self.k:
            return None
        return top_frames(self.score(view, queries), [self.k] * queries.shape[3])
