"""One family of errors: each says what was wrong, what was expected and what to do."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

__all__ = [
    "AdapterError",
    "AlreadyAcceleratedError",
    "CalibrationError",
    "CertificateError",
    "ConfigError",
    "CopyError",
    "FileError",
    "HastenError",
    "HastenWarning",
    "ModelError",
    "NonFiniteError",
    "ReportError",
    "ScheduleError",
    "TargetError",
    "UnknownNameError",
]

LONGEST = 80  # characters of a name that is shown


class HastenError(Exception):
    """Base of every error that hasten raises on purpose."""


class ConfigError(HastenError, ValueError):
    """A parameter of a method has a value that cannot work."""


class CalibrationError(ConfigError):
    """A calibration is missing, damaged, or belongs to something else; the message spells out the difference."""


class CertificateError(ConfigError):
    """A certificate is missing or damaged, or does not hold for a call; the message says why and how to certify it."""


class ScheduleError(ConfigError):
    """The schedule does not fit the run, such as a warm-up that is longer than the run."""


class UnknownNameError(HastenError, ValueError):
    """A method, model or parameter of that name does not exist; the message names the nearest ones."""


class AlreadyAcceleratedError(HastenError, ValueError):
    """The transformer is accelerated already, by hasten or by another cache."""


class CopyError(HastenError, TypeError):
    """An accelerated transformer was to be copied or pickled."""


class TargetError(HastenError, TypeError):
    """The object given to `accelerate` is neither a pipeline with a transformer nor a module."""


class AdapterError(HastenError, TypeError):
    """The wiring of a transformer is not known and cannot be found out."""


class ModelError(HastenError, ValueError):
    """A model's files are missing, damaged or of another kind than expected."""


class NonFiniteError(HastenError, ArithmeticError):
    """A number that is not finite came up in a run; the message names step, pass and method (see `HASTEN_CHECK`)."""


class ReportError(HastenError, ValueError):
    """A result file cannot be read or is not a result of `hasten bench`."""


class FileError(HastenError, OSError):
    """A file cannot be read or written: no permission, no space, a folder where a file was expected."""


class HastenWarning(UserWarning):
    """Something will work but save nothing, or save less than the user expects."""


def brief(value: object) -> str:
    """A value that somebody gave, for an error: on one line, short."""
    text = " ".join(reprlib.repr(value).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def unknown(kind: str, name: object, known: Iterable[str]) -> UnknownNameError:
    """An `UnknownNameError` that suggests the nearest known name; `name` is what was given, whatever it is."""
    names = sorted(known)
    text = name if isinstance(name, str) else brief(name)
    near = difflib.get_close_matches(text, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    short = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    shown = repr(short) if isinstance(name, str) else short
    return UnknownNameError(f"unknown {kind} {shown}.{hint} Known: {', '.join(names)}.")
