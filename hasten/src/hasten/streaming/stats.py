"""What attention through a stream cost, beside what the whole history would have."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["StreamStats"]


@dataclass
class StreamStats:
    """What was done, and what full attention to the whole history would have taken; sums over forwards and layers.

    Attributes:
        forwards: of a layer.
        pairs, full_pairs: of a query and a key that were compared, over batch and heads.
        kv_bytes, full_kv_bytes: of keys and values read.
        select_seconds: spent on scores and choices.
        pack_seconds: spent on copying the chosen frames together.
        attention_seconds: spent on attention, without the former two.
        cache_bytes: held now.
        packed_bytes: held now in copies of chosen frames.
        frames: held now, in the layer that holds most.
    """

    forwards: int = 0
    pairs: int = 0
    full_pairs: int = 0
    kv_bytes: int = 0
    full_kv_bytes: int = 0
    select_seconds: float = 0.0
    pack_seconds: float = 0.0
    attention_seconds: float = 0.0
    cache_bytes: int = 0
    packed_bytes: int = 0
    frames: int = 0

    def __add__(self, other: StreamStats) -> StreamStats:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return StreamStats(**sums | {"frames": max(self.frames, other.frames)})

    @property
    def work_ratio(self) -> float:
        """How many times less attention work than with the whole history (1 while nothing ran)."""
        return self.full_pairs / self.pairs if self.pairs else 1.0

    @property
    def overhead(self) -> float:
        """Time for choosing as a share of the time for attention (0 while nothing ran)."""
        busy = self.attention_seconds + self.pack_seconds
        return self.select_seconds / busy if busy else 0.0
