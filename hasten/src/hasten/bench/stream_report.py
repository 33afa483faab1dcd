"""The HTML page of a streaming result: one table, curves over the frames, the videos themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from markupsafe import Markup

from hasten.bench.labels import short_label
from hasten.bench.pages import SERIES, STYLE, data_uri, line, panels_of, svg, template
from hasten.bench.result import StreamResult
from hasten.bench.row import StreamRow
from hasten.bench.tables import table_of

__all__ = ["streams_page"]

ABREAST = 3  # videos on a line
Curve = Sequence[float | None]


def streams_page(result: StreamResult, folder: Path) -> str:
    """The page as text.

    Args:
        result: of `hasten bench` on a streaming model.
        folder: where its videos are.
    """
    names = sorted({name for row in result.rows for name in row.drift})
    videos = [(row.name, data_uri(folder, row.video)) for row in result.rows]
    return template("streams.html.j2").render(
        result=result,
        table=table_of(result, wide=True),
        charts=_charts(result, names),
        hidden=len(result.rows) - len(_drawn(result)),
        videos=[videos[i : i + ABREAST] for i in range(0, len(videos), ABREAST)],
    )


def _drawn(result: StreamResult) -> list[StreamRow]:
    """The full history and as many of the others, nearest to it first, as there are colours."""
    first, *others = result.rows
    best = sorted(others, key=lambda row: -(row.psnr or 0.0))[: len(SERIES) - 1]
    return [first, *(row for row in others if row in best)]


def _charts(result: StreamResult, names: Sequence[str]) -> list[Markup]:
    rows = _drawn(result)
    panels: list[tuple[str, Mapping[str, Curve]]] = [
        ("PSNR to the full history, dB", {row.method: row.psnr_curve for row in rows[1:]}),
        ("seconds per chunk", {row.method: row.seconds_curve for row in rows}),
        *((name, {row.method: row.drift[name] for row in rows if name in row.drift}) for name in names),
    ]
    colours = {row.method: colour for row, colour in zip(rows, SERIES, strict=False)}
    pairs = [panels[i : i + 2] for i in range(0, len(panels), 2)]
    return [_chart(pair, colours, result.settings.frames) for pair in pairs]


def _chart(panels: Sequence[tuple[str, Mapping[str, Curve]]], colours: dict[str, str], frames: int) -> Markup:
    """Axes side by side, each with a title and a curve for each method."""
    with mpl.rc_context(STYLE):
        figure, axes = panels_of(len(panels))
        for panel, (title, curves) in zip(axes, panels, strict=True):
            for method, curve in curves.items():
                values = [float("nan") if value is None else value for value in curve]
                at = [i * frames / len(values) for i in range(len(values))]
                line(panel, at, values, short_label(method), colours[method])
            panel.set_title(title)
            panel.set_xlabel("frame")
        axes[-1].legend(frameon=False, fontsize=9)
        return svg(figure, " and ".join(title for title, _ in panels))
