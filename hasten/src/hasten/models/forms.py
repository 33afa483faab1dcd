"""What a module returned, without the numbers: so that a skipped step can return the same with forecast numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.errors import AdapterError

__all__ = ["Form", "tensors_in"]

_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.Size)


class _Place:
    """Stands for a tensor in a form."""

    def __init__(self, index: int) -> None:
        self.index = index


class Form:
    """The form of an output: a tensor, or tuples, lists, dictionaries and data classes of tensors and plain values.

    Args:
        output: what a module returned.
        whose: what returned it, for the error.

    Attributes:
        tensors: of the output, in order; dropped by `forget`.

    Raises:
        AdapterError: if there is something in it that cannot be forecast (a cache of keys and values, say).
    """

    def __init__(self, output: Any, whose: str) -> None:
        self.tensors: list[Tensor] = []
        self._tree = self._taken(output, whose)
        self._likes = [(tensor.shape, tensor.dtype, tensor.device) for tensor in self.tensors]

    def forget(self) -> Form:
        """Let go of the tensors."""
        self.tensors = []
        return self

    def _taken(self, value: Any, whose: str) -> Any:
        if isinstance(value, Tensor):
            self.tensors.append(value)
            return _Place(len(self.tensors) - 1)
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, (tuple, list, dict)) or is_dataclass(value):
            return type(value), {key: self._taken(item, whose) for key, item in _items(value)}
        raise AdapterError(
            f"{whose} returns a {type(value).__name__}, which cannot be forecast; expected tensors, or tuples, lists, "
            "dictionaries and data classes of tensors. Call it without whatever makes it return that"
        )

    def build(self, make: Callable[[int], Tensor]) -> Any:
        """An output of this form, `make(i)` giving its tensors."""
        return _built(self._tree, make)

    def filler(self) -> Any:
        """An output of this form that nobody reads, since everything that it feeds is forecast."""

        def make(i: int) -> Tensor:
            shape, dtype, device = self._likes[i]
            return torch.empty(shape, dtype=dtype, device=device)

        return self.build(make)


def _items(value: Any) -> list[tuple[Any, Any]]:
    if is_dataclass(value):  # outputs of diffusers are dictionaries, too, but leave out what is None
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    return list(value.items()) if isinstance(value, dict) else list(enumerate(value))


def _built(tree: Any, make: Callable[[int], Tensor]) -> Any:
    if isinstance(tree, _Place):
        return make(tree.index)
    if not (isinstance(tree, tuple) and len(tree) == 2 and isinstance(tree[0], type)):
        return tree
    kind, items = tree
    values = {key: _built(item, make) for key, item in items.items()}
    if is_dataclass(kind):
        make_output: Any = kind
        return make_output(**values)
    if issubclass(kind, dict):
        return kind(values)
    return kind(*values.values()) if hasattr(kind, "_fields") else kind(values.values())


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of an output, in order, whatever else is in it."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_in(item)]
    if isinstance(value, dict) or (is_dataclass(value) and not isinstance(value, type)):
        return [tensor for _, item in _items(value) for tensor in tensors_in(item)]
    return []
