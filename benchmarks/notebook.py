"""The tutorial as a notebook: `docs/tutorial/first-steps.ipynb`, made from `docs/tutorial/index.md`.

python benchmarks/notebook.py          write it
python benchmarks/notebook.py --check  exit 1 if it is not what the page says
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from hasten.io import write_atomically

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tutorial" / "index.md"
NOTEBOOK = PAGE.with_name("first-steps.ipynb")


def notebook(text: str) -> dict[str, Any]:
    """Cells of the page in order: its Python blocks are code, all else is text."""
    cells: list[dict[str, Any]] = []
    for i, part in enumerate(re.split(r"^```python\n(.*?)^```\n", text, flags=re.DOTALL | re.MULTILINE)):
        source = part.strip("\n").splitlines(keepends=True)
        if source:
            kind: dict[str, Any] = {"cell_type": "code", "execution_count": None, "outputs": []}
            cells.append(
                {**(kind if i % 2 else {"cell_type": "markdown"}), "id": f"cell-{i}", "metadata": {}, "source": source}
            )
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def text() -> str:
    """The notebook's file."""
    return json.dumps(notebook(PAGE.read_text(encoding="utf-8")), indent=1) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(
            f"{NOTEBOOK} is older than {PAGE}; run benchmarks/notebook.py" if NOTEBOOK.read_text() != text() else 0
        )
    write_atomically(NOTEBOOK, text())
