"""Progress of long work, on standard error: a bar on a terminal, one line per step elsewhere; silent until `show`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

__all__ = ["counted", "note", "show", "steps"]

Item = TypeVar("Item")
STATE = {"shown": False, "busy": False}


def show(on: bool = True) -> None:
    """Show progress from now on, or not; the command line does."""
    STATE["shown"] = on


def note(text: str) -> None:
    """One line with the time of day."""
    if STATE["shown"]:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def steps(items: Sequence[Item], label: str) -> Iterator[Item]:
    """The items, with a bar while they are worked on; inside another bar and off the terminal there is none."""
    return counted(items, len(items), label)


def counted(items: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    """The same for items that come one by one, of which there are `total`."""
    if not STATE["shown"] or STATE["busy"] or not sys.stderr.isatty():
        yield from items
        return
    STATE["busy"] = True
    try:
        yield from track(items, label, total=total, console=Console(stderr=True))
    finally:
        STATE["busy"] = False
