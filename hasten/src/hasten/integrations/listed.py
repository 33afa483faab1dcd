"""Methods for denoisers in an engine's own loop, which tells nothing but how many steps it has."""

from __future__ import annotations

from dataclasses import replace

from hasten.caching.method import CachingMethod, ScheduledMethod
from hasten.caching.schedule import computed_steps

__all__ = ["listed"]


def listed(method: CachingMethod, total: int) -> CachingMethod:
    """The method with its computed steps as a list for runs of `total` steps; one with a threshold as it is.

    Raises:
        ScheduleError: if it cannot serve such runs.
    """
    if not isinstance(method, ScheduledMethod):
        return method
    steps = tuple(computed_steps(method.plan(), total))
    return replace(method, steps=steps, computed_steps=None, interval=None, schedule="uniform")
