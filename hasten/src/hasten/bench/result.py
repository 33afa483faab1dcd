"""The JSON of `hasten bench` (schema 2) as types: written from them, and checked against them when it is read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from hasten.bench.row import Baseline, Row, StreamRow
from hasten.errors import ConfigError, ReportError
from hasten.io import conform, digest_of, read_json, shown, write_atomically

__all__ = ["SCHEMA", "Result", "Settings", "StreamResult", "StreamSettings", "read_result"]

SCHEMA: Literal[2] = 2
REMEDY = "Make it again with `hasten bench`."


@dataclass(kw_only=True)
class Settings:
    """What was drawn.

    Attributes:
        prompts: in order.
        seed: prompt `i` was drawn with seed `seed + i`.
        height, width: in pixels.
        frames: of a clip; None for images.
        steps: of the plain sampler.
        guidance: scale of the classifier-free guidance; 1 is none.
        call: further arguments of the pipeline's call.
        image: name of the user's own source image.
        processes: how many shared the prompts.
    """

    prompts: list[str]
    seed: int
    height: int
    width: int
    frames: int | None = None
    steps: int
    guidance: float
    call: dict[str, Any] = field(default_factory=dict)
    image: str | None = None
    processes: int = 1


@dataclass(frozen=True)
class StreamSettings:
    """What to roll out.

    Args:
        worlds: how many, by seeds `seed`, `seed + 1`, ...
        frames: of each video.
        steps: of the sampler, for each chunk.
        seed: of the first world and its noise.
    """

    worlds: int = 8
    frames: int = 48
    steps: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.worlds, self.frames, self.steps) < 1:
            raise ConfigError(
                f"worlds, frames and steps must be at least 1, got {self.worlds}, {self.frames}, {self.steps}"
            )


@dataclass(kw_only=True)
class _File:
    """What every result states.

    Attributes:
        created: time of the end, ISO 8601.
        command: the command line that made it; empty where none did.
        environment: device, versions of torch, diffusers, hasten and python, commit of hasten's source if known, the
            machine's load average at the end (times of a busy machine are no times).
        model: name, folder or hub id.

    The file has a digest of all this beside it, which is compared when it is read.
    """

    schema: Literal[2] = SCHEMA
    kind: str
    created: str
    command: str = ""
    environment: dict[str, str]
    model: str

    def write(self, file: Path) -> None:
        """Write the JSON file, atomically."""
        content = json.loads(json.dumps(asdict(self), allow_nan=False))  # as it will be read
        write_atomically(file, json.dumps({**content, "digest": digest_of(content)}, indent=1) + "\n")


@dataclass(kw_only=True)
class Result(_File):
    """A whole file of images, edits or clips.

    Attributes:
        missing: columns that were not measured at all, and why.
        plain: mean PSNR in dB of every plain sampler on the first prompts, by number of steps and sampler; None for one
            that the model does not have. The best of each number has a row.
        tune: what `hasten tune` adds: the best row for each number of computed steps, and what learning took.
    """

    kind: Literal["images"] = "images"
    settings: Settings
    baseline: Baseline
    rows: list[Row]
    missing: dict[str, str] = field(default_factory=dict)
    plain: dict[str, dict[str, float | None]] = field(default_factory=dict)
    tune: dict[str, Any] | None = None

    @property
    def measured(self) -> list[Row]:
        """Rows that ran."""
        return [row for row in self.rows if not row.failed]

    @property
    def failed(self) -> list[Row]:
        """Rows that could not run."""
        return [row for row in self.rows if row.failed]

    def best_plain(self) -> list[Row]:
        """The best plain sampler of each number of computed steps, most first; none where they were not looked for."""
        found = []
        for count in sorted(map(int, self.plain), reverse=True):
            rows = [row for row in self.measured if row.library == "plain" and row.budget == count]
            found += [max(rows, key=lambda row: row.psnr or 0.0)] if rows else []
        return found

    def groups(self) -> dict[int, list[Row]]:
        """Rows that ran by number of computed steps, most first, and the best PSNR first in each."""
        counts = sorted({count for row in self.measured for count in row.sections}, reverse=True)
        ranked = sorted(self.measured, key=lambda row: float("inf") if row.psnr is None else row.psnr, reverse=True)
        return {count: [row for row in ranked if count in row.sections] for count in counts}


@dataclass(kw_only=True)
class StreamResult(_File):
    """A whole file of a streaming model.

    Attributes:
        rows: the first one is that of the whole history.
        failed: why methods without a row could not be measured, by name.
    """

    kind: Literal["streaming"] = "streaming"
    settings: StreamSettings
    rows: list[StreamRow]
    failed: dict[str, str] = field(default_factory=dict)


def read_result(file: Path) -> Result | StreamResult:
    """Read and check a result, of images or of a streaming model.

    Raises:
        ReportError: if the file is missing, damaged, no result of `hasten bench`, or of another schema.
    """
    content = read_json(file, error=ReportError, remedy="Give the JSON that `hasten bench` wrote.")
    if not isinstance(content, dict) or "schema" not in content:
        raise ReportError(f"{file}: not a result of `hasten bench`. {REMEDY}")
    if content["schema"] != SCHEMA:
        raise ReportError(
            f"{file}: schema {shown(content['schema'])}, but this version of hasten reads schema {SCHEMA}. {REMEDY}"
        )
    if content.pop("digest", None) != digest_of(content):
        raise ReportError(
            f"{file}: damaged or changed by hand: the figures do not have the digest that they were written with. "
            f"{REMEDY}"
        )
    kind = StreamResult if content.get("kind") == "streaming" else Result
    try:
        result: Result | StreamResult = conform(content, kind, "the result")
    except ValueError as error:
        raise ReportError(f"{file}: {error}. {REMEDY}") from error
    return result
