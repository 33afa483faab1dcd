"""A hundred thousand calls on one accelerated pipeline: memory and time per call, which have to stay what they are.

    PYTHONPATH=hasten/tests python benchmarks/endurance.py --calls 100000 --json benchmarks/endurance.json

Every tenth call has another size and every seventh another number of steps, as on a server.
"""

from __future__ import annotations

import argparse
import json
import sys

import diffusers
import hasten
import torch
from endless import Endless, Growth
from hasten import registry
from hasten.io import write_atomically

BLOCKS = 20  # rows of the result


def main() -> None:
    """Call, and write after each block."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--method", default="hicache:interval=2:warmup=2", help="a method expression")
    parser.add_argument("--json", default="out/endurance.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    pipe, growth = Endless(), Growth()
    with hasten.accelerate(pipe, *registry.parse(given.method)) as run:
        for _ in range(BLOCKS):
            growth.run(lambda i: pipe(5 if i % 7 == 0 else 4, 32 if i % 10 == 0 else 16), max(1, given.calls // BLOCKS))
            content = {
                "command": " ".join(sys.argv),
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "method": given.method,
                "summary": str(run.summary()),
                "rows": growth.rows,
            }
            write_atomically(given.json, json.dumps(content, indent=1) + "\n")
            print(growth.rows[-1], flush=True)


if __name__ == "__main__":
    main()
