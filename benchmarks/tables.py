"""The tables of the README and the docs, made from the JSON files that `hasten bench` and the scripts here wrote.

python benchmarks/tables.py          write them into README.md and docs/, figures in sentences and the reference too
python benchmarks/tables.py --check  exit 1 if a page does not hold what the JSON files say
"""

from __future__ import annotations

import re
import sys

from calculated import CALCULATED
from figures import fill_figures, pages
from front import front_table
from hasten.io import write_atomically
from on_gpu import gpu_table, targets_table
from page_tables.bench import bench_table, curve, emoji_flux, forms_table, overview_table
from page_tables.caching import (
    MEASURED,
    caching_table,
    calibration_cost_table,
    default_table,
    hyca_table,
    premises_table,
)
from page_tables.common import read, result_of
from page_tables.costs import cost_table, memory_table, overhead_table, shape_table
from page_tables.coverage import coverage, denoisers_table, matrix_table
from page_tables.judged import fashion_table, leap_or_distilled_table, styles_table
from page_tables.leap import ablation_table, fits_table, pipelines_table, range_table, second_table
from page_tables.peers import peers_table
from page_tables.quality import certificates_table
from page_tables.resolution import (
    cells_table,
    latency_table,
    parts_table,
    scale_table,
    toy_table,
    truth_table,
)
from page_tables.stages import clips_table, edits_table
from reference import part as reference_part

PREMISES = ["caching-premises.json", "caching-premises-guided.json", "caching-premises-kontext.json"]
PREMISES += ["caching-premises-wan.json", "caching-premises-styles-guided.json"]
CACHING = [MEASURED, "caching-emoji-flux-guided.json", "caching-emoji-kontext.json", "caching-sprites-wan.json"]
CACHING += ["caching-emoji-styles.json", "caching-emoji-styles-guided.json"]
DEFAULTS = [
    "default-emoji-flux.json",
    "default-emoji-flux-guided.json",
    "default-emoji-flux-weak.json",
    "default-emoji-flux-28.json",
    "default-emoji-flux-28-guided.json",
    "default-sprites-wan.json",
    "default-sprites-wan-guided.json",
    "default-sprites-wan-28.json",
    "default-sprites-wan-28-guided.json",
    "default-emoji-kontext.json",
    "default-emoji-kontext-28.json",
    "default-emoji-kontext-guided.json",
    "default-emoji-kontext-28-guided.json",
    "default-emoji-styles.json",
    "default-emoji-styles-28.json",
    "default-emoji-styles-guided.json",
    "default-emoji-styles-28-guided.json",
]
STYLES = ["styles.json", "styles-unguided.json"]
SECOND = ["leap-flux-guided.json", "leap-flux.json", "leap-wan.json", "leap-kontext.json", "leap-turbo.json"]
TABLES = {
    "front": front_table,
    "gpu": gpu_table,
    "gpu-targets": targets_table,
    "main": lambda: overview_table(result_of("front")),
    "emoji-flux": lambda: overview_table(*emoji_flux()),
    "leap-guided": lambda: overview_table(result_of("emoji-flux-guided")),
    "leap-edit": lambda: overview_table(result_of("emoji-kontext-leap")),
    "leap-video": lambda: overview_table(result_of("sprites-wan-leap")),
    "leap-100": lambda: bench_table("emoji-flux-100"),
    "leap-ablation": lambda: ablation_table(read("leap-ablation.json")),
    "leap-fits": lambda: fits_table(read("leap-ablation.json")),
    "leap-pipelines": lambda: pipelines_table(read("leap-pipelines.json")),
    "default": lambda: default_table(DEFAULTS),
    "caching": lambda: caching_table(CACHING),
    "calibration-cost": lambda: calibration_cost_table(read("calibration-cost.json")),
    "caching-premises": lambda: premises_table(PREMISES),
    "hyca-solvers": lambda: hyca_table(MEASURED),
    "caching-module": lambda: caching_table(["caching-module.json"]),
    "peers": lambda: peers_table(["front", "peers-guided"], STYLES, "fashion-dit.json"),
    "fashion": lambda: fashion_table("fashion-dit.json"),
    "styles": lambda: styles_table(STYLES),
    "leap-or-distilled": lambda: leap_or_distilled_table("styles.json"),
    "leap-second": lambda: second_table(SECOND),
    "leap-range": lambda: range_table(read("leap-flux-range.json")),
    "resolution": lambda: truth_table(read("resolution-truth.json")["emoji-flux"], "emoji-flux"),
    "edit": lambda: truth_table(read("resolution-truth.json")["emoji-kontext"], "emoji-kontext"),
    "resolution-cells": lambda: cells_table(read("resolution-truth.json")),
    "resolution-scale": lambda: scale_table(read("resolution-truth.json")["emoji-flux"]),
    "resolution-latency": lambda: latency_table(read("resolution-latency.json")),
    "resolution-parts": lambda: parts_table(read("resolution-parts.json")),
    "resolution-toy": lambda: toy_table(read("resolution-toy.json")),
    "edits": lambda: edits_table("styles-edit.json"),
    "clips": lambda: clips_table("video.json"),
    "streaming": lambda: bench_table("sprites-stream"),
    "streaming-two-threads": lambda: bench_table("sprites-stream-two-threads"),
    "streaming-more": lambda: bench_table("sprites-stream-more"),
    "streaming-shape": lambda: shape_table(read("streaming-shape.json")),
    "spectrum-forms": lambda: forms_table("spectrum"),
    "demo": lambda: bench_table("demo"),
    "overhead": lambda: overhead_table(read("overhead.json")),
    "matrix": lambda: matrix_table(read("matrix.json")),
    "transformers": lambda: denoisers_table(read("denoisers.json"), "transformer"),
    "unets": lambda: denoisers_table(read("denoisers.json"), "unet"),
    "coverage": lambda: coverage(read("denoisers.json")),
    "cost": lambda: cost_table(read("cost.json")),
    "memory": lambda: memory_table(read("memory.json")),
    "certificates": lambda: certificates_table(read("certificates.json")),
    **CALCULATED,
}


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
