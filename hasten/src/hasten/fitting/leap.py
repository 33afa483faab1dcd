"""LEAP: least-squares extrapolation along the path. Our own method; related in spirit to learned non-stationary
solvers (Shaul et al., BNS, 2024).

With the plain sampler `x_{i+1} = x_i + (sigma_{i+1} - sigma_i) v_i`, a sampler with few evaluations at the steps
`s_0 = 0 < s_1 < ... < s_{n-1}` is any choice of coefficients in

    x(s_{k+1}) = X_0 + sum_{j<=k} c_kj v_j,      v_k = model(x(s_k), sigma_{s_k})

Reference trajectories of the plain sampler are drawn once. Then, evaluation after evaluation, the model is asked at
the state that the fast sampler itself has reached, and `c_k` brings it as near to the reference's state at `s_{k+1}` as
the known velocities allow: a small linear system for the whole training batch. No gradient passes through the model,
and training sees what it will meet in use. The steps themselves are searched by local moves, each judged by the final
error; what comes before the first changed step need not be evaluated again. At last coefficients and times are refined
together (`refine.py`).

The pipeline evaluates the model, with its own guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.acceleration import accelerate
from hasten.calibration import Calibration
from hasten.errors import CalibrationError, ConfigError
from hasten.fitting.calibrate import fingerprint_of
from hasten.fitting.leap_fitter import Fitter, Leap
from hasten.fitting.references import References, record_references
from hasten.fitting.refine import refine
from hasten.fitting.search import Search, figures
from hasten.pipeline.replay import Replay
from hasten.solvers.scheduler import LEAP

__all__ = ["fit_leap"]

Progress = Callable[[int, int, int, float], None]


def fit_leap(
    pipe: Any,
    calls: Sequence[Mapping[str, Any]],
    evaluations: Sequence[int],
    *,
    trials: int = 40,
    rounds: int = 3,
    ridge: float = 1e-6,
    seed: int = 0,
    known: Calibration | None = None,
    keep: Callable[[Calibration], object] | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Learn a solver for each number of evaluations.

    Args:
        pipe: a pipeline of a flow-matching or variance-preserving model.
        calls: arguments of its calls, with the steps, size and guidance that the references are to have, each with
            generators or latents. Give batches: each evaluation of the fit runs every call once.
        evaluations: numbers of evaluations.
        trials: lists of steps to look at for each number; 1 takes the spread that a search would start from.
        rounds: of the joint refinement of times and coefficients; 0 leaves it out.
        ridge: see `solvers/fit.py`.
        seed: of the search.
        known: an earlier result, perhaps of a fit that was cut short; what was fitted to the same prompts with the
            same settings is taken over.
        keep: called with the result so far after each number, such as `lambda fit: fit.save(path)`.
        progress: called with (number of evaluations, trials and rounds so far, of how many, relative squared error);
            while the references are drawn with (0, calls so far, of how many, 1).

    Returns:
        a calibration to save, or to make a scheduler of: `LeapScheduler.of(calibration, pipe)`.

    Raises:
        CalibrationError: if there are no calls, or they cannot be followed.
        ConfigError: if a number does not fit the run.
    """
    if not calls:
        raise CalibrationError("there is nothing to learn from: give at least one call")
    replay = Replay(calls)
    references = record_references(
        pipe, replay, lambda done, total: progress(0, done, total, 1.0) if progress is not None else None
    )
    for count in evaluations:
        if not 1 <= count <= references.total:
            raise ConfigError(
                f"evaluations must be between 1 and the {references.total} steps of the references, got {count}"
            )
    with accelerate(pipe, "reuse", interval=1) as run:
        pipe(**replay[0])
        fingerprint = fingerprint_of(pipe, run, "output")
    fitter = Fitter(pipe, replay, references, ridge)
    with fitter.probing():
        shift_mu = fitter.shift_mu()
    options = {
        "prediction_type": references.prediction_type,
        "num_train_timesteps": int(pipe.scheduler.config.num_train_timesteps),
        "shift_mu": shift_mu,
        "prompts": references.prompts,
        "learned_from": references.digest,
        "trials": trials,
        "rounds": rounds,
        "ridge": ridge,
        "seed": seed,
    }
    result = Calibration(LEAP, {}, fingerprint, {}, options)
    if known is not None and (known.fingerprint, known.options) == (fingerprint, options):
        result = known
    with fitter.probing():
        for count in evaluations:
            if str(count) in result.report:
                continue

            def tick(done: int, error: float, count: int = count) -> None:
                if progress is not None:
                    progress(count, done, trials + rounds, error)

            fitter.evaluations = 0
            found, search = fitter.search(count, trials, seed, lambda done, _, error: tick(done, error))
            closed = found.error
            found = refine(fitter, found, rounds, lambda error: tick(trials, error))
            result = _with(result, found, search, closed, fitter)
            tick(trials + rounds, found.error)
            if keep is not None:
                keep(result)
    replay.rewind()
    return result


def _with(known: Calibration, found: Leap, search: Search, closed: float, fitter: Fitter) -> Calibration:
    """A result with one more solver."""
    count = len(found.steps)
    references: References = fitter.references
    rows = torch.zeros(count, count, dtype=torch.float64)
    for k, row in enumerate(found.coefficients):
        rows[k, : k + 1] = torch.tensor(row, dtype=torch.float64)
    tensors: dict[str, Tensor] = known.tensors | {
        f"{count}/coefficients": rows,
        f"{count}/timesteps": torch.tensor(found.timesteps),
        f"{count}/sigmas": torch.tensor(found.sigmas),
    }
    report = figures(search) | {
        "closed_form": closed,
        "relative_squared_error": found.error,
        "evaluations_of_references": references.total * references.prompts,
        "evaluations_of_fit": fitter.evaluations,
    }
    return Calibration(LEAP, tensors, known.fingerprint, known.report | {str(count): report}, known.options)
