"""Tables of LEAP, on `docs/leap.md`."""

from __future__ import annotations

import math
from typing import Any

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
        text = "{lead:+.1f} ({low:+.1f} to {high:+.1f})".format(**against[own])
        lines.append(table_row([f"{scale:g}", *(cell(figure, 1) for figure in found), text]))
    about = f"{options['model']}, {count} evaluations, medians over {options['held_out']} held-out prompts, against 50"
    fitted = f"the file was fitted at {options['guidances'].replace(',', ', ')}"
    lines += ["", f"{about} plain steps; {fitted}. The last column is a median of paired differences."]
    return "\n".join(lines)


def second_table(names: list[str]) -> str:
    """Markdown of what `leap_measure.py` wrote, a table per file: medians by sampler and number of evaluations, and by
    how much LEAP is above, with the interval."""
    tables = [_measured(read(name)) for name in names if (ROOT / "benchmarks" / name).exists()]
    about = f"PSNR in dB on held-out prompts, medians, against {STEPS} plain steps where no other number is said; below"
    about += " it by how much LEAP is above, with 95 % of a paired bootstrap over prompts, and the solver and spacing "
    about += "of the best plain sampler; in bfloat16 against the full run in float32"
    return "\n".join([*tables, f"{about}."])


def _measured(result: dict[str, Any]) -> str:
    """The table of one file, with its heading."""
    rows = list(result["rows"].items())
    assert len({row["guidance"] for _, row in rows}) == 1, f"{result['options']['model']}: several scales in one table"
    counts = sorted({row["count"] for _, row in rows}, reverse=True)
    samplers = sorted({row["name"]: None for _, row in rows}, key=lambda name: name != "leap")
    cells: dict[tuple[str, int], str] = {}
    for key, row in rows:
        lead, sampler = result["against"].get(key), str(row.get("sampler", "")).replace(":spacing=", ", ")
        above = "" if lead is None else f"{lead['lead']:+.1f} ({lead['low']:+.1f} to {lead['high']:+.1f})"
        figure = cell(row.get("median", row.get("float32")), 1)
        cells[row["name"], row["count"]] = "<br>".join(filter(None, (figure, above, sampler)))
    options = result["options"]
    scale = "without guidance" if options["guidance"] is None else f"guidance {options['guidance']:g}"
    against = "" if result["steps"] == STEPS else f", against {result['steps']} steps"
    lines = [f"**{options['model']}, {scale}**, {options['held_out']} prompts{against}", ""]
    lines += [table_row(["evaluations", *map(str, counts)]), "|---" + "|--:" * len(counts) + "|"]
    for name in samplers:
        shown = f"**{name}**" if name == "leap" else name
        lines.append(table_row([shown, *(cells.get((name, count), "") for count in counts)]))
    return "\n".join([*lines, ""])
