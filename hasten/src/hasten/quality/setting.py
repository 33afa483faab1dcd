"""What is done in a call: a caching method or a scheduler of ours, perhaps with a certificate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace as with_changes
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from hasten import registry
from hasten.caching.default import default_method
from hasten.caching.method import CachingMethod, ScheduledMethod
from hasten.caching.methods import Reuse
from hasten.calibration import Calibration
from hasten.errors import CertificateError, ConfigError
from hasten.io import digest_of
from hasten.pipeline.caller import Caller
from hasten.pipeline.hooks import still
from hasten.pipeline.runs import Run
from hasten.pipeline.view import denoisers
from hasten.quality.certificate import Certificate, certificates, shipped
from hasten.quality.conditions import Call
from hasten.quality.model_facts import ModelFacts
from hasten.quality.refusal import certify_command, model_name, refusal
from hasten.quality.tolerance import EXACT, tier
from hasten.solvers import Leap, LeapScheduler

__all__ = ["FULL", "GONE", "LANE", "FixedLeap", "Setting", "check_quality", "find"]

LANE = "_hasten_setting"  # where a pipeline that `using` gave keeps the setting that it is for
GONE = "_hasten_gone"  # and what tells whether the acceleration that gave it was removed
FULL = Reuse(interval=1, warmup=1, site="output")  # computes every step, of runs of any length


class FixedLeap(LeapScheduler):
    """A LEAP scheduler that takes its own number of evaluations, however many steps a pipeline is called with."""

    _evaluations: int
    _setting: Setting | None = None
    asked: int | None = None  # steps, by the latest call

    @classmethod
    def make(cls, leap: Leap, evaluations: int, setting: Setting) -> Self:
        """The scheduler of a fit.

        Args:
            leap: the fit.
            evaluations: to take.
            setting: whose certificate, if it has one, a call has to meet.
        """
        assert leap.calibration is not None
        made = cls.of(leap.calibration, guidance=leap.guidance)  # type: ignore[arg-type]
        made._evaluations = evaluations
        made._choose(made._checked.count(evaluations), leap.guidance)
        made._setting = setting
        return made

    def serves(self, setting: Setting) -> bool:
        """Whether it is the scheduler of that setting."""
        return self._setting is setting

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """Prepare a run of the evaluations that it takes.

        Raises:
            CertificateError: if the call is outside of the conditions of the certificate.
        """
        self.asked = num_inference_steps or next((len(x) for x in (sigmas, timesteps) if x is not None), None)
        if self._setting is not None:
            self._setting.check_start(self.asked, (mu, self.config.shift_mu))
        super().set_timesteps(self._evaluations, device, mu=mu)


@dataclass(frozen=True)
class Setting:
    """What is done in a call.

    Attributes:
        method: on the transformers.
        leap: a fit whose scheduler takes the place of the pipeline's own.
        evaluations: of that scheduler.
        certificate: whose conditions a call has to meet.
        name: of the model, for messages.
    """

    method: CachingMethod
    leap: Leap | None = None
    evaluations: int = 0
    certificate: Certificate | None = None
    name: str = ""

    @classmethod
    def of(cls, certificate: Certificate, name: str) -> Setting:
        """The setting of a certificate."""
        (method,) = registry.parse(certificate.expression)
        if isinstance(method, Leap):
            return cls(FULL, method, certificate.computed_steps, certificate, name)
        if not isinstance(method, CachingMethod):
            raise CertificateError(f"{certificate.setting!r} is neither a caching method nor LEAP. Certify again")
        return cls(method, certificate=certificate, name=name)

    def with_computed_steps(self, count: int) -> Setting:
        """The same method, or of a full run the default one, with so many computed steps; nothing is certified then.

        Raises:
            ConfigError: if it cannot have that number.
        """
        if self.leap is not None:
            assert isinstance(self.leap.calibration, Calibration)
            known = sorted(map(int, self.leap.calibration.report))
            if count not in known:
                listed = ", ".join(map(str, known))
                raise ConfigError(f"LEAP was fitted for {listed} evaluations, not for {count}; ask for one of these")
            return with_changes(self, evaluations=count, certificate=None)
        if not isinstance(self.method, ScheduledMethod):
            raise ConfigError(
                f"{type(self.method).__name__} decides by a threshold how many steps it computes; "
                "take a method with a schedule, or quality=..."
            )
        method = default_method() if self.method == FULL else self.method
        return Setting(with_changes(method, interval=None, steps=None, computed_steps=count), name=self.name)

    def scheduler(self) -> FixedLeap | None:
        """The scheduler to put in place of the pipeline's own; None to leave it."""
        if self.leap is None:
            return None
        return FixedLeap.make(self.leap, self.evaluations, self)

    @property
    def label(self) -> str:
        """What summaries call it."""
        if self.leap is not None:
            return type(self.leap).__name__
        return "full run" if self.method == FULL else type(self.method).__name__

    def describe(self) -> dict[str, Any]:
        """It as plain data."""
        found: dict[str, Any] = {"method": registry.format(self.leap or self.method)}
        if self.leap is not None:
            found["computed_steps"] = self.evaluations
        if self.certificate is not None:
            found |= {"quality": self.certificate.quality, "certificate": digest_of(self.certificate.content)}
            found["method"] = self.certificate.setting  # without the folder that it was found in
        return found

    def __str__(self) -> str:
        what = "full run" if self.method == FULL else repr(self.method)
        if self.leap is not None:
            what = f"{self.leap!r}, {self.evaluations} evaluations"
        return what if self.certificate is None else f"quality {self.certificate.quality!r}: {what}"

    def replaced_steps(self, run: Run) -> int | None:
        """How many steps the call of a run asked for, where a scheduler of ours takes fewer in their place."""
        scheduler = None if run.view is None else run.view.scheduler
        return scheduler.asked if isinstance(scheduler, FixedLeap) else None

    def check(self, name: str, module: nn.Module, run: Run) -> None:
        """Find out at the start of a run whether its call may have this setting.

        Args:
            name: of the denoiser that is called, in its pipeline.
            module: that denoiser.
            run: on it.

        Raises:
            CertificateError: if the denoiser is not as it was certified, or the call outside of the conditions.
            ConfigError: if it is made on a pipeline with another scheduler than the setting's.
        """
        pipe = None if run.view is None else run.view.pipe
        given = getattr(pipe, "__dict__", {})
        if given.get(LANE, self) is not self and given[GONE]():
            raise ConfigError(
                "this pipeline is one that `using` gave, of an acceleration that was removed or replaced since: enter "
                "`using` of the one that is at work"
            )
        if given.get(LANE, self) is not self:
            raise ConfigError(
                "this pipeline is one that `using` gave, and another setting is at work: call it within that `with`, "
                "before it ends"
            )
        scheduler = None if run.view is None else run.view.scheduler
        if self.leap is not None and not (isinstance(scheduler, FixedLeap) and scheduler.serves(self)):
            raise ConfigError("this setting has a scheduler of its own: call the pipeline that `using` gives")
        if self.leap is None and isinstance(scheduler, FixedLeap):
            raise ConfigError("this setting needs the pipeline's own scheduler: call the pipeline that `using` gives")
        if self.certificate is None:
            return
        conditions, call = self.certificate.conditions, Call.of(run)
        changes = [] if pipe is None else conditions.pipeline_differences(pipe)
        changes += conditions.models[name].differences(ModelFacts.of(module))
        if self.leap is None:
            changes += conditions.scheduler_differences(scheduler)
        else:  # it takes steps of its own; what was asked for it has seen
            call = with_changes(call, timesteps=None, steps=None)
        self._refuse(changes, call, {name: module}, pipe)
        if self.leap is None:
            self._refuse_manner(conditions.spacing_differences(call.timesteps))

    def check_start(self, steps: int | None, shift: tuple[float | None, float | None]) -> None:
        """As `check`, for a scheduler that learns what a call asks for, before the first forward.

        Args:
            steps: that are asked for.
            shift: of the schedule, here and where the scheduler was fitted; None where there is none.
        """
        if self.certificate is None:
            return
        conditions, call, caller = self.certificate.conditions, Call.under_way(steps), Caller()
        pipe = caller.pipe
        modules = {} if pipe is None else denoisers(pipe)
        changes = [] if pipe is None else conditions.pipeline_differences(pipe)
        with still(modules.values()):
            changes += conditions.model_differences(modules) if modules else []
        self._refuse(changes, call, modules, pipe)
        self._refuse_manner(conditions.asked_differences(caller.given or {}))
        here, own = shift
        if here is not None and own is not None and abs(here - own) > 1e-3:
            self._refuse_manner(
                [f"certified at shift {own:.4g}, this call has {here:.4g}; give the size that was certified"]
            )

    def check_arguments(self, given: Mapping[str, Any], modules: Mapping[str, nn.Module], pipe: Any) -> None:
        """As `check`, of a call of a pipeline that is still to be made, as far as its arguments tell."""
        if self.certificate is not None:
            self._refuse([], Call.given(given), modules, pipe)

    def _refuse(self, changes: list[str], call: Call, modules: Mapping[str, nn.Module], pipe: Any) -> None:
        """Raise what a pipeline that was changed, or a call outside of the conditions, ends with."""
        assert self.certificate is not None
        certificate = self.certificate
        differences = [*changes, *certificate.conditions.call_differences(call)]
        if differences:
            command = certify_command(
                certificate.quality,
                modules,
                self.name,
                pipe=pipe,
                certificate=certificate,
                call=call,
                changed=bool(changes),
            )
            raise refusal(certificate, differences, command)
        self._refuse_manner(certificate.conditions.manner_differences(call))

    def _refuse_manner(self, differences: list[str]) -> None:
        assert self.certificate is not None
        if differences:
            raise refusal(self.certificate, differences, "`hasten certify` draws no other calls")


def check_quality(quality: str) -> None:
    """Find out, before a model is there, whether a quality is one that could be certified for it.

    Raises:
        UnknownNameError: if it is no tier, and never was certified.
        CertificateError: for the path of what is no certificate.
    """
    if quality.endswith(".json"):
        Certificate.load(Path(quality))
    elif quality != EXACT and quality not in (known.quality for known in (*certificates(), *shipped())):
        tier(quality)


def find(quality: str, pipe: Any, modules: Mapping[str, nn.Module], scheduler: Any) -> Setting:
    """The setting of a tier that is certified for a model, or of a certificate's file.

    Args:
        quality: of `TIERS`, a name given at certification, `"exact"`, or the path of a certificate.
        pipe: the pipeline; None for a bare transformer, which `"exact"` alone is for.
        modules: transformers by name.
        scheduler: the pipeline's own.

    Raises:
        UnknownNameError: for a quality that is no tier and was never certified.
        CertificateError: if nothing is certified for this model and scheduler, or more than one thing.
    """
    name = model_name(pipe)
    if quality == EXACT:
        return Setting(FULL, name=name)
    if quality.endswith(".json"):
        certificate = Certificate.load(Path(quality))
        differences = _differences(certificate, pipe, modules, scheduler)
        if differences:
            raise refusal(certificate, differences, _command(certificate.quality, pipe, modules, certificate))
        return Setting.of(certificate, name)
    known: list[Certificate] = []
    fitting: list[Certificate] = []
    for source in (certificates, shipped):  # what was certified here takes precedence
        found = [certificate for certificate in source() if certificate.quality == quality]
        fitting = fitting or [one for one in found if not _differences(one, pipe, modules, scheduler)]
        known += found
    if not known:
        tier(quality)  # refuses what is no tier
    if len(fitting) > 1:
        listed = "; ".join(f"{one.conditions.options} in {one.folder}" for one in fitting)
        raise CertificateError(
            f"{len(fitting)} certificates of quality {quality!r} are for this model ({listed}); "
            "give the path of one as quality=..."
        )
    if fitting:
        return Setting.of(fitting[0], name)
    model = " and ".join(type(module).__name__ for module in modules.values())
    near = min(known, key=lambda one: len(_differences(one, pipe, modules, scheduler)), default=None)
    reason = "" if near is None else f"; the nearest is {'; '.join(_differences(near, pipe, modules, scheduler))}"
    raise CertificateError(
        f"quality {quality!r} is not certified for this {model}{reason}. {_command(quality, pipe, modules, near)}"
    )


def _command(quality: str, pipe: Any, modules: Mapping[str, nn.Module], near: Certificate | None) -> str:
    """What certifies a pipeline for which nothing is; `near` is certified for one that is nearly the same."""
    name = model_name(pipe)
    changed = near is not None and near.model == name and not near.conditions.recast(modules)
    return certify_command(quality, modules, name, pipe=pipe, certificate=near, changed=changed)


def _differences(certificate: Certificate, pipe: Any, modules: Mapping[str, nn.Module], scheduler: Any) -> list[str]:
    conditions = certificate.conditions
    return [
        *conditions.pipeline_differences(pipe),
        *conditions.model_differences(modules),
        *conditions.scheduler_differences(scheduler),
    ]
