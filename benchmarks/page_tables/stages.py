"""Tables of methods with stages at equal operations: edits whose true results are known, and clips of one latent bed.

`styles-edit.json` and `video.json` are what `styles_edit.py` and `resolution_video.py` wrote; nothing until they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from page_tables.common import ROOT, cell, made_on, read, table_row
from page_tables.judged import PLAIN_NAMES, arm_title, interval

Measures = Mapping[str, tuple[str, int]]  # by name: its title and digits
EDITED: Measures = {
    "truth_lpips": ("LPIPS to the truth", 4),
    "full_psnr": ("PSNR to the full run, dB", 1),
    "rest_source": ("outside of the edit, PSNR to the source, dB", 1),
    "done": ("edits done", 2),
}
CLIPS: Measures = {
    "full_psnr": ("PSNR to the full run, dB", 1),
    "full_lpips": ("LPIPS", 4),
    "temporal_error": ("error of the change between frames", 3),
    "right": ("object and motion right", 2),
}
BUDGETED = re.compile(r"dvg(:budget=[\d.]+)?(:lead=1)?")  # of the arms those that are compared with both forms
FORMS = {"space": "leaving out pixels alone", "time": "leaving out frames alone"}


def edits_table(name: str) -> str:
    """Markdown of edits: an arm per row, the cheapest last, and SpecEdit alone by the kind of edit;
    empty if there is no such file."""
    if not (ROOT / "benchmarks" / name).exists():
        return ""
    result = read(name)
    lines = _head("arm", EDITED)
    arms = {text: row for text, row in result["rows"].items() if "against" in row}
    for text, row in sorted(arms.items(), key=lambda item: item[1]["ratio"]):
        lines.append(
            table_row([arm_title(text), cell(row["ratio"], 2), *_measured(row["means"], row["against"], EDITED)])
        )
    sorts = _head("arm, kind of edit (how many)", EDITED)
    for text, row in arms.items():
        for kind, part in row["by_kind"].items() if text.startswith("specedit") and "+" not in text else ():
            title = f"{arm_title(text)}, {kind} ({part['edits']})"
            sorts.append(table_row([title, cell(part["ratio"], 2), *_measured(part["means"], part, EDITED)]))
    full = next(iter(result["rows"].values()))["means"]
    told = (
        f"emoji-styles-edit, {result['edits']['number']} edits, guidance {result['guidance']:g}, means, beside the "
        "best of all plain samplers (solvers and spacings) with the fewest steps that cost at least as much; "
        f"the full run is at LPIPS {full['truth_lpips']:.4f} from the truth and does {full['done']:.0%} of the edits; "
        f"intervals by a paired bootstrap over edits; {made_on(result)}."
    )
    return "\n".join([*lines, "", told, "", "By the kind of edit:", "", *sorts, *_refused(result["rows"])])


def clips_table(name: str) -> str:
    """Markdown of clips: DVG beside plain samplers and both of its forms; empty if there is no such file."""
    if not (ROOT / "benchmarks" / name).exists():
        return ""
    result = read(name)
    arms = {text: row for text, row in result["rows"].items() if "against" in row}
    lines = _head("arm", CLIPS)
    for text, row in sorted(arms.items(), key=lambda item: item[1]["ratio"]):
        lines.append(
            table_row([arm_title(text), cell(row["ratio"], 2), *_measured(row["means"], row["against"], CLIPS)])
        )
    rivals = [table_row(["arm", "against", *(f"{title} better by (95 %)" for title, _ in CLIPS.values())])]
    rivals.append("|---|---" + "|--:" * len(CLIPS) + "|")
    for text, row in arms.items():
        for form, lead in row.get("rivals", {}).items() if BUDGETED.fullmatch(text) else ():
            if lead is not None:
                title = f"{FORMS[form]}, {lead['cost']:.2f} times the operations"
                rivals.append(table_row([arm_title(text), title, *(_lead(lead.get(m), CLIPS[m][1]) for m in CLIPS)]))
    frames, height, width = result["size"]
    told = (
        f"{result['prompts']} held-out captions, {frames} frames of {height}x{width}, guidance {result['guidance']:g}, "
        "means, beside the best of the plain samplers with the fewest steps that cost at least as many operations, of "
        "all solvers and spacings those that were nearest to the full run on the first clips; intervals by a paired "
        f"bootstrap over clips; {made_on(result)}."
    )
    refused = {text: {"refused": reason} for text, reason in result.get("refused", {}).items()}
    return "\n".join([*lines, "", told, "", *rivals, *_refused(refused)])


def _head(first: str, measures: Measures) -> list[str]:
    heads = [first, "FLOPs, times fewer"]
    for title, _ in measures.values():
        heads += [title, "better than the best plain sampler by (95 %)"]
    return [table_row(heads), "|---" + "|--:" * (len(heads) - 1) + "|"]


def _measured(means: Mapping[str, float], against: Mapping[str, Any], measures: Measures) -> list[str]:
    cells = []
    for name, (_, digits) in measures.items():
        cells += [cell(means.get(name), digits), _lead(against.get(name), digits)]
    return cells


def _lead(lead: Mapping[str, Any] | None, digits: int) -> str:
    return "" if lead is None else f"{lead['mean']:+.{digits}f} {interval(dict(lead), digits)}"


def _refused(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Arms that have no figures, with the reason; plain samplers that a model does not have are no arms."""
    told = [
        f"{arm_title(text).replace('**', '')}: {row['refused'].rstrip('.')}"
        for text, row in rows.items()
        if "refused" in row and re.split("[:@]", text)[0] not in PLAIN_NAMES
    ]
    return ["", f"Not measured: {'; '.join(told)}."] if told else []
