"""What a file has to hold, as declarations: annotations for plain values, `Array` for tensors."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ConfigError, brief

__all__ = [
    "Array",
    "as_path",
    "check_arrays",
    "conform",
    "decreasing",
    "increasing",
    "orthonormal",
    "shown",
    "step_list",
    "symmetric",
]

Check = Callable[[NDArray[Any]], str | None]


def shown(value: object) -> str:
    """A value out of a file for an error message: quoted, on one line, short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def as_path(path: object) -> Path:
    """A path that a caller gave.

    Raises:
        ConfigError: if it is none.
    """
    if isinstance(path, (str, os.PathLike)) and isinstance(os.fspath(path), str):
        return Path(path)
    raise ConfigError(f"a path must be text, such as 'file.safetensors', got {brief(path)}")


def conform(value: Any, kind: Any, where: str) -> Any:
    """A value out of JSON as an annotation wants it: lists become tuples, objects become dataclasses.

    Args:
        value: what was read.
        kind: `str`, `int`, `float`, `bool`, `None`, `Any`, a `Literal`, a union, `tuple[...]`, `list[...]`,
            `dict[str, ...]`, or a dataclass of such fields.
        where: name of the value, for messages.

    Raises:
        ValueError: naming the value that does not conform.
    """
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if is_dataclass(kind) and isinstance(kind, type):
        return _conform_object(value, kind, where)
    if origin in (Union, UnionType):
        for option in args:
            try:
                return conform(value, option, where)
            except ValueError:
                continue
    elif origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in args):
            return value
    elif origin in (tuple, list) and isinstance(value, list):
        if origin is list or args[-1:] == (Ellipsis,):
            made = [conform(item, args[0], f"{where}[{i}]") for i, item in enumerate(value)]
            return made if origin is list else tuple(made)
        if len(args) == len(value):
            return tuple(conform(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True)))
    elif origin is dict and isinstance(value, dict) and not any(map(_has_surrogates, value)):
        return {name: conform(item, args[1], f"{where}[{shown(name)}]") for name, item in value.items()}
    elif kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    elif kind in (None, type(None)) and value is None:
        return None
    elif kind in (str, int, bool) and type(value) is kind and not _has_surrogates(value):
        return value
    raise ValueError(f"{where} is {shown(value)}, expected {_name(kind)}")


def _conform_object(value: Any, kind: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {shown(value)}, expected an object")
    hints, known = get_type_hints(kind), fields(kind)
    if unknown := sorted(set(value) - {f.name for f in known}):
        raise ValueError(f"{where} has an unknown entry {shown(unknown[0])}")
    needed = [f.name for f in known if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in value]:
        raise ValueError(f"{where} lacks {missing[0]!r}")
    return kind(**{name: conform(item, hints[name], f"{where}.{name}") for name, item in value.items()})


def _has_surrogates(value: object) -> bool:
    """Whether a text holds halves of characters, which JSON allows and no terminal or file takes."""
    return isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value)


def _name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_name, get_args(kind)))
    names = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false", type(None): "null"}
    return names.get(kind, str(kind))


@dataclass(frozen=True)
class Array:
    """What a tensor has to be.

    Attributes:
        dtype: floating-point numbers (which have to be finite) or whole ones.
        shape: a number, or a letter for a size that is the same wherever it occurs; all sizes are at least 1.
        checks: functions that return a complaint, or None.
        low, high: least and largest value, if any.
        needed: whether there has to be one.
    """

    dtype: Literal["float", "integer"]
    shape: tuple[int | str, ...]
    checks: tuple[Check, ...] = ()
    low: float | None = None
    high: float | None = None
    needed: bool = True


def check_arrays(
    arrays: Mapping[str, NDArray[Any]], declared: Mapping[str, Array], sizes: Mapping[str, int] | None = None
) -> None:
    """Compare tensors with their declarations.

    Args:
        arrays: tensors by name.
        declared: declarations by name; `{n}` in a name stands for a number if the letter `n` occurs in the shape, and
            then is that size, else for any text. Each needs one tensor at least, and sizes with a letter agree among
            the tensors whose names have the same values for their placeholders.
        sizes: letters that are known.

    Raises:
        ValueError: naming the tensor and what is wrong.
    """
    patterns = {name: _pattern(name, array) for name, array in declared.items()}
    found = set()
    scopes: dict[tuple[str, ...], dict[str, int]] = {}
    for name, array in arrays.items():
        hit = next(((known, m) for known, pattern in patterns.items() if (m := pattern.fullmatch(name))), None)
        if hit is None:
            raise ValueError(f"there is no place for a tensor {shown(name)}")
        known, match = hit
        found.add(known)
        scope = scopes.setdefault(match.groups(), dict(sizes or {}))
        scope.update({key: int(text) for key, text in match.groupdict().items() if key in declared[known].shape})
        if complaint := _complaint(array, declared[known], scope):
            raise ValueError(f"{shown(name)} {complaint}")
    if missing := [name for name, array in declared.items() if array.needed and name not in found]:
        raise ValueError(f"it lacks {missing[0]!r}")


def _pattern(name: str, array: Array) -> re.Pattern[str]:
    def group(match: re.Match[str]) -> str:
        return f"(?P<{match[1]}>{'[1-9][0-9]{0,5}' if match[1] in array.shape else '.+'})"

    return re.compile(re.sub(r"\{(\w+)\}", group, name), re.DOTALL)


def _complaint(array: NDArray[Any], declared: Array, sizes: dict[str, int]) -> str | None:
    if array.dtype.kind not in {"float": "f", "integer": "iu"}[declared.dtype]:
        return f"holds {array.dtype}, expected {declared.dtype} numbers"
    wanted = [sizes.get(size, size) if isinstance(size, str) else size for size in declared.shape]
    if array.ndim != len(wanted) or 0 in array.shape:
        return f"has the shape {list(array.shape)}, expected {wanted}"
    for size, name in zip(array.shape, declared.shape, strict=True):
        if (sizes.setdefault(name, size) if isinstance(name, str) else name) != size:
            return f"has the shape {list(array.shape)}, expected {wanted}"
    if declared.dtype == "float" and not np.isfinite(array).all():
        return "has a value that is not finite"
    if declared.low is not None and (least := array.min()) < declared.low:
        return f"has the value {least}, expected at least {declared.low}"
    if declared.high is not None and (largest := array.max()) > declared.high:
        return f"has the value {largest}, expected at most {declared.high}"
    return next((complaint for check in declared.checks if (complaint := check(array))), None)


def symmetric(matrices: NDArray[Any]) -> str | None:
    """A complaint unless matrices `[..., n, n]` are symmetric but for rounding, without negative diagonals."""
    diagonals = np.diagonal(matrices, axis1=-2, axis2=-1)
    if (diagonals < 0).any():
        return "has a negative number on the diagonal"
    tolerance = 1e-4 * diagonals.max()
    return None if (np.abs(matrices - np.swapaxes(matrices, -1, -2)) <= tolerance).all() else "is not symmetric"


def orthonormal(basis: NDArray[Any]) -> str | None:
    """A complaint unless the columns of `[n, k]` are orthonormal but for rounding."""
    if basis.shape[1] > basis.shape[0]:
        return f"has {basis.shape[1]} columns of {basis.shape[0]} numbers, which cannot be orthonormal"
    # `B^T B z = z` for a z in general position is as good as `B^T B = I`, and needs no matrix product.
    probe = np.random.default_rng(0).standard_normal(basis.shape[1])
    again = (basis.T @ (basis @ probe)).astype(np.float64)
    near = np.abs(again - probe).max() <= 1e-3 * np.abs(probe).max()
    return None if near else "does not have orthonormal columns"


def increasing(values: NDArray[Any]) -> str | None:
    """A complaint unless each number is larger than the one before."""
    return None if (values[1:] > values[:-1]).all() else "does not increase strictly"


def decreasing(values: NDArray[Any]) -> str | None:
    """A complaint unless each number is smaller than the one before."""
    return None if (values[1:] < values[:-1]).all() else "does not decrease strictly"


def step_list(values: NDArray[Any]) -> str | None:
    """A complaint unless the numbers increase from 0."""
    return f"begins with {values[0]}, expected 0" if values[0] != 0 else increasing(values)
