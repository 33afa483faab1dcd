"""A streaming result in a page: one table, curves over the frames, the videos themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from markupsafe import Markup

from hasten.bench.pages import STYLE, Key, data_uri, line, panel, svg, template
from hasten.bench.result import StreamResult
from hasten.bench.tables import table_of

__all__ = ["streams_part"]

ABREAST = 3  # videos on a line
Curve = Sequence[float | None]


def streams_part(result: StreamResult, folder: Path) -> str:
    """The part of a page for one result.

    Args:
        result: of `hasten bench` on a streaming model.
        folder: where its videos are.
    """
    names = sorted({name for row in result.rows for name in row.drift})
    videos = [(row.name, data_uri(folder, row.video)) for row in result.rows]
    keys = [Key(row.name, number) for number, row in enumerate(result.rows)]
    return template("streams.html.j2").render(
        result=result,
        table=table_of(result, wide=True),
        charts=_charts(result, names, keys),
        keys=keys,
        videos=[videos[i : i + ABREAST] for i in range(0, len(videos), ABREAST)],
    )


def _charts(result: StreamResult, names: Sequence[str], keys: Sequence[Key]) -> list[Markup]:
    rows = result.rows
    panels: list[tuple[str, Mapping[str, Curve]]] = [
        ("PSNR to the full history, dB", {row.method: row.psnr_curve for row in rows[1:]}),
        ("seconds per chunk", {row.method: row.seconds_curve for row in rows}),
        *((name, {row.method: row.drift[name] for row in rows if name in row.drift}) for name in names),
    ]
    by_method = {row.method: key for row, key in zip(rows, keys, strict=True)}
    return [_chart(title, curves, by_method, result.settings.frames) for title, curves in panels]


def _chart(title: str, curves: Mapping[str, Curve], keys: Mapping[str, Key], frames: int) -> Markup:
    """A chart with a curve for each method."""
    with mpl.rc_context(STYLE):
        figure, axes = panel()
        for method, curve in curves.items():
            values = [float("nan") if value is None else value for value in curve]
            line(axes, [i * frames / len(values) for i in range(len(values))], values, keys[method])
        axes.set_title(title)
        axes.set_xlabel("frame")
        return svg(figure, title)
