"""What a calibration of each caching method costs on a trained model: evaluations of the model, and processor seconds.

python benchmarks/calibration_cost.py       writes benchmarks/calibration-cost.json

Those that are fitted learn from the same recorded runs, so the recording is there once. Those that are tuned make
whole runs of a batch of prompts for each setting that is tried, and full ones to compare them with. Processor seconds
of one thread; other work on the machine makes them longer by a little only.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import hasten
from hasten import registry
from hasten.bench.environment import environment
from hasten.bench.sampling import counting, plain
from hasten.bench.subject import open_model
from hasten.calibration import Trace
from hasten.io import write_atomically
from held_out import HeldOut

OUT = Path(__file__).with_name("calibration-cost.json")
MODEL, STEPS, PROMPTS, BATCH = "emoji-flux", 50, 16, 8
METHODS = ("hyca", "l2p", "magcache", "svdcache")  # leapcache runs the model itself: see LEAP's cost
TUNED, COMPUTED = ("foca", "hicache", "hyca"), 9


def main() -> None:
    """Record once, fit each method, write what it took."""
    model = open_model(MODEL)
    held_out = HeldOut(model, STEPS, PROMPTS, 1, BATCH, OUT.parent)
    started = time.process_time()
    trace = held_out.recorded(None, learn=True)
    recorded = time.process_time() - started
    rows = {}
    for name in METHODS:
        started = time.process_time()
        hasten.fit(trace, name)
        rows[name] = {"seconds": round(time.process_time() - started, 3)}
        print(name, rows[name], flush=True)
    tuned = {name: tune(name, model.pipe, held_out, trace) for name in TUNED}
    content = {
        "environment": environment(),
        "model": MODEL,
        "prompts": PROMPTS,
        "steps": STEPS,
        "evaluations": PROMPTS * STEPS,
        "recording_seconds": round(recorded, 1),
        "rows": rows,
        "tuned_prompts": BATCH,
        "computed_steps": COMPUTED,
        "tuned": tuned,
    }
    write_atomically(OUT, json.dumps(content, indent=1) + "\n")


def tune(name: str, pipe: Any, held_out: HeldOut, trace: Trace) -> dict[str, Any]:
    """Choose a method's parameters on an even schedule by whole runs, and say what that took.

    Evaluations are counted in images: forwards that run a block, times their batch.
    """
    calls = [call | {"output_type": "latent"} for call in held_out.calls(None, learn=True)[:1]]
    fitted = {"calibration": hasten.fit(trace, name)} if name in METHODS else {}
    start = registry.build(name, schedule="even", **fitted).with_computed_steps(COMPUTED, STEPS)
    started = time.process_time()
    with counting(pipe, plain) as (_, counts):
        found = hasten.tune_method(pipe, start, calls)
    seconds, evaluations = round(time.process_time() - started, 1), counts["layer"] * BATCH
    row = {"settings": len(found.trials), "evaluations": evaluations, "seconds": seconds, "settled": found.settled}
    print(name, "tuned", row, flush=True)
    return row


if __name__ == "__main__":
    main()
