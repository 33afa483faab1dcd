"""What is certified of a setting: the tolerance, the evidence, and the conditions under which it was shown.

A certificate is a JSON file with a digest, beside the calibrations that its setting needs. `hasten certify` writes it
into the store of this machine, where `hasten.accelerate(pipe, quality="high")` finds it by the model's weights; other
distributions bring theirs through the entry point group `hasten.certificates` (a function that returns a folder), which
count where the store has none for the model.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from hasten import registry
from hasten.errors import CertificateError, HastenError
from hasten.io import Kind, check_files, describe, read_record, write_record
from hasten.quality.conditions import Conditions
from hasten.quality.tolerance import Tolerance

__all__ = ["Certificate", "Evidence", "Tried", "certificates", "shipped", "store"]

log = logging.getLogger(__name__)

GROUP = "hasten.certificates"
REMEDY = "Make it again with `hasten certify`."


@dataclass(frozen=True)
class Tried:
    """One setting that was tested.

    Attributes:
        setting: its method expression.
        computed_steps: that it computes.
        flops_ratio: operations of the full run over its own, counted.
        requests: that it was tested on; fewer than asked for where no more could have helped.
        kept: how many of them kept the tolerance.
        p_value: of the hypothesis that it does not keep the tolerance.
        passed: whether that hypothesis was rejected, with the error controlled over all settings.
    """

    setting: str
    computed_steps: float
    flops_ratio: float
    requests: int
    kept: int
    p_value: float
    passed: bool


@dataclass(frozen=True)
class Evidence:
    """Why a setting is believed to keep its tolerance.

    Attributes:
        requests: held-out requests that it was tested on.
        kept: how many of them kept the tolerance.
        bound: what is certain: the least share, or the worst mean of each metric.
        metrics: median, mean, and worst value of each metric that the tolerance bounds.
        prompts: digest of the held-out prompts with their seeds.
        screened: requests that chose the settings and their order, and had no part in the test.
        procedure: how the error was controlled over the settings.
        tried: all settings, in the order of the test.
    """

    requests: int
    kept: int
    bound: dict[str, float]
    metrics: dict[str, dict[str, float]]
    prompts: str
    screened: int
    procedure: str
    tried: tuple[Tried, ...]


@dataclass(frozen=True)
class Certificate:
    """A setting that keeps a tolerance.

    Attributes:
        quality: the tier, or a name of the user's own.
        tolerance: what it keeps.
        setting: method expression; files in it are relative to the certificate's own folder.
        computed_steps: that it computes; for a solver its evaluations.
        flops_ratio: operations of the full run over its own, counted.
        conditions: model, scheduler, steps, size, guidance.
        evidence: of the test.
        files: SHA-256 of the setting's files, by name.
        environment: versions and device.
        command: that made it.
        created: date and time, ISO 8601.
        model: name that it was opened by.
        folder: where it was read from.
    """

    quality: str
    tolerance: Tolerance
    setting: str
    computed_steps: int
    flops_ratio: float
    conditions: Conditions
    evidence: Evidence
    files: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    command: str = ""
    created: str = ""
    model: str = ""
    folder: str | None = None

    def __post_init__(self) -> None:
        unmeasured = [name for name in self.tolerance.bounds if name not in self.evidence.metrics]
        if unmeasured:
            raise CertificateError(f"it bounds {', '.join(unmeasured)}, of which its evidence has no figures")

    def save(self, path: str | Path) -> Path:
        """Write it; returns the path.

        Raises:
            FileError: if it cannot be written.
        """
        return write_record(path, KIND, self.content)

    @property
    def content(self) -> dict[str, Any]:
        """It as plain values, without where it was read from."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """Read what `save` wrote.

        Raises:
            CertificateError: if the file is missing, damaged or no certificate, or a file of its setting is missing or
                another one.
        """
        content = read_record(path, KIND)
        folder = Path(path).parent
        check_files(folder, content.files, CertificateError, f"{path} certifies a setting with that file. {REMEDY}")
        return cls(**{**vars(content), "folder": str(folder)})

    @property
    def expression(self) -> str:
        """The method expression, with paths that can be opened from anywhere."""
        text = self.setting
        for name in self.files:
            text = text.replace(f"={name}", f"={Path(self.folder or '.') / name}")
        return text

    def __str__(self) -> str:
        bound = ", ".join(f"{name} {value:.3g}" for name, value in self.evidence.bound.items())
        return (
            f"{self.quality}: {registry.split(self.setting)[0][0]}, {self.computed_steps} of {self.conditions.steps} "
            f"steps computed; {self.tolerance}; {self.evidence.kept} of {self.evidence.requests} held-out requests "
            f"kept it (at least: {bound})"
        )


KIND = Kind("certificate", Certificate, CertificateError, REMEDY)


def store() -> Path:
    """The folder of this machine's certificates: `$HASTEN_CERTIFICATES`, or in the user's data folder."""
    own = os.environ.get("HASTEN_CERTIFICATES")
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(own) if own else Path(data) / "hasten" / "certificates"


def certificates() -> list[Certificate]:
    """The certificates of this machine's store; files that are none are named in a warning and left out."""
    return _in([store()])


def shipped() -> list[Certificate]:
    """The certificates that installed distributions bring."""
    return _in([Path(entry.load()()) for entry in entry_points(group=GROUP)])


def _in(folders: Sequence[Path]) -> list[Certificate]:
    found = []
    for folder in folders:
        try:
            paths = list(_files(folder)) if folder.is_dir() else []
        except OSError as error:
            log.warning("%s: its certificates cannot be read (%s)", folder, describe(error))
            continue
        for path in paths:
            try:
                found.append(Certificate.load(path))
            except HastenError as error:
                log.warning("%s", error)
    return found


def _files(folder: Path) -> list[Path]:
    """The files of certificates; in hidden folders is what certifications under way, or cut short, have drawn."""
    files = sorted(folder.rglob("*.json"))
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
