"""How the streaming methods drift over the frames: PSNR to the full history, who is known, and time.

python benchmarks/streaming_curves.py     writes docs/images/curves/streaming.svg from benchmarks/sprites-stream.json
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from hasten.bench.labels import short_label
from hasten.bench.rollout import REFERENCE
from hasten.bench.streams import DEFAULT_METHODS
from hasten.io import write_atomically
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "images" / "curves" / "streaming.svg"
STYLE: Any = {"svg.hashsalt": "hasten", "axes.spines.right": False, "axes.spines.top": False, "font.size": 10}
UNSIGNED: Any = {"Date": None, "Creator": None}  # the same figures make the same file
AROUND = 2  # identity is a mean over so many graded frames to each side, because few objects are in sight in one


def smooth(curve: list[float | None]) -> list[float]:
    """Means over neighbours; NaN where none can be said."""
    means = []
    for i in range(len(curve)):
        known = [value for value in curve[max(i - AROUND, 0) : i + AROUND + 1] if value is not None]
        means.append(sum(known) / len(known) if known else float("nan"))
    return means


def main() -> None:
    result = json.loads((ROOT / "benchmarks" / "sprites-stream.json").read_text())
    rows = {row["method"]: row for row in result["rows"]}
    frames = result["settings"]["frames"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.6), layout="constrained")
        axes = figure.subplots(1, 3)
        for name in (REFERENCE, *DEFAULT_METHODS):
            row, look = rows[name], {"color": "0.45", "linestyle": "--"} if name == REFERENCE else {}
            curves = (
                row["psnr_curve"] if name != REFERENCE else [],
                smooth(row["drift"]["identity"]),
                row["seconds_curve"],
            )
            for panel, curve in zip(axes, curves, strict=True):
                at = [i * frames / len(curve) for i in range(len(curve))]
                panel.plot(at, curve, label=short_label(name).split(",")[0], **look)
        axes[0].set_ylim(30, 70)
        for panel, title in zip(axes, ("PSNR to the full history, dB", "identity", "seconds per chunk"), strict=True):
            panel.set_title(title, fontsize=10)
            panel.set_xlabel("frame")
        handles, labels = axes[1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        write_atomically(OUT, partial(figure.savefig, format="svg", metadata=UNSIGNED, facecolor="white"))


if __name__ == "__main__":
    main()
