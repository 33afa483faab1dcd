"""Arms of resolution methods, alone or around a cache, and the plain samplers that cost as much.

A resolution method computes every step, on fewer tokens, so that a number of steps says little about its cost. Two
plain samplers stand beside it: one with as many evaluations, and one with as many operations, as they were counted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from hasten.bench.arms import Accelerated, Arm, one_line
from hasten.bench.plain import plain_arms
from hasten.bench.requests import Request
from hasten.bench.sampling import plain
from hasten.bench.thresholds import Trials

__all__ = ["PlainCost", "staged_arms"]

log = logging.getLogger(__name__)


@dataclass
class PlainCost:
    """What the plain sampler costs with any number of steps: the same for each, and something for text and decoder."""

    trials: Trials

    @cached_property
    def _two(self) -> tuple[float, float]:
        return self.trials.cost(plain, 2, "plain")

    @cached_property
    def _three(self) -> tuple[float, float]:
        return self.trials.cost(plain, 3, "plain")

    def steps_for(self, flops: float) -> int:
        """The number of steps whose operations come nearest."""
        two, three = self._two[0], self._three[0]
        return max(1, 2 + round((flops - two) / (three - two)))

    def computed(self, layer_calls: float) -> int:
        """The number of steps with so many calls of the counted layer."""
        return round(layer_calls / (self._three[1] - self._two[1]))


def staged_arms(requests: Sequence[Request], trials: Trials) -> list[Arm]:
    """Every resolution method and combination at its own number of steps, each after its plain samplers.

    One that the model cannot be drawn with is an arm with an error; the others are measured all the same. The plain
    sampler with all steps of the bench is its baseline and not repeated.

    Args:
        requests: with a resolution method; a cache in one keeps the interval that it was written with.
        trials: draws its prompts with each, to see what it computes.
    """
    cost = PlainCost(trials)
    arms: list[Arm] = []
    for request in requests:
        trials.progress(f"counting {request.label}")
        arm = _arm(request, trials.steps)
        try:
            flops, layer_calls = trials.cost(arm.attach, arm.steps, request.label)
        except Exception as error:  # whatever it is, the other arms can be measured
            log.warning("%s cannot be measured", request.label, exc_info=error)
            arms.append(replace(arm, error=one_line(error)))
            continue
        computed = cost.computed(layer_calls)
        (equal,) = plain_arms([cost.steps_for(flops)], ("euler",))
        equal = replace(equal, groups=(computed,), note=f"as many FLOPs as {request.label}")
        beside = [item for item in (*plain_arms([computed]), equal) if not _is_baseline(item, trials.steps)]
        arms += [*beside, replace(arm, computed_steps=computed)]
    return arms


def _is_baseline(arm: Arm, steps: int) -> bool:
    return arm.method == "euler" and arm.steps == steps


def _arm(request: Request, total: int) -> Arm:
    steps = request.steps(total)
    return Arm(
        f"{request.label}-{steps}",
        request.label,
        "hasten",
        request.params,
        steps,
        steps,
        Accelerated(request.caching, request.resolution),
        staged=True,
    )
