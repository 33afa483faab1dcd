"""What a calibration of each caching method costs on a trained model: evaluations of the model, and processor seconds.

python benchmarks/calibration_cost.py       writes benchmarks/calibration-cost.json

All of them learn from the same recorded runs, so the recording is there once. Processor seconds of one thread; other
work on the machine makes them longer by a little only.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import hasten
from hasten.bench.environment import environment
from hasten.bench.subject import open_model
from hasten.io import write_atomically
from held_out import HeldOut

OUT = Path(__file__).with_name("calibration-cost.json")
MODEL, STEPS, PROMPTS, BATCH = "emoji-flux", 50, 16, 8
METHODS = ("hyca", "l2p", "magcache", "svdcache")  # leapcache runs the model itself: see LEAP's cost


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
    content = {
        "environment": environment(),
        "model": MODEL,
        "prompts": PROMPTS,
        "steps": STEPS,
        "evaluations": PROMPTS * STEPS,
        "recording_seconds": round(recorded, 1),
        "rows": rows,
    }
    write_atomically(OUT, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
