"""Arms of resolution methods, alone or around a cache, and the plain samplers that cost as much.

A resolution method computes every step, on fewer tokens, so that a number of steps says little about its cost. Two
plain samplers stand beside it: one with as many evaluations, and one with as many operations, as they were counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any

from hasten import registry
from hasten.bench.arms import Accelerated, Arm, build_method, parse_options, plain_arms, reported
from hasten.bench.budget import Trials
from hasten.bench.labels import split_methods
from hasten.bench.sampling import Attach, count_flops, plain
from hasten.caching import CachingMethod
from hasten.errors import ConfigError, HastenError
from hasten.solvers.scheduler import LEAP

__all__ = ["Combination", "PlainCost", "count", "is_staged", "parse_combination", "staged_arms"]

KIND = "resolution"


def is_staged(text: str) -> bool:
    """Whether a text of the command line has to be read by `parse_combination`: a resolution method, or several.

    Raises:
        UnknownNameError: for a method that does not exist.
    """
    parts = split_methods(text)
    names = [parse_options(part)[0] for part in parts]
    return len(parts) > 1 or (names[0] != LEAP and registry.info(names[0]).kind == KIND)


@dataclass(frozen=True)
class Combination:
    """A resolution method and perhaps a cache that works within its stages.

    Attributes:
        label: as it was written.
        staged: the resolution method.
        caching: the cache.
        params: parameters, as they are reported; of two methods, by name.
    """

    label: str
    staged: Any
    caching: CachingMethod | None
    params: dict[str, Any]

    def steps(self, own: int) -> int:
        """Sampler steps: those that belong to the method (a preset of 18 evaluations), or the model's own."""
        return getattr(self.staged, "num_inference_steps", None) or own


def parse_combination(text: str) -> Combination:
    """Read a resolution method, or one and a cache: `dvg:budget=0.5+foca:interval=4`.

    Raises:
        UnknownNameError: for a method or parameter that does not exist.
        ConfigError: for anything but one resolution method and at most one cache.
    """
    parts = [parse_options(part) for part in split_methods(text)]
    if LEAP in dict(parts):
        raise ConfigError(
            f"{text!r}: leap is a scheduler, and resolution methods need the model's own; measure them apart"
        )
    built = {name: build_method(name, params) for name, params in parts}
    staged = [method for name, method in built.items() if registry.info(name).kind == KIND]
    caching = [method for method in built.values() if isinstance(method, CachingMethod)]
    if len(staged) != 1 or len(parts) != 1 + len(caching) or len(caching) > 1:
        raise ConfigError(
            f"{text!r}: a combination is one resolution method and one cache, such as dvg:budget=0.5+foca:interval=4"
        )
    params = {name: reported(method) for name, method in built.items()}
    alone = params[parts[0][0]] if len(parts) == 1 else params
    return Combination(text.strip(), staged[0], next(iter(caching), None), alone)


@dataclass
class PlainCost:
    """What the plain sampler costs with any number of steps: the same for each, and something for text and decoder."""

    trials: Trials

    @cached_property
    def _two(self) -> tuple[float, float]:
        return count(self.trials, plain, 2)

    @cached_property
    def _three(self) -> tuple[float, float]:
        return count(self.trials, plain, 3)

    def steps_for(self, flops: float) -> int:
        """The number of steps whose operations come nearest."""
        two, three = self._two[0], self._three[0]
        return max(1, 2 + round((flops - two) / (three - two)))

    def computed(self, layer_calls: float) -> int:
        """The number of steps with so many calls of the counted layer."""
        return round(layer_calls / (self._three[1] - self._two[1]))


def count(trials: Trials, attach: Attach, steps: int) -> tuple[float, float]:
    """Operations and calls of the counted layer, means over the prompts of the trials."""
    counted = [
        count_flops(trials.model, attach, steps, prompt, trials.seed + i, trials.call)
        for i, prompt in enumerate(trials.prompts)
    ]
    return fmean(flops for flops, _ in counted), fmean(sample.layer_calls for _, sample in counted)


def staged_arms(combinations: Sequence[Combination], trials: Trials) -> list[Arm]:
    """Every resolution method and combination at its own number of steps, each after its plain samplers.

    One that the model cannot be drawn with is an arm with an error; the others are measured all the same. The plain
    sampler with all steps of the bench is its baseline and not repeated.

    Args:
        combinations: a cache in one keeps the interval that it was written with.
        trials: draws its prompts with each, to see what it computes.
    """
    cost = PlainCost(trials)
    arms: list[Arm] = []
    for combination in combinations:
        trials.progress(f"counting {combination.label}")
        arm = _arm(combination, trials.steps)
        try:
            flops, layer_calls = count(trials, arm.attach, arm.steps)
        except HastenError as error:
            arms.append(replace(arm, error=" ".join(str(error).split())))
            continue
        computed = cost.computed(layer_calls)
        (equal,) = plain_arms([cost.steps_for(flops)], ("euler",))
        equal = replace(equal, groups=(computed,), note=f"as many FLOPs as {combination.label}")
        beside = [item for item in (*plain_arms([computed]), equal) if not _is_baseline(item, trials.steps)]
        arms += [*beside, replace(arm, computed_steps=computed)]
    return arms


def _is_baseline(arm: Arm, steps: int) -> bool:
    return arm.method == "euler" and arm.steps == steps


def _arm(combination: Combination, total: int) -> Arm:
    steps = combination.steps(total)
    return Arm(
        f"{combination.label}-{steps}",
        combination.label,
        "hasten",
        combination.params,
        steps,
        steps,
        Accelerated(combination.caching, combination.staged),
        staged=True,
    )
