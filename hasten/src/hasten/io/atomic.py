"""The one writer: a file is the old one or the new one, whole, whatever happens and however many write it."""

from __future__ import annotations

import errno
import glob
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from hasten.errors import FileError
from hasten.io.schema import as_path

try:
    import fcntl
except ImportError:  # not on Windows; temporaries of killed processes stay there
    fcntl = None  # type: ignore[assignment]

__all__ = ["Content", "add_line", "alone", "check_target", "write_atomically"]

Content = str | bytes | Callable[[BinaryIO], object]

LONGEST_NAME = 200  # bytes of a temporary's name that come from its target; file systems allow 255
REMEDIES = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some space, or write to another disk",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that you may write to",
    errno.EISDIR: "give the path of a file",
    errno.ENOTDIR: "choose a path whose folders are no files",
    errno.EEXIST: "choose a path whose folders are no files",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def write_atomically(path: str | Path, content: Content) -> Path:
    """Write a file so that others, and whoever comes after a failure, find the old content or the new one, whole.

    The content goes to a temporary file of its own in the same folder, which is brought to the disk and takes the place
    of the target in one step: of several writers the last one wins. Temporaries that a killed process left beside the
    target are removed. A link is followed; a device or a pipe is written straight.

    Args:
        path: the file; its folder is made.
        content: bytes, text (written as UTF-8), or a function that writes to a binary file.

    Returns:
        the path.

    Raises:
        FileError: if it cannot be written; the old file is as it was, and no temporary is left.
    """
    path = as_path(path)
    try:
        target = _target(path)
        if target.exists() and not target.is_file():
            with target.open("wb") as device:
                _fill(device, content)
            return path
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        temporary, file = _temporary(target)
        try:
            with file:
                _fill(file, content)
                file.flush()
                os.fsync(file.fileno())
                if target.exists():
                    os.chmod(temporary, target.stat().st_mode & 0o7777)
                if fcntl is None:
                    file.close()  # Windows replaces no open file; elsewhere the lock lasts until it is replaced
                os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(target.parent)
    except FileError:  # of another file that the content wrote
        raise
    except OSError as error:
        raise _cannot_write(path, error) from error
    return path


def add_line(path: str | Path, line: str) -> Path:
    """Add a line to a log of one writer, atomically; a last line that was cut off is dropped. Returns the path.

    Raises:
        FileError: if it cannot be written.
    """
    path = as_path(path)
    try:
        before = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise _cannot_write(path, error) from error
    return write_atomically(path, before[: before.rfind(b"\n") + 1] + line.encode() + b"\n")


def check_target(path: str | Path, *read: Path | None) -> Path:
    """Find out before any work whether a file can be written; makes its folder and returns the path.

    Args:
        path: the file.
        read: files and folders that are read; the file must be none of them, and in none of them. None for one that was
            not given.

    Raises:
        FileError: if it cannot.
    """
    path = as_path(path)
    try:
        target = _target(path)
        if target.is_file() and any(_is_file(target, one) for one in read):
            raise FileError(f"{path}: what is read from it would be replaced by what is written; name another file")
        for folder in read:
            if folder is not None and folder.is_dir() and target.is_relative_to(os.path.realpath(folder)):
                raise FileError(f"{path} lies in {folder}, which is read; write to another folder")
        if target.exists() and not target.is_file():
            return path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary, file = _temporary(target)
        file.close()
        temporary.unlink()
    except FileError:
        raise
    except OSError as error:
        raise _cannot_write(path, error) from error
    return path


def _is_file(target: Path, other: Path | None) -> bool:
    try:
        return other is not None and target.samefile(other)
    except (OSError, ValueError):  # there is no such file
        return False


@contextmanager
def alone(path: str | Path) -> Iterator[None]:
    """Work on a file, and what lies beside it, as the only process that does, as far as the file system has locks.

    Raises:
        FileError: if another process is at work on it.
    """
    path = check_target(path)
    if fcntl is None or (path.exists() and not path.is_file()):
        yield
        return
    lock = path.with_name(f".{_shortened(path.name)}.lock")
    held = _lock(path, lock)
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
        held.close()


def _lock(path: Path, lock: Path) -> BinaryIO:
    """The open file of a lock that nobody else has; a file system without locks lets everybody."""
    while True:
        try:
            held = lock.open("ab")
        except OSError as error:
            raise _cannot_write(path, error) from error
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.close()
            raise FileError(f"{path}: another process is at work on it; wait for it, or name another file") from None
        except OSError:
            return held
        with suppress(FileNotFoundError):
            if os.path.samestat(lock.stat(), os.fstat(held.fileno())):
                return held
        held.close()  # who held it took it away meanwhile


def _target(path: Path) -> Path:
    try:
        target = Path(os.path.realpath(path))
    except ValueError as error:  # a name with a zero byte
        raise OSError(errno.EINVAL, str(error)) from error
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if target.is_symlink():  # else it would have been followed
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return target


def _cannot_write(path: Path, error: OSError) -> FileError:
    remedy = REMEDIES.get(error.errno or 0, "choose another path, or free some space")
    return FileError(f"{path}: cannot be written ({error.strerror or error}); {remedy}")


def _fill(file: BinaryIO, content: Content) -> None:
    if callable(content):
        content(file)
    else:
        file.write(content.encode() if isinstance(content, str) else content)


def _prefix(target: Path) -> str:
    return f".{_shortened(target.name)}."


def _shortened(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:LONGEST_NAME])


def _temporary(target: Path) -> tuple[Path, BinaryIO]:
    """A new file beside the target, locked as long as it is open."""
    while True:
        temporary = target.with_name(f"{_prefix(target)}{secrets.token_hex(8)}.tmp")
        file = temporary.open("xb")
        try:
            if fcntl is not None:
                with suppress(OSError):  # a file system without locks: leftovers stay there
                    fcntl.flock(file, fcntl.LOCK_EX)
            if temporary.exists():  # else another writer took it for a leftover before it was locked
                return temporary, file
        except BaseException:
            file.close()
            with suppress(OSError):
                temporary.unlink()
            raise
        file.close()


def _remove_leftovers(target: Path) -> None:
    """Remove the target's temporaries that nobody holds: their writers were killed."""
    if fcntl is None:
        return
    for leftover in target.parent.glob(f"{glob.escape(_prefix(target))}*.tmp"):
        with suppress(OSError), leftover.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()


def _sync_folder(folder: Path) -> None:
    """Bring the new name to the disk as well."""
    with suppress(OSError):  # Windows opens no folders, and some network file systems do not sync them
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
