"""The measured curve of each method: quality against the number of computed steps, beside the plain samplers.

python benchmarks/curves.py     writes docs/images/curves/NAME.svg from benchmarks/emoji-flux.json
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


def main() -> None:
    """Draw all of them."""
    result, _ = emoji_flux()
    labels = [r.method for r in result.rows if r.library == "hasten"]
    for name in dict.fromkeys(label.split(":")[0] for label in labels):
        draw(result, name, list(dict.fromkeys(label for label in labels if label.split(":")[0] == name)))


if __name__ == "__main__":
    main()
