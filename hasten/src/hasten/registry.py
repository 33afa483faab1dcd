"""Methods by name: `@method(...)` beside a method's dataclass makes it known to `accelerate` and the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

from hasten.errors import unknown

__all__ = ["MethodInfo", "build", "method", "methods"]


@dataclass(frozen=True)
class MethodInfo:
    """What is known of a method before it is used.

    Attributes:
        name: the name for `accelerate` and the command line.
        kind: the room it belongs to, such as `"caching"`.
        paper: where it was published.
        summary: first line of its docstring.
        parameters: names with default values.
        needs_calibration: whether it has to be fitted to a model first.
    """

    name: str
    kind: str
    paper: str
    summary: str
    parameters: dict[str, Any]
    needs_calibration: bool
    config: type[Any]


T = TypeVar("T", bound=type[Any])

_METHODS: dict[str, MethodInfo] = {}


def method(name: str, *, kind: str, paper: str, needs_calibration: bool = False) -> Callable[[T], T]:
    """Register a frozen dataclass as a method."""

    def register(config: T) -> T:
        defaults = {
            f.name: f.default_factory() if f.default_factory is not MISSING else f.default
            for f in fields(config)
            if f.init
        }
        summary = (config.__doc__ or "").strip().split("\n", 1)[0]
        _METHODS[name] = MethodInfo(name, kind, paper, summary, defaults, needs_calibration, config)
        return config

    return register


def methods() -> list[MethodInfo]:
    """Every known method, in the order of registration."""
    return list(_METHODS.values())


def info(name: str) -> MethodInfo:
    """What is known of the method called `name`.

    Raises:
        UnknownNameError: for a method that does not exist.
    """
    if name not in _METHODS:
        raise unknown("method", name, _METHODS)
    return _METHODS[name]


def build(name: str, **params: Any) -> Any:
    """The configuration of the method called `name`.

    Raises:
        UnknownNameError: for a method or a parameter that does not exist.
    """
    known = info(name)
    for parameter in params:
        if parameter not in known.parameters:
            raise unknown(f"parameter of {name}", parameter, known.parameters)
    return known.config(**params)
