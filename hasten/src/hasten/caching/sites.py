"""Where a feature is taken and put back: `output` or `hidden`; the other sites have files of their own.

A site runs the transformer's own forward. For the length of that one forward it puts proxies in the places of some
child modules, and takes them out again whatever happens; between forwards the model is exactly as the user made it.
Block code is neither copied nor hooked, so compiled blocks, LoRA layers, attention processors and offload hooks keep
working. Proxies are made once, and again when what they stand for was replaced.

Cache keys: a site names each tensor that it remembers; `hidden` has one key for each stream that leaves the last block,
`output` one for each tensor of the result.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hasten import models
from hasten.caching.memory import PassMemory, finite
from hasten.caching.sums import add_into
from hasten.errors import AdapterError
from hasten.models import BlockStack, FinalNorm, Here, ModelAdapter, Proxy, patch_size
from hasten.models.blocks import Skipped, streams_in, swapped
from hasten.models.forms import Form
from hasten.pipeline.hooks import Forward

__all__ = ["Decide", "HiddenSite", "OutputSite", "PlainSite", "Site", "forecast_streams", "stream_key"]

Decide = Callable[[Tensor | None], bool]
Latents = Callable[[Any, Any], Any]


class Site(ABC):
    """One way to skip a transformer's work. Used by one forward at a time.

    Attributes:
        compilable: whether a transformer that is compiled as a whole can run compiled here: whether what the site does
            within a forward can be traced.
        compiled: what runs the transformer, compiled as a whole; None where it is not, or not `compilable`.
    """

    compilable: ClassVar[bool] = False
    compiled: Forward | None = None

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


class PlainSite(Site):
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
    """Runs the last block and keeps the streams that come out."""

    def __init__(self, original: nn.Module, stack: BlockStack) -> None:
        super().__init__(original, Here())
        self.stack = stack
        self.record: Callable[[dict[str, Tensor]], None] | None = None
        self.seen: list[dict[str, Tensor]] = []  # where a compiler traces, which takes out what is put into a list

    def respond(self, *args: Any, **kwargs: Any) -> Any:
        output = self.original(*args, **kwargs)
        streams = streams_in(self.stack, output)
        if self.record is None:  # the model may go on to work in place
            self.seen.append({name: tensor.clone() for name, tensor in streams.items()})
        else:
            self.record(streams)
        return output


def _record(memory: PassMemory, norm: FinalNorm | None, streams: dict[str, Tensor]) -> None:
    for name, tensor in streams.items():
        memory.record(stream_key(name), tensor, norm if name == "hidden" else None)


def stream_key(name: str) -> str:
    """The cache key of a stream that leaves the last block."""
    return "hidden" if name == "hidden" else f"hidden/{name}"


def forecast_streams(memory: PassMemory) -> dict[str, Tensor]:
    """The forecast of every stream that left the last block on computed steps."""
    keys = [key for key in memory.cache_keys if key == "hidden" or key.startswith("hidden/")]
    return {key.removeprefix("hidden/"): memory.forecast(key) for key in keys}


class OutputSite(PlainSite):
    """The transformer's result, after the final layer: nothing of the model runs on a skipped step.

    Every tensor of the result is forecast: a clip and its sound, an image of each size.

    Args:
        model: the transformer.
        change: remember the change from the transformer's input to its result instead of the result.
        latents: gives the transformer's input from the arguments of a call.
    """

    compilable: ClassVar[bool] = True

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
        result = (self.compiled or forward)(*args, **kwargs)
        try:
            form = Form(result, type(self._model).__name__)
        except AdapterError:
            if memory.step:
                raise
            return result  # the first step may hand something on to the later ones: keys and values of an image
        for i, tensor in enumerate(form.tensors):
            start = self._start(i, tensor, args, kwargs)
            memory.record(f"output/{i}", tensor if start is None else tensor - start)
        memory.forms["output"] = form.forget()  # for the steps that have to make a result of the same kind
        return result

    def skip(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory) -> Any:
        form: Form = memory.forms["output"]

        def make(i: int) -> Tensor:
            tensor = memory.forecast(f"output/{i}")
            start = self._start(i, tensor, args, kwargs)
            return tensor if start is None else finite(add_into(tensor, start))

        return form.build(make)

    def _start(self, i: int, result: Tensor, args: Any, kwargs: Any) -> Tensor | None:
        """What a result is remembered as a change of: the latents that it belongs to.

        None without `change`, and for what has no counterpart among the latents (sound beside a clip), of which the
        result itself is remembered.
        """
        if not self._change:
            return None
        latents = self._inputs(args, kwargs)
        return _like(latents[i], result) if i < len(latents) and latents[i].dim() == result.dim() else None

    def estimate(self, image_tokens: int, text_tokens: int, batch: int) -> int:
        config: Any = self._model.config
        per_token = math.prod(patch_size(config))
        channels = getattr(config, "out_channels", None) or config.in_channels
        return int(batch * image_tokens * channels * per_token)


class HiddenSite(PlainSite):
    """The image tokens after the last block, and with them every other stream that leaves it for a final layer.

    A skipped step runs the embeddings and the final layers, with this step's modulation. Where the transformer is
    compiled as a whole, that is one graph per shape, and the forecast, which the fused sum makes before, its input: so
    the graph depends on neither the method nor the number of stored steps. Computed steps are a graph of their own.

    Args:
        model: the transformer.
        adapter: how it is laid out; None for a family that the first forward has to trace.
        norm: the model's final norm, where image tokens are to be kept as it leaves them. Forecasts go through it once
            more, which changes nothing; computed steps never see what is kept.
    """

    compilable: ClassVar[bool] = True

    def __init__(self, model: nn.Module, adapter: ModelAdapter | None, norm: FinalNorm | None = None) -> None:
        if adapter is None:
            models.require_stacks(model)
        self._model, self.adapter, self._norm = model, adapter, norm
        self._recorder: _Recorder | None = None
        self._skipped: Skipped | None = None
        self._memory: PassMemory | None = None  # of the skipped forward under way
        self._made: dict[str, Tensor] | None = None  # the forecast, where a compiler traces

    def compute(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory) -> Any:
        if self.adapter is None:  # watching is not for a compiler
            result, self.adapter, streams = models.trace(self._model, forward, args, kwargs)
            _record(memory, self._norm, streams)
            return result
        stack = self.adapter.used(self._model)[-1]
        container = stack.container(self._model)
        last = next(reversed(container._modules))
        block = stack.blocks(self._model)[-1]
        recorder = self._recorder
        if recorder is None or recorder.original is not block:
            recorder = self._recorder = _Recorder(block, stack)
        recorder.record = partial(_record, memory, self._norm) if self.compiled is None else None
        try:
            with swapped([(container, last, recorder)], recorder.here):
                result = (self.compiled or forward)(*args, **kwargs)
            for streams in recorder.seen:
                _record(memory, self._norm, streams)
            return result
        finally:
            recorder.record = None
            recorder.seen.clear()

    def skip(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory) -> Any:
        assert self.adapter is not None
        if self._skipped is None:
            self._skipped = Skipped(self._model, self.adapter, self._forecast)
        self._memory = memory
        if self.compiled is not None:
            self._made = forecast_streams(memory)
        try:
            with self._skipped.inside():
                result = (self.compiled or forward)(*args, **kwargs)
            return result if self._skipped.asked else None
        finally:
            self._memory = self._made = None

    def _forecast(self) -> dict[str, Tensor]:
        if self._made is not None:
            return self._made
        assert self._memory is not None
        return forecast_streams(self._memory)

    def estimate(self, image_tokens: int, text_tokens: int, batch: int) -> int:
        if self.adapter is None:
            return batch * image_tokens * ModelAdapter(stacks=()).width_of(self._model)
        joint = self.adapter.used(self._model)[-1].joint
        return batch * (image_tokens + joint * text_tokens) * self.adapter.width_of(self._model)


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
