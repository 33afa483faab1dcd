"""What every evaluation of a reference model writes beside its card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from hasten.io import write_atomically
from PIL import Image

__all__ = ["write_evaluation"]


def write_evaluation(
    out: Path, result: Mapping[str, Any], page: Image.Image, kind: Literal["png", "webp"] = "png"
) -> None:
    """Write figures as `evaluation.json` and pictures as `contact_sheet.png` or `.webp` into a folder.

    WebP loses what nobody sees, and is a fraction as large where pictures have textures.
    """
    write_atomically(out / "evaluation.json", json.dumps(result, indent=1) + "\n")
    options: dict[str, Any] = {"optimize": True} if kind == "png" else {"quality": 85, "method": 6}
    write_atomically(out / f"contact_sheet.{kind}", partial(page.save, format=kind, **options))
