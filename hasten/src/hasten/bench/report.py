"""Render the JSON of `hasten bench` as one HTML file that needs nothing else: no network, scripts or other files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup

from hasten.bench.pages import SERIES, STYLE, byte_size, data_uri, line, panels_of, svg, template
from hasten.bench.schema import Result, Row, StreamResult, read_result, short_label
from hasten.bench.stream_report import streams_page
from hasten.errors import ReportError
from hasten.io import write_atomically

__all__ = ["render_report"]

SHEET_PROMPTS = 12  # rows of a contact sheet; nobody looks at more


@dataclass(frozen=True)
class _Column:
    """A column of the table; `best` picks the best of a group, or is None where there is no better and worse."""

    field: str
    title: str
    digits: int
    best: Any = None

    def text(self, row: Row) -> str:
        value = getattr(row, self.field)
        if value is None:
            return "–"
        return byte_size(value) if self.field == "cache_bytes" else f"{value:.{self.digits}f}"


COLUMNS = (
    _Column("computed_steps", "computed", 1),
    _Column("flops_ratio", "FLOPs ratio", 2),
    _Column("flops_ratio_measured", "counted", 2),
    _Column("seconds", "seconds", 3, min),
    _Column("latency_ratio", "latency ratio", 2, max),
    _Column("latency_share", "latency share", 2),
    _Column("psnr", "PSNR dB", 2, max),
    _Column("ssim", "SSIM", 4, max),
    _Column("lpips", "LPIPS", 4, min),
    _Column("flip", "FLIP", 4, min),
    _Column("psnr_unedited", "unedited dB", 2, max),
    _Column("psnr_edited", "edited dB", 2, max),
    _Column("temporal_error", "temporal", 4, min),
    _Column("top1", "top-1", 2),
    _Column("cache_bytes", "cache", 0),
)


def _name(row: Row) -> str:
    if row.library == "plain":
        return f"plain {row.method}"
    name = short_label(row.method)
    return name if row.library == "hasten" else f"{name} ({row.library})"


def _groups(result: Result) -> dict[int, list[Row]]:
    """Rows that ran, by number of computed steps, most first; plain samplers stand beside all that they compare with."""
    measured = [row for row in result.rows if not row.error]
    counts = sorted({count for row in measured for count in row.sections()}, reverse=True)
    return {count: [row for row in measured if count in row.sections()] for count in counts}


def _table(rows: list[Row], columns: Sequence[_Column]) -> list[dict[str, Any]]:
    bests = {}
    for column in columns:
        values = [getattr(row, column.field) for row in rows if getattr(row, column.field) is not None]
        if column.best is not None and len(values) > 1:
            bests[column.field] = column.best(values)
    return [
        {
            "name": _name(row),
            "library": row.library,
            "params": ", ".join(f"{k}={v}" for k, v in row.params.items()),
            "note": row.note,
            "cells": [(c.text(row), bests.get(c.field, row) == getattr(row, c.field)) for c in columns],
        }
        for row in rows
    ]


# --- charts


def _colours(result: Result) -> dict[str, str]:
    """A colour for each line of the charts: the plain samplers, and as many of the best others as there are colours."""
    qualities: dict[str, list[float]] = {}
    for row in result.rows:
        if not row.error:
            qualities.setdefault(_name(row), []).append(row.psnr if row.psnr is not None else 0.0)
    plain = [name for name in qualities if name.startswith("plain ")]
    others = [name for name in qualities if name not in plain]
    best = sorted(others, key=lambda name: -sum(qualities[name]) / len(qualities[name]))[: len(SERIES) - len(plain)]
    names = [*plain, *(name for name in others if name in best)]
    return dict(zip(names, SERIES, strict=False))


def _quality_chart(result: Result, field: str, title: str) -> Markup | None:
    """PSNR and FLIP against the number of computed steps (or another field of the rows), one line a method."""
    colours = _colours(result)
    measured = [row for row in result.rows if not row.error and getattr(row, field) is not None]
    with mpl.rc_context(STYLE):
        figure, panels = panels_of(2)
        drawn = False
        for axes, (quality, heading) in zip(
            panels, (("psnr", "PSNR, dB (more is better)"), ("flip", "FLIP (less is better)")), strict=True
        ):
            for name, colour in colours.items():
                own = [row for row in measured if _name(row) == name and getattr(row, quality) is not None]
                points = sorted((getattr(row, field), getattr(row, quality)) for row in own)
                if points:
                    line(axes, [x for x, _ in points], [y for _, y in points], name, colour, "o")
                    drawn = True
            axes.set_title(heading)
            axes.set_xlabel(title)
            if field == "budget":
                axes.set_xticks(sorted({getattr(row, field) for row in measured}))
        if not drawn:
            return None
        panels[0].legend(frameon=False)
        return svg(figure, f"quality against {title}")


def _error_chart(result: Result) -> Markup | None:
    """Relative error of the latents after each step, one panel for each number of computed steps."""
    colours = _colours(result)
    groups = {count: [row for row in rows if row.error_per_step] for count, rows in _groups(result).items()}
    groups = {count: rows for count, rows in groups.items() if rows}
    if not groups:
        return None
    with mpl.rc_context(STYLE):
        figure, panels = panels_of(len(groups))
        for axes, (count, rows) in zip(panels, groups.items(), strict=True):
            for row in (row for row in rows if _name(row) in colours):
                values = [float("nan") if v is None else v for v in row.error_per_step or []]
                line(axes, range(len(values)), values, _name(row), colours[_name(row)])
            axes.set_title(f"{count} computed steps")
            axes.set_xlabel("sampler step")
            axes.set_ylim(bottom=0)
        panels[0].set_ylabel("relative error of the latents")
        panels[0].legend(frameon=False)
        return svg(figure, "error of the latents over the steps")


# --- images


def _sheet(result: Result, rows: list[Row], folder: Path) -> dict[str, Any]:
    """Columns of names and rows of images; a image that is missing is None."""
    heads = [("plain", f"{result.baseline.steps} steps")]
    heads += [(_name(row), "" if row.psnr is None else f"{row.psnr:.1f} dB") for row in rows]
    columns = [result.baseline.images, *(row.images for row in rows)]
    prompts = result.settings.prompts[:SHEET_PROMPTS]
    lines = [
        (prompt, [data_uri(folder, column[i]) if i < len(column) else None for column in columns])
        for i, prompt in enumerate(prompts)
    ]
    return {"heads": heads, "lines": lines}


def render_report(result_file: Path, out: Path) -> Path:
    """Make the HTML report of a bench result.

    Args:
        result_file: JSON that `hasten bench` wrote; its images are looked for beside it.
        out: the HTML file to write (atomically).

    Raises:
        ReportError: if the file cannot be read or is no result.
    """
    if out.resolve() == result_file.resolve():
        raise ReportError(f"{out}: the report would replace the result it is made from. Name another file with --out.")
    result = read_result(result_file)
    folder = result_file.parent
    page = streams_page(result, folder) if isinstance(result, StreamResult) else _page(result, folder)
    try:
        write_atomically(out, page)
    except OSError as error:
        raise ReportError(f"{out}: cannot be written ({error}). Name another file with --out.") from error
    return out


def _page(result: Result, folder: Path) -> str:
    """Images: tables by number of computed steps, charts, contact sheets."""
    columns = [c for c in COLUMNS if any(getattr(row, c.field) is not None for row in result.rows)]
    groups = _groups(result)
    staged = any(row.staged for row in result.rows)
    return template("report.html.j2").render(
        result=result,
        columns=columns,
        groups={count: _table(rows, columns) for count, rows in groups.items()},
        failed=[row for row in result.rows if row.error],
        quality=_quality_chart(result, "budget", "number of computed steps"),
        # Steps that run on fewer tokens cost less than their number says.
        costs=_quality_chart(result, "flops_ratio_measured", "FLOPs ratio, counted") if staged else None,
        hidden_lines=len({_name(row) for row in result.rows if not row.error}) - len(_colours(result)),
        errors=_error_chart(result),
        sheets={count: _sheet(result, rows, folder) for count, rows in groups.items()},
    )
