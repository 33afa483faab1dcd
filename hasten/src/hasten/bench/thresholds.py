"""Equal budgets: the threshold at which a method computes as many steps as the others do.

A method with a threshold decides on its own how many steps it computes. To stand beside methods with a schedule it has
to be given the threshold that costs as much; it is searched on a few prompts, and what was then really computed is
reported beside the number that was asked for.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hasten.bench.sampling import Attach, Sample, count_flops, draw_sample, plain
from hasten.bench.subject import Subject
from hasten.errors import ConfigError, HastenWarning
from hasten.quality.metrics import PSNR_CEILING, over_frames, psnr

__all__ = ["Match", "Trial", "Trials", "match_computed_steps"]


@dataclass(frozen=True)
class Trial:
    """What one setting did: mean number of computed steps and mean PSNR (dB) over the trial's prompts."""

    computed: float
    psnr: float


@dataclass(frozen=True)
class Match:
    """The threshold that was found and what it did."""

    threshold: float
    trial: Trial


Recall = Callable[[str, Callable[[], tuple[float, ...]]], tuple[float, ...]]


@dataclass
class Trials:
    """Runs settings on the first prompts of a bench.

    Args:
        model: what draws.
        prompts: the prompts of the trials.
        seed: prompt `i` is drawn with seed `seed + i`.
        steps: sampler steps.
        call: further arguments of the pipeline's call.
        progress: called with a line on what is being tried.
        recall: gives what a trial of this name came to, or computes it; every trial is computed by default.
    """

    model: Subject
    prompts: list[str]
    seed: int
    steps: int
    call: dict[str, Any]
    progress: Callable[[str], None] = field(default=lambda _: None)
    recall: Recall = field(default=lambda _, compute: compute())

    @cached_property
    def _references(self) -> list[Sample]:
        return [self.draw(plain, i, self.steps) for i in range(len(self.prompts))]

    def draw(self, attach: Attach, index: int, steps: int) -> Sample:
        """What is drawn of prompt `index`; a model that is called in another way has its own."""
        return draw_sample(self.model, attach, steps, self.prompts[index], self.seed + index, self.call)

    @cached_property
    def passes(self) -> int:
        """Forwards within a step of the plain sampler."""
        (passes,) = self.recall("passes", lambda: (self._references[0].forwards / self.steps,))
        return round(passes)

    def run(self, attach: Attach, key: str) -> Trial:
        """Draw the trial's prompts and count; `key` names the setting."""
        return Trial(*self.recall(key, lambda: self.sample(attach, self.steps)))

    def cost(self, attach: Attach, steps: int, key: str) -> tuple[float, float]:
        """Operations and calls of the counted layer, means over the trial's prompts; `key` names what is attached."""

        def compute() -> tuple[float, float]:
            counted = [
                count_flops(self.model, attach, steps, prompt, self.seed + i, self.call)
                for i, prompt in enumerate(self.prompts)
            ]
            flops, calls = zip(*((flops, sample.layer_calls) for flops, sample in counted), strict=True)
            return statistics.fmean(flops), statistics.fmean(calls)

        flops, calls = self.recall(f"cost of {key} at {steps} steps", compute)
        return flops, calls

    def sample(self, attach: Attach, steps: int) -> tuple[float, float]:
        """Computed steps and PSNR (dB) of an arm with a number of sampler steps, means over the trial's prompts."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HastenWarning)  # a threshold that skips nothing is part of the search
            samples = [self.draw(attach, i, steps) for i in range(len(self.prompts))]
        pairs = list(zip(samples, self._references, strict=True))
        return (
            statistics.fmean(self.steps * sample.layer_calls / reference.layer_calls for sample, reference in pairs),
            statistics.fmean(
                min(over_frames(psnr, sample.image, reference.image), PSNR_CEILING) for sample, reference in pairs
            ),
        )


def match_computed_steps(
    run: Callable[[float], Trial], wanted: int, low: float = 1e-4, high: float = 1e3, trials: int = 10
) -> Match:
    """Bisect a threshold, on a logarithmic scale, for the most computed steps that are at most `wanted`.

    Args:
        run: tries a threshold; a larger one has to compute fewer steps.
        wanted: mean number of computed steps that must not be exceeded.
        low, high: where to search, both positive.
        trials: most thresholds to try.

    Returns:
        of the thresholds that were tried and did not exceed it, the one with the most computed steps, and among equals
        the one with the best PSNR.

    Raises:
        ConfigError: if even `high` computes more, or no threshold comes within one step of `wanted`.
    """
    if not 0 < low < high:
        raise ConfigError(f"the range of thresholds must be 0 < low < high, got {low} to {high}")
    loosest = run(high)
    if loosest.computed > wanted:
        raise ConfigError(
            f"even at the loosest threshold {loosest.computed:g} steps are computed, more than {wanted}; "
            "allow more skipped steps in a row, a shorter warm-up, or more computed steps"
        )
    best = Match(high, loosest)
    for _ in range(trials - 1):
        if best.trial.computed == wanted:
            break
        middle = float(f"{math.sqrt(low * high):.4g}")  # what is reported is what was tried
        trial = run(middle)
        if trial.computed > wanted:
            low = middle
            continue
        high = middle
        if (trial.computed, trial.psnr) > (best.trial.computed, best.trial.psnr):
            best = Match(middle, trial)
    if best.trial.computed <= wanted - 1:
        raise ConfigError(
            f"no threshold computes {wanted} steps: the nearest computes {best.trial.computed:g}; ask for as many "
            "or allow other numbers of skipped steps in a row"
        )
    return best
