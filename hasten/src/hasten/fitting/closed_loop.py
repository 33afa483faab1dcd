"""`tune_method`: choose the parameters of a caching method by the error of whole runs.

The error of a single forecast does not tell how far a run ends from the full one, since it goes on into the steps
behind it. So every trial is a run: coordinate descent over the axes of the method (values of a parameter, or whatever
`CachingMethod.along` makes of an axis), from the method as it is given, until a sweep over all axes changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from hasten import registry
from hasten.acceleration import accelerate
from hasten.caching.method import CachingMethod
from hasten.errors import AdapterError, CalibrationError, ConfigError, ScheduleError
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
        ConfigError: if there is nothing to tune, or the start itself cannot work.
    """
    if not calls:
        raise CalibrationError("there is nothing to tune on: give at least one call")
    accepted("tune_method", "trials", Annotated[int, Range(1)], trials)
    start = registry.build(method) if isinstance(method, str) else method
    if not isinstance(start, CachingMethod):
        raise ConfigError(f"{type(start).__name__} is no caching method, and one is needed here, such as foca")
    loop = _Loop(target, Replay(calls), trials, dict(known or {}), keep, progress)
    return loop.descend(start, _axes(start, values))


Axis = Callable[[CachingMethod], list[CachingMethod]]


def _axes(start: CachingMethod, values: Mapping[str, Sequence[Any]] | None) -> list[Axis]:
    """Ways to change a method."""
    name = type(start).__name__
    if values is None:
        axes: list[Axis] = [lambda method, axis=axis: method.along(axis) for axis in start.axes()]  # type: ignore[misc]
        if not axes:
            raise ConfigError(f"{name} declares no values to try; name them with values={{'order': (1, 2)}}")
        return axes
    declared = parameters(type(start))
    chosen = {}
    for parameter, tried in values.items():
        if parameter not in declared:
            raise ConfigError(f"{name} has no parameter {parameter!r} to tune")
        chosen[parameter] = [declared[parameter].accept(value, name) for value in tried]
    return [lambda method, p=p, tried=tried: changed(method, p, tried) for p, tried in chosen.items()]  # type: ignore[misc]


def changed(method: CachingMethod, parameter: str, values: Sequence[Any]) -> list[CachingMethod]:
    """The method with other values of a parameter; without those that cannot work."""
    methods = []
    for value in values:
        try:
            methods.append(replace(method, **{parameter: value}))
        except (ConfigError, ScheduleError):
            continue
    return methods


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
        try:
            given = self._figure(best)
            if given is None:
                raise self._refusal or ConfigError(
                    f"{_label(best)!r} did not work in an earlier run; start with another"
                )
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
        finally:
            self._replay.rewind()

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
    """The parameters of a method that are not at their defaults, as text; files aside, which do not change."""
    texts = []
    for parameter in parameters(type(method)).values():
        value = getattr(method, parameter.name)
        if value != parameter.default and isinstance(value, (bool, int, float, str, tuple, type(None))):
            texts.append(f"{parameter.name}={write(value)}")
    return ":".join(texts)
