"""Models of other makers: their attention is led through a stream, on the instance, and given back again."""

from hasten.streaming.hosts.anyflow import attach_anyflow
from hasten.streaming.hosts.causal_wan import attach_causal_wan
from hasten.streaming.hosts.handle import StreamingRun

__all__ = ["StreamingRun", "attach_anyflow", "attach_causal_wan"]
