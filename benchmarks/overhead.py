"""What a skipped step costs in Python: a 19+38-block FLUX of width 32, where arithmetic is next to nothing.

    python benchmarks/overhead.py --json benchmarks/overhead.json

For each site, the time of a cached forward, beside that of a plain forward and of the same transformer with no blocks
at all (the embeddings and the final layer, which the hidden site has to run). The overhead is the difference to what
has to run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import hasten
import torch
from diffusers import FluxTransformer2DModel
from hasten.bench.environment import environment
from hasten.io import write_atomically
from rich.progress import track

TOKENS, TEXT, STEPS = 64, 8, 50


def flux(double: int = 19, single: int = 38) -> Any:
    """FLUX.1-dev's depth at width 32, with random weights."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def inputs(step: int) -> dict[str, Any]:
    """One forward's arguments at a step of a run."""
    return {
        "hidden_states": torch.ones(1, TOKENS, 16) * (1 - step / STEPS),
        "timestep": torch.full((1,), 1 - step / STEPS),
        "pooled_projections": torch.ones(1, 32),
        "encoder_hidden_states": torch.ones(1, TEXT, 32),
        "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": torch.zeros(TOKENS, 3),
        "return_dict": False,
    }


def plain_ms(model: Any, runs: int) -> float:
    """Median milliseconds of a plain forward."""
    times = []
    for i in range(runs):
        started = time.perf_counter()
        model(**inputs(i % STEPS))
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def skipped_ms(model: Any, method: str, site: str, runs: int) -> tuple[float, int]:
    """Median milliseconds of a cached forward over whole runs, and the bytes held."""
    with hasten.accelerate(model, method, interval=7, site=site) as run:
        times = []
        for _ in range(runs):
            for step in range(STEPS):
                arguments = inputs(step)
                started = time.perf_counter()
                model(**arguments)
                elapsed = 1e3 * (time.perf_counter() - started)
                if not run.records[-1].computed:
                    times.append(elapsed)
            held = run.summary().cache_bytes
            run.reset()
    return statistics.median(times), held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/overhead.json"))
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    with torch.inference_mode():
        model, bare = flux(), flux(0, 0)
        for _ in range(3):
            model(**inputs(0))
        result: dict[str, Any] = {
            "environment": environment(),
            "model": "FluxTransformer2DModel, 19 double and 38 single blocks, width 32, 64 image and 8 text tokens",
            "plain_ms": round(plain_ms(model, 40), 3),
            "embeddings_and_final_layer_ms": round(plain_ms(bare, 200), 3),
            "rows": [],
        }
        cases = [(m, s) for s in ("hidden", "output", "module") for m in ("reuse", "taylorseer", "hicache")]
        for method, site in track(cases, description="measuring"):
            ms, held = skipped_ms(model, method, site, args.runs)
            must_run = {"hidden": result["embeddings_and_final_layer_ms"], "output": 0.0}.get(site)
            row = {"method": method, "site": site, "skipped_ms": round(ms, 3), "cache_bytes": held}
            row["overhead_ms"] = None if must_run is None else round(ms - must_run, 3)
            result["rows"].append(row)
    write_atomically(args.json, json.dumps(result, indent=1) + "\n")
    for row in result["rows"]:
        print(row)


if __name__ == "__main__":
    main()
