"""Tables of LEAP, on `docs/leap.md`."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np

from page_tables.common import ROOT, cell, read, table_row

STEPS = 50  # of the full runs, unless a file says otherwise

HIDDEN = ("seconds", "closed_form", "relative_squared_error", "evaluations")


def ablation_table(result: dict[str, Any]) -> str:
    """Markdown of `leap-ablation.json`: a line per part, PSNR in dB."""
    lines = ["| what | PSNR, dB |", "|---|---|"]
    for name, measured in result["parts"].items():
        figures = {key: value for key, value in measured.items() if key not in HIDDEN}
        lines.append(table_row([name, "; ".join(f"{key}: {value:.1f}" for key, value in figures.items())]))
    environment = result["environment"]
    lines.append("")
    lines.append(
        f"{result['model']}, medians over {result['held_out']} held-out prompts, learned from {result['learned_from']} "
        f"where nothing else is said; torch {environment['torch']}, {environment['device']}."
    )
    return "\n".join(lines)


def fits_table(result: dict[str, Any]) -> str:
    """Markdown of the fits in `leap-ablation.json`: what was found, and model evaluations."""
    heads = [
        "fit",
        "prompts",
        "evaluations",
        "steps found",
        "spread, dB",
        "searched, dB",
        "refined, dB",
        "model evaluations",
    ]
    lines = [table_row(heads), "|---|--:|--:|---|--:|--:|--:|--:|"]
    for name, fit in result["fits"].items():
        for count, row in fit.items():
            errors = [row[key] for key in ("at_the_start", "closed_form", "relative_squared_error")]
            cells = [
                name,
                str(result["fit_prompts"][name]),
                count,
                " ".join(map(str, row["steps"])),
                *(f"{-10 * math.log10(e):.1f}" for e in errors),
            ]
            lines.append(table_row([*cells, str(row["evaluations_of_references"] + row["evaluations_of_fit"])]))
    lines.append("")
    lines.append(
        f"{result['model']}; dB of signal to error in the final latents of the prompts that were learned from; "
        "evaluations count images, those of the reference trajectories included."
    )
    return "\n".join(lines)


def pipelines_table(result: dict[str, Any]) -> str:
    """Markdown of `leap-pipelines.json`: the error with all steps and plain coefficients, or why not."""
    lines = ["| pipeline | class, scheduler | relative error at all steps |", "|---|---|---|"]
    for name, row in result["rows"].items():
        told = f"{row['error']:.1e}" if row["refused"] is None else f"refused: {row['refused'].partition(';')[0]}"
        lines.append(table_row([name, f"{row['pipeline']}, {row['scheduler']}", told]))
    environment = result["environment"]
    lines += ["", f"Tiny random weights, 12 steps; diffusers {environment['diffusers']}, torch {environment['torch']}."]
    return "\n".join(lines)


def range_table(result: dict[str, Any]) -> str:
    """Markdown of one file for a range of guidance, beside a fit for each scale."""
    rows, against, options = result["rows"], result["against"], result["options"]
    count = int(options["counts"])
    lines = [
        table_row(["guidance", "euler, dB", "one file, dB", "own fit, dB", "one file is above its own fit by (95 %)"])
    ]
    lines.append("|--:|--:|--:|--:|--:|")
    for scale in sorted({row["guidance"] for row in rows.values()}):
        place = f"{count}, guidance {scale:g}"
        own = f"leap, own fit, {place}"
        found = [rows[name]["median"] for name in (f"euler, {place}", f"leap, one file, {place}", own)]
        one, other = (rows[f"leap, {name}, {place}"]["psnr"] for name in ("one file", "own fit"))
        text, interval = f"{statistics.median(np.subtract(one, other)):+.1f}", against[own]
        if interval["low"] < interval["high"]:  # the scale at which all else is compared has none
            text += f" ({interval['low']:+.1f} to {interval['high']:+.1f})"
        lines.append(table_row([f"{scale:g}", *(cell(figure, 1) for figure in found), text]))
    about = f"{options['model']}, {count} evaluations, medians over {options['held_out']} held-out prompts, against 50"
    fitted = f"the file was fitted at {options['guidances'].replace(',', ', ')}"
    lines += ["", f"{about} plain steps; {fitted}. The last column is a median of paired differences."]
    return "\n".join(lines)


def second_table(names: list[str]) -> str:
    """Markdown of what `leap_measure.py` wrote: medians, and LEAP's lead with its interval."""
    heads = ["model", "guidance", "evaluations", "sampler", "PSNR, dB", "LEAP is above by (95 %)"]
    lines = [table_row(heads), "|---|--:|--:|---|--:|--:|"]
    for name in names:
        if not (ROOT / "benchmarks" / name).exists():
            continue
        result = read(name)
        model, prompts = result["options"]["model"], result["options"]["held_out"]
        model += "" if result["steps"] == STEPS else f" (against {result['steps']} steps)"
        for key, row in result["rows"].items():
            lead, scale = result["against"].get(key), row["guidance"]
            above = "" if lead is None else f"{lead['lead']:.1f} ({lead['low']:.1f} to {lead['high']:.1f})"
            sampler = f"{row['name']} ({row['sampler']})" if "sampler" in row else row["name"]
            figure = cell(row.get("median", row.get("float32")), 1)
            scale = "-" if scale is None else f"{scale:g}"
            lines.append(table_row([f"{model}, {prompts} prompts", scale, str(row["count"]), sampler, figure, above]))
    about = f"Held-out prompts, against {STEPS} plain steps where no other number is said"
    lines += ["", f"{about}; intervals by a paired bootstrap over prompts."]
    return "\n".join(lines)
