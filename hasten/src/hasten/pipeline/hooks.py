"""Standing around the calls of a module and the step of a scheduler, on these instances only, and going away again.

A module's call runs `Module._call_impl`, which runs the forward. Hooks of this file stand around `_call_impl`, in the
instance's own dictionary. So they are outside of everything that others put on the forward (diffusers' hook registry,
offloading, patched forwards), whether before or after, and nobody who strips or restores a forward touches them.
"""

from __future__ import annotations

import copy
import functools
import threading
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import nn

from hasten.errors import AlreadyAcceleratedError, ConfigError, HastenWarning
from hasten.pipeline.bypass import Watch, copy_error
from hasten.pipeline.caller import Caller
from hasten.pipeline.compiled import one_graph_error
from hasten.pipeline.instead import active

__all__ = [
    "Forward",
    "Hook",
    "Remove",
    "adopt_wrapper",
    "attach",
    "compiled_call",
    "hooks_on",
    "pass_name",
    "refuse_accelerated",
    "still",
    "wrap_step",
]

Forward = Callable[..., Any]
Remove = Callable[[], None]

_KEY = "_hasten"
GRADIENTS = (
    "an accelerated transformer was called with gradients enabled: forecasts have none, so it is computed in full; "
    "call it under torch.no_grad() to be faster, or .remove() the acceleration to train"
)


class Hook(ABC):
    """Stands around the calls of a module, or of several.

    Attributes:
        kind: what it does, as text for messages; a module has one hook of a kind.
        level: a hook of a higher level stands outside of one of a lower level, whichever came first.
        handle: what `accelerate` returned for it, once it has.
    """

    kind: ClassVar[str]
    level: ClassVar[int] = 0
    handle: Any = None
    _told = False  # of gradients

    @abstractmethod
    def call(self, module: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call.

        Args:
            module: whose call it is.
            forward: runs what is inside of this hook, in the end the module's own call.
            args, kwargs: of the call.
        """

    def tell_of_gradients(self, module: Any) -> None:
        """Say once that a call with gradients enabled is the module's own; the innermost hook alone says so."""
        if not self._told and active(hooks_on(module)[0]) is self:
            self._told = True
            warnings.warn(GRADIENTS, HastenWarning, stacklevel=3)

    def end_run(self) -> None:  # noqa: B027
        """A pipeline says that its call, on this thread, is about to end."""


# Proxies stand in a module's tree during a call, which no other thread may see. A lock outlives the hooks: who waits
# for it while they are replaced must not run beside a call of the new ones.
_LOCKS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def _lock_of(module: nn.Module) -> Any:
    return _LOCKS.setdefault(module, threading.RLock())


class _HookedCalls:
    """The hooks on one module, and what stands in the module's dictionary for them."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._inner = module.__dict__.get("_call_impl")  # somebody else's, if any
        self._names = threading.local()
        self.lock = _lock_of(module)
        self.compiled: Forward | None = module.__dict__.pop("_compiled_call_impl", None)
        self._wrapper: Any = None  # of `torch.compile(module)`, and what it called before
        self._wrapped_forward: Forward | None = None
        self._thread: int | None = None  # that is within a call
        self._watch = Watch(module, lambda: self.within)
        self.hooks: tuple[Hook, ...] = ()  # innermost first
        call = torch.compiler.disable(self._call)

        def call_impl(*args: Any, **kwargs: Any) -> Any:
            return call(*args, **kwargs)  # one frame down, or `compile()` would unwrap and trace what is disabled

        self._ours: dict[str, Any] = {_KEY: self, "_call_impl": call_impl, "compile": self._compile}
        # `nn.DataParallel` copies modules so, for each call; the copies would all run the original.
        self._ours["_replicate_for_data_parallel"] = self._replicate
        self._ours["__getstate__"] = self._replicate  # of a shallow copy, too
        # Pipelines call it at their end where a denoiser has it, which UNets do not.
        self._ours["_reset_stateful_cache"] = self._reset_stateful_cache
        for name, method in (("cache_context", self._cache_context), ("enable_cache", self._enable_cache)):
            if hasattr(type(module), name):
                self._ours[name] = method
        self._before = {name: module.__dict__[name] for name in self._ours if name in module.__dict__}
        module.__dict__.update(self._ours)

    @property
    def module(self) -> Any:
        return self._module()

    @property
    def within(self) -> bool:
        """Whether this thread is within a call."""
        return self._thread == threading.get_ident()

    @property
    def name(self) -> str | None:
        """The pass that the pipeline says this thread is in."""
        names = getattr(self._names, "stack", None)
        return names[-1] if names else None

    @property
    def own_call(self) -> Forward:
        """What the module's call runs inside of the hooks."""
        return self._inner or MethodType(type(self.module)._call_impl, self.module)

    def adopt(self, wrapper: Any) -> None:
        """Let `torch.compile(module)` call the hooks uncompiled, and keep for them what it would have compiled."""
        if wrapper is self._wrapper:
            return
        self._release_wrapper()
        self.compiled = wrapper.dynamo_ctx(self.own_call)
        self._wrapper, self._wrapped_forward = wrapper, wrapper.forward
        wrapper.forward = torch.compiler.disable(self.module.__call__)

    def _release_wrapper(self) -> None:
        if self._wrapper is not None:
            self._wrapper.forward, self.compiled = self._wrapped_forward, None
            self._wrapper = self._wrapped_forward = None

    def _compile(self, *args: Any, **kwargs: Any) -> None:
        """As the module's own, but inside of the hooks: they decide what runs, and only what runs is compiled."""
        self.compiled = torch.compile(self.own_call, *args, **kwargs)

    def leave(self) -> None:
        """Take away what stands in the module's dictionary, as far as nobody put something else there."""
        module = self.module
        if module is None:
            return
        self._watch.remove()
        for name, ours in self._ours.items():
            if module.__dict__.get(name) is ours:
                del module.__dict__[name]
                if name in self._before:
                    module.__dict__[name] = self._before[name]
        self._release_wrapper()
        if self.compiled is not None:
            module._compiled_call_impl = self.compiled

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        module, forward = self.module, self.own_call
        with self.lock:
            hooks = self.hooks  # as they are now: one may have gone while this thread waited
            now = module.__dict__.get(_KEY, self)
            if now is not self:  # all of them went, and others came
                return now._call(*args, **kwargs)
            if self.within:
                raise ConfigError(
                    f"this accelerated {type(module).__name__} was called within its own forward, by a hook on one of "
                    "its parts or by one of its parts, which a cache cannot tell from the forward; call it between "
                    "steps (callback_on_step_end=...), or hasten.remove(...) first"
                )
            for hook in hooks[:-1]:
                forward = functools.partial(_through, hook, module, forward)
            self._thread = threading.get_ident()
            try:
                return active(hooks[-1]).call(module, forward, args, kwargs) if hooks else forward(*args, **kwargs)
            except Exception as error:
                clear = one_graph_error(module, error)
                if clear is not None:
                    raise clear from error
                raise
            finally:
                self._thread = None

    @contextmanager
    def _cache_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        """As diffusers', and remembers the name for this thread alone."""
        stack = self._names.__dict__.setdefault("stack", [])
        stack.append(name)
        try:
            with self._original("cache_context")(name, **kwargs):
                yield
        finally:
            stack.pop()

    def _enable_cache(self, *_: Any, **__: Any) -> None:
        kinds = " and ".join(hook.kind for hook in self.hooks)
        raise AlreadyAcceleratedError(
            f"hasten ({kinds}) is at work on this {type(self.module).__name__}, and two caches would each forecast "
            "from the other's forecasts; call hasten.remove(...) on the pipeline or transformer first"
        )

    def _reset_stateful_cache(self, *args: Any, **kwargs: Any) -> None:
        with self.lock:  # or a hook is taken away by another thread meanwhile
            for hook in self.hooks:
                active(hook).end_run()
        if hasattr(type(self.module), "_reset_stateful_cache"):
            self._original("_reset_stateful_cache")(*args, **kwargs)

    def _replicate(self) -> Any:
        raise copy_error(self.module)

    def _original(self, name: str) -> Any:
        return self._before.get(name) or functools.partial(getattr(type(self.module), name), self.module)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise copy_error(self.module)


def _through(hook: Hook, module: Any, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    return active(hook).call(module, forward, args, kwargs)


def attach(module: nn.Module, hook: Hook) -> Remove:
    """Put a hook around the calls of a module.

    Returns:
        what takes it away, once; what others put on the module meanwhile stays.

    Raises:
        AlreadyAcceleratedError: if the module has a hook of this kind.
    """
    calls: _HookedCalls = module.__dict__.get(_KEY) or _HookedCalls(module)
    if any(other.kind == hook.kind for other in calls.hooks):
        raise AlreadyAcceleratedError(
            f"this {type(module).__name__} is accelerated already ({hook.kind}); call .remove() on the handle that "
            "accelerate() returned, or hasten.remove(...), or give accelerate(..., replace=True)"
        )
    calls.hooks = tuple(sorted((*calls.hooks, hook), key=lambda other: other.level))

    def remove() -> None:
        if hook in calls.hooks:
            calls.hooks = tuple(other for other in calls.hooks if other is not hook)
            if not calls.hooks:
                calls.leave()

    return remove


def hooks_on(module: Any) -> tuple[Hook, ...]:
    """The hooks on a module, innermost first."""
    calls = getattr(module, "__dict__", {}).get(_KEY)
    return () if calls is None else calls.hooks


def refuse_accelerated(modules: Iterable[Any]) -> None:
    """Raise an AlreadyAcceleratedError if something of hasten is at work on one of these modules."""
    for module in modules:
        if hooks_on(module):
            kinds = " and ".join(hook.kind for hook in hooks_on(module))
            raise AlreadyAcceleratedError(
                f"this {type(module).__name__} is accelerated ({kinds}), and what is learned of it has to come from "
                "plain runs; call .remove() on the handle that accelerate() returned, or hasten.remove(...) first"
            )


@contextmanager
def still(modules: Iterable[Any]) -> Iterator[None]:
    """Within it no other thread is inside of these modules' hooks, during which proxies may stand in their trees.

    Raises:
        ConfigError: on a thread that is within a call of one of them.
    """
    with ExitStack() as stack:
        for module in sorted(modules, key=id):  # in one order everywhere, or threads would wait for each other
            stack.enter_context(_lock_of(module))
            calls = module.__dict__.get(_KEY)
            if calls is not None and calls.within:
                raise ConfigError(
                    f"this {type(module).__name__} is within a forward, in which its acceleration cannot be changed; "
                    "accelerate, remove and enter using between calls or steps (callback_on_step_end=...)"
                )
        yield


def pass_name(module: Any) -> str | None:
    """What the pipeline calls the forward under way on this thread (`cache_context`), if it calls it anything."""
    calls = module.__dict__.get(_KEY)
    return None if calls is None else calls.name


def compiled_call(module: Any) -> Forward | None:
    """What runs a module compiled as a whole, hooks left out; None for a module that is not."""
    calls = module.__dict__.get(_KEY)
    return getattr(module, "_compiled_call_impl", None) if calls is None else calls.compiled


def adopt_wrapper(module: nn.Module, wrapper: nn.Module) -> None:
    """Stand inside of `wrapper`, the result of `torch.compile(module)`, as long as there are hooks on the module."""
    module.__dict__[_KEY].adopt(wrapper)


class _WrappedStep:
    """What stands for `scheduler.step` on one instance; a copy of the scheduler takes its own steps."""

    def __init__(self, scheduler: Any, advance: Callable[..., Any]) -> None:
        self._scheduler, self._advance = scheduler, advance
        self.own, self.before = scheduler.step, scheduler.__dict__.get("step")
        functools.update_wrapper(self, self.own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        other = getattr(Caller().pipe, "scheduler", None)
        if other not in (None, self._scheduler) and vars(other).get("step") is self:  # a shallow copy of it
            return (self.before or functools.partial(type(other).step, other))(*args, **kwargs)
        return self._advance(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._scheduler))
        if copied is None:  # the step alone is copied
            return self
        return MethodType(type(copied).step, copied) if self.before is None else copy.deepcopy(self.before, memo)


def wrap_step(scheduler: Any, advance: Callable[..., Any]) -> tuple[Callable[..., Any], Remove]:
    """Let `advance` be called for `scheduler.step`; the signature stays, since pipelines look at it.

    Returns:
        the scheduler's own step, and what takes the wrapper away.
    """
    step = scheduler.step = _WrappedStep(scheduler, advance)

    def remove() -> None:
        if scheduler.__dict__.get("step") is not step:
            return  # somebody wrapped it after us; `advance` has to pass calls on
        if step.before is None:
            del scheduler.step
        else:
            scheduler.step = step.before

    return step.own, remove
