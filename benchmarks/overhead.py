"""What a step costs beside arithmetic: a 19+38-block FLUX of width 32, where arithmetic is next to nothing.

    python benchmarks/overhead.py --json benchmarks/overhead.json

Whole forwards of one transformer, in whole runs of 50 steps: plain, with each method at each site, and with the caches
of other libraries on copies that share its weights. All arms take turns, run by run, so that what else the machine does
meets all of them. For each arm the time of a skipped and of a computed forward, the median and the shortest; beside
them the same transformer with no blocks at all, which is what the hidden site has to run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hasten
import torch
from diffusers import FluxTransformer2DModel
from hasten.bench.environment import environment
from hasten.bench.peers import PEERS, shared_copy
from hasten.io import write_atomically
from rich.progress import track

TOKENS, TEXT, STEPS, INTERVAL = 64, 8, 50, 7
METHODS = [(method, site) for site in ("hidden", "output", "module") for method in ("reuse", "taylorseer", "hicache")]
METHODS += [("foca", "hidden"), ("freqca", "hidden"), ("fbcache", "hidden"), ("easycache", "output")]
TAYLORSEER = {"cache_interval": INTERVAL, "disable_cache_before_step": 3, "max_order": 1}
DBCACHE = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "num_inference_steps": STEPS, "max_warmup_steps": 3}
OTHERS = [
    ("cache-dit", "dbcache", {**DBCACHE, "max_continuous_cached_steps": INTERVAL - 1, "residual_diff_threshold": 10.0}),
    ("diffusers", "first-block", {"threshold": 10.0}),
    ("diffusers", "taylorseer", TAYLORSEER),
    ("diffusers", "taylorseer-lite", {**TAYLORSEER, "use_lite_mode": True}),
]


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
    ids = torch.zeros(8, 8, 3)
    ids[..., 1] += torch.arange(8)[:, None]
    ids[..., 2] += torch.arange(8)[None]
    return {
        "hidden_states": torch.ones(1, TOKENS, 16) * (1 - step / STEPS),
        "timestep": torch.full((1,), 1 - step / STEPS),
        "pooled_projections": torch.ones(1, 32),
        "encoder_hidden_states": torch.ones(1, TEXT, 32),
        "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": ids.view(TOKENS, 3),
        "return_dict": False,
    }


@dataclass
class Arm:
    """One way to run the transformer.

    Attributes:
        library, method, site: its name.
        model: the transformer.
        handle: of an acceleration by hasten.
        error: why it cannot run; empty if it can.
        times: milliseconds of forwards by whether the last block's attention ran.
        calls: of Python functions in a skipped forward, at the least.
    """

    library: str
    method: str
    site: str | None
    model: Any
    handle: Any = None
    error: str = ""
    times: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})
    calls: int | None = None

    def run(self) -> None:
        """One run of the sampler."""
        ran: list[int] = []
        blocks = self.model.single_transformer_blocks
        handle = blocks[-1].attn.to_q.register_forward_pre_hook(lambda *_: ran.append(1)) if len(blocks) else None
        for step in range(STEPS):
            arguments = inputs(step)
            ran.clear()
            with self.model.cache_context("cond"):
                started = time.perf_counter()
                self.model(**arguments)
                elapsed = 1e3 * (time.perf_counter() - started)
            self.times[bool(ran) or handle is None].append(elapsed)
        self.model._reset_stateful_cache()
        if handle is not None:
            handle.remove()

    def count_calls(self) -> None:
        """Count the calls of a skipped forward."""
        calls: list[int] = []
        for step in range(STEPS):
            arguments, counted = inputs(step), Counter[str]()
            sys.setprofile(lambda _frame, event, _arg, counted=counted: counted.update((event,)))
            self.model(**arguments)
            sys.setprofile(None)
            if not self.handle.records[-1].computed:
                calls.append(counted["call"])
        self.calls = min(calls, default=None)

    def row(self) -> dict[str, Any]:
        """The arm's figures."""
        row: dict[str, Any] = {"library": self.library, "method": self.method, "site": self.site}
        if self.error:
            return {**row, "error": self.error}
        for computed, name in ((False, "skipped"), (True, "computed")):
            times = self.times[computed]
            row[f"{name}_ms"] = round(statistics.median(times), 4) if times else None
            row[f"{name}_shortest_ms"] = round(min(times), 4) if times else None
        return {**row, "skipped_calls": self.calls}


def arms(model: Any) -> list[Arm]:
    """All arms, each on a copy of the transformer's modules that shares its weights."""
    found = [Arm("", "plain", None, model), Arm("", "no blocks", None, flux(0, 0))]
    for method, site in METHODS:
        arm = Arm("hasten", method, site, shared_copy(model))
        params = {"threshold": 10.0} if method in ("fbcache", "easycache") else {}
        arm.handle = hasten.accelerate(arm.model, method, interval=INTERVAL, site=site, **params)
        found.append(arm)
    switches = {(peer.library, peer.name): peer for peer in PEERS}
    for library, method, params in OTHERS:
        arm = Arm(library, method, None, shared_copy(model))
        found.append(arm)
        try:
            switches[library, method].available()
            switches[library, method].switch(arm.model, params)
        except Exception as error:
            arm.error = f"{type(error).__name__}: {error}".partition("\n")[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/overhead.json"))
    parser.add_argument("--runs", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        every = arms(flux())
        for i in track(range(args.runs + 1), description="runs of all arms"):
            for arm in every:
                if not arm.error:
                    arm.run()
            if i == 0:  # the first one makes proxies and tables
                for arm in every:
                    arm.times[True].clear(), arm.times[False].clear()
        for arm in every:
            if arm.handle is not None:
                arm.count_calls()
    result = {
        "environment": environment(),
        "model": "FluxTransformer2DModel, 19 double and 38 single blocks, width 32, 64 image and 8 text tokens",
        "runs": args.runs,
        "load": os.getloadavg()[0],
        "rows": [arm.row() for arm in every],
    }
    write_atomically(args.json, json.dumps(result, indent=1) + "\n")
    for row in result["rows"]:
        name = " ".join(str(row[key]) for key in ("library", "method", "site") if row[key])
        figures = ("skipped_ms", "skipped_shortest_ms", "computed_ms", "computed_shortest_ms", "skipped_calls")
        print(f"{name:36s}", row.get("error") or "  ".join(f"{key} {row[key]}" for key in figures))


if __name__ == "__main__":
    main()
