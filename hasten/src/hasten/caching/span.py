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
from hasten.caching.blocks import answer, encoder_of, hidden_in, hidden_of, swapped, with_streams
from hasten.caching.memory import PassMemory
from hasten.caching.method import Feature
from hasten.caching.sites import Decide, Forward, Site
from hasten.errors import AdapterError, ConfigError
from hasten.models import BlockStack, ModelAdapter, Proxy

__all__ = ["SpanSite"]


class _Seen(Exception):  # noqa: N818 - not an error: it carries a tensor out of a block
    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor


class _Capture(Proxy):
    """Stands for a block's attention and ends the forward with what the attention was about to get."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        raise _Seen(kwargs.get("hidden_states", tensors[0]))


def modulated_input(block: nn.Module, stack: BlockStack, args: Any, kwargs: Any) -> Tensor:
    """The normalised and modulated image tokens that a block's attention gets, without running the attention."""
    assert stack.modules is not None
    attention = stack.modules.forecast[0][0]
    eager = getattr(block, "_orig_mod", block)  # leaving a compiled block by an exception would break its graph
    with swapped([(eager, attention, _Capture(getattr(eager, attention)))]):
        try:
            eager.forward(*args, **kwargs)
        except _Seen as seen:
            return seen.tensor
    raise AdapterError(f"{type(block).__name__} ran without calling its {attention!r}; describe its attention first")


class _Block(Proxy):
    """One block of the span or in front of it."""

    def __init__(self, original: nn.Module, stack: BlockStack, position: int, site: SpanSite) -> None:
        super().__init__(original)
        self.stack, self.position = stack, position
        self.__dict__["site"] = site

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.site.block(self, args, kwargs)


class SpanSite(Site):
    """Image tokens after the last block, or the change that the blocks behind the front ones make.

    Args:
        model: the transformer.
        host: how it is wired; None for a family that the first forward has to trace (that forward then runs twice).
        feature: what to remember and what to look at.
        verified: given what the last block makes of a drafted input, and the draft, with `Feature.verify`.
    """

    def __init__(
        self, model: nn.Module, host: ModelAdapter | None, feature: Feature, verified: Callable[[Tensor, Tensor], None]
    ) -> None:
        if host is None:
            models.require_stacks(model)
        self._model, self._host, self._feature, self._verified = model, host, feature, verified
        self._proxies: dict[str, nn.ModuleList] = {}
        self._last = -1
        self._clear()

    def _clear(self) -> None:
        self._memory: PassMemory | None = None
        self._decide: Decide | None = None
        self._full = True
        self._start: Tensor | None = None
        self._entry: tuple[Tensor, Tensor | None] | None = None

    def run(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory, decide: Decide) -> Any:
        if self._host is None:
            self._host = models.trace(self._model, forward, args, kwargs)[1]
        self._memory, self._decide = memory, decide
        try:
            with swapped([(self._model, stack.name, self._places(stack)) for stack in self._host.used(self._model)]):
                return forward(*args, **kwargs)
        finally:
            self._clear()

    def _places(self, stack: BlockStack) -> nn.ModuleList:
        assert self._host is not None
        stacks = self._host.used(self._model)
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
        if len(self._proxies.get(stack.name, ())) != len(stack.blocks(self._model)):
            first = sum(sizes[: stacks.index(stack)])
            blocks = [_Block(b, stack, first + i, self) for i, b in enumerate(stack.blocks(self._model))]
            self._proxies[stack.name] = nn.ModuleList(blocks)
        return self._proxies[stack.name]

    def block(self, block: _Block, args: Any, kwargs: Any) -> Any:
        """What happens in the place of one block."""
        stack, front = block.stack, self._feature.front
        hidden, encoder = hidden_of(stack, args, kwargs), encoder_of(stack, args, kwargs)
        if block.position == 0:
            self._start = hidden
        if block.position == front:
            self._enter(block, hidden, encoder, args, kwargs)
        if block.position < front or (self._full and block.position < self._last):
            return block.original(*args, **kwargs)
        if block.position < self._last:
            return answer(stack, hidden, args, kwargs)
        if self._full:
            return self._record(block, hidden, encoder, args, kwargs)
        return self._forecast(block, args, kwargs)

    def _enter(self, block: _Block, hidden: Tensor, encoder: Tensor | None, args: Any, kwargs: Any) -> None:
        """The front blocks have run: show the gate what it wants to see, and have it decide."""
        assert self._decide is not None
        assert self._memory is not None
        self._entry = (hidden, encoder)
        seen = None
        if self._feature.gate_input == "modulated":
            seen = modulated_input(block.original, block.stack, args, kwargs)
            self._memory.show("modulated", seen)
        elif self._feature.gate_input == "front":
            assert self._start is not None
            seen = hidden - self._start
        self._full = self._decide(seen)

    def _record(self, block: _Block, hidden: Tensor, encoder: Tensor | None, args: Any, kwargs: Any) -> Any:
        assert self._memory is not None
        output = block.original(*args, **kwargs)
        new = hidden_in(block.stack, output)
        entry = self._joined(block.stack)
        self._memory.show("entry", entry)
        self._memory.record("hidden", new - entry if self._feature.change else new)
        if self._feature.verify:
            self._memory.record("input", hidden)
            if encoder is not None and "encoder" in block.stack.returns:
                self._memory.record("encoder", encoder)
        return output

    def _joined(self, stack: BlockStack) -> Tensor:
        """What entered the span, in the form in which the last stack carries it."""
        assert self._host is not None
        assert self._entry is not None
        hidden, encoder = self._entry
        if stack.joint and len(self._host.used(self._model)) > 1:
            assert encoder is not None
            return torch.cat([encoder, hidden], dim=1)  # text first, in all families with a joint second stack
        return hidden

    def _forecast(self, block: _Block, args: Any, kwargs: Any) -> Any:
        assert self._memory is not None
        new = self._memory.forecast("hidden")
        if self._feature.verify:
            draft = {name: self._memory.forecast(name) for name in self._memory.cache_keys if name != "hidden"}
            args_, kwargs_ = with_streams(block.stack, args, kwargs, draft["input"], draft.get("encoder"))
            self._verified(hidden_in(block.stack, block.original(*args_, **kwargs_)), new)
        # Not `hidden`: what a ControlNet adds between the blocks is in it, and in the remembered change already.
        return answer(block.stack, self._joined(block.stack) + new if self._feature.change else new, args, kwargs)

    def estimate(self, image_tokens: int, text_tokens: int, batch: int) -> int:
        host = self._host or ModelAdapter(stacks=())
        last = host.used(self._model)[-1] if host.stacks else BlockStack("")
        tokens = image_tokens + last.joint * text_tokens
        if self._feature.verify:
            dual = "encoder" in last.returns and not last.joint
            tokens = 2 * tokens + dual * text_tokens
        return batch * tokens * host.width_of(self._model)
