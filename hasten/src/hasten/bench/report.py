"""Render the JSON of `hasten bench` as one HTML file that needs nothing else: no network, no scripts, no other files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import matplotlib

from hasten.errors import ReportError

__all__ = ["render_report"]

SCHEMA = 1
REMEDY = "Make it again with `hasten bench`."
TEMPLATES = Path(__file__).parent / "templates"
PLAIN = "plain"  # `library` of the rows made by the sampler alone, with fewer steps

SHEET_PROMPTS = 16  # rows of a contact sheet; more pictures than that are not looked at
SHEET_PIXELS = 320  # longest side of an embedded picture: twice the size at which it is shown
PIXELATED_BELOW = 129  # pictures this small are enlarged without smoothing, so that their errors stay visible

# The charts are drawn in these stand-in colours, which are then replaced by the CSS variables of the page, so that one
# drawing serves the light and the dark scheme.
INK, RULE, PLAIN_COLOUR = "#010101", "#020202", "#030303"
COLOURS = [f"#0401{number:02x}" for number in range(8)]
CSS_COLOURS = {
    INK: "var(--muted)",
    RULE: "var(--rule)",
    PLAIN_COLOUR: "var(--plain)",
    **{colour: f"var(--c{number})" for number, colour in enumerate(COLOURS)},
}
MARKERS = "osD^vPX*"
DASHES = ("--", ":", "-.")
CHART_STYLE: dict[str, Any] = {
    "axes.edgecolor": RULE,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 12,
    "axes.prop_cycle": matplotlib.rcParamsDefault["axes.prop_cycle"],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 13,
    "font.size": 12,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "svg.fonttype": "none",  # text stays text and takes the font of the page
    "text.color": INK,
    "text.parse_math": False,  # a name with two dollar signs is not a formula
    "xtick.color": INK,
    "ytick.color": INK,
}


# ---------------------------------------------------------------------------------------------- reading the JSON


@dataclass(frozen=True)
class _Fields:
    """Typed access to one JSON object; a missing or mistyped field raises `ReportError` naming the file and the field."""

    file: Path
    where: str
    values: dict[str, Any]

    def error(self, key: str, problem: str) -> ReportError:
        return ReportError(f"{self.file}: {self.where}{key} {problem}. {REMEDY}")

    def get(self, key: str, optional: bool = False) -> Any:
        if key not in self.values and not optional:
            raise self.error(key, "is missing")
        return self.values.get(key)

    def text(self, key: str, optional: bool = False) -> str:
        value = self.get(key, optional)
        if value is None and optional:
            return ""
        if not isinstance(value, str):
            raise self.error(key, "is not a string")
        return value

    def number(self, key: str, optional: bool = False) -> float | None:
        value = self.get(key, optional)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise self.error(key, "is neither a number nor null")
        return value

    def integer(self, key: str) -> int:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, "is not a whole number")
        return value

    def numbers(self, key: str) -> list[float | None]:
        """A list of numbers and nulls; empty where the list itself is null or absent."""
        value = self.get(key, optional=True)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.error(key, "is neither a list nor null")
        items = _Fields(self.file, f"{self.where}{key}.", {str(number): item for number, item in enumerate(value)})
        return [items.number(number) for number in items.values]

    def texts(self, key: str) -> list[str]:
        value = self.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, "is not a list of strings")
        return value

    def child(self, key: str, optional: bool = False) -> _Fields:
        value = self.get(key, optional)
        if value is None and optional:
            value = {}
        if not isinstance(value, dict):
            raise self.error(key, "is not an object")
        return _Fields(self.file, f"{self.where}{key}.", value)

    def children(self, key: str, optional: bool = False) -> list[_Fields]:
        value = self.get(key, optional)
        if value is None and optional:
            return []
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.error(key, "is not a list of objects")
        return [_Fields(self.file, f"{self.where}{key}[{number}].", item) for number, item in enumerate(value)]


@dataclass(frozen=True)
class _Row:
    """One method at one setting; `error` is not empty if it could not run, and then there are no figures."""

    id: str
    method: str
    library: str
    params: dict[str, Any]
    full_steps: int | None
    note: str
    error: str
    figures: dict[str, float | None]
    error_per_step: list[float | None]
    prompt_psnr: list[float | None]
    images: list[str]

    @property
    def plain(self) -> bool:
        return self.library == PLAIN

    @property
    def settings(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.params.items())


@dataclass(frozen=True)
class _Result:
    created: str
    model: str
    environment: dict[str, str]
    prompts: list[str]
    settings: dict[str, str]
    baseline_steps: int
    baseline: dict[str, float | None]
    baseline_images: list[str]
    rows: list[_Row]


def _read(file: Path) -> _Result:
    """The checked content of a result file; raises `ReportError` for anything that is not one."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ReportError(f"{file}: no such file. Give the JSON that `hasten bench` wrote.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(
            f"{file}: cannot be read as text ({error}). Give the JSON that `hasten bench` wrote."
        ) from error
    try:
        # NaN and Infinity are not JSON but Python writes them; a figure that is not finite is one that is not known.
        content = json.loads(text, parse_constant=lambda _: None)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ReportError(f"{file}: not valid JSON, perhaps cut off while being written ({error}). {REMEDY}") from error
    if not isinstance(content, dict):
        raise ReportError(f"{file}: not a result of `hasten bench`. {REMEDY}")
    top = _Fields(file, "", content)
    schema = top.get("schema")
    if schema != SCHEMA:
        raise ReportError(
            f"{file}: schema {schema!r}, but this version of hasten reads schema {SCHEMA}. "
            "Upgrade hasten, or make the file again with `hasten bench`."
        )
    settings, baseline, environment = top.child("settings"), top.child("baseline"), top.child("environment")
    return _Result(
        created=_date(top.text("created")),
        model=top.text("model"),
        environment={name: str(value) for name, value in environment.values.items()},
        prompts=settings.texts("prompts"),
        settings={name: str(value) for name, value in settings.values.items() if name != "prompts"},
        baseline_steps=baseline.integer("steps"),
        baseline={
            **{name: baseline.number(name) for name in ("seconds", "flops")},
            "top1": baseline.number("top1", optional=True),
        },
        baseline_images=baseline.texts("images"),
        rows=[_read_row(fields) for fields in top.children("rows")],
    )


def _read_row(fields: _Fields) -> _Row:
    error = fields.text("error", optional=True)
    figures: dict[str, float | None] = {}
    if not error:
        required = ("flops_ratio", "seconds", "latency_ratio", "cache_bytes", "psnr", "ssim", "flip")
        figures = {name: fields.number(name) for name in required}
        figures |= {name: fields.number(name, optional=True) for name in ("lpips", "top1", "flops_ratio_measured")}
    return _Row(
        id=fields.text("id"),
        method=fields.text("method"),
        library=fields.text("library"),
        params=fields.child("params", optional=True).values,
        full_steps=None if error and fields.get("full_steps", optional=True) is None else fields.integer("full_steps"),
        note=fields.text("note", optional=True),
        error=error,
        figures=figures,
        error_per_step=[] if error else fields.numbers("error_per_step"),
        prompt_psnr=[item.number("psnr", optional=True) for item in fields.children("per_prompt", optional=True)],
        images=[] if error else fields.texts("images"),
    )


# ---------------------------------------------------------------------------------------------- figures as text


def _date(text: str) -> str:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{moment.day} {moment:%B %Y, %H:%M} {moment.tzname() or ''}".rstrip()


def _bytes(value: float) -> str:
    """Bytes in binary units; "none" for 0."""
    if value == 0:
        return "none"
    power = min(int(math.log(max(value, 1), 1024)), 4)
    scaled = value / 1024**power
    return (
        f"{scaled:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
        if scaled < 1000
        else f"{scaled:.0f} "
        + (
            "B",
            "KiB",
            "MiB",
            "GiB",
            "TiB",
        )[power]
    )


def _flops(value: float) -> str:
    """A count of floating-point operations in decimal units."""
    power = min(max(int(math.log10(max(value, 1)) // 3), 0), 6)
    return f"{value / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P', 'E')[power]}FLOP"


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"


@dataclass(frozen=True)
class _Column:
    """A column of the table: `better` is the direction of improvement, None where there is none."""

    key: str
    title: str
    show: Callable[[float], str]
    better: Literal["more", "less"]
    optional: bool = False


COLUMNS = (
    _Column("flops_ratio", "FLOPs ratio", lambda value: f"{value:.2f}×", "more"),
    _Column("seconds", "Seconds", _seconds, "less"),
    _Column("latency_ratio", "Latency ratio", lambda value: f"{value:.2f}×", "more"),
    _Column("psnr", "PSNR, dB", lambda value: f"{value:.1f}", "more"),
    _Column("ssim", "SSIM", lambda value: f"{value:.3f}", "more"),
    _Column("lpips", "LPIPS", lambda value: f"{value:.4f}", "less", optional=True),
    _Column("flip", "FLIP", lambda value: f"{value:.4f}", "less"),
    _Column("top1", "Top-1", lambda value: f"{value:.0%}", "more", optional=True),
    _Column("cache_bytes", "Cache", _bytes, "less"),
)
