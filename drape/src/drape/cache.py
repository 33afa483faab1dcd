"""What is made or fetched once and kept: `$DRAPE_CACHE`, or the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from drape.errors import OutputError
from drape.io import load_arrays, save_arrays

__all__ = ["cache_folder", "cached_arrays"]

VERSION = 9  # raise it when what is cached changes its meaning


def cache_folder() -> Path:
    """The folder, created if missing."""
    base = os.environ.get("DRAPE_CACHE")
    folder = Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "drape"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the cache {folder} cannot be created ({error.strerror}); set DRAPE_CACHE to a folder that can."
        ) from error
    return folder


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
        save_arrays(path, f"drape's cache ({kind})", make())
    return load_arrays(path, f"drape's cache ({kind})", "delete it, and it will be made again")[0]
