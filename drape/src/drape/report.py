"""One HTML page without outside files: the walk as video, the confidence over it, and the table of metrics."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from drape.errors import ConfigError

__all__ = ["animation", "curve_svg", "page"]

COLOURS = ("#1b6ca8", "#c0392b", "#2e8b57", "#8e6c1f", "#6c3f99", "#555555")
WIDTH, HEIGHT, MARGIN = 640, 220, 34
COLUMNS = ("ap50", "recall", "mean_confidence", "sequence_success_50", "longest_run", "track_recall")
STYLE = (
    "body{font:16px/1.45 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child"
    "{text-align:left}img,svg{max-width:100%}figure{display:inline-block;margin:.5em}"
)


def animation(frames: Tensor, boxes: Sequence[Tensor | None], milliseconds: int = 120) -> bytes:
    """Frames `[T, 3, S, S]` as an animated GIF; each box (x0, y0, x1, y1) is drawn where there is one."""
    if len(boxes) != len(frames):
        raise ConfigError(f"{len(boxes)} boxes for {len(frames)} frames; expected one, or None, for each.")
    pictures = []
    for frame, box in zip(frames, boxes, strict=True):
        pixels = np.round(frame.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        if box is not None:
            side = len(pixels) - 1
            x0, y0, x1, y1 = (int(np.clip(float(v), 0, side)) for v in box)
            for edge in (np.s_[y0, x0:x1], np.s_[y1, x0:x1], np.s_[y0:y1, x0], np.s_[y0:y1, x1]):
                pixels[edge] = (40, 230, 90)
        pictures.append(Image.fromarray(pixels))
    stream = io.BytesIO()
    pictures[0].save(stream, "GIF", save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0)
    return stream.getvalue()


def curve_svg(curves: Mapping[str, Sequence[float]], threshold: float = 0.5) -> str:
    """Confidences in [0, 1] over the frames, one line for each name, with the threshold dashed."""
    if not curves or any(len(values) < 1 for values in curves.values()):
        raise ConfigError("no curve to draw; expected at least one with at least one frame.")
    longest = max(len(values) for values in curves.values())

    def x(frame: int) -> float:
        return MARGIN + frame / max(longest - 1, 1) * (WIDTH - 2 * MARGIN)

    def y(value: float) -> float:
        return HEIGHT - MARGIN - value * (HEIGHT - 2 * MARGIN)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="confidence over the walk">']
    for value in (0.0, threshold, 1.0):
        dash = ' stroke-dasharray="5 4"' if value == threshold else ""
        parts.append(f'<path d="M{MARGIN} {y(value):.1f}H{WIDTH - MARGIN}" stroke="#999"{dash}/>')
        parts.append(f'<text x="2" y="{y(value) + 4:.1f}" font-size="12">{value:g}</text>')
    for number, (name, values) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v in enumerate(values))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        place = MARGIN + number * 130
        parts.append(f'<text x="{place}" y="16" font-size="13" fill="{colour}">{html.escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each texture or defence, a column for each metric."""
    head = "".join(f"<th>{column}</th>" for column in COLUMNS)
    rows = [
        f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{row[c]:.3f}</td>" for c in COLUMNS) + "</tr>"
        for name, row in results.items()
    ]
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def page(title: str, note: str, results: Mapping[str, Mapping[str, Any]], videos: Mapping[str, bytes]) -> str:
    """The whole page.

    Args:
        results: `drape.evaluate.evaluate`'s values by texture or defence.  videos: GIF bytes by caption.
    """
    if not results:
        raise ConfigError("no results to report; run `drape evaluate` first.")
    figures = "".join(
        f'<figure><img alt="{html.escape(caption)}" src="data:image/gif;base64,{base64.b64encode(gif).decode()}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for caption, gif in videos.items()
    )
    labels = list(next(iter(results.values()))["curves"])
    curves = "".join(
        f"<h2>{html.escape(label)}</h2>{curve_svg({name: row['curves'][label] for name, row in results.items()})}"
        for label in labels
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1><p>{html.escape(note)}</p>{figures}{table(results)}{curves}</html>"
    )
