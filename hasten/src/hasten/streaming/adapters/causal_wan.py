"""Causal Wan models of the Self-Forcing kind, from the user's own checkout.

Such a model (`CausalWanModel` of Self-Forcing, LongLive, Causal Forcing, ...) has `blocks`, each with a `self_attn`
whose `forward` writes the current chunk into its key-value cache and then calls a function `attention(q, k, v)` of its
module on `q` `[B, q * L, H, D]` and on `k`, `v` `[B, (F + q) * L, H, D]`, the current chunk last. That one call is led
through the stream: the instance gets a `forward` whose global name `attention` means ours. Neither the class nor the
module changes. The cache stays the model's own; a chunk's history is read where it is stored and not copied.

Keys are rotated by absolute frame numbers. A rolling cache holds the first `sink_size` frames and the last ones, from
which the numbers follow. Layout and names: Self-Forcing, arXiv:2506.08009, `wan/modules/causal_model.py`.

Shape legend: `B` batch, `q` frames of the current chunk, `F` frames of history, `L` tokens of a frame, `H` heads, `D`
width of a head.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hasten.errors import AdapterError, AlreadyAcceleratedError
from hasten.streaming.adapters.handle import StreamingRun
from hasten.streaming.attention import Backend
from hasten.streaming.method import StreamingMethod
from hasten.streaming.policy import KVStream
from hasten.streaming.rotation import undo_rotation

__all__ = ["attach_causal_wan", "wan_unrotate"]

ARGUMENTS = ("grid_sizes", "kv_cache", "current_start")


def wan_unrotate(freqs: Tensor, keys: Tensor, frames: Tensor) -> Tensor:
    """Undo Wan's rotation along time; float32.

    Args:
        freqs: complex rotations of each position, `[positions, D / 2]`; the first `D/2 - 2 (D/2 // 3)` are of time.
        keys: `[B, H, F, L, D]`, neighbouring channels being the two parts of a complex number.
        frames: absolute numbers `[F]`.
    """
    half = keys.shape[-1] // 2
    time = half - 2 * (half // 3)
    return undo_rotation(keys, freqs.to(keys.device)[frames, :time].to(torch.complex64))


class _LayerHost:
    """Stands in for one layer's `forward` and for the call of attention in it."""

    def __init__(self, module: nn.Module, stream: KVStream, layer: int) -> None:
        self.module, self._stream, self._layer = module, stream, layer
        own = module.forward
        if not isinstance(own, types.MethodType) or "attention" not in own.__func__.__globals__:
            raise AdapterError(
                f"{type(module).__name__}.forward calls no function named attention, so there is no call to replace; "
                "expected a causal Wan model of the Self-Forcing kind"
            )
        function = own.__func__
        self._signature = inspect.signature(own)
        missing = [name for name in ARGUMENTS if name not in self._signature.parameters]
        if missing:
            raise AdapterError(
                f"{type(module).__name__}.forward has no argument {missing[0]!r}; expected those of Self-Forcing: "
                f"{', '.join(ARGUMENTS)}"
            )
        self._attention: Callable[..., Tensor] = function.__globals__["attention"]
        self._forward = types.FunctionType(
            function.__code__,
            {**function.__globals__, "attention": self.attention},
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        self._forward.__kwdefaults__ = function.__kwdefaults__
        self._arguments: dict[str, Any] = {}
        self._start: int | None = None
        self._cache: int | None = None  # where the cache that was looked at lies

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, with our attention."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        self._arguments = bound.arguments
        try:
            return self._forward(self.module, *args, **kwargs)
        finally:
            self._arguments = {}  # or the model's cache would outlive the video

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Instead of the model's: the last tokens of `k` and `v` are the current chunk, the others its history."""
        if self._arguments["kv_cache"] is None or args or kwargs:
            return self._attention(q, k, v, *args, **kwargs)
        L = int(self._arguments["grid_sizes"][0][1:].prod())
        if q.shape[1] % L or k.shape[1] % L:
            raise AdapterError(f"expected whole frames of {L} tokens, got {q.shape[1]} queries on {k.shape[1]} keys")
        # Under autocast projections are of another dtype than the cache.
        queries, keys, values = (t.to(k.dtype).unflatten(1, (-1, L)) for t in (q, k, v))
        history = keys.shape[1] - queries.shape[1]
        self._look(keys[:, :history], values[:, :history], int(self._arguments["current_start"]) // L)
        out = self._stream.attend(self._layer, queries, keys[:, history:], values[:, history:])
        return out.flatten(1, 2)

    def _look(self, keys: Tensor, values: Tensor, start: int) -> None:
        """Begin a chunk when the chunk's first frame, the history's length, or the cache is another than before."""
        held, policy = keys.shape[1], self._stream[self._layer]
        kept = self._arguments["kv_cache"]
        cache = kept["k"].data_ptr() if isinstance(kept, dict) and isinstance(kept.get("k"), Tensor) else id(kept)
        if start == self._start and held == len(policy.cache) and cache == self._cache:
            return
        if self._start is None or start < self._start or not held:
            policy.reset()
        self._start, self._cache = start, cache
        if held:
            sink = min(int(getattr(self.module, "sink_size", 0)), held) if held < start else held
            frames = [*range(sink), *range(start - (held - sink), start)]
            policy.look_at(keys, values, frames)


def attach_causal_wan(model: Any, method: StreamingMethod, *, backend: Backend = "grouped") -> StreamingRun:
    """Lead the self-attention of a causal Wan model through a stream.

    Methods choose from what the model's own cache holds (all, or its rolling window); eviction is the model's.
    Call `run.stream.reset()` after the cache was computed again in mid-video (a switch of prompts).

    Args:
        model: with `blocks`, each with a `self_attn`; of the user's own checkout of Self-Forcing or its kin.
        method: what to attend to.
        backend: how attention is computed.

    Raises:
        AdapterError: if the model is of another kind.
        AlreadyAcceleratedError: if it is attached already.
    """
    layers: list[Any] = [getattr(block, "self_attn", None) for block in getattr(model, "blocks", ())]
    if not layers or any(layer is None for layer in layers) or not hasattr(model, "freqs"):
        raise AdapterError(
            f"{type(model).__name__} has no freqs, or no blocks with a self_attn; expected a causal Wan model of the "
            "Self-Forcing kind (the generator's .model, not its wrapper)"
        )
    if any("forward" in vars(layer) for layer in layers):
        raise AlreadyAcceleratedError(
            f"this {type(model).__name__} has its attention replaced already; remove that first"
        )
    facts = {"model": type(model).__name__, "layers": len(layers)}

    def unrotate(keys: Tensor, frames: Tensor) -> Tensor:
        return wan_unrotate(model.freqs, keys, frames)

    stream = KVStream(method, len(layers), backend=backend, unrotate=unrotate, facts=facts)
    hosts = [_LayerHost(layer, stream, i) for i, layer in enumerate(layers)]
    for layer, host in zip(layers, hosts, strict=True):
        layer.forward = host.forward

    def undo() -> None:
        for layer in layers:
            del layer.forward

    return StreamingRun(model, stream, undo)
