"""One HTML page without outside files, from the JSON of `drape evaluate`: video, tables, curves."""

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
from drape.plots import azimuth_svg, bars_svg, curve_svg

__all__ = ["animation", "page", "table"]

COLUMNS = {
    "area": "area under recall over threshold",
    "ap50": "AP at IoU .5",
    "recall": "recall",
    "mean_confidence": "mean confidence",
    "sequence_success_10": "walks missed (< 10 % seen)",
    "sequence_success_50": "walks missed (< 50 % seen)",
    "longest_run": "longest run seen, share of the walk",
    "track_recall": "track recall",
    "false_boxes": "false boxes per frame",
}
DEFENCE_COLUMNS = {
    "recall": "recall",
    "recovered_recall": "lost recall recovered",
    "adaptive_recall": "recall, attack knows",
    "recovered_recall_adaptive": "recovered, attack knows",
    "clean_recall": "recall, plain clothes",
    "clean_ap50_loss": "AP lost in plain clothes",
    "clean_false_boxes": "false boxes per frame, plain clothes",
}
LIBRARY_COLUMNS = {
    "coco_map": "COCO mAP .5 to .95",
    "coco_ap50": "COCO AP at .5",
    "coco_recall": "COCO recall",
    "idf1": "IDF1 (ByteTrack)",
    "mota": "MOTA (ByteTrack)",
    "switches": "identity switches",
}
MADE_WITH = ("mode", "steps", "batch", "learning_rate", "aggregation", "seed")
STYLE = (
    "body{font:16px/1.45 sans-serif;max-width:62em;margin:2em auto;padding:0 1em}"
    "td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child"
    "{text-align:left;white-space:nowrap}table{display:block;overflow-x:auto}img,svg{max-width:100%}figure{display:inline-block;margin:.5em}"
)


def animation(frames: Tensor, boxes: Sequence[Sequence[float] | Tensor | None], milliseconds: int = 160) -> bytes:
    """Frames `[T, 3, S, S]` as an animated GIF; each box (x0, y0, x1, y1) is drawn where there is one."""
    if len(boxes) != len(frames):
        raise ConfigError(f"{len(boxes)} boxes for {len(frames)} frames; expected one, or None, for each.")
    images = []
    for frame, box in zip(frames, boxes, strict=True):
        pixels = np.round(frame.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        if box is not None:
            side = len(pixels) - 2
            x0, y0, x1, y1 = (int(np.clip(float(v), 0, side)) for v in box)
            for edge in (
                np.s_[y0 : y0 + 2, x0:x1],
                np.s_[y1 : y1 + 2, x0:x1],
                np.s_[y0:y1, x0 : x0 + 2],
                np.s_[y0:y1, x1 : x1 + 2],
            ):
                pixels[edge] = (40, 230, 90)
        images.append(Image.fromarray(pixels))
    stream = io.BytesIO()
    images[0].save(stream, "GIF", save_all=True, append_images=images[1:], duration=milliseconds, loop=0)
    return stream.getvalue()


def cell(value: Any) -> str:
    """A number with three digits, a dash where there is none."""
    return "–" if value is None else f"{value:.3f}"


def table(rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A row for each name; columns are keys of the rows and their titles. A key that no row has is left out."""
    shown = {key: title for key, title in columns.items() if any(key in row for row in rows.values())}
    head = "".join(f"<th>{html.escape(title)}</th>" for title in shown.values())
    body = "".join(
        f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{cell(row.get(key))}</td>" for key in shown) + "</tr>"
        for name, row in rows.items()
    )
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def page(measured: Mapping[str, Any], videos: Mapping[str, bytes], note: str = "") -> str:
    """The whole page.

    Args:
        measured: what `drape.measure.measure` gives.  videos: GIF bytes by caption.  note: conditions, below the title.
    """
    results: Mapping[str, Mapping[str, Any]] = measured["results"]
    if not results:
        raise ConfigError("no results to report; run `drape evaluate` first.")
    shown = {name: results[name] for name in ("plain", measured["attack"])}
    figures = "".join(
        f'<figure><img alt="{html.escape(caption)}" src="data:image/gif;base64,{base64.b64encode(gif).decode()}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for caption, gif in videos.items()
    )
    sections = [
        f"<p>Seen least: “{html.escape(measured['seen_least'])}”.</p><h2>The walk</h2>{figures}",
        f"<h2>Textures</h2>{table(results, COLUMNS)}",
        f"<h2>Defences against “{html.escape(measured['attack'])}”</h2>{table(measured['defences'], DEFENCE_COLUMNS)}",
        f"<h2>Transfer: recall of each detector</h2>{transfer_table(measured['transfer'])}",
        "<h2>By the side that is seen</h2>" + azimuth_svg({name: row["azimuth"] for name, row in shown.items()}),
        *([f"<h2>By light, on one walk</h2>{bars_svg(measured['lights'])}"] if measured["lights"] else []),
    ]
    if measured.get("libraries"):
        sections.append(f"<h2>By libraries</h2>{libraries_table(measured['libraries'])}")
    sections.append(f"<h2>Conditions</h2>{conditions_table(measured['conditions'])}")
    for label in next(iter(shown.values()))["curves"]:
        lines = {name: row["curves"][label] for name, row in shown.items()}
        lines |= {f"with {name}": row["curves"][label] for name, row in measured["defences"].items()}
        sections.append(f"<h2>Confidence: {html.escape(label)}</h2>{curve_svg(lines)}")
    title = f"drape: {html.escape(measured['detector'])}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style><h1>{title}</h1><p>{html.escape(note)}</p>{''.join(sections)}</html>"
    )


def libraries_table(found: Mapping[str, Any]) -> str:
    """COCO's precision and the tracker's identity measures, or what has to be installed for them."""
    if "missing" in found:
        return (
            f"<p>Not measured: {html.escape(', '.join(found['missing']))} missing ({html.escape(found['remedy'])}).</p>"
        )
    return table(found, LIBRARY_COLUMNS)


def conditions_table(told: Mapping[str, Any]) -> str:
    """Versions, detectors, settings, how the textures were made, and the walks."""
    plain = {name: value for name, value in told.items() if isinstance(value, (str, int, float)) or value is None}
    made = told["optimisation"] or {}
    plain |= {f"textures: {name}": value for name, value in made.get("spec", {}).items() if name in MADE_WITH}
    plain |= {f"detector {d['name']}": f"{d['input_size']} px, threshold {d['threshold']:g}" for d in told["detectors"]}
    plain |= {"plates": ", ".join(told["plates"])} if told["plates"] else {}
    rows = "".join(
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(value))}</td></tr>" for name, value in plain.items()
    )
    walks: Sequence[Mapping[str, Any]] = told["walks"]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in walks[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(value))}</td>" for value in walk.values()) + "</tr>" for walk in walks
    )
    return f"<table>{rows}</table><h3>Walks</h3><table><tr>{head}</tr>{body}</table>"


def transfer_table(transfer: Mapping[str, Any]) -> str:
    """Rows are textures, columns detectors."""
    columns = {name: name for name in transfer["columns"]}
    rows = {
        row: dict(zip(columns, values, strict=True))
        for row, values in zip(transfer["rows"], transfer["recall"], strict=True)
    }
    return table(rows, columns)
