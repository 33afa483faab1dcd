"""Models of other makers: their attention is led through a stream, on the instance, and given back again."""

from hasten.streaming.adapters.any import adapter_of, attach_stream
from hasten.streaming.adapters.anyflow import attach_anyflow
from hasten.streaming.adapters.causal_wan import attach_causal_wan
from hasten.streaming.adapters.handle import StreamingRun

__all__ = ["StreamingRun", "adapter_of", "attach_anyflow", "attach_causal_wan", "attach_stream"]
