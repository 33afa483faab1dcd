"""`AnyFlowFARTransformer3DModel` of diffusers: FAR's causal Wan 2.1 with AnyFlow's two timesteps.

The pipeline keeps two caches for each layer, of keys before rotation: recent chunks in full (`full_cache`) and older
ones in coarser patches (`compressed_cache`). Frames are chosen from the former; compressed frames, of a quarter of the
tokens or fewer, are always attended to. When a chunk is done the pipeline encodes both caches again, so a chunk's
history is rotated and scored again when the next one begins. Training and encoding run as they are.

The stock processor pads queries and keys to a multiple of 128 and, when it reads the cache, masks nothing, so every
query also attends to zero keys with zero values. That is part of what the model computes, so they are kept.

Needs diffusers 0.42 or newer. Source: `diffusers/models/transformers/transformer_anyflow_far.py`.

Shape legend: `B` batch, `q` frames of the current chunk, `L` tokens of a full frame, `H` heads, `D` width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hasten.errors import AdapterError, AlreadyAcceleratedError
from hasten.streaming.adapters.handle import StreamingRun
from hasten.streaming.attention import Backend
from hasten.streaming.method import StreamingMethod
from hasten.streaming.policy import KVStream

__all__ = ["attach_anyflow"]

PADDED_TO = 128


class _FrameSize:
    """Tokens of a full and of a compressed frame, read off the model's input at each forward."""

    full = 0
    compressed = 0

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        height, width = latents.shape[-2:]
        self.full, self.compressed = (
            (height // patch[1]) * (width // patch[2])
            for patch in (model.config.patch_size, model.config.compressed_patch_size)
        )


class StreamingProcessor:
    """An attention processor for one layer; chooses where it reads the cache and leaves the rest to the stock one."""

    def __init__(self, stock: Any, stream: KVStream, layer: int, size: _FrameSize) -> None:
        self._stock, self._stream, self._layer, self._size = stock, stream, layer, size
        self._seen = False  # whether the policy has seen the cache as it is now

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Any = None,
        rotary_emb: dict[str, Tensor] | None = None,
        kv_cache: dict[str, Tensor] | None = None,
        kv_cache_flag: dict[str, Any] | None = None,
    ) -> Tensor:
        reads = kv_cache is not None and kv_cache_flag is not None and not kv_cache_flag["is_cache_step"]
        if not reads or rotary_emb is None:
            self._seen = False
            return self._stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, kv_cache, kv_cache_flag
            )
        assert kv_cache is not None
        assert kv_cache_flag is not None
        kept = kv_cache["full_cache"].dtype  # under autocast projections are of another
        queries, keys, values = (self._heads(attn, hidden_states, name).to(kept) for name in ("q", "k", "v"))
        far, near = (int(kv_cache_flag[f"num_cached_{kind}_tokens"]) for kind in ("compressed", "full"))
        rows = rotary_emb["key"]
        self._look(kv_cache["full_cache"][..., :near, :], far, rows[:, :, far : far + near])
        extra = self._always_seen(kv_cache["compressed_cache"][..., :far, :], rows[:, :, :far], queries.shape[2])
        out = self._stream.attend(
            self._layer,
            self._frames(_rotated(queries, rotary_emb["query"])),
            self._frames(_rotated(keys, rows[:, :, far + near :])),
            self._frames(values),
            extra=extra,
        )
        mixed = out.flatten(3, 4).flatten(1, 2).to(hidden_states.dtype)
        return attn.to_out[1](attn.to_out[0](mixed))

    @staticmethod
    def _heads(attn: Any, hidden_states: Tensor, name: str) -> Tensor:
        """Queries, keys or values `[B, H, q * L, D]` before rotation."""
        projected = getattr(attn, f"to_{name}")(hidden_states)
        norm = getattr(attn, f"norm_{name}", None)
        if norm is not None:
            projected = norm(projected).to(hidden_states.dtype)
        return projected.unflatten(2, (attn.heads, -1)).transpose(1, 2)

    def _frames(self, tokens: Tensor) -> Tensor:
        """`[B, H, F * L, D]` to `[B, F, L, H, D]`."""
        return tokens.transpose(1, 2).unflatten(1, (-1, self._size.full))

    def _look(self, cache: Tensor, far: int, rows: Tensor) -> None:
        """Begin a chunk: rotate the full frames `[2, B, H, F * L, D]` and give them to the policy."""
        policy = self._stream[self._layer]
        if not cache.shape[3]:
            policy.reset()
            return
        held = cache.shape[3] // self._size.full
        if self._seen and len(policy.cache) == held:
            return
        older = far // self._size.compressed if far else 0
        plain, values = self._frames(cache[0]), self._frames(cache[1])
        policy.look_at(self._frames(_rotated(cache[0], rows)), values, range(older, older + held), plain)
        self._seen = True

    def _always_seen(self, cache: Tensor, rows: Tensor, queries: int) -> tuple[Tensor, Tensor] | None:
        """Compressed frames `[2, B, H, T, D]`, rotated, and the zeros that the stock processor pads with."""
        padding = -queries % PADDED_TO
        if not cache.shape[3] and not padding:
            return None
        parts = (_rotated(cache[0], rows) if cache.shape[3] else cache[0], cache[1])
        keys, values = (nn.functional.pad(part, (0, 0, 0, padding)).transpose(1, 2) for part in parts)
        return keys, values


def _rotated(tokens: Tensor, rows: Tensor) -> Tensor:
    from diffusers.models.transformers.transformer_anyflow_far import apply_rotary_emb

    return apply_rotary_emb(tokens, rows)


def attach_anyflow(target: Any, method: StreamingMethod, *, backend: Backend = "grouped") -> StreamingRun:
    """Lead the self-attention of an AnyFlow-FAR model through a stream.

    Args:
        target: an `AnyFlowFARPipeline` or its transformer. It must keep a cache (`use_kv_cache=True`, the default).
        method: what to attend to. Eviction is the pipeline's own.
        backend: how attention is computed.

    Raises:
        AdapterError: if the model is of another class.
        AlreadyAcceleratedError: if it is attached already.
    """
    model = getattr(target, "transformer", target)
    if type(model).__name__ != "AnyFlowFARTransformer3DModel":
        raise AdapterError(f"expected an AnyFlowFARPipeline or its transformer, got {type(target).__name__}")
    if any(isinstance(block.attn1.processor, StreamingProcessor) for block in model.blocks):
        raise AlreadyAcceleratedError("this transformer has a stream already; call remove() on its run first")
    config = model.config
    facts: Mapping[str, object] = {
        "model": type(model).__name__,
        "layers": config.num_layers,
        "heads": config.num_attention_heads,
        "chunk": max(config.chunk_partition),
    }
    stream = KVStream(method, config.num_layers, backend=backend, rotated=True, facts=facts)
    stock = [block.attn1.processor for block in model.blocks]
    size = _FrameSize()
    hook = model.register_forward_pre_hook(size, with_kwargs=True)
    for layer, block in enumerate(model.blocks):
        block.attn1.set_processor(StreamingProcessor(stock[layer], stream, layer, size))

    def undo() -> None:
        hook.remove()
        for block, processor in zip(model.blocks, stock, strict=True):
            block.attn1.set_processor(processor)

    return StreamingRun(model, stream, undo)
