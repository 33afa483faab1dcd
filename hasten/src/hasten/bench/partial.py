"""What a bench has measured so far, kept beside its target: one that was cut short goes on where it stopped."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hasten.bench.measurements import Measurement
from hasten.errors import HastenError, ReportError
from hasten.io import Kind, digest_of, read_record, shown, write_record

__all__ = ["Partial"]

log = logging.getLogger(__name__)


@dataclass
class _Content:
    """The file.

    Attributes:
        identity: digest of all that decides the figures: command, model, seed, files, versions, device.
        trials: what the trials of thresholds and costs came to, by what was tried.
        flops: counted operations of one call, by arm.
        failures: why arms could not run.
        prompts: measurements of the prompts that are finished, by number and arm; as text, since PSNR may be infinite.
    """

    identity: str
    trials: dict[str, list[float]] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    prompts: dict[str, dict[str, str]] = field(default_factory=dict)


KIND = Kind("unfinished bench", _Content, ReportError, "Delete it to start again.", 1 << 30)


class Partial:
    """What one process has measured so far.

    Args:
        file: where it is kept; what is there is taken up if it belongs to the same bench.
        identity: all that decides the figures, as plain data.
    """

    def __init__(self, file: Path, identity: Mapping[str, Any]) -> None:
        self.file = file
        self._content = _Content(digest_of(identity))
        if file.exists():
            try:
                found = read_record(file, KIND)
                for number, arms in found.prompts.items():
                    for text in arms.values():
                        _checked(number, text)
            except HastenError as error:
                log.warning("%s; the bench starts again", error)
                return
            if found.identity == self._content.identity:
                self._content = found
                log.info("%s: %d prompts are measured already", file, len(found.prompts))
            else:
                log.warning("%s belongs to another command, model or version; the bench starts again", file)

    @property
    def flops(self) -> dict[str, int]:
        """Counted operations of one call, by arm."""
        return self._content.flops

    @property
    def failures(self) -> dict[str, str]:
        """Why arms could not run."""
        return self._content.failures

    @property
    def finished(self) -> int:
        """How many prompts are measured."""
        return len(self._content.prompts)

    def measured(self, number: int) -> bool:
        """Whether a prompt is measured already."""
        return str(number) in self._content.prompts

    def measurements(self, arm: str) -> list[Measurement]:
        """What is measured of an arm, in the order of the prompts."""
        prompts = self._content.prompts
        return [_measurement(prompts[key][arm]) for key in sorted(prompts, key=int) if arm in prompts[key]]

    def add(self, number: int, found: dict[str, Measurement]) -> None:
        """Keep what was measured on a prompt, by arm."""
        self._content.prompts[str(number)] = {arm: json.dumps(asdict(one)) for arm, one in found.items()}
        self._write()

    def trial(self, key: str, compute: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
        """What a trial came to, computed unless it was before."""
        if key not in self._content.trials:
            self._content.trials[key] = list(compute())
            self._write()
        return tuple(self._content.trials[key])

    def _write(self) -> None:
        write_record(self.file, KIND, asdict(self._content))

    def remove(self) -> None:
        """Delete the file: the bench is finished."""
        self.file.unlink(missing_ok=True)


def _checked(number: str, text: str) -> None:
    """Raise a ReportError for what is no measurement of a prompt."""
    try:
        known = _measurement(text)
        right = known.prompt == int(number) and isinstance(known.metrics, dict) and len(known.size) == 2
    except (TypeError, ValueError, KeyError, RecursionError):
        right = False
    if not right:
        raise ReportError(f"what is kept of prompt {shown(number)} is no measurement. {KIND.remedy}")


def _measurement(text: str) -> Measurement:
    values = json.loads(text)
    return Measurement(**{**values, "size": tuple(values["size"])})
