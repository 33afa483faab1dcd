"""What a causal video model remembers, and what each forward attends to.

A `StreamingMethod` holds parameters and decides; a `KVPolicy` applies it to one layer: `append` a finished chunk,
`score` and `select` frames, `evict`, `attend`, and `stats`. A `KVStream` holds the policies of all layers of a rollout.

    stream = KVStream(FocusedForcing(budget=6), layers=30)
    for chunk in range(chunks):
        for step in range(steps):
            ...  # in layer i: out = stream[i].attend(queries, keys, values)
        ...      # in layer i, with the clean chunk: stream[i].append(keys, values)

Guidance with two passes needs two streams, because each pass has keys of its own.

Shape legend: `B` batch, `q` frames of the current chunk, `F` frames held, `L` tokens of a frame, `H` heads, `D` width
of a head, `Q` query frames that choose for themselves (`q` or 1).
"""

from __future__ import annotations

import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor

from hasten.errors import ConfigError, unknown
from hasten.parameters import Declared, Range
from hasten.streaming.attention import (
    BACKENDS,
    Backend,
    Current,
    PackedGroup,
    StreamStats,
    attend,
    attention_pairs,
    kv_bytes,
    pack,
)
from hasten.streaming.cache import FrameCache, Unrotate, check_frames
from hasten.streaming.selection import Selection

__all__ = ["KVPolicy", "KVStream", "LayerView", "RefreshedMethod", "StreamingMethod"]


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
        """The views of all layers, if they stand at this chunk and hold the same frames; else this one alone.

        A model that gives each layer its history just before that layer's turn has no other layer ready.
        """
        views = [view for view in (there() for there in self.peers) if view is not None]
        ready = all(view.chunk == self.chunk and view.cache.same_frames(self.cache) for view in views)
        return views if views and ready else [self]

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


class KVPolicy:
    """One layer's memory under a method.

    Args:
        method: decides.
        layer, layers: the number of this layer, and how many there are.
        backend: how attention is computed: `"grouped"`, `"masked"`, `"flex"` or `"varlen"`.
        rotated: whether keys carry a rotary embedding along time.
        unrotate: undoes it, see `hasten.streaming.cache`.
        shared: notes that all layers of a rollout share.

    Attributes:
        cache: the frames held.
        view: what the method may use.
        timed: wait for a GPU before reading the clock; set it to False for full speed and meaningless times.

    Raises:
        UnknownNameError: for another back-end.
    """

    def __init__(
        self,
        method: StreamingMethod,
        layer: int = 0,
        layers: int = 1,
        *,
        backend: Backend = "grouped",
        rotated: bool = False,
        unrotate: Unrotate | None = None,
        shared: dict[str, Any] | None = None,
    ) -> None:
        if backend not in BACKENDS:
            raise unknown("attention back-end", backend, BACKENDS)
        self.method, self.backend = method, backend
        self.timed = True
        self.cache = FrameCache(rotated=rotated, unrotate=unrotate)
        self.view = LayerView(layer, layers, self.cache, shared={} if shared is None else shared)
        self._sums = StreamStats()
        self._forget_choice()

    def _forget_choice(self) -> None:
        self._chosen: Selection | None = None
        self._packed: list[PackedGroup] | None = None
        self._fresh = False

    def reset(self) -> None:
        """Begin a new rollout: forget all frames and notes. Statistics stay."""
        self.cache.clear()
        self.view.restart()
        self._forget_choice()

    def append(self, keys: Tensor, values: Tensor, plain_keys: Tensor | None = None) -> None:
        """Remember the clean frames of a finished chunk, `[B, F, L, H, D]`, and evict what the method gives up.

        `plain_keys` are the keys without rotary embedding, for methods that compare frames by them. Gradients flow
        through the history; outside training run under `torch.no_grad()`.
        """
        self._forget_choice()
        self.cache.append(keys, values, plain_keys)
        self._next_chunk()
        self.evict(self.method.retained(self.view))

    def look_at(self, keys: Tensor, values: Tensor, frames: Sequence[int], plain_keys: Tensor | None = None) -> None:
        """Begin a chunk on a history that the model keeps itself; see `FrameCache.view`. Nothing is evicted."""
        self._forget_choice()
        self.cache.view(keys, values, frames, plain_keys)
        self._next_chunk()

    def _next_chunk(self) -> None:
        self.view.chunk += 1
        self.view.step = 0
        self.view.memo.clear()

    def evict(self, keep: Sequence[int]) -> None:
        """Free all frames but those at these positions, 0 being the oldest held."""
        if len(keep) < len(self.cache):
            self._forget_choice()
            self.view.memo.clear()
        self.cache.keep(keep)

    def score(self, queries: Tensor) -> Tensor:
        """What each frame held is worth to the queries `[B, q, L, H, D]`: `[B, Q, H, F]` float32."""
        self._check_history()
        return self.method.score(self.view, queries)

    def select(self, queries: Tensor, keys: Tensor) -> Selection | None:
        """The choice for this forward, made again only when the method's refresh rule says so.

        Args:
            queries, keys: of the current chunk `[B, q, L, H, D]`.

        Returns:
            None where the whole history is attended to.
        """
        every = self.method.refresh_every
        due = not self._fresh or (every is not None and self.view.step % every == 0)
        if due and len(self.cache):
            with torch.no_grad():
                chosen = self.method.select(self.view, queries, keys)
            if chosen is not self._chosen:
                self._packed = None
            self._chosen, self._fresh = chosen, True
        return self._chosen

    def _check_history(self) -> None:
        if not len(self.cache):
            raise ConfigError("there is no frame to score yet; append a chunk first")

    def attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        extra: tuple[Tensor, Tensor] | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attention of the current chunk to itself and to the chosen frames.

        Args:
            queries, keys, values: `[B, q, L, H, D]`, rotated if the history is.
            extra: keys and values `[B, X, H, D]` that every query attends to besides.
            scale: of the logits, `1 / sqrt(D)` by default.

        Returns:
            `[B, q, L, H, D]`.

        Raises:
            ConfigError: for shapes or dtypes that do not fit the history.
        """
        held = self.cache.keys.permute(0, 2, 3, 1, 4) if len(self.cache) else keys
        for name, tensor in (("queries", queries), ("keys", keys), ("values", values)):
            check_frames(name, tensor, held)
        if extra is not None:
            _check_extra(extra, held)
        current = Current(queries, keys, values, extra)
        started = self._now(queries)
        chosen = self.select(queries, keys)
        selected = self._now(queries)
        if self.backend == "grouped" and chosen is not None and not chosen.everything and self._packed is None:
            self._packed = pack(self.cache, chosen, current.visible)
        packed = self._now(queries)
        out = attend(self.backend, current, self.cache, chosen, self._packed, scale)
        self._count(current, chosen, (started, selected, packed, self._now(queries)))
        self.view.step += 1
        return out

    def _now(self, tensor: Tensor) -> float:
        if self.timed and tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)  # or the times would be those of launching the kernels
        return time.perf_counter()

    def _count(self, current: Current, chosen: Selection | None, times: tuple[float, float, float, float]) -> None:
        held, past = len(self.cache), self.cache.whole
        self._sums += StreamStats(
            forwards=1,
            pairs=attention_pairs(chosen, current, held),
            full_pairs=attention_pairs(None, current, past),
            kv_bytes=kv_bytes(chosen, current, held),
            full_kv_bytes=kv_bytes(None, current, past),
            select_seconds=times[1] - times[0],
            pack_seconds=times[2] - times[1],
            attention_seconds=times[3] - times[2],
        )

    def stats(self) -> StreamStats:
        """Sums so far and what is held now."""
        packed = sum(g.keys.nbytes + g.values.nbytes for g in self._packed or [])
        held = StreamStats(cache_bytes=self.cache.nbytes, packed_bytes=packed, frames=len(self.cache))
        return self._sums + held


def _check_extra(extra: tuple[Tensor, Tensor], held: Tensor) -> None:
    """Refuse keys and values that are not `[B, X, H, D]` of the same batch, heads, width and dtype as `held`."""
    B, _, _, H, D = held.shape
    for tensor in extra:
        X = tensor.shape[1] if tensor.ndim == 4 else 0
        if tensor.shape != (B, X, H, D) or tensor.shape != extra[0].shape or tensor.dtype != held.dtype:
            raise ConfigError(
                f"expected extra keys and values of one shape [{B}, X, {H}, {D}] in {held.dtype}, got "
                f"{[list(t.shape) for t in extra]} in {tensor.dtype}"
            )


class KVStream:
    """The memory of one rollout: a `KVPolicy` for each layer.

    Args:
        method: decides.
        layers: of the model.
        backend, rotated, unrotate: as for `KVPolicy`.
        facts: what is known of the model, by which budgets that were made for another one are refused.

    Attributes:
        gates: None, or `[layers, H]` by which the model multiplies each head's output, to measure importance.
    """

    def __init__(
        self,
        method: StreamingMethod,
        layers: int,
        *,
        backend: Backend = "grouped",
        rotated: bool = False,
        unrotate: Unrotate | None = None,
        facts: Mapping[str, object] | None = None,
    ) -> None:
        if layers < 1:
            raise ConfigError(f"expected at least one layer, got {layers}")
        method.check_model(layers, facts or {})
        self.method = method
        self.gates: Tensor | None = None
        shared: dict[str, Any] = {}
        self._policies = [
            KVPolicy(method, i, layers, backend=backend, rotated=rotated, unrotate=unrotate, shared=shared)
            for i in range(layers)
        ]
        views = [policy.view for policy in self._policies]
        for view in views:
            view.peers = [weakref.ref(other) for other in views]

    def __len__(self) -> int:
        return len(self._policies)

    def __getitem__(self, layer: int) -> KVPolicy:
        return self._policies[layer]

    def attend(
        self,
        layer: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        extra: tuple[Tensor, Tensor] | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """`KVPolicy.attend` of one layer, times its heads' gates if there are any."""
        out = self[layer].attend(queries, keys, values, extra=extra, scale=scale)
        return out if self.gates is None else out * self.gates[layer, :, None].to(out)

    def reset(self) -> None:
        """Begin a new rollout in all layers. Statistics stay."""
        for policy in self._policies:
            policy.reset()

    def stats(self) -> StreamStats:
        """Sums over all layers."""
        return sum((policy.stats() for policy in self._policies), StreamStats())
