"""Forwards that somebody compiled in one graph, into which what stands between their blocks does not go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hasten.errors import ConfigError

__all__ = ["one_graph_error"]

_PACKAGE = str(Path(__file__).parents[1])


def one_graph_error(module: Any, error: Exception) -> ConfigError | None:
    """What a compiler's error in a module's forward means, if code of hasten is what it could not compile."""
    if not type(error).__module__.startswith("torch._dynamo"):
        return None
    if not any(frame.filename.startswith(_PACKAGE) for frame in getattr(error, "real_stack", None) or ()):
        return None
    kind = type(module).__name__
    return ConfigError(
        f"the forward of this {kind} was compiled in one graph (fullgraph=True), and what a cache puts between its "
        "blocks does not go into it; put the plain forward back (del transformer.forward) and compile the transformer "
        "itself, transformer.compile(fullgraph=True), or use site='output'"
    )
