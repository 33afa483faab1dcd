"""Folders that other libraries fill: every file written atomically, and a list of digests that is checked on loading.

Other libraries write in place, file by file, and read whatever lies in a folder. So they write into a scratch folder,
whose files are moved one by one; the list comes last, and a folder whose files are not those of its list is refused.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hasten.errors import FileError, HastenError
from hasten.io.atomic import write_atomically
from hasten.io.container import Kind, read_record, write_record
from hasten.io.documents import describe
from hasten.io.schema import shown

__all__ = ["LIST", "check_files", "check_sealed", "write_files", "write_sealed"]

LIST = "digests.json"


@dataclass(frozen=True)
class _Sealed:
    """The list.

    Attributes:
        files: SHA-256 of each by its path below the folder.
        of: name of what they are parts of; empty where none was given.
    """

    files: dict[str, str]
    of: str = ""


def write_files(folder: Path, fill: Callable[[Path], object]) -> dict[str, str]:
    """Let `fill` write files into an empty folder, and move them here, each atomically.

    Returns:
        SHA-256 of each by its path below the folder, with slashes.

    Raises:
        FileError: if a file cannot be written.
    """
    from safetensors import SafetensorError

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        try:
            fill(scratch)
        except (OSError, SafetensorError) as error:
            raise FileError(f"{folder}: cannot be written ({describe(error)}); free some space") from error
        digests = {path.relative_to(scratch).as_posix(): _digest(path) for path in _files(scratch)}
        for file in digests:
            with (scratch / file).open("rb") as written:
                write_atomically(folder / file, partial(shutil.copyfileobj, written))
    return digests


def check_files(folder: Path, digests: Mapping[str, str], error: type[HastenError], remedy: str) -> None:
    """Compare files with their digests.

    Raises:
        HastenError: of the class `error`, naming a file that is missing, lies elsewhere, or has another digest.
    """
    root = folder.resolve()
    for name, digest in digests.items():
        try:
            path = (root / name).resolve()
            whole = path.is_relative_to(root) and path.is_file() and _digest(path) == digest
        except (OSError, ValueError):
            whole = False
        if not whole:
            raise error(f"{folder}: {shown(name)} is missing, damaged or changed after it was written. {remedy}")


def write_sealed(folder: Path, fill: Callable[[Path], object], of: str = "") -> Path:
    """As `write_files`, and writes the list of the digests last, with the name `of`; returns the folder."""
    write_record(folder / LIST, _kind(FileError, ""), {"files": write_files(folder, fill), "of": of})
    return folder


def check_sealed(folder: Path, error: type[HastenError], remedy: str, of: str = "") -> None:
    """Find out before it is loaded whether a folder holds exactly what `write_sealed` wrote.

    Args:
        folder: the folder.
        error: class of the errors.
        remedy: sentence that ends their messages.
        of: name that the list has to have, unless it has none.

    Raises:
        HastenError: of that class, if the list is missing or damaged or has another name, a file is not as it was
            written, or there is a file that is not in the list.
    """
    sealed = read_record(folder / LIST, _kind(error, remedy))
    digests = sealed.files
    if of and sealed.of not in {"", of}:
        raise error(f"{folder} holds {shown(sealed.of)}, not {of}; name a folder of {of}")
    check_files(folder, digests, error, remedy)
    others = [name for path in _files(folder) if (name := path.relative_to(folder).as_posix()) not in {LIST, *digests}]
    if others:
        raise error(f"{folder}: {shown(others[0])} was not written with the other files; move it away. {remedy}")


def _kind(error: type[HastenError], remedy: str) -> Kind[_Sealed]:
    return Kind("list of digests", _Sealed, error, remedy, 1 << 20)


def _files(folder: Path) -> list[Path]:
    """All files below a folder but hidden ones, which no library loads."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
