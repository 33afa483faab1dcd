"""Tables of the models that tell good images from bad ones, on `docs/which-method.md`; nothing until they are measured.

`fashion-dit.json` judges by the distribution of images, `styles.json` and `styles-unguided.json` by the true image.
"""

from __future__ import annotations

import statistics
from typing import Any

from hasten.bench.labels import short_label

from page_tables.common import ROOT, cell, made_on, read, table_row

AT = 9  # computed steps at which leads are shown
PLAIN_NAMES = {"euler": "plain", "unipc": "plain UniPC", "dpmpp": "plain DPM-Solver++"}
SHOWN = {"truth_lpips": "LPIPS to the truth", "full_psnr": "PSNR to the full run, dB", "blind": "concept found"}
DIGITS = {"truth_lpips": 4, "full_psnr": 1, "blind": 2}


def fashion_table(name: str) -> str:
    """Markdown of what `fashion.py` wrote, with its heading: an arm per row, by guidance, nearest to real images first;
    empty if there is no such file."""
    if not (ROOT / "benchmarks" / name).exists():
        return ""
    result = read(name)
    counts = sorted({row["computed_steps"] for row in result["rows"] if row["arm"] != "full"}, reverse=True)
    heads = ["guidance", "arm", *(f"Frechet distance, {n} steps" for n in counts)]
    heads += [f"nearer than the best plain sampler at {AT} by (95 %)", f"recall, {AT}", f"PSNR, {AT}"]
    lines = [table_row(heads), "|--:|---" + "|--:" * (len(heads) - 2) + "|"]
    refused: dict[str, str] = {}
    full = []
    for scale in dict.fromkeys(row["guidance"] for row in result["rows"]):
        arms: dict[str, dict[int, dict[str, Any]]] = {}
        for row in (row for row in result["rows"] if row["guidance"] == scale):
            if "frechet" not in row:
                refused.setdefault(row["arm"], row.get("refused") or row["failed"])
            elif row["arm"] == "full":
                full.append(f"{row['frechet']:.2f} at guidance {scale:g}")
            else:
                arms.setdefault(row["arm"], {})[row["computed_steps"]] = row
        for arm, rows in sorted(arms.items(), key=lambda item: _distance(item[1])):
            shown = rows.get(AT, {})
            lead = shown.get("against")
            above = "" if lead is None else f"{lead['ahead']:+.2f} {_interval(lead, 2)}"
            cells = [f"{scale:g}", _arm(arm), *(cell(rows.get(n, {}).get("frechet"), 2) for n in counts), above]
            lines.append(table_row([*cells, cell(shown.get("recall"), 2), cell(shown.get("psnr"), 1)]))
    told = (
        f"fashion-dit, {result['images']:,} images per arm, Frechet distance to real ones in a classifier's features "
        f"(not FID), less is better: {', '.join(full)} with all steps, {result['floor']['frechet']:.2f} of as many "
        f"real images; PSNR to the full run; intervals by a paired bootstrap over images; {made_on(result)}."
    )
    return "\n".join(["## By the distribution of images", "", *lines, "", told, *_refusals(refused)])


def styles_table(names: list[str]) -> str:
    """Markdown of what `styles.py` wrote, with its heading: an arm per row, the cheapest last; empty if there is no
    such file."""
    results = [read(name) for name in names if (ROOT / "benchmarks" / name).exists()]
    if not results:
        return ""
    heads = ["guidance", "arm", "FLOPs, times fewer"]
    heads += [text for title in SHOWN.values() for text in (title, "better than the best plain sampler by (95 %)")]
    lines = [table_row(heads), "|--:|---" + "|--:" * (len(heads) - 2) + "|"]
    refused: dict[str, str] = {}
    for result in results:
        rows = {name: row for name, row in result["rows"].items() if "means" in row}
        refused |= {name: row["refused"] for name, row in result["rows"].items() if "refused" in row}
        for name, row in sorted(rows.items(), key=lambda item: item[1]["ratio"]):
            cells = [f"{result['guidance']:g}", _arm(name), cell(row["ratio"], 2)]
            for measure in SHOWN:
                lead = row.get("against", {}).get(measure)
                digits = DIGITS[measure]
                above = "" if lead is None else f"{lead['mean']:+.{digits}f} {_interval(lead, digits)}"
                cells += [cell(row["means"].get(measure), digits), above]
            lines.append(table_row(cells))
    one = results[0]
    told = (
        f"emoji-styles, {one['pairs']} held-out combinations of style and concept, means; plain samplers with at least "
        f"as many operations; concept: by a judge that has not seen the held-out images, which finds it in "
        f"{one['truth']['blind']:.0%} of the true ones; intervals by a paired bootstrap over prompts; {made_on(one)}."
    )
    return "\n".join(["## By the true image", "", *lines, "", told, *_refusals(refused)])


def _distance(rows: dict[int, dict[str, Any]]) -> float:
    return statistics.fmean(row["frechet"] for row in rows.values())


def _interval(lead: dict[str, Any], digits: int) -> str:
    low, high = lead["interval"]
    return f"({low:+.{digits}f} to {high:+.{digits}f})"


def _arm(text: str) -> str:
    name, _, count = text.partition("@")
    distilled = "distilled, " if name.startswith("turbo ") else ""
    name = name.removeprefix("turbo ")
    plain, _, spacing = name.partition(":spacing=")
    if plain in PLAIN_NAMES:
        shown = PLAIN_NAMES[plain] + (f", {spacing}" if spacing else "")
    elif name.startswith("peer:"):
        shown = f"{name.removeprefix('peer:')} (another library)"
    else:
        shown = f"**{name if name == 'default' else short_label(name)}**"
    return distilled + shown + (f", {count}" if count else "")


def _refusals(refused: dict[str, str]) -> list[str]:
    """Arms that have no figures, with the reasons."""
    told = "; ".join(f"{_arm(arm).replace('**', '')}: {reason}" for arm, reason in refused.items())
    return ["", f"Not measured: {told}."] if refused else []
