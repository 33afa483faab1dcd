"""Plots as SVG text: confidence over a walk, over the side that is seen, and bars."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import numpy as np

from drape.errors import ConfigError

__all__ = ["azimuth_svg", "bars_svg", "curve_svg"]

COLOURS = ("#1b6ca8", "#c0392b", "#2e8b57", "#8e6c1f", "#6c3f99", "#555555")
WIDTH, HEIGHT, MARGIN = 640, 220, 34
SIDE = 300  # of the polar plot
LETTER = 8  # pixels of width that a letter takes, roughly
LINE = 18  # pixels between two rows of names


def legend(names: Sequence[str]) -> tuple[list[str], int]:
    """Coloured names along the upper edge, in rows that end where the plot does, and the height of further rows."""
    parts, place, top = [], MARGIN, 0
    for number, name in enumerate(names):
        length = LETTER * len(name)
        if place > MARGIN and place + length > WIDTH - MARGIN:
            place, top = MARGIN, top - LINE
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<text x="{place}" y="{16 + top}" font-size="13" fill="{colour}">{html.escape(name)}</text>')
        place += length + 18
    return parts, -top


def axis_y(value: float) -> float:
    """The height in pixels at which a value in [0, 1] is drawn."""
    return HEIGHT - MARGIN - value * (HEIGHT - 2 * MARGIN)


def frame(label: str, names: Sequence[str], threshold: float) -> list[str]:
    """The plot's head: names in their colours, horizontal lines at 0, the threshold (dashed) and 1."""
    named, above = legend(names)
    size = f"0 {-above} {WIDTH} {HEIGHT + above}"
    parts = [f'<svg viewBox="{size}" role="img" aria-label="{html.escape(label)}">', *named]
    for value in (0.0, threshold, 1.0):
        dash = ' stroke-dasharray="5 4"' if value == threshold else ""
        parts.append(f'<path d="M{MARGIN} {axis_y(value):.1f}H{WIDTH - MARGIN}" stroke="#999"{dash}/>')
        parts.append(f'<text x="2" y="{axis_y(value) + 4:.1f}" font-size="12">{value:g}</text>')
    return parts


def curve_svg(curves: Mapping[str, Sequence[float]], threshold: float = 0.5) -> str:
    """Confidences in [0, 1] over the frames, one line for each name, with the threshold dashed."""
    if not curves or any(len(values) < 1 for values in curves.values()):
        raise ConfigError("no curve to draw; expected at least one with at least one frame.")
    longest = max(len(values) for values in curves.values())
    parts = frame("confidence over the walk", list(curves), threshold)
    for number, values in enumerate(curves.values()):
        colour = COLOURS[number % len(COLOURS)]
        step = (WIDTH - 2 * MARGIN) / max(longest - 1, 1)
        points = " ".join(f"{MARGIN + t * step:.1f},{axis_y(v):.1f}" for t, v in enumerate(values))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    return "".join([*parts, "</svg>"])


def bars_svg(groups: Mapping[str, Mapping[str, float]], threshold: float = 0.5) -> str:
    """Values in [0, 1] as bars: a place for each inner name (a light), a colour for each outer one (a texture)."""
    if not groups or not all(groups.values()):
        raise ConfigError("no bars to draw; expected at least one group with at least one value.")
    places = list(next(iter(groups.values())))
    parts = frame("mean confidence by light", list(groups), threshold)
    step = (WIDTH - 2 * MARGIN) / len(places)
    width = 0.8 * step / len(groups)
    for number, values in enumerate(groups.values()):
        for index, place in enumerate(places):
            x, y = MARGIN + index * step + 0.1 * step + number * width, axis_y(values[place])
            colour = COLOURS[number % len(COLOURS)]
            height = axis_y(0) - y
            parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>')
    for index, place in enumerate(places):
        x = MARGIN + (index + 0.5) * step
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - 14}" font-size="12" text-anchor="middle">{html.escape(place)}</text>'
        )
    return "".join([*parts, "</svg>"])


def azimuth_svg(curves: Mapping[str, Mapping[str, float | None]], threshold: float = 0.5) -> str:
    """Confidence as distance from the centre, against the side that is seen: the front below, the left side right.

    Sides that no frame was seen from (None) leave gaps.
    """
    if not curves:
        raise ConfigError("no curve to draw; expected at least one.")
    middle, radius = SIDE / 2, SIDE / 2 - 26
    parts = [f'<svg viewBox="-16 -10 {WIDTH} {SIDE + 10}" role="img" aria-label="confidence by side">']
    for value, dash in ((1.0, ""), (threshold, ' stroke-dasharray="5 4"')):
        parts.append(f'<circle cx="{middle}" cy="{middle}" r="{radius * value:.1f}" fill="none" stroke="#999"{dash}/>')
    for name, x, y in (
        ("front", middle, SIDE - 4),
        ("back", middle, 14),
        ("left", SIDE - 12, middle),
        ("right", 12, middle),
    ):
        parts.append(f'<text x="{x}" y="{y}" font-size="12" text-anchor="middle">{name}</text>')
    for number, values in enumerate(curves.values()):
        colour = COLOURS[number % len(COLOURS)]
        for run in runs({float(angle): value for angle, value in values.items()}):
            points = " ".join(
                f"{middle + radius * v * np.sin(np.radians(a)):.1f},{middle + radius * v * np.cos(np.radians(a)):.1f}"
                for a, v in run
            )
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        name = html.escape(list(curves)[number])
        parts.append(f'<text x="{SIDE + 20}" y="{30 + 20 * number}" font-size="13" fill="{colour}">{name}</text>')
    return "".join([*parts, "</svg>"])


def runs(values: Mapping[float, float | None]) -> list[list[tuple[float, float]]]:
    """Stretches of neighbouring angles that have a value."""
    result: list[list[tuple[float, float]]] = [[]]
    for angle, value in values.items():
        if value is None:
            result.append([])
        else:
            result[-1].append((angle, value))
    return [run for run in result if run]
