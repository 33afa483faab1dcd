"""`sprites-wan`: Wan 2.1 in small, text to a clip of one moving emoji."""

from __future__ import annotations

from pathlib import Path
from random import Random

from hasten.bench.subject import Subject
from hasten.errors import ConfigError
from torch import Tensor

from hasten_zoo.sprites_wan.data import CANVAS, Clip, all_clips
from hasten_zoo.sprites_wan.grade import is_right, locate
from hasten_zoo.sprites_wan.model import TEXT_TOKENS, load_pipeline

__all__ = ["is_right", "load_sprites_wan", "locate", "ordered_clips"]

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights"
LEAP = HERE / "leap.safetensors"
GUIDANCE = 3.0


def ordered_clips() -> list[Clip]:
    """One clip for each caption, shuffled, those that training leaves out first."""
    clips = all_clips()
    Random(0).shuffle(clips)
    return sorted(clips, key=lambda clip: not clip.held_out)


def load_sprites_wan(weights: Path = WEIGHTS) -> Subject:
    """The trained pipeline with its captions, those that training left out first.

    `weights` may be a folder written by the training script's `--export`.

    Raises:
        ModelError: if the files are missing or damaged.
    """
    pipe = load_pipeline(weights)
    by_caption = {clip.caption: clip for clip in ordered_clips()}

    def grade(videos: Tensor, prompts: list[str]) -> list[bool]:
        missing = [prompt for prompt in prompts if prompt not in by_caption]
        if missing:
            raise ConfigError(f"no clip has the caption {missing[0]!r}; use the model's prompts")
        return [is_right(by_caption[prompt], video) for prompt, video in zip(prompts, videos, strict=True)]

    return Subject(
        name="sprites-wan",
        pipe=pipe,
        prompts=list(by_caption),
        call={
            "height": CANVAS.side,
            "width": CANVAS.side,
            "num_frames": CANVAS.frames,
            "num_inference_steps": 50,
            "guidance_scale": GUIDANCE,
            "max_sequence_length": TEXT_TOKENS,
        },
        grade=grade,
        fitted={"leap": LEAP} if weights == WEIGHTS and LEAP.is_file() else {},
        sizes=((CANVAS.side, CANVAS.side),),
        about="Wan 2.1 in small: clips of one moving emoji",
    )
