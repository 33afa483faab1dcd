"""How one speaks with blocks: putting proxies in their places, reading and answering their calls, skipping them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from operator import is_
from typing import Any

from torch import Tensor, nn

from hasten.models.adapter import BlockStack, ModelAdapter
from hasten.models.proxy import Here, Proxy

__all__ = [
    "Skipped",
    "answer",
    "argument_names",
    "encoder_of",
    "filled_like",
    "hidden_in",
    "hidden_of",
    "owner_of",
    "same_blocks",
    "stream_of",
    "streams_in",
    "swapped",
    "with_streams",
]


NOWHERE = 1 << 30  # the position of an argument that there is none of


@contextmanager
def swapped(changes: list[tuple[nn.Module, str, nn.Module]], here: Here) -> Iterator[None]:
    """Put modules in the places of children, and the children back in the end, unless somebody put others there.

    Args:
        changes: parent, name of the child, and what stands for it: a proxy, or a container of proxies.
        here: of these proxies, which answer on this thread alone.
    """
    originals = [parent._modules[name] for parent, name, _ in changes]
    outer, here.inside = here.inside, True
    try:
        for parent, name, module in changes:
            parent._modules[name] = module
        yield
    finally:
        for (parent, name, module), original in zip(changes, originals, strict=True):
            if parent._modules[name] is module:
                parent._modules[name] = original
        here.inside = outer


def filled_like(container: nn.Module, blocks: list[nn.Module]) -> nn.Module:
    """A container of the same kind (`ModuleList`, `Sequential`, ...) and the same names with other blocks in it."""
    filled = copy.copy(container)
    names = [name for name, block in container._modules.items() if block is not None]
    filled.__dict__["_modules"] = dict(zip(names, blocks, strict=True))
    return filled


def same_blocks(proxies: nn.Module | None, blocks: list[nn.Module]) -> bool:
    """Whether the proxies stand for these very blocks; users replace, wrap and compile blocks between calls."""
    if proxies is None or len(proxies._modules) != len(blocks):
        return False
    return all(getattr(proxy, "original", None) is b for proxy, b in zip(proxies.children(), blocks, strict=True))


def owner_of(block: nn.Module, name: str) -> nn.Module | None:
    """The block, or what it wraps, that has a child of that name; None if neither has."""
    return next((module for module in block.modules() if name in module._modules), None)


@cache
def argument_names(kind: type) -> tuple[str, ...]:
    """Names of the arguments that the forward of a class of modules takes by position."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]  # type: ignore[attr-defined]


def _index(block: nn.Module, name: str, usual: int) -> int:
    """Where an argument comes in the block's signature; where it usually comes, for blocks that do not name it."""
    kind: Any = type(getattr(block, "_orig_mod", block))
    parameters = argument_names(kind)
    return parameters.index(name) if name in parameters else usual


def stream_of(block: nn.Module, name: str, args: Any, kwargs: Any, usual: int = 0) -> Any:
    """An argument in a call of a block, by name or by position; None if it was not given."""
    if name in kwargs:
        return kwargs[name]
    index = _index(block, name, usual)
    return args[index] if index < len(args) else None


def hidden_of(stack: BlockStack, block: nn.Module, args: Any, kwargs: Any) -> Tensor:
    """The image tokens in a call of one of the stack's blocks."""
    hidden: Tensor = stream_of(block, stack.hidden, args, kwargs)
    return hidden


def encoder_of(stack: BlockStack, block: nn.Module, args: Any, kwargs: Any) -> Tensor | None:
    """The text tokens in a call of one of the stack's blocks, if it has any."""
    return None if stack.encoder is None else stream_of(block, stack.encoder, args, kwargs, usual=1)


def with_streams(
    stack: BlockStack, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], streams: Mapping[str, Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with other tokens: `"hidden"`, `"encoder"` or a stream's own name."""
    positional, named = list(args), dict(kwargs)
    for stream, value in streams.items():
        name = {"hidden": stack.hidden, "encoder": stack.encoder}.get(stream, stream)
        if name in named:
            named[name] = value
        elif name is not None:
            positional[_index(block, name, usual=int(stream == "encoder"))] = value
    return tuple(positional), named


def hidden_in(stack: BlockStack, output: Any) -> Tensor:
    """The image tokens in what one of the stack's blocks returned."""
    return output[stack.returns.index("hidden")] if isinstance(output, (tuple, list)) else output


def streams_in(stack: BlockStack, output: Any) -> dict[str, Tensor]:
    """What has to be forecast of what the last block of a stack returned: image tokens and further streams."""
    outputs = output if isinstance(output, (tuple, list)) else (output,)
    named = {name: value for name, value in zip(stack.returns, outputs, strict=False) if value is not None}
    return {name: value for name, value in named.items() if name in ("hidden", *stack.streams)}


def answer(stack: BlockStack, block: nn.Module, args: Any, kwargs: Any, streams: Mapping[str, Tensor]) -> Any:
    """What a block of the stack would return with these streams, and with the others as they were given to it."""
    answers = tuple(
        None if name is None else streams[name] if name in streams else _given(stack, block, name, args, kwargs)
        for name in stack.returns
    )
    return answers[0] if len(answers) == 1 and not stack.wrapped else answers


def _given(stack: BlockStack, block: nn.Module, name: str, args: Any, kwargs: Any) -> Any:
    if name == "hidden":
        return hidden_of(stack, block, args, kwargs)
    return encoder_of(stack, block, args, kwargs) if name == "encoder" else stream_of(block, name, args, kwargs)


class _PassThrough(Proxy):
    """A block that does nothing: returns what it was given, in the order in which its stack returns it.

    Every block of every skipped step comes here: no more is done than is needed, and not by way of `nn.Module`'s call.
    """

    def __init__(self, original: nn.Module, stack: BlockStack, here: Here) -> None:
        super().__init__(original, here)
        self._streams, self._alone = stack.returns, len(stack.returns) == 1 and not stack.wrapped
        self._places = tuple(_place(stack, original, name) for name in stack.returns)
        names = [name for name, _ in self._places]
        # Most blocks have two streams, of the image and of the text.
        self._pair = names if len(names) == 2 and None not in names else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.here.inside:
            return self.original(*args, **kwargs)
        pair = self._pair
        if pair is not None:
            one, other = pair
            if one in kwargs and other in kwargs:
                return kwargs[one], kwargs[other]
        given = []
        for name, index in self._places:
            given.append(kwargs[name] if name in kwargs else args[index] if index < len(args) else None)
        return given[0] if self._alone else tuple(given)


def _place(stack: BlockStack, block: nn.Module, stream: str | None) -> tuple[str | None, int]:
    """Name and position of the argument with a stream; of no argument for what a block returns besides."""
    name = {"hidden": stack.hidden, "encoder": stack.encoder}.get(stream or "", stream)
    return name, NOWHERE if name is None else _index(block, name, usual=int(stream == "encoder"))


class _Last(_PassThrough):
    """The last block of a skipped forward: returns the forecast streams."""

    def __init__(
        self, original: nn.Module, stack: BlockStack, here: Here, forecast: Callable[[], Mapping[str, Tensor]]
    ) -> None:
        super().__init__(original, stack, here)
        self.forecast = forecast

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.here.inside:
            return self.original(*args, **kwargs)
        streams = self.forecast()
        given: list[Any] = []
        for stream, (name, index) in zip(self._streams, self._places, strict=True):
            if stream is not None and stream in streams:
                given.append(streams[stream])
            else:
                given.append(kwargs[name] if name in kwargs else args[index] if index < len(args) else None)
        return given[0] if self._alone else tuple(given)


class _Beside(_PassThrough):
    """A block beside the stacks: does nothing until the forecast is there, and what it always did from then on."""

    def __init__(self, original: nn.Module, stack: BlockStack, skipped: Skipped) -> None:
        super().__init__(original, stack, skipped.here)
        self.__dict__["skipped"] = skipped

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs) if self.skipped.asked else super().__call__(*args, **kwargs)


class Skipped:
    """The blocks of a transformer, none of which runs: the last one returns what is forecast.

    Args:
        model: the transformer.
        adapter: how it is laid out.
        forecast: gives the streams that leave the last block, by name.
    """

    def __init__(self, model: nn.Module, adapter: ModelAdapter, forecast: Callable[[], Mapping[str, Tensor]]) -> None:
        self._model, self._adapter, self._given = model, adapter, forecast
        self._proxies: dict[str, nn.Module] = {}
        self._originals: dict[str, list[nn.Module]] = {}
        self.here = Here()
        self.asked = False  # whether the forward under way has come to the last block

    @contextmanager
    def inside(self) -> Iterator[None]:
        """For the length of one forward."""
        self.asked = False
        model, kept = self._model, [(stack, stack.blocks(self._model)) for stack in self._adapter.stacks]
        last = next(stack for stack, blocks in reversed(kept) if blocks and not stack.side)
        changes = [
            (*stack.holder(model), self._filled(stack, blocks, stack is last)) for stack, blocks in kept if blocks
        ]
        with swapped(changes, self.here):
            yield

    def _filled(self, stack: BlockStack, blocks: list[nn.Module], last: bool) -> nn.Module:
        """As many proxies as blocks, since some models read the length of the list or count along; made once."""
        known = self._originals.get(stack.name, [])
        if len(known) != len(blocks) or not all(map(is_, known, blocks)):
            self._originals[stack.name] = blocks
            proxies: list[nn.Module] = [
                _Beside(block, stack, self) if stack.side else _PassThrough(block, stack, self.here) for block in blocks
            ]
            if last:
                proxies[-1] = _Last(blocks[-1], stack, self.here, self._forecast)
            self._proxies[stack.name] = filled_like(stack.container(self._model), proxies)
        return self._proxies[stack.name]

    def _forecast(self) -> Mapping[str, Tensor]:
        self.asked = True
        return self._given()
