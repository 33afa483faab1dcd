"""Caches of others on the same transformer: diffusers' and cache-dit's."""

from __future__ import annotations

from torch import nn

__all__ = ["other_cache"]


def other_cache(model: nn.Module) -> str | None:
    """What other cache is at work on a transformer, as text; None if there is none."""
    if getattr(model, "is_cache_enabled", False):
        return f"a diffusers cache ({type(getattr(model, '_cache_config', None)).__name__})"
    if getattr(model, "_is_cached", False):
        return "cache-dit"
    for module in model.modules():  # diffusers' caches can be put on without the transformer's knowing
        registry = module.__dict__.get("_diffusers_hook")
        for hook in () if registry is None else registry.hooks.values():
            source = type(hook).__module__
            if source.startswith("diffusers.hooks.") and ("cache" in source or "attention_broadcast" in source):
                return f"a diffusers cache ({type(hook).__name__})"
    return None
