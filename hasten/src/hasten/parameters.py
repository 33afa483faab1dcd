"""Declared parameters: type, range or choices, meaning and default of a value, each said once, in a dataclass field.

    order: Annotated[int, Range(0), "highest difference; 0 is reuse"] = 2
    ladder: Annotated[Literal["recursive", "divided"], "how differences are taken"] = "recursive"

From the declaration come the checks and the text of their errors, the conversion of text, help, tables and tests.
"""

from __future__ import annotations

import difflib
import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from hasten.errors import ConfigError, brief, unknown

__all__ = [
    "MOST_GUIDANCE",
    "MOST_PIXELS",
    "MOST_STEPS",
    "PRECISIONS",
    "Declared",
    "Names",
    "Parameter",
    "Range",
    "Text",
    "accepted",
    "choices",
    "from_text",
    "parameters",
    "write",
]

# Of what several rooms take: numbers beyond are slips, or ask for more time or memory than there is.
MOST_PIXELS = 16_384  # of a side
MOST_STEPS = 10_000  # of a sampler; models are trained with a thousand
MOST_GUIDANCE = 1_000
PRECISIONS = ("float32", "float16", "bfloat16")  # that pipelines are loaded in


@dataclass(frozen=True)
class Range:
    """Limits of the numbers of a parameter, also of those in a tuple.

    Args:
        least, most: smallest and largest value that is allowed.
        above, below: limits that are not allowed themselves.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: object) -> bool:
        return (
            isinstance(value, (int, float))
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self == Range(least=self.least) and self.least is not None:
            return f"of {_plainly(self.least)} or more"
        limits = {"from": self.least, "above": self.above, "to": self.most, "below": self.below}
        return " ".join(f"{word} {_plainly(limit)}" for word, limit in limits.items() if limit is not None)


def _plainly(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


class Names(tuple[str, ...]):
    """The names that a text, or the texts in a tuple, may have."""

    def __new__(cls, names: Iterable[str]) -> Names:
        return super().__new__(cls, tuple(names))


@dataclass(frozen=True)
class Text:
    """A text of a parameter, also those in a tuple; without, a text is the path of a file.

    Args:
        least, most: characters.
    """

    least: int = 0
    most: int | None = None

    def __contains__(self, value: object) -> bool:
        return isinstance(value, str) and self.least <= len(value) and (self.most is None or len(value) <= self.most)

    def __str__(self) -> str:
        if self.most is not None:
            return f"text of {self.least} to {self.most} characters"
        return "text that is not empty" if self.least == 1 else "text"


Limit = Range | Names | Text | None


class _MisfitError(Exception):
    """A value that a declaration does not allow."""


@dataclass(frozen=True)
class Parameter:
    """One declared parameter of a method.

    Attributes:
        name: of the field.
        hint: its type, with range or names as `Annotated` has them.
        default: its default; `dataclasses.MISSING` if it has to be given.
        meaning: in one line.
    """

    name: str
    hint: Any
    default: Any
    meaning: str

    @property
    def expected(self) -> str:
        """The values that are allowed, as text."""
        return _expected(self.hint)

    def accept(self, value: Any, owner: str) -> Any:
        """The value in the declared type, such as a tuple for a list; `owner` is whose parameter it is.

        Raises:
            ConfigError: for a wrong type or a value out of range.
        """
        try:
            return _fit(self.hint, value)
        except _MisfitError:
            raise self._refusal(value, owner) from None

    def read(self, text: str, owner: str) -> Any:
        """The value that a text of the command line means; otherwise as `accept`."""
        try:
            return _read(self.hint, text)
        except _MisfitError:
            raise self._refusal(text, owner) from None

    def _refusal(self, value: Any, owner: str) -> ConfigError:
        near = difflib.get_close_matches(str(value), [str(choice) for choice in choices(self.hint)], n=1, cutoff=0.5)
        # The right word alone is one where several are taken.
        meant = (value,) if near and near[0] == value else near[0] if near else None
        remedy = "" if meant is None else f"; did you mean {meant!r}?"
        if not near and self.default is not MISSING:
            remedy = f"; leave it out for {self.default!r}"
        return ConfigError(f"{owner}: {self.name} must be {self.expected}, got {brief(value)}{remedy}")


def _narrowed(hint: Any, limit: Limit) -> tuple[Any, Limit]:
    """The type that `Annotated` wraps, and its limit."""
    if get_origin(hint) is not Annotated:
        return hint, limit
    inner, *extras = get_args(hint)
    return _narrowed(inner, next((extra for extra in extras if isinstance(extra, (Range, Names, Text))), limit))


def _members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else ()


def _first(members: Iterable[Any], convert: Callable[[Any], Any]) -> Any:
    for member in members:
        try:
            return convert(member)
        except _MisfitError:
            continue
    raise _MisfitError


def _fit(hint: Any, value: Any, limit: Limit = None) -> Any:
    """`value` as the hint has it.

    Raises:
        _MisfitError: if it is of another type or out of range.
    """
    hint, limit = _narrowed(hint, limit)
    origin, args = get_origin(hint), get_args(hint)
    if members := _members(hint):
        return _first(members, lambda member: _fit(member, value, limit))
    if origin is tuple:
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value):
            items = args[:1] * len(value) if args[-1] is ... else args
            if len(items) == len(value):
                return tuple(_fit(item, part, limit) for item, part in zip(items, value, strict=True))
    elif origin is Literal:
        if any(type(value) is type(arg) and value == arg for arg in args):
            return value
    elif hint is str:
        if isinstance(limit, Names):
            if isinstance(value, str) and value in limit:
                return value
        elif isinstance(limit, Text):
            if value in limit:
                return value
        elif isinstance(value, (str, os.PathLike)) and os.fspath(value):
            return os.fspath(value)
    elif hint in (int, float):
        if isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool):
            number = hint(value)
            if math.isfinite(number) and (not isinstance(limit, Range) or number in limit):
                return number
    elif hint is Any or isinstance(value, hint):
        return value
    raise _MisfitError


def _read(hint: Any, text: str, limit: Limit = None, separators: str = "/x") -> Any:
    """What a text means where `hint` is expected; `0.5x0.4/1x1` is a tuple of tuples."""
    hint, limit = _narrowed(hint, limit)
    origin, args = get_origin(hint), get_args(hint)
    if members := _members(hint):
        return _first(members, lambda member: _read(member, text, limit, separators))
    try:
        if origin is tuple:
            parts = text.split(separators[0])
            items = args[:1] * len(parts) if args[-1] is ... else args
            return tuple(_read(item, part, limit, separators[1:]) for item, part in zip(items, parts, strict=True))
        if origin is Literal or hint in (bool, NoneType):
            known = {bool: (True, False), NoneType: (None,)}.get(hint, args)
            return {write(value): value for value in known}[text]
        if hint in (int, float, str):
            return _fit(hint, hint(text), limit)
    except (ValueError, KeyError):
        pass
    raise _MisfitError


def write(value: Any, separators: str = "/x") -> str:
    """The text that `_read` reads as the value."""
    if isinstance(value, tuple):
        return separators[0].join(write(part, separators[1:]) for part in value)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, int, float)):
        return str(value)
    file = getattr(value, "file", None)
    if file is None:
        raise ConfigError(f"{brief(value)} has no text of its own; save it and give the path of its file")
    return str(file)


def _expected(hint: Any, limit: Limit = None, many: bool = False) -> str:
    """The values that a hint allows, as text; of `many` in a tuple, in the plural."""
    hint, limit = _narrowed(hint, limit)
    origin, args = get_origin(hint), get_args(hint)
    if members := _members(hint):
        return _either([one for member in members for one in _alternatives(member, limit, many)])
    if origin is tuple:
        several = _expected(args[0], limit, many=True)
        return f"one or more {several}" if args[-1] is ... else f"{'groups of ' * many}{len(args)} {several}"
    if listed := choices(hint, limit):
        return _either([repr(one) for one in listed])
    if hint in (int, float):
        noun = {int: "whole number", float: "number"}[hint]
        return f"{noun + 's' if many else 'a ' + noun} {limit if isinstance(limit, Range) else ''}".strip()
    text = str(limit) if isinstance(limit, Text) else "the path of a file"
    known = {str: text, bool: "True or False", NoneType: "None"}
    return known.get(hint, f"a {getattr(hint, '__name__', hint)}") + ("s" if many and hint not in known else "")


def _alternatives(hint: Any, limit: Limit, many: bool) -> list[str]:
    own, _ = _narrowed(hint, limit)
    listed = () if get_origin(own) is tuple else choices(hint, limit)
    return [repr(one) for one in listed] or [_expected(hint, limit, many)]


def _either(texts: Sequence[str]) -> str:
    *most, last = texts
    return f"{', '.join(most)} or {last}" if most else last


def accepted(owner: str, name: str, hint: Any, value: Any) -> Any:
    """An argument of a function in the type that a hint declares, such as `tuple[Annotated[int, Range(1)], ...]`.

    Raises:
        ConfigError: for a wrong type or a value out of range.
    """
    return Parameter(name, hint, MISSING, "").accept(value, owner)


def choices(hint: Any, limit: Limit = None) -> tuple[Any, ...]:
    """The values that a hint lists: of a `Literal`, of `Names`, of the alternatives of a union."""
    hint, limit = _narrowed(hint, limit)
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) is None:
        return tuple(limit) if hint is str and isinstance(limit, Names) else ()
    return tuple(choice for member in get_args(hint) if member is not ... for choice in choices(member, limit))


def parameters(target: Callable[..., Any]) -> dict[str, Parameter]:
    """The parameters of a dataclass, or of a function those that have a default, by name.

    A field that a subclass gives another default or a narrower type keeps what its base declares besides.
    """
    return _parameters(target)


@cache
def _parameters(target: Any) -> dict[str, Parameter]:
    if not isinstance(target, type):
        hints = get_type_hints(target, include_extras=True)
        given = inspect.signature(target).parameters.values()
        return {p.name: _parameter(p.name, [hints[p.name]], p.default) for p in given if p.default is not p.empty}
    lineage = [get_type_hints(base, include_extras=True) for base in target.__mro__]
    return {
        f.name: _parameter(
            f.name,
            [hints[f.name] for hints in lineage if f.name in hints],
            f.default if f.default_factory is MISSING else f.default_factory(),
        )
        for f in fields(target)
        if f.init
    }


def _parameter(name: str, hints: Sequence[Any], default: Any) -> Parameter:
    """From the hints of a field, the most derived class first."""
    hint = hints[0]
    declared = next((other for other in hints if get_origin(other) is Annotated), None)
    extras = () if declared is None else get_args(declared)[1:]
    if extras and hint is not declared:
        hint = Annotated[(hint, *extras)]
    return Parameter(name, hint, default, next((extra for extra in extras if isinstance(extra, str)), ""))


class Declared:
    """Base of dataclasses whose values are checked against their declarations."""

    def __post_init__(self) -> None:
        for name, parameter in parameters(type(self)).items():
            object.__setattr__(self, name, parameter.accept(getattr(self, name), type(self).__name__))
        self.check()

    def check(self) -> None:
        """Rules between parameters, and files to read; an override calls its base's first.

        Raises:
            ConfigError: if the values cannot work together.
        """


def from_text(target: Any, texts: Mapping[str, str], owner: str | None = None) -> dict[str, Any]:
    """The values that texts mean for the parameters of a dataclass or a function.

    Args:
        target: what declares them.
        texts: by name.
        owner: whose parameters an error says they are; the target's name by default.

    Raises:
        UnknownNameError: for a parameter that does not exist.
        ConfigError: for a value that cannot work.
    """
    known, owner = parameters(target), owner or target.__name__
    for name in texts:
        if name not in known:
            raise unknown(f"parameter of {owner}", name, known)
    return {name: known[name].read(text, owner) for name, text in texts.items()}
