"""Tables of what methods cost: operations, time and memory, counted or measured."""

from __future__ import annotations

from typing import Any

from hasten.bench.labels import short_label

from page_tables.common import cell, table_row


def overhead_table(result: dict[str, Any]) -> str:
    """Markdown of `overhead.json`."""
    lines = ["| library | method | site | skipped ms | shortest | computed ms | shortest | Python calls |"]
    lines.append("|---|---|---|--:|--:|--:|--:|--:|")
    for row in result["rows"]:
        cells = [row["library"] or "-", row["method"], row["site"] or "-"]
        if "error" in row:
            lines.append(table_row([*cells, row["error"], "", "", "", ""]))
            continue
        times = [
            cell(row[f"{kind}_ms"], 3) for kind in ("skipped", "skipped_shortest", "computed", "computed_shortest")
        ]
        lines.append(table_row([*cells, *times, "-" if row["skipped_calls"] is None else str(row["skipped_calls"])]))
    environment = result["environment"]
    lines.append("")
    lines.append(
        f"{result['model']}; medians and shortest of whole forwards over {result['runs']} runs of 50 steps, all arms "
        f"in turn; {environment['device']}, torch {environment['torch']}, load average {result['load']:.1f}."
    )
    return "\n".join(lines)


def memory_table(result: dict[str, Any]) -> str:
    """Markdown of `memory.json`."""
    sites = ("output", "hidden", "module")
    held: dict[str, dict[str, int]] = {}
    for row in result["rows"]:
        name = row["method"] if row["order"] is None else f"{row['method']}, order {row['order']}"
        held.setdefault(name, {})[row["site"]] = row["bytes"]
    lines = [table_row(["method", *(f"`{site}`" for site in sites)]), "|---" + "|--:" * len(sites) + "|"]
    for name, by_site in held.items():
        lines.append(table_row([name, *("-" if s not in by_site else f"{by_site[s] / 2**20:.1f} MiB" for s in sites)]))
    lines += [
        "",
        f"{result['model']}, {result['image_tokens']} image and {result['text_tokens']} text tokens, "
        f"{result['dtype']}, one pass; computed.",
    ]
    return "\n".join(lines)


def cost_table(result: dict[str, Any]) -> str:
    """Markdown of `cost.json`."""
    heads = ["model", "method", "evaluations", "TFLOPs", "published", "times fewer"]
    lines = [table_row(heads), "|---|---" + "|--:" * (len(heads) - 2) + "|"]
    for row in result["rows"]:
        cells = [row["model"], row["method"], str(row["evaluations"]), f"{row['tflops']:,.0f}"]
        lines.append(
            table_row([*cells, f"{row['published']:,.0f}" if "published" in row else "", f"{row['ratio']:.2f}"])
        )
    environment = result["environment"]
    lines += ["", f"Transformer only, counted on the meta device; diffusers {environment['diffusers']}."]
    return "\n".join(lines)


def shape_table(result: dict[str, Any]) -> str:
    """Markdown of `streaming-shape.json`."""
    lines = [table_row(["method", "seconds", "times less", "work", "choosing", "copying"]), "|---|--:|--:|--:|--:|--:|"]
    for row in result["rows"]:
        cells = [short_label(row["method"]), cell(row["seconds"], 1), cell(row["times_less"], 2)]
        lines.append(table_row([*cells, cell(row["work_ratio"], 2), f"{row['choosing']:.2%}", f"{row['copying']:.1%}"]))
    shape, environment = result["shape"], result["environment"]
    lines += [
        "",
        f"One layer of {shape['heads']} heads of width {shape['width']}, {shape['tokens']} tokens per frame, "
        f"{result['chunks']} chunks of {shape['chunk']} frames, {result['steps']} forwards and a clean pass each, "
        f"{result['dtype']}, random tensors; torch {environment['torch']}, {environment['device']}.",
    ]
    return "\n".join(lines)
