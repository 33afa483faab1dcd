"""`tune_steps`: find out where a model is best evaluated, for a number of computed steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
from torch import Tensor

from hasten import registry
from hasten.acceleration import accelerate
from hasten.caching.method import SEARCHED, CachingMethod, ScheduledMethod
from hasten.caching.schedule import spread
from hasten.calibration import Calibration
from hasten.errors import CalibrationError, ConfigError
from hasten.fitting.calibrate import engine_of, fingerprint_of
from hasten.fitting.search import figures, search_steps
from hasten.parameters import Range, accepted
from hasten.pipeline.replay import Replay

__all__ = ["tune_steps"]

START = 1.15  # power of the spread that a search starts from: a little denser early

Progress = Callable[[int, int, int, float], None]


def tune_steps(
    target: Any,
    method: str | CachingMethod,
    calls: Sequence[Mapping[str, Any]],
    computed_steps: Sequence[int],
    *,
    trials: int = 80,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Search the lists of computed steps with which a caching method stays nearest to the plain sampler.

    Where to evaluate is worth more than the formula of the forecast: the usual schedules leave the end, where detail
    forms, to extrapolation. A list that was found with one method serves the others as well.

    Args:
        target: a pipeline that returns latents with `output_type="latent"`.
        method: the method to search with; `"foca"` is a good choice.
        calls: arguments of the pipeline's calls, each with a `generator` or `latents` of its own so that it can be
            repeated. Give batches (a list of prompts and of generators): each trial runs all calls.
        computed_steps: the numbers of computed steps to find lists for.
        trials: lists to look at for each number.
        seed: of the search.
        progress: called with (number of computed steps, trials so far, trials, best loss).

    Returns:
        a calibration for the parameter `searched` of any scheduled caching method.

    Raises:
        CalibrationError: if a call does not give the same result twice, or the pipeline has several transformers.
        ConfigError: if a number of computed steps does not fit the run, or the method has steps of its own.
    """
    if not calls:
        raise CalibrationError("there is nothing to tune on: give at least one call")
    chosen = registry.build(method) if isinstance(method, str) else method
    if not isinstance(chosen, ScheduledMethod):
        raise ConfigError(
            f"{type(chosen).__name__} computes no listed steps; search with a method that does, such as foca"
        )
    accepted("tune_steps", "trials", Annotated[int, Range(1)], trials)
    accepted("tune_steps", "seed", Annotated[int, Range(0)], seed)
    with Replay(calls) as replay:
        _check_counts(computed_steps, replay.steps(target))
        _check_free(chosen)

        def sample(index: int) -> Tensor:
            return torch.as_tensor(target(**replay[index])[0]).float()

        with accelerate(target, "reuse", interval=1) as run:
            engine_of(run)  # refuses several before any call
            references = [sample(i) for i in range(len(calls))]
            if not torch.equal(sample(0), references[0]):
                raise CalibrationError(
                    "a call gave another result the second time: give it a generator or latents of its own"
                )
            fingerprint = fingerprint_of(target, run, "hidden")
        total = fingerprint.steps
        _check_counts(computed_steps, total)  # a run may have other steps than it was asked for
        scale = torch.cat([reference.flatten() for reference in references]).square().mean().item()

        def loss_of(steps: tuple[int, ...]) -> float:
            with accelerate(target, replace(chosen, steps=steps, warmup=1)):
                errors = [(sample(i) - reference).square().mean() for i, reference in enumerate(references)]
            return float(torch.stack(errors).mean()) / scale

        tensors, report = {}, {}
        for count in computed_steps:

            def tick(done: int, most: int, best: float, count: int = count) -> None:
                if progress is not None:
                    progress(count, done, most, best)

            found = search_steps(spread(count, total, START), total, loss_of, trials=trials, seed=seed, progress=tick)
            tensors[f"steps/{count}"] = torch.tensor(found.steps)
            report[str(count)] = figures(found)
    options = {"method": type(chosen).__name__, "trials": trials, "seed": seed, "calls": len(calls)}
    return Calibration(SEARCHED, tensors, fingerprint, report, options)


def _check_free(method: ScheduledMethod) -> None:
    """Raise a ConfigError for a method whose computed steps are not to be changed."""
    try:
        replace(method, steps=(0,), warmup=1)
    except ConfigError as error:
        raise ConfigError(
            f"tune_steps sets the computed steps of {type(method).__name__} itself, and it has its own ({error}); give "
            "it without a schedule, an interval or lists"
        ) from error


def _check_counts(computed_steps: Sequence[int], total: int | None) -> None:
    """Raise a ConfigError for numbers of computed steps that leave nothing to search in a run of so many steps."""
    most = None if total is None else total - 1
    accepted("tune_steps", "computed_steps", tuple[Annotated[int, Range(2, most)], ...], computed_steps)
