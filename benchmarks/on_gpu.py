"""The table of what `benchmarks/gpu` measured: caching at FLUX.1-dev's size, and which targets were met."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "gpu" / "results"
SHOWN = {
    "leap": "**leap** (ours, learned)",
    "hicache output": "**hicache**, site `output`",
    "taylorseer output": "**taylorseer**, site `output`",
    "hicache hidden": "**hicache**, site `hidden`",
    "foca hidden": "**foca**, site `hidden`",
    "freqca hidden": "**freqca**, site `hidden`",
    "svdcache hidden": "**svdcache**, site `hidden`",
    "hermite (peer)": "hermite (hicache-pp)",
    "taylorseer-lite (peer)": "TaylorSeer lite (diffusers)",
    "dbcache (peer)": "DBCache (cache-dit)",
    "dbcache-taylorseer (peer)": "DBCache with TaylorSeer (cache-dit)",
}


def read(section: str) -> dict[str, Any]:
    """A section's file."""
    found: dict[str, Any] = json.loads((RESULTS / f"{section}.json").read_text())
    return found


def gpu_table() -> str:
    """Time, step times and memory of each arm at 9 of 50 steps."""
    result = read("flux")
    rows = {row["name"]: row for row in result["rows"]}
    plain = rows["plain, 50 steps"]
    lines = ["| 9 of 50 steps computed | time of a call | times faster | a skipped step | memory above plain |"]
    lines += [
        "|---|--:|--:|--:|--:|",
        f"| plain, 50 steps | {plain['total_ms'] / 1e3:.2f} s | 1.00 | | |",
    ]
    for name, label in SHOWN.items():
        row = rows[f"{name}, 9 of 50"]
        skipped = "" if row["skipped_ms"] is None else f"{row['skipped_ms']:.3g} ms"
        held = row["above_plain_bytes"] / 2**20
        lines.append(
            f"| {label} | {row['total_ms'] / 1e3:.2f} s | {row['latency_ratio']:.2f} | {skipped} | {held:.1f} MiB |"
        )
    steps = [row["computed_ms"] for row in rows.values() if row.get("computed_ms")]
    device = result["environment"]["device"].removeprefix("cuda: ")
    lines += [
        "",
        f"Measured on one {device}: a transformer of FLUX.1-dev's size ({result['parameters'] / 1e9:.1f} billion "
        f"parameters) with random bfloat16 weights, 1024x1024 ({result['image_tokens']:,} + {result['text_tokens']} "
        f"tokens), eager, torch {result['environment']['torch']}, diffusers {result['environment']['diffusers']}, "
        f"{calls(rows)}. A computed step took {min(steps):.0f} to {max(steps):.0f} ms from arm to arm: differences "
        "below two per cent say nothing. Random weights say nothing about quality.",
    ]
    return "\n".join(lines)


def calls(rows: dict[str, dict[str, Any]]) -> str:
    """How often each arm was called and timed."""
    least, most = (f(row["rounds"] for row in rows.values() if "rounds" in row) for f in (min, max))
    counts = str(least) if least == most else f"{least} to {most}"
    return f"{counts} timed call{'s' if most > 1 else ''} per arm"


def targets_table() -> str:
    """What was aimed at and missed, and how much was met, by section."""
    lines = [
        "| section | targets met | missed | failed or left out |",
        "|---|--:|---|---|",
    ]
    for name in ("flux", "exact", "resolution", "streaming"):
        result = read(name)
        judged = {key: target for key, target in result["targets"].items() if target["passed"] is not None}
        missed = [
            f"{key}: {target['value']:.3g} of {target['target']:g}"
            for key, target in judged.items()
            if not target["passed"]
        ]
        gone = [row["name"] for row in result["rows"] if "failed" in row] + result["left_out"]
        met = len(judged) - len(missed)
        lines.append(f"| `{name}` | {met} of {len(judged)} | {'; '.join(missed) or '-'} | {'; '.join(gone) or '-'} |")
    return "\n".join(lines)
