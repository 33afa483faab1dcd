"""Tables of the caching methods, most of them on `docs/which-method.md`."""

from __future__ import annotations

import random
import statistics
from typing import Any

from hasten.bench.labels import short_label

from page_tables.common import ROOT, cell, made_on, read, table_row

INTERVALS = "mean leads, with intervals by a paired bootstrap over prompts"
DEFAULT = ("hicache:order=1:sigma=0.66:guided_sigma=0.55", "hicache:order=1:sigma=0.66")  # the same without guidance
ABLATIONS = {
    "svdcache": "reuse",
    "svdcache:mode=taylor": "taylorseer:order=2:domain=normed",
    "freqca": "freqca:split=none",
    "freqca:mode=paper": "reuse",
    "foca": "taylorseer:order=2",
    "hyca": "taylorseer:order=2:domain=normed",
    "hyca:assigned=taylor1/taylor1/newton/newton": "taylorseer:order=2",  # chosen by images on four other prompts
}
HELD = {"residual": "svdcache", "low": "freqca"}  # components that are reused because a forecast would be worse


def default_table(names: list[str]) -> str:
    """Markdown of the default beside the plain samplers, from what `caching.py` wrote."""
    heads = [
        "model",
        "guidance",
        "computed",
        "default, dB",
        "best plain sampler, dB",
        "above by (95 %)",
        "worst prompt, dB",
    ]
    lines = [table_row(heads), "|---|--:|--:|--:|---|--:|---|"]
    for result in _caching(names):
        rows, options = result["rows"], result["options"]
        known = DEFAULT if options["guidance"] is None else DEFAULT[:1]
        own = {row["count"]: row for row in rows.values() if row["method"] in known and row["schedule"] == "even"}
        for count, row in sorted(own.items(), reverse=True):
            plain = rows.get(f"best plain @ {count}")
            if plain is None:
                continue
            scale = "-" if options["guidance"] is None else f"{options['guidance']:g}"
            worst, value = row["worst"]
            cells = [options["model"], scale, f"{count} of {options['steps']}", cell(row["median"], 1)]
            cells += [f"{cell(plain['median'], 1)} ({plain['sampler']})", _lead(row, plain), f"{value:.1f} ({worst})"]
            lines.append(table_row(cells))
    lines += ["", f"Medians, against the full run; {INTERVALS}. {_prompts(names)}"]
    return "\n".join(lines)


def caching_table(names: list[str]) -> str:
    """Markdown of the caching methods beside their ablations, from what `caching.py` wrote."""
    results = _caching(names)
    heads = ["model", "guidance", "schedule", "method"]
    counts = sorted({row["count"] for result in results for row in result["rows"].values()}, reverse=True)
    heads += [f"{count}, dB" for count in counts] + ["above its ablation at 9 by (95 %)"]
    lines = [table_row(heads), "|---|--:|---|---" + "|--:" * (len(heads) - 4) + "|"]
    for result in results:
        options, arms = result["options"], {}
        for row in result["rows"].values():
            arms.setdefault((row.get("schedule", "-"), row["method"]), {})[row["count"]] = row
        scale = "-" if options["guidance"] is None else f"{options['guidance']:g}"
        for (schedule, method), rows in sorted(arms.items(), key=lambda arm: (arm[0][0], -_mean(arm[1]))):
            other = arms.get((schedule, ABLATIONS.get(method, "")), {}).get(9)
            above = (
                _lead(rows[9], other) + f" {short_label(other['method'])}"
                if other and "psnr" in rows.get(9, {})
                else ""
            )
            cells = [options["model"], scale, schedule, short_label(method)]
            lines.append(table_row([*cells, *(cell(rows.get(count, {}).get("median"), 1) for count in counts), above]))
    lines += ["", f"Medians, against 50 plain steps; {INTERVALS}. {_prompts(names)}"]
    return "\n".join(lines)


def premises_table(names: list[str]) -> str:
    """Markdown of the errors of forecasts by component, from what `caching_premises.py` wrote."""
    lines = [table_row(["guidance", "schedule", "system", "component", "reused", "forecast", "by", "premise"])]
    lines.append("|---|---|---|---|--:|--:|---|---|")
    told = []
    for result in (read(name) for name in names if (ROOT / "benchmarks" / name).exists()):
        scale = "-" if result["guidance"] is None else f"{result['guidance']:g}"
        first = result["rows"][0]["pass"]
        for row in (row for row in result["rows"] if row["pass"] == first):
            errors = {name: error for name, error in row.items() if isinstance(error, float) and name != "oracle"}
            best = min((name for name in errors if name != "hold"), key=lambda name: errors[name])
            asked = HELD.get(row["component"])
            verdict = "" if asked is None else ("holds" if errors["hold"] <= errors[best] else "fails")
            if row["of"] == "hyca":
                if row["component"] != "whole":
                    continue
                verdict = f"{row['oracle']:.3f} with the best of every cluster"
            elif row["component"] == "whole":
                continue
            cells = [scale, row["schedule"], row["of"], row["component"], f"{errors['hold']:.3f}"]
            lines.append(table_row([*cells, f"{errors[best]:.3f}", best, verdict]))
        told.append(
            f"{result['model']}, {result['prompts']} held-out prompts, {result['computed_steps']} computed steps"
        )
    lines += [
        "",
        f"Mean squared errors of features behind the final norm over the skipped steps, as shares of that of "
        f"reusing all of the feature; {'; '.join(dict.fromkeys(told))}.",
    ]
    return "\n".join(lines)


def calibration_cost_table(result: dict[str, Any]) -> str:
    """Markdown of `calibration-cost.json`."""
    lines = [table_row(["method", "evaluations of the model", "recording them, s", "fitting, s"]), "|---|--:|--:|--:|"]
    for name, row in result["rows"].items():
        cells = [name, f"{result['evaluations']:,}", f"{result['recording_seconds']:.0f}", f"{row['seconds']:.2f}"]
        lines.append(table_row(cells))
    told = f"{result['model']}, {result['prompts']} prompts of {result['steps']} steps, processor seconds of one thread"
    return "\n".join([*lines, "", f"{told}; {made_on(result)}."])


def _mean(rows: dict[int, dict[str, Any]]) -> float:
    return statistics.fmean(row.get("median", 0.0) for row in rows.values())


def _caching(names: list[str]) -> list[dict[str, Any]]:
    return [read(name) for name in names if (ROOT / "benchmarks" / name).exists()]


def _prompts(names: list[str]) -> str:
    told = {f"{r['options']['model']}: {r['options']['held_out']} held-out prompts" for r in _caching(names)}
    return f"{'; '.join(sorted(told))}." if told else "Not measured yet."


def _lead(row: dict[str, Any], other: dict[str, Any]) -> str:
    """The mean lead over another row in dB, with the interval of a paired bootstrap over prompts."""
    draw = random.Random(0)
    leads = [a - b for a, b in zip(row["psnr"], other["psnr"], strict=True)]
    means = sorted(statistics.fmean(draw.choices(leads, k=len(leads))) for _ in range(2000))
    return f"{statistics.fmean(leads):+.1f} ({means[49]:+.1f} to {means[1949]:+.1f})"
