"""Generated parts of the reference: options of the command line, schemas of files, columns of a result.

`benchmarks/tables.py` writes them between `<!-- cli COMMAND -->` or `<!-- schema NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
from typing import Any

import typer
from hasten.bench.row import Row, StreamRow, columns
from hasten.cli.main import app
from hasten.quality.configuration import schema

__all__ = ["commands", "options", "part"]


def _group() -> Any:
    return typer.main.get_command(app)


def commands() -> dict[str, Any]:
    """Every command by its words, those of groups too, in the order of the help."""
    found: dict[str, Any] = {}
    for name, command in _group().commands.items():
        below = getattr(command, "commands", None)
        found |= {name: command} if below is None else {f"{name} {key}": value for key, value in below.items()}
    return found


def _plain(text: str | None) -> str:
    """Help as Markdown: without the marks of the terminal, and on one line."""
    words = re.sub(r"\[/?(?:bold|dim|cyan|b|i)\]", "", text or "")
    return " ".join(words.split()).replace("|", "\\|").replace("<", "&lt;")


def _default(option: Any) -> str:
    value = option.default
    if option.required:
        return "required"
    if value is None or callable(value) or value in ("", (), []):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{getattr(value, 'value', value)}`"


def options(name: str) -> str:
    """The table of a command's arguments and options, from its declaration."""
    command = commands()[name]
    lines = [_plain(command.help), "", "| option | default | meaning |", "|---|---|---|"]
    for option in command.params:
        if option.name == "help" or getattr(option, "hidden", False):
            continue
        names = [*option.opts, *option.secondary_opts] if option.param_type_name == "option" else [option.name.upper()]
        shown = ", ".join(f"`{opt}`" for opt in names)
        lines.append(f"| {shown} | {_default(option)} | {_plain(getattr(option, 'help', ''))} |")
    return "\n".join(lines if len(lines) > 4 else lines[:1])


def _command_list() -> str:
    lines = ["| command | does |", "|---|---|"]
    for name, command in commands().items():
        first = _plain(command.help).split(". ")[0].rstrip(".")
        lines.append(f"| [`hasten {name}`](#hasten-{name.replace(' ', '-')}) | {first} |")
    return "\n".join(lines)


def _columns(kind: type) -> str:
    lines = ["| field | unit | meaning |", "|---|---|---|"]
    lines += [f"| `{name}` | {column.unit} | {column.tooltip} |" for name, column in columns(kind).items()]
    return "\n".join(lines)


SCHEMAS = {
    "configuration": lambda: f"```json\n{json.dumps(schema(), indent=2)}\n```",
    "rows": lambda: _columns(Row),
    "streams": lambda: _columns(StreamRow),
}


def part(kind: str, name: str) -> str:
    """What stands between the marks."""
    if kind == "schema":
        return SCHEMAS[name]()
    return _command_list() if name == "all" else options(name.replace("-", " ") if name not in commands() else name)
