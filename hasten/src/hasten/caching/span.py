"""A span of blocks that is skipped as one, behind blocks that always run: where the gated methods work.

FBCache and DBCache run the first blocks and add a remembered change of the others; TeaCache and MagCache add a
remembered change of all blocks; SpeCa drafts what comes out and lets the last block check it. All of them are this
site with a different `Feature`. As at the hidden site, the transformer's own forward runs, with proxies in the
places of its blocks for the length of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hasten import models
from hasten.caching.memory import PassMemory, finite
from hasten.caching.method import Feature
from hasten.caching.sites import Decide, Site, forecast_streams, stream_key
from hasten.caching.sums import add_into
from hasten.errors import AdapterError, ConfigError
from hasten.models import BlockStack, Here, ModelAdapter, Proxy
from hasten.models.blocks import (
    answer,
    encoder_of,
    filled_like,
    hidden_in,
    hidden_of,
    owner_of,
    same_blocks,
    stream_of,
    streams_in,
    swapped,
    with_streams,
)
from hasten.pipeline.hooks import Forward

__all__ = ["SpanSite"]

_DRAFT = "input/"  # cache keys of what the last block is given, by stream


class _Seen(Exception):  # noqa: N818 - not an error: it carries a tensor out of a block
    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor


class _Capture(Proxy):
    """Stands for a block's attention and ends the forward with the image tokens that the attention was about to get."""

    def __init__(self, original: nn.Module, place: int) -> None:
        super().__init__(original, Here())
        self._place = place  # of the image tokens among the streams

    def respond(self, *args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        raise _Seen(kwargs["hidden_states"] if "hidden_states" in kwargs else tensors[self._place])


def modulated_input(block: nn.Module, stack: BlockStack, args: Any, kwargs: Any) -> Tensor:
    """The normalised and modulated image tokens that a block's attention gets, without running the attention."""
    assert stack.modules is not None
    attention, streams = stack.modules.forecast[0]
    eager = getattr(block, "_orig_mod", block)  # leaving a compiled block by an exception would break its graph
    owner = owner_of(eager, attention)
    if owner is None:
        raise AdapterError(
            f"{type(eager).__name__} has no {attention!r} whose input could be looked at; describe its family with "
            "hasten.models.register, or use a method without a modulated input, such as fbcache"
        )
    place = streams.index("image") if "image" in streams else 0
    capture = _Capture(getattr(owner, attention), place)
    with swapped([(owner, attention, capture)], capture.here):
        try:
            eager._call_impl(*args, **kwargs)  # with its hooks: they may bring the weights (`fully_shard`)
        except _Seen as seen:
            return seen.tensor
    raise AdapterError(f"{type(block).__name__} ran without calling its {attention!r}; describe its attention first")


class _Block(Proxy):
    """One block of the span or in front of it."""

    def __init__(self, original: nn.Module, stack: BlockStack, position: int, site: SpanSite) -> None:
        super().__init__(original, site.here)
        self.stack, self.position = stack, position
        self.__dict__["site"] = site

    def respond(self, *args: Any, **kwargs: Any) -> Any:
        return self.site.block(self, args, kwargs)


def _entering(block: _Block, args: Any, kwargs: Any) -> dict[str, Tensor]:
    """The streams in a call of a block, by name."""
    stack, module = block.stack, block.original
    streams: dict[str, Tensor | None] = {
        "hidden": hidden_of(stack, module, args, kwargs),
        "encoder": encoder_of(stack, module, args, kwargs),
    }
    streams |= {name: stream_of(module, name, args, kwargs) for name in stack.streams}
    return {name: tensor for name, tensor in streams.items() if isinstance(tensor, Tensor)}


class SpanSite(Site):
    """Image tokens after the last block, or the change that the blocks behind the front ones make.

    Guidance may leave out any of the blocks in one of its passes: the span begins with the first block behind the front
    that is called. A pass in which the last block is not called leaves nothing to forecast from, and is computed.

    Args:
        model: the transformer.
        adapter: how it is laid out; None for a family that the first forward has to trace (that forward then runs
            twice).
        feature: what to remember and what to look at.
        verified: given what the last block makes of a drafted input, and the draft, with `Feature.verify`.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: ModelAdapter | None,
        feature: Feature,
        verified: Callable[[Tensor, Tensor], None],
    ) -> None:
        if adapter is None:
            models.require_stacks(model)
        self._model, self.adapter, self._feature, self._verified = model, adapter, feature, verified
        self.here = Here()
        self._proxies: dict[str, nn.Module] = {}
        self._last = -1
        self._clear()

    def _clear(self) -> None:
        """Between two forwards."""
        self._memory: PassMemory | None = None
        self._decide: Decide | None = None
        self._computing = True
        self._done = False  # whether the last block was called
        self._front_ran = False
        self._start: Tensor | None = None
        self._entry: dict[str, Tensor] | None = None  # the streams that entered the span

    def run(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory, decide: Decide) -> tuple[Any, bool]:
        if self.adapter is None:
            self.adapter = models.trace(self._model, forward, args, kwargs)[1]
        result, computed = self._run(forward, args, kwargs, memory, decide)
        if result is None:
            result, computed = self._run(forward, args, kwargs, memory, lambda _: True)
        return result, computed

    def _run(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory, decide: Decide) -> tuple[Any, bool]:
        assert self.adapter is not None
        self._memory, self._decide = memory, decide
        stacks = self.adapter.used(self._model)
        try:
            with swapped([(*stack.holder(self._model), self._blocks(stack, stacks)) for stack in stacks], self.here):
                result = forward(*args, **kwargs)
            if self._entry is None:  # all blocks were left out
                decide(None)
            return (result if self._computing or self._done else None), self._computing
        finally:
            self._clear()

    def _blocks(self, stack: BlockStack, stacks: list[BlockStack]) -> nn.Module:
        """Proxies for the blocks of a stack."""
        sizes = [len(s.blocks(self._model)) for s in stacks]
        if self._feature.front >= sizes[0]:
            raise ConfigError(
                f"front must be less than the {sizes[0]} blocks of {stacks[0].name!r}, got {self._feature.front}"
            )
        if self._feature.gate_input == "modulated" and stacks[0].modules is None:
            raise AdapterError(
                f"the attention of {stacks[0].name!r} is not described for {type(self._model).__name__}; "
                "register the family with BlockStack(..., modules=BlockModules(...))"
            )
        self._last = sum(sizes) - 1
        if not same_blocks(self._proxies.get(stack.name), stack.blocks(self._model)):
            first = sum(sizes[: stacks.index(stack)])
            blocks = [_Block(b, stack, first + i, self) for i, b in enumerate(stack.blocks(self._model))]
            self._proxies[stack.name] = filled_like(stack.container(self._model), list(blocks))
        return self._proxies[stack.name]

    def block(self, block: _Block, args: Any, kwargs: Any) -> Any:
        """What happens in the place of one block."""
        stack, front = block.stack, self._feature.front
        if self._start is None:
            self._start = hidden_of(stack, block.original, args, kwargs)
        if self._entry is None and block.position >= front:
            self._enter(block, args, kwargs)
        if block.position < front or (self._computing and block.position < self._last):
            self._front_ran |= block.position < front
            return block.original(*args, **kwargs)
        if block.position < self._last:
            return answer(stack, block.original, args, kwargs, {})
        self._done = True
        if self._computing:
            return self._record(block, args, kwargs)
        return self._forecast(block, args, kwargs)

    def _enter(self, block: _Block, args: Any, kwargs: Any) -> None:
        """The front blocks have run: let the gate observe its input and decide."""
        assert self._decide is not None
        assert self._memory is not None
        self._entry = _entering(block, args, kwargs)
        observed = None
        if self._feature.gate_input == "modulated" and block.position == 0:
            observed = modulated_input(block.original, block.stack, args, kwargs)
            self._memory.observe("modulated", observed)
        elif self._feature.gate_input == "front" and self._front_ran:
            assert self._start is not None
            if self._entry["hidden"].shape != self._start.shape:
                raise AdapterError(
                    f"the tokens of {type(self._model).__name__} change their form between blocks, from "
                    f"{list(self._start.shape)} to {list(self._entry['hidden'].shape)}, so that the change that the "
                    "front blocks make cannot be told; use a method that does not look at it, such as easycache or foca"
                )
            observed = self._entry["hidden"] - self._start
        self._computing = self._decide(observed)

    def _record(self, block: _Block, args: Any, kwargs: Any) -> Any:
        assert self._memory is not None
        output = block.original(*args, **kwargs)
        entry = self._joined(block.stack)
        self._memory.observe("entry", entry["hidden"])
        for name, new in streams_in(block.stack, output).items():
            start = self._start_of(entry, name, new)
            self._memory.record(stream_key(name), new if start is None else new - start)
        if self._feature.verify:
            drafted = _entering(block, args, kwargs)
            for name, tensor in drafted.items():
                if name in block.stack.returns:
                    self._memory.record(_DRAFT + name, tensor)
        return output

    def _joined(self, stack: BlockStack) -> dict[str, Tensor]:
        """What entered the span, in the form in which the last stack carries it."""
        assert self.adapter is not None
        assert self._entry is not None
        entry = self._entry
        if stack.joint and len(self.adapter.used(self._model)) > 1:
            # text first, in all families with a joint second stack
            return {**entry, "hidden": torch.cat([entry["encoder"], entry["hidden"]], dim=1)}
        return entry

    def _forecast(self, block: _Block, args: Any, kwargs: Any) -> Any:
        assert self._memory is not None
        new = forecast_streams(self._memory)
        if self._feature.verify:
            keys = [key for key in self._memory.cache_keys if key.startswith(_DRAFT)]
            draft = {key.removeprefix(_DRAFT): self._memory.forecast(key) for key in keys}
            args_, kwargs_ = with_streams(block.stack, block.original, args, kwargs, draft)
            self._verified(hidden_in(block.stack, block.original(*args_, **kwargs_)), new["hidden"])
        # Not what comes in here: what a ControlNet adds between the blocks is in it, and in the remembered change.
        entry = self._joined(block.stack)
        for name, change in new.items():
            start = self._start_of(entry, name, change)
            new[name] = change if start is None else finite(add_into(change, start))
        return answer(block.stack, block.original, args, kwargs, new)

    def _start_of(self, entry: dict[str, Tensor], name: str, like: Tensor) -> Tensor | None:
        """What a stream is remembered as a change of; None where it did not enter the span in the same form."""
        start = entry.get(name) if self._feature.change else None
        return start if start is not None and start.shape == like.shape else None

    def estimate(self, image_tokens: int, text_tokens: int, batch: int) -> int:
        adapter = self.adapter or ModelAdapter(stacks=())
        last = adapter.used(self._model)[-1] if adapter.stacks else BlockStack("")
        tokens = image_tokens + last.joint * text_tokens
        if self._feature.verify:
            dual = "encoder" in last.returns and not last.joint
            tokens = 2 * tokens + dual * text_tokens
        return batch * tokens * adapter.width_of(self._model)
