"""What is done in a call: a caching method or a scheduler of ours, perhaps with a certificate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from hasten import registry
from hasten.caching.method import CachingMethod, ScheduledMethod
from hasten.caching.methods import Reuse
from hasten.errors import CertificateError, ConfigError
from hasten.io import digest_of
from hasten.pipeline.runs import Run
from hasten.quality.certificate import Certificate, certificates, shipped
from hasten.quality.conditions import Call
from hasten.quality.tolerance import EXACT, TIERS, tier
from hasten.solvers import Leap, LeapScheduler

__all__ = ["FULL", "FixedLeap", "Setting", "find"]

FULL = Reuse(interval=1, site="output")  # computes every step


class FixedLeap(LeapScheduler):
    """A LEAP scheduler that takes its own number of evaluations, however many steps a pipeline is called with."""

    _evaluations: int
    _certificate: Certificate | None = None
    _command = ""

    @classmethod
    def make(cls, leap: Leap, evaluations: int, certificate: Certificate | None = None, command: str = "") -> Self:
        """The scheduler of a fit.

        Args:
            leap: the fit.
            evaluations: to take.
            certificate: whose number of steps a call has to ask for.
            command: that certifies other numbers.
        """
        assert leap.calibration is not None
        made = cls.of(leap.calibration)  # type: ignore[arg-type]
        made._evaluations, made._certificate, made._command = evaluations, certificate, command
        made.set_timesteps(certificate.conditions.steps if certificate is not None else evaluations)
        return made

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
            CertificateError: if the call asks for other steps, or has another shift, than the certificate is for.
        """
        if self._certificate is not None:
            asked = num_inference_steps or next((len(x) for x in (sigmas, timesteps) if x is not None), None)
            if asked != self._certificate.conditions.steps:
                raise _refusal(
                    self._certificate,
                    [f"certified for {self._certificate.conditions.steps} steps, this call has {asked}"],
                    f"{self._command} --steps {asked}",
                )
            own = self.config.shift_mu
            if mu is not None and own is not None and abs(mu - own) > 1e-3:
                reason = f"certified at shift {own:.4g}, this call has {mu:.4g}: another size"
                raise _refusal(self._certificate, [reason], self._command)
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
        """The same method with another number of computed steps, for which nothing is certified.

        Raises:
            ConfigError: if it cannot have that number.
        """
        if self.leap is not None:
            return replace(self, evaluations=count, certificate=None)
        if not isinstance(self.method, ScheduledMethod):
            raise ConfigError(
                f"{type(self.method).__name__} decides by a threshold how many steps it computes; "
                "take a method with a schedule, or quality=..."
            )
        method = Reuse() if self.method == FULL else self.method
        return Setting(replace(method, interval=None, steps=None, computed_steps=count), name=self.name)

    def scheduler(self) -> FixedLeap | None:
        """The scheduler to put in place of the pipeline's own; None to leave it."""
        if self.leap is None:
            return None
        return FixedLeap.make(self.leap, self.evaluations, self.certificate, self._command())

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

    def check(self, run: Run) -> None:
        """Find out at the start of a run whether its call may have this setting.

        Raises:
            CertificateError: if the call is outside of the certificate's conditions.
            ConfigError: if it is made on a pipeline with another scheduler than the setting's.
        """
        scheduler = None if run.view is None else run.view.scheduler
        if self.leap is not None and not isinstance(scheduler, FixedLeap):
            raise ConfigError("this setting has a scheduler of its own: call the pipeline that `using` gives")
        if self.leap is None and isinstance(scheduler, FixedLeap):
            raise ConfigError("this setting needs the pipeline's own scheduler: call the pipeline that `using` gives")
        if self.certificate is None:
            return
        call, conditions = Call.of(run), self.certificate.conditions
        differences = conditions.call_differences(call)
        if self.leap is None:
            differences += conditions.scheduler_differences(scheduler)
            differences += conditions.step_differences(call.timesteps)
        if differences:
            raise _refusal(self.certificate, differences, self._command(call))

    def _command(self, call: Call | None = None) -> str:
        """What would certify a call like this one."""
        quality = self.certificate.quality if self.certificate is not None else ""
        words = ["hasten certify", "--model", self.name or "MODEL"]
        words += ["--quality", quality] if quality in TIERS else []
        if call is None:
            return " ".join(words)
        for name in ("height", "width"):
            if (length := getattr(call, name)) is not None:
                words += [f"--{name}", str(length)]
        words += [] if call.timesteps is None or self.leap is not None else ["--steps", str(len(call.timesteps))]
        own = {} if self.certificate is None else self.certificate.conditions.guidance
        for scale, value in call.guidance.items():
            low, high = own.get(scale, (1.0, 1.0))
            if scale == "true_cfg_scale" and value != 1:
                words += ["--guidance", f"{value:g}"]
            elif scale != "true_cfg_scale" and not low <= value <= high:
                words += ["--set", f"{scale}={value:g}"]
        return " ".join(words)


def find(quality: str, modules: Mapping[str, nn.Module], scheduler: Any, name: str = "") -> Setting:
    """The setting of a tier that is certified for a model, or of a certificate's file.

    Args:
        quality: of `TIERS`, a name given at certification, `"exact"`, or the path of a certificate.
        modules: transformers by name.
        scheduler: the pipeline's own.
        name: of the model, for messages.

    Raises:
        UnknownNameError: for a quality that is no tier and was never certified.
        CertificateError: if nothing is certified for this model and scheduler, or more than one thing.
    """
    if quality == EXACT:
        return Setting(FULL, name=name)
    if quality.endswith(".json"):
        certificate = Certificate.load(Path(quality))
        differences = _differences(certificate, modules, scheduler)
        if differences:
            raise _refusal(certificate, differences, f"hasten certify --model {name or 'MODEL'}")
        return Setting.of(certificate, name)
    known: list[Certificate] = []
    fitting: list[Certificate] = []
    for source in (certificates, shipped):  # what was certified here takes precedence
        found = [certificate for certificate in source() if certificate.quality == quality]
        fitting = fitting or [one for one in found if not _differences(one, modules, scheduler)]
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
    near = min((_differences(certificate, modules, scheduler) for certificate in known), key=len, default=[])
    reason = f"; the nearest is {'; '.join(near)}" if near else ""
    raise CertificateError(
        f"quality {quality!r} is not certified for this {model}{reason}. "
        f"Certify it: hasten certify --model {name or 'MODEL'} --quality {quality}"
    )


def _differences(certificate: Certificate, modules: Mapping[str, nn.Module], scheduler: Any) -> list[str]:
    conditions = certificate.conditions
    return conditions.model_differences(modules) + conditions.scheduler_differences(scheduler)


def _refusal(certificate: Certificate, differences: list[str], command: str) -> CertificateError:
    return CertificateError(f"quality {certificate.quality!r}: {'; '.join(differences)}. Certify it: {command}")
