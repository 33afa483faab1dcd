"""LEAP from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hasten.solvers.scheduler import LeapScheduler

__all__ = ["from_hub"]


def from_hub(name: str | Path, pipe: Any, *, guidance: float | None = None, **options: Any) -> LeapScheduler:
    """The scheduler that somebody shared with `push_to_hub` or `save_pretrained`, for a pipeline.

    Args:
        name: of the repository (`owner/name`), or a folder.
        pipe: the pipeline that it is for; it is compared, not changed: `pipe.scheduler = hasten.from_hub(name, pipe)`.
        guidance: the scale at which the pipeline will be called, for tables that were fitted at several.
        options: of `from_pretrained`, such as `subfolder`, `revision` or `token`.

    Raises:
        CalibrationError: if there is none, it is damaged, or it belongs to another model than the pipeline's.
    """
    made = LeapScheduler.from_pretrained(name, **options)
    if guidance is not None:
        made = made.at_guidance(guidance)
    made.check_model(pipe)
    return made
