"""Files: one atomic writer, and one format for named arrays with a header, whose digest is checked on every load.

An array file is a zip archive of `.npy` members (so `numpy.load` opens it too) and `about.json`, the header: the kind
of file, what the writer says of it, and the SHA-256 of everything else. A record is a JSON file with the same marks.
Nothing is parsed before its size is known to be sane, and nothing is believed before the digest is checked.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import io
import json
import os
import uuid
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from drape.errors import AssetError, DrapeError, OutputError

try:
    import fcntl
except ImportError:  # not on Windows; temporaries of killed processes stay there
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "check_output",
    "check_sha256",
    "load_arrays",
    "load_record",
    "save_arrays",
    "save_record",
    "write_atomically",
    "write_text",
]

HEADER = "about.json"
LARGEST = 4 << 30  # bytes that an array file may unpack to
LARGEST_RECORD = 256 << 20  # bytes of a JSON file
Arrays = Mapping[str, NDArray[Any]]


def check_output(path: Path, suffix: str | None = None) -> None:
    """Refuse, before any work, a path that no file can be written to; makes its folder.

    Raises:
        OutputError: it is a folder, ends otherwise than `suffix`, or lies where nothing can be created.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder; expected the name of a file.")
    if suffix is not None and path.suffix != suffix:
        raise OutputError(f"{path} must end in {suffix}; rename it.")
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{path} cannot be written: {folder} is no folder that can be written to; name another one.")
    try:  # a file system may refuse what permissions allow
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.is_file():
            temporary, held = _temporary(path)
            held.close()
            temporary.unlink()
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error.strerror or error}); free space or name another."
        ) from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, then move it there.

    A reader sees the old file or the new one, never a part; on any failure the old one stays and the temporary one is
    removed. Of two writers the last one wins. Temporary files that a killed process left are removed by the next
    writer. A link is followed, permissions stay, and a device is written straight.

    Raises:
        OutputError: the operating system refuses (full disk, missing permission, a folder in the way).
    """
    try:
        target = _target(path)
        if target.is_dir():
            raise OSError(errno.EISDIR, "it is a folder")
        if target.is_symlink():  # a loop: else it would have been followed
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if target.exists() and not target.is_file():
            write(target)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        temporary, held = _temporary(target)
        try:
            with held:
                write(temporary)
                with temporary.open("rb") as made:
                    os.fsync(made.fileno())
                if target.exists():
                    temporary.chmod(target.stat().st_mode & 0o7777)
                if fcntl is None:
                    held.close()  # Windows replaces no open file
                temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # Windows opens no folders, and some file systems do not sync them
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except DrapeError:
        raise
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error.strerror or error}); free space or name another."
        ) from error


def _target(path: Path) -> Path:
    """The file that a path is or links to."""
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:  # a name with a zero byte
        raise OSError(errno.EINVAL, str(error)) from error


def _temporary(target: Path) -> tuple[Path, BinaryIO]:
    """A new file beside the target, locked as long as it is open; with the target's suffix, which tells its format."""
    while True:
        temporary = target.with_name(f".{_stem(target)}-{uuid.uuid4().hex}{target.suffix}")
        held = temporary.open("xb")
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks: leftovers stay there
                fcntl.flock(held, fcntl.LOCK_EX)
        if temporary.exists():  # else another writer took it for a leftover before it was locked
            return temporary, held
        held.close()


def _remove_leftovers(target: Path) -> None:
    """Remove the target's temporaries that nobody holds: their writers were killed."""
    if fcntl is None:
        return
    for leftover in target.parent.glob(f".{glob.escape(_stem(target))}-{'[0-9a-f]' * 32}{glob.escape(target.suffix)}"):
        with contextlib.suppress(OSError), leftover.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()


def _stem(target: Path) -> str:
    """What a temporary's name begins with: file systems allow 255 bytes, 38 and the suffix are ours."""
    return os.fsdecode(os.fsencode(target.stem)[:160])


def write_text(path: Path, text: str) -> None:
    """A text file, atomically."""
    write_atomically(path, lambda target: target.write_text(text, encoding="utf-8"))


def digest_of(parts: Mapping[str, bytes]) -> str:
    """SHA-256 of named bytes, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(parts):
        total.update(f"{name}\0{len(parts[name])}\0".encode())
        total.update(parts[name])
    return total.hexdigest()


def npy_bytes(array: NDArray[Any]) -> bytes:
    """An array in numpy's format, version 1.0."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def from_npy(content: bytes) -> NDArray[Any]:
    """What `npy_bytes` made; a header that promises more than there is is refused before memory is asked for."""
    stream = io.BytesIO(content)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("an array in another version of numpy's format")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    count = int(np.prod(shape, dtype=object))
    if fortran or dtype.hasobject or count < 0 or count * dtype.itemsize != len(content) - stream.tell():
        raise ValueError("an array whose size is not that of its data")
    return np.frombuffer(content, dtype, count, stream.tell()).reshape(shape).copy()


def save_arrays(path: Path, kind: str, arrays: Arrays, about: Mapping[str, Any] | None = None) -> None:
    """Named arrays and plain JSON values `about` them, in one file, atomically."""
    members = {f"{name}.npy": npy_bytes(np.asarray(array)) for name, array in arrays.items()}
    header = {"kind": kind, "about": dict(about or {})}
    stated = json.dumps(header, sort_keys=True).encode()
    text = json.dumps({**header, "sha256": digest_of({**members, HEADER: stated})}, sort_keys=True)

    def write(target: Path) -> None:
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(HEADER, text)
            for name, content in members.items():
                archive.writestr(name, content)

    write_atomically(path, write)


def load_arrays(path: Path, kind: str, remedy: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays of a file of `save_arrays` and what is said about them.

    Args:
        kind: what it must be.  remedy: what to do about a bad file, the end of the error's line.

    Raises:
        AssetError: the file is missing, damaged or of another kind.
    """
    if not path.is_file():
        raise AssetError(f"{path} does not exist; {remedy}.")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > LARGEST:
                raise ValueError(f"more than {LARGEST >> 30} GiB")
            parts = {member.filename: archive.read(member) for member in members}
        header = json.loads(parts.pop(HEADER)) if HEADER in parts else {}
        stated, found = header.pop("sha256", None), str(header.get("kind"))
        if stated is not None:
            if digest_of({**parts, HEADER: json.dumps(header, sort_keys=True).encode()}) != stated:
                raise ValueError("its digest is another one")
            arrays = {name.removesuffix(".npy"): from_npy(content) for name, content in parts.items()}
            about = dict(header["about"])
    except Exception as error:  # a damaged archive raises errors of a dozen kinds
        raise AssetError(f"{path} cannot be read ({type(error).__name__}: {error}); {remedy}.") from error
    if stated is None or found != kind:
        raise AssetError(f"{path} is no file of {kind}; {remedy}.")
    return arrays, about


def save_record(path: Path, kind: str, record: Mapping[str, Any]) -> None:
    """Plain JSON values as a text file with kind and digest, atomically."""
    body = json.dumps(record, sort_keys=True)
    marks = {"kind": kind, "sha256": digest_of({kind: body.encode()})}
    write_text(path, json.dumps({**marks, **record}, indent=1) + "\n")


def load_record(path: Path, kind: str, remedy: str) -> dict[str, Any]:
    """What `save_record` wrote.

    Raises:
        AssetError: the file is missing, damaged, changed by hand or of another kind.
    """
    if not path.is_file():
        raise AssetError(f"{path} does not exist; {remedy}.")
    try:
        if path.stat().st_size > LARGEST_RECORD:
            raise ValueError(f"more than {LARGEST_RECORD >> 20} MiB")
        record = json.loads(path.read_text(encoding="utf-8"))
        found, stated = record.pop("kind", None), record.pop("sha256", None)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise AssetError(f"{path} cannot be read ({type(error).__name__}: {error}); {remedy}.") from error
    if found != kind:
        raise AssetError(f"{path} is no file of {kind}; {remedy}.")
    if digest_of({kind: json.dumps(record, sort_keys=True).encode()}) != stated:
        raise AssetError(f"{path} was changed after it was written (its digest is another one); {remedy}.")
    return dict(record)


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file whose SHA-256 is another one."""
    with path.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != expected:
        raise AssetError(f"{path} has SHA-256 {found}; expected {expected}. Delete it and fetch it again.")
