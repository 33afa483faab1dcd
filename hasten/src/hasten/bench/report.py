"""Reports of bench results: one HTML file that needs no network and no other files; Markdown; CSV."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup

from hasten.bench.pages import STYLE, Key, data_uri, line, panel, svg, template
from hasten.bench.result import Result, StreamResult, read_result
from hasten.bench.row import Row
from hasten.bench.stream_report import streams_part
from hasten.bench.tables import as_csv, as_markdown, table_of
from hasten.bench.usage import python_line
from hasten.errors import HastenError, ReportError, unknown
from hasten.io import write_atomically

__all__ = ["render_report"]

SHEET_PROMPTS = 12  # rows of a contact sheet; nobody looks at more


# --- charts


def _keys(result: Result) -> dict[str, Key]:
    """How each arm is drawn, in every chart: plain samplers first, which are grey, then the others, best first."""
    qualities: dict[str, list[float]] = {}
    for row in result.measured:
        qualities.setdefault(row.name, []).append(row.psnr if row.psnr is not None else 0.0)
    plain = [name for name in qualities if name.startswith("plain ")]
    ranked = sorted(qualities, key=lambda name: -sum(qualities[name]) / len(qualities[name]))
    names = [*plain, *(name for name in ranked if name not in plain)]
    return {name: Key(name, number) for number, name in enumerate(names)}


QUALITIES = (
    ("psnr", "PSNR, dB (more is better)"),
    ("lpips", "LPIPS (less is better)"),
    ("flip", "FLIP (less is better)"),
)


def _quality_charts(result: Result, keys: dict[str, Key], field: str, title: str) -> list[Markup]:
    """Measures of quality against the number of computed steps (or another field of the rows), one line per arm."""
    return [chart for quality, heading in QUALITIES if (chart := _chart(result, keys, field, title, quality, heading))]


def _chart(result: Result, keys: dict[str, Key], field: str, title: str, quality: str, heading: str) -> Markup | None:
    rows = [r for r in result.measured if getattr(r, field) is not None and getattr(r, quality) is not None]
    if not rows:
        return None
    with mpl.rc_context(STYLE):
        figure, axes = panel()
        for name, key in keys.items():
            points = sorted((getattr(row, field), getattr(row, quality)) for row in rows if row.name == name)
            if points:
                line(axes, [x for x, _ in points], [y for _, y in points], key, "o")
        axes.set_title(heading)
        axes.set_xlabel(title)
        if field == "budget":
            axes.set_xticks(sorted({row.budget or 0 for row in rows}))
        return svg(figure, f"{heading} against {title}")


def _error_charts(result: Result, keys: dict[str, Key]) -> list[Markup]:
    """Relative error of the latents after each step, a chart for each number of computed steps."""
    charts = []
    for count, rows in result.groups().items():
        curves = [(row, row.error_per_step) for row in rows if row.error_per_step]
        if not curves:
            continue
        with mpl.rc_context(STYLE):
            figure, axes = panel()
            for row, curve in curves:
                values = [float("nan") if v is None else v for v in curve]
                line(axes, range(len(values)), values, keys[row.name])
            axes.set_title(f"{count} computed steps")
            axes.set_xlabel("sampler step")
            axes.set_ylabel("relative error of the latents")
            axes.set_ylim(bottom=0)
            charts.append(svg(figure, f"error of the latents over the steps, {count} computed steps"))
    return charts


# --- the verdict


@dataclass(frozen=True)
class Verdict:
    """The best arm of hasten at a number of computed steps, and what it has to beat.

    Attributes:
        row: the arm.
        plain: the best plain sampler with as many steps, if one was measured.
        use: the line of Python that uses it; empty where the row's parameters are of another version.
    """

    row: Row
    plain: Row | None
    use: str

    @property
    def lead(self) -> float | None:
        """dB above the plain sampler."""
        both = self.plain is not None and self.plain.psnr is not None and self.row.psnr is not None
        return self.row.psnr - self.plain.psnr if both else None  # type: ignore[operator, union-attr]


def _verdicts(result: Result) -> dict[int, Verdict]:
    found = {}
    for count, rows in result.groups().items():
        ours = [row for row in rows if row.library == "hasten" and row.psnr is not None]
        plain = [row for row in rows if row.library == "plain" and row.psnr is not None]
        if ours:
            best = max(ours, key=lambda row: row.psnr or 0.0)
            try:
                use = python_line(best, result.model)
            except HastenError:
                use = ""
            found[count] = Verdict(best, max(plain, key=lambda row: row.psnr or 0.0, default=None), use)
    return found


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


def render_report(result_files: Path | Sequence[Path], out: Path, form: str = "html") -> Path:
    """Make the report of one or several bench results.

    Args:
        result_files: JSON that `hasten bench` wrote; its images are looked for beside it.
        out: the file to write (atomically).
        form: `"html"` (one file with charts and images), `"md"` or `"csv"` (the tables alone).

    Raises:
        ReportError: if a file cannot be read or is no result.
        FileError: if the report cannot be written.
    """
    files = [result_files] if isinstance(result_files, Path) else list(result_files)
    if form not in FORMS:
        raise unknown("format of a report", form, FORMS)
    if any(out.resolve() == file.resolve() for file in files):
        raise ReportError(f"{out}: the report would replace the result it is made from. Name another file with --out.")
    return write_atomically(out, FORMS[form]([(read_result(file), file) for file in files]))


Results = Sequence[tuple[Result | StreamResult, Path]]


def _markdown(results: Results) -> str:
    return "\n".join(as_markdown(table_of(result)) + "\n" for result, _ in results)


def _csv(results: Results) -> str:
    """The rows of each result; several are told apart by a column in front, and have a heading each."""
    several = len(results) > 1
    return "".join(as_csv(result, file.stem if several else None) for result, file in results)


def _html(results: Results) -> str:
    parts = [
        {"id": f"part-{number}", "name": result.model, "file": file.name, "body": Markup(_part(result, file.parent))}
        for number, (result, file) in enumerate(results)
    ]
    downloads = [
        (f"report.{form}", f"data:text/{kind};base64,{base64.b64encode(made(results).encode()).decode()}")
        for form, kind, made in (("md", "markdown", _markdown), ("csv", "csv", _csv))
    ]
    return template("report.html.j2").render(parts=parts, downloads=downloads)


def _part(result: Result | StreamResult, folder: Path) -> str:
    return streams_part(result, folder) if isinstance(result, StreamResult) else _images_part(result, folder)


FORMS: dict[str, Callable[[Results], str]] = {"html": _html, "md": _markdown, "csv": _csv}


def _images_part(result: Result, folder: Path) -> str:
    """Images: verdict, tables by number of computed steps, charts, contact sheets."""
    keys = _keys(result)
    # Steps that run on fewer tokens cost less than their number says.
    staged = any(row.staged for row in result.rows)
    return template("images.html.j2").render(
        result=result,
        table=table_of(result, wide=True),
        verdicts=_verdicts(result),
        keys=list(keys.values()),
        quality=_quality_charts(result, keys, "budget", "number of computed steps"),
        costs=_quality_charts(result, keys, "flops_ratio", "FLOPs ratio") if staged else [],
        errors=_error_charts(result, keys),
        without_errors=sorted(
            {row.name for row in result.measured if not row.error_per_step and row.library != "plain"}
        ),
        sheets={count: _sheet(result, rows, folder) for count, rows in result.groups().items()},
    )
