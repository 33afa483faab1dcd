"""Folders of weights: checked before they are read, and what is wrong with one is said in a line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hasten.errors import HastenError, ModelError
from hasten.io import check_sealed, describe

__all__ = ["reading"]


@contextmanager
def reading(name: str, folder: Path, *parts: str) -> Iterator[None]:
    """While a model is read from a folder that its training script exported.

    Args:
        name: of the model.
        folder: with its weights.
        parts: files and folders by which they are known.

    Raises:
        ModelError: if there are none, they are of another model or not as they were written, or what reads them fails.
    """
    if not all((folder / part).exists() for part in parts):
        script = f"python -m hasten_zoo.{name.replace('-', '_')}.train --export"
        raise ModelError(f"no {name} weights in {folder}; reinstall hasten-zoo, or export some with {script}")
    check_sealed(folder, ModelError, "Reinstall hasten-zoo, or export its weights again.", name)
    try:
        yield
    except HastenError:
        raise
    except Exception as error:  # of whatever kind in the libraries that read it
        raise ModelError(
            f"the {name} files in {folder} cannot be read ({describe(error)}); reinstall hasten-zoo"
        ) from error
