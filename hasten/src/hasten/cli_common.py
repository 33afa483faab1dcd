"""What the commands share: the console, options, and readers of their values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hasten.errors import ConfigError

__all__ = ["BAR", "ModelName", "Seed", "console", "names", "numbers", "own_prompts"]

console = Console()
if not console.is_terminal:
    console.width = max(console.width, 110)  # a table in a log or a file need not be squeezed

Seed = Annotated[int, typer.Option(help="Prompt i is drawn with seed SEED + i.")]
ModelName = Annotated[
    str, typer.Option("--model", help="A reference model (emoji-flux), a pipeline folder, or a hub id.")
]
BAR = (
    TextColumn("{task.description:44.44}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


def numbers(text: str, option: str) -> list[int]:
    """`12,9,7` as whole numbers.

    Raises:
        ConfigError: if it is something else.
    """
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"{option} takes whole numbers with commas, such as 12,9,7; got {text!r}") from None


def names(text: str) -> list[str]:
    """`a,b` as names."""
    return [part.strip() for part in text.split(",") if part.strip()]


def own_prompts(file: Path | None) -> tuple[str, ...]:
    """The lines of a file of prompts; none without a file."""
    if file is None:
        return ()
    return tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
