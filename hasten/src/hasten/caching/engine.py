"""The hook that makes a transformer skip: it labels each forward, asks the schedule, and lets the site run or forecast.

One hook on the transformer itself, through diffusers' `HookRegistry`, so that it lives beside offloading, layer-wise
casting and parallelism hooks and goes away without a trace.
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Hashable
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import StateManager
from torch import Tensor, nn

from hasten import hosts
from hasten.caching.memory import PassMemory
from hasten.caching.method import CachingMethod
from hasten.caching.schedule import Decision, full_steps
from hasten.caching.sites import make_site
from hasten.errors import AlreadyAcceleratedError, ConfigError, HastenWarning
from hasten.steps import StepInfo, StepRecord, StepTracker

__all__ = ["CachingEngine"]

HOOK_NAME = "hasten"


class _PassName(StateManager):
    """Receives the pipeline's cache context. diffusers looks for `StateManager`s among a hook's attributes."""

    def __init__(self) -> None:
        super().__init__(state_cls=object)
        self.current: str | None = None

    def set_context(self, context: Any) -> None:
        self.current = None if context is None else getattr(context, "name", context)


def _signature(hidden: Any) -> Hashable:
    """What has to stay the same for features to be of use; some models take a list of latents."""
    if isinstance(hidden, Tensor):
        return (hidden.shape, hidden.dtype, hidden.device)
    if isinstance(hidden, (list, tuple)):
        return tuple(map(_signature, hidden))
    return None


class CachingEngine(ModelHook):
    """Accelerates one transformer with one caching method.

    Args:
        model: the transformer.
        method: what to do.
        tracker: labels the forwards of this transformer.

    Raises:
        HostError: if the transformer's wiring is unknown and cannot be probed.
        AlreadyAcceleratedError: if hasten or another cache is at work on it already.
    """

    _is_stateful = True

    def __init__(self, model: nn.Module, method: CachingMethod, tracker: StepTracker) -> None:
        super().__init__()
        self.model, self.method, self.tracker = model, method, tracker
        host = hosts.find(model)
        self._hidden, self._timestep = (host.hidden, host.timestep) if host else hosts.root_arguments(model)
        self._parameters = list(inspect.signature(model.forward).parameters)
        self.site = make_site(method.site, model, host)
        self._schedule, self._predictors, self._projector = method.schedule(), method.predictors(), method.projector()
        if set(self._predictors) != set(self._projector.parts):
            raise ConfigError(
                f"{type(method).__name__} splits features into {sorted(self._projector.parts)} "
                f"but has predictors for {sorted(self._predictors)}; give each part one predictor"
            )
        self.pass_name = _PassName()
        self.records: list[StepRecord] = []
        self._warned = False
        self.forget()
        self._attach()

    # --- attaching and detaching

    def _attach(self) -> None:
        model: Any = self.model
        registry = getattr(model, "_diffusers_hook", None)
        if registry is not None and registry.get_hook(HOOK_NAME) is not None:
            raise AlreadyAcceleratedError(
                f"this {type(model).__name__} is accelerated already; "
                "call .remove() on the handle that accelerate() returned first"
            )
        if getattr(model, "is_cache_enabled", False):
            raise AlreadyAcceleratedError(
                f"a diffusers cache is enabled on this {type(model).__name__}; call disable_cache() on it first"
            )
        self._made_registry = registry is None
        self._instance_forward = model.__dict__.get("forward")
        registry = HookRegistry.check_if_exists_or_initialize(model)
        registry.register_hook(self, HOOK_NAME)
        registry.invalidate_child_registries_cache()
        self._our_forward = model.forward

    def detach(self) -> None:
        """Take the hook away; the module is left as it was found."""
        model: Any = self.model
        registry = getattr(model, "_diffusers_hook", None)
        if registry is None or registry.get_hook(HOOK_NAME) is not self:
            return
        outer = model.__dict__.get("forward")
        original = self.fn_ref.original_forward
        registry.remove_hook(HOOK_NAME, recurse=False)
        if outer is not self._our_forward and model.__dict__.get("_old_forward") is self._our_forward:
            # accelerate (offloading) wrapped the forward after us and keeps what it wrapped in `_old_forward`.
            model._old_forward = original
            model.forward = outer
        elif not registry.hooks and outer is self._our_forward and self._instance_forward is None:
            del model.forward  # the class's own forward shows again
        if self._made_registry and not registry.hooks:
            del model._diffusers_hook
        else:
            registry.invalidate_child_registries_cache()
        self.forget()

    # --- diffusers' hook interface

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        timestep = float(torch.as_tensor(self._argument(self._timestep, args, kwargs)).max())
        signature = _signature(self._argument(self._hidden, args, kwargs))
        info = self.tracker.begin(timestep, signature, self.pass_name.current)
        started = time.perf_counter()
        try:
            decision = self._decide(info, signature)
            memory = self._memories.setdefault(info.pass_name, PassMemory(self._predictors, self._projector))
            memory.step = info.step
            run = self.site.full if decision.full else self.site.cached
            result = run(self.fn_ref.original_forward, args, kwargs, memory)
        except BaseException:
            self.forget()
            raise
        held = sum(memory.bytes for memory in self._memories.values())
        ms = 1e3 * (time.perf_counter() - started)
        self.records.append(
            StepRecord(info.run, info.step, info.pass_name, timestep, decision.full, decision.reason, ms, held)
        )
        return result

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Called by a pipeline at the end of a run: frees the features."""
        self._warn_if_idle()
        self.forget()
        return module

    # --- decisions

    def forget(self) -> None:
        """Drop the features and the current run: the next forward starts a new one."""
        self.tracker.finish()
        self._memories: dict[str, PassMemory] = {}
        self._signature: Hashable = None
        self._last_full: int | None = None
        self._decision = Decision(True, "first step")

    def _decide(self, info: StepInfo, signature: Hashable) -> Decision:
        """The step's decision, made at its first pass; a pass without features has to run all the same."""
        if info.first_step:
            self._memories, self._last_full = {}, None
            self._check_length(info.total)
        if signature != self._signature:
            self._memories, self._signature = {}, signature
        if info.first_pass:
            self._decision = self._schedule.decide(info.step, self._last_full)
            if self._decision.full:
                self._last_full = info.step
        memory = self._memories.get(info.pass_name)
        if not self._decision.full and (memory is None or memory.empty):
            return Decision(True, "nothing to forecast from")
        return self._decision

    def _check_length(self, total: int | None) -> None:
        if total is None:
            return
        self._schedule.check(total)
        if self.method.saves and len(full_steps(self._schedule, total)) == total:
            self._warn(
                f"{type(self.method).__name__} skips nothing in a run of {total} steps: all of them are full. "
                "Use a shorter warmup, a longer interval, or explicit steps=..."
            )

    def _warn_if_idle(self) -> None:
        """For a bare transformer, whose number of steps is known only in the end."""
        run = [r for r in self.records if r.run == self.records[-1].run] if self.records else []
        if run and self.method.saves and all(r.full for r in run):
            self._warn(
                f"{type(self.method).__name__} skipped nothing in a run of {run[-1].step + 1} steps. "
                "Use a shorter warmup, a longer interval, or explicit steps=..."
            )

    def _warn(self, message: str) -> None:
        if not self._warned:
            warnings.warn(message, HastenWarning, stacklevel=2)
            self._warned = True

    def _argument(self, name: str, args: Any, kwargs: Any) -> Any:
        if name in kwargs:
            return kwargs[name]
        return args[self._parameters.index(name)]

    def estimate_bytes(self, image_tokens: int, text_tokens: int, batch: int, passes: int, dtype: torch.dtype) -> int:
        """Bytes of features that a run will hold at most."""
        anchors = max(predictor.memory for predictor in self._predictors.values())
        return passes * anchors * dtype.itemsize * self.site.estimate(image_tokens, text_tokens, batch)
