"""Where parameters have an effect, declared beside them: what would do nothing is refused by name, or goes with the
change that makes it so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hasten.errors import ConfigError, brief
from hasten.parameters import parameters

__all__ = ["Effects", "With", "cleared", "refuse_idle"]


@dataclass(frozen=True)
class With:
    """A condition under which a parameter has an effect: another one has one of these values."""

    parameter: str
    values: tuple[Any, ...]


Effects = Mapping[str, tuple[With, ...]]  # by parameter, all conditions of it


def _idle(effects: Effects, usual: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, With]:
    """The parameters that differ from their usual values and do nothing, with what they lack."""
    return {
        name: lacking
        for name, conditions in effects.items()
        if values[name] != usual[name]
        for lacking in conditions
        if values[lacking.parameter] not in lacking.values
    }


def _usual(config: type[Any]) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in parameters(config).items()}


def refuse_idle(method: Any, effects: Effects) -> None:
    """Raise a ConfigError for a parameter that differs from its default and does nothing."""
    usual = _usual(type(method))
    for name, lacking in _idle(effects, usual, {name: getattr(method, name) for name in usual}).items():
        other, able = lacking.parameter, " or ".join(f"{lacking.parameter}={value!r}" for value in lacking.values)
        raise ConfigError(
            f"{type(method).__name__}: {name}={brief(getattr(method, name))} does nothing with "
            f"{other}={brief(getattr(method, other))}; leave it out, or use {able}"
        )


def cleared(method: Any, effects: Effects, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a method that do nothing once it is changed, at their defaults; those of the change aside."""
    usual = _usual(type(method))
    values = {name: getattr(method, name) for name in usual} | dict(changes)
    resets: dict[str, Any] = {}
    # Without one parameter another one may lose its effect.
    while idle := [name for name in _idle(effects, usual, values | resets) if name not in changes]:
        resets |= {name: usual[name] for name in idle}
    return resets
