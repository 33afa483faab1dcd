"""Tables of the methods that start coarse, on their own pages: images, edits and clips."""

from __future__ import annotations

import math
from typing import Any

from hasten.bench.labels import short_label

from page_tables.common import cell, made_on, table_row


def truth_table(part: dict[str, Any], model: str) -> str:
    """Markdown of a part of `resolution-truth.json`: every arm, by what an image costs."""
    editing = "psnr_edited" in part["rows"][0]
    heads = ["sampler", "evaluations", "FLOPs, times fewer", "PSNR to the full run", "PSNR to the truth"]
    heads += ["LPIPS to the truth", *(["unedited dB", "of it exact", "edited dB"] if editing else []), "top-1"]
    lines = [table_row(heads), "|---" + "|--:" * (len(heads) - 1) + "|"]
    for row in sorted(part["rows"], key=lambda row: row["flops_ratio"]):
        middle = [row.get(key, {}).get("median") for key in ("full_psnr", "truth_psnr")]
        cells = [_arm(row), str(row["steps"]), cell(row["flops_ratio"], 2), *(cell(value, 1) for value in middle)]
        cells.append(cell(row["truth_lpips"]["mean"], 4))
        if editing:
            exact = f"{row['unedited_exact']['mean']:.0%}"
            cells += [cell(row["psnr_unedited"]["median"], 1), exact, cell(row["psnr_edited"]["median"], 1)]
        lines.append(table_row([*cells, cell(row["top1"], 2)]))
    truth = "the edit that was asked for" if editing else "the image that the caption had in training"
    lines += [
        "",
        f"{model}, 64x64, {part['prompts']} prompts, medians (LPIPS: means); the full run: 50 plain steps from the "
        f"same noise; the truth: {truth}; a cache's number is that of its computed steps; {made_on(part)}.",
    ]
    return "\n".join(lines)


def cells_table(result: dict[str, Any], budgets: tuple[float, ...] = (5.0, 7.75, 10.0, 12.5, 18.0)) -> str:
    """Markdown of `resolution-truth.json`: the best of each way to save at each budget, by LPIPS to the truth."""
    kinds = {"steps": "fewer steps", "cache": "cache alone", "resolution": "resolution alone", "both": "both"}
    lines = [table_row(["model", "FLOPs, times fewer", *kinds.values()]), "|---|--:" + "|---" * len(kinds) + "|"]
    for model, part in result.items():
        for budget in budgets:
            cells = []
            for kind in kinds:
                near = [row for row in part["rows"] if row["kind"] == kind and _near(row["flops_ratio"], budget)]
                best = min(near, key=lambda row: row["truth_lpips"]["mean"], default=None)
                cells.append("-" if best is None else _best(best))
            if "-" not in cells[1:]:
                lines.append(table_row([model, f"{budget:g}", *cells]))
    parts = ", ".join(f"{part['prompts']} prompts of {model}" for model, part in result.items())
    made = made_on(next(iter(result.values())))
    lines += [
        "",
        "LPIPS to the truth (mean; the less the better), PSNR to the truth (median), and what it was got with, at how "
        f"many times fewer operations: the best arm within an eighth of the budget; {parts}; {made}.",
    ]
    return "\n".join(lines)


def _near(ratio: float, budget: float) -> bool:
    return bool(budget * 7 / 8 <= ratio <= budget * 9 / 8)


def _best(row: dict[str, Any]) -> str:
    figures = f"**{row['truth_lpips']['mean']:.4f}**, {row['truth_psnr']['median']:.1f} dB"
    return f"{figures}: {_arm(row).replace('**', '')} ({row['flops_ratio']:.1f}x)"


def _arm(row: dict[str, Any]) -> str:
    plain = {"euler": "plain Euler", "unipc": "plain UniPC"}
    if row["method"] in plain:
        return f"{plain[row['method']]}, {row['count']}"
    return f"**{short_label(row['method'])}**" + (f", {row['count']}" if row["kind"] == "cache" else "")


def scale_table(part: dict[str, Any]) -> str:
    """Markdown of how far images of other seeds and sizes are from each other."""
    lines = ["| images, 50 plain steps | PSNR dB |", "|---|--:|"]
    lines += [table_row([name, cell(figures["median"], 1)]) for name, figures in part["scale"].items()]
    return "\n".join(lines)


def latency_table(result: dict[str, Any]) -> str:
    """Markdown of `resolution-latency.json`."""
    heads = ["model", "method", "pixels", "50 steps: FLOPs, times fewer", "times faster", "share"]
    heads += ["as many evaluations: FLOPs, times fewer", "times faster", "share", "share in the transformer"]
    heads += ["outside it, ms per step: plain", "method"]
    lines = [table_row(heads), "|---|---" + "|--:" * (len(heads) - 2) + "|"]
    figures = ("flops_ratio", "latency_ratio", "latency_share")
    for row in result["rows"]:
        outside, equal = row["outside_ms_per_step"], row["against_plain"]
        cells = [row["model"], short_label(row["method"]), f"{row['side']}x{row['side']}"]
        cells += [cell(row["against_full"][key], 2) for key in figures]
        cells += [cell(equal[key], 2) for key in (*figures, "transformer_share")]
        lines.append(table_row([*cells, cell(outside["plain"], 2), cell(outside["method"], 2)]))
    lines += ["", f"In turns with the plain sampler, medians; {made_on(result)}."]
    return "\n".join(lines)


def toy_table(result: dict[str, Any]) -> str:
    """Markdown of `resolution-toy.json`: each method beside plain sampling with as many operations."""
    heads = ["sampler", "evaluations", "operations", "distance", "plain, as many operations"]
    heads += ["plain, as many evaluations", "low band", "high band"]
    lines = [table_row(heads), "|---" + "|--:" * (len(heads) - 1) + "|"]
    plain = {row["evaluations"]: row["distance"] for row in result["rows"] if row["method"] == "euler"}
    for row in sorted(result["rows"], key=lambda row: -row["operations"]):
        if row["method"] != "euler":
            below = math.floor(row["operations"])
            part = row["operations"] - below
            equal = (cell((1 - part) * plain[below] + part * plain[below + 1], 3), cell(plain[row["evaluations"]], 3))
            cells = [f"**{short_label(row['method'])}**", str(row["evaluations"]), cell(row["operations"], 1)]
            bands = (cell(row["low_band"], 2), cell(row["high_band"], 2))
            lines.append(table_row([*cells, cell(row["distance"], 3), *equal, *bands]))
    full = next(row for row in result["rows"] if row["evaluations"] == 50)
    lines += [
        "",
        f"Gaussian images of {result['side']}x{result['side']} pixels, {result['samples']} samples, shift "
        f"{result['shift']:g}; operations in steps at full size, the plain sampler's interpolated between whole steps; "
        "distance: relative L2 to 50 plain steps from the same noise; bands: energy relative to the true spectrum "
        f"({full['low_band']:.2f} and {full['high_band']:.2f} with 50 plain steps); torch "
        f"{result['environment']['torch']}.",
    ]
    return "\n".join(lines)


def parts_table(result: dict[str, Any]) -> str:
    """Markdown of `resolution-parts.json`."""
    heads = ["model", "18 steps", "as it is", "coarse stage given", "lost by the coarse model (95 %)"]
    lines = [table_row(heads), "|---|---|--:|--:|--:|"]
    for model, part in result.items():
        for name, kinds in part["rows"].items():
            low, high = kinds["lost"]["interval"]
            lost = f"{kinds['lost']['mean']:.1f} ({low:.1f} to {high:.1f})"
            lines.append(table_row([model, name, cell(kinds["own"], 1), cell(kinds["given"], 1), lost]))
    plain = "; ".join(
        f"{model}: " + ", ".join(f"{cell(value, 1)} with {count}" for count, value in part["plain"].items())
        for model, part in result.items()
    )
    part = next(iter(result.values()))
    lines += [
        "",
        f"PSNR in dB to 50 plain steps from the same noise, medians over {part['prompts']} prompts, and the mean of "
        f"what is lost; {made_on(part)}. Plain steps, {plain}.",
    ]
    return "\n".join(lines)
