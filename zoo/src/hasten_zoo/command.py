"""The options that all training commands have."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hasten_zoo.record import POSITION, Start
from hasten_zoo.swift import compile_blocks
from hasten_zoo.training import Training, load_half, run

__all__ = ["add_options", "run_with"]


def add_options(
    parser: argparse.ArgumentParser, out: Path, samples: int, batch: int, committed: Path, rank: int | None = None
) -> None:
    """The options that every training script has, with the defaults of one; `rank` is of low-rank differences."""
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--samples", type=int, default=samples, help="images to see in total, earlier parts counted")
    parser.add_argument("--minutes", type=float, default=math.inf, help="budget of this part (see --fall)")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--float32", action="store_true", help="no bfloat16")
    if rank is None:
        parser.add_argument("--adamw", action="store_true", help="AdamW for everything, instead of Muon for matrices")
    else:
        parser.add_argument("--rank", type=int, default=rank, help="of the differences from the weights it starts from")
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks (minutes on a GPU)")
    parser.add_argument(
        "--fall",
        type=float,
        default=0.0,
        help="share of --minutes over which the rate falls to zero, kept over interruptions",
    )
    parser.add_argument("--committed", type=Path, default=committed, help="weights to go on from without a checkpoint")
    parser.add_argument("--export", type=Path, help="only write the averaged weights of the last checkpoint here")


def run_with(
    args: argparse.Namespace,
    training: Training,
    parts: Mapping[str, Any],
    folder: Path,
    samples: int,
    read: Callable[[Path], Start] | None = None,
) -> None:
    """Train as the options of `add_options` ask, from the committed weights where there is no checkpoint.

    Args:
        args: the options.
        training: fresh.
        parts: models by name, among them the transformer.
        folder: see `run`.
        samples: see `run`.
        read: how committed weights are read; `load_half` for the parts if None.
    """
    if args.compile:
        compile_blocks(parts["transformer"])
    if args.fall and not (0 < args.fall <= 1 and args.minutes < math.inf):
        raise SystemExit(f"--fall must be a share above 0 up to 1, of --minutes, got {args.fall:g}; give both")
    committed, reader = args.committed, read or partial(load_half, parts)
    known = (committed / POSITION).is_file()  # weights of another script's have none
    run(training, folder, samples, args.minutes, partial(reader, committed) if known else None, fall=args.fall)
