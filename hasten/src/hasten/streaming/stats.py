"""What a stream did and what it holds: work and bytes are counted, times are taken only when asked for."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

__all__ = ["Ledger", "Stopwatch", "StreamStats"]

PENDING = 4096  # pairs of events that are kept before the device is waited for


@dataclass
class StreamStats:
    """What was done, and what full attention to the whole history would have taken; sums over forwards and layers.

    Attributes:
        forwards: of a layer.
        pairs, full_pairs: of a query and a key that were compared, over batch and heads.
        kv_bytes, full_kv_bytes: of keys and values read.
        select_seconds: spent on scores and choices; times are 0 where the stream does not take any.
        pack_seconds: spent on bringing the chosen frames together.
        attention_seconds: spent on attention, without the former two.
        cache_bytes: held now.
        packed_bytes: held now in copies of chosen frames.
        full_cache_bytes: that keys and values of the whole history would take now.
        peak_bytes: most that was held at once, copies of chosen frames and buffers being moved included.
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
    full_cache_bytes: int = 0
    peak_bytes: int = 0
    frames: int = 0

    def __add__(self, other: StreamStats) -> StreamStats:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return StreamStats(**sums | {"frames": max(self.frames, other.frames)})

    @property
    def work_ratio(self) -> float:
        """How many times less attention work than with the whole history (1 while nothing ran)."""
        return self.full_pairs / self.pairs if self.pairs else 1.0

    @property
    def seconds(self) -> float:
        """For attention, choosing and bringing together."""
        return self.attention_seconds + self.pack_seconds + self.select_seconds

    @property
    def overhead(self) -> float:
        """Time for choosing as a share of the time for attention (0 where no times were taken)."""
        busy = self.attention_seconds + self.pack_seconds
        return self.select_seconds / busy if busy else 0.0


class Ledger:
    """Bytes that the layers of a stream hold together, and the most that they held at once."""

    def __init__(self) -> None:
        self.total = self.peak = 0

    def change(self, before: int, after: int, moment: int = 0) -> None:
        """A layer holds `after` bytes in place of `before`, and for a moment held `moment`."""
        self.peak = max(self.peak, self.total - before + max(after, moment))
        self.total += after - before


class Stopwatch:
    """Times of a layer's forwards in parts: read off a clock on a CPU, off events that nobody waits for on a GPU.

    Args:
        on: whether any are taken.
    """

    def __init__(self, on: bool) -> None:
        self.on = on
        self._sums = [0.0, 0.0, 0.0]
        self._pending: list[list[torch.cuda.Event]] = []

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files, which events cannot go into."""
        self._read()
        return dict(self.__dict__)

    def mark(self, tensor: Tensor) -> float | torch.cuda.Event | None:
        """A point in time on the tensor's device."""
        if not self.on:
            return None
        if not tensor.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(tensor.device))
        return event

    def add(self, marks: list[float | torch.cuda.Event | None]) -> None:
        """The times between four points: choosing, bringing together, attention."""
        events = [mark for mark in marks if isinstance(mark, torch.cuda.Event)]
        if events:
            self._pending.append(events)
            if len(self._pending) > PENDING:
                self._read()
            return
        clock = [mark for mark in marks if isinstance(mark, float)]
        for i, (start, end) in enumerate(pairwise(clock)):
            self._sums[i] += end - start

    def _read(self) -> None:
        for events in self._pending:
            events[-1].synchronize()
            for i, (start, end) in enumerate(pairwise(events)):
                self._sums[i] += start.elapsed_time(end) / 1000
        self._pending.clear()

    def seconds(self) -> tuple[float, float, float]:
        """Sums so far; waits for the device."""
        self._read()
        choosing, packing, attending = self._sums
        return choosing, packing, attending
