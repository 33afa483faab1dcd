"""The JSON of `hasten bench` as types: what a report reads is checked against them.

Fields that a result has beyond these are kept and ignored.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from hasten.errors import ReportError

__all__ = [
    "SCHEMA",
    "Baseline",
    "Result",
    "Row",
    "Settings",
    "StreamResult",
    "StreamRow",
    "read_result",
    "short_label",
    "split_methods",
]

SCHEMA = 1
# A plus before a name, not one within a number (1e+3) or a file's name.
PLUS = re.compile(r"\+(?=[A-Za-z][\w-]*(?:[:+]|$))")
REMEDY = "Make it again with `hasten bench`."


class Settings(BaseModel):
    """What was drawn."""

    prompts: list[str]
    seed: int
    height: int
    width: int
    steps: int
    guidance: float
    frames: int | None = None


class Baseline(BaseModel):
    """The plain sampler with all its steps: the reference of every figure."""

    steps: int
    seconds: float
    flops: float
    top1: float | None = None
    psnr_unedited: float | None = None
    psnr_edited: float | None = None
    psnr_unedited_vae: float | None = None
    images: list[str] = []


class Row(BaseModel):
    """One way of sampling; with `error` it could not run and has no figures."""

    id: str
    method: str
    library: str
    params: dict[str, Any] = {}
    budget: int | None = None
    staged: bool = False
    groups: list[int] = []
    computed_steps: float | None = None
    flops_ratio: float | None = None
    flops_ratio_measured: float | None = None
    seconds: float | None = None
    latency_ratio: float | None = None
    latency_share: float | None = None
    cache_bytes: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    flip: float | None = None
    psnr_unedited: float | None = None
    psnr_edited: float | None = None
    temporal_error: float | None = None
    top1: float | None = None
    error_per_step: list[float | None] | None = None
    images: list[str] = []
    note: str = ""
    error: str = ""

    def sections(self) -> list[int]:
        """Numbers of computed steps that a table shows the row under."""
        own = [] if self.budget is None else [self.budget]
        return self.groups or own


class Result(BaseModel):
    """A whole file."""

    created: str
    environment: dict[str, str]
    model: str
    settings: Settings
    baseline: Baseline
    rows: list[Row]


class StreamRow(BaseModel):
    """One method on a streaming model; the fields are those of `hasten.bench.rollout.StreamRow`."""

    method: str
    seconds_per_frame: float
    attention_seconds: float
    speedup: float
    attention_speedup: float
    work_ratio: float
    kv_ratio: float
    overhead: float
    cache_bytes: float
    psnr: float
    psnr_curve: list[float]
    seconds_curve: list[float]
    drift: dict[str, list[float | None]] = {}
    params: dict[str, Any] = {}
    video: str = ""


class StreamSettings(BaseModel):
    """What was rolled out."""

    worlds: int
    frames: int
    steps: int
    seed: int


class StreamResult(BaseModel):
    """A whole file of a streaming model; the first row is the full history's."""

    created: str
    environment: dict[str, str]
    model: str
    settings: StreamSettings
    rows: list[StreamRow]


def split_methods(text: str) -> list[str]:
    """`dvg:budget=0.5+foca:interval=4` as the texts of its methods."""
    return PLUS.split(text.strip())


def short_label(label: str) -> str:
    """A method's text as people read it: without the paths of its files, but with names that tell them apart."""
    return " + ".join(_short(part) for part in split_methods(label))


def _short(label: str) -> str:
    name, *params = label.split(":")
    words = []
    for param in params:
        key, _, value = param.partition("=")
        if param == "interval=1":
            continue  # the number of computed steps decides
        if key == "calibration":
            words += [_spoken(value)] if Path(value).stem.startswith(f"{name}-") else []
        elif key == "tuned":
            words.append("tuned steps" if Path(value).stem == "steps" else _spoken(value))
        else:
            words.append(f"{value} steps" if key == "schedule" else param)
    return ", ".join([name, *(word.removeprefix(f"{name} ") for word in words)])


def _spoken(path: str) -> str:
    return Path(path).stem.replace("-", " ")


def read_result(file: Path) -> Result | StreamResult:
    """Read and check a result, of images or of a streaming model.

    Raises:
        ReportError: if the file is missing, cut off, no result of `hasten bench`, or of another schema.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportError(f"{file}: no such file. Give the JSON that `hasten bench` wrote.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(
            f"{file}: cannot be read as text ({error}). Give the JSON that `hasten bench` wrote."
        ) from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ReportError(f"{file}: not valid JSON, perhaps cut off while being written ({error}). {REMEDY}") from error
    if not isinstance(content, dict) or "schema" not in content:
        raise ReportError(f"{file}: not a result of `hasten bench`. {REMEDY}")
    if content["schema"] != SCHEMA:
        raise ReportError(
            f"{file}: schema {content['schema']!r}, but this version of hasten reads schema {SCHEMA}. "
            "Upgrade hasten, or make the file again."
        )
    try:
        return (StreamResult if content.get("kind") == "streaming" else Result).model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ReportError(f"{file}: {where}: {first['msg'].lower()}. {REMEDY}") from error
