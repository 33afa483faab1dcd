"""Where a feature is taken and put back: `output`, `hidden` or `module`.

A site runs the transformer's own forward. For the length of that one forward it puts proxies in the places of some
child modules, and takes them out again whatever happens; between forwards the model is exactly as the user made it.
Block code is neither copied nor hooked, so compiled blocks, LoRA layers, attention processors and offload hooks keep
working.

Slots: a site names each tensor it remembers; `hidden` and `output` have one slot, `module` one for every tensor that a
described submodule returns.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from hasten import models
from hasten.caching.blocks import answer, hidden_in, hidden_of, swapped
from hasten.caching.memory import PassMemory
from hasten.errors import AdapterError
from hasten.models import BlockStack, ModelAdapter, Proxy, patch_size

__all__ = ["Decide", "Forward", "HiddenSite", "ModuleSite", "OutputSite", "Site"]

Forward = Callable[..., Any]
Decide = Callable[[Tensor | None], bool]
Latents = Callable[[Any, Any], Any]


class Site(ABC):
    """One way to skip a transformer's work."""

    @abstractmethod
    def run(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory, decide: Decide) -> Any:
        """The transformer's result, computed or forecast as `decide` says.

        Args:
            forward: the transformer's own forward.
            args, kwargs: of the call.
            memory: of this pass.
            decide: called once, with what the gate is to see; True means compute.
        """

    @abstractmethod
    def estimate(self, image_tokens: int, text_tokens: int, batch: int) -> int:
        """Numbers (not bytes) that one stored step of one pass holds."""


class _PlainSite(Site):
    """A site whose decision does not depend on what happens inside the forward."""

    def run(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory, decide: Decide) -> Any:
        return (self.computed if decide(None) else self.skipped)(forward, args, kwargs, memory)

    @abstractmethod
    def computed(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory) -> Any:
        """Run the forward and record its features."""

    @abstractmethod
    def skipped(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory) -> Any:
        """Produce the forward's result from forecast features."""


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


class _Answer(Proxy):
    """A submodule that returns a ready answer."""

    def __init__(self, original: nn.Module, answer: Callable[[], Any]) -> None:
        super().__init__(original)
        self.answer = answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer()


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
        self._kind: type[Any] = Tensor
        self._list = False

    def run(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory, decide: Decide) -> Any:
        seen = self._inputs(args, kwargs)[0] if self._change else None
        return (self.computed if decide(seen) else self.skipped)(forward, args, kwargs, memory)

    def _inputs(self, args: Any, kwargs: Any) -> list[Tensor]:
        latents = self._latents(args, kwargs)
        return latents if isinstance(latents, list) else [latents]

    def computed(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory) -> Any:
        result = forward(*args, **kwargs)
        # Only the kind of the result is kept, for the steps that have to make one.
        self._kind = Tensor if isinstance(result, Tensor) else type(result)
        sample = result if isinstance(result, Tensor) else result[0]
        self._list = isinstance(sample, list)  # some models return one tensor for each image
        for i, tensor in enumerate(sample if self._list else [sample]):
            start = _like(self._inputs(args, kwargs)[i], tensor) if self._change else None
            memory.record(f"output/{i}", tensor if start is None else tensor - start)
        return result

    def skipped(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory) -> Any:
        tensors = [memory.forecast(slot) for slot in memory.cache_keys]
        if self._change:
            tensors = [t + _like(x, t) for x, t in zip(self._inputs(args, kwargs), tensors, strict=False)]
        sample = tensors if self._list else tensors[0]
        if self._kind is Tensor:
            return sample
        return (sample,) if self._kind is tuple else self._kind(sample=sample)

    def estimate(self, image_tokens: int, text_tokens: int, batch: int) -> int:
        config: Any = self._model.config
        per_token = math.prod(patch_size(config))
        channels = getattr(config, "out_channels", None) or config.in_channels
        return int(batch * image_tokens * channels * per_token)


class HiddenSite(_PlainSite):
    """The image tokens after the last block.

    A skipped step runs the embeddings and the final layer, with this step's modulation.
    """

    def __init__(self, model: nn.Module, host: ModelAdapter | None) -> None:
        if host is None:
            models.require_stacks(model)
        self._model, self._host = model, host
        self._memory: PassMemory | None = None  # of the forward under way
        self._skipped: dict[str, nn.ModuleList] = {}

    def computed(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory) -> Any:
        if self._host is None:
            result, self._host, hidden = models.trace(self._model, forward, args, kwargs)
            memory.record("hidden", hidden)
            return result
        stack = self._host.used(self._model)[-1]
        blocks = stack.blocks(self._model)

        def record(output: Any) -> None:
            memory.record("hidden", hidden_in(stack, output))

        last = str(len(blocks) - 1)
        with swapped([(blocks, last, _Recorder(blocks[-1], record))]):
            return forward(*args, **kwargs)

    def skipped(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory) -> Any:
        assert self._host is not None
        self._memory = memory
        stacks = self._host.used(self._model)
        try:
            with swapped([(self._model, stack.name, self._proxies(stack, stack is stacks[-1])) for stack in stacks]):
                return forward(*args, **kwargs)
        finally:
            self._memory = None

    def _proxies(self, stack: BlockStack, last: bool) -> nn.ModuleList:
        """As many proxies as blocks, since some models read the length of the list or count along; made once."""
        blocks = stack.blocks(self._model)
        if len(self._skipped.get(stack.name, ())) != len(blocks):
            skipped: list[nn.Module] = [_PassThrough(block, stack) for block in blocks]
            if last:
                skipped[-1] = _Forecast(blocks[-1], stack, self._forecast)
            self._skipped[stack.name] = nn.ModuleList(skipped)
        return self._skipped[stack.name]

    def _forecast(self) -> Tensor:
        assert self._memory is not None
        return self._memory.forecast("hidden")

    def estimate(self, image_tokens: int, text_tokens: int, batch: int) -> int:
        if self._host is None:
            return batch * image_tokens * ModelAdapter(stacks=()).width_of(self._model)
        joint = self._host.used(self._model)[-1].joint
        return batch * (image_tokens + joint * text_tokens) * self._host.width_of(self._model)


class ModuleSite(_PlainSite):
    """Every attention and feed-forward output, before its gate: the papers' form, and the one that costs memory."""

    def __init__(self, model: nn.Module, host: ModelAdapter | None) -> None:
        if host is None:
            raise AdapterError(
                f"site 'module' needs a registered family and {type(model).__name__} is none; "
                "use site='hidden' or 'output', or describe the family with hasten.models.register"
            )
        self._model, self._host = model, host
        missing = [stack.name for stack in host.stacks if stack.modules is None]
        if missing:
            raise AdapterError(
                f"site 'module' is not described for {type(model).__name__} (no BlockModules for {', '.join(missing)}); "
                "use site='hidden', or register the family with BlockStack(..., modules=BlockModules(...))"
            )

    def _places(self) -> Iterator[tuple[nn.Module, str, str, bool]]:
        """(block, submodule's name, slot, whether its output is forecast rather than skipped)."""
        for stack in self._host.used(self._model):
            assert stack.modules is not None
            if any(hasattr(b, "_orig_mod") or b._compiled_call_impl is not None for b in stack.blocks(self._model)):
                raise AdapterError(
                    f"site 'module' works inside the blocks of {stack.name}, which are compiled; "
                    "use site='hidden', or do not compile them"
                )
            forecast = [name for name, _ in stack.modules.forecast]
            for i, block in enumerate(stack.blocks(self._model)):
                for name in (*forecast, *stack.modules.skip):
                    if getattr(block, name, None) is not None:
                        yield block, name, f"{stack.name}.{i}.{name}", name in forecast

    def _proxies(self, make: Callable[[nn.Module, str, bool], Proxy]) -> AbstractContextManager[None]:
        """Every described submodule replaced by `make(submodule, slot, forecast)`."""
        return swapped(
            [
                (block, name, make(getattr(block, name), slot, forecast))
                for block, name, slot, forecast in self._places()
            ]
        )

    def computed(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory) -> Any:
        def recorder(slot: str, forecast: bool) -> Callable[[Any], None]:
            calls = count()
            memory.forms[slot] = []

            def record(output: Any) -> None:
                call = next(calls)
                memory.forms[slot].append(_Form(output))
                if forecast:
                    for i, tensor in enumerate(output if isinstance(output, tuple) else (output,)):
                        if tensor is not None:
                            memory.record(f"{slot}/{call}/{i}", tensor)

            return record

        with self._proxies(lambda module, slot, forecast: _Recorder(module, recorder(slot, forecast))):
            return forward(*args, **kwargs)

    def skipped(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory) -> Any:
        def answer(slot: str, forecast: bool) -> Callable[[], Any]:
            calls = count()

            def respond() -> Any:
                call = next(calls)
                form: _Form = memory.forms[slot][call]
                return form.build(lambda i: memory.forecast(f"{slot}/{call}/{i}")) if forecast else form.filler()

            return respond

        with self._proxies(lambda module, slot, forecast: _Answer(module, answer(slot, forecast))):
            return forward(*args, **kwargs)

    def estimate(self, image_tokens: int, text_tokens: int, batch: int) -> int:
        tokens = {"image": image_tokens, "text": text_tokens, "joint": image_tokens + text_tokens}
        numbers = 0
        for stack in self._host.used(self._model):
            assert stack.modules is not None
            per_block = sum(tokens[kind] for _, kinds in stack.modules.forecast for kind in kinds)
            numbers += per_block * len(stack.blocks(self._model))
        return batch * numbers * self._host.width_of(self._model)


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
