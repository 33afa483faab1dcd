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

The published lists of computed steps (50 steps; 11, 10, 9, 8, 7 or 6 of them computed) are `PUBLISHED`; `published=True`
takes the longest that is no longer than the schedule's.

Departures: the default history is masked; one weight matrix for each pass of a step; the gradient form works on the
Gram matrix, which gives the same gradients as the data up to a factor that Adam does not see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from hasten.caching.calibrated import CalibratedMethod, Gram, forecast_error, gram_of
from hasten.caching.components import Components, FeatureKey
from hasten.caching.method import SiteName
from hasten.caching.multistep import Vector
from hasten.caching.projectors import Whole
from hasten.caching.schedule import Explicit, Schedule, computed_steps
from hasten.calibration import Calibration, Fit, Trace, declare_contents
from hasten.errors import ConfigError, ScheduleError, unknown
from hasten.io import Array, symmetric
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
ALL = 1024  # more computed steps than any run has


def ridge_weights(gram: Gram, target: int, past: Sequence[int], ridge: float) -> Vector:
    """Weights of the steps `past` (newest first) for a forecast of `target`, drawn towards reuse by `ridge`."""
    own = gram[np.ix_(past, past)]
    pull = ridge * max(float(np.trace(own)) / len(past), 1e-300)
    newest = np.eye(len(past))[0]
    return np.linalg.lstsq(own + pull * np.eye(len(past)), gram[list(past), target] + pull * newest, rcond=None)[0]


class MaskedHistory:
    """Weights on computed steps, solved for the anchors at hand.

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

    def weights(self, target: int, anchors: Sequence[int]) -> list[float]:
        known = len(self._gram)
        if target >= known:  # beyond the calibrated steps there is nothing but reuse
            return [1.0] + [0.0] * (len(anchors) - 1)
        return [float(w) for w in ridge_weights(self._gram, target, anchors, self._ridge)]


class FullHistory:
    """Weights on every earlier step, as weights on the full ones among them.

    Args:
        rows: `rows[t, j]` is the weight of step `j < t` in the forecast of step `t`.
    """

    memory = ALL

    def __init__(self, rows: Gram) -> None:
        self._rows = rows

    def weights(self, target: int, anchors: Sequence[int]) -> list[float]:
        if target >= len(self._rows):
            return [1.0] + [0.0] * (len(anchors) - 1)
        place = {step: k for k, step in enumerate(anchors)}
        as_full = np.zeros((target + 1, len(anchors)))
        for step in range(target + 1):
            if step in place:
                as_full[step, place[step]] = 1.0
            else:
                as_full[step] = self._rows[step, :step] @ as_full[:step]
        return [float(w) for w in as_full[target]]


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
    """Forecast by weights that were learned for each pair of steps (L2P).

    Args:
        fit_by: `"closed"` or `"gradient"`; see the top of the file.
        history: `"masked"` or `"full"`.
        ridge: of the closed form; larger stays nearer to reuse. None is 1e-5 for a masked history and 1e-3 for a full
            one, whose forecasts feed on forecasts.
        window: how many computed steps a masked forecast uses; None is all of them.
        published: take the longest published list of computed steps that is no longer than the schedule's.
    """

    name: ClassVar[str] = "l2p"
    bound_to_run: ClassVar[bool] = True
    sites: ClassVar[tuple[SiteName, ...]] = ("output", "hidden")

    site: SiteName = "output"
    fit_by: Literal["closed", "gradient"] = "closed"
    history: Literal["masked", "full"] = "masked"
    ridge: float | None = None
    window: int | None = None
    published: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fit_by not in ("closed", "gradient"):
            raise unknown("fit of L2P", self.fit_by, ("closed", "gradient"))
        if self.history not in ("masked", "full"):
            raise unknown("history of L2P", self.history, ("masked", "full"))
        if self.fit_by == "gradient" and self.history == "masked":
            raise ConfigError("the gradient form learns from the full history; use history='full' with it")
        if self.ridge is None:
            object.__setattr__(self, "ridge", 1e-5 if self.history == "masked" else 1e-3)
        if self.ridge is not None and self.ridge < 0:
            raise ConfigError(f"ridge must not be negative, got {self.ridge}")
        if self.window is not None and (self.window < 1 or self.history == "full"):
            raise ConfigError("window must be at least 1, and belongs to history='masked'")

    def plan(self) -> Schedule:
        plan = super().plan()
        if not self.published:
            return plan
        steps = self.fitted.fingerprint.steps
        count = len(computed_steps(plan, steps))
        fitting = [n for n in PUBLISHED if n <= count]
        if steps != 50 or not fitting:
            raise ScheduleError(
                f"the published lists are for 50 steps with {min(PUBLISHED)} or more of them computed; "
                f"got {steps} steps with {count}. Leave out published=True"
            )
        return Explicit(PUBLISHED[max(fitting)])

    def parts(self, place: FeatureKey) -> Components:
        known = self.fitted.fingerprint.passes
        # A pass that was not calibrated is refused by check_passes, or forecast like the first one with strict=False.
        gram = np.asarray(self.fitted.tensors[f"gram/{place.pass_name if place.pass_name in known else known[0]}"])
        assert self.ridge is not None
        if self.history == "masked":
            return Components(Whole(), {"whole": MaskedHistory(gram, self.ridge, self.window or ALL)})
        rows = closed_rows(gram, self.ridge) if self.fit_by == "closed" else gradient_rows(gram)
        predictor = FullHistory(rows)
        self._refuse_growth(predictor)
        return Components(Whole(), {"whole": predictor})

    def _refuse_growth(self, predictor: FullHistory) -> None:
        """Forecasts that feed on forecasts may amplify every error; say so instead of drawing noise."""
        computed = self.computed_steps()
        cached = [step for step in range(computed[0], self.fitted.fingerprint.steps) if step not in computed]
        weights = [predictor.weights(step, [f for f in reversed(computed) if f < step]) for step in cached]
        gain = max((sum(map(abs, row)) for row in weights), default=1.0)
        if gain > MOST_GAIN:
            raise ConfigError(
                f"with the full history these weights amplify errors up to {gain:.0f} times (more than {MOST_GAIN}); "
                "use a larger ridge, fit_by='gradient', or history='masked'"
            )

    @staticmethod
    def fit(trace: Trace, site: SiteName = "output") -> Fit:
        """The Gram matrix of each pass, and how well two steps ahead can be told from the past."""
        tensors, report = {}, {}
        for name, slots in trace.features.items():
            gram = gram_of(slots["output" if site == "output" else "hidden"])
            tensors[f"gram/{name}"] = torch.from_numpy(gram)
            rows = closed_rows(gram, 1e-5)
            fidelity = [1.0]
            for step in range(1, len(gram)):
                error = forecast_error(gram, step, list(range(step)), rows[step, :step].tolist())
                fidelity.append(1 - float(np.sqrt(error / max(gram[step, step], 1e-300))))
            report[name] = {"fidelity_per_step": fidelity}
        return Fit(tensors, report)
