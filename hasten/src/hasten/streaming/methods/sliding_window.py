"""A sliding window with an attention sink. Xiao et al., "Efficient Streaming Language Models with Attention Sinks",
arXiv:2309.17453, with frames for tokens: all heads attend to the first `sink` frames and the last `window` ones.

Departure: frames keep their absolute positions in the rotary embedding, as in Self-Forcing; the paper renumbers them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from hasten.parameters import Range
from hasten.registry import method
from hasten.streaming.method import LayerView, StreamingMethod
from hasten.streaming.selection import Selection, frames_at

__all__ = ["SlidingWindow", "recency", "sink_and_window"]


def sink_and_window(frames: Sequence[int], sink: int, window: int) -> list[int]:
    """Places of the frames numbered below `sink` and of the last `window` others."""
    sinks = [position for position, frame in enumerate(frames) if frame < sink]
    others = range(len(sinks), len(frames))
    return [*sinks, *others[max(len(others) - window, 0) :]]


def recency(view: LayerView, queries: Tensor, sink: int) -> Tensor:
    """`[B, 1, H, F]`: the frame's number, and infinity for the sink."""
    B, _, _, H, _ = queries.shape
    frames = torch.tensor(view.cache.frames, dtype=torch.float32, device=queries.device)
    return frames.masked_fill(frames < sink, torch.inf).expand(B, 1, H, -1)


@method("sliding-window", kind="streaming", paper="StreamingLLM, arXiv:2309.17453")
@dataclass(frozen=True, kw_only=True)
class SlidingWindow(StreamingMethod):
    """Every head attends to the first frames and the last ones; all others are evicted."""

    window: Annotated[int, Range(0), "last frames that are kept"] = 5
    sink: Annotated[int, Range(0), "first frames that are kept"] = 1

    def retained(self, view: LayerView) -> Sequence[int]:
        return sink_and_window(view.cache.frames, self.sink, self.window)

    def score(self, view: LayerView, queries: Tensor) -> Tensor:
        return recency(view, queries, self.sink)

    def select(self, view: LayerView, queries: Tensor, keys: Tensor) -> Selection | None:
        # A model that keeps the cache itself evicts nothing, so the window is cut here as well.
        B, _, _, H, _ = queries.shape
        positions = sink_and_window(view.cache.frames, self.sink, self.window)
        return Selection((frames_at(positions, range(H), B, queries.device),), len(view.cache))
