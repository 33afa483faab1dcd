"""`sprites-wan`: Wan 2.1 in small, text to a clip of one moving emoji: 17 frames of 48x48 (9 x 8 x 8 tokens)."""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
from hasten.bench.subject import Subject
from hasten.errors import ConfigError, ModelError
from hasten.io import check_sealed
from torch import Tensor

from hasten_zoo.sprites_wan.data import JITTER, OBJECTS, SIDE, Clip, all_clips, background, path, place
from hasten_zoo.sprites_wan.model import TEXT_TOKENS, load_pipeline

__all__ = ["is_right", "load_sprites_wan", "locate"]

WEIGHTS = Path(__file__).parent / "weights"
LEAP = Path(__file__).parent / "leap.safetensors"  # `hasten tune --computed-steps 9,7` on four captions
FRAMES = 17
TOLERANCE = 4.0  # pixels


def locate(frame: Tensor, where: int, size: float, around: tuple[float, float], reach: float) -> tuple[int, Tensor]:
    """The object and the place that explain a frame best (mean squared error), on a grid of two pixels.

    Args:
        frame: `[3, 48, 48]` in [0, 1].
        where: index of the background.
        size: of the object, pixels.
        around: the middle (y, x) of the places to try.
        reach: how far from there to try, pixels.

    Returns:
        Index of the object and its centre `[2]` (y, x).
    """
    steps = torch.arange(-reach, reach + 1, 2)
    places = torch.cartesian_prod(steps, steps) + torch.tensor(around)
    behind, sizes = background(where), torch.full((len(places),), size)
    best = (float("inf"), 0, places[0])
    for item in range(len(OBJECTS)):
        layer = place(torch.full((len(places),), item), places, sizes)
        errors = (layer[:, :3] + (1 - layer[:, 3:]) * behind - frame).square().flatten(1).mean(1)
        least = int(errors.argmin())
        best = min(best, (float(errors[least]), item, places[least]), key=lambda found: found[0])
    return best[1], best[2]


def is_right(clip: Clip, video: Tensor) -> bool:
    """Whether a video shows the object of a caption, moving as the caption says.

    In the first, the middle and the last frame the nearest sprite must be the object, and the way from the first to
    each of the others must be that of the motion up to four pixels.

    Args:
        clip: what was asked for; its start does not matter.
        video: `[F, 3, 48, 48]` in [0, 1].

    Raises:
        ConfigError: for a video of another size, or of fewer than three frames.
    """
    if video.ndim != 4 or video.shape[1:] != (3, SIDE, SIDE) or len(video) < 3:
        raise ConfigError(
            f"expected a video [F, 3, {SIDE}, {SIDE}] with F >= 3, got {list(video.shape)}; "
            'draw it with the model\'s call and output_type="pt"'
        )
    centres, sizes = path(clip, len(video))
    moved = []
    for i in (0, len(video) // 2, len(video) - 1):
        y, x = centres[i].tolist()
        item, centre = locate(video[i].float().cpu(), clip.background, float(sizes[i]), (y, x), JITTER + TOLERANCE + 5)
        if item != clip.item:
            return False
        moved.append(centre - centres[i])
    return all(bool(((drift - moved[0]).abs() <= TOLERANCE).all()) for drift in moved[1:])


def load_sprites_wan(weights: Path = WEIGHTS) -> Subject:
    """The trained pipeline with its captions, those that training left out first.

    `weights` may be a folder written by the training script's `--export`.

    Raises:
        ModelError: if the files are missing or damaged.
    """
    if not (weights / "transformer").is_dir():
        raise ModelError(
            f"no sprites-wan weights in {weights}; reinstall hasten, or export some with "
            "python -m hasten_zoo.sprites_wan.train --export"
        )
    check_sealed(weights, ModelError, "Reinstall hasten-zoo, or export them again.")
    try:
        pipe = load_pipeline(weights)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"the sprites-wan files in {weights} cannot be read ({error}); reinstall hasten") from error
    clips = all_clips()
    Random(0).shuffle(clips)
    by_caption = {clip.caption: clip for clip in sorted(clips, key=lambda clip: not clip.held_out)}

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
            "height": SIDE,
            "width": SIDE,
            "num_frames": FRAMES,
            "num_inference_steps": 50,
            "guidance_scale": 1.0,
            "max_sequence_length": TEXT_TOKENS,
        },
        grade=grade,
        fitted={"leap": LEAP} if weights == WEIGHTS else {},
        sizes=((48, 48),),
        about="Wan 2.1 in small: clips of one moving emoji",
    )
