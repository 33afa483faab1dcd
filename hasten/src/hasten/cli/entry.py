"""The entry point of the `hasten` command: what needs no library is answered before any is loaded."""

from __future__ import annotations

import sys

__all__ = ["main"]

NEEDED = {"typer", "rich"}  # of the commands themselves; what a command needs beside them is in the extra too


def main() -> None:
    """Run the command, or say what has to be installed for it."""
    if sys.argv[1:] == ["--version"]:
        from hasten import __version__

        print(__version__)
        return
    try:
        from hasten.cli.main import main as run
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        sys.exit(f"error: the command line needs {error.name}, which is not installed: pip install {error.name}")
    run()
