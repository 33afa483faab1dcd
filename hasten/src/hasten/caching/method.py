"""What every caching method has: a site, a gate or a schedule, a projector and its predictors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from torch import nn

from hasten import models
from hasten.caching.components import Components, FeatureKey
from hasten.caching.effects import Effects, cleared, refuse_idle
from hasten.caching.gates import Gate, Scheduled
from hasten.caching.predictors import Predictor
from hasten.caching.projectors import Projector, Whole
from hasten.caching.schedule import (
    Explicit,
    Schedule,
    Spread,
    Uniform,
    UniformCount,
    computed_steps,
    learned_list,
    told_steps,
)
from hasten.calibration import Calibration, Domain, RunFacts, declare_contents
from hasten.errors import AdapterError, CalibrationError, ConfigError, ScheduleError
from hasten.io import Array, step_list
from hasten.parameters import Declared, Range, parameters

__all__ = ["SEARCHED", "CachingMethod", "Feature", "ScheduledMethod", "SiteName"]

SiteName = Literal["hidden", "output", "module", "deep"]
SEARCHED = "steps"  # what a calibration of lists of computed steps is called
INTERVAL = 5
SPREADS = {"even": (1.0, 0.0), "early": (1.3, 0.0), "auto": (1.2, 0.4)}  # power and tail of `Spread`


def _check_lists(calibration: Calibration) -> None:
    for name, steps in calibration.tensors.items():
        if int(steps[-1]) >= calibration.fingerprint.steps:
            raise ValueError(f"{name!r} goes beyond the {calibration.fingerprint.steps} steps of the run")


declare_contents(SEARCHED, {"steps/{n}": Array("integer", ("n",), (step_list,))}, _check_lists)


@dataclass(frozen=True)
class Feature:
    """What of the site is remembered, for methods that look before they skip.

    Attributes:
        change: remember the change that the skipped blocks make (out - in) instead of what comes out of them.
        front: blocks of the first stack that always run.
        gate_input: what the gate observes before it decides: nothing, the transformer's input (`"input"`), the first
            block's modulated input (`"modulated"`), or the change that the front blocks made (`"front"`).
        verify: run the last block on a drafted input and tell the gate how far it is from the draft.
    """

    change: bool = False
    front: int = 0
    gate_input: Literal["nothing", "input", "modulated", "front"] = "nothing"
    verify: bool = False


@dataclass(frozen=True, kw_only=True)
class CachingMethod(Declared):
    """Base of the caching methods: parameters that all of them share."""

    adaptive: ClassVar[bool] = False  # whether a gate decides, by a parameter `threshold`
    tried: ClassVar[Mapping[str, tuple[Any, ...]]] = {}  # values that a tuner tries, by parameter
    effects: ClassVar[Effects] = {}  # of parameters that have one only beside some values of others
    fewest_steps: ClassVar[int] = 1  # of the runs that a fit takes
    needs_layout: ClassVar[bool] = False  # whether components() has to know where the image's tokens lie

    site: Annotated[
        SiteName,
        "what is cached: tokens after the last block (hidden), the prediction (output), every attention and "
        "feed-forward output (module), a UNet's inner levels (deep)",
    ] = "hidden"
    warmup: Annotated[int, Range(1), "computed steps at the start"] = 3

    def check(self) -> None:
        super().check()
        refuse_idle(self, self.effects)

    def gate(self) -> Gate:
        """What decides, step by step; a fresh object for each transformer."""
        raise NotImplementedError

    def feature(self) -> Feature:
        """What of the site is remembered."""
        return Feature()

    def check_model(self, model: nn.Module) -> None:
        """Raise an error if the method cannot serve the model; called when it is attached."""

    def check_run(self, run: RunFacts) -> None:
        """Raise an error if the method cannot serve the run; called at its first step."""

    def for_run(self, run: RunFacts) -> Self:
        """The method as it serves a run; called when the run begins, behind `check_run`.

        Another object should be made once and held (`cached_property`): what it keeps on the device is kept with it.
        """
        return self

    def check_passes(self, passes: Sequence[str]) -> None:
        """Raise an error if the method cannot serve these forwards within a step; called at the second step."""

    def components(self, key: FeatureKey) -> Components:
        """Split and predictors of a feature key; the same everywhere unless the method says otherwise."""
        return self._components

    @cached_property
    def _components(self) -> Components:
        return Components(self.projector(), self.predictors())

    def guided(self, scale: float | None) -> Self:
        """The method as it serves steps of several passes, whose forecasts are mixed: for one scale one object.

        It keeps as many features, and is asked for where `follows_guidance`.

        Args:
            scale: of the guidance that mixes them, above 1; None where it does not show.
        """
        return self

    @property
    def follows_guidance(self) -> bool:
        """Whether it forecasts otherwise where a step has several passes."""
        return False

    def projector(self) -> Projector:
        """How features are split; whole unless the method says otherwise."""
        return Whole()

    def predictors(self) -> Mapping[str, Predictor]:
        """One predictor for each component of the projector."""
        raise NotImplementedError

    @property
    def kept(self) -> Domain | None:
        """The domain in which image tokens are kept; None for the normed one where the model's final norm is known."""
        return "plain"

    def norm_of(self, model: nn.Module) -> models.FinalNorm | None:
        """The norm of a model as whose results its image tokens are kept; None where they are kept as they are.

        Raises:
            AdapterError: if the normed domain is asked for and the model's final norm is not known.
        """
        if self.kept == "plain":
            return None
        try:
            return models.final_norm(model, models.find(model))
        except AdapterError:
            if self.kept == "normed":
                raise
            return None

    def axes(self) -> Sequence[str]:
        """Names of the ways in which a tuner may change the method; see `along`."""
        return list(self.tried)

    def along(self, axis: str) -> list[Self]:
        """The method changed along an axis; without those that cannot work."""
        methods = []
        for value in self.tried[axis]:
            try:
                methods.append(self.changed(**{axis: value}))
            except ConfigError:
                continue
        return methods

    def changed(self, **values: Any) -> Self:
        """The method with other values; parameters of it that thereby lose their effect get their defaults back.

        Raises:
            ConfigError, ScheduleError: if it cannot have them, or one of them does nothing beside the others.
        """
        return replace(self, **cleared(self, self.effects, values), **values)

    @property
    def saves(self) -> bool:
        """Whether the user asked for any step to be skipped."""
        raise NotImplementedError

    def with_computed_steps(self, count: int, total: int) -> Self:
        """The same method with exactly `count` computed steps in a run of `total`.

        Raises:
            ConfigError, ScheduleError: if it cannot have so many.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ScheduledMethod(CachingMethod):
    """Base of the caching methods whose computed steps are known beforehand.

    The schedules: `"uniform"` is a warm-up, then every `interval` steps (the papers' rule); `"last"` the same, and the
    last step; `"even"` spreads as many as uniform has evenly from the first step to the last; `"early"` spreads them
    so, but denser early; `"auto"`, the default's own, a little denser early, and not quite to the last step where gaps
    are two and a half steps and more in the mean (docs/which-method.md); `"searched"` takes a list of `searched`. All
    but the first need a pipeline, which tells how many steps there are; so does `computed_steps`. On a bare
    transformer `"auto"` is uniform.
    """

    schedule: Annotated[
        Literal["uniform", "last", "even", "early", "auto", "searched"], "where the computed steps fall in the run"
    ] = "uniform"
    interval: Annotated[
        int | None, Range(1), f"steps from one computed step to the next, {INTERVAL} by default; 1 computes every step"
    ] = None
    computed_steps: Annotated[int | None, Range(1), "exactly so many computed steps, in place of an interval"] = None
    domain: Annotated[
        Domain | None,
        "what is kept at the hidden site: image tokens as they are (plain), or as the model's final norm leaves them "
        "(normed); None is normed where that norm is known",
    ] = "plain"
    steps: Annotated[tuple[int, ...] | None, Range(0), "the computed steps themselves, in place of a schedule"] = None
    searched: Annotated[
        Calibration | str | None,
        "lists of computed steps that `hasten tune` found; of these the one with `computed_steps`, or the longest that "
        "is no longer than the uniform schedule",
    ] = None

    def check(self) -> None:
        super().check()
        if self.domain == "normed" and self.site != "hidden":
            raise ConfigError(
                f"{type(self).__name__}: domain='normed' is of image tokens before the model's final norm; use "
                f"site='hidden' with it, got site={self.site!r}"
            )
        if self.searched is not None:
            object.__setattr__(self, "searched", Calibration.of(SEARCHED, self.searched))
        elif self.schedule == "searched":
            raise ConfigError(
                "schedule='searched' takes the computed steps that `hasten tune` found: give "
                "searched='calibrations/steps.safetensors'"
            )
        self._check_conflicts()
        self.plan()

    def _check_conflicts(self) -> None:
        """Refuse two parameters that say different things about the computed steps."""
        usual = {name: parameter.default for name, parameter in parameters(type(self)).items()}
        given = {name for name in usual if getattr(self, name) != usual[name]}
        spread = "searched" in given or self.schedule in SPREADS
        conflicts = {
            "steps": {"interval", "computed_steps", "searched", "schedule"},
            "computed_steps": {"interval", "warmup"} if spread else {"interval"},
            "searched": {"schedule"} if self.schedule != "searched" else set(),
        }
        for name, others in conflicts.items():
            clash = sorted(others & given) if name in given else []
            if clash:
                raise ConfigError(
                    f"{type(self).__name__}: {name} and {clash[0]} both say which steps are computed; "
                    f"leave out {name} or {' and '.join(clash)}"
                )

    @property
    def kept(self) -> Domain | None:
        return self.domain if self.site == "hidden" else "plain"

    def plan(self) -> Schedule:
        """Which steps are computed."""
        if self.steps is not None:
            return Explicit(self.steps)
        asked, last = self.asked(), self.schedule == "last"
        if isinstance(self.searched, Calibration):
            lists = [steps.tolist() for steps in self.searched.tensors.values()]
            return Explicit(self.learned_list(lists, self.searched))
        if self.schedule in SPREADS:
            return Spread(asked, *SPREADS[self.schedule])
        if isinstance(asked, int):
            return UniformCount(asked, self.warmup, last)
        return replace(asked, last=last)

    def learned_list(self, lists: Iterable[Sequence[int]], origin: Calibration) -> tuple[int, ...]:
        """Of the lists of computed steps in a calibration the one that the parameters ask for."""
        return learned_list(lists, self.asked(), origin.fingerprint.steps, exact=self.interval is not None)

    def asked(self) -> int | Uniform:
        """How many steps to compute: a number, or as many as a uniform schedule has."""
        return self.computed_steps or Uniform(INTERVAL if self.interval is None else self.interval, self.warmup)

    def gate(self) -> Gate:
        return Scheduled(self.plan())

    def check_run(self, run: RunFacts) -> None:
        super().check_run(run)
        if isinstance(self.searched, Calibration) and run.total is not None:
            differences = self.searched.check_run(RunFacts(run.total))
            if differences:
                raise CalibrationError(
                    f"the computed steps were {differences[0]}. Search again with `hasten tune`, or use schedule='even'"
                )

    def for_run(self, run: RunFacts) -> Self:
        unknown = run.total is None and self.schedule == "auto" and isinstance(self.asked(), Uniform)
        return self._uniform if unknown else self

    @cached_property
    def _uniform(self) -> Self:
        """The method on the uniform schedule, whose warm-up its differences have to know as well."""
        return replace(self, schedule="uniform")

    @property
    def first_difference(self) -> int:
        """The first step whose change from the step before it counts: the last of a uniform schedule's warm-up."""
        return self.warmup - 1 if isinstance(self.plan(), (Uniform, UniformCount)) else 0

    @property
    def saves(self) -> bool:
        return self.steps is not None or self.computed_steps is not None or self.interval != 1

    def with_computed_steps(self, count: int, total: int) -> Self:
        method = replace(self, computed_steps=count) if self.steps is None else self
        found = len(computed_steps(method.plan(), total))
        if found != count:
            raise ScheduleError(
                f"{type(self).__name__}: {found} of {told_steps(total)} computed, not {count}; leave out steps"
            )
        return method
