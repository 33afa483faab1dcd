"""Methods by name, and method expressions such as `"dvg:budget=0.5+foca:interval=4"`.

`@method(...)` beside a method's dataclass makes it known to `accelerate` and the command line.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

from hasten.errors import ConfigError, unknown
from hasten.parameters import Parameter, from_text, parameters, write

__all__ = ["MethodInfo", "build", "format", "info", "method", "methods", "parse", "split", "table"]

# A plus before a name, not one within a number (1e+3) or a file's name.
COLON = re.compile(r":(?=\s*[A-Za-z_]\w*\s*=)")
PLUS = re.compile(r"\+(?=[A-Za-z][\w-]*(?:[:+]|$))")


@dataclass(frozen=True)
class MethodInfo:
    """What is known of a method before it is used.

    Attributes:
        name: the name for `accelerate` and the command line.
        kind: the room it belongs to, such as `"caching"`.
        paper: where it was published.
        summary: first line of its docstring.
        parameters: its declared parameters by name.
        needs_calibration: whether it has to be fitted to a model first.
        config: its class.
    """

    name: str
    kind: str
    paper: str
    summary: str
    parameters: dict[str, Parameter]
    needs_calibration: bool
    config: type[Any]


T = TypeVar("T", bound=type[Any])

_METHODS: dict[str, MethodInfo] = {}
# Rooms whose methods come with the library. The registry stands under them and names them only here: they are imported
# when a method is first looked up, and register themselves.
ROOMS = ("hasten.caching.methods", "hasten.solvers", "hasten.resolution.methods", "hasten.streaming.methods")


def _known() -> dict[str, MethodInfo]:
    for room in ROOMS:
        import_module(room)
    return _METHODS


def method(name: str, *, kind: str, paper: str, needs_calibration: bool = False) -> Callable[[T], T]:
    """Register a frozen dataclass as a method; its docstring gets the declared parameters."""

    def register(config: T) -> T:
        declared = parameters(config)
        text = (config.__doc__ or "").strip()
        summary = text.split("\n", 1)[0]
        lines = [f"    {p.name}: {p.meaning} ({p.expected})." for p in declared.values() if p.meaning]
        config.__doc__ = "\n".join([text, "", "Args:", *lines]) if lines else text
        _METHODS[name] = MethodInfo(name, kind, paper, summary, declared, needs_calibration, config)
        return config

    return register


def methods() -> list[MethodInfo]:
    """Every known method, in the order of registration."""
    return list(_known().values())


def info(name: str) -> MethodInfo:
    """What is known of the method called `name`.

    Raises:
        UnknownNameError: for a method that does not exist.
    """
    known = _known()
    if name not in known:
        raise unknown("method", name, known)
    return known[name]


def build(name: str, **params: Any) -> Any:
    """The configuration of the method called `name`.

    Raises:
        UnknownNameError: for a method or a parameter that does not exist.
        ConfigError: for a value that cannot work.
    """
    known = info(name)
    for parameter in params:
        if parameter not in known.parameters:
            raise unknown(f"parameter of {name}", parameter, known.parameters)
    return known.config(**params)


def table(name: str) -> str:
    """The parameters of a method as a Markdown table."""
    rows = [
        f"| `{p.name}` | {p.expected} | `{p.default!r}` | {p.meaning} |".replace("'", '"')
        for p in info(name).parameters.values()
    ]
    return "\n".join(["| parameter | values | default | meaning |", "|---|---|---|---|", *rows])


# --- method expressions


def split(text: str) -> list[tuple[str, dict[str, str]]]:
    """Names of methods and the texts of their parameters, such as `dvg` and `foca` of `dvg:budget=0.5+foca:interval=4`.

    Raises:
        ConfigError: for what is no `parameter=value`, and for a parameter that is there twice.
    """
    found = []
    for part in PLUS.split(text.strip()):
        name, colon, rest = part.partition(":")
        assignments = COLON.split(rest) if colon else []  # not those within a path
        texts = {}
        for assignment in assignments:
            key, equals, value = assignment.partition("=")
            if not equals:
                raise ConfigError(
                    f"{assignment!r} in {text!r} is not parameter=value; write for instance hicache:order=1:sigma=0.7"
                )
            if key.strip() in texts:
                raise ConfigError(f"{key.strip()!r} is there twice in {text!r}; give it once")
            texts[key.strip()] = value.strip()
        found.append((name.strip(), texts))
    return found


def parse(text: str) -> tuple[Any, ...]:
    """The methods of an expression: `name`, `name:parameter=value:parameter=value`, or several with a plus between.

    Values are written as the parameter's declaration reads them: numbers, names, `true`, `false`, `none`, paths, and
    tuples with slashes (`steps=0/1/2/4/9`).

    Raises:
        UnknownNameError: for a method or a parameter that does not exist.
        ConfigError: for a value that cannot work.
    """
    return tuple(build(name, **from_text(info(name).config, texts, name)) for name, texts in split(text))


def format(*chosen: Any) -> str:
    """The expression that `parse` reads as these methods; parameters at their defaults are left out.

    Raises:
        ConfigError: for an object that is no registered method, or holds what was not read from a file.
    """
    names = {known.config: name for name, known in _known().items()}
    texts = []
    for one in chosen:
        if type(one) not in names:
            raise ConfigError(f"{reprlib.repr(one)} is no registered method; give one such as hasten.HiCache()")
        values = {
            p.name: getattr(one, p.name) for p in parameters(type(one)).values() if getattr(one, p.name) != p.default
        }
        texts.append(":".join([names[type(one)], *(f"{name}={write(value)}" for name, value in values.items())]))
    return "+".join(texts)
