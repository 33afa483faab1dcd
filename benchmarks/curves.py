"""The measured curve of each method: quality against the number of computed steps, beside the plain samplers.

python benchmarks/curves.py     writes docs/images/curves/NAME.svg

from `caching-emoji-flux.json`, and of methods that are not in it from `emoji-flux.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from hasten.bench.labels import short_label
from hasten.bench.result import Result
from hasten.bench.row import Row
from hasten.io import write_atomically
from matplotlib.figure import Figure
from page_tables.bench import emoji_flux
from page_tables.caching import MEASURED, caching_curves

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "images" / "curves"
STYLE: Any = {"svg.hashsalt": "hasten", "axes.spines.right": False, "axes.spines.top": False, "font.size": 10}
UNSIGNED: Any = {"Date": None, "Creator": None}  # the same figures make the same file


def points(rows: Sequence[Row], label: str, field: str) -> list[tuple[int, float]]:
    """(computed steps, value) of the rows of one arm."""
    return sorted(
        (r.budget or 0, getattr(r, field)) for r in rows if r.method == label and getattr(r, field) is not None
    )


def draw(result: Result, name: str, labels: list[str]) -> None:
    """One figure: the arms of a method in colour, the plain samplers in grey."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.9), layout="constrained")
        for index, (field, title) in enumerate(
            (("psnr", "PSNR, dB (more is better)"), ("flip", "FLIP (less is better)"))
        ):
            axes = figure.add_subplot(1, 2, index + 1)
            for label, grey in (("euler", "0.7"), ("unipc", "0.45")):
                xy = points(result.rows, label, field)
                axes.plot(*zip(*xy, strict=True), color=grey, linestyle="--", marker=".", label=f"plain {label}")
            for label in labels:
                xy = points(result.rows, label, field)
                if xy:
                    axes.plot(*zip(*xy, strict=True), marker="o", label=short_label(label))
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("computed steps of 50")
            axes.set_xticks(sorted({r.budget or 0 for r in result.rows}))
            axes.grid(color="0.92")
        figure.axes[1].legend(frameon=False, fontsize=8)
        write_atomically(
            OUT / f"{name}.svg", partial(figure.savefig, format="svg", metadata=UNSIGNED, facecolor="white")
        )


def draw_caching(name: str, lines: dict[str, dict[int, float]]) -> None:
    """One figure of PSNR alone: a method's forms in colour, the plain samplers in grey."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for title, line in lines.items():
            plain: Any = {"color": "0.6", "linestyle": "--", "marker": "."} if "plain" in title else {"marker": "o"}
            axes.plot(*zip(*sorted(line.items()), strict=True), label=title.replace("*", ""), **plain)
        axes.set_title("PSNR, dB (more is better)", fontsize=10)
        axes.set_xlabel("computed steps of 50")
        axes.set_xticks(sorted({count for line in lines.values() for count in line}))
        axes.grid(color="0.92")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        write_atomically(
            OUT / f"{name}.svg", partial(figure.savefig, format="svg", metadata=UNSIGNED, facecolor="white")
        )


def main() -> None:
    """Draw all of them."""
    result, _ = emoji_flux()
    labels = [r.method for r in result.rows if r.library == "hasten"]
    for name in dict.fromkeys(label.split(":")[0] for label in labels):
        lines = {title: line for title, line in caching_curves(name, MEASURED).items() if line}
        if lines:
            draw_caching(name, lines)
        else:
            draw(result, name, list(dict.fromkeys(label for label in labels if label.split(":")[0] == name)))


if __name__ == "__main__":
    main()
