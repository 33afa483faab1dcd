"""The tables of the README and the docs, made from the JSON files that `hasten bench` and the scripts here wrote.

python benchmarks/tables.py          write them into README.md and docs/, figures in sentences and the reference too
python benchmarks/tables.py --check  exit 1 if a page does not hold what the JSON files say
"""

from __future__ import annotations

import json
import math
import random
import re
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from calculated import CALCULATED
from figures import fill_figures, pages
from front import busy, front_table
from hasten.bench.labels import short_label
from hasten.bench.result import Result, read_result
from hasten.bench.row import Row, columns
from hasten.bench.tables import as_markdown, table_of
from hasten.io import write_atomically
from on_gpu import gpu_table, targets_table
from reference import part as reference_part

TIMES = [columns(Row)[name].heading for name in ("seconds", "latency_ratio", "latency_share")]
ROOT = Path(__file__).resolve().parents[1]


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def bench_table(name: str) -> str:
    """Markdown of a result of `hasten bench`, without times where the machine was busy."""
    result = _result(name)
    table = table_of(result)
    if not (isinstance(result, Result) and busy(result)):
        return as_markdown(table)
    kept = [i for i, column in enumerate(table.columns) if column.heading not in TIMES]
    sections = {
        heading: [replace(line, cells=[line.cells[i] for i in kept]) for line in lines]
        for heading, lines in table.sections.items()
    }
    notes = [*table.notes, "The machine was too busy for times"]
    return as_markdown(replace(table, columns=[table.columns[i] for i in kept], sections=sections, notes=notes))


def truth_table(part: dict[str, Any], model: str) -> str:
    """Markdown of a part of `resolution-truth.json`: every arm, by what an image costs."""
    editing = "psnr_edited" in part["rows"][0]
    heads = ["sampler", "evaluations", "FLOPs, times fewer", "PSNR to the full run", "PSNR to the truth"]
    heads += ["LPIPS to the truth", *(["unedited dB", "of it exact", "edited dB"] if editing else []), "top-1"]
    lines = [_row(heads), "|---" + "|--:" * (len(heads) - 1) + "|"]
    for row in sorted(part["rows"], key=lambda row: row["flops_ratio"]):
        middle = [row.get(key, {}).get("median") for key in ("full_psnr", "truth_psnr")]
        cells = [_arm(row), str(row["steps"]), _cell(row["flops_ratio"], 2), *(_cell(value, 1) for value in middle)]
        cells.append(_cell(row["truth_lpips"]["mean"], 4))
        if editing:
            exact = f"{row['unedited_exact']['mean']:.0%}"
            cells += [_cell(row["psnr_unedited"]["median"], 1), exact, _cell(row["psnr_edited"]["median"], 1)]
        lines.append(_row([*cells, _cell(row["top1"], 2)]))
    truth = "the edit that was asked for" if editing else "the image that the caption had in training"
    lines += [
        "",
        f"{model}, 64x64, {part['prompts']} prompts, medians (LPIPS: means); the full run: 50 plain steps from the "
        f"same noise; the truth: {truth}; a cache's number is that of its computed steps; {_made(part)}.",
    ]
    return "\n".join(lines)


def cells_table(result: dict[str, Any], budgets: tuple[float, ...] = (5.0, 7.75, 10.0, 12.5, 18.0)) -> str:
    """Markdown of `resolution-truth.json`: the best of each way to save at each budget, by LPIPS to the truth."""
    kinds = {"steps": "fewer steps", "cache": "cache alone", "resolution": "resolution alone", "both": "both"}
    lines = [_row(["model", "FLOPs, times fewer", *kinds.values()]), "|---|--:" + "|---" * len(kinds) + "|"]
    for model, part in result.items():
        for budget in budgets:
            cells = []
            for kind in kinds:
                near = [row for row in part["rows"] if row["kind"] == kind and _near(row["flops_ratio"], budget)]
                best = min(near, key=lambda row: row["truth_lpips"]["mean"], default=None)
                cells.append("-" if best is None else _best(best))
            if "-" not in cells[1:]:
                lines.append(_row([model, f"{budget:g}", *cells]))
    parts = ", ".join(f"{part['prompts']} prompts of {model}" for model, part in result.items())
    made = _made(next(iter(result.values())))
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


def _made(result: dict[str, Any]) -> str:
    environment = result["environment"]
    return f"hasten {environment['hasten']}, torch {environment['torch']}, {environment['device']}"


def scale_table(part: dict[str, Any]) -> str:
    """Markdown of how far images of other seeds and sizes are from each other."""
    lines = ["| images, 50 plain steps | PSNR dB |", "|---|--:|"]
    lines += [_row([name, _cell(figures["median"], 1)]) for name, figures in part["scale"].items()]
    return "\n".join(lines)


def latency_table(result: dict[str, Any]) -> str:
    """Markdown of `resolution-latency.json`."""
    heads = ["model", "method", "pixels", "50 steps: FLOPs, times fewer", "times faster", "share"]
    heads += ["as many evaluations: FLOPs, times fewer", "times faster", "share", "share in the transformer"]
    heads += ["outside it, ms per step: plain", "method"]
    lines = [_row(heads), "|---|---" + "|--:" * (len(heads) - 2) + "|"]
    figures = ("flops_ratio", "latency_ratio", "latency_share")
    for row in result["rows"]:
        outside, equal = row["outside_ms_per_step"], row["against_plain"]
        cells = [row["model"], short_label(row["method"]), f"{row['side']}x{row['side']}"]
        cells += [_cell(row["against_full"][key], 2) for key in figures]
        cells += [_cell(equal[key], 2) for key in (*figures, "transformer_share")]
        lines.append(_row([*cells, _cell(outside["plain"], 2), _cell(outside["method"], 2)]))
    lines += ["", f"In turns with the plain sampler, medians; {_made(result)}."]
    return "\n".join(lines)


def toy_table(result: dict[str, Any]) -> str:
    """Markdown of `resolution-toy.json`: each method beside plain sampling with as many operations."""
    heads = ["sampler", "evaluations", "operations", "distance", "plain, as many operations"]
    heads += ["plain, as many evaluations", "low band", "high band"]
    lines = [_row(heads), "|---" + "|--:" * (len(heads) - 1) + "|"]
    plain = {row["evaluations"]: row["distance"] for row in result["rows"] if row["method"] == "euler"}
    for row in sorted(result["rows"], key=lambda row: -row["operations"]):
        if row["method"] != "euler":
            below = math.floor(row["operations"])
            part = row["operations"] - below
            equal = (_cell((1 - part) * plain[below] + part * plain[below + 1], 3), _cell(plain[row["evaluations"]], 3))
            cells = [f"**{short_label(row['method'])}**", str(row["evaluations"]), _cell(row["operations"], 1)]
            bands = (_cell(row["low_band"], 2), _cell(row["high_band"], 2))
            lines.append(_row([*cells, _cell(row["distance"], 3), *equal, *bands]))
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


def clips_table(result: dict[str, Any]) -> str:
    """Markdown of the clips of `resolution-video.json`: PSNR of each form of compression, by motion."""
    part = result["measured"]
    names = [short_label(row["method"]) for row in part["rows"]]
    lines = [_row(["clip", "motion", "texture", *names, "nearest"]), "|---" + "|--:" * (len(names) + 2) + "|---|"]
    figures = list(zip(*(row["psnr"] for row in part["rows"]), strict=True))
    for clip, values in sorted(zip(part["clips"], figures, strict=True), key=lambda pair: pair[0]["motion"]):
        nearest = names[max(range(len(values)), key=lambda i: values[i])]
        cells = [clip["prompt"], _cell(clip["motion"], 2), _cell(clip["texture"], 3), *(_cell(v, 1) for v in values)]
        lines.append(_row([*cells, nearest]))
    lines += ["", f"sprites-wan, PSNR in dB against 50 plain steps from the same noise; {_made(result)}."]
    return "\n".join(lines)


def density_table(result: dict[str, Any]) -> str:
    """Markdown of the arms of `resolution-video.json`, medians over the clips."""
    heads = ["clips", "method", "FLOPs, times fewer", "density", "PSNR dB", "LPIPS", "temporal"]
    lines = [_row(heads), "|---|---" + "|--:" * (len(heads) - 2) + "|"]
    for name in ("chosen", "measured"):
        for row in result[name]["rows"]:
            density = statistics.fmean(row["densities"])
            cells = [f"{len(row['psnr'])}, {name}", short_label(row["method"]), _cell(row["flops_ratio"], 2)]
            cells.append(_cell(density, 3))
            for key, digits in (("psnr", 1), ("lpips", 4), ("temporal_error", 3)):
                cells.append(_cell(statistics.median(row[key]), digits))
            lines.append(_row(cells))
    lines += ["", f"sprites-wan, medians, against 50 plain steps from the same noise; {_made(result)}."]
    return "\n".join(lines)


def parts_table(result: dict[str, Any]) -> str:
    """Markdown of `resolution-parts.json`."""
    lines = [_row(["18 steps", "as it is", "coarse stage given"]), "|---|--:|--:|"]
    for name, kinds in result["rows"].items():
        lines.append(_row([name, _cell(kinds["own"], 1), _cell(kinds["given"], 1)]))
    plain = ", ".join(f"{_cell(value, 1)} with {count}" for count, value in result["plain"].items())
    lines += [
        "",
        f"emoji-flux, PSNR in dB to 50 plain steps from the same noise, medians over {result['prompts']} prompts; "
        f"plain steps: {plain}.",
    ]
    return "\n".join(lines)


def shape_table(result: dict[str, Any]) -> str:
    """Markdown of `streaming-shape.json`."""
    lines = [_row(["method", "seconds", "times less", "work", "choosing", "copying"]), "|---|--:|--:|--:|--:|--:|"]
    for row in result["rows"]:
        cells = [short_label(row["method"]), _cell(row["seconds"], 1), _cell(row["times_less"], 2)]
        lines.append(_row([*cells, _cell(row["work_ratio"], 2), f"{row['choosing']:.2%}", f"{row['copying']:.1%}"]))
    shape, environment = result["shape"], result["environment"]
    lines += [
        "",
        f"One layer of {shape['heads']} heads of width {shape['width']}, {shape['tokens']} tokens per frame, "
        f"{result['chunks']} chunks of {shape['chunk']} frames, {result['steps']} forwards and a clean pass each, "
        f"{result['dtype']}, random tensors; torch {environment['torch']}, {environment['device']}.",
    ]
    return "\n".join(lines)


def overhead_table(result: dict[str, Any]) -> str:
    """Markdown of `overhead.json`."""
    lines = ["| library | method | site | skipped ms | shortest | computed ms | shortest | Python calls |"]
    lines.append("|---|---|---|--:|--:|--:|--:|--:|")
    for row in result["rows"]:
        cells = [row["library"] or "-", row["method"], row["site"] or "-"]
        if "error" in row:
            lines.append(_row([*cells, row["error"], "", "", "", ""]))
            continue
        times = [
            _cell(row[f"{kind}_ms"], 3) for kind in ("skipped", "skipped_shortest", "computed", "computed_shortest")
        ]
        lines.append(_row([*cells, *times, "-" if row["skipped_calls"] is None else str(row["skipped_calls"])]))
    environment = result["environment"]
    lines.append("")
    lines.append(
        f"{result['model']}; medians and shortest of whole forwards over {result['runs']} runs of 50 steps, all arms "
        f"in turn; {environment['device']}, torch {environment['torch']}, load average {result['load']:.1f}."
    )
    return "\n".join(lines)


Arms = dict[str, dict[int, Row]]


def _title(row: Row) -> str:
    return f"**{row.name}**" if row.library == "hasten" else row.name


def _arms(result: Result) -> tuple[list[int], Arms]:
    """Numbers of computed steps, and the rows of each arm by that number."""
    arms: Arms = {}
    for row in result.rows:
        arms.setdefault(_title(row), {})[row.budget or 0] = row
    return sorted({row.budget or 0 for row in result.rows}, reverse=True), arms


def _shown(field: str, row: Row | None) -> str:
    """A figure of a row as every table shows it."""
    return columns(Row)[field].text(None if row is None else getattr(row, field))


def _psnr(row: Row | None) -> str:
    return _cell(None if row is None else row.psnr, 1)


def overview_table(result: Result, remark: str = "") -> str:
    """Markdown of one bench result, a line per arm, best first: quality at each budget, cost at the middle one."""
    counts, arms = _arms(result)
    middle = counts[(len(counts) - 1) // 2]
    times = () if busy(result) else ("seconds", "latency_ratio")
    costs = ("flip", *times, "flops_ratio", "cache_bytes")
    heads = ["sampler", *(f"PSNR, {n} steps" for n in counts), *(f"LPIPS, {n}" for n in counts)]
    heads += [f"{columns(Row)[field].title}, {middle}" for field in costs]
    lines = [_row(heads), "|---" + "|--:" * (len(heads) - 1) + "|"]

    def quality(rows: dict[int, Row]) -> float:
        values = [row.psnr for row in rows.values() if row.psnr is not None]
        return -sum(values) / max(len(values), 1)

    for title, rows in sorted(arms.items(), key=lambda item: quality(item[1])):
        if all(row.failed for row in rows.values()):
            continue
        cells = [title, *(_psnr(rows.get(n)) for n in counts), *(_shown("lpips", rows.get(n)) for n in counts)]
        lines.append(_row([*cells, *(_shown(field, rows.get(middle)) for field in costs)]))
    table = table_of(result)
    return "\n".join([*lines, "", *([remark] if remark else []), f"{table.title}. {'. '.join(table.notes)}."])


def forms_table(name: str) -> str:
    """Markdown of a method's forms in `emoji-flux-forms.json`."""
    result = _result("emoji-flux-forms")
    counts, arms = _arms(result)
    lines = [_row(["form", *(f"{count} computed steps, dB" for count in counts)]), "|---" + "|--:" * len(counts) + "|"]
    for title, rows in arms.items():
        if re.match(rf"\*\*{name}(,|\*)", title):
            lines.append(_row([title.replace("**", ""), *(_psnr(rows.get(count)) for count in counts)]))
    return "\n".join([*lines, "", f"{table_of(result).title}. {table_of(result).notes[-1]}."])


def caching_curves(name: str) -> dict[str, dict[int, float]]:
    """Median PSNR of a method's forms by computed steps, and of the plain samplers, where `caching.py` measured it."""
    arms = _caching_arms(_read(CACHING[0]))
    own = [(at, method) for at, method in arms if re.match(rf"{re.escape(name)}(:|$)", method)]
    own = [key for key in own if len(arms[key]) > 1]
    if not own:
        return {}
    titles = {key: f"**{_caching_label(key[1])}**, {key[0]}" for key in own}
    titles |= {("-", "best plain"): "best plain sampler", ("-", "plain"): "plain Euler"}
    return {
        title: {count: row["median"] for count, row in sorted(arms[key].items(), reverse=True) if "median" in row}
        for key, title in titles.items()
    }


def curve(name: str) -> str:
    """A method's own figures: its chart, and its best form beside the plain samplers."""
    measured = caching_curves(name)
    if measured:
        budgets = sorted({count for line in measured.values() for count in line}, reverse=True)
        lines = [
            f"{title} {' / '.join(_cell(line.get(count), 1) for count in budgets)}" for title, line in measured.items()
        ]
        return (
            f"![{name} on emoji-flux, against the number of computed steps](../images/curves/{name}.svg)\n\n"
            f"Measured on `emoji-flux`, without guidance, median PSNR in dB at {' / '.join(map(str, budgets))} "
            f"computed steps: {'; '.join(lines)}."
        )
    counts, arms = _arms(emoji_flux()[0])

    def line(title: str) -> str:
        return " / ".join(_psnr(arms[title].get(n)) for n in counts)

    own = [title for title in arms if re.match(rf"\*\*{re.escape(name)}(,|\*)", title)]
    figures = "; ".join(f"{title} {line(title)}" for title in [*own, "plain Euler", "plain UniPC"])
    budget = " / ".join(map(str, counts))
    return (
        f"![{name} on emoji-flux, against the number of computed steps](../images/curves/{name}.svg)\n\n"
        f"Measured on `emoji-flux`, PSNR in dB at {budget} computed steps: {figures}."
    )


def matrix_table(result: dict[str, Any]) -> str:
    """Markdown of `matrix.json`: linear layers that ran, as a share of the plain run's."""
    methods = list(next(iter(result["cells"].values())))
    lines = [_row(["transformer", *methods]), "|---" + "|--:" * len(methods) + "|"]
    for family, cells in result["cells"].items():
        texts = []
        for cell in (cells[m] for m in methods):
            texts.append(f"{cell['linears']:.2f}" if cell["exact"] and not cell["traces"] else "**fails**")
        lines.append(_row([family.replace("Transformer2DModel", "").replace("Transformer3DModel", ""), *texts]))
    environment = result["environment"]
    lines += [
        "",
        f"torch {environment['torch']}, diffusers {environment['diffusers']}, {result['steps']} steps, "
        "about half of them computed.",
    ]
    return "\n".join(lines)


_PEERS = {"dbcache": "cache-dit", "first-block": "diffusers, first block"}
_COLUMNS = {
    "transformer": {"hidden": "hidden", "output": "output", "module": "module", **_PEERS},
    "unet": {"output": "output", "deep": "deep"},
}


def _denoisers(result: dict[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    return {name: row["cells"] for name, row in result["denoisers"].items() if row["kind"] == kind}


def denoisers_table(result: dict[str, Any], kind: str) -> str:
    """Markdown of `denoisers.json`: the layers that a skipped step runs, as a share of a computed one's."""
    columns = _COLUMNS[kind]
    lines = [_row([kind.replace("unet", "UNet"), *columns.values()]), "|---" + "|--:" * len(columns) + "|"]
    rows = _denoisers(result, kind)
    for name, cells in rows.items():
        lines.append(_row([name, *(_verdict(cells[column]) for column in columns)]))
    totals = [f"{sum(cells[c]['status'] == 'right' for cells in rows.values())} of {len(rows)}" for c in columns]
    environment = result["environment"]
    lines += [
        _row(["**right**", *totals]),
        "",
        f"torch {environment['torch']}, diffusers {environment['diffusers']}; tiny models, whose embeddings and "
        "refiners are a large part of them.",
    ]
    return "\n".join(lines)


def _verdict(cell: dict[str, Any]) -> str:
    if cell["status"] == "right":
        return f"{cell['share']:.2f}"
    return {"refused": "-", "an output is lost": "differs"}.get(cell["status"], cell["status"])


def coverage(result: dict[str, Any]) -> str:
    """How many denoisers are right, in two sentences."""

    def count(kind: str, *sites: str) -> int:
        rows = _denoisers(result, kind).values()
        return sum(any(cells[site]["status"] == "right" for site in sites) for cells in rows)

    transformers, unets = (len(_denoisers(result, kind)) for kind in ("transformer", "unet"))
    version = result["environment"]["diffusers"]
    right, hidden = count("transformer", "hidden", "output"), count("transformer", "hidden")
    dbcache, first_block = count("transformer", "dbcache"), count("transformer", "first-block")
    return (
        f"Of the {transformers} transformers that diffusers {version} ships, {right} are right at some site and "
        f"{hidden} at the hidden one (cache-dit {dbcache}, diffusers' first-block cache {first_block}). "
        f"Of its {unets} UNets {count('unet', 'output')} are right at the output, and {count('unet', 'deep')} with "
        "their inner levels forecast as DeepCache does."
    )


def memory_table(result: dict[str, Any]) -> str:
    """Markdown of `memory.json`."""
    sites = ("output", "hidden", "module")
    held: dict[str, dict[str, int]] = {}
    for row in result["rows"]:
        name = row["method"] if row["order"] is None else f"{row['method']}, order {row['order']}"
        held.setdefault(name, {})[row["site"]] = row["bytes"]
    lines = [_row(["method", *(f"`{site}`" for site in sites)]), "|---" + "|--:" * len(sites) + "|"]
    for name, by_site in held.items():
        lines.append(_row([name, *("-" if s not in by_site else f"{by_site[s] / 2**20:.1f} MiB" for s in sites)]))
    lines += [
        "",
        f"{result['model']}, {result['image_tokens']} image and {result['text_tokens']} text tokens, "
        f"{result['dtype']}, one pass; computed.",
    ]
    return "\n".join(lines)


def cost_table(result: dict[str, Any]) -> str:
    """Markdown of `cost.json`."""
    heads = ["model", "method", "evaluations", "TFLOPs", "published", "times fewer"]
    lines = [_row(heads), "|---|---" + "|--:" * (len(heads) - 2) + "|"]
    for row in result["rows"]:
        cells = [row["model"], row["method"], str(row["evaluations"]), f"{row['tflops']:,.0f}"]
        lines.append(_row([*cells, f"{row['published']:,.0f}" if "published" in row else "", f"{row['ratio']:.2f}"]))
    environment = result["environment"]
    lines += ["", f"Transformer only, counted on the meta device; diffusers {environment['diffusers']}."]
    return "\n".join(lines)


def emoji_flux() -> tuple[Result, str]:
    """The large run on emoji-flux, and the arms that were measured in one of their own on the same prompts."""
    result, more = _result("emoji-flux"), _result("emoji-flux-more")
    assert isinstance(result, Result)
    assert isinstance(more, Result)
    assert more.settings.prompts == result.settings.prompts
    own = [row for row in more.rows if row.library == "hasten"]
    result.rows += own
    names = " and ".join(dict.fromkeys(_title(row) for row in own))
    checks = ", ".join(f"{row.psnr:.1f} dB at {row.budget}" for row in more.rows if row.method == "unipc")
    return result, f"{names} were measured in a run of their own; plain UniPC had {checks} in it."


def ablation_table(result: dict[str, Any]) -> str:
    """Markdown of `leap-ablation.json`: a line per part, PSNR in dB."""
    lines = ["| what | PSNR, dB |", "|---|---|"]
    for name, measured in result["parts"].items():
        figures = {key: value for key, value in measured.items() if key not in HIDDEN}
        lines.append(_row([name, "; ".join(f"{key}: {value:.1f}" for key, value in figures.items())]))
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
    lines = [_row(heads), "|---|--:|--:|---|--:|--:|--:|--:|"]
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
            lines.append(_row([*cells, str(row["evaluations_of_references"] + row["evaluations_of_fit"])]))
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
        lines.append(_row([name, f"{row['pipeline']}, {row['scheduler']}", told]))
    environment = result["environment"]
    lines += ["", f"Tiny random weights, 12 steps; diffusers {environment['diffusers']}, torch {environment['torch']}."]
    return "\n".join(lines)


def second_table(names: list[str]) -> str:
    """Markdown of what `leap_measure.py` wrote: medians, and LEAP's lead with its interval."""
    heads = ["model", "guidance", "evaluations", "sampler", "PSNR, dB", "LEAP is above by (95 %)"]
    lines = [_row(heads), "|---|--:|--:|---|--:|--:|"]
    for name in names:
        if not (ROOT / "benchmarks" / name).exists():
            continue
        result = _read(name)
        model, prompts = result["options"]["model"], result["options"]["held_out"]
        for key, row in result["rows"].items():
            lead, scale = result["against"].get(key), row["guidance"]
            above = "" if lead is None else f"{lead['lead']:.1f} ({lead['low']:.1f} to {lead['high']:.1f})"
            sampler = f"{row['name']} ({row['sampler']})" if "sampler" in row else row["name"]
            figure = _cell(row.get("median", row.get("float32")), 1)
            scale = "-" if scale is None else f"{scale:g}"
            lines.append(_row([f"{model}, {prompts} prompts", scale, str(row["count"]), sampler, figure, above]))
    lines += ["", "Held-out prompts, against 50 plain steps; intervals by a paired bootstrap over prompts."]
    return "\n".join(lines)


def certificates_table(result: dict[str, Any]) -> str:
    """Markdown of `certificates.json`: how often certificates were wrong, and what their settings cost."""
    procedures = {"sequence": "sequence", "holm": "Holm", "no test": "no test"}
    heads = ["tolerance", "may be wrong", *(f"wrong, {title}" for title in procedures.values()), "none certified"]
    heads += ["computed steps, oracle", *(f"{title}" for title in list(procedures.values())[:2]), "over the oracle"]
    lines = [_row(heads), "|---" + "|--:" * (len(heads) - 1) + "|"]
    for row in result["rows"]:
        cells = [row["name"], f"{row['allowed']:.0%}", *(f"{row[name]['violated']:.1%}" for name in procedures)]
        cells.append(f"{row['sequence']['nothing_certified']:.1%}")
        cells.append("-" if row["oracle"] is None else str(row["oracle"]["computed_steps"]))
        cells += [_cell(row[name]["computed_steps_mean"], 2) for name in ("sequence", "holm")]
        over = row["sequence"]["cost_over_oracle"]
        lines.append(_row([*cells, "-" if over is None else f"{over - 1:+.0%}"]))
    one = result["rows"][0]
    lines += [
        "",
        f"{result['model']}, {result['population']} requests as the population, {one['resamplings']} certifications "
        f"per row, each on {one['requests']} requests drawn with replacement; adverse: a tolerance that the setting "
        "misses by a hair (94 % keep it); no test: the cheapest setting that keeps the tolerance on the same requests; "
        f"{_made(result)}.",
    ]
    return "\n".join(lines)


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
    lines = [_row(heads), "|---|--:|--:|--:|---|--:|---|"]
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
            cells = [options["model"], scale, f"{count} of {options['steps']}", _cell(row["median"], 1)]
            cells += [f"{_cell(plain['median'], 1)} ({plain['sampler']})", _lead(row, plain), f"{value:.1f} ({worst})"]
            lines.append(_row(cells))
    lines += ["", f"Medians, against the full run; {INTERVALS}. {_prompts(names)}"]
    return "\n".join(lines)


def caching_table(names: list[str]) -> str:
    """Markdown of the caching methods beside their ablations, by what they have at nine computed steps."""
    results = _caching(names)
    heads = ["model", "guidance", "schedule", "method"]
    counts = sorted({row["count"] for result in results for row in result["rows"].values()}, reverse=True)
    heads += [f"{count}, dB" for count in counts] + ["above its ablation at 9 by (95 %)"]
    lines = [_row(heads), "|---|--:|---|---" + "|--:" * (len(heads) - 4) + "|"]
    for result in results:
        options, arms = result["options"], _caching_arms(result)
        scale = "-" if options["guidance"] is None else f"{options['guidance']:g}"
        for (schedule, method), rows in sorted(arms.items(), key=lambda arm: (arm[0][0], -_at_nine(arm[1]))):
            if method.startswith(SINGLE):
                continue  # in a table of their own
            other = _ablation(arms, schedule, method)
            above = "" if other is None else f"{_lead(rows[9], other)} {_caching_label(other['method'])}"
            cells = [options["model"], scale, schedule, _caching_label(method)]
            lines.append(_row([*cells, *(_cell(rows.get(count, {}).get("median"), 1) for count in counts), above]))
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
    arms, schedules = _caching_arms(_read(name)), ("uniform", "even")
    methods = list(dict.fromkeys(method for _, method in arms if method.startswith("hyca")))
    rows = {method: [arms.get((schedule, method), {}).get(9, {}) for schedule in schedules] for method in methods}
    lines = [_row(["solvers", *(f"{schedule}, dB" for schedule in schedules)]), "|---" + "|--:" * len(schedules) + "|"]
    for method, found in sorted(rows.items(), key=lambda item: -max(row.get("mean", 0.0) for row in item[1])):
        lines.append(_row([_solvers(method, found), *(_cell(row.get("mean"), 2) for row in found)]))
    lines += ["", f"Means at 9 computed steps, best on either schedule first. {_prompts([name])}"]
    return "\n".join(lines)


def _solvers(method: str, rows: list[dict[str, Any]]) -> str:
    """What a form of HyCa forecasts its clusters by."""
    if method == "hyca, tuned":
        chosen = [f"{row['schedule']} {', '.join(row['chosen']['assigned'])}" for row in rows]
        return f"by whole runs of {rows[0]['tuned_on']} other prompts: {'; '.join(chosen)}"
    return f"{method.removeprefix(SINGLE)} for all" if method.startswith(SINGLE) else "each cluster's by the criterion"


def premises_table(names: list[str]) -> str:
    """Markdown of the errors of forecasts by component, from what `caching_premises.py` wrote."""
    lines = [_row(["guidance", "schedule", "system", "component", "reused", "forecast", "by", "premise"])]
    lines.append("|---|---|---|---|--:|--:|---|---|")
    told = []
    for result in (_read(name) for name in names if (ROOT / "benchmarks" / name).exists()):
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
            lines.append(_row([*cells, f"{errors[best]:.3f}", best, verdict]))
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
    lines = [_row(["method", "evaluations of the model", "recording them, s", "fitting, s"]), "|---|--:|--:|--:|"]
    for name, row in result["rows"].items():
        cells = [name, f"{result['evaluations']:,}", f"{result['recording_seconds']:.0f}", f"{row['seconds']:.2f}"]
        lines.append(_row(cells))
    told = f"{result['model']}, {result['prompts']} prompts of {result['steps']} steps, processor seconds of one thread"
    return "\n".join([*lines, "", f"{told}; {_made(result)}."])


def _caching(names: list[str]) -> list[dict[str, Any]]:
    return [_read(name) for name in names if (ROOT / "benchmarks" / name).exists()]


def _prompts(names: list[str]) -> str:
    told = {f"{r['options']['model']}: {r['options']['held_out']} held-out prompts" for r in _caching(names)}
    return f"{'; '.join(sorted(told))}." if told else "Not measured yet."


def _lead(row: dict[str, Any], other: dict[str, Any]) -> str:
    """The mean lead over another row in dB, with the interval of a paired bootstrap over prompts."""
    draw = random.Random(0)
    leads = [a - b for a, b in zip(row["psnr"], other["psnr"], strict=True)]
    means = sorted(statistics.fmean(draw.choices(leads, k=len(leads))) for _ in range(2000))
    return f"{statistics.fmean(leads):+.1f} ({means[49]:+.1f} to {means[1949]:+.1f})"


INTERVALS = "mean leads, with intervals by a paired bootstrap over prompts"
DEFAULT = ("hicache:order=1:sigma=0.66:guided_sigma=0.55", "hicache:order=1:sigma=0.66")  # the same without guidance
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
HELD = {"residual": "svdcache", "low": "freqca"}  # components that are reused because a forecast would be worse
PREMISES = ["caching-premises.json", "caching-premises-guided.json"]
CACHING = ["caching-emoji-flux.json", "caching-emoji-flux-guided.json", "caching-sprites-wan.json"]
DEFAULTS = [
    "default-emoji-flux.json",
    "default-emoji-flux-guided.json",
    "default-emoji-flux-28.json",
    "default-emoji-flux-28-guided.json",
    "default-sprites-wan.json",
    "default-sprites-wan-guided.json",
    "default-emoji-kontext.json",
    "default-emoji-kontext-28.json",
    "default-emoji-kontext-guided.json",
]
SECOND = ["leap-flux-guided.json", "leap-flux.json", "leap-wan.json", "leap-kontext.json"]
HIDDEN = ("seconds", "closed_form", "relative_squared_error", "evaluations")
TABLES = {
    "front": front_table,
    "gpu": gpu_table,
    "gpu-targets": targets_table,
    "main": lambda: overview_table(_result("front")),
    "emoji-flux": lambda: overview_table(*emoji_flux()),
    "leap-guided": lambda: overview_table(_result("emoji-flux-guided")),
    "leap-edit": lambda: overview_table(_result("emoji-kontext-leap")),
    "leap-video": lambda: overview_table(_result("sprites-wan-leap")),
    "leap-100": lambda: bench_table("emoji-flux-100"),
    "leap-ablation": lambda: ablation_table(_read("leap-ablation.json")),
    "leap-fits": lambda: fits_table(_read("leap-ablation.json")),
    "leap-pipelines": lambda: pipelines_table(_read("leap-pipelines.json")),
    "default": lambda: default_table(DEFAULTS),
    "caching": lambda: caching_table(CACHING),
    "calibration-cost": lambda: calibration_cost_table(_read("calibration-cost.json")),
    "caching-premises": lambda: premises_table(PREMISES),
    "hyca-solvers": lambda: hyca_table("caching-emoji-flux.json"),
    "caching-module": lambda: caching_table(["caching-module.json"]),
    "leap-second": lambda: second_table(SECOND),
    "resolution": lambda: truth_table(_read("resolution-truth.json")["emoji-flux"], "emoji-flux"),
    "edit": lambda: truth_table(_read("resolution-truth.json")["emoji-kontext"], "emoji-kontext"),
    "resolution-cells": lambda: cells_table(_read("resolution-truth.json")),
    "resolution-scale": lambda: scale_table(_read("resolution-truth.json")["emoji-flux"]),
    "resolution-latency": lambda: latency_table(_read("resolution-latency.json")),
    "resolution-clips": lambda: clips_table(_read("resolution-video.json")),
    "resolution-density": lambda: density_table(_read("resolution-video.json")),
    "resolution-parts": lambda: parts_table(_read("resolution-parts.json")),
    "resolution-toy": lambda: toy_table(_read("resolution-toy.json")),
    "video": lambda: bench_table("sprites-wan"),
    "streaming": lambda: bench_table("sprites-stream"),
    "streaming-two-threads": lambda: bench_table("sprites-stream-two-threads"),
    "streaming-more": lambda: bench_table("sprites-stream-more"),
    "streaming-shape": lambda: shape_table(_read("streaming-shape.json")),
    "spectrum-forms": lambda: forms_table("spectrum"),
    "demo": lambda: bench_table("demo"),
    "overhead": lambda: overhead_table(_read("overhead.json")),
    "matrix": lambda: matrix_table(_read("matrix.json")),
    "transformers": lambda: denoisers_table(_read("denoisers.json"), "transformer"),
    "unets": lambda: denoisers_table(_read("denoisers.json"), "unet"),
    "coverage": lambda: coverage(_read("denoisers.json")),
    "cost": lambda: cost_table(_read("cost.json")),
    "memory": lambda: memory_table(_read("memory.json")),
    "certificates": lambda: certificates_table(_read("certificates.json")),
    **CALCULATED,
}


def _result(name: str) -> Any:
    """A result of `hasten bench`, checked."""
    return read_result(ROOT / "benchmarks" / f"{name}.json")


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / "benchmarks" / name).read_text())
    return content


def fill(text: str) -> str:
    """`text` with all between `<!-- table NAME -->` (curve, cli, schema) and its end, and marked figures, anew."""
    kinds = {"table": lambda name: TABLES[name](), "curve": curve}

    def made(match: re.Match[str]) -> str:
        kind, name = match[2], match[3]
        content = kinds[kind](name) if kind in kinds else reference_part(kind, name)
        return f"{match[1]}\n{content}\n{match[4]}"

    tables = re.sub(r"(<!-- (table|curve|cli|schema) ([\w-]+) -->)\n.*?\n?(<!-- end -->)", made, text, flags=re.DOTALL)
    return fill_figures(tables)


if __name__ == "__main__":
    stale = [page for page in pages() if fill(page.read_text()) != page.read_text()]
    if "--check" in sys.argv:
        sys.exit(f"made from older JSON files: {', '.join(map(str, stale))}; run benchmarks/tables.py" if stale else 0)
    for page in stale:
        write_atomically(page, fill(page.read_text()))
