"""What a method learned of a model: made by `hasten.calibrate`, kept in a safetensors file, refused elsewhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from hasten.errors import CalibrationError
from hasten.io import write_whole

__all__ = ["Calibration", "Fingerprint", "Fit", "RunFacts", "Trace", "model_digest", "weights_digest"]

FORMAT = 1
HEADER = "hasten"
TIMESTEP_TOLERANCE = 1e-3  # relative to the largest timestep


@dataclass(frozen=True)
class Fingerprint:
    """What a calibration belongs to.

    Attributes:
        model: class of the transformer.
        config: digest of its configuration (its architecture).
        weights: digest of a sample of its weights.
        scheduler: class of the scheduler; empty for a bare transformer.
        timesteps: of the sampler, one a step.
        passes: forwards within a step, in order.
        guidance: guidance scale as far as the pipeline tells; None if it does not.
        site: where the features were taken.
    """

    model: str
    config: str
    weights: str
    scheduler: str
    timesteps: tuple[float, ...]
    passes: tuple[str, ...]
    guidance: float | None
    site: str

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
            `"output"` is `[S, T, M]` with M sampled numbers.
        fingerprint: what they belong to.
    """

    features: dict[str, dict[str, Tensor]]
    fingerprint: Fingerprint

    @property
    def passes(self) -> tuple[str, ...]:
        """Names of the passes, in order."""
        return tuple(self.features)

    def slots(self, site: str) -> list[str]:
        """Names of the site's slots.

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


@dataclass(frozen=True)
class Fit:
    """What a method makes of a trace: tensors to keep, and figures that tell how good the fit is."""

    tensors: dict[str, Tensor]
    report: dict[str, Any] = field(default_factory=dict)


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

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, whole or not at all; returns its path."""
        header = {
            "format": FORMAT,
            "method": self.method,
            "fingerprint": asdict(self.fingerprint),
            "report": self.report,
            "options": self.options,
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        path = Path(path)
        write_whole(path, save(tensors, metadata={HEADER: json.dumps(header)}))
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            CalibrationError: if the file is missing, damaged, or no calibration.
        """
        remedy = "Make it again with `hasten calibrate`."
        path = Path(path)
        if not path.is_file():
            raise CalibrationError(f"{path}: no such file. {remedy}")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(HEADER, "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        except (SafetensorError, OSError, ValueError) as error:
            raise CalibrationError(f"{path}: damaged or cut off ({error}). {remedy}") from error
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            found = header.get("format") if isinstance(header, dict) else None
            raise CalibrationError(
                f"{path}: not a calibration of format {FORMAT} (found {found!r}), perhaps of another version. {remedy}"
            )
        try:
            known = {f.name for f in fields(Fingerprint)}
            content = {name: value for name, value in header["fingerprint"].items() if name in known}
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
            fingerprint = Fingerprint(**values)
            return cls(header["method"], tensors, fingerprint, header["report"], header["options"], str(path))
        except (KeyError, TypeError, AttributeError) as error:
            raise CalibrationError(f"{path}: the header is incomplete ({error}). {remedy}") from error

    @classmethod
    def of(cls, method: str, given: Calibration | str | Path | None) -> Calibration:
        """The calibration itself or the one in a file, if it is of that method.

        Raises:
            CalibrationError: if there is none, or it is of another method.
        """
        if given is None:
            how = f"`hasten calibrate --methods {method}` or hasten.calibrate(pipe, {method!r}, calls)"
            if method in ("leap", "leapcache"):
                how = f"`hasten tune --methods {method}` or hasten.fit_{method}(pipe, calls, ...)"
            raise CalibrationError(f"{method} has to be fitted to the model first: {how}, then give calibration=...")
        calibration = given if isinstance(given, Calibration) else cls.load(given)
        if calibration.method != method:
            raise CalibrationError(f"this is a calibration of {calibration.method!r}, not of {method!r}")
        return calibration

    def check_model(self, model: nn.Module) -> list[str]:
        """Differences between the model that was calibrated and this one, in words."""
        own = self.fingerprint
        differences = []
        if own.model != type(model).__name__:
            differences.append(f"calibrated for {own.model}, this is {type(model).__name__}")
        elif own.config != model_digest(model):
            differences.append(f"calibrated for a {own.model} of another configuration (size, depth or inputs)")
        elif own.weights != weights_digest(model):
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


def _near(a: Sequence[float], b: Sequence[float]) -> bool:
    largest = max(abs(x) for x in b) or 1.0
    return all(abs(x - y) <= TIMESTEP_TOLERANCE * largest for x, y in zip(a, b, strict=True))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def model_digest(model: nn.Module) -> str:
    """Digest of an architecture: the shapes of all parameters by name."""
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    return _digest(json.dumps(shapes, sort_keys=True).encode())


def weights_digest(model: nn.Module, samples: int = 16) -> str:
    """Digest of a few numbers of some parameters, rounded so that a change of dtype leaves it as it is."""
    named = sorted(model.named_parameters(), key=lambda item: item[0])
    chosen: Mapping[str, Tensor] = dict(named[:: max(1, len(named) // samples)])
    numbers = {}
    for name, parameter in chosen.items():
        flat = parameter.detach().flatten()
        if flat.is_meta:  # offloaded weights are elsewhere
            return ""
        some = flat[:: max(1, flat.numel() // 8)][:8].to(torch.bfloat16).float()
        numbers[name] = some.tolist()
    return _digest(json.dumps(numbers).encode())
