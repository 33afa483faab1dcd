"""Tables of the models that tell good images from bad ones, nothing until they are measured.

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
TURBO = "turbo "  # before the arms of the distilled model
Refusal = tuple[str, str, str]  # an arm with its number of steps, the guidance, the reason
DIGITS = {"truth_lpips": 4, "full_psnr": 1, "blind": 2}


def fashion_table(name: str) -> str:
    """Markdown of what `fashion.py` wrote, with its heading: an arm per row, by guidance, nearest to real images first;
    empty if there is no such file."""
    if not (ROOT / "benchmarks" / name).exists():
        return ""
    result = read(name)
    counts = sorted({row["computed_steps"] for row in result["rows"] if row["arm"] != "full"}, reverse=True)
    heads = ["guidance", "arm", *(f"Frechet distance, {n} steps" for n in counts)]
    heads += [f"really computed, {AT}", f"nearer than the best plain sampler at {AT} by (95 %)"]
    heads += [f"recall, {AT}", f"PSNR, {AT}"]
    lines = [table_row(heads), "|--:|---" + "|--:" * (len(heads) - 2) + "|"]
    refused: list[Refusal] = []
    full = []
    for scale in dict.fromkeys(row["guidance"] for row in result["rows"]):
        arms: dict[str, dict[int, dict[str, Any]]] = {}
        for row in (row for row in result["rows"] if row["guidance"] == scale):
            if "frechet" not in row:
                refused.append((f"{row['arm']}@{row['computed_steps']}", f"{scale:g}", _reason(row)))
            elif row["arm"] == "full":
                full.append(f"{row['frechet']:.2f} at guidance {scale:g}")
            else:
                arms.setdefault(row["arm"], {})[row["computed_steps"]] = row
        for arm, rows in sorted(arms.items(), key=lambda item: _distance(item[1])):
            shown = rows.get(AT, {})
            lead = shown.get("against")
            above = "" if lead is None else f"{lead['ahead']:+.2f} {interval(lead, 2)}"
            cells = [f"{scale:g}", arm_title(arm), *(cell(rows.get(n, {}).get("frechet"), 2) for n in counts)]
            cells += [cell(shown.get("really_computed"), 1), above]
            lines.append(table_row([*cells, cell(shown.get("recall"), 2), cell(shown.get("psnr"), 1)]))
    told = (
        f"fashion-dit, {result['images']:,} images per arm, Frechet distance to real ones in a classifier's features "
        f"(not FID), less is better: {', '.join(full)} with all steps, {result['floor']['frechet']:.2f} of as many "
        f"real images; PSNR to the full run; a gate's steps are matched on one batch, and what it really computed is "
        f"what it has to be judged by; intervals by a paired bootstrap over images; {made_on(result)}."
    )
    return "\n".join(["## By the distribution of images", "", *lines, "", told, *_refusals(refused)])


def styles_table(names: list[str]) -> str:
    """Markdown of what `styles.py` wrote, with its heading: an arm per row, the cheapest last; what is added to the
    distilled model in a table of its own; empty if there is no such file."""
    results = [read(name) for name in names if (ROOT / "benchmarks" / name).exists()]
    if not results:
        return ""
    heads = ["guidance", "arm", "FLOPs, times fewer"]
    heads += [text for title in SHOWN.values() for text in (title, "better than the best plain sampler by (95 %)")]
    lines = [table_row(heads), "|--:|---" + "|--:" * (len(heads) - 2) + "|"]
    refused: list[Refusal] = []
    distilled: list[tuple[str, dict[str, Any]]] = []
    for result in results:
        scale = f"{result['guidance']:g}"
        rows = {name: row for name, row in result["rows"].items() if "means" in row}
        refused += [(name, scale, _reason(row)) for name, row in result["rows"].items() if name not in rows]
        distilled += [(name, row) for name, row in rows.items() if "against_four" in row]
        nearest = _nearest_plain(rows, result["plain"])
        for name, row in sorted(rows.items(), key=lambda item: item[1]["ratio"]):
            if "against_four" not in row and name in nearest:
                cells = [scale, arm_title(name), cell(row["ratio"], 2)]
                lines.append(table_row(cells + _measures(row, "against")))
    one = results[0]
    plain = ", ".join(arm_title(name) for name in one["plain"])
    told = (
        f"emoji-styles, {one['pairs']} held-out combinations of style and concept, means; plain samplers with the "
        f"fewest steps that cost at least as many operations, by each measure the best of {len(one['plain'])} chosen "
        f"by hand ({plain}), of which the nearest to the full run has a row; concept: by a judge that has not seen the "
        f"held-out images, which finds it in {one['truth']['blind']:.0%} of the true ones; intervals by a paired "
        f"bootstrap over prompts; {made_on(one)}."
    )
    return "\n".join(["## By the true image", "", *lines, "", told, *_distilled_table(distilled), *_refusals(refused)])


def _nearest_plain(rows: dict[str, Any], samplers: list[str]) -> set[str]:
    """The names of all rows, of plain samplers with as many steps that of the nearest to the full run alone."""
    plain: dict[str, list[str]] = {}
    for name in rows:
        sampler, _, steps = name.rpartition("@")
        if sampler in samplers:
            plain.setdefault(steps, []).append(name)
    nearest = {max(names, key=lambda name: rows[name]["means"].get("full_psnr", 0.0)) for names in plain.values()}
    return {name for name in rows if name in nearest or name.rpartition("@")[0] not in samplers}


def leap_or_distilled_table(name: str) -> str:
    """Markdown of LEAP and of the distilled model side by side, as `styles.py` measured them; empty without a file."""
    if not (ROOT / "benchmarks" / name).exists():
        return ""
    result = read(name)
    titles = SHOWN | {"full_lpips": "LPIPS to the full run", "style": "style found"}
    digits = DIGITS | {"full_lpips": DIGITS["truth_lpips"], "style": DIGITS["blind"]}
    lines = [table_row(["", "forwards", "FLOPs, times fewer", *titles.values()]), "|---" + "|--:" * 7 + "|"]
    for arm, row in sorted(result["rows"].items(), key=lambda item: item[1].get("ratio", 0.0)):
        text, _, count = arm.rpartition("@")
        own = {"euler": "50 plain steps", "leap": "LEAP", "turbo euler": "the distilled model"}.get(text)
        if own is None or "means" not in row or (text == "euler" and count != "50"):
            continue
        forwards = int(count) * (1 if text.startswith(TURBO) else 2)
        cells = [own if text == "euler" else f"{own}, {count} steps", str(forwards), cell(row["ratio"], 1)]
        lines.append(table_row([*cells, *(cell(row["means"].get(one), digits[one]) for one in titles)]))
    told = (
        f"emoji-styles, guidance {result['guidance']:g}, {result['pairs']} held-out combinations of style and concept, "
        f"means; {made_on(result)}."
    )
    return "\n".join([*lines, "", told])


def _distilled_table(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """What is added to the distilled model beside that model alone, which is its rival in every column."""
    if not found:
        return []
    heads = ["added to the distilled model", "FLOPs, times fewer", "steps that cost as much"]
    for title in SHOWN.values():
        heads += [title, "better than it with so many steps by (95 %)", "better than it with its four by (95 %)"]
    lines = [table_row(heads), "|---" + "|--:" * (len(heads) - 1) + "|"]
    for name, row in sorted(found, key=lambda item: item[1]["ratio"]):
        cells = [arm_title(name.removeprefix(TURBO)), cell(row["ratio"], 2), str(row["against"]["steps"])]
        lines.append(table_row(cells + _measures(row, "against", "against_four")))
    told = (
        "The rival is the distilled model alone, not a plain sampler: with the fewest steps that cost at least as "
        "much, and with the four that it was distilled for; other numbers of steps are off its windows."
    )
    return ["", *lines, "", told]


def _measures(row: dict[str, Any], *leads: str) -> list[str]:
    """By measure: the mean, and each lead with its interval."""
    cells = []
    for measure in SHOWN:
        digits = DIGITS[measure]
        cells.append(cell(row["means"].get(measure), digits))
        for name in leads:
            lead = row.get(name, {}).get(measure)
            cells.append("" if lead is None else f"{lead['mean']:+.{digits}f} {interval(lead, digits)}")
    return cells


def _distance(rows: dict[int, dict[str, Any]]) -> float:
    return statistics.fmean(row["frechet"] for row in rows.values())


def interval(lead: dict[str, Any], digits: int) -> str:
    """The interval of a lead, as tables show it."""
    low, high = lead["interval"]
    return f"({low:+.{digits}f} to {high:+.{digits}f})"


def arm_title(text: str) -> str:
    """An arm of a script's file as tables show it, ours in bold."""
    name, _, count = text.partition("@")
    distilled = "distilled, " if name.startswith(TURBO) else ""
    name = name.removeprefix(TURBO)
    plain, _, spacing = name.partition(":spacing=")
    if plain in PLAIN_NAMES:
        shown = PLAIN_NAMES[plain] + (f", {spacing}" if spacing else "")
    elif name.startswith("peer:"):
        shown = f"{name.removeprefix('peer:')} (another library)"
    else:
        shown = f"**{name if name == 'default' else short_label(name)}**"
    return distilled + shown + (f", {count}" if count else "")


def _reason(row: dict[str, Any]) -> str:
    """Why a row has no figures."""
    return str(row.get("refused") or row["failed"])


def _refusals(refused: list[Refusal]) -> list[str]:
    """Arms that have no figures, with the guidance and the reason; arms with one reason together."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for arm, scale, reason in refused:
        reasons.setdefault((reason, scale), []).append(arm_title(arm).replace("**", ""))
    told = "; ".join(
        f"{', '.join(arms)} (guidance {scale}): {reason.rstrip('.')}" for (reason, scale), arms in reasons.items()
    )
    return ["", f"Not measured: {told}."] if refused else []
