"""One family of errors: each says what was wrong, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AssetError",
    "ConfigError",
    "DetectorError",
    "DrapeError",
    "GamutError",
    "OutputError",
    "UnknownNameError",
    "WorkerError",
    "unknown",
]


class DrapeError(Exception):
    """Base of every error that drape raises on purpose."""


class ConfigError(DrapeError, ValueError):
    """A parameter or an array has a value or a shape that cannot work."""


class UnknownNameError(ConfigError):
    """A gait, light, weighting or detector of that name does not exist; the message names the nearest one."""


class GamutError(DrapeError, ValueError):
    """A colour profile cannot be used, or colours cannot be locked to its gamut."""


class AssetError(DrapeError, RuntimeError):
    """A downloaded or cached file is missing, damaged or not what was expected."""


class OutputError(DrapeError, OSError):
    """A file cannot be written where it should be."""


class DetectorError(DrapeError, ValueError):
    """A detector's file cannot be read, or a detector gave something that drape does not understand."""


class WorkerError(DrapeError, RuntimeError):
    """A process that worked beside this one ended before it was done."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """An `UnknownNameError` that suggests the nearest known name."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UnknownNameError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")
