"""The tables of the README, made from the JSON files that `hasten bench` and the scripts here wrote.

python benchmarks/tables.py          write them into README.md
python benchmarks/tables.py --check  exit 1 if README.md does not hold what the JSON files say
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def bench_table(result: dict[str, Any]) -> str:
    """Markdown of one bench result, a block of rows for each number of full steps, plain samplers first."""
    base, environment, settings = result["baseline"], result["environment"], result["settings"]
    heads = ["sampler", "steps computed", "FLOPs ratio", "s / picture", "speed-up", "PSNR dB", "SSIM", "LPIPS", "FLIP"]
    heads += ["cache KiB", "top-1"]
    first = ["plain Euler", str(base["steps"]), "1.00", _cell(base["seconds"], 3), "1.00", "-", "-", "-", "-", "0"]
    lines = [_row(heads), "|---" + "|--:" * (len(heads) - 1) + "|", _row([*first, _cell(base["top1"], 2)])]
    for count in sorted({row["full_steps"] for row in result["rows"]}, reverse=True):
        for row in (r for r in result["rows"] if r["full_steps"] == count):
            plain = row["library"] == "plain"
            name = f"plain {'Euler' if row['method'] == 'euler' else 'UniPC'}" if plain else f"**{row['method']}**"
            cells = [
                name,
                str(count),
                _cell(row["flops_ratio"], 2),
                _cell(row["seconds"], 3),
                _cell(row["latency_ratio"], 2),
                _cell(row["psnr"], 2),
                _cell(row["ssim"], 4),
                _cell(row["lpips"], 4),
                _cell(row["flip"], 4),
                _cell(row["cache_bytes"] / 1024, 0),
                _cell(row["top1"], 2),
            ]
            lines.append(_row(cells))
    lines.append("")
    lines.append(
        f"{result['model']}, {settings['width']}x{settings['height']}, {len(settings['prompts'])} prompts, medians; "
        f"hasten {environment['hasten']}, torch {environment['torch']}, diffusers {environment['diffusers']}, "
        f"{environment['device']}, {result['created'][:10]}."
    )
    return "\n".join(lines)


def overhead_table(result: dict[str, Any]) -> str:
    """Markdown of `overhead.json`."""
    lines = ["| site | method | cached forward ms | of that Python overhead ms | cache KiB |", "|---|---|--:|--:|--:|"]
    for row in result["rows"]:
        cells = [row["site"], row["method"], _cell(row["cached_ms"], 2), _cell(row["overhead_ms"], 2)]
        lines.append(_row([*cells, _cell(row["cache_bytes"] / 1024, 0)]))
    lines.append("")
    lines.append(
        f"{result['model']}; plain forward {result['plain_ms']:.1f} ms, embeddings and final layer alone "
        f"{result['embeddings_and_final_layer_ms']:.2f} ms; {result['environment']['device']}."
    )
    return "\n".join(lines)


TABLES = {
    "emoji-flux": lambda: bench_table(_read("emoji-flux.json")),
    "demo": lambda: bench_table(_read("demo.json")),
    "overhead": lambda: overhead_table(_read("overhead.json")),
}


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / "benchmarks" / name).read_text())
    return content


def fill(text: str) -> str:
    """`text` with every table between `<!-- table NAME -->` and `<!-- end -->` made anew."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table ([\w-]+) -->)\n.*?\n?(<!-- end -->)", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    current = readme.read_text()
    wanted = fill(current)
    if "--check" in sys.argv:
        sys.exit("README.md differs from the JSON files: run python benchmarks/tables.py" if wanted != current else 0)
    readme.write_text(wanted)
