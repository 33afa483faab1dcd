"""Every caching method on every family of transformers, as the tests check it, written down for the docs.

python benchmarks/matrix.py --out benchmarks/matrix.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from hasten.bench.environment import environment
from hasten.io import write_atomically
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "hasten" / "tests"))
import matrix as checks
import tiny


def main(out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("benchmarks/matrix.json")) -> None:
    """Check and write."""
    cells: dict[str, dict[str, Any]] = {}
    for name in track(list(tiny.TINY), description="families"):
        cells[name] = {method: asdict(checks.family(name).check(method)) for method in checks.caching_methods()}
    result = {"environment": environment(), "steps": checks.STEPS, "cells": cells}
    write_atomically(out, json.dumps(result, indent=1) + "\n")
    wrong = [(n, m) for n, row in cells.items() for m, cell in row.items() if not cell["exact"] or cell["traces"]]
    print(f"{sum(map(len, cells.values()))} cells, {len(wrong)} wrong: {wrong}")


if __name__ == "__main__":
    typer.run(main)
