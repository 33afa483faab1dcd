"""A result as a table, and the table as Markdown and CSV; terminal and HTML render the same table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hasten.bench.result import Result, StreamResult
from hasten.bench.row import Column, Row, StreamRow, columns, late

__all__ = ["Cell", "Line", "Table", "as_csv", "as_markdown", "table_of"]

DECIDE = ("psnr", "latency_ratio", "lpips", "flops_ratio")  # what a phone shows of a wide table
CURVE = Column("", "mean over the last third of the video", digits=3)


@dataclass(frozen=True)
class Cell:
    """A value, how it is shown, whether it is the best of its section, and where most prompts lie."""

    value: float | None
    text: str
    best: bool = False
    spread: str = ""


@dataclass(frozen=True)
class Line:
    """A row of the table; `library` is that of the row: `"plain"`, `"hasten"` or a peer's."""

    name: str
    library: str
    cells: list[Cell]
    params: str = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """What every output shows of a result.

    Attributes:
        title: model and what was drawn.
        columns: beside the name of the method.
        sections: lines by the heading above them; the first has none.
        notes: sentences below the table: what is missing and why, then the device and versions.
    """

    title: str
    columns: list[Column]
    sections: dict[str, list[Line]]
    notes: list[str] = field(default_factory=list)

    @property
    def legend(self) -> str:
        """What the columns are, in one sentence."""
        return "; ".join(f"{column.heading}: {column.tooltip}" for column in self.columns)


def table_of(result: Result | StreamResult, wide: bool = False) -> Table:
    """The table of a result.

    Args:
        result: of images or of a streaming model.
        wide: with the columns that are shown only where there is room.
    """
    return _image_table(result, wide) if isinstance(result, Result) else _stream_table(result, wide)


def _shown(known: Mapping[str, Column], wide: bool) -> dict[str, Column]:
    """The columns of a table; a wide one, which may end beyond the edge of a screen, begins with what decides."""
    names = [name for name, column in known.items() if wide or not column.wide]
    first = [name for name in DECIDE if wide and name in names]
    return {name: known[name] for name in dict.fromkeys([*first, *names])}


def _image_table(result: Result, wide: bool) -> Table:
    settings = result.settings
    measured = {
        name: column
        for name, column in columns(Row).items()
        if any(getattr(row, name) is not None for row in result.measured)
    }
    shown = _shown(measured, wide)
    sections = {"": _lines([result.baseline], shown)}
    for count, rows in result.groups().items():
        sections[f"{count} computed steps"] = _lines(rows, shown)
    clip = "" if settings.frames is None else f", {settings.frames} frames"
    title = (
        f"{result.model}, {settings.width}x{settings.height}{clip}, {len(settings.prompts)} prompts, medians, against "
        f"{settings.steps} plain steps"
    )
    notes = [f"{columns(Row)[name].heading} was not measured: {why}" for name, why in result.missing.items()]
    for row in result.best_plain():
        tried = sum(value is not None for value in result.plain[str(row.budget)].values())
        notes.append(f"Best of {tried} plain samplers with {row.budget} steps: {row.name}")
    notes += [f"Not measured: {row.name}, {row.budget} computed steps: {row.failed}" for row in result.failed]
    if result.baseline.psnr_unedited_vae is not None:
        notes.append(f"Unedited, after the way through the VAE alone: {result.baseline.psnr_unedited_vae:.1f} dB")
    return Table(title, list(shown.values()), sections, [*notes, _made(result)])


def _stream_table(result: StreamResult, wide: bool) -> Table:
    settings = result.settings
    shown = _shown(columns(StreamRow), wide)
    grades = sorted({name for row in result.rows for name in row.drift})
    drifts = [Column(name, CURVE.tooltip, digits=CURVE.digits) for name in grades]
    lines = [
        Line(line.name, "plain" if i == 0 else "hasten", [*line.cells, *_drift(row, grades)], line.params)
        for i, (line, row) in enumerate(zip(_lines(result.rows, shown), result.rows, strict=True))
    ]
    notes = [f"Not measured: {name}: {why}" for name, why in result.failed.items()]
    title = (
        f"{result.model}, {settings.worlds} videos of {settings.frames} frames, {settings.steps} steps per chunk, "
        "against the whole history"
    )
    return Table(title, [*shown.values(), *drifts], {"": lines}, [*notes, _made(result)])


def _drift(row: StreamRow, names: Sequence[str]) -> list[Cell]:
    values = [late(row.drift.get(name, [])) for name in names]
    return [Cell(value, CURVE.text(value)) for value in values]


def _spread(row: Row | StreamRow, name: str, column: Column) -> str:
    """The tenth and the ninetieth percentile over the prompts, if they are known."""
    known = row.spread.get(name, {}) if isinstance(row, Row) else {}
    ends = [known.get(end) for end in ("p10", "p90")]
    told = getattr(row, name) is not None and None not in ends  # the full run is not compared with itself
    return " to ".join(column.text(end) for end in ends) if told else ""


def _lines(rows: Sequence[Row] | Sequence[StreamRow], shown: dict[str, Column]) -> list[Line]:
    best = {name: column.best([getattr(row, name) for row in rows]) for name, column in shown.items()}
    lines = []
    for row in rows:
        cells = []
        for name, column in shown.items():
            value = getattr(row, name)
            cells.append(
                Cell(value, column.text(value), value is not None and value == best[name], _spread(row, name, column))
            )
        params = ", ".join(f"{key}={value}" for key, value in row.params.items())
        library, note = (row.library, row.note) if isinstance(row, Row) else ("hasten", "")
        lines.append(Line(row.name, library, cells, params, note))
    return lines


def _made(result: Result | StreamResult) -> str:
    known = result.environment
    versions = [f"{name} {known[name]}" for name in ("hasten", "torch", "diffusers") if name in known]
    shared = f"shared by {known['processes']} processes" if known.get("processes", "1") != "1" else ""
    busy = f"load average {known['load']}" if "load" in known else ""
    return ", ".join(part for part in (*versions, known.get("device"), shared, busy, result.created[:10]) if part)


def as_markdown(table: Table) -> str:
    """The table as Markdown, a block of rows for each section, the best of each block in bold."""
    heads = ["method", *(column.title for column in table.columns)]
    lines = [_markdown(heads), "|---" + "|--:" * len(table.columns) + "|"]
    for heading, rows in table.sections.items():
        if heading:
            lines.append(_markdown([f"**{heading}**", *[""] * len(table.columns)]))
        for row in rows:
            cells = [f"**{cell.text}**" if cell.best else cell.text for cell in row.cells]
            lines.append(_markdown([row.name + (f" ({row.note})" if row.note else ""), *cells]))
    return "\n".join([*lines, "", f"{table.title}. {'. '.join(table.notes)}."])


def _markdown(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def as_csv(result: Result | StreamResult, name: str | None = None) -> str:
    """All rows with all columns, unrounded: a heading of field names, then a line per row, those that failed too.

    Args:
        result: of images or of a streaming model.
        name: of the result, in a column in front, where there are several.
    """
    rows: Sequence[Row] | Sequence[StreamRow]
    more: tuple[str, ...] = ()
    if isinstance(result, Result):
        rows, shown, more = [result.baseline, *result.rows], [*columns(Row)], ("library", "budget", "note", "failed")
    else:
        rows, shown = result.rows, [*columns(StreamRow)]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    head, own = ([], []) if name is None else (["result"], [name])
    writer.writerow([*head, "method", *more, *shown])
    for row in rows:
        writer.writerow([*own, row.method, *(getattr(row, column) for column in (*more, *shown))])
    return buffer.getvalue()
