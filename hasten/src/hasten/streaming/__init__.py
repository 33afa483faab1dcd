"""Less history in streaming video: each frame and head attends to the past that it needs.

    stream = KVStream(FocusedForcing(budget=6), layers=30)
    out = stream[layer].attend(queries, keys, values)   # in the attention of a layer, at every denoising step
    stream[layer].append(keys, values)                  # when a chunk is clean

Tensors are `[batch, frames, tokens of a frame, heads, width of a head]`.
"""

from hasten.streaming.attention import BACKENDS
from hasten.streaming.budgets import HeadBudgets
from hasten.streaming.cache import FrameCache
from hasten.streaming.method import StreamingMethod
from hasten.streaming.methods import (
    DummyForcing,
    FocusedForcing,
    ForcingKV,
    FullHistory,
    SlidingWindow,
    TopKAttention,
)
from hasten.streaming.policy import KVPolicy, KVStream
from hasten.streaming.selection import HeadGroup, Selection
from hasten.streaming.stats import StreamStats

__all__ = [
    "BACKENDS",
    "DummyForcing",
    "FocusedForcing",
    "ForcingKV",
    "FrameCache",
    "FullHistory",
    "HeadBudgets",
    "HeadGroup",
    "KVPolicy",
    "KVStream",
    "Selection",
    "SlidingWindow",
    "StreamStats",
    "StreamingMethod",
    "TopKAttention",
]
