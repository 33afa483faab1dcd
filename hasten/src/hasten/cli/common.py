"""What the commands share: the console, progress bars, and the table of a result."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from rich.text import Text

from hasten.bench.result import Result, StreamResult
from hasten.bench.tables import table_of
from hasten.errors import ConfigError
from hasten.parameters import PRECISIONS

if TYPE_CHECKING:
    from hasten.bench.subject import Subject

__all__ = ["BAR", "command_line", "console", "opened", "show_result"]

console = Console()
if not console.is_terminal:
    console.width = max(console.width, 130)  # a table in a log or a file need not be squeezed

BAR = (
    TextColumn("{task.description:44.44}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


def opened(name: str, device: str | None, dtype: str | None = None) -> Subject:
    """A model, loaded; of several processes, each has a device of its own.

    Raises:
        ConfigError: for a dtype that pipelines are not loaded in.
    """
    if dtype not in (None, *PRECISIONS):
        raise ConfigError(f"--dtype must be {' or '.join(PRECISIONS)}, got {dtype!r}")
    from hasten.bench.environment import processes
    from hasten.bench.subject import check_device, open_model

    check_device(device)
    state = processes()
    if device is None and state.num_processes > 1:
        device = str(state.device)
    with console.status(f"loading {name}"):
        return open_model(name, dtype=dtype, device=device)


def command_line() -> str:
    """The command as it was typed, for results to state."""
    return shlex.join(["hasten", *sys.argv[1:]])


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
