"""`tune_method`: choose the parameters of a caching method by the error of whole runs.

The error of a single forecast does not tell how far a run ends from the full one, since it goes on into the steps
behind it. So every trial is a run: coordinate descent over the axes of the method (values of a parameter, or whatever
`CachingMethod.along` makes of an axis), from the method as it is given, until a sweep over all axes changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from hasten import registry
from hasten.acceleration import accelerate
from hasten.caching.method import CachingMethod
from hasten.calibration import Calibration
from hasten.errors import AdapterError, CalibrationError, ConfigError, HastenError, ScheduleError
from hasten.parameters import Range, accepted, parameters, write
from hasten.pipeline.replay import Replay

__all__ = ["Tuned", "tune_method"]

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Tuned:
    """What a method was tuned to.

    Attributes:
        method: the best one.
        decibels: its mean peak signal-to-noise ratio to the full runs, for a peak of 1.
        start: that of the method that was given.
        trials: that of every setting that was tried, by its parameters; None for one that cannot work.
        settled: whether no change of a single axis improves it.
    """

    method: CachingMethod
    decibels: float
    start: float
    trials: dict[str, float | None]
    settled: bool


def tune_method(
    target: Any,
    method: str | CachingMethod,
    calls: Sequence[Mapping[str, Any]],
    *,
    values: Mapping[str, Sequence[Any]] | None = None,
    trials: int = 60,
    known: Mapping[str, float | None] | None = None,
    keep: Callable[[dict[str, float | None]], None] | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Choose parameters of a caching method by how near whole runs come to the full ones.

    Args:
        target: a pipeline.
        method: where to start, with its number of computed steps: what is chosen is for that number and schedule.
        calls: arguments of the pipeline's calls, each with a `generator` or `latents` of its own so that it can be
            repeated; with `output_type="pt"` images are compared, with `"latent"` latents. Give batches (a list of
            prompts and of generators): each trial runs all calls.
        values: the values to try, by parameter; those that the method declares by default.
        trials: most settings to look at, the start included.
        known: figures of an earlier run with the same calls, as `keep` was given them: these are not run again.
        keep: called with all figures so far after each trial.
        progress: called with (trials so far, trials, best figure so far in dB).

    Returns:
        the best method, and what was tried.

    Raises:
        CalibrationError: if a call does not give the same result twice.
        ConfigError: if there is nothing to tune, no value of a parameter can be had, or the start cannot work.
    """
    if not calls:
        raise CalibrationError("there is nothing to tune on: give at least one call")
    accepted("tune_method", "trials", Annotated[int, Range(1)], trials)
    start = registry.build(method) if isinstance(method, str) else method
    if not isinstance(start, CachingMethod):
        raise ConfigError(f"{type(start).__name__} is no caching method, and one is needed here, such as foca")
    axes = _axes(start, values)
    with Replay(calls) as replay:
        return _Loop(target, replay, trials, dict(known or {}), keep, progress).descend(start, axes)


Axis = Callable[[CachingMethod], list[CachingMethod]]


class _Values:
    """An axis of values of a parameter.

    Args:
        parameter: its name.
        values: to try.
    """

    def __init__(self, parameter: str, values: Sequence[Any]) -> None:
        self.parameter = parameter
        self._values = values
        self.able = False  # whether any of the methods so far could have one of them
        self.refusal: HastenError | None = None  # of the first one that none could have

    def __call__(self, method: CachingMethod) -> list[CachingMethod]:
        """The method with each of the values; without those that cannot work."""
        methods = []
        for value in self._values:
            try:
                methods.append(method.changed(**{self.parameter: value}))
            except (ConfigError, ScheduleError) as error:
                self.refusal = self.refusal or error
        self.able |= bool(methods)
        return methods


def _axes(start: CachingMethod, values: Mapping[str, Sequence[Any]] | None) -> list[Axis]:
    """Ways to change a method."""
    name = type(start).__name__
    declared = parameters(type(start))
    if values is None:
        along: list[Axis] = [lambda method, axis=axis: method.along(axis) for axis in start.axes()]  # type: ignore[misc]
        if not along:
            parameter = "threshold" if start.adaptive else "order"
            raise ConfigError(
                f"{name} declares no values to try; give some with values={{{parameter!r}: [...]}}, or "
                f"--try {parameter}=... on the command line"
            )
        return along
    if not values:
        raise ConfigError(f"{name}: there are no values to try; give some, or leave out values")
    axes = []
    for parameter, tried in values.items():
        if parameter not in declared:
            raise ConfigError(f"{name} has no parameter {parameter!r} to tune; it has {', '.join(declared)}")
        axes.append(_Values(parameter, [declared[parameter].accept(value, name) for value in tried]))
    # What the start cannot have it may have after a change along another axis.
    for method in [start, *(other for axis in axes for other in axis(start))]:
        for axis in axes:
            axis(method)
    for axis in axes:
        if not axis.able:
            raise ConfigError(
                f"{name}: none of the values to try for {axis.parameter} can be had: {axis.refusal or 'there are none'}"
            ) from axis.refusal
    return [*axes]


class _Loop:
    """Runs of one tuning."""

    def __init__(
        self,
        target: Any,
        replay: Replay,
        most: int,
        figures: dict[str, float | None],
        keep: Callable[[dict[str, float | None]], None] | None,
        progress: Progress | None,
    ) -> None:
        self._target, self._replay, self._most = target, replay, most
        self._known, self._keep, self._progress = figures, keep, progress
        self._figures: dict[str, float | None] = {}
        self._refusal: Exception | None = None
        with accelerate(target, "reuse", interval=1):
            self._references = [self._sample(i) for i in range(len(replay))]
            if not torch.equal(self._sample(0), self._references[0]):
                raise CalibrationError(
                    "a call gave another result the second time: give it a generator or latents of its own"
                )

    def descend(self, best: CachingMethod, axes: Sequence[Axis]) -> Tuned:
        """Coordinate descent."""
        given = self._figure(best)
        if given is None:
            raise self._refusal or ConfigError(f"{_label(best)!r} did not work in an earlier run; start with another")
        start = figure = given
        settled = False
        while not settled:
            settled = True
            for axis in axes:
                for other in axis(best):
                    if _label(other) not in self._figures and len(self._figures) >= self._most:
                        return Tuned(best, figure, start, self._figures, settled=False)
                    found = self._figure(other)
                    if found is not None and found > figure:
                        best, figure, settled = other, found, False
                    if self._progress is not None:
                        self._progress(len(self._figures), self._most, figure)
        return Tuned(best, figure, start, self._figures, settled=True)

    def _figure(self, method: CachingMethod) -> float | None:
        """Mean decibels of a method over all images; None for one that this model cannot have."""
        label = _label(method)
        if label in self._figures:
            return self._figures[label]
        if label in self._known:
            self._figures[label] = self._known[label]
            return self._figures[label]
        try:
            with accelerate(self._target, method):
                errors = [(self._sample(i) - known).square() for i, known in enumerate(self._references)]
        except (AdapterError, ConfigError, ScheduleError) as error:
            self._refusal, self._figures[label] = error, None
        else:
            means = torch.cat([error.flatten(1).mean(1) for error in errors])
            self._figures[label] = float(-10 * means.clamp_min(1e-12).log10().mean())
        if self._keep is not None:
            self._keep(self._known | self._figures)
        return self._figures[label]

    def _sample(self, index: int) -> Tensor:
        call = self._replay[index]
        kind = self._replay.output_type(index)
        return torch.as_tensor(self._target(**call | {"output_type": kind})[0]).float().cpu()


def _label(method: CachingMethod) -> str:
    """The parameters of a method that are not at their defaults, as text; of a calibration its content."""
    texts = []
    for parameter in parameters(type(method)).values():
        value = getattr(method, parameter.name)
        if value != parameter.default:
            texts.append(f"{parameter.name}={value.digest if isinstance(value, Calibration) else write(value)}")
    return ":".join(texts)
