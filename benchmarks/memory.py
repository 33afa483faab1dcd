"""Bytes of features that each method keeps at the size of FLUX.1-dev, 1024x1024, bfloat16: computed, nothing is run.

python benchmarks/memory.py --out benchmarks/memory.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import hasten
import torch
import typer
from diffusers import FluxTransformer2DModel
from hasten import registry
from hasten.calibration import Calibration, Fingerprint, model_digest
from hasten.errors import UnknownNameError
from hasten.io import write_atomically

IMAGE_TOKENS, TEXT_TOKENS = 4096, 512
ORDERS = {"taylorseer": (1, 2), "hicache": (1, 2), "freqca": (2,)}


def _calibration(method: str, model: Any, site: str) -> Calibration:
    """A calibration with the shapes of a real one; the memory of a method does not depend on its numbers."""
    print_ = Fingerprint(type(model).__name__, model_digest(model), "", "", tuple(range(50)), ("pass0",), None, site)
    t = torch.linspace(0, 1, 50, dtype=torch.float64)
    features = torch.stack([torch.ones_like(t), t, (5 * t).sin()], 1)  # smooth, so that solvers want three anchors
    gram = features @ features.T
    tensors = {
        "gram/pass0": gram,
        "basis/pass0/hidden": torch.zeros(3072, 64),
        "clusters/hidden": torch.zeros(3072, dtype=torch.int32),
        "grams/hidden": gram[None],
        "ratios": torch.ones(50),
    }
    return Calibration(method, tensors, print_)


def main(out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("benchmarks/memory.json")) -> None:
    """Compute and write."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)  # the defaults are FLUX.1-dev's
    parameters = sum(p.numel() for p in model.parameters())
    rows = []
    for info in registry.methods():
        if info.kind != "caching":
            continue
        for site in ("hidden", "output", "module"):
            for order in ORDERS.get(info.name, (None,)):
                params: dict[str, Any] = {"site": site} | ({} if order is None else {"order": order})
                if info.needs_calibration:
                    params["calibration"] = _calibration(info.name, model, site)
                try:
                    method = registry.build(info.name, **params)
                except UnknownNameError:  # the method has no such site
                    continue
                if info.name == "l2p":  # the longest history that its published lists have
                    method = registry.build(info.name, **params, window=11)
                with hasten.accelerate(model, method) as run:
                    held = run.estimate_bytes(IMAGE_TOKENS, text_tokens=TEXT_TOKENS)
                rows.append({"method": info.name, "site": site, "order": order, "bytes": held})
    result = {
        "model": "FluxTransformer2DModel at the size of FLUX.1-dev",
        "parameters": parameters,
        "image_tokens": IMAGE_TOKENS,
        "text_tokens": TEXT_TOKENS,
        "dtype": "bfloat16",
        "rows": rows,
    }
    write_atomically(out, json.dumps(result, indent=1) + "\n")
    for row in rows:
        order = "" if row["order"] is None else f" order {row['order']}"
        print(f"{row['method']}{order:9s} {row['site']:7s} {row['bytes'] / 2**20:9.1f} MiB")


if __name__ == "__main__":
    typer.run(main)
