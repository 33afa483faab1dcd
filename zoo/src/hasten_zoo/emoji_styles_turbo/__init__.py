"""`emoji-styles-turbo`: `emoji-styles` distilled to 4 steps (8 with the same weights), guidance built in."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hasten_zoo.emoji_styles import CALL, open_styles
from hasten_zoo.emoji_styles import WEIGHTS as STYLES

if TYPE_CHECKING:
    from hasten.bench.subject import Subject

__all__ = ["load_emoji_styles_turbo"]

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights"


def load_emoji_styles_turbo(weights: Path = WEIGHTS, styles: Path = STYLES) -> Subject:
    """The distilled pipeline with its prompts; `weights` may be a folder written by the training script's `--export`.

    Prompts and grader are those of `emoji-styles`, and so are the weights in the folder `styles` that the student
    differs from; it is called with 4 steps and without guidance.

    Raises:
        ModelError: if the weights are missing, cannot be read, or were trained from others than those in `styles`.
    """
    # Imported here, so that the package can be looked at without diffusers.
    from hasten_zoo.emoji_styles_turbo.model import load_pipeline

    call = CALL | {"num_inference_steps": 4}
    return open_styles("emoji-styles-turbo", weights, call, partial(load_pipeline, styles=styles))
