"""Which adapter a model of streaming video has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hasten.errors import AdapterError
from hasten.streaming.adapters.anyflow import attach_anyflow
from hasten.streaming.adapters.causal_wan import attach_causal_wan
from hasten.streaming.adapters.handle import StreamingRun
from hasten.streaming.attention import Backend
from hasten.streaming.method import StreamingMethod

__all__ = ["adapter_of", "attach_stream"]

Attach = Callable[..., StreamingRun]


def adapter_of(model: Any, method: StreamingMethod) -> Attach:
    """What leads a model through a stream.

    Raises:
        AdapterError: if there is no adapter for it.
    """
    if type(model).__name__ == "AnyFlowFARTransformer3DModel":
        return attach_anyflow
    blocks = list(getattr(model, "blocks", ()))
    if blocks and hasattr(model, "freqs") and all(hasattr(block, "self_attn") for block in blocks):
        return attach_causal_wan
    raise AdapterError(
        f"{type(method).__name__} chooses the history of a streaming model, which {type(model).__name__} is not known "
        "to be: there are adapters for AnyFlowFARPipeline and for causal Wan models of the Self-Forcing kind; in a "
        "loop of your own call hasten.KVStream"
    )


def attach_stream(model: Any, method: StreamingMethod, *, backend: Backend = "grouped") -> StreamingRun:
    """Lead the self-attention of a causal video model through a stream, by the adapter that fits it.

    Args:
        model: the transformer.
        method: what to attend to.
        backend: how attention is computed.

    Raises:
        AdapterError: if there is no adapter for it.
        AlreadyAcceleratedError: if it is attached already.
    """
    return adapter_of(model, method)(model, method, backend=backend)
