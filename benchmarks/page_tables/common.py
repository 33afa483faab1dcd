"""What the tables of all pages are made with: files, rows and cells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hasten.bench.result import read_result

ROOT = Path(__file__).resolve().parents[2]
EARLIER = {"e5d4f369": "first edition"}  # weights that a model does not come with any more, by their digest


def cell(value: float | None, digits: int) -> str:
    """A number with so many digits, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def table_row(cells: list[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def made_on(result: dict[str, Any]) -> str:
    """Versions and device that a file of a script names."""
    environment = result["environment"]
    return f"hasten {environment['hasten']}, torch {environment['torch']}, {environment['device']}"


def model_of(result: dict[str, Any]) -> str:
    """The model of a file of a script, with its edition where that is an earlier one."""
    name: str = result["model"] if "model" in result else result["options"]["model"]
    edition = EARLIER.get(result.get("weights", ""))
    return name if edition is None else f"{name}, {edition}"


def result_of(name: str) -> Any:
    """A result of `hasten bench`, checked."""
    return read_result(ROOT / "benchmarks" / f"{name}.json")


def read(name: str) -> dict[str, Any]:
    """What a script wrote into `benchmarks/`."""
    content: dict[str, Any] = json.loads((ROOT / "benchmarks" / name).read_text())
    return content
