"""Every denoiser that diffusers ships, at every site, and with two peers: what the tests check, written down.

python benchmarks/denoisers.py --out benchmarks/denoisers.json

A peer is right where, with input and time held constant, every output is what the plain model gives and a skipped step
runs fewer layers. cache-dit has to be installed (`pip install cache-dit==1.5.3`).
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from hasten.bench.environment import environment
from hasten.bench.peers import PEERS, shared_copy
from hasten.io import write_atomically
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "hasten" / "tests"))
from denoisers import checks

# Thresholds that a constant input is always below, and the shortest warm-up that there is.
LOOSE: dict[str, dict[str, Any]] = {
    "first-block": {"threshold": 0.5},
    "dbcache": {
        "Fn_compute_blocks": 1,
        "Bn_compute_blocks": 0,
        "max_warmup_steps": 1,
        "residual_diff_threshold": 0.5,
        "enable_separate_cfg": False,
    },
}


def peer_verdict(name: str, peer: str) -> checks.Verdict:
    """What a peer's block cache makes of a denoiser."""
    subject = checks.subject(name)
    (switch,) = [known.switch for known in PEERS if known.name == peer]
    model, plain = subject.model, subject.constant
    try:
        subject.model = shared_copy(model)
        with torch.no_grad():
            switch(subject.model, LOOSE[peer])
            _set_cache_context(subject.model, CacheContext("pass"))  # as pipelines do
            calls: list[int] = []
            with subject.counting():
                steps = subject.outputs(constant=True, shares=calls)
    except (Exception, SystemExit) as error:
        return checks.Verdict(
            "fails", detail=f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
        )
    finally:
        subject.model = model
    share = calls[-1] / calls[0]
    if not all(checks.near(step, plain) for step in steps):
        return checks.Verdict("an output is lost", share)
    return checks.Verdict("right" if share <= checks.LARGEST_SHARE else "skips nothing", share)


def main(out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("benchmarks/denoisers.json")) -> None:
    """Check and write."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")
    started, denoisers = time.perf_counter(), {}
    for name in track(list(checks.DENOISERS), description="denoisers"):
        row = {site: asdict(checks.subject(name).check(site)) for site in checks.SITES}
        row |= {peer: asdict(peer_verdict(name, peer)) for peer in LOOSE}
        denoisers[name] = {"kind": "transformer" if name in checks.TRANSFORMERS else "unet", "cells": row}
        checks.subject.cache_clear()
    seconds = time.perf_counter() - started
    result = {"environment": environment(), "seconds": seconds, "denoisers": denoisers}
    write_atomically(out, json.dumps(result, indent=1) + "\n")
    untested = sorted(checks.shipped() - set(denoisers))
    print(f"{len(denoisers)} denoisers in {seconds:.0f} s; untested: {', '.join(untested) or 'none'}")


if __name__ == "__main__":
    typer.run(main)
