"""What LEAP's files have to hold, a calibration's as well as a `scheduler_config.json`, and whose they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from hasten.calibration import Calibration, declare_contents, model_digest
from hasten.errors import CalibrationError, ConfigError, ScheduleError
from hasten.io import conform
from hasten.pipeline.view import denoisers
from hasten.solvers.tables import ARRAYS, Axis, Table, unpacked
from hasten.weights import same_weights

__all__ = [
    "LEAP",
    "MORE",
    "REMEDY",
    "Content",
    "arguments_of",
    "as_json",
    "check_arguments",
    "check_pipeline",
    "denoiser_of",
    "refuse_other_model",
]

LEAP = "leap"  # what a calibration of this scheduler is called
REMEDY = "Make it again with `hasten tune`."
# What `fit_leap` writes into the options of a calibration for the scheduler.
OPTIONS = ("prediction_type", "num_train_timesteps", "shift_mu", "guidances", "mixtures", "noise_scale", "plain")
MORE = ("guidance_argument", "guidance_beside", "interpolated_over")  # likewise; earlier files lack them


@dataclass(frozen=True)
class Owner:
    """The denoiser that tables belong to; see `hasten.calibration.Fingerprint`."""

    model: str
    config: str
    weights: str


@dataclass(frozen=True)
class Content:
    """What a `LeapScheduler` is made of, as JSON holds it; see there."""

    tables: dict[str, Table]
    prediction_type: Literal["flow_prediction", "epsilon", "v_prediction"]
    num_train_timesteps: int
    shift_mu: float | None
    guidances: tuple[float | None, ...]
    mixtures: tuple[float | None, ...]
    guidance: float | None
    noise_scale: float
    fingerprint: Owner | None
    certificate: dict[str, Any] | None
    plain: dict[str, Any] | None
    guidance_argument: str | None = None
    guidance_beside: dict[str, float | None] | None = None
    interpolated_over: Literal["logarithm"] | None = None

    def __post_init__(self) -> None:
        if not self.tables:
            raise ValueError("it has no table")
        if self.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps is {self.num_train_timesteps}, expected at least 1")
        if not self.noise_scale > 0:
            raise ValueError(f"noise_scale is {self.noise_scale}, expected a positive number")
        several = len(self.guidances) > 1
        if not self.guidances or len(self.mixtures) != len(self.guidances) or (several and None in self.guidances):
            raise ValueError("each fit needs a guidance scale and a mixture")
        if any(len(set(known)) < len(known) for known in (self.guidances, _known(self.mixtures))):
            raise ValueError("two fits have the same guidance; fit at scales that differ in what they make")
        if self.interpolated_over is not None:
            if min(self.axis.scales) <= 0:
                raise ValueError(f"logarithms are of positive guidance scales, not of {list(self.guidances)}")
            if len({self.axis.place(scale) for scale in self.axis.scales}) < len(self.guidances):
                raise ValueError("two fits have the same guidance, as far as their logarithms tell")
            if any(table.timesteps_by_scale is None for table in self.tables.values()):
                raise ValueError("what is interpolated over the logarithm of the guidance needs times by scale")
        for count, table in self.tables.items():
            if not (count.isascii() and count.isdigit() and count == str(int(count))):
                raise ValueError(f"a table is for {count!r} evaluations, expected a number")
            table.check(int(count), self.axis, self.prediction_type)

    @property
    def axis(self) -> Axis:
        """The guidance scales of the fits, and how to go between them."""
        scales = (0.0 if scale is None else scale for scale in self.guidances)
        return Axis(tuple(scales), self.interpolated_over == "logarithm")

    @property
    def one_pass(self) -> bool:
        """Whether it was fitted to runs without guidance, as far as it knows."""
        told = self.fingerprint is not None and {*self.guidances, *self.mixtures} == {None}
        return told and all(table.passes is None for table in self.tables.values())

    def count(self, wanted: int | None, asked: Collection[str] = ()) -> str:
        """A number of evaluations as tables are called.

        Args:
            wanted: the number.
            asked: names of other arguments of the call, which do not go with LEAP's times.

        Raises:
            ScheduleError: if there is no table for it.
        """
        if str(wanted) not in self.tables:
            known = ", ".join(sorted(self.tables, key=int))
            rest = f" and leave {' and '.join(asked)} out" if asked else ""
            raise ScheduleError(
                f"LEAP was fitted for {known} evaluations, not for {wanted}; use num_inference_steps={known}{rest}"
            )
        return str(wanted)


def _known(scales: tuple[float | None, ...]) -> tuple[float | None, ...]:
    return () if None in scales else scales


def as_json(value: Any) -> Any:
    """Mappings and sequences as JSON knows them: diffusers freezes what it keeps."""
    if isinstance(value, Mapping):
        return {name: as_json(item) for name, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, list | tuple) else value


def check_arguments(content: Mapping[str, Any]) -> Content:
    """The arguments of a `LeapScheduler`, checked.

    Raises:
        ValueError: naming what is wrong.
    """
    made: Content = conform(content, Content, "the configuration")
    return made


def arguments_of(calibration: Calibration) -> dict[str, Any]:
    """Arguments of the scheduler of a fit."""
    own = calibration.fingerprint
    options = {name: calibration.options[name] for name in (*OPTIONS, *MORE) if name in calibration.options}
    return {
        "tables": unpacked(calibration.tensors),
        "fingerprint": {"model": own.model, "config": own.config, "weights": own.weights},
        "certificate": calibration.options.get("certificate"),
        **options,
    }


def _check_fit(calibration: Calibration) -> None:
    arguments = arguments_of(calibration)
    missing = [name for name in OPTIONS if name not in arguments]
    if missing:
        raise ValueError(f"its options lack {missing[0]!r}")
    conform({**arguments, "guidance": None}, Content, "the fit")


declare_contents(LEAP, ARRAYS, _check_fit)


def check_pipeline(pipe: Any) -> None:
    """Raise a ConfigError for what is no pipeline with a scheduler."""
    if not callable(pipe) or getattr(pipe, "scheduler", None) is None:
        raise ConfigError(
            f"LEAP replaces the scheduler of a pipeline, and {type(pipe).__name__} has none; give a diffusers pipeline"
        )


def denoiser_of(pipe: Any) -> tuple[str, nn.Module]:
    """The name and the module that a fingerprint is of; several denoisers, such as the two of Wan 2.2, are one module.

    Raises:
        TargetError: if there is none.
    """
    found = denoisers(pipe)
    name = "+".join(type(model).__name__ for model in found.values())
    return name, nn.ModuleDict(found) if len(found) > 1 else next(iter(found.values()))


def refuse_other_model(own: Owner | None, pipe: Any) -> None:
    """Raise a CalibrationError if a pipeline's denoiser is another one; offloaded weights are not compared."""
    if own is None:
        return
    name, model = denoiser_of(pipe)
    if own.model != name:
        wrong = f"fitted for {own.model}, this is {name}"
    elif own.config != model_digest(model) and any(".lora_" in name for name, _ in model.named_parameters()):
        raise CalibrationError(
            f"leap: fitted without the adapter that is loaded into this {own.model}. Fit with it on, or unload it "
            "(pipe.unload_lora_weights())"
        )
    elif own.config != model_digest(model):
        wrong = f"fitted for a {own.model} of another configuration (size, depth or inputs)"
    elif not same_weights(own.weights, model):
        wrong = "fitted for other weights of the same architecture"
    else:
        return
    raise CalibrationError(f"leap: {wrong}. Fit again with `hasten tune`")
