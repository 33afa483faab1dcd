"""The plain samplers that every method has to win against, as arms; see `hasten.solvers.plain`."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from hasten.bench.arms import Arm, one_line
from hasten.bench.sampling import Attach, plain
from hasten.bench.thresholds import Trials
from hasten.errors import unknown
from hasten.solvers.plain import SOLVERS, SPACINGS, Sampler

__all__ = ["best_plain_arms", "plain_arms", "plain_samplers"]

log = logging.getLogger(__name__)

OWN = ("euler", "unipc")  # which stand in every table, with the model's own spacing


def plain_samplers() -> dict[str, Attach]:
    """All plain solvers with all spacings by label; the pipeline's own scheduler stays as it is."""
    samplers = (Sampler(solver, spacing) for solver in SOLVERS for spacing in SPACINGS)
    return {sampler.label: plain if sampler.label == "euler" else sampler for sampler in samplers}


def plain_arms(counts: Sequence[int], samplers: Sequence[str] = OWN) -> list[Arm]:
    """The plain sampler with as many steps as the methods compute: the comparison that every method has to win.

    `"euler"` is the pipeline's own scheduler (Euler for flow-matching models), `"unipc"` a second-order multistep
    solver.

    Raises:
        UnknownNameError: for another sampler.
    """
    known = {name: sampler for name, sampler in plain_samplers().items() if name in OWN}
    for name in samplers:
        if name not in known:
            raise unknown("sampler", name, known)
    return [Arm(f"{name}-{n}", name, "plain", {}, n, n, known[name]) for n in counts for name in samplers]


def best_plain_arms(counts: Sequence[int], trials: Trials) -> tuple[list[Arm], dict[str, dict[str, float | None]]]:
    """The best plain sampler for each number of steps, and what all of them came to.

    Args:
        counts: numbers of steps.
        trials: draws its prompts with every solver and spacing.

    Returns:
        an arm for each number whose best sampler is none that stands in the table anyway, and by number of steps and
        sampler the mean PSNR in dB over the trial's prompts; None for one that the model or the class does not have.
    """
    arms, found = [], {}
    for count in counts:
        figures: dict[str, float | None] = {}
        for label, attach in plain_samplers().items():
            trials.progress(f"plain {label}, {count} steps")
            figures[label] = _quality(label, attach, count, trials)
        found[str(count)] = figures
        known = {label: value for label, value in figures.items() if value is not None}
        best = max(known, key=lambda label: known[label], default=OWN[0])
        if best not in OWN:
            solver, _, spacing = best.partition(":spacing=")
            params = {"spacing": spacing} if spacing else {}
            arms.append(Arm(f"{best}-{count}", best, "plain", params, count, count, Sampler(solver, spacing)))
    return arms, found


def _quality(label: str, attach: Attach, count: int, trials: Trials) -> float | None:
    """Mean PSNR of a sampler; None if the model or the scheduler's class does not have it."""

    def compute() -> tuple[float, ...]:
        try:
            return trials.sample(attach, count)[1:]
        except Exception as error:  # whatever schedulers raise that do not fit a pipeline
            log.info("plain %s: %s", label, one_line(error))
            return ()

    return next(iter(trials.recall(f"plain {label} at {count}", compute)), None)
