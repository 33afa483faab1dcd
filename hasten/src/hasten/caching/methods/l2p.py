"""L2P: learned weights on the past, one number for each pair of steps. "L2P", arXiv:2604.26365.

    F^_t = sum_{j<t} W_tj F_j

Everything follows from the Gram matrix `G_ij = <F_i, F_j>` of uncached runs, which is what the calibration keeps: the
squared error of any forecast is a quadratic form in it. Two ways to the weights, as `fit_by`:

* `"closed"`: ridge regression, `(G_AA + ridge * mean(diag G_AA) I) w = G_At + ridge * mean(diag G_AA) e`, with `e` the
  newest step: what little is not determined by the data falls back to reuse.
* `"gradient"`: the paper's training, Adam at a rate of 0.01 from the identity for 201 epochs on all rows at once. Early
  stopping is its only regularisation.

and two histories, as `history`:

* `"masked"`: only computed steps, solved for the schedule in use. Training then is what happens when it is used.
* `"full"`: every earlier step, as published; at a skipped step the forecast itself goes into the history. Such a
  forecast is again a weighted sum of computed steps, and is computed as one.

The published lists of computed steps (50 steps; 11, 10, 9, 8, 7 or 6 of them computed) are `PUBLISHED`;
`published=True` takes the longest that is no longer than the schedule's.

Departures: the default history is masked; one weight matrix for each pass of a step; the gradient form works on the
Gram matrix, which gives the same gradients as the data up to a factor that Adam does not see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch

from hasten.caching.calibrated import CalibratedMethod, Gram, forecast_error, gram_of
from hasten.caching.components import Components, FeatureKey
from hasten.caching.effects import Effects, With
from hasten.caching.multistep import Vector
from hasten.caching.predictors import ALL
from hasten.caching.projectors import Whole
from hasten.caching.schedule import Explicit, Schedule, computed_steps
from hasten.calibration import Calibration, Fit, Trace, declare_contents
from hasten.errors import ConfigError, ScheduleError
from hasten.io import Array, symmetric
from hasten.parameters import Range
from hasten.registry import method

__all__ = ["L2P", "PUBLISHED", "FullHistory", "MaskedHistory"]

# The lists of the method's release, for 50 steps.
PUBLISHED = {
    11: (0, 1, 2, 4, 6, 9, 14, 23, 30, 37, 44),
    10: (0, 1, 2, 4, 7, 14, 23, 31, 38, 45),
    9: (0, 1, 2, 4, 9, 17, 26, 35, 43),
    8: (0, 1, 2, 4, 10, 20, 31, 41),
    7: (0, 1, 2, 4, 12, 24, 38),
    6: (0, 1, 2, 4, 16, 32),
}
MOST_GAIN = 100
RIDGES = {"masked": 1e-5, "full": 1e-3}  # forecasts of a full history feed on forecasts


def ridge_weights(gram: Gram, target: int, past: Sequence[int], ridge: float) -> Vector:
    """Weights of the steps `past` (newest first) for a forecast of `target`, shrunk to reuse by `ridge`."""
    own = gram[np.ix_(past, past)]
    weight = ridge * max(float(np.trace(own)) / len(past), 1e-300)
    newest = np.eye(len(past))[0]
    return np.linalg.lstsq(own + weight * np.eye(len(past)), gram[list(past), target] + weight * newest, rcond=None)[0]


class MaskedHistory:
    """Weights on computed steps, solved for the stored steps at hand.

    Args:
        gram: of the calibrated runs, `[T, T]`.
        ridge: see the top of the file.
        memory: how many computed steps are used.
    """

    def __init__(self, gram: Gram, ridge: float, memory: int = ALL) -> None:
        self._gram, self._ridge, self._memory = gram, ridge, memory

    @property
    def memory(self) -> int:
        return self._memory

    def weights(self, target: int, stored: Sequence[int]) -> list[float]:
        known = len(self._gram)
        if target >= known:  # beyond the calibrated steps there is nothing but reuse
            return [1.0] + [0.0] * (len(stored) - 1)
        return [float(w) for w in ridge_weights(self._gram, target, stored, self._ridge)]


class FullHistory:
    """Weights on every earlier step, as weights on the computed ones among them.

    Args:
        rows: `rows[t, j]` is the weight of step `j < t` in the forecast of step `t`.
    """

    memory = ALL

    def __init__(self, rows: Gram) -> None:
        self._rows = rows

    def weights(self, target: int, stored: Sequence[int]) -> list[float]:
        if target >= len(self._rows):
            return [1.0] + [0.0] * (len(stored) - 1)
        column = {step: k for k, step in enumerate(stored)}
        on_stored = np.zeros((target + 1, len(stored)))
        for step in range(target + 1):
            if step in column:
                on_stored[step, column[step]] = 1.0
            else:
                on_stored[step] = self._rows[step, :step] @ on_stored[:step]
        return [float(w) for w in on_stored[target]]


def closed_rows(gram: Gram, ridge: float) -> Gram:
    """One-step-ahead weights on the whole true history, by ridge regression."""
    rows = np.zeros_like(gram)
    for target in range(1, len(gram)):
        rows[target, :target] = ridge_weights(gram, target, list(range(target))[::-1], ridge)[::-1]
    return rows


def gradient_rows(gram: Gram, epochs: int = 201, rate: float = 0.01) -> Gram:
    """The same, by the published training: Adam from the identity (predict the step before).

    The gradient of `sum_r |W_r F - F_{r+1}|^2` in `W` is `2 (W G - G_next)`; Adam does not see its scale.
    """
    unit = gram / np.mean(np.diag(gram))
    size = len(gram) - 1  # row r forecasts step r + 1 from the steps 0..r
    lower = np.tril(np.ones((size, size)))
    weights, mean, square = np.eye(size), np.zeros((size, size)), np.zeros((size, size))
    for epoch in range(1, epochs + 1):
        gradient = 2 * (weights @ unit[:size, :size] - unit[1:, :size]) * lower
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        weights = weights - rate * (mean / (1 - 0.9**epoch)) / (np.sqrt(square / (1 - 0.999**epoch)) + 1e-8)
    rows = np.zeros_like(gram)
    rows[1:, :size] = weights
    return rows


def _check_passes(calibration: Calibration) -> None:
    expected = {f"gram/{name}" for name in calibration.fingerprint.passes}
    if set(calibration.tensors) != expected:
        raise ValueError(f"it holds {', '.join(sorted(calibration.tensors))}, expected {', '.join(sorted(expected))}")


declare_contents("l2p", {"gram/{pass_}": Array("float", ("T", "T"), (symmetric,))}, _check_passes)


@method("l2p", kind="caching", paper="L2P, arXiv:2604.26365", needs_calibration=True)
@dataclass(frozen=True, kw_only=True)
class L2P(CalibratedMethod):
    """Forecast by weights that were learned for each pair of steps (L2P)."""

    name: ClassVar[str] = "l2p"
    bound_to_run: ClassVar[bool] = True
    tried: ClassVar[Mapping[str, tuple[Any, ...]]] = {"ridge": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1), "window": (2, 3, 4)}
    effects: ClassVar[Effects] = {
        "fit_by": (With("history", ("full",)),),
        "ridge": (With("fit_by", ("closed",)),),
        "window": (With("history", ("masked",)),),
        **dict.fromkeys(("steps", "schedule", "searched"), (With("published", (False,)),)),
    }

    site: Literal["output", "hidden"] = "output"
    fit_by: Annotated[Literal["closed", "gradient"], "ridge regression, or the paper's training"] = "closed"
    history: Annotated[Literal["masked", "full"], "computed steps alone, or every earlier step as published"] = "masked"
    ridge: Annotated[
        float | None,
        Range(0),
        "of the closed form; larger stays nearer to reuse; None is 1e-5, and 1e-3 for a full history",
    ] = None
    window: Annotated[int | None, Range(1), "computed steps that a masked forecast uses; None is all of them"] = None
    published: Annotated[bool, "take the published list of computed steps that is as long as the schedule"] = False

    def plan(self) -> Schedule:
        plan = super().plan()
        if not self.published:
            return plan
        steps = self.fitted.fingerprint.steps
        count = self.computed_steps or len(computed_steps(plan, steps))
        fitting = [n for n in PUBLISHED if n == count or (n < count and self.computed_steps is None)]
        if steps != 50 or not fitting:
            raise ScheduleError(
                f"the published lists are for 50 steps with {min(PUBLISHED)} to {max(PUBLISHED)} of them computed; "
                f"got {steps} steps with {count}. Leave out published=True"
            )
        return Explicit(PUBLISHED[max(fitting)])

    def components(self, key: FeatureKey) -> Components:
        known = self.fitted.fingerprint.passes
        # A pass that was not calibrated is refused by check_passes, or forecast like the first one with strict=False.
        gram = np.asarray(self.fitted.tensors[f"gram/{key.pass_name if key.pass_name in known else known[0]}"])
        ridge = RIDGES[self.history] if self.ridge is None else self.ridge
        if self.history == "masked":
            return Components(Whole(), {"whole": MaskedHistory(gram, ridge, self.window or ALL)})
        rows = closed_rows(gram, ridge) if self.fit_by == "closed" else gradient_rows(gram)
        predictor = FullHistory(rows)
        self._refuse_growth(predictor)
        return Components(Whole(), {"whole": predictor})

    def _refuse_growth(self, predictor: FullHistory) -> None:
        """Forecasts that feed on forecasts may amplify every error; say so instead of generating noise."""
        computed = self.calibrated_steps()
        skipped = [step for step in range(computed[0], self.fitted.fingerprint.steps) if step not in computed]
        weights = [predictor.weights(step, [f for f in reversed(computed) if f < step]) for step in skipped]
        gain = max((sum(map(abs, row)) for row in weights), default=1.0)
        if gain > MOST_GAIN:
            raise ConfigError(
                f"with the full history these weights amplify errors up to {gain:.0f} times (more than {MOST_GAIN}); "
                "use a larger ridge, fit_by='gradient', or history='masked'"
            )

    @staticmethod
    def fit(
        trace: Trace, site: Annotated[Literal["output", "hidden"], "whose features are forecast"] = "output"
    ) -> Fit:
        """The Gram matrix of each pass, and how well one step ahead can be told from the past."""
        tensors, report = {}, {}
        for name, features in trace.features.items():
            gram = gram_of(features[site])
            tensors[f"gram/{name}"] = torch.from_numpy(gram)
            rows = closed_rows(gram, 1e-5)
            fidelity = [1.0]
            for step in range(1, len(gram)):
                error = forecast_error(gram, step, list(range(step)), rows[step, :step].tolist())
                fidelity.append(1 - float(np.sqrt(error / max(gram[step, step], 1e-300))))
            report[name] = {"fidelity_per_step": fidelity}
        return Fit(tensors, report)
