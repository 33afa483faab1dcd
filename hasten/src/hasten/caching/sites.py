"""Where a feature is taken and put back: `output`, `hidden` or `module`.

A site runs the transformer's own forward. For the length of that one forward it puts proxies in the places of some
child modules, and takes them out again whatever happens; between forwards the model is exactly as the user made it.
Block code is neither copied nor hooked, so compiled blocks, LoRA layers, attention processors and offload hooks keep
working. Proxies are made once, and again when what they stand for was replaced.

Cache keys: a site names each tensor that it remembers; `hidden` and `output` have one key (`output` one for each tensor
of a list), `module` one for every tensor that a described submodule returns.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from hasten import models
from hasten.caching.blocks import answer, hidden_in, hidden_of, owner_of, same_blocks, swapped
from hasten.caching.memory import PassMemory, finite
from hasten.errors import AdapterError
from hasten.models import BlockStack, ModelAdapter, Proxy, patch_size
from hasten.pipeline.hooks import Forward

__all__ = ["Decide", "HiddenSite", "ModuleSite", "OutputSite", "Site"]

Decide = Callable[[Tensor | None], bool]
Latents = Callable[[Any, Any], Any]


class Site(ABC):
    """One way to skip a transformer's work. Used by one forward at a time."""

    @abstractmethod
    def run(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory, decide: Decide) -> tuple[Any, bool]:
        """The transformer's result, and whether it was computed in the end.

        It is computed as `decide` says, and also where the forward never came to the place of the forecast (guidance
        that leaves out layers).

        Args:
            forward: the transformer's own forward.
            args, kwargs: of the call.
            memory: of this pass.
            decide: called once, with the gate's input; True means compute.
        """

    @abstractmethod
    def estimate(self, image_tokens: int, text_tokens: int, batch: int) -> int:
        """Numbers (not bytes) that one stored step of one pass holds."""


class _PlainSite(Site):
    """A site whose decision does not depend on what happens inside the forward."""

    def run(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory, decide: Decide) -> tuple[Any, bool]:
        if not decide(None):
            result = self.skip(forward, args, kwargs, memory)
            if result is not None:
                return result, False
        return self.compute(forward, args, kwargs, memory), True

    @abstractmethod
    def compute(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory) -> Any:
        """Run the forward and record its features."""

    @abstractmethod
    def skip(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory) -> Any:
        """Produce the forward's result from forecast features; None where the forward had no use for them."""


class _Recorder(Proxy):
    """Runs the module that it stands for and records what comes out."""

    def __init__(self, original: nn.Module, record: Callable[[Any], None]) -> None:
        super().__init__(original)
        self.record = record

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.original(*args, **kwargs)
        self.record(output)
        return output


class _PassThrough(Proxy):
    """A block that does nothing: returns what it was given, in the order in which its stack returns it."""

    def __init__(self, original: nn.Module, stack: BlockStack) -> None:
        super().__init__(original)
        self.stack = stack

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return answer(self.stack, hidden_of(self.stack, args, kwargs), args, kwargs)


class _Forecast(_PassThrough):
    """The last block of a skipped forward: returns the forecast image tokens."""

    def __init__(self, original: nn.Module, stack: BlockStack, forecast: Callable[[], Tensor]) -> None:
        super().__init__(original, stack)
        self.forecast = forecast

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return answer(self.stack, self.forecast(), args, kwargs)


class _Form:
    """What one call of a submodule returned, without the numbers."""

    def __init__(self, output: Any) -> None:
        self.is_tuple = isinstance(output, tuple)
        tensors = output if self.is_tuple else (output,)
        self._likes = [None if tensor is None else (tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]

    def build(self, make: Callable[[int], Tensor]) -> Any:
        """An output of that form, `make(i)` giving its tensors."""
        tensors = tuple(None if like is None else make(i) for i, like in enumerate(self._likes))
        return tensors if self.is_tuple else tensors[0]

    def filler(self) -> Any:
        """An output of that form that nobody reads, since everything that it feeds is forecast."""

        def make(i: int) -> Tensor:
            like = self._likes[i]
            assert like is not None
            return torch.empty(like[0], dtype=like[1], device=like[2])

        return self.build(make)


class OutputSite(_PlainSite):
    """The transformer's result, after the final layer: nothing of the model runs on a skipped step.

    Args:
        model: the transformer.
        change: remember the change from the transformer's input to its result instead of the result.
        latents: gives the transformer's input from the arguments of a call.
    """

    def __init__(self, model: nn.Module, change: bool = False, latents: Latents | None = None) -> None:
        self._model, self._change = model, change
        self._latents = latents or (lambda args, kwargs: args[0])

    def run(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory, decide: Decide) -> tuple[Any, bool]:
        observed = self._inputs(args, kwargs)[0] if self._change else None
        return super().run(forward, args, kwargs, memory, lambda _: decide(observed))

    def _inputs(self, args: Any, kwargs: Any) -> list[Tensor]:
        latents = self._latents(args, kwargs)
        return latents if isinstance(latents, list) else [latents]

    def compute(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory) -> Any:
        result = forward(*args, **kwargs)
        sample = result if isinstance(result, Tensor) else result[0]
        several = isinstance(sample, list)  # some models return one tensor for each image
        # Only the kind of the result is kept, for the steps that have to make one.
        memory.forms["output"] = (Tensor if isinstance(result, Tensor) else type(result), several)
        for i, tensor in enumerate(sample if several else [sample]):
            start = _like(self._inputs(args, kwargs)[i], tensor) if self._change else None
            memory.record(f"output/{i}", tensor if start is None else tensor - start)
        return result

    def skip(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory) -> Any:
        kind, several = memory.forms["output"]
        tensors = [memory.forecast(key) for key in memory.cache_keys]
        if self._change:
            tensors = [finite(t + _like(x, t)) for x, t in zip(self._inputs(args, kwargs), tensors, strict=False)]
        sample = tensors if several else tensors[0]
        if kind is Tensor:
            return sample
        return (sample,) if kind is tuple else kind(sample=sample)

    def estimate(self, image_tokens: int, text_tokens: int, batch: int) -> int:
        config: Any = self._model.config
        per_token = math.prod(patch_size(config))
        channels = getattr(config, "out_channels", None) or config.in_channels
        return int(batch * image_tokens * channels * per_token)


class HiddenSite(_PlainSite):
    """The image tokens after the last block.

    A skipped step runs the embeddings and the final layer, with this step's modulation.
    """

    def __init__(self, model: nn.Module, adapter: ModelAdapter | None) -> None:
        if adapter is None:
            models.require_stacks(model)
        self._model, self.adapter = model, adapter
        self._memory: PassMemory | None = None  # of the forward under way, until it is asked for the forecast
        self._skipped: dict[str, nn.ModuleList] = {}

    def compute(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory) -> Any:
        if self.adapter is None:
            result, self.adapter, hidden = models.trace(self._model, forward, args, kwargs)
            memory.record("hidden", hidden)
            return result
        stack = self.adapter.used(self._model)[-1]
        blocks = stack.blocks(self._model)

        def record(output: Any) -> None:
            memory.record("hidden", hidden_in(stack, output))

        last = str(len(blocks) - 1)
        with swapped([(blocks, last, _Recorder(blocks[-1], record))]):
            return forward(*args, **kwargs)

    def skip(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory) -> Any:
        assert self.adapter is not None
        self._memory = memory
        stacks = self.adapter.used(self._model)
        try:
            with swapped([(self._model, stack.name, self._proxies(stack, stack is stacks[-1])) for stack in stacks]):
                result = forward(*args, **kwargs)
            return result if self._memory is None else None
        finally:
            self._memory = None

    def _proxies(self, stack: BlockStack, last: bool) -> nn.ModuleList:
        """As many proxies as blocks, since some models read the length of the list or count along."""
        blocks = stack.blocks(self._model)
        if not same_blocks(self._skipped.get(stack.name), blocks):
            skipped: list[nn.Module] = [_PassThrough(block, stack) for block in blocks]
            if last:
                skipped[-1] = _Forecast(blocks[-1], stack, self._forecast)
            self._skipped[stack.name] = nn.ModuleList(skipped)
        return self._skipped[stack.name]

    def _forecast(self) -> Tensor:
        assert self._memory is not None
        memory, self._memory = self._memory, None
        return memory.forecast("hidden")

    def estimate(self, image_tokens: int, text_tokens: int, batch: int) -> int:
        if self.adapter is None:
            return batch * image_tokens * ModelAdapter(stacks=()).width_of(self._model)
        joint = self.adapter.used(self._model)[-1].joint
        return batch * (image_tokens + joint * text_tokens) * self.adapter.width_of(self._model)


class _Submodule(Proxy):
    """An attention or feed-forward of the module site."""

    def __init__(self, original: nn.Module, site: ModuleSite, key: str, forecast: bool) -> None:
        super().__init__(original)
        self.__dict__["site"] = site
        self.key, self.forecast = key, forecast

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.site.computing:
            output = self.original(*args, **kwargs)
            self.site.record(self, output)
            return output
        return self.site.answer(self)


class ModuleSite(_PlainSite):
    """Every attention and feed-forward output, before its gate: the papers' form, and the one that costs memory."""

    def __init__(self, model: nn.Module, adapter: ModelAdapter | None) -> None:
        if adapter is None:
            raise AdapterError(
                f"site 'module' needs a registered family and {type(model).__name__} is none; "
                "use site='hidden' or 'output', or describe the family with hasten.models.register"
            )
        self._model, self.adapter = model, adapter
        missing = [stack.name for stack in adapter.stacks if stack.modules is None]
        if missing:
            raise AdapterError(
                f"site 'module' is not described for {type(model).__name__} (no BlockModules for "
                f"{', '.join(missing)}); use site='hidden', or register the family with "
                "BlockStack(..., modules=BlockModules(...))"
            )
        self._proxies: list[tuple[nn.Module, str, nn.Module]] = []  # (parent, submodule's name, proxy)
        self._blocks: list[nn.Module] = []
        self._memory: PassMemory | None = None  # of the forward under way
        self._calls: Counter[str] = Counter()
        self.computing = True

    def _swaps(self) -> list[tuple[nn.Module, str, nn.Module]]:
        blocks = [block for stack in self.adapter.used(self._model) for block in stack.blocks(self._model)]
        if any(hasattr(block, "_orig_mod") or block._compiled_call_impl is not None for block in blocks):
            raise AdapterError(
                f"site 'module' works inside the blocks of {type(self._model).__name__}, which are compiled; "
                "use site='hidden', or do not compile them"
            )
        same = len(blocks) == len(self._blocks) and all(map(is_, blocks, self._blocks))
        if not same or any(parent._modules[name] is not proxy.original for parent, name, proxy in self._proxies):
            self._blocks, self._proxies = blocks, self._build()
        return self._proxies

    def _build(self) -> list[tuple[nn.Module, str, nn.Module]]:
        proxies: list[tuple[nn.Module, str, nn.Module]] = []
        for stack in self.adapter.used(self._model):
            assert stack.modules is not None
            forecast = [name for name, _ in stack.modules.forecast]
            for i, block in enumerate(stack.blocks(self._model)):
                for name in (*forecast, *stack.modules.skip):
                    owner = owner_of(block, name)
                    if owner is not None and owner._modules[name] is not None:
                        key = f"{stack.name}.{i}.{name}"
                        proxy = _Submodule(getattr(owner, name), self, key, name in forecast)
                        proxies.append((owner, name, proxy))
        return proxies

    def _run(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory, computing: bool) -> Any:
        self._memory, self.computing = memory, computing
        self._calls.clear()
        try:
            with swapped(self._swaps()):
                return forward(*args, **kwargs)
        finally:
            self._memory = None

    def compute(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory) -> Any:
        memory.forms.clear()
        return self._run(forward, args, kwargs, memory, computing=True)

    def skip(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory) -> Any:
        try:
            return self._run(forward, args, kwargs, memory, computing=False)
        except _NotRecordedError:
            return None

    def record(self, module: _Submodule, output: Any) -> None:
        """Remember what a submodule returned."""
        assert self._memory is not None
        call = self._calls[module.key]
        self._calls[module.key] += 1
        self._memory.forms.setdefault(module.key, []).append(_Form(output))
        if module.forecast:
            for i, tensor in enumerate(output if isinstance(output, tuple) else (output,)):
                if tensor is not None:
                    self._memory.record(f"{module.key}/{call}/{i}", tensor)

    def answer(self, module: _Submodule) -> Any:
        """What a submodule would have returned."""
        assert self._memory is not None
        memory, call = self._memory, self._calls[module.key]
        self._calls[module.key] += 1
        forms: list[_Form] = memory.forms.get(module.key, [])
        if call >= len(forms):
            raise _NotRecordedError
        if not module.forecast:
            return forms[call].filler()
        return forms[call].build(lambda i: memory.forecast(f"{module.key}/{call}/{i}"))

    def estimate(self, image_tokens: int, text_tokens: int, batch: int) -> int:
        tokens = {"image": image_tokens, "text": text_tokens, "joint": image_tokens + text_tokens}
        numbers = 0
        for stack in self.adapter.used(self._model):
            assert stack.modules is not None
            per_block = sum(tokens[kind] for _, kinds in stack.modules.forecast for kind in kinds)
            numbers += per_block * len(stack.blocks(self._model))
        return batch * numbers * self.adapter.width_of(self._model)


class _NotRecordedError(Exception):
    """A submodule runs on a skipped step that did not run on the computed one (guidance that leaves out layers)."""


def _like(latents: Tensor, result: Tensor) -> Tensor:
    """The part of the transformer's input that its result corresponds to, in the shape of the result.

    Inputs may carry more (tokens of reference images, channels of a condition; both come after the latents), results
    may (channels of a learned variance). What has no counterpart is zero.
    """
    if latents.shape == result.shape:
        return latents
    overlap = tuple(slice(min(a, b)) for a, b in zip(latents.shape, result.shape, strict=True))
    like = torch.zeros_like(result)
    like[overlap] = latents[overlap].to(result.dtype)
    return like
