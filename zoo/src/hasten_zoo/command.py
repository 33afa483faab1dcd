"""The options that all training commands have, and what every command does with errors."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from hasten.bench.subject import check_device
from hasten.errors import ConfigError, HastenError, ModelError

from hasten_zoo.record import POSITION, Start
from hasten_zoo.swift import compile_blocks
from hasten_zoo.training import Training, load_half, run

__all__ = ["add_options", "at_least_one", "run_with", "told"]

NOTHING = "none"
N = TypeVar("N", int, float)


def told(main: Callable[[], None]) -> None:
    """Run a command; what it cannot do is one line, without a traceback."""
    try:
        main()
    except (HastenError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def positive(text: str) -> float:
    """An option's number above 0."""
    number = _number(text, float)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return number


def at_least_one(text: str) -> int:
    """An option's whole number from 1 on."""
    number = _number(text, int)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _number(text: str, kind: type[N]) -> N:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def device(text: str) -> str:
    """An option's device, if this torch can use it."""
    try:
        check_device(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be used here: {error}") from error
    return text


def add_options(
    parser: argparse.ArgumentParser, out: Path, samples: int, batch: int, committed: Path, rank: int | None = None
) -> None:
    """The options that every training script has, with the defaults of one; `rank` is of low-rank differences."""
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument(
        "--samples",
        type=at_least_one,
        help="images to see in total, earlier parts counted; by default as many as --minutes have the time for, or "
        f"{samples:,} without them",
    )
    parser.set_defaults(enough=samples)
    parser.add_argument("--minutes", type=positive, default=math.inf, help="budget of this part (see --fall)")
    parser.add_argument("--batch", type=at_least_one, default=batch)
    parser.add_argument("--lr", type=positive, default=1e-3)
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--threads", type=at_least_one, default=1)
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
    parser.add_argument(
        "--committed",
        type=Path,
        default=committed,
        help="weights to go on from without a checkpoint; none: begin from nothing",
    )
    parser.add_argument("--export", type=Path, help="only write the averaged weights of the last checkpoint here")


def run_with(
    args: argparse.Namespace,
    training: Training,
    parts: Mapping[str, Any],
    folder: Path,
    samples: int | None,
    read: Callable[[Path], Start] | None = None,
) -> None:
    """Train as the options of `add_options` ask, from the committed weights where there is no checkpoint.

    Args:
        args: the options.
        training: fresh.
        parts: models by name, among them the transformer.
        folder: see `run`.
        samples: see `run`; None: what `add_options` says.
        read: how committed weights are read; `load_half` for the parts if None.

    Raises:
        ModelError: if there are no weights in the folder that is to be gone on from.
    """
    if args.compile:
        compile_blocks(parts["transformer"])
    if args.fall and not (0 < args.fall <= 1 and args.minutes < math.inf):
        raise SystemExit(f"--fall must be a share above 0 up to 1, of --minutes, got {args.fall:g}; give both")
    committed, reader = args.committed, read or partial(load_half, parts)
    if str(committed) != NOTHING and not (committed / POSITION).is_file():
        raise ModelError(f"no weights of a training in {committed}; give another --committed, or none to begin anew")
    fallback = None if str(committed) == NOTHING else partial(reader, committed)
    if samples is None:
        samples = args.enough if math.isinf(args.minutes) else sys.maxsize
    run(training, folder, samples, args.minutes, fallback, fall=args.fall)
