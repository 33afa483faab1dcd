"""What every evaluation of a reference model writes beside its card, and the options that say where."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from hasten.errors import ConfigError
from hasten.io import write_atomically
from PIL import Image

__all__ = ["FIGURES", "add_folders", "curve_of", "curve_with", "out_of", "write_evaluation"]

FIGURES = "evaluation.json"


def add_folders(parser: argparse.ArgumentParser, committed: Path) -> None:
    """Options for the weights, the committed ones by default, and for the folder to write; see `out_of`."""
    parser.add_argument("--weights", type=Path, default=committed)
    parser.add_argument("--out", type=Path, help="default: beside the card, if the weights are the committed ones")
    parser.set_defaults(committed=committed)


def out_of(args: argparse.Namespace) -> Path:
    """The folder to write.

    Raises:
        ConfigError: if none is given for weights whose figures do not belong beside the card.
    """
    committed: Path = args.committed
    if args.out is None and args.weights.resolve() != committed.resolve():
        raise ConfigError(f"the figures beside the card are of {committed}; give --out for those of {args.weights}")
    return Path(args.out or committed.parent)


def curve_of(out: Path) -> list[dict[str, Any]]:
    """The `curve` of a folder's figures; empty where there is none yet."""
    found: list[dict[str, Any]] = []
    if (out / FIGURES).is_file():
        found = json.loads((out / FIGURES).read_text()).get("curve", found)
    return found


def curve_with(out: Path, row: Mapping[str, Any], same: Sequence[str]) -> list[dict[str, Any]]:
    """The `curve` of a folder's figures with a row for one more moment of a training.

    Args:
        out: with the figures, if there are any yet.
        row: to add, in the place of one that measured the same.
        same: what says what was measured; the first of them is what rows are sorted by.
    """
    others = [other for other in curve_of(out) if any(other.get(key) != row.get(key) for key in same)]
    return sorted([*others, dict(row)], key=lambda one: one[same[0]])


def write_evaluation(
    out: Path, result: Mapping[str, Any], page: Image.Image, kind: Literal["png", "webp"] = "png"
) -> None:
    """Write figures as `evaluation.json` and pictures as `contact_sheet.png` or `.webp` into a folder.

    WebP loses what nobody sees, and is a fraction as large where pictures have textures.
    """
    write_atomically(out / FIGURES, json.dumps(result, indent=1) + "\n")
    options: dict[str, Any] = {"optimize": True} if kind == "png" else {"quality": 85, "method": 6}
    write_atomically(out / f"contact_sheet.{kind}", partial(page.save, format=kind, **options))
