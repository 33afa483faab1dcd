"""The fit of `leapcache`: weights at a cache's site, learned on the accelerated sampler's own path.

The features of the computed steps depend on all weights before them, so the fit is repeated: sample with the weights so
far, keep the features that were computed, solve for all weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor

from hasten.acceleration import accelerate
from hasten.caching.methods.leapcache import RIDGE, WINDOW, LeapCache, learned_table
from hasten.calibration import Calibration, Fingerprint
from hasten.errors import CalibrationError, ConfigError
from hasten.fitting.calibrate import Tape, record
from hasten.parameters import Range, accepted
from hasten.pipeline.replay import Replay

__all__ = ["fit_leapcache"]

Steps = tuple[int, ...]


def fit_leapcache(
    pipe: Any,
    calls: Sequence[Mapping[str, Any]],
    lists: Sequence[Sequence[int]],
    *,
    sweeps: int = 3,
    window: int = WINDOW,
    ridge: float = RIDGE,
    tokens: int = 4096,
    progress: Callable[[int, int, float], None] | None = None,
) -> Calibration:
    """Learn the weights of `leapcache` for lists of computed steps.

    Args:
        pipe: a pipeline that returns latents with `output_type="latent"`.
        calls: arguments of its calls with generators or latents, as for `fit_leap`.
        lists: computed steps, such as `hasten.tune_steps` found; at most one list of each length.
        sweeps: how often to sample and solve.
        window: how many newest computed steps a forecast uses, and are held in memory.
        ridge: how far weights shrink to reuse.
        tokens: how many tokens of a call's feature are looked at.
        progress: called with (computed steps, sweeps so far, relative squared error of the final latents).

    Raises:
        CalibrationError: if there are no calls.
        ConfigError: for a list that does not fit the run.
    """
    if not calls:
        raise CalibrationError("there is nothing to learn from: give at least one call")
    for name, value, least in (("sweeps", sweeps, 1), ("window", window, 1), ("tokens", tokens, 1)):
        accepted("fit_leapcache", name, Annotated[int, Range(least)], value)
    accepted("fit_leapcache", "ridge", Annotated[float, Range(0)], ridge)
    with Replay(calls) as replay:
        _check_lists(lists, replay.steps(pipe))
        finals: list[Tensor] = []

        def sample(index: int) -> None:
            finals.append(torch.as_tensor(pipe(**replay[index])[0]).float())

        trace = record(pipe, [partial(sample, i) for i in range(len(replay))], tokens=tokens)
        fingerprint, total = trace.fingerprint, trace.fingerprint.steps
        _check_lists(lists, total)  # a run may have other steps than it was asked for
        tensors: dict[str, Tensor] = {}
        report = {}
        for given in lists:
            steps = tuple(int(step) for step in given)
            goal = {name: slots["hidden"] for name, slots in trace.features.items()}
            known = {name: features[:, list(steps)] for name, features in goal.items()}
            best, errors = None, []
            for sweep in range(sweeps):
                tables = {name: learned_table(known[name], goal[name], steps, window, ridge) for name in goal}
                method = LeapCache(calibration=_calibration(tables, steps, fingerprint), interval=2, warmup=len(steps))
                known, error = _sample(pipe, replay, method, finals, tokens)
                errors.append(error)
                if best is None or error < best[0]:
                    best = (error, tables)
                if progress is not None:
                    progress(len(steps), sweep + 1, best[0])
            assert best is not None
            tensors |= _calibration(best[1], steps, fingerprint).tensors
            report[str(len(steps))] = {
                "steps": list(steps),
                "relative_squared_error": best[0],
                "error_per_sweep": errors,
            }
    options = {"sweeps": sweeps, "window": window, "ridge": ridge, "prompts": sum(map(len, finals))}
    return Calibration(LeapCache.name, tensors, fingerprint, report, options)


def _check_lists(lists: Sequence[Sequence[int]], total: int | None) -> None:
    """Raise a ConfigError for lists of computed steps that a run of so many steps does not allow."""
    for given in lists:
        steps = accepted("fit_leapcache", "lists", tuple[Annotated[int, Range(0)], ...], given)
        most = max(steps) + 2 if total is None else total
        if steps[0] != 0 or list(steps) != sorted(set(steps)) or steps[-1] >= most or len(steps) == most:
            end = "" if total is None else f" to {total - 1}"
            raise ConfigError(f"a list of computed steps increases from 0{end} and leaves some out, got {steps}")


def _calibration(tables: Mapping[str, Tensor], steps: Steps, fingerprint: Fingerprint) -> Calibration:
    named = {f"{len(steps)}/{name}": table for name, table in tables.items()}
    return Calibration(LeapCache.name, {f"{len(steps)}/steps": torch.tensor(steps)} | named, fingerprint)


def _sample(
    pipe: Any, replay: Replay, method: LeapCache, finals: Sequence[Tensor], tokens: int
) -> tuple[dict[str, Tensor], float]:
    """Features of the computed steps by pass, `[S, n, ...]`, and the relative squared error of the final latents."""
    tape, error, size = Tape(tokens), 0.0, 0.0
    with accelerate(pipe, method) as run:
        (engine,) = run.engines.values()
        engine.listener = tape
        for i, final in enumerate(finals):
            run.reset()
            latents = torch.as_tensor(pipe(**replay[i])[0]).float()
            tape.end_run()
            error += float((latents - final).square().sum())
            size += float(final.square().sum())
    return {name: slots["hidden"] for name, slots in tape.features().items()}, error / size
