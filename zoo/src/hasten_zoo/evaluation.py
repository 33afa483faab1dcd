"""What every evaluation of a reference model writes beside its card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hasten.io import write_atomically
from PIL import Image

__all__ = ["write_evaluation"]


def write_evaluation(out: Path, result: Mapping[str, Any], page: Image.Image) -> None:
    """Write figures as `evaluation.json` and pictures as `contact_sheet.png` into a folder."""
    write_atomically(out / "evaluation.json", json.dumps(result, indent=1) + "\n")
    write_atomically(out / "contact_sheet.png", partial(page.save, format="png", optimize=True))
