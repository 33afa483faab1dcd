"""The caching method where none is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from hasten import registry
from hasten.caching.effects import cleared
from hasten.caching.method import ScheduledMethod

__all__ = ["DEFAULT", "default_method"]

# What `accelerate(pipe)` takes, as a method expression: a straight line with 7/8 of its slope, less of it the stronger
# true guidance is, half of it at 5, between computed steps that are denser early. Measured with and without guidance
# (docs/which-method.md): with it a whole slope is worse, and a parabola on even steps worse than the plain sampler.
DEFAULT = "hicache:schedule=auto:order=1:sigma=0.66:guided_sigma=0.5"
NOTHING: Mapping[str, Any] = MappingProxyType({})


def default_method(given: Mapping[str, Any] = NOTHING) -> ScheduledMethod:
    """The default without what parameters that are given besides take the place of: lists of computed steps that of its
    schedule, a scale of one's own that of its scale under guidance, a scale that follows the features that of both."""
    (chosen,) = registry.parse(DEFAULT)
    assert isinstance(chosen, ScheduledMethod)
    changes: dict[str, Any] = {}
    if given.keys() & {"steps", "searched"}:
        changes["schedule"] = "uniform"
    if "sigma" in given:
        changes["guided_sigma"] = None
    return replace(chosen, **cleared(chosen, chosen.effects, given) | changes)
