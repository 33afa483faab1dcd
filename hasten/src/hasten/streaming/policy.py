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

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
from torch import Tensor

from hasten.errors import ConfigError, unknown
from hasten.parameters import Range, accepted
from hasten.streaming.attention import (
    BACKENDS,
    Backend,
    Prepared,
    attend,
    count,
    prepare,
)
from hasten.streaming.cache import FrameCache
from hasten.streaming.current import Current
from hasten.streaming.method import LayerView, StreamingMethod
from hasten.streaming.modes import in_full_precision, of_our_own
from hasten.streaming.rotation import Unrotate
from hasten.streaming.rows import check_chunk, check_extra, check_frames, rising
from hasten.streaming.selection import Selection
from hasten.streaming.stats import Ledger, Stopwatch, StreamStats

__all__ = ["KVPolicy", "KVStream"]


class KVPolicy:
    """One layer's memory under a method.

    Args:
        method: decides.
        layer, layers: the number of this layer, and how many there are.
        backend: how attention is computed: `"grouped"`, `"masked"`, `"flex"` or `"varlen"`.
        rotated: whether keys carry a rotary embedding along time.
        unrotate: undoes it, see `hasten.streaming.rotation`.
        timed: whether times are taken, between events on a GPU; nothing waits for them.
        shared: notes that all layers of a rollout share.
        ledger: of all layers of a rollout.

    Attributes:
        cache: the frames held.
        view: what the method may use.

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
        timed: bool = False,
        shared: dict[str, Any] | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        accepted("KVPolicy", "method", StreamingMethod, method)
        layers = accepted("KVPolicy", "layers", Annotated[int, Range(1)], layers)
        layer = accepted("KVPolicy", "layer", Annotated[int, Range(0, layers - 1)], layer)
        accepted("KVPolicy", "timed", bool, timed)
        if not isinstance(backend, str) or backend not in BACKENDS:
            raise unknown("attention back-end", backend, BACKENDS)
        self.method, self.backend = method, backend
        self.cache = FrameCache(rotated=rotated, unrotate=unrotate)
        self.view = LayerView(layer, layers, self.cache, shared={} if shared is None else shared)
        self._sums, self._clock = StreamStats(), Stopwatch(timed)
        self._ledger, self._held = ledger or Ledger(), 0
        self._attended = False  # since the latest chunk was appended; True before the first forward, too
        self._begun = False
        self._prepared: Prepared | None = None
        self._room: tuple[int, int] | None = None  # frames of the last forward, and keys besides
        self._forget_choice()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files: without what is made again in the next forward."""
        return {**self.__dict__, "_prepared": None}

    def _forget_choice(self) -> None:
        self._chosen: Selection | None = None
        self._prepared = None
        self._fresh = False

    def _book(self, moment: int = 0) -> None:
        """Tell the ledger what is held now, and what was for a moment."""
        held = self.cache.nbytes + (0 if self._prepared is None else self._prepared.nbytes)
        self._ledger.change(self._held, held, moment)
        self._held = held

    def reset(self) -> None:
        """Begin a new rollout: forget all frames and notes. Statistics stay."""
        self.cache.clear()
        self.view.restart()
        self._forget_choice()
        self._begun = False
        self._book()

    def append(
        self, keys: Tensor, values: Tensor, plain_keys: Tensor | None = None, *, first: int | None = None
    ) -> None:
        """Remember the clean frames of a finished chunk, and evict what the method gives up.

        Gradients flow through the history; outside training run under `torch.no_grad()`.

        Args:
            keys, values: `[B, F, L, H, D]`.
            plain_keys: the keys without rotary embedding, for methods that compare frames by them.
            first: number of the first of these frames in the video, to be checked.

        Raises:
            ConfigError: for tensors that do not fit the history, a second append in a step, or frames that are not the
                next ones.
        """
        self._check_next(first)
        if self._begun and not self._attended:
            raise ConfigError(
                f"layer {self.view.layer} was given a chunk twice without a forward in between; append once per chunk, "
                "in its last forward, and call reset() before frames of another video"
            )
        self._forget_choice()
        self.cache.append(keys, values, plain_keys)
        self._book(self.cache.moment)
        self._next_chunk()
        self.evict(self.method.retained(self.view))
        self.cache.reserve()
        self._book(self.cache.moment)

    def _check_next(self, first: int | None) -> None:
        """Refuse frames that are not the next ones of the video."""
        due = self.cache.next_frame
        if first is None or (type(first) is int and first == due) or accepted("streaming", "first", int, first) == due:
            return
        if first == 0:
            raise ConfigError(f"frame 0 comes after {due} frames: call reset() before another video begins")
        if first < due:
            raise ConfigError(
                f"frame {first} comes again, after {due} frames: append each chunk once, in its last forward; guidance "
                "with two passes needs two streams"
            )
        raise ConfigError(f"frame {first} comes after {due} frames: append the chunks before it first")

    def look_at(self, keys: Tensor, values: Tensor, frames: Sequence[int], plain_keys: Tensor | None = None) -> None:
        """Begin a chunk on a history that the model keeps itself; see `FrameCache.view`. Nothing is evicted."""
        self._forget_choice()
        self.cache.view(keys, values, frames, plain_keys)
        self._book()
        self._next_chunk()

    def _next_chunk(self) -> None:
        self.view.chunk += 1
        self.view.step = 0
        self._attended = False
        self.view.memo.clear()

    def evict(self, keep: Sequence[int]) -> None:
        """Free all frames but those at these positions, 0 being the oldest held."""
        keep = rising(f"positions from 0 to {len(self.cache) - 1}", keep)
        if len(keep) < len(self.cache):
            self._forget_choice()
            self.view.memo.clear()
        self.cache.keep(keep)
        self._book(self.cache.moment)

    def score(self, queries: Tensor) -> Tensor:
        """What each frame held is worth to the queries `[B, q, L, H, D]`: `[B, Q, H, F]` float32."""
        if not len(self.cache):
            raise ConfigError("there is no frame to score yet; append a chunk first")
        check_frames("queries", queries, self.cache.like)
        with in_full_precision(queries.device):
            return of_our_own(self.method.score)(self.view, queries)

    def select(self, queries: Tensor, keys: Tensor) -> Selection | None:
        """The choice for this forward, made again only when the method's refresh rule says so.

        Args:
            queries, keys: of the current chunk `[B, q, L, H, D]`.

        Returns:
            None where the whole history is attended to.

        Raises:
            ConfigError: for shapes or dtypes that do not fit the history.
        """
        check_chunk(queries, keys, None, self.cache.like)
        return self._choice(queries, keys)

    def _choice(self, queries: Tensor, keys: Tensor) -> Selection | None:
        every = self.method.refresh_every
        due = not self._fresh or (every is not None and self.view.step % every == 0)
        if due and len(self.cache):
            with torch.no_grad(), in_full_precision(queries.device):
                chosen = of_our_own(self.method.select)(self.view, queries, keys)
            if chosen is not self._chosen:
                self._prepared = None
            self._chosen, self._fresh = chosen, True
        return self._chosen

    def attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        extra: tuple[Tensor, Tensor] | None = None,
        scale: float | None = None,
        first: int | None = None,
    ) -> Tensor:
        """Attention of the current chunk to itself and to the chosen frames.

        Args:
            queries, keys, values: `[B, q, L, H, D]`, rotated if the history is.
            extra: keys and values `[B, X, H, D]` that every query attends to besides.
            scale: of the logits, `1 / sqrt(D)` by default.
            first: number of the chunk's first frame in the video, to be checked.

        Returns:
            `[B, q, L, H, D]`.

        Raises:
            ConfigError: for shapes or dtypes that do not fit the history, or frames that are not the next ones.
        """
        self._check_next(first)
        check_chunk(queries, keys, values, self.cache.like)
        if extra is not None:
            check_extra(extra, keys)
        if scale is not None:
            accepted("streaming", "scale", float, scale)
        current = Current(queries, keys, values, extra)
        self._fit_room(current)
        marks = [self._clock.mark(queries)]
        chosen = self._choice(queries, keys)
        marks.append(self._clock.mark(queries))
        if chosen is not None and self._prepared is None:
            self.cache.moment = 0
            self._prepared = prepare(self.backend, self.cache, chosen, current)
            self._book(self.cache.moment)
        marks.append(self._clock.mark(queries))
        out = attend(self.backend, current, self.cache, chosen, self._prepared, scale)
        marks.append(self._clock.mark(queries))
        self._clock.add(marks)
        count(self._sums, current, chosen, len(self.cache), self.cache.whole)
        self.view.step += 1
        self._attended = self._begun = True
        return out

    def _fit_room(self, current: Current) -> None:
        """Choose and pack anew where a forward brings another number of frames, or of keys besides, than the last."""
        room = current.queries.shape[1], 0 if current.extra is None else current.extra[0].shape[1]
        if room != self._room:
            self._forget_choice()
            self._room = room

    def stats(self) -> StreamStats:
        """Sums so far and what is held now; the peak is that of all layers with the same ledger."""
        choosing, packing, attending = self._clock.seconds()
        now = StreamStats(
            select_seconds=choosing,
            pack_seconds=packing,
            attention_seconds=attending,
            cache_bytes=self.cache.nbytes,
            packed_bytes=0 if self._prepared is None else self._prepared.nbytes,
            full_cache_bytes=self.cache.frame_bytes * self.cache.whole,
            peak_bytes=self._ledger.peak,
            frames=len(self.cache),
        )
        return self._sums + now


class KVStream:
    """The memory of one rollout: a `KVPolicy` for each layer.

    Args:
        method: decides.
        layers: of the model.
        backend, rotated, unrotate: as for `KVPolicy`.
        facts: what is known of the model, by which budgets that were made for another one are refused.
        timed: whether times are taken, between events on a GPU; nothing waits for them.

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
        timed: bool = False,
    ) -> None:
        accepted("KVStream", "method", StreamingMethod, method)
        layers = accepted("KVStream", "layers", Annotated[int, Range(1)], layers)
        accepted("KVStream", "facts", Mapping | None, facts)
        method.check_model(layers, facts or {})
        self.method = method
        self.gates: Tensor | None = None
        self._ledger = Ledger()
        shared: dict[str, Any] = {}
        common: dict[str, Any] = {"backend": backend, "rotated": rotated, "unrotate": unrotate, "timed": timed}
        self._policies = [
            KVPolicy(method, i, layers, **common, shared=shared, ledger=self._ledger) for i in range(layers)
        ]
        self._introduce()

    def _introduce(self) -> None:
        """Tell the layers of each other."""
        views = [policy.view for policy in self._policies]
        for view in views:
            view.peers = [weakref.ref(other) for other in views]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or what was read from a file: its layers know each other, not those of the original."""
        self.__dict__.update(state)
        self._introduce()

    def __len__(self) -> int:
        return len(self._policies)

    def __getitem__(self, layer: int) -> KVPolicy:
        """The memory of a layer.

        Raises:
            ConfigError: for a layer that the stream was not made for.
        """
        if type(layer) is not int:
            layer = accepted("KVStream", "layer", int, layer)
        if not 0 <= layer < len(self):
            raise ConfigError(
                f"expected a layer from 0 to {len(self) - 1}, got {layer}; a stream is made for all layers of the model"
            )
        return self._policies[layer]

    def __iter__(self) -> Iterator[KVPolicy]:
        return iter(self._policies)

    def attend(
        self,
        layer: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        extra: tuple[Tensor, Tensor] | None = None,
        scale: float | None = None,
        first: int | None = None,
    ) -> Tensor:
        """`KVPolicy.attend` of one layer, times its heads' gates if there are any."""
        out = self[layer].attend(queries, keys, values, extra=extra, scale=scale, first=first)
        if self.gates is None:
            return out
        gates = self.gates
        if not isinstance(gates, Tensor):
            accepted("KVStream", "gates", Tensor, gates)
        if gates.shape != (len(self), out.shape[3]):
            raise ConfigError(f"expected gates {[len(self), out.shape[3]]}, got {list(gates.shape)}")
        return out * gates[layer, :, None].to(out)

    def reset(self) -> None:
        """Begin a new rollout in all layers. Statistics stay, but for the peak."""
        for policy in self._policies:
            policy.reset()
        self._ledger.peak = self._ledger.total

    def stats(self) -> StreamStats:
        """Sums over all layers, and the most that they held at once."""
        sums = sum((policy.stats() for policy in self._policies), StreamStats())
        return replace(sums, peak_bytes=self._ledger.peak)
