"""What every evaluation of a reference model writes beside its card, and the options that say where."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from hasten.errors import ConfigError
from hasten.io import write_atomically
from PIL import Image

__all__ = ["add_folders", "out_of", "write_evaluation"]


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


def write_evaluation(
    out: Path, result: Mapping[str, Any], page: Image.Image, kind: Literal["png", "webp"] = "png"
) -> None:
    """Write figures as `evaluation.json` and pictures as `contact_sheet.png` or `.webp` into a folder.

    WebP loses what nobody sees, and is a fraction as large where pictures have textures.
    """
    write_atomically(out / "evaluation.json", json.dumps(result, indent=1) + "\n")
    options: dict[str, Any] = {"optimize": True} if kind == "png" else {"quality": 85, "method": 6}
    write_atomically(out / f"contact_sheet.{kind}", partial(page.save, format=kind, **options))
