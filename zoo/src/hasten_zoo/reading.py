"""Folders of weights: checked before they are read, and what is wrong with one is said in a line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hasten.errors import ModelError
from hasten.io import check_sealed

__all__ = ["reading"]


@contextmanager
def reading(name: str, folder: Path) -> Iterator[None]:
    """While a model is read from a folder that its training script exported.

    Args:
        name: of the model.
        folder: with its weights.

    Raises:
        ModelError: if there are none, they are not as they were written, or what reads them fails.
    """
    if not any(folder.glob("*")):
        script = f"python -m hasten_zoo.{name.replace('-', '_')}.train --export"
        raise ModelError(f"no {name} weights in {folder}; reinstall hasten-zoo, or export some with {script}")
    check_sealed(folder, ModelError, "Reinstall hasten-zoo, or export them again.")
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"the {name} files in {folder} cannot be read ({error}); reinstall hasten-zoo") from error
