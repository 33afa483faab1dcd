"""Files that are made or fetched once: `$DRAPE_CACHE`, or the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from drape.errors import AssetError

__all__ = ["cache_folder", "cached_arrays", "check_sha256", "write_atomically", "write_text"]

VERSION = 3  # raise it when what is cached changes its meaning


def cache_folder() -> Path:
    """The folder, created if missing."""
    base = os.environ.get("DRAPE_CACHE")
    folder = Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "drape"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there, so that no reader sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-") as folder:
        target = Path(folder) / path.name
        write(target)
        os.replace(target, path)


def write_text(path: Path, text: str) -> None:
    """A text file, atomically."""
    write_atomically(path, lambda target: target.write_text(text, encoding="utf-8"))


def cached_arrays(
    kind: str, key: Mapping[str, Any], make: Callable[[], Mapping[str, NDArray[Any]]]
) -> dict[str, NDArray[Any]]:
    """Named arrays from the cache, made and stored there if missing.

    Args:
        kind: the first part of the file's name.
        key: everything that the arrays depend on; plain JSON values.

    Raises:
        AssetError: the stored file is damaged.
    """
    text = json.dumps({"version": VERSION, **key}, sort_keys=True)
    path = cache_folder() / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"
    if not path.exists():
        arrays = make()
        write_atomically(path, lambda target: np.savez_compressed(target, **arrays))  # type: ignore[arg-type]
    try:
        with np.load(path) as stored:
            return {name: stored[name] for name in stored.files}
    except (BadZipFile, ValueError, EOFError) as error:
        raise AssetError(f"{path} is damaged ({error}); delete it, and it will be made again.") from error


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file whose SHA-256 is another one."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise AssetError(f"{path} has SHA-256 {found}; expected {expected}. Delete it and fetch it again.")
