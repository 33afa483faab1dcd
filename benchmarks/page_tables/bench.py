"""Tables of results of `hasten bench`, on all pages, and the figures on the page of each method."""

from __future__ import annotations

import re
from dataclasses import replace

from front import busy
from hasten.bench.result import Result
from hasten.bench.row import Row, columns
from hasten.bench.tables import as_markdown, table_of

from page_tables.caching import MEASURED, caching_curves
from page_tables.common import cell, result_of, table_row

TIMES = [columns(Row)[name].heading for name in ("seconds", "latency_ratio", "latency_share")]
Arms = dict[str, dict[int, Row]]


def bench_table(name: str) -> str:
    """Markdown of a result of `hasten bench`, without times where the machine was busy."""
    result = result_of(name)
    table = table_of(result)
    if not (isinstance(result, Result) and busy(result)):
        return as_markdown(table)
    kept = [i for i, column in enumerate(table.columns) if column.heading not in TIMES]
    sections = {
        heading: [replace(line, cells=[line.cells[i] for i in kept]) for line in lines]
        for heading, lines in table.sections.items()
    }
    notes = [*table.notes, "The machine was too busy for times"]
    return as_markdown(replace(table, columns=[table.columns[i] for i in kept], sections=sections, notes=notes))


def _title(row: Row) -> str:
    return f"**{row.name}**" if row.library == "hasten" else row.name


def _arms(result: Result) -> tuple[list[int], Arms]:
    """Numbers of computed steps, and the rows of each arm by that number."""
    arms: Arms = {}
    for row in result.rows:
        arms.setdefault(_title(row), {})[row.budget or 0] = row
    return sorted({row.budget or 0 for row in result.rows}, reverse=True), arms


def _shown(field: str, row: Row | None) -> str:
    """A figure of a row as every table shows it."""
    return columns(Row)[field].text(None if row is None else getattr(row, field))


def _psnr(row: Row | None) -> str:
    return cell(None if row is None else row.psnr, 1)


def overview_table(result: Result, remark: str = "") -> str:
    """Markdown of one bench result, a line per arm, best first: quality at each budget, cost at the middle one."""
    counts, arms = _arms(result)
    middle = counts[(len(counts) - 1) // 2]
    times = () if busy(result) else ("seconds", "latency_ratio")
    costs = ("flip", *times, "flops_ratio", "cache_bytes")
    heads = ["sampler", *(f"PSNR, {n} steps" for n in counts), *(f"LPIPS, {n}" for n in counts)]
    heads += [f"{columns(Row)[field].title}, {middle}" for field in costs]
    lines = [table_row(heads), "|---" + "|--:" * (len(heads) - 1) + "|"]

    def quality(rows: dict[int, Row]) -> float:
        values = [row.psnr for row in rows.values() if row.psnr is not None]
        return -sum(values) / max(len(values), 1)

    for title, rows in sorted(arms.items(), key=lambda item: quality(item[1])):
        if all(row.failed for row in rows.values()):
            continue
        cells = [title, *(_psnr(rows.get(n)) for n in counts), *(_shown("lpips", rows.get(n)) for n in counts)]
        lines.append(table_row([*cells, *(_shown(field, rows.get(middle)) for field in costs)]))
    table = table_of(result)
    return "\n".join([*lines, "", *([remark] if remark else []), f"{table.title}. {'. '.join(table.notes)}."])


def forms_table(name: str) -> str:
    """Markdown of a method's forms in `emoji-flux-forms.json`."""
    result = result_of("emoji-flux-forms")
    counts, arms = _arms(result)
    lines = [
        table_row(["form", *(f"{count} computed steps, dB" for count in counts)]),
        "|---" + "|--:" * len(counts) + "|",
    ]
    for title, rows in arms.items():
        if re.match(rf"\*\*{name}(,|\*)", title):
            lines.append(table_row([title.replace("**", ""), *(_psnr(rows.get(count)) for count in counts)]))
    return "\n".join([*lines, "", f"{table_of(result).title}. {table_of(result).notes[-1]}."])


def curve(name: str) -> str:
    """A method's own figures: its chart, and its best form beside the plain samplers."""
    measured = caching_curves(name, MEASURED)
    if measured:
        budgets = sorted({count for line in measured.values() for count in line}, reverse=True)
        lines = [
            f"{title} {' / '.join(cell(line.get(count), 1) for count in budgets)}" for title, line in measured.items()
        ]
        return (
            f"![{name} on emoji-flux, against the number of computed steps](../images/curves/{name}.svg)\n\n"
            f"Measured on `emoji-flux`, without guidance, median PSNR in dB at {' / '.join(map(str, budgets))} "
            f"computed steps: {'; '.join(lines)}."
        )
    counts, arms = _arms(emoji_flux()[0])

    def line(title: str) -> str:
        return " / ".join(_psnr(arms[title].get(n)) for n in counts)

    own = [title for title in arms if re.match(rf"\*\*{re.escape(name)}(,|\*)", title)]
    figures = "; ".join(f"{title} {line(title)}" for title in [*own, "plain Euler", "plain UniPC"])
    budget = " / ".join(map(str, counts))
    return (
        f"![{name} on emoji-flux, against the number of computed steps](../images/curves/{name}.svg)\n\n"
        f"Measured on `emoji-flux`, PSNR in dB at {budget} computed steps: {figures}."
    )


def emoji_flux() -> tuple[Result, str]:
    """The large run on emoji-flux, and the arms that were measured in one of their own on the same prompts."""
    result, more = result_of("emoji-flux"), result_of("emoji-flux-more")
    assert isinstance(result, Result)
    assert isinstance(more, Result)
    assert more.settings.prompts == result.settings.prompts
    own = [row for row in more.rows if row.library == "hasten"]
    result.rows += own
    names = " and ".join(dict.fromkeys(_title(row) for row in own))
    checks = ", ".join(f"{row.psnr:.1f} dB at {row.budget}" for row in more.rows if row.method == "unipc")
    return result, f"{names} were measured in a run of their own; plain UniPC had {checks} in it."
