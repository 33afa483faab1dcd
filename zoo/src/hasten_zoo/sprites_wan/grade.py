"""Whether a clip shows what its caption asks for: which object, and how it moves."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from hasten.errors import ConfigError
from torch import Tensor
from torch.nn import functional

from hasten_zoo.sprites_wan.data import CANVAS, OBJECTS, Clip, background, path, place

__all__ = ["Verdict", "is_right", "judge", "locate"]

LOOKS = 5  # frames that are looked at
GRID = 2  # pixels between the places that are tried
BARE = 0.9  # a frame shows nothing unless a sprite leaves less than this share of the background's own error


@dataclass(frozen=True)
class Verdict:
    """What was found in a clip.

    Attributes:
        object: whether the nearest sprite is the one asked for, in every frame that was looked at.
        motion: whether the ways from the first of these frames to the others are those of the motion asked for.
        psnr: mean over these frames, in dB, against the frame with the nearest sprite at its place; in one that is well
            drawn it is limited by the grid of the places. Never below 0, and 0 for
            a clip with values that are not finite.
    """

    object: bool
    motion: bool
    psnr: float


def locate(
    frame: Tensor, where: int, size: float, around: tuple[float, float], reach: float
) -> tuple[int, Tensor, float]:
    """The object and the place that explain a frame best, on a grid of two pixels.

    Args:
        frame: `[3, 64, 64]` in [0, 1].
        where: index of the background.
        size: of the object, pixels.
        around: the middle (y, x) of the places to try.
        reach: how far from there to try, pixels.

    Returns:
        Index of the object, its centre `[2]` (y, x), and the mean squared error that remains.
    """
    behind = background(where)
    apart = frame - behind
    first = torch.tensor(around) - reach
    count = int(2 * reach // GRID) + 1
    # All sprites in a small window around the first place; the other places are whole pixels away.
    side = math.ceil(size) + 3
    corner = (first - size / 2).floor() - 1
    everyone = torch.arange(len(OBJECTS))
    centres, sizes = (first - corner).expand(len(everyone), 2), torch.full((len(everyone),), size)
    colour, opaque = place(everyone, centres, sizes, replace(CANVAS, side=side)).split([3, 1], 1)
    # |colour + (1 - opaque) behind - frame|^2, less |apart|^2, is a sum of products of a part of the sprite and a part
    # of the image, so that one convolution gives it for all sprites and places.
    image = torch.cat(
        [
            torch.ones_like(frame[:1]),
            behind,
            behind.square().sum(0, keepdim=True),
            apart,
            (behind * apart).sum(0, keepdim=True),
        ]
    )
    sprites = torch.cat(
        [colour.square().sum(1, keepdim=True), -2 * colour * opaque, opaque.square(), -2 * colour, 2 * opaque], 1
    )
    top, left = (int(value) for value in corner)
    span = side + GRID * (count - 1)
    reached = functional.pad(image, (-left, left + span - CANVAS.side, -top, top + span - CANVAS.side))
    errors = functional.conv2d(reached[None], sprites, stride=GRID)[0] + apart.square().sum()
    item, row, column = (int(i) for i in torch.unravel_index(errors.argmin(), errors.shape))
    error = float(errors[item, row, column]) / frame.numel()
    return item, first + GRID * torch.tensor([row, column]), max(error, 0.0)


def judge(clip: Clip, video: Tensor) -> Verdict:
    """Look at frames from the first to the last, evenly spread.

    In each the nearest sprite (mean squared error over objects and places) is looked for. The way from the first frame
    to each of the others must be that of the motion up to a twelfth of the side, 5.3 pixels.

    If in one of them the nearest sprite leaves nine tenths or more of the error of the bare background, that frame
    shows nothing, and the clip is wrong in both; so is one with values that are not finite.

    Args:
        clip: what was asked for; its start does not matter.
        video: `[F, 3, 64, 64]` in [0, 1].

    Raises:
        ConfigError: for a video of another size, or of fewer than three frames.
    """
    if video.ndim != 4 or video.shape[1:] != (3, CANVAS.side, CANVAS.side) or len(video) < 3:
        raise ConfigError(
            f"expected a video [F, 3, 64, 64] with F >= 3, got {list(video.shape)}; "
            'draw it with the model\'s call and output_type="pt"'
        )
    if not bool(torch.isfinite(video).all()):
        return Verdict(False, False, 0.0)
    tolerance = CANVAS.side / 12
    centres, sizes = path(clip, len(video))
    behind = background(clip.background)
    right, shown, moved, errors = True, True, [], []
    for i in torch.linspace(0, len(video) - 1, LOOKS).long().tolist():
        y, x = centres[i].tolist()
        reach = CANVAS.jitter + tolerance + 5
        frame = video[i].float().cpu()
        item, centre, error = locate(frame, clip.background, float(sizes[i]), (y, x), reach)
        shown = shown and error < BARE * float((frame - behind).square().mean())
        right = right and item == clip.item
        moved.append(centre - centres[i])
        errors.append(error)
    motion = all(bool(((drift - moved[0]).abs() <= tolerance).all()) for drift in moved[1:])
    decibels = -10 * torch.tensor(errors).nan_to_num(1.0).clamp(1e-6, 1.0).log10()
    return Verdict(right and shown, motion and shown, float(decibels.mean()))


def is_right(clip: Clip, video: Tensor) -> bool:
    """Whether a video shows the object of a caption, moving as the caption says; see `judge`."""
    verdict = judge(clip, video)
    return verdict.object and verdict.motion
