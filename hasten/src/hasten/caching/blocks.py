"""How a site speaks with blocks: putting proxies in their places, reading and answering their calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hasten.models import BlockStack

__all__ = ["answer", "encoder_of", "hidden_in", "hidden_of", "owner_of", "same_blocks", "swapped", "with_streams"]


@contextmanager
def swapped(changes: list[tuple[nn.Module, str, nn.Module]]) -> Iterator[None]:
    """Put modules in the places of children, and the children back in the end, unless somebody put others there."""
    originals = [parent._modules[name] for parent, name, _ in changes]
    try:
        for parent, name, module in changes:
            parent._modules[name] = module
        yield
    finally:
        for (parent, name, module), original in zip(changes, originals, strict=True):
            if parent._modules[name] is module:
                parent._modules[name] = original


def same_blocks(proxies: nn.ModuleList | None, blocks: nn.ModuleList) -> bool:
    """Whether the proxies stand for these very blocks; users replace, wrap and compile blocks between calls."""
    if proxies is None or len(proxies) != len(blocks):
        return False
    return all(
        proxy.original is block
        for proxy, block in zip(proxies._modules.values(), blocks._modules.values(), strict=True)
    )


def owner_of(block: nn.Module, name: str) -> nn.Module | None:
    """The block, or what it wraps, that has a child of that name; None if neither has."""
    return next((module for module in block.modules() if name in module._modules), None)


def hidden_of(stack: BlockStack, args: Any, kwargs: Any) -> Tensor:
    """The image tokens in a call of one of the stack's blocks."""
    return kwargs[stack.hidden] if stack.hidden in kwargs else args[0]


def encoder_of(stack: BlockStack, args: Any, kwargs: Any) -> Tensor | None:
    """The text tokens in a call of one of the stack's blocks, if it has any."""
    if stack.encoder is None:
        return None
    return kwargs.get(stack.encoder, args[1] if len(args) > 1 else None)


def with_streams(
    stack: BlockStack, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor, encoder: Tensor | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with other image tokens and, unless None, other text tokens."""
    positional, named = list(args), dict(kwargs)
    for index, (name, value) in enumerate(((stack.hidden, hidden), (stack.encoder, encoder))):
        if value is None or name is None:
            continue
        if name in named:
            named[name] = value
        else:
            positional[index] = value
    return tuple(positional), named


def hidden_in(stack: BlockStack, output: Any) -> Tensor:
    """The image tokens in what one of the stack's blocks returned."""
    return output[stack.returns.index("hidden")] if isinstance(output, tuple) else output


def answer(stack: BlockStack, hidden: Tensor, args: Any, kwargs: Any) -> Any:
    """What a block of the stack would return with these image tokens and the text tokens that it was given."""
    if stack.returns == ("hidden",):
        return hidden
    encoder = encoder_of(stack, args, kwargs)
    return tuple(hidden if stream == "hidden" else encoder for stream in stack.returns)
