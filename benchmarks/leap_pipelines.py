"""LEAP with all steps and plain coefficients on pipelines of diffusers with tiny random weights.

python benchmarks/leap_pipelines.py        writes benchmarks/leap-pipelines.json
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

from hasten.bench.environment import environment
from hasten.io import write_atomically

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks/leap-pipelines.json"


def main() -> None:
    """Check every pipeline."""
    sys.path.insert(0, str(ROOT / "hasten/tests"))
    from leap_pipelines import EXACT, PIPELINES, check

    warnings.simplefilter("ignore")
    rows = {name: asdict(check(name)) for name in PIPELINES}
    content = {"environment": environment(), "exact": EXACT, "rows": rows}
    write_atomically(OUT, json.dumps(content, indent=1) + "\n")
    for name, row in rows.items():
        print(f"{name}: {row['refused'] or row['error']}")


if __name__ == "__main__":
    main()
