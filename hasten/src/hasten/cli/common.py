"""What the commands share: the console, options, and readers of their values."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from rich.text import Text

from hasten.bench.result import Result, StreamResult
from hasten.bench.tables import table_of
from hasten.errors import ConfigError

__all__ = ["BAR", "ModelName", "Seed", "command_line", "console", "names", "numbers", "own_prompts", "show_result"]

console = Console()
if not console.is_terminal:
    console.width = max(console.width, 130)  # a table in a log or a file need not be squeezed

Seed = Annotated[int, typer.Option(help="Prompt i is drawn with seed SEED + i.")]
ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        help="A reference model (emoji-flux, or one that edits or makes clips), a pipeline folder, or a hub id.",
    ),
]
BAR = (
    TextColumn("{task.description:44.44}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


def command_line() -> str:
    """The command as it was typed, for results to state."""
    return shlex.join(["hasten", *sys.argv[1:]])


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


LONGEST = 36  # characters of a method's name on a line of the table
STYLES = {"plain": "dim", "hasten": ""}  # by library; a peer's rows are coloured


def show_result(result: Result | StreamResult) -> None:
    """The table of a result, what its columns are, and a line for all that was not measured."""
    table = table_of(result)
    shown = RichTable(
        title=table.title, title_justify="left", caption=table.legend, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    shown.add_column("method", max_width=LONGEST)
    for column in table.columns:
        shown.add_column(column.title, justify="right", no_wrap=True)
    for heading, lines in table.sections.items():
        if heading:
            shown.add_section()
            shown.add_row(f"[bold]{heading}[/bold]")
        for line in lines:
            name = Text(line.name, STYLES.get(line.library, "cyan"))
            shown.add_row(name, *(Text(cell.text, "bold" if cell.best else "") for cell in line.cells))
    console.print(shown)
    for note in table.notes[:-1]:
        console.print(Text(note, "yellow"))
