"""Views of an image (mirrored, shifted, on a colour) and the captions that go with them.

A caption is "noto, red apple" or, on another colour than white, "noto, red apple on sky blue". In a third of the
samples the style is left out and in a tenth the whole caption, so that several images are right for one caption and
the seed decides between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten_zoo.emoji_styles.data import EmojiStyles, Pair

__all__ = ["COLOURS", "Views", "caption", "draw_views", "nearest_views", "plain_views", "render"]

COLOURS = {
    "white": (255, 255, 255),
    "black": (16, 16, 16),
    "grey": (158, 158, 158),
    "sky blue": (135, 206, 235),
    "navy": (26, 43, 98),
    "mint": (170, 236, 205),
    "dark green": (24, 92, 58),
    "yellow": (252, 218, 74),
    "orange": (246, 146, 46),
    "red": (214, 48, 49),
    "pink": (250, 182, 206),
    "lavender": (202, 184, 240),
    "purple": (104, 58, 152),
    "beige": (238, 222, 190),
    "brown": (118, 76, 46),
}
NAMES = tuple(COLOURS)
WHITE = NAMES.index("white")
COLOURED_SHARE = 0.3
MIRRORED_SHARE = 0.5
LARGEST_SHIFT = 0.01  # of the side
STYLE_LEFT_OUT = 1 / 3
CAPTION_LEFT_OUT = 1 / 10


@dataclass(frozen=True)
class Views:
    """How to show images: `[B]` mirrored (bool), `[B, 2]` shift down and right (shares of the side), `[B]` colour."""

    mirrored: Tensor
    shift: Tensor
    colour: Tensor


def draw_views(pairs: list[Pair], rows: Tensor, generator: torch.Generator) -> Views:
    """Random views of the pairs `rows`; those with letters or a direction are never mirrored."""
    n = len(rows)
    allowed = torch.tensor([pairs[i].mirror for i in rows.tolist()], dtype=torch.bool)
    mirrored = (torch.rand(n, generator=generator) < MIRRORED_SHARE) & allowed
    shift = (2 * torch.rand(n, 2, generator=generator) - 1) * LARGEST_SHIFT
    colour = torch.randint(len(NAMES), (n,), generator=generator)
    colour = torch.where(torch.rand(n, generator=generator) < COLOURED_SHARE, colour, WHITE)
    return Views(mirrored, shift, colour)


def plain_views(n: int) -> Views:
    """As published: not mirrored, not shifted, on white."""
    return Views(torch.zeros(n, dtype=torch.bool), torch.zeros(n, 2), torch.full((n,), WHITE))


def render(data: EmojiStyles, rows: Tensor, views: Views, resolution: int) -> Tensor:
    """Images `[B, 3, R, R]` in [-1, 1] of the pairs `rows`, seen as `views` says."""
    stored = torch.from_numpy(data.images[resolution][rows.numpy()]).permute(0, 3, 1, 2)
    moved = torch.zeros_like(stored)
    steps = (views.shift * resolution).round().long().tolist()
    for i, (down, right) in enumerate(steps):
        image = stored[i].flip(-1) if views.mirrored[i] else stored[i]
        span = [(max(0, s), min(resolution, resolution + s)) for s in (down, right)]
        (top, bottom), (left, far) = span
        moved[i, :, top:bottom, left:far] = image[:, top - down : bottom - down, left - right : far - right]
    colours = torch.tensor(list(COLOURS.values()), dtype=torch.float32)[views.colour] / 127.5
    alpha = moved[:, 3:].float() / 255
    return (moved[:, :3].float() / 127.5 + (1 - alpha) * colours[:, :, None, None] - 1).clamp(-1, 1)


def nearest_views(images: Tensor, truths: Tensor, mirrored: Sequence[bool], reach: int = 6) -> Tensor:
    """The views of true images, on white, that lie nearest to generated ones: a caption leaves them open.

    Args:
        images, truths: `[B, 3, R, R]` in [-1, 1].
        mirrored: whether each may be mirrored.
        reach: largest shift in pixels, along either axis.
    """
    found = []
    side = images.shape[-1]
    for image, truth, both in zip(images, truths, mirrored, strict=True):
        ways = torch.stack([truth, truth.flip(-1)] if both else [truth])
        framed = F.pad(ways, (reach,) * 4, value=1.0)
        places = [(i, j) for i in range(2 * reach + 1) for j in range(2 * reach + 1)]
        views = torch.cat([framed[..., i : i + side, j : j + side] for i, j in places])
        found.append(views[(views - image).square().mean((1, 2, 3)).argmin()])
    return torch.stack(found)


def caption(pair: Pair | None, colour: str = "white", style: bool = True) -> str:
    """The caption of a pair on a colour, with or without its style; empty for no pair."""
    if pair is None:
        return ""
    words = f"{pair.style}, {pair.concept}" if style else pair.concept
    return words if colour == "white" else f"{words} on {colour}"
