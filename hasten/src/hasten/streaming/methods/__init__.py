"""The streaming methods, one file each."""

from hasten.streaming.methods.dummy_forcing import DummyForcing
from hasten.streaming.methods.focused_forcing import FocusedForcing
from hasten.streaming.methods.forcing_kv import ForcingKV
from hasten.streaming.methods.full import FullHistory
from hasten.streaming.methods.sliding_window import SlidingWindow
from hasten.streaming.methods.top_k import TopKAttention

__all__ = ["DummyForcing", "FocusedForcing", "ForcingKV", "FullHistory", "SlidingWindow", "TopKAttention"]
