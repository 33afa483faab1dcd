"""The hook that makes a transformer skip: it labels each forward, asks the schedule, and lets the site run or forecast.

One hook on the transformer itself, through diffusers' `HookRegistry`, so that it lives beside offloading, layer-wise
casting and parallelism hooks and goes away without a trace.
"""

from __future__ import annotations

import inspect
import math
import time
import warnings
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import StateManager
from torch import Tensor, nn

from hasten import models
from hasten.caching.components import FeatureKey
from hasten.caching.gates import relative_change
from hasten.caching.memory import Listener, PassMemory
from hasten.caching.method import CachingMethod
from hasten.caching.schedule import Decision
from hasten.caching.sites import HiddenSite, ModuleSite, OutputSite, Site
from hasten.caching.span import SpanSite
from hasten.calibration import RunFacts
from hasten.errors import AlreadyAcceleratedError, CopyError, HastenWarning
from hasten.pipeline import context_parallel
from hasten.pipeline.steps import StepInfo, StepRecord, StepTracker

__all__ = ["CachingEngine"]

HOOK_NAME = "hasten"
WHOLE = (
    "the transformer is compiled as a whole, and hasten runs it uncompiled; "
    "compile its blocks instead: transformer.compile_repeated_blocks()"
)
LARGE = 256 * 2**20  # bytes that are worth a word before they are kept


class _PassName(StateManager):
    """Receives the pipeline's cache context. diffusers looks for `StateManager`s among a hook's attributes."""

    def __init__(self) -> None:
        super().__init__(state_cls=object)
        self.current: str | None = None

    def set_context(self, context: Any) -> None:
        self.current = None if context is None else getattr(context, "name", context)


def _sample(hidden: Any) -> Hashable:
    """The shape of one image's latents, whatever the batch."""
    if isinstance(hidden, (list, tuple)):
        return _sample(hidden[0]) if hidden else None
    return hidden.shape[1:] if isinstance(hidden, Tensor) else None


def _signature(hidden: Any) -> Hashable:
    """What has to stay the same for features to be of use; some models take a list of latents."""
    if isinstance(hidden, Tensor):
        return (hidden.shape, hidden.dtype, hidden.device)
    if isinstance(hidden, (list, tuple)):
        return tuple(map(_signature, hidden))
    return None


def _tensor(result: Any) -> Tensor:
    """The prediction in a transformer's result; of a list of images the first."""
    sample = result if isinstance(result, Tensor) else result[0]
    return sample[0] if isinstance(sample, list) else sample


def _mean(model: nn.Module, mean: Tensor) -> Tensor:
    """Means over each device's tokens as means over all of them; context parallelism shares tokens evenly."""
    members = context_parallel.group(model)
    return mean if members is None else context_parallel.sum_over(model, mean) / members.size()


class CachingEngine(ModelHook):
    """Accelerates one transformer with one caching method.

    Args:
        model: the transformer.
        method: what to do.
        tracker: labels the forwards of this transformer.
        guidance: the guidance scale of the run under way, as far as the pipeline tells.

    Raises:
        AdapterError: if the transformer's wiring is unknown and cannot be probed.
        AlreadyAcceleratedError: if hasten or another cache is at work on it already.
    """

    _is_stateful = True

    def __init__(
        self,
        model: nn.Module,
        method: CachingMethod,
        tracker: StepTracker,
        guidance: Callable[[], float | None] = lambda: None,
    ) -> None:
        super().__init__()
        method.check_model(model)
        self.model, self.method, self.tracker, self._guidance = model, method, tracker, guidance
        self._host = models.find(model)
        names = (self._host.hidden, self._host.timestep) if self._host else models.root_arguments(model)
        self._hidden, self._timestep = names
        self._parameters = list(inspect.signature(model.forward).parameters)
        self._gate = method.gate()
        self._gate.reduce = partial(context_parallel.sum_over, model)
        self.site = self._make_site()
        self.pass_name = _PassName()
        self.records: list[StepRecord] = []
        self.listener: Listener | None = None
        self.facts = RunFacts()
        self._warned = self._stated = False
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
        if getattr(model, "_compiled_call_impl", None) is not None:
            self._warn(WHOLE)
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

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        timestep = float(torch.as_tensor(self._argument(self._timestep, args, kwargs)).max())
        hidden = self._argument(self._hidden, args, kwargs)
        signature = _signature(hidden)
        info = self.tracker.begin(timestep, signature, self.pass_name.current, _sample(hidden))
        started = time.perf_counter()
        taken: list[Decision] = []

        def decide(seen: Tensor | None) -> bool:
            taken.append(self._decide(info, seen))
            return taken[0].computed

        try:
            self._prepare(info, signature, args, kwargs)
            memory = self._memory(info)
            result = self.site.run(self.fn_ref.original_forward, args, kwargs, memory, decide)
            decision = taken[0]
            if decision.computed and info.first_pass:
                self._gate.computed(info.step, _tensor(result))
            if self.listener is not None:
                self.listener(info.pass_name, info.step, "output", _tensor(result))
        except BaseException:
            self.forget()
            raise
        held = sum(memory.bytes for memory in self._memories.values())
        held += sum(tensor.numel() * tensor.element_size() for tensor in self._gate.held())
        ms = 1e3 * (time.perf_counter() - started)
        self.records.append(
            StepRecord(
                info.run,
                info.step,
                info.pass_name,
                timestep,
                decision.computed,
                decision.reason,
                ms,
                held,
                decision.indicator,
            )
        )
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CopyError(
            f"this {type(self.model).__name__} is accelerated, and a copy would run the original; "
            "call .remove() on the handle that accelerate() returned before you copy or pickle it"
        )

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
        self._signatures: dict[str, Hashable] = {}
        self._last_full: int | None = None
        self._layout: models.TokenLayout | None = None
        self._step = 0
        self._decision = Decision(True, "first step")

    def _prepare(self, info: StepInfo, signature: Hashable, args: Any, kwargs: Any) -> None:
        """Start a run, or start afresh where what is remembered fits the forward no more."""
        if info.first_step:
            self._memories, self._signatures, self._last_full = {}, {}, None
            self.facts = RunFacts(info.total, self.tracker.timesteps(), self._guidance())
            self.method.check_run(self.facts)
            self._gate.begin(info.total)
            if info.total is not None:
                self._check_length(info.total)
        elif info.step == 1 and info.first_pass:
            self.method.check_passes(list(self._memories))
        if signature != self._signatures.get(info.pass_name):
            self._memories.pop(info.pass_name, None)
            self._signatures[info.pass_name] = signature
            self._layout = self._find_layout(args, kwargs) if self.method.needs_layout else None
            if self.method.site == "module":
                self._state_cost(args, kwargs)

    def _memory(self, info: StepInfo) -> PassMemory:
        """What is remembered of the pass."""
        if info.pass_name not in self._memories:
            self._memories[info.pass_name] = PassMemory(
                self.method.components, info.pass_name, self._layout, partial(_mean, self.model), self.listener
            )
        memory = self._memories[info.pass_name]
        memory.step = info.step
        return memory

    def _decide(self, info: StepInfo, seen: Tensor | None) -> Decision:
        """The step's decision, made at its first pass; a pass without features has to run all the same."""
        if info.first_pass:
            self._step = info.step
            self._decision = self._gate.decide(info.step, self._last_full, seen)
            if self._decision.computed:
                self._last_full = info.step
        if not self._decision.computed and self._memories[info.pass_name].empty:
            return Decision(True, "nothing to forecast from")
        return self._decision

    def _verified(self, checked: Tensor, draft: Tensor) -> None:
        self._gate.verified(self._step, relative_change(draft, checked, self._gate.reduce))

    def _find_layout(self, args: Any, kwargs: Any) -> models.TokenLayout:
        arguments = dict(zip(self._parameters, args, strict=False)) | kwargs
        return models.layout_of(self.model, self._host, arguments)

    def _state_cost(self, args: Any, kwargs: Any) -> None:
        """Say what the module site is going to keep, before it is kept."""
        if self._host is None or self._host.layout is None:
            return
        hidden = self._argument(self._hidden, args, kwargs)
        dtype = (hidden if isinstance(hidden, Tensor) else hidden[0]).dtype
        encoder = (dict(zip(self._parameters, args, strict=False)) | kwargs).get("encoder_hidden_states")
        image_tokens = math.prod(self._find_layout(args, kwargs).grid)
        text_tokens = encoder.shape[1] if isinstance(encoder, Tensor) else 0
        cost = self.estimate_bytes(image_tokens, text_tokens, len(hidden), 1, dtype)
        if cost >= LARGE and not self._stated:
            self._stated = True
            warnings.warn(
                f"site 'module' will keep {cost / 2**30:.1f} GiB of features for each forward within a step "
                f"({type(self.method).__name__}, {image_tokens} image tokens); site='hidden' keeps one tensor instead",
                HastenWarning,
                stacklevel=2,
            )

    def _make_site(self) -> Site:
        feature = self.method.feature()
        if self.method.site == "output":
            return OutputSite(self.model, feature.change, partial(self._argument, self._hidden))
        if self.method.site == "module":
            return ModuleSite(self.model, self._host)
        if feature != type(feature)():
            return SpanSite(self.model, self._host, feature, self._verified)
        return HiddenSite(self.model, self._host)

    def _check_length(self, total: int) -> None:
        if self.method.saves and self._gate.skips_nothing(total):
            self._warn(
                f"{type(self.method).__name__} skips nothing in a run of {total} steps: all of them are computed. "
                "Use a shorter warmup, a longer interval, or explicit steps=..."
            )

    def _warn_if_idle(self) -> None:
        """For a bare transformer, whose number of steps is known only in the end, and for gates."""
        run = [r for r in self.records if r.run == self.records[-1].run] if self.records else []
        if not run or not self.method.saves or not all(r.computed for r in run):
            return
        name, steps = type(self.method).__name__, run[-1].step + 1
        seen = [r.indicator for r in run if r.indicator is not None]
        if seen:
            self._warn(
                f"the gate of {name} let no step of {steps} be skipped: the smallest value that it saw was "
                f"{min(seen):.3g}. Use a larger threshold than that"
            )
        else:
            self._warn(
                f"{name} skipped nothing in a run of {steps} steps. "
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
        components = self.method.components(FeatureKey())
        stored = max(predictor.memory for predictor in components.predictors.values())
        return passes * stored * dtype.itemsize * self.site.estimate(image_tokens, text_tokens, batch)
