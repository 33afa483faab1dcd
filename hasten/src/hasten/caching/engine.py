"""The hook that makes a transformer skip: it labels each forward, asks the gate, and lets the site run or forecast."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hasten import models
from hasten.caching.arguments import Arguments
from hasten.caching.components import Components, FeatureKey
from hasten.caching.deep import DeepSite
from hasten.caching.gates import relative_change
from hasten.caching.memory import Listener, PassMemory
from hasten.caching.method import CachingMethod
from hasten.caching.run import CachingRun
from hasten.caching.schedule import Decision, Part, told_steps
from hasten.caching.sites import HiddenSite, OutputSite, Site
from hasten.caching.span import SpanSite
from hasten.caching.submodules import ModuleSite
from hasten.calibration import RunFacts
from hasten.errors import AdapterError, AlreadyAcceleratedError, HastenWarning
from hasten.models.forms import tensors_in
from hasten.pipeline import context_parallel
from hasten.pipeline.hooks import Forward, Hook, Remove, adopt_wrapper, attach, compiled_call, pass_name
from hasten.pipeline.numbers import FiniteCheck
from hasten.pipeline.others import other_cache
from hasten.pipeline.records import Entry, Records, StepRecord, started, stopped
from hasten.pipeline.runs import Run, Runs, StepInfo, signature
from hasten.pipeline.view import PipelineView

__all__ = ["CachingEngine"]

WHOLE = (
    "the transformer is compiled as a whole, but {method} works inside of it at site '{site}', so that it runs "
    "uncompiled; compile its blocks instead, transformer.compile_repeated_blocks(), or use a method with a schedule at "
    "site 'hidden' or 'output'"
)
MOST_KEYS = 4096  # feature keys whose components are kept
LARGE = 256 * 2**20  # bytes that are worth a word before they are kept
FEWER = "Use a shorter warmup, a longer interval, fewer computed_steps, or explicit steps=..."


def _tensor(result: Any) -> Tensor:
    """The prediction in a transformer's result; of a list of images the first."""
    return tensors_in(result)[0]


def _mean(model: nn.Module, mean: Tensor) -> Tensor:
    """Means over each device's tokens as means over all of them; context parallelism shares tokens evenly."""
    members = context_parallel.group(model)
    return mean if members is None else context_parallel.sum_over(model, mean) / members.size()


class CachingEngine(Hook):
    """Accelerates one transformer with one caching method.

    Args:
        model: the transformer.
        method: what to do.
        home: the pipeline that it is accelerated in; None for a bare transformer.
        check: called with each run before its first forward; raises what the call is to end with.

    Raises:
        AdapterError: if the transformer's layout is unknown and cannot be probed.
        AlreadyAcceleratedError: if another cache is at work on it already.
    """

    kind = "caching"

    def __init__(
        self,
        model: nn.Module,
        method: CachingMethod,
        home: PipelineView | None = None,
        check: Callable[[Run], None] | None = None,
    ) -> None:
        method.check_model(model)
        self.model, self.method, self._home, self._check = model, method, home, check
        self._adapter = models.find(model)
        self._arguments = Arguments(model, self._adapter)
        self.site = self._make_site()
        self.runs = Runs(model, home)
        self._records = Records()
        self.listener: Listener | None = None
        self.facts = RunFacts()
        self._state: CachingRun | None = None  # of the forward under way
        self._memory: PassMemory | None = None
        self._said: set[str] = set()
        self._numbers = FiniteCheck(type(method).__name__)
        self._components: dict[tuple[int, FeatureKey], tuple[CachingMethod, Components]] = {}
        self._remove: Remove | None = None
        self._refuse_other_cache()

    def beside(self, method: CachingMethod, check: Callable[[Run], None] | None = None) -> CachingEngine:
        """Another engine on the transformer, for single calls: it counts runs and keeps records together with this one.

        Raises:
            AdapterError, CalibrationError: if the method does not fit the transformer.
        """
        other = CachingEngine(self.model, method, self._home, check)
        other.runs, other._records = self.runs, self._records
        return other

    # --- attaching and detaching

    def attach(self, wrapper: nn.Module | None = None) -> None:
        """Stand around the transformer's calls.

        Args:
            wrapper: what `torch.compile(model)` returned, if that was given in the transformer's place.

        Raises:
            AlreadyAcceleratedError: if hasten does already.
        """
        self._remove = attach(self.model, self)
        if wrapper is None and self._home is not None:
            wrapper = self._home.wrapper_of(self.model)
        self._go_inside(wrapper)

    def _go_inside(self, wrapper: nn.Module | None) -> None:
        """Let a compiler of the whole transformer compile what runs inside of the hook, where the site can."""
        if wrapper is not None:
            adopt_wrapper(self.model, wrapper)
        compiled = compiled_call(self.model)
        self.site.compiled = compiled if self.site.compilable else None
        if compiled is not None and not self.site.compilable:
            self._warn("compiled", WHOLE.format(method=type(self.method).__name__, site=self.method.site))

    def detach(self) -> None:
        """Go away, and let go of the transformer; records stay readable."""
        if self._remove is not None:
            self._remove()
            self._numbers.settle()
            self.runs.end()
            self._remove = self._state = self._memory = self.listener = self._check = None
            del self.model, self.site, self.runs

    @property
    def attached(self) -> bool:
        """Whether it is at work."""
        return self._remove is not None

    @property
    def records(self) -> list[StepRecord]:
        """One record per forward, run by run; of the latest runs."""
        return self._records.all

    def forget(self) -> None:
        """Drop features, runs and records: the next forward starts a new run."""
        if self.attached:
            self.runs.end()
        self._records.clear()

    # --- around the transformer

    def call(self, module: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The transformer's result, computed or forecast."""
        if torch.is_grad_enabled():
            self.tell_of_gradients(module)
            return (self.site.compiled or forward)(*args, **kwargs)
        hidden = self._arguments.latents(args, kwargs)
        labelled = self.runs.label(self._arguments.timestep(args, kwargs), hidden, pass_name(module))
        if labelled is None:
            return (self.site.compiled or forward)(*args, **kwargs)
        run, info = labelled
        serving: CachingEngine = run.hook or self  # `using` may end or begin within a run
        run.hook = serving
        return serving._serve(run, info, hidden, forward, args, kwargs)

    def _serve(self, run: Run, info: StepInfo, hidden: Any, forward: Forward, args: Any, kwargs: Any) -> Any:
        device = _device(hidden)
        start = started(device)
        try:
            result, decision = self._forward(run, info, hidden, device, forward, args, kwargs)
        except BaseException:
            self.runs.end(run)
            raise
        finally:
            self._state = self._memory = None
        state: CachingRun = run.state
        held = state.held
        self._numbers.forward(info, decision.computed, hidden, result)
        if info.last:
            state.free()
        decided = decision.computed, decision.reason, stopped(start), held, decision.indicator
        self._records.add(Entry(info.run, info.step, info.pass_name, info.timestep, *decided))
        return result

    def _forward(
        self, run: Run, info: StepInfo, hidden: Any, device: torch.device, forward: Forward, args: Any, kwargs: Any
    ) -> tuple[Any, Decision]:
        if run.state is None:
            run.state = self._begin(run)
        elif info.step == 1 and info.first_pass:
            self.method.check_passes(list(run.state.memories))
        state: CachingRun = run.state
        self._state = state
        mixed = _mixed_precision(device.type)
        memory = state.memory(info, (signature(hidden), mixed))
        if memory is None:
            memory = state.add_memory(info, self._new_memory(state.method, info, args, kwargs), hidden)
        self._share(state)
        memory.mixed = mixed is not None
        self._memory = memory
        decision: Decision | None = None

        def decide(observed: Tensor | None) -> bool:
            nonlocal decision
            with memory.exact(device):
                decision = state.decide(info, memory, observed)
            return decision.computed

        result, computed = self.site.run(forward, args, kwargs, memory, decide)
        assert decision is not None
        if computed:
            memory.settle()
            if not decision.computed:
                decision = Decision(True, "the forward has no place for a forecast")
            if info.first_pass and state.gate is not None:
                with memory.exact(device):
                    state.gate.computed(info.step, _tensor(result))
        if self.listener is not None:
            self.listener(info.pass_name, info.step, "output", _tensor(result))
        return result, decision

    def end_run(self) -> None:
        """The pipeline's call is about to end: free the features, and say so if nothing was skipped."""
        run = self.runs.current
        if run is None:
            self._numbers.settle()
            return
        self.runs.end(run)  # whatever is said: warnings may be errors
        serving: CachingEngine = run.hook or self
        serving._numbers.settle()
        serving._warn_if_idle(run)

    # --- a run begins

    def _begin(self, run: Run) -> CachingRun:
        self._numbers.settle()  # of a run before that no pipeline ended
        self._refuse_other_cache()
        if self._check is not None:
            self._check(run)
        self._go_inside(None if run.view is None else run.view.wrapper_of(self.model))
        self.facts = RunFacts(run.total, run.timesteps, run.guidance)
        self.method.check_run(self.facts)
        method = self.method.for_run(self.facts)
        gate = method.gate()
        gate.reduce = partial(context_parallel.sum_over, self.model)
        gate.part = None if run.part is None else Part(*run.part)
        gate.begin(run.total)
        if run.total is not None and self.method.saves and gate.skips_nothing(run.total):
            told = f"{type(self.method).__name__} skips nothing in a run of {told_steps(run.total)}: all are computed"
            self._warn("idle", f"{told}. {FEWER}")
        return CachingRun(method, gate, self.facts)

    def _refuse_other_cache(self) -> None:
        other = other_cache(self.model)
        if other is not None:
            raise AlreadyAcceleratedError(
                f"{other} is at work on this {type(self.model).__name__}, and two caches would each forecast from the "
                "other's forecasts; switch one of them off first (transformer.disable_cache(), "
                "cache_dit.disable_cache(pipe), or hasten.remove(pipe))"
            )

    def _new_memory(self, method: CachingMethod, info: StepInfo, args: Any, kwargs: Any) -> PassMemory:
        layout = self._find_layout(args, kwargs) if method.needs_layout else None
        if method.site == "module":
            self._state_cost(args, kwargs)
        mean = partial(_mean, self.model)
        memory = PassMemory(partial(self._components_of, method), info.pass_name, layout, mean, self.listener)
        memory.method = method
        return memory

    def _share(self, state: CachingRun) -> None:
        """Where a step has several passes, as far as is known yet, forecast as the method does then."""
        if not state.method.follows_guidance:
            return
        method = state.method_now()
        for memory in state.memories.values():  # each: a pass may have come, or begun anew, since the last change
            if memory.method is not method:
                memory.method = method
                memory.predict_by(partial(self._components_of, method))

    def _components_of(self, method: CachingMethod, key: FeatureKey) -> Components:
        """The method's components of a feature key, made once, since they keep tables on the device."""
        owner, components = self._components.get((id(method), key), (None, None))
        if components is None or owner is not method:  # an identity may be given again
            if len(self._components) >= MOST_KEYS:  # images of ever other sizes
                self._components.clear()
            components = method.components(key)
            self._components[id(method), key] = method, components
        return components

    def _find_layout(self, args: Any, kwargs: Any) -> models.TokenLayout:
        arguments = self._arguments.named(args, kwargs)
        layout = models.layout_of(self.model, self._adapter, arguments)
        streams = self._adapter.used(self.model)[-1].streams if self._adapter is not None else ()
        if streams and self.method.needs_layout:
            raise AdapterError(
                f"{type(self.method).__name__} splits features by the place of their tokens in the image, and "
                f"{type(self.model).__name__} has a stream of its own without such places ({', '.join(streams)}); use "
                "a method that does not, such as foca"
            )
        return layout

    def _verified(self, checked: Tensor, draft: Tensor) -> None:
        state = self._state
        assert state is not None
        assert state.gate is not None
        assert self._memory is not None
        with self._memory.exact(draft.device):
            state.gate.verified(state.step, relative_change(draft, checked, state.gate.reduce))

    def _make_site(self) -> Site:
        feature, plain, norm = self.method.feature(), type(self.method.feature())(), self.method.norm_of(self.model)
        unet = self._adapter is None and models.is_unet(self.model)
        if unet and self.method.site == "hidden" and feature != plain:
            raise AdapterError(
                f"{type(self.method).__name__} stands between the blocks of a transformer, and "
                f"{type(self.model).__name__} is a UNet, whose levels hand nothing on; use easycache, or a method "
                "with a schedule at site='output' or site='deep'"
            )
        if self.method.site == "deep":
            return DeepSite(self.model)
        if self.method.site == "output" or (unet and self.method.site == "hidden"):
            return OutputSite(self.model, feature.change, self._arguments.latents)
        if self.method.site == "module":
            return ModuleSite(self.model, self._adapter)
        if feature != plain:
            return SpanSite(self.model, self._adapter, feature, self._verified)
        return HiddenSite(self.model, self._adapter, norm)

    # --- what is said

    def _state_cost(self, args: Any, kwargs: Any) -> None:
        """Say what the module site is going to keep, before it is kept."""
        if self._adapter is None or self._adapter.layout is None:
            return
        hidden = self._arguments.latents(args, kwargs)
        dtype = tensors_in(hidden)[0].dtype
        encoder = self._arguments.named(args, kwargs).get("encoder_hidden_states")
        try:
            image_tokens = math.prod(self._find_layout(args, kwargs).grid)
        except AdapterError:  # tokens of several sizes; the site itself does not mind
            return
        text_tokens = encoder.shape[1] if isinstance(encoder, Tensor) else 0
        cost = self.estimate_bytes(image_tokens, text_tokens, len(hidden), 1, dtype)
        if cost >= LARGE:
            self._warn(
                "cost",
                f"site 'module' will keep {cost / 2**30:.1f} GiB of features for each forward within a step "
                f"({type(self.method).__name__}, {image_tokens} image tokens); site='hidden' keeps one tensor instead",
            )

    def _warn_if_idle(self, run: Run) -> None:
        """For a bare transformer, whose number of steps is known only in the end, and for gates."""
        records = self._records.of(run.number)
        if run.late or not records or not self.method.saves or not all(record.computed for record in records):
            return
        name, steps = type(self.method).__name__, records[-1].step + 1
        values = [record.indicator for record in records if record.indicator is not None]
        if values:
            self._warn(
                "idle",
                f"the gate of {name} let no step of {steps} be skipped: the smallest value that it measured was "
                f"{min(values):.3g}. Use a larger threshold than that",
            )
        else:
            self._warn("idle", f"{name} skipped nothing in a run of {told_steps(steps)}. {FEWER}")

    def _warn(self, subject: str, message: str) -> None:
        """Once per subject."""
        if subject not in self._said:
            self._said.add(subject)
            warnings.warn(message, HastenWarning, stacklevel=3)

    def estimate_bytes(self, image_tokens: int, text_tokens: int, batch: int, passes: int, dtype: torch.dtype) -> int:
        """Bytes of features that a run will hold at most."""
        components = self.method.components(FeatureKey())
        stored = max(predictor.memory for predictor in components.predictors.values())
        return passes * stored * dtype.itemsize * self.site.estimate(image_tokens, text_tokens, batch)


def _mixed_precision(device_type: str) -> torch.dtype | None:
    """The dtype of the autocast under way on a kind of device, if any; some kinds have none."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _device(hidden: Any) -> torch.device:
    return hidden.device if isinstance(hidden, Tensor) else _device(hidden[0])
