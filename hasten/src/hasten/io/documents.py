"""Reading files that others may have made: bounded before memory is asked for, JSON without surprises."""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from hasten.errors import FileError, HastenError
from hasten.io.schema import as_path, shown

__all__ = ["Limits", "describe", "open_regular", "parse_json", "read_bytes", "read_json", "read_lines"]

MIB = 1 << 20
LONGEST_REASON = 300  # characters


@dataclass(frozen=True)
class Limits:
    """Bounds on a JSON document.

    Attributes:
        size: in bytes; a parsed document takes up to about 25 times as much memory.
        depth: levels of lists and objects within each other.
    """

    size: int = 64 * MIB
    depth: int = 32


def open_regular(path: Path, most: int) -> tuple[BufferedReader, int]:
    """An open file and its size in bytes.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is no regular file, or larger than `most` bytes.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # before it is opened, which some devices take for an order
        raise ValueError("it is no regular file")
    file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115 - the caller closes it
    try:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):  # somebody put another one there meanwhile
            raise ValueError("it is no regular file")
        if found.st_size > most:
            raise ValueError(f"it has {found.st_size / MIB:.1f} MiB, expected at most {most / MIB:.1f}")
    except BaseException:
        file.close()
        raise
    return file, found.st_size


def _open_at_once(path: str, flags: int) -> int:
    """A descriptor; the open of a pipe does not wait for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes; raises as `open_regular`."""
    file, size = open_regular(path, most)
    with file:
        return file.read(size)


def read_lines(path: Path, most: int = 256 * MIB) -> list[str]:
    """The lines of a text file, or of a pipe; a byte order mark is left out, and only line feeds end a line.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is no UTF-8, or has more than `most` bytes.
    """
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most / MIB:.1f} MiB")
    return [line.removesuffix("\r") for line in content.decode("utf-8-sig").split("\n")]


def parse_json(text: str | bytes, limits: Limits = Limits()) -> Any:
    """A JSON document whose numbers are finite and of 64 bits, and whose objects have no name twice.

    Raises:
        ValueError: if it is no such document, or exceeds the limits.
    """
    if len(text) > limits.size:
        raise ValueError(f"it has {len(text)} bytes, expected at most {limits.size}")
    if isinstance(text, bytes):
        text = text.decode()
    try:
        value = json.loads(
            text,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_whole,
            object_pairs_hook=_object,
        )
    except json.JSONDecodeError as error:
        near = text[error.pos : error.pos + 20]
        where = f"at {shown(near)}, character {error.pos + 1}" if near.strip() else "at its end"
        raise ValueError(f"no JSON: {error.msg[:1].lower()}{error.msg[1:]} {where}") from None
    except RecursionError:
        raise ValueError(f"it is nested more than {limits.depth} levels deep") from None
    if "\\ud" in text.lower():  # half a character can be neither shown nor written
        json.dumps(value, ensure_ascii=False).encode()
    level: list[Any] = [value]
    for _ in range(limits.depth):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return value
    raise ValueError(f"it is nested more than {limits.depth} levels deep")


def read_json(
    path: str | Path,
    limits: Limits = Limits(),
    error: type[HastenError] = FileError,
    remedy: str = "Make the file again.",
) -> Any:
    """The value of a JSON file; see `parse_json`.

    Args:
        path: the file.
        limits: bounds on it.
        error: class of the error.
        remedy: what the error tells the reader to do.

    Raises:
        HastenError: of the class `error`, if the file is missing, too large or no such JSON.
    """
    path = as_path(path)
    try:
        return parse_json(read_bytes(path, limits.size), limits)
    except FileNotFoundError as missing:
        raise error(f"{path}: no such file. {remedy}") from missing
    except (OSError, ValueError) as bad:
        raise error(f"{path}: no usable JSON ({describe(bad)}). {remedy}") from bad


def describe(error: Exception) -> str:
    """What was wrong, on one short line of what can be printed, whoever raised it."""
    if isinstance(error, UnicodeEncodeError):
        return "it holds half a character, a lone surrogate"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is no UTF-8"
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    text = "".join(sign if sign.isprintable() else " " for sign in text)
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 3]}..."


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    return [child for child in value if isinstance(child, (dict, list))] if isinstance(value, list) else []


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no finite number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shown(text)} is no finite number")
    return value


def _whole(text: str) -> int:
    if len(text) > 20 or not -(1 << 63) <= (value := int(text)) < 1 << 64:
        raise ValueError(f"{shown(text)} is no number of 64 bits")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {shown(name)} is there twice")
    return made
