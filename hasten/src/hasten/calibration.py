"""What a method learned of a model: made by `hasten.calibrate`, kept in a safetensors file, refused elsewhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from hasten.errors import CalibrationError
from hasten.io import Array, Kind, check_arrays, read_tensors, write_tensors
from hasten.weights import same_weights

__all__ = [
    "Calibration",
    "Domain",
    "Fingerprint",
    "Fit",
    "RunFacts",
    "Trace",
    "declare_contents",
    "model_digest",
]

Domain = Literal["plain", "normed"]
MOST_BYTES = 4 << 30
TIMESTEP_TOLERANCE = 1e-3  # relative to the largest timestep


@dataclass(frozen=True)
class Fingerprint:
    """What a calibration belongs to.

    Attributes:
        model: class of the transformer.
        config: digest of its configuration (its architecture).
        weights: a few of its weights, see `hasten.weights`.
        scheduler: class of the scheduler; empty for a bare transformer.
        timesteps: of the sampler, one a step.
        passes: forwards within a step, in order.
        guidance: guidance scale as far as the pipeline tells; None if it does not.
        site: where the features were taken.
        domain: whether the fit is to image tokens as they are, or as the model's final norm leaves them.
    """

    model: str
    config: str
    weights: str
    scheduler: str
    timesteps: tuple[float, ...]
    passes: tuple[str, ...]
    guidance: float | None
    site: str
    domain: Domain = "plain"

    @property
    def steps(self) -> int:
        """Steps of the sampler."""
        return len(self.timesteps)


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run when it starts; None where only the transformer is known."""

    total: int | None = None
    timesteps: tuple[float, ...] | None = None
    guidance: float | None = None


@dataclass(frozen=True)
class Trace:
    """Features of uncached runs.

    Attributes:
        features: `[S, T, ...]` for each pass and slot: S runs of T steps. `"hidden"` (what leaves the last block) and
            `"entry"` (what enters the first one) are `[S, T, N, D]` with N sampled tokens, `"modulated"` likewise,
            `"output"` is `[S, T, M]` with M sampled numbers. `"normed"` is `"hidden"` as the model's final norm leaves
            it, where that norm is known.
        fingerprint: what they belong to.
    """

    features: dict[str, dict[str, Tensor]]
    fingerprint: Fingerprint

    @property
    def passes(self) -> tuple[str, ...]:
        """Names of the passes, in order."""
        return tuple(self.features)

    def cache_keys(self, site: str) -> list[str]:
        """Names of the site's features.

        Raises:
            CalibrationError: if the trace is of another site.
        """
        first = self.features[self.passes[0]]
        names = {"hidden": ["hidden"], "output": ["output"]}.get(site, [name for name in first if "/" in name])
        if not names or not set(names) <= set(first):
            raise CalibrationError(
                f"the trace holds {', '.join(first)}, and nothing of site {site!r}; record that site"
            )
        return names

    def domain(self, site: str, asked: Domain | None) -> Domain:
        """The domain to fit in: the one that is asked for, else the normed one where the trace has it.

        Raises:
            CalibrationError: if the trace does not have what is asked for.
        """
        able = site == "hidden" and all("normed" in slots for slots in self.features.values())
        if asked == "normed" and not able:
            raise CalibrationError(
                f"domain='normed' needs the image tokens behind a final norm that is known, and this trace of "
                f"{self.fingerprint.model} at site {site!r} has none; use domain='plain'"
            )
        return asked or ("normed" if able else "plain")

    def steps(self, key: str, domain: Domain) -> dict[str, Tensor]:
        """The features under a cache key in a domain, `[S, T, N, D]` float32 by pass."""
        return {name: slots["normed" if domain == "normed" else key].float() for name, slots in self.features.items()}


@dataclass(frozen=True)
class Fit:
    """What a method makes of a trace: tensors to keep, and figures that tell how good the fit is."""

    tensors: dict[str, Tensor]
    report: dict[str, Any] = field(default_factory=dict)
    domain: Domain = "plain"


@dataclass(frozen=True, eq=False)
class Calibration:
    """Fitted tensors of one method for one model.

    Attributes:
        method: name of the method.
        tensors: what was fitted.
        fingerprint: what it belongs to.
        report: figures of the fit.
        options: options of the fit.
        file: where it was read from; None for one that was not.
    """

    method: str
    tensors: dict[str, Tensor]
    fingerprint: Fingerprint
    report: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    file: str | None = None

    def __repr__(self) -> str:
        origin = "" if self.file is None else f", file={self.file!r}"
        return f"Calibration({self.method!r} for {self.fingerprint.model}, {self.fingerprint.steps} steps{origin})"

    @cached_property
    def digest(self) -> str:
        """Of what decides on forecasts: the tensors, and what they belong to."""
        parts = [f"{self.method} {self.fingerprint}".encode()]
        for name, tensor in sorted(self.tensors.items()):
            array = np.ascontiguousarray(tensor.detach().cpu().numpy())
            parts += [f"{name} {array.dtype} {array.shape}".encode(), array.tobytes()]
        return _digest(b"\0".join(parts))

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, atomically; returns its path.

        Raises:
            ConfigError: if the report or the options hold something that is no JSON, or a number that is not finite.
            FileError: if the file cannot be written.
        """
        content = {
            "method": self.method,
            "fingerprint": asdict(self.fingerprint),
            "report": self.report,
            "options": self.options,
        }
        return write_tensors(path, KIND, {name: t.detach().cpu().numpy() for name, t in self.tensors.items()}, content)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        What the method demands of its tensors is checked as soon as the method's module is loaded, at the latest when
        the method is given the calibration.

        Raises:
            CalibrationError: if the file is missing, damaged, or no calibration.
        """
        arrays, content = read_tensors(path, KIND)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        loaded = cls(content.method, tensors, content.fingerprint, content.report, content.options, str(path))
        loaded._check_contents(f"{path}: no usable calibration")
        return loaded

    def _check_contents(self, what: str) -> None:
        arrays, check = _CONTENTS.get(self.method, (None, None))
        if arrays is None:
            return
        try:
            plain = {name: tensor.detach().cpu().numpy() for name, tensor in self.tensors.items()}
            check_arrays(plain, arrays, {"T": self.fingerprint.steps})
            if check is not None:
                check(self)
        except (ValueError, TypeError) as error:
            raise CalibrationError(f"{what} of {self.method} ({error}). {KIND.remedy}") from error

    @classmethod
    def of(cls, method: str, given: Calibration | str | Path | None) -> Calibration:
        """The calibration itself or the one in a file, if it is of that method.

        Raises:
            CalibrationError: if there is none, or it is of another method, or its tensors are not the method's.
        """
        if given is None:
            how = f"`hasten calibrate --methods {method}` or hasten.calibrate(pipe, {method!r}, calls)"
            if method in ("leap", "leapcache"):
                how = f"`hasten tune --methods {method}` or hasten.fit_{method}(pipe, calls, ...)"
            raise CalibrationError(f"{method} has to be fitted to the model first: {how}, then give calibration=...")
        calibration = given if isinstance(given, Calibration) else cls.load(given)
        if calibration.method != method:
            raise CalibrationError(f"this is a calibration of {calibration.method!r}, not of {method!r}")
        calibration._check_contents("no usable calibration")
        return calibration

    def check_model(self, model: nn.Module) -> list[str]:
        """Differences between the model that was calibrated and this one, in words."""
        own = self.fingerprint
        differences = []
        if own.model != type(model).__name__:
            differences.append(f"calibrated for {own.model}, this is {type(model).__name__}")
        elif own.config != model_digest(model):
            differences.append(f"calibrated for a {own.model} of another configuration (size, depth or inputs)")
        elif not same_weights(own.weights, model):
            differences.append("calibrated for other weights of the same architecture")
        return differences

    def check_run(self, run: RunFacts) -> list[str]:
        """Differences between the sampling that was calibrated and a run, in words."""
        own = self.fingerprint
        differences = []
        if run.total is not None and run.total != own.steps:
            differences.append(f"calibrated for {own.steps} steps, this run has {run.total}")
        elif run.timesteps is not None and not _near(run.timesteps, own.timesteps):
            first = next(i for i, (a, b) in enumerate(zip(run.timesteps, own.timesteps, strict=True)) if a != b)
            differences.append(
                f"calibrated at other timesteps (step {first}: {own.timesteps[first]:.5g}, here "
                f"{run.timesteps[first]:.5g}): another resolution, shift or scheduler"
            )
        if run.guidance is not None and own.guidance is not None and abs(run.guidance - own.guidance) > 1e-6:
            differences.append(f"calibrated with guidance {own.guidance:g}, this run has {run.guidance:g}")
        return differences

    def check_passes(self, passes: Sequence[str]) -> list[str]:
        """Differences between the calibrated forwards within a step and those of a run, in words."""
        if set(passes) == set(self.fingerprint.passes):
            return []
        own, here = ", ".join(self.fingerprint.passes), ", ".join(passes)
        return [f"calibrated with the passes {own}, this run has {here}: guidance is on in one and off in the other"]


@dataclass(frozen=True)
class _Content:
    """What the header of a calibration's file holds."""

    method: str
    fingerprint: Fingerprint
    report: dict[str, Any]
    options: dict[str, Any]


KIND = Kind(
    "calibration", _Content, CalibrationError, "Make it again with `hasten calibrate` or `hasten tune`.", MOST_BYTES
)

_CONTENTS: dict[str, tuple[Mapping[str, Array], Callable[[Calibration], None] | None]] = {}


def declare_contents(
    method: str, arrays: Mapping[str, Array], check: Callable[[Calibration], None] | None = None
) -> None:
    """Say what the calibrations of a method hold, beside the code that fits and uses them.

    Args:
        method: name of the method.
        arrays: declarations by name, see `hasten.io.check_arrays`; the letter `T` is the number of calibrated steps.
        check: raises ValueError for what cannot be declared, such as relations between tensors.
    """
    _CONTENTS[method] = (arrays, check)


def _near(a: Sequence[float], b: Sequence[float]) -> bool:
    largest = max(abs(x) for x in b) or 1.0
    return all(abs(x - y) <= TIMESTEP_TOLERANCE * largest for x, y in zip(a, b, strict=True))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def model_digest(model: nn.Module) -> str:
    """Digest of an architecture: the shapes of all parameters by name."""
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    return _digest(json.dumps(shapes, sort_keys=True).encode())
