"""What a method of streaming is: it holds parameters and decides, from what it may know of a layer.

Shape legend: `B` batch, `q` frames of the current chunk, `F` frames held, `L` tokens of a frame, `H` heads, `D` width
of a head, `Q` query frames that choose for themselves (`q` or 1).
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from torch import Tensor

from hasten.parameters import Declared, Range
from hasten.streaming.cache import FrameCache
from hasten.streaming.selection import Selection

__all__ = ["LayerView", "RefreshedMethod", "StreamingMethod"]


@dataclass(eq=False)
class LayerView:
    """What a method may use when it decides for one layer.

    Attributes:
        layer: its number.
        layers: how many there are.
        cache: the frames held.
        chunk: chunks finished so far.
        step: forwards of the current chunk so far, this one not counted.
        memo: the method's own notes on this layer; emptied when a chunk is appended.
        notes: the method's own notes on this layer for the whole rollout.
        shared: the method's own notes that all layers share for the whole rollout.
        peers: the views of all layers of the stream, this one among them; none for a layer on its own.
    """

    layer: int
    layers: int
    cache: FrameCache
    chunk: int = 0
    step: int = 0
    memo: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    peers: Sequence[weakref.ref[LayerView]] = ()  # weak: what a dropped stream holds is freed at once

    def together(self) -> list[LayerView]:
        """This view, and those of all other layers that stand at the same chunk with frames of the same kind.

        A model that gives each layer its history just before that layer's turn has no other layer ready.
        """
        views = [view for view in (there() for there in self.peers) if view is not None and view is not self]
        return [self, *(view for view in views if view.chunk == self.chunk and view.cache.alike(self.cache))]

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files; a stream tells the layers of the copy of each other."""
        return {**self.__dict__, "peers": ()}

    def restart(self) -> None:
        """Begin a new rollout."""
        self.chunk = self.step = 0
        for notes in (self.memo, self.notes, self.shared):
            notes.clear()


@dataclass(frozen=True, kw_only=True)
class StreamingMethod(Declared, ABC):
    """Base of the methods: which frames to keep and which to attend to."""

    @property
    def refresh_every(self) -> int | None:
        """Forwards after which a chunk's choice is made again; None keeps that of its first forward."""
        return None

    @abstractmethod
    def score(self, view: LayerView, queries: Tensor) -> Tensor:
        """What each frame of the history is worth, `[B, Q, H, F]` float32; the higher, the sooner it is chosen."""

    @abstractmethod
    def select(self, view: LayerView, queries: Tensor, keys: Tensor) -> Selection | None:
        """The choice for queries and keys `[B, q, L, H, D]` of the current chunk; None for the whole history."""

    def retained(self, view: LayerView) -> Sequence[int]:
        """Places in the cache that are kept when a chunk has been appended; the others are evicted."""
        return range(len(view.cache))

    def check_model(self, layers: int, facts: Mapping[str, object]) -> None:
        """Refuse a model that the method was not made for."""


@dataclass(frozen=True, kw_only=True)
class RefreshedMethod(StreamingMethod):
    """Base of the methods whose choice depends on the queries, and may be made again within a chunk."""

    refresh_every: Annotated[
        int | None,
        Range(1),
        "forwards after which a chunk's choice is made again; None keeps that of its first forward",
    ] = None
