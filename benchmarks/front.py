"""The table and the chart of the README's first screen: a few arms of one bench, chosen by rule.

python benchmarks/front.py     writes docs/images/front.svg; `benchmarks/tables.py` writes the table

Another model's figures take their place by changing `MODEL`, the result of `hasten bench --peers` in this folder.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from hasten.bench.result import Result, read_result
from hasten.bench.row import Row, columns
from hasten.io import write_atomically
from matplotlib.figure import Figure

__all__ = ["COUNT", "MODEL", "chosen", "front_table", "title"]

MODEL, COUNT = "emoji-flux", 9
FOLDER = Path(__file__).parent
OUT = FOLDER.parent / "docs" / "images" / "front.svg"
COLUMNS = ("psnr", "lpips", "flops_ratio", "latency_ratio", "cache_bytes")
COLOURS = ("#c2570c", "#1d6fb8", "#2f8f46", "#54545e", "#8a8a94", "#8a3fb5")
STYLE: Any = {"svg.hashsalt": "hasten", "axes.spines.right": False, "axes.spines.top": False, "font.size": 11}


def result() -> Result:
    """The bench of the model."""
    found = read_result(FOLDER / f"{MODEL}.json")
    assert isinstance(found, Result)
    return found


def chosen(found: Result) -> dict[str, Row]:
    """Six arms at COUNT computed steps by what they are: LEAP, the best cache, the best peer, two plain ones, reuse."""
    rows = [row for row in found.measured if row.budget == COUNT and row.psnr is not None]

    def best(fits: Callable[[Row], bool]) -> Row:
        return max((row for row in rows if fits(row)), key=lambda row: row.psnr or 0.0)

    picked = {
        "ours, learned": best(lambda row: row.library == "hasten" and row.method.split(":")[0] == "leap"),
        "best cache without a fit": best(
            lambda row: (
                row.library == "hasten"
                and "calibration=" not in row.method
                and "searched=" not in row.method
                and "leap" not in row.method
            )
        ),
        "best plain sampler": best(lambda row: row.library == "plain"),
        "best peer": best(lambda row: row.library not in ("hasten", "plain")),
        "plain Euler": best(lambda row: row.method == "euler"),
        "the simplest cache": best(lambda row: row.method == "reuse"),
    }
    return dict(sorted(picked.items(), key=lambda item: -(item[1].psnr or 0.0)))


def title(row: Row) -> str:
    """The arm as the table names it."""
    return f"**{row.name}**" if row.library == "hasten" else row.name


def front_table() -> str:
    """Markdown of the chosen arms, and on what they were measured."""
    found = result()
    heads = [f"{COUNT} of {found.settings.steps} steps", *(columns(Row)[name].heading for name in COLUMNS)]
    lines = [f"| {' | '.join(heads)} |", "|---" + "|--:" * len(COLUMNS) + "|"]
    for what, row in chosen(found).items():
        name = title(row) if what == title(row) else f"{title(row)} ({what})"
        cells = [columns(Row)[field].text(getattr(row, field)) for field in COLUMNS]
        lines.append(f"| {' | '.join([name, *cells])} |")
    made = found.environment
    size = f"{found.settings.width}x{found.settings.height}"
    return "\n".join([
        *lines,
        "",
        f"Measured on {found.model} ({size}), {len(found.settings.prompts)} held-out prompts, medians, against "
        f"{found.settings.steps} plain steps of the same prompt and noise; hasten {made['hasten']}, "
        f"torch {made['torch']}, {made['device']}, {found.created[:10]}."
        + ("" if found.plain else " Plain samplers have the model's own spacing; no better one was looked for."),
    ])  # fmt: skip


def draw() -> None:
    """The chart: PSNR against computed steps for the same arms."""
    found = result()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for row, colour in zip(chosen(found).values(), COLOURS, strict=True):
            points = sorted(
                (r.budget, r.psnr)
                for r in found.measured
                if r.method == row.method and r.library == row.library and r.budget and r.psnr is not None
            )
            line = "--" if row.library == "plain" else ":" if row.library != "hasten" else "-"
            axes.plot(*zip(*points, strict=True), color=colour, linestyle=line, marker="o", label=row.name)
        axes.set_xlabel(f"computed steps of {found.settings.steps}")
        axes.set_ylabel("PSNR to the full run, dB")
        axes.set_title(f"{found.model}: nearer to the full run is higher", fontsize=11, loc="left")
        axes.set_xticks(sorted({row.budget for row in found.measured if row.budget}))
        axes.grid(color="0.92")
        figure.legend(frameon=False, fontsize=9, loc="outside right upper")
        metadata: Any = {"Date": None, "Creator": None}
        write_atomically(OUT, partial(figure.savefig, format="svg", metadata=metadata, facecolor="white"))


if __name__ == "__main__":
    draw()
