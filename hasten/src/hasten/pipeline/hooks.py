"""Standing around a transformer's forward and a scheduler's step, on these instances only, and going away again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook

__all__ = ["hook_forward", "wrap_step"]

Remove = Callable[[], None]


def hook_forward(module: Any, hook: ModelHook, name: str) -> Remove:
    """Put a hook around the forward, outside of all that are there.

    The hook should use `pre_forward` and `post_forward`: a `new_forward` is lost when a hook inside is removed first.

    Returns:
        what takes it away; the module is then as it was found.
    """
    # A registry that other hooks made is empty, and ours to delete, when they went before us.
    made = not hasattr(module, "_diffusers_hook") or bool(module._diffusers_hook.hooks)
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(hook, name)
    registry.invalidate_child_registries_cache()
    ours = module.forward

    def remove() -> None:
        outer, inner = module.forward, hook.fn_ref.forward
        registry.remove_hook(name, recurse=False)
        if outer is not ours and module.__dict__.get("_old_forward") is ours:
            # accelerate (offloading) wrapped the forward after us and keeps what it wrapped in `_old_forward`.
            module._old_forward, module.forward = inner, outer
        elif not registry.hooks and getattr(inner, "__func__", None) is type(module).forward:
            del module.forward  # the class's own forward shows again
        if made and not registry.hooks:
            del module._diffusers_hook
        else:
            registry.invalidate_child_registries_cache()

    return remove


def wrap_step(scheduler: Any, advance: Callable[..., Any]) -> tuple[Callable[..., Any], Remove]:
    """Let `advance` be called for `scheduler.step`; the signature stays, since pipelines look at it.

    Returns:
        the scheduler's own step, and what takes the wrapper away.
    """
    own, before = scheduler.step, scheduler.__dict__.get("step")

    @functools.wraps(own)
    def step(*args: Any, **kwargs: Any) -> Any:
        return advance(*args, **kwargs)

    scheduler.step = step

    def remove() -> None:
        if scheduler.__dict__.get("step") is not step:
            return  # somebody wrapped it after us; `advance` has to pass calls on
        if before is None:
            del scheduler.step
        else:
            scheduler.step = before

    return own, remove
