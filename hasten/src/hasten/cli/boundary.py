"""Where errors end: whatever goes wrong in a command is one line, and says what to do.

Exit codes: 2 for what the user can mend (a wrong option, a bad file), 1 for an error of ours, whose traceback goes to a
file, 130 after Ctrl-C.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from hasten.errors import HastenError

__all__ = ["log_to_terminal", "resumable", "run"]

# Typer keeps its copy of click's exceptions to itself; this is the base of those about the command line.
USAGE: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

STOPPED = 130  # the exit code that typer gives to Ctrl-C
NOTHING = "nothing was kept"


def log_to_terminal(verbose: bool) -> None:
    """Show the library's warnings on standard error, and what it does and decides if `verbose`."""
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=verbose)
    logger = logging.getLogger("hasten")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if verbose else logging.ERROR)


def _quiet() -> None:
    """Other libraries' notices about optional parts would bury our own output."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)


def run(app: Callable[..., Any]) -> None:
    """Run the command, and leave the process with its exit code."""
    _quiet()
    try:
        code = app(standalone_mode=False, prog_name="hasten")
    except HastenError as error:
        _say("error", str(error), 2)
    except USAGE as error:
        _say_usage(error)
    except (typer.Abort, KeyboardInterrupt) as stop:
        _say("stopped", str(stop) or NOTHING, STOPPED)
    except Exception as error:
        _say(
            "error",
            f"unexpected {type(error).__name__}: {error}; the traceback is in {_traceback_file()}, "
            "please report it with that file",
            1,
        )
    if code == STOPPED:
        _say("stopped", NOTHING, STOPPED)
    sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def resumable(how: str = "") -> Iterator[None]:
    """Keep what an interruption says, which typer drops; `how` is what to say if it says nothing."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise typer.Abort(str(stop) or how) from stop


def _say_usage(error: Any) -> None:
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        sys.exit(2)
    context = getattr(error, "ctx", None)
    hint = "" if context is None else f" (see {context.command_path} --help)"
    _say("error", error.format_message().rstrip(".") + hint, 2)


def _say(what: str, message: str, code: int) -> None:
    """One line on standard error, then the end."""
    # Names may hold orders to a terminal, and bytes that are no text.
    shown = message.encode(errors="replace").decode()
    printable = "".join(sign if sign.isprintable() else " " for sign in shown)
    line = Text.assemble((f"{what}: ", "bold red"), " ".join(printable.split()))
    Console(stderr=True, soft_wrap=True).print(line)
    sys.exit(code)


def _traceback_file() -> str:
    text = traceback.format_exc()
    try:
        with tempfile.NamedTemporaryFile("w", prefix="hasten-", suffix=".log", delete=False, encoding="utf-8") as file:
            file.write(text)
    except OSError:  # no folder for it, or a full disk
        sys.stderr.write(text)
        return "the lines above"
    return file.name
