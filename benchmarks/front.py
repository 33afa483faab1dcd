"""The table and the chart of the README's first screen: a few arms of one bench, chosen by rule.

python benchmarks/front.py     writes docs/images/front.svg; `benchmarks/tables.py` writes the table

`front.json` is what this wrote, on a machine that does nothing else (a busy one gets a table without times):

    hasten bench --model emoji-flux --methods leap,hicache:order=1:sigma=0.66:schedule=auto,foca:schedule=even,\
foca:domain=normed:schedule=auto,reuse --peers --computed-steps 12,9,7,5 --prompts 32 --json benchmarks/front.json

The rows of LEAP are those of the same command with `--methods leap,reuse`, after the fit that comes with the model had
been exchanged; the rows that both have are the same to the last digit. Their times are of another load.
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

__all__ = ["COUNT", "busy", "chosen", "front_table", "title"]

COUNT = 9
DEFAULT = "hicache:order=1:sigma=0.66:schedule=auto"  # of `hasten.accelerate(pipe)`, where there is no guidance
FOLDER = Path(__file__).parent
OUT = FOLDER.parent / "docs" / "images" / "front.svg"
COLUMNS = ("psnr", "lpips", "flops_ratio", "latency_ratio", "cache_bytes")
QUIET = 1.5  # load average, the bench itself included, up to which times are times
COLOURS = ("#c2570c", "#1d6fb8", "#0e8f8a", "#2f8f46", "#54545e", "#8a8a94", "#8a3fb5")
STYLE: Any = {"svg.hashsalt": "hasten", "axes.spines.right": False, "axes.spines.top": False, "font.size": 11}


def result() -> Result:
    """The bench that both are made from."""
    found = read_result(FOLDER / "front.json")
    assert isinstance(found, Result)
    return found


def busy(found: Result) -> bool:
    """Whether the machine did other things while a result was measured, as far as it tells; its times are none then."""
    return float(found.environment.get("load", 0)) > QUIET * found.settings.processes


def chosen(found: Result) -> dict[str, Row]:
    """Seven arms at COUNT computed steps by what they are: LEAP, the best cache, the default, the best peer, two plain
    ones, reuse; six where the default is the best cache."""
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
    default = best(lambda row: row.method == DEFAULT)
    if default not in picked.values():
        picked[title(default)] = default
    return dict(sorted(picked.items(), key=lambda item: -(item[1].psnr or 0.0)))


def title(row: Row) -> str:
    """The arm as table and chart name it."""
    name = "our default" if row.method == DEFAULT else row.name
    return f"**{name}**" if row.library == "hasten" else name


def front_table() -> str:
    """Markdown of the chosen arms, and on what they were measured."""
    found = result()
    made, quiet = found.environment, not busy(found)
    shown = [name for name in COLUMNS if quiet or name != "latency_ratio"]
    heads = [f"{COUNT} of {found.settings.steps} steps", *(columns(Row)[name].heading for name in shown)]
    lines = [f"| {' | '.join(heads)} |", "|---" + "|--:" * len(shown) + "|"]
    for what, row in chosen(found).items():
        name = title(row) if what == title(row) else f"{title(row)} ({what})"
        cells = [columns(Row)[field].text(getattr(row, field)) for field in shown]
        lines.append(f"| {' | '.join([name, *cells])} |")
    tried = sum(value is not None for value in found.plain[str(COUNT)].values())
    size = f"{found.settings.width}x{found.settings.height}"
    return "\n".join([
        *lines,
        "",
        f"Measured on {found.model} ({size}), {len(found.settings.prompts)} held-out prompts, medians, against "
        f"{found.settings.steps} plain steps of the same prompt and noise; hasten {made['hasten']}, "
        f"torch {made['torch']}, {made['device']}, {found.created[:10]}."
        f" The best plain sampler is the best of {tried} tried."
        + ("" if quiet else " Operations are counted; times are those of a GPU, below."),
    ])  # fmt: skip


def _arm(row: Row) -> tuple[str, str]:
    return row.method, row.library


def draw() -> None:
    """The chart: PSNR against computed steps for the same arms."""
    found = result()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 3.4), layout="constrained")
        axes = figure.add_subplot()
        arms = chosen(found)
        for (what, row), colour in zip(arms.items(), COLOURS[: len(arms)], strict=True):
            best = what == "best plain sampler"  # another one at each number of steps
            of = found.best_plain() if best else [r for r in found.measured if (r.method, r.library) == _arm(row)]
            points = sorted((r.budget, r.psnr) for r in of if r.budget and r.psnr is not None)
            line = "--" if row.library == "plain" else ":" if row.library != "hasten" else "-"
            label = what if best else title(row).strip("*")
            axes.plot(*zip(*points, strict=True), color=colour, linestyle=line, marker="o", label=label)
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
