"""`emoji-styles-turbo`: `emoji-styles` distilled to 4 steps (8 with the same weights), guidance built in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hasten_zoo.emoji_styles import CALL, open_styles

if TYPE_CHECKING:
    from hasten.bench.subject import Subject

__all__ = ["load_emoji_styles_turbo"]

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights"


def load_emoji_styles_turbo(weights: Path = WEIGHTS) -> Subject:
    """The distilled pipeline with its prompts; `weights` may be a folder written by the training script's `--export`.

    Prompts and grader are those of `emoji-styles`; it is called with 4 steps and without guidance.

    Raises:
        ModelError: if the weights are missing or cannot be read.
    """
    return open_styles("emoji-styles-turbo", weights, CALL | {"num_inference_steps": 4})
