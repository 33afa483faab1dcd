"""What a bench is asked to measure: method expressions, read and sorted before any model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict as plain_dict
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from hasten import registry
from hasten.bench.subject import Subject
from hasten.caching import CachingMethod
from hasten.calibration import Calibration
from hasten.errors import ConfigError
from hasten.resolution.engine import ResolutionMethod
from hasten.solvers.content import LEAP

__all__ = ["Request", "caching_method", "check_counts", "file_facts", "parse_request", "reported"]


@dataclass(frozen=True)
class Request:
    """A caching method, a resolution method, one of each, or LEAP.

    Attributes:
        label: as it was written.
        caching: the cache; with a resolution method it works within its stages.
        resolution: the resolution method.
        leap: whether it is LEAP, which is a scheduler.
        calibration: LEAP's file; None for the one that comes with the model.
    """

    label: str
    caching: CachingMethod | None = None
    resolution: ResolutionMethod | None = None
    leap: bool = False
    calibration: Calibration | None = None

    @property
    def params(self) -> dict[str, Any]:
        """Parameters, as they are reported; of two methods, by name."""
        parts = [part for part in (self.resolution, self.caching) if part is not None]
        if len(parts) == 1:
            return reported(parts[0])
        names = [name for name, _ in registry.split(self.label)]
        return {name: reported(part) for name, part in zip(names, registry.parse(self.label), strict=True)}

    def steps(self, own: int) -> int:
        """Sampler steps: those that belong to a resolution method (a preset of 18 evaluations), or the model's own."""
        return getattr(self.resolution, "num_inference_steps", None) or own

    def fit(self, model: Subject) -> Calibration:
        """What LEAP learned of a model.

        Raises:
            ConfigError: if no file is given and none comes with the model.
        """
        if self.calibration is not None:
            return self.calibration
        if LEAP not in model.fitted:
            raise ConfigError(
                f"no LEAP fit comes with {model.name}: make one with `hasten tune`, and give leap:calibration=FILE"
            )
        return Calibration.of(LEAP, model.fitted[LEAP])


def parse_request(text: str) -> Request:
    """Read a method expression of the command line, such as `hicache:order=1` or `dvg:budget=0.5+foca:interval=4`.

    Raises:
        UnknownNameError: for a method or a parameter that does not exist.
        ConfigError: for a value, a file or a combination that cannot work.
    """
    label, parts = text.strip(), registry.split(text)
    names = [name for name, _ in parts]
    if names == [LEAP]:
        given = parts[0][1]
        if not given:
            return Request(label, leap=True)
        (solver,) = registry.parse(text)
        if solver.guidance is not None:
            raise ConfigError(f"{label!r}: leave guidance out; the calls of the pipeline show their own")
        return Request(label, leap=True, calibration=solver.calibration)
    if LEAP in names:
        raise ConfigError(f"{label!r}: leap is a scheduler, and other methods need the model's own; measure them apart")
    built = registry.parse(text)
    caching = [method for method in built if isinstance(method, CachingMethod)]
    resolution = [method for method in built if isinstance(method, ResolutionMethod)]
    for name, method in zip(names, built, strict=True):
        if method not in caching and method not in resolution:
            raise ConfigError(f"{name} is no caching or resolution method, and one is needed here, such as foca")
    if len(caching) > 1 or len(resolution) > 1:
        raise ConfigError(
            f"{label!r}: a combination is one resolution method and one cache, such as dvg:budget=0.5+foca:interval=4"
        )
    return Request(label, next(iter(caching), None), next(iter(resolution), None))


def caching_method(text: str) -> CachingMethod:
    """Read an expression of one caching method.

    Raises:
        UnknownNameError, ConfigError: as `parse_request`, and for a method that is no cache.
    """
    request = parse_request(text)
    if request.caching is None or request.resolution is not None:
        raise ConfigError(f"{request.label} is no caching method, and one is needed here, such as foca")
    return request.caching


def file_facts(texts: Iterable[str]) -> list[list[int]]:
    """Size and time of each file among values of parameters: what a measurement that goes on is made with."""
    files = [path.stat() for text in texts if (path := Path(text)).is_file()]
    return [[file.st_size, file.st_mtime_ns] for file in files]


def check_counts(counts: Sequence[int], steps: int) -> None:
    """Raise a `ConfigError` for a number of computed steps that a run of `steps` cannot have."""
    for count in counts:
        if not 1 <= count <= steps:
            raise ConfigError(f"computed steps must be between 1 and the {steps} steps of the run, got {count}")


def reported(method: Any) -> dict[str, Any]:
    """Parameters as plain data; of a calibration, only that there is one; without those left at None."""
    params = {item.name: (getattr(method, item.name), item.default) for item in fields(method)}
    return {name: _plain(value) for name, (value, usual) in params.items() if value is not None or usual}


def _plain(value: Any) -> Any:
    """A parameter as plain data."""
    if isinstance(value, Calibration):
        return "given"
    if isinstance(value, Path):
        return str(value)
    return plain_dict(value) if is_dataclass(value) and not isinstance(value, type) else value
