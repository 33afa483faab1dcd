"""What the methods that are fitted to a model have in common: a calibration, checked against the model and the run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from hasten.caching.method import ScheduledMethod
from hasten.caching.schedule import computed_steps
from hasten.calibration import Calibration, Domain, RunFacts
from hasten.errors import CalibrationError, ConfigError, HastenWarning, ScheduleError
from hasten.parameters import parameters

__all__ = ["CalibratedMethod", "Gram", "forecast_error", "gram_of"]

Gram = npt.NDArray[np.float64]


def gram_of(steps: Tensor) -> Gram:
    """Inner products of the features of a run's steps, summed over runs, divided by the numbers in a feature.

    Args:
        steps: `[S, T, ...]`.
    """
    flat = steps.flatten(2).float()
    gram = sum((run @ run.T).double() for run in flat)
    assert isinstance(gram, Tensor)
    return np.asarray(gram / (flat.shape[0] * flat.shape[2]))


def forecast_error(gram: Gram, target: int, stored: Sequence[int], weights: Iterable[float]) -> float:
    """Mean squared error of the forecast `sum_k w_k F_k` of step `target`, from the Gram matrix alone."""
    steps = [target, *stored]
    signed = np.asarray([-1.0, *weights])
    return float(max(signed @ gram[np.ix_(steps, steps)] @ signed, 0.0))


@dataclass(frozen=True, kw_only=True)
class CalibratedMethod(ScheduledMethod):
    """Base of the methods that need a calibration."""

    name: ClassVar[str]
    bound_to_run: ClassVar[bool] = False  # whether the fit holds for one sampling only
    fit: ClassVar[Callable[..., Any]]  # what makes the calibration of a trace; its options have defaults

    calibration: Annotated[Calibration | str | None, "what was fitted to the model, or its file"] = None
    strict: Annotated[bool, "refuse another model or sampling than the calibrated one, instead of warning"] = True

    def check(self) -> None:
        object.__setattr__(self, "calibration", Calibration.of(self.name, self.calibration))
        super().check()
        own = self.fitted.fingerprint.domain
        if self.site == "hidden" and self.domain not in (None, own):
            able = "domain" in parameters(type(self).fit)
            again = f", or calibrate again with domain={self.domain}" if able else ""
            raise ConfigError(
                f"{type(self).__name__}: the calibration is of the {own} domain, got domain={self.domain!r}; leave it "
                f"out{again}"
            )

    @property
    def kept(self) -> Domain | None:
        return self.fitted.fingerprint.domain if self.site == "hidden" else "plain"

    @property
    def fitted(self) -> Calibration:
        """The calibration."""
        assert isinstance(self.calibration, Calibration)
        return self.calibration

    def check_model(self, model: nn.Module) -> None:
        if self.fitted.fingerprint.site != self.site:
            self._refuse([f"calibrated at site {self.fitted.fingerprint.site!r}, used at {self.site!r}"])
        differences = self.fitted.check_model(model)
        if differences and "other weights" in differences[0] and not self.bound_to_run:
            warnings.warn(f"{self.name}: {differences[0]}", HastenWarning, stacklevel=2)
            return
        self._refuse(differences)

    def check_run(self, run: RunFacts) -> None:
        super().check_run(run)
        if self.bound_to_run:
            self._refuse(self.fitted.check_run(run))

    def check_passes(self, passes: Sequence[str]) -> None:
        known = self.fitted.fingerprint.passes
        if self.bound_to_run:
            self._refuse(self.fitted.check_passes(passes))
        elif others := [name for name in passes if name not in known]:
            warnings.warn(
                f"{self.name}: calibrated on the passes {', '.join(known)}, this run has {', '.join(others)} too, "
                f"which take what was fitted to {known[0]}: calibrate with calls that guide as this one does",
                HastenWarning,
                stacklevel=2,
            )

    def _refuse(self, differences: list[str]) -> None:
        if not differences:
            return
        message = f"{self.name}: {'; '.join(differences)}"
        if not self.strict:
            warnings.warn(message, HastenWarning, stacklevel=2)
            return
        raise CalibrationError(
            f"{message}. Calibrate again with `hasten calibrate`, or use strict=False to go on at your own risk"
        )

    def calibrated_steps(self) -> list[int]:
        """The computed steps of a run as long as the calibrated ones."""
        total = self.fitted.fingerprint.steps
        try:
            return computed_steps(self.plan(), total)
        except ScheduleError as error:
            raise ScheduleError(f"{error} (calibrated for {total} steps)") from None

    def mean_error(self, gram: Gram, weigh: Callable[[int, list[int]], Sequence[float]]) -> float:
        """Mean squared error of a predictor over the skipped steps of this schedule, on the calibrated runs."""
        errors = [forecast_error(gram, step, stored, weigh(step, stored)) for step, stored in self._skipped()]
        return float(np.mean(errors)) if errors else 0.0

    def drift(self, gram: Gram, weigh: Callable[[int, list[int]], Sequence[float]]) -> float:
        """Mean square of what the errors of a predictor add up to over the skipped steps of this schedule.

        A sampler adds up velocities, each times the length of its step, and with them their errors. Errors that point
        the same way from step to step lead the image away; errors that change sign do not, however large they are.
        Steps are as long as their times are apart; where these do not fall to zero (two evaluations at one time,
        logarithms, a list that nobody knows), all count the same.
        """
        lengths = -np.diff([*self.fitted.fingerprint.timesteps, 0.0])
        if not (lengths[:-1] > 0).all() or lengths[-1] < 0:
            lengths = np.ones(len(lengths))
        lengths = lengths / lengths.sum()
        total = np.zeros(len(gram))
        for step, stored in self._skipped():
            total[step] -= lengths[step]
            for earlier, weight in zip(stored, weigh(step, stored), strict=True):
                total[earlier] += lengths[step] * float(weight)
        return max(float(total @ gram @ total), 0.0)

    def _skipped(self) -> list[tuple[int, list[int]]]:
        """The skipped steps of this schedule, each with the computed steps before it, the latest first."""
        computed = self.calibrated_steps()
        skipped = sorted(set(range(self.fitted.fingerprint.steps)) - set(computed))
        return [(step, [earlier for earlier in reversed(computed) if earlier < step]) for step in skipped]
