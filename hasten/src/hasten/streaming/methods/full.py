"""The whole history, as the model was trained: the reference that the others are compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.registry import method
from hasten.streaming.method import LayerView, StreamingMethod
from hasten.streaming.selection import Selection

__all__ = ["FullHistory"]


@method("full-history", kind="streaming", paper="-")
@dataclass(frozen=True, kw_only=True)
class FullHistory(StreamingMethod):
    """Every head attends to every frame so far; memory and work grow with the length."""

    def score(self, view: LayerView, queries: Tensor) -> Tensor:
        B, _, _, H, _ = queries.shape
        return torch.zeros(B, 1, H, len(view.cache), device=queries.device)

    def select(self, view: LayerView, queries: Tensor, keys: Tensor) -> Selection | None:
        return None
