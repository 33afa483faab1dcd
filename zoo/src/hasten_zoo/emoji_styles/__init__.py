"""`emoji-styles`: FLUX.1 in small, in a latent space, text to emoji in seven styles at 128, 64 and 192 pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import FluxPipeline
    from hasten.bench.subject import Subject

__all__ = ["load_emoji_styles", "open_styles"]

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights"


CALL = {"height": 128, "width": 128, "num_inference_steps": 50, "max_sequence_length": 16}
GUIDED = {"negative_prompt": "", "true_cfg_scale": 3.0}


def load_emoji_styles(weights: Path = WEIGHTS) -> Subject:
    """The trained pipeline with its prompts; `weights` may be a folder written by the training script's `--export`.

    See `open_styles`.
    """
    from hasten_zoo.emoji_styles.model import load_pipeline

    return open_styles("emoji-styles", weights, CALL | GUIDED, load_pipeline)


def open_styles(name: str, weights: Path, call: dict[str, Any], load: Callable[[Path], FluxPipeline]) -> Subject:
    """A pipeline of this class with its prompts, from a folder that its training script exported and `load` reads.

    The prompts are style and concept of the pairs it was trained on, shuffled. It is graded by whether concept and
    style that `Judge` finds in an image are those of the prompt; there is no grader without the judge's network.

    Raises:
        ModelError: if the weights are missing or cannot be read.
    """
    # Imported here, so that training does not load the bench.
    from hasten.bench.subject import Subject

    from hasten_zoo.emoji_styles.augment import caption
    from hasten_zoo.emoji_styles.judge import Judge, read_judge

    pairs = [pair for pair in read_judge(HERE)[0] if pair.taught and not pair.held_out]
    pipe = load(weights)
    judge = Judge.load(HERE) if Judge.available(HERE) else None

    def grade(images: Tensor, prompts: list[str]) -> list[bool]:
        assert judge is not None
        styles, concepts = judge(images * 2 - 1)
        return [prompt == f"{s}, {c}" for prompt, s, c in zip(prompts, styles, concepts, strict=True)]

    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    return Subject(
        name=name,
        pipe=pipe,
        prompts=[caption(pairs[i]) for i in order],
        call=call,
        grade=None if judge is None else grade,
    )
