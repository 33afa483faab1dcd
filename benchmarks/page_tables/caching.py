"""Tables of the caching methods, most of them on `docs/which-method.md`."""

from __future__ import annotations

import random
import re
import statistics
from typing import Any

from hasten.bench.labels import short_label
from hasten.caching.default import DEFAULT

from page_tables.common import ROOT, cell, made_on, model_of, read, table_row

INTERVALS = "mean leads, with intervals by a paired bootstrap over prompts"
SHIPPED = DEFAULT.replace(":schedule=auto", "")  # arms name their schedule apart
ABLATIONS = {
    "svdcache": "reuse",
    "svdcache:mode=taylor": "taylorseer:order=2:domain=normed",
    "freqca": "freqca:split=none",
    "freqca:mode=paper": "reuse",
    "foca": "taylorseer:order=2",
    "foca:domain=normed": "taylorseer:order=2:domain=normed",
    "hicache": "taylorseer:order=2",
    "hicache:order=1:sigma=0.66": "taylorseer:order=1",
    "hyca": "taylorseer:order=2:domain=normed",  # one of its solvers for all; the others are in the file by name
}
SINGLE = "hyca:solvers="
MEASURED = "caching-emoji-flux.json"  # what the figures on the pages of single methods are from
HELD = {"residual": "svdcache", "low": "freqca"}  # components that are reused because a forecast would be worse


def default_table(names: list[str]) -> str:
    """Markdown of the default beside the plain samplers, from what `caching.py` wrote."""
    heads = [
        "model",
        "guidance",
        "computed",
        "default, dB",
        "on even steps, dB",
        "best plain sampler, dB",
        "above by (95 %)",
        "worst prompt, dB",
    ]
    lines = [table_row(heads), "|---|--:|--:|--:|--:|---|--:|---|"]
    for result in _caching(names):
        rows, options = result["rows"], result["options"]
        own = {row["count"]: row for row in rows.values() if (row["method"], row.get("schedule")) == (SHIPPED, "auto")}
        if not own:
            raise SystemExit(f"the result of {options['model']} at guidance {options['guidance']} has no default in it")
        for count, row in sorted(own.items(), reverse=True):
            plain = rows.get(f"best plain @ {count}")
            if plain is None:
                continue
            scale = "-" if options["guidance"] is None else f"{options['guidance']:g}"
            worst, value = row["worst"]
            even = rows.get(f"{SHIPPED} @ even {count}", {})
            cells = [model_of(result), scale, f"{count} of {options['steps']}"]
            cells += [cell(one.get("median"), 1) for one in (row, even)]
            cells += [f"{cell(plain['median'], 1)} ({plain['sampler']})", _lead(row, plain), f"{value:.1f} ({worst})"]
            lines.append(table_row(cells))
    lines += ["", f"Medians, against the full run; {INTERVALS}. {_prompts(names)}"]
    return "\n".join(lines)


def caching_table(names: list[str]) -> str:
    """Markdown of the caching methods beside their ablations, by what they have at nine computed steps."""
    results = _caching(names)
    heads = ["model", "guidance", "schedule", "method"]
    counts = sorted({row["count"] for result in results for row in result["rows"].values()}, reverse=True)
    heads += [f"{count}, dB" for count in counts] + ["above its ablation at 9 by (95 %)"]
    lines = [table_row(heads), "|---|--:|---|---" + "|--:" * (len(heads) - 4) + "|"]
    for result in results:
        options, arms = result["options"], _caching_arms(result)
        scale = "-" if options["guidance"] is None else f"{options['guidance']:g}"
        for (schedule, method), rows in sorted(arms.items(), key=lambda arm: (arm[0][0], -_at_nine(arm[1]))):
            if method.startswith(SINGLE) or not any("median" in row for row in rows.values()):
                continue  # in a table of their own, or refused everywhere
            other = _ablation(arms, schedule, method)
            above = "" if other is None else f"{_lead(rows[9], other)} {_caching_label(other['method'])}"
            cells = [model_of(result), scale, schedule, _caching_label(method)]
            lines.append(table_row([*cells, *(cell(rows.get(count, {}).get("median"), 1) for count in counts), above]))
    tuned = "tuned: the solver of each cluster chosen by whole runs of other prompts, for 9 computed steps alone"
    remarks = f" {tuned}; its ablation is the best single solver." if "tuned" in "".join(lines) else ""
    lines += ["", f"Medians, against 50 plain steps, best at 9 first; {INTERVALS}.{remarks} {_prompts(names)}"]
    return "\n".join(lines)


CachingArms = dict[tuple[str, str], dict[int, dict[str, Any]]]


def _caching_arms(result: dict[str, Any]) -> CachingArms:
    """Rows by schedule and method, and then by the number of computed steps."""
    arms: CachingArms = {}
    for row in result["rows"].values():
        arms.setdefault((row.get("schedule", "-"), row["method"]), {})[row["count"]] = row
    return arms


def _ablation(arms: CachingArms, schedule: str, method: str) -> dict[str, Any] | None:
    """The method without what it adds, at nine computed steps; of HyCa the best of its solvers for all clusters."""
    own = arms[schedule, method].get(9, {})
    module = ":site=module" if method.endswith(":site=module") else ""
    plain = method.removesuffix(module)
    names = [ABLATIONS[plain].removesuffix(":domain=normed" if module else "") + module] if plain in ABLATIONS else []
    if plain.startswith("hyca"):
        names += [other for at, other in arms if at == schedule and other.startswith(SINGLE) and not module]
    rows = [arms[schedule, name][9] for name in names if 9 in arms.get((schedule, name), {})]
    known = [row for row in rows if "psnr" in row and "psnr" in own]
    return max(known, key=lambda row: float(row["mean"]), default=None)


def _caching_label(method: str) -> str:
    name, _, tuned = method.partition(", ")
    single = f"HyCa's {name.removeprefix(SINGLE)} for all" if name.startswith(SINGLE) else short_label(name)
    return f"{single}, {tuned}" if tuned else single


def _at_nine(rows: dict[int, dict[str, Any]]) -> float:
    return float(rows.get(9, {}).get("median", 0.0))


def hyca_table(name: str) -> str:
    """Markdown of HyCa beside each of its solvers alone, at nine computed steps."""
    arms, schedules = _caching_arms(read(name)), ("uniform", "even")
    methods = list(dict.fromkeys(method for _, method in arms if method.startswith("hyca")))
    rows = {method: [arms.get((schedule, method), {}).get(9, {}) for schedule in schedules] for method in methods}
    lines = [
        table_row(["solvers", *(f"{schedule}, dB" for schedule in schedules)]),
        "|---" + "|--:" * len(schedules) + "|",
    ]
    known = {method: found for method, found in rows.items() if any("mean" in row for row in found)}
    for method, found in sorted(known.items(), key=lambda item: -max(row.get("mean", 0.0) for row in item[1])):
        lines.append(table_row([_solvers(method, found), *(cell(row.get("mean"), 2) for row in found)]))
    lines += ["", f"Means at 9 computed steps, best on either schedule first. {_prompts([name])}"]
    return "\n".join(lines)


def _solvers(method: str, rows: list[dict[str, Any]]) -> str:
    """What a form of HyCa forecasts its clusters by."""
    if method == "hyca, tuned":
        tuned = [row for row in rows if "chosen" in row]  # on some of the schedules, perhaps
        chosen = [f"{row['schedule']} {', '.join(row['chosen'].get('assigned', [])) or 'as fitted'}" for row in tuned]
        return f"by whole runs of {tuned[0]['tuned_on']} other prompts: {'; '.join(chosen)}"
    if method.startswith(SINGLE):
        return f"{method.removeprefix(SINGLE)} for all"
    criterion = method.partition("criterion=")[2]
    return f"each cluster's by {f'`{criterion}`' if criterion else 'the default criterion'}"


def caching_curves(name: str, file: str) -> dict[str, dict[int, float]]:
    """Median PSNR of a method's forms and of the plain samplers by computed steps, from what `caching.py` wrote; HyCa's
    solvers alone have a table of their own."""
    arms = _caching_arms(read(file))
    own = [(at, method) for at, method in arms if re.match(rf"{re.escape(name)}(:|$)", method)]
    own = [(at, method) for at, method in own if len(arms[at, method]) > 1 and not method.startswith(SINGLE)]
    if not own:
        return {}
    titles = {key: f"**{_caching_label(key[1])}**, {key[0]}" for key in own}
    titles |= {("-", "best plain"): "best plain sampler", ("-", "plain"): "plain Euler"}
    return {
        title: {count: row["median"] for count, row in sorted(arms[key].items(), reverse=True) if "median" in row}
        for key, title in titles.items()
    }


def premises_table(names: list[str]) -> str:
    """Markdown of the errors of forecasts by component, from what `caching_premises.py` wrote."""
    lines = [table_row(["model", "guidance", "schedule", "system", "component", "reused", "forecast", "by", "premise"])]
    lines.append("|---" * 5 + "|--:|--:|---|---|")
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
            cells = [model_of(result), scale, row["schedule"], row["of"], row["component"], f"{errors['hold']:.3f}"]
            lines.append(table_row([*cells, f"{errors[best]:.3f}", best, verdict]))
        told.append(
            f"{model_of(result)}, {result['prompts']} held-out prompts, {result['computed_steps']} computed steps"
        )
    lines += [
        "",
        f"Mean squared errors of features behind the final norm over the skipped steps, as shares of that of "
        f"reusing all of the feature; {'; '.join(dict.fromkeys(told))}.",
    ]
    return "\n".join(lines)


def calibration_cost_table(result: dict[str, Any]) -> str:
    """Markdown of `calibration-cost.json`."""
    heads = ["method", "settings tried", "evaluations of the model", "recording them, s", "fitting or tuning, s"]
    lines = [table_row(heads), "|---" + "|--:" * (len(heads) - 1) + "|"]
    for name, row in result["rows"].items():
        cells = [name, "", f"{result['evaluations']:,}", f"{result['recording_seconds']:.0f}", f"{row['seconds']:.2f}"]
        lines.append(table_row(cells))
    for name, row in result["tuned"].items():
        cells = [f"{name}, tuned", str(row["settings"]), f"{row['evaluations']:,}", "", f"{row['seconds']:.0f}"]
        lines.append(table_row(cells))
    told = f"{result['model']}, {result['prompts']} prompts of {result['steps']} steps, processor seconds of one thread"
    told += (
        f"; tuned: by whole runs of {result['tuned_prompts']} prompts with {result['computed_steps']} computed steps, "
        "evaluations counted by the image"
    )
    return "\n".join([*lines, "", f"{told}; {made_on(result)}."])


def _caching(names: list[str]) -> list[dict[str, Any]]:
    return [read(name) for name in names if (ROOT / "benchmarks" / name).exists()]


def _prompts(names: list[str]) -> str:
    told = {f"{model_of(r)}: {r['options']['held_out']} held-out prompts" for r in _caching(names)}
    return f"{'; '.join(sorted(told))}." if told else "Not measured yet."


def _lead(row: dict[str, Any], other: dict[str, Any]) -> str:
    """The mean lead over another row in dB, with the interval of a paired bootstrap over prompts."""
    draw = random.Random(0)
    leads = [a - b for a, b in zip(row["psnr"], other["psnr"], strict=True)]
    means = sorted(statistics.fmean(draw.choices(leads, k=len(leads))) for _ in range(2000))
    return f"{statistics.fmean(leads):+.1f} ({means[49]:+.1f} to {means[1949]:+.1f})"
