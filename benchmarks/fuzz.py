"""Long runs of the state machine of `hasten/tests/machine.py`, seed by seed; each seed and each fault is written down.

    PYTHONPATH=hasten/tests python benchmarks/fuzz.py --steps 20000 --json benchmarks/fuzz.json

The file is written after every seed, so that an interrupted run is not lost; faults are printed with the calls that
lead to them, unshrunk (`--shrink` looks for fewer calls, which takes minutes).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from typing import Any

import diffusers
import torch
from hasten.io import write_atomically
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from machine import Machine

EXAMPLES, LENGTH = 10, 50  # of a seed: machines, and most rules of a machine


def run(number: int, shrink: bool) -> str | None:
    """A seed's fault as text, None if there is none."""
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    profile = settings(
        max_examples=EXAMPLES,
        stateful_step_count=LENGTH,
        deadline=None,
        database=None,
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(seed(number)(Machine), settings=profile)
    except Exception as error:
        return "".join(traceback.format_exception(error))
    return None


def main() -> None:
    """Run seeds until so many rules have been executed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20000, help="rules to execute")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--json", default="out/fuzz.json")
    parser.add_argument("--shrink", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    started, number, faults = time.perf_counter(), given.seed, {}
    while Machine.executed.total() < given.steps:
        fault = run(number, given.shrink)
        if fault is not None:
            faults[number] = fault.strip().splitlines()
            print(f"seed {number}:\n{fault}", flush=True)
        number += 1
        content: dict[str, Any] = {
            "command": " ".join(sys.argv),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "seeds": [given.seed, number - 1],
            "steps": Machine.executed.total(),
            "rules": dict(Machine.executed.most_common()),
            "seconds": round(time.perf_counter() - started),
            "faults": faults,
        }
        write_atomically(given.json, json.dumps(content, indent=1) + "\n")
        print(f"seed {number - 1}: {content['steps']} steps, {len(faults)} faults, {content['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
