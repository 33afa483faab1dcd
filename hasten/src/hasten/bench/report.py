"""Reports of a bench result: one HTML file that needs no network, scripts or other files; Markdown; CSV."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup

from hasten.bench.pages import SERIES, STYLE, data_uri, line, panels_of, svg, template
from hasten.bench.result import Result, StreamResult, read_result
from hasten.bench.row import Row
from hasten.bench.stream_report import streams_page
from hasten.bench.tables import as_csv, as_markdown, table_of
from hasten.errors import ReportError, unknown
from hasten.io import write_atomically

__all__ = ["render_report"]

SHEET_PROMPTS = 12  # rows of a contact sheet; nobody looks at more


# --- charts


def _colours(result: Result) -> dict[str, str]:
    """A colour for each line of the charts: the plain samplers, and as many of the best others as there are colours."""
    qualities: dict[str, list[float]] = {}
    for row in result.measured:
        qualities.setdefault(row.name, []).append(row.psnr if row.psnr is not None else 0.0)
    plain = [name for name in qualities if name.startswith("plain ")]
    others = [name for name in qualities if name not in plain]
    best = sorted(others, key=lambda name: -sum(qualities[name]) / len(qualities[name]))[: len(SERIES) - len(plain)]
    names = [*plain, *(name for name in others if name in best)]
    return dict(zip(names, SERIES, strict=False))


def _quality_chart(result: Result, field: str, title: str) -> Markup | None:
    """PSNR and FLIP against the number of computed steps (or another field of the rows), one line per method."""
    colours = _colours(result)
    measured = [row for row in result.measured if getattr(row, field) is not None]
    with mpl.rc_context(STYLE):
        figure, panels = panels_of(2)
        drawn = False
        for axes, (quality, heading) in zip(
            panels, (("psnr", "PSNR, dB (more is better)"), ("flip", "FLIP (less is better)")), strict=True
        ):
            for name, colour in colours.items():
                own = [row for row in measured if row.name == name and getattr(row, quality) is not None]
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
    groups = {count: [row for row in rows if row.error_per_step] for count, rows in result.groups().items()}
    groups = {count: rows for count, rows in groups.items() if rows}
    if not groups:
        return None
    with mpl.rc_context(STYLE):
        figure, panels = panels_of(len(groups))
        for axes, (count, rows) in zip(panels, groups.items(), strict=True):
            for row in (row for row in rows if row.name in colours):
                values = [float("nan") if v is None else v for v in row.error_per_step or []]
                line(axes, range(len(values)), values, row.name, colours[row.name])
            axes.set_title(f"{count} computed steps")
            axes.set_xlabel("sampler step")
            axes.set_ylim(bottom=0)
        panels[0].set_ylabel("relative error of the latents")
        panels[0].legend(frameon=False)
        return svg(figure, "error of the latents over the steps")


# --- images


def _sheet(result: Result, rows: list[Row], folder: Path) -> dict[str, Any]:
    """Columns of names and rows of images; an image that is missing is None."""
    heads = [("plain", f"{result.baseline.steps} steps")]
    heads += [(row.name, "" if row.psnr is None else f"{row.psnr:.1f} dB") for row in rows]
    columns = [result.baseline.images, *(row.images for row in rows)]
    prompts = result.settings.prompts[:SHEET_PROMPTS]
    lines = [
        (prompt, [data_uri(folder, column[i]) if i < len(column) else None for column in columns])
        for i, prompt in enumerate(prompts)
    ]
    return {"heads": heads, "lines": lines}


def render_report(result_file: Path, out: Path, form: str = "html") -> Path:
    """Make the report of a bench result.

    Args:
        result_file: JSON that `hasten bench` wrote; its images are looked for beside it.
        out: the file to write (atomically).
        form: `"html"` (one file with charts and images), `"md"` or `"csv"` (the table alone).

    Raises:
        ReportError: if the file cannot be read or is no result.
        FileError: if the report cannot be written.
    """
    if form not in FORMS:
        raise unknown("format of a report", form, FORMS)
    if out.resolve() == result_file.resolve():
        raise ReportError(f"{out}: the report would replace the result it is made from. Name another file with --out.")
    return write_atomically(out, FORMS[form](read_result(result_file), result_file.parent))


def _html(result: Result | StreamResult, folder: Path) -> str:
    return streams_page(result, folder) if isinstance(result, StreamResult) else _page(result, folder)


FORMS: dict[str, Callable[[Result | StreamResult, Path], str]] = {
    "html": _html,
    "md": lambda result, _: as_markdown(table_of(result)) + "\n",
    "csv": lambda result, _: as_csv(result),
}


def _page(result: Result, folder: Path) -> str:
    """Images: tables by number of computed steps, charts, contact sheets."""
    return template("report.html.j2").render(
        result=result,
        table=table_of(result, wide=True),
        quality=_quality_chart(result, "budget", "number of computed steps"),
        # Steps that run on fewer tokens cost less than their number says.
        costs=_quality_chart(result, "flops_ratio", "FLOPs ratio") if any(r.staged for r in result.rows) else None,
        hidden_lines=len({row.name for row in result.measured}) - len(_colours(result)),
        errors=_error_chart(result),
        sheets={count: _sheet(result, rows, folder) for count, rows in result.groups().items()},
    )
