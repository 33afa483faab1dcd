"""The pairs that `emoji-styles-edit` learns: an image, an instruction, the edited image and where they differ.

They are made of the images of `emoji-styles`. Each of its training pairs of style and concept is a *scene*: seen on one
colour, which all styles of a concept share with position and mirroring, and a second time either on another colour or
with a small object of the same style in a corner. From these two images there are edits

- of the style, global: "make it noto" leads to the same concept in another style, on the same colour;
- of the background, global: "make the background sky blue";
- of a corner, local: "add the lemon top left", "remove the lemon".

Pairs that `emoji-styles` holds out are neither sources nor targets nor objects here. Held-out edits are edits that
lead to the image of a held-out pair, or change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten_zoo.emoji_styles.augment import COLOURS, LARGEST_SHIFT, MIRRORED_SHARE, WHITE, Views, render
from hasten_zoo.emoji_styles.data import EmojiStyles, Pair

__all__ = ["CORNERS", "ITEMS", "SIZE", "Scenes", "draw_scenes", "instructions", "item_rows", "paste", "render_scenes"]

SIZE = 128  # pixels
SMALL, MARGIN = 40, 4  # pixels: side of an object, and its distance to the border
CORNERS = ("top left", "top right", "bottom left", "bottom right")
ITEMS = (
    *("lemon", "banana", "red apple", "grapes", "tangerine", "cherries", "strawberry", "tomato", "carrot", "broccoli"),
    *("cookie", "doughnut", "sunflower", "tulip", "rose", "cactus", "mushroom", "butterfly", "fish", "crab"),
    *("penguin", "star", "red heart", "key", "balloon", "crown", "umbrella", "snowflake"),
)
COLOURED_SHARE = 0.4  # of the scenes; the others are on white
OBJECT_SHARE = 0.6  # of the second images; the others are on another colour
NAMES = tuple(COLOURS)


@dataclass(frozen=True)
class Scenes:
    """How the pairs `rows` are shown, twice.

    Attributes:
        rows: `[N]` indices of pairs.
        views: the first image; alike for all pairs of a concept.
        colour: `[N]` numbers of the second image's colour, which is the first one's where there is an object.
        item: `[N]` numbers in `ITEMS` of the second image's object, -1 where there is none.
        corner: `[N]` numbers in `CORNERS`; counts where there is an object.
    """

    rows: Tensor
    views: Views
    colour: Tensor
    item: Tensor
    corner: Tensor

    def part(self, of: slice) -> Scenes:
        """Some of them."""
        views = Views(self.views.mirrored[of], self.views.shift[of], self.views.colour[of])
        return Scenes(self.rows[of], views, self.colour[of], self.item[of], self.corner[of])


def item_rows(pairs: Sequence[Pair]) -> dict[tuple[str, str], int]:
    """Indices of the pairs that may be objects, by style and concept; held-out ones may not."""
    return {
        (pair.style, pair.concept): i for i, pair in enumerate(pairs) if pair.concept in ITEMS and not pair.held_out
    }


def draw_scenes(
    pairs: Sequence[Pair], rows: Tensor, generator: torch.Generator, object_share: float = OBJECT_SHARE
) -> Scenes:
    """Random scenes of the pairs `rows`: an object has the style of its image, and is of another concept."""
    n = len(rows)
    known = item_rows(pairs)
    concepts = sorted({pairs[i].concept for i in rows.tolist()})
    number = {concept: k for k, concept in enumerate(concepts)}
    own = torch.tensor([number[pairs[i].concept] for i in rows.tolist()], dtype=torch.long)
    may_mirror = torch.ones(len(concepts), dtype=torch.bool)
    for i, k in zip(rows.tolist(), own.tolist(), strict=True):
        may_mirror[k] &= pairs[i].mirror
    mirrored = (torch.rand(len(concepts), generator=generator) < MIRRORED_SHARE) & may_mirror
    shift = (2 * torch.rand(len(concepts), 2, generator=generator) - 1) * LARGEST_SHIFT
    colour = torch.randint(len(NAMES), (len(concepts),), generator=generator)
    coloured = torch.rand(len(concepts), generator=generator) < COLOURED_SHARE
    first = torch.where(coloured, colour, WHITE)[own]
    other = (first + torch.randint(1, len(NAMES), (n,), generator=generator)) % len(NAMES)
    item, corner = torch.full((n,), -1), torch.randint(len(CORNERS), (n,), generator=generator)
    with_object = torch.rand(n, generator=generator) < object_share
    for k, i in enumerate(rows.tolist()):
        allowed = [j for j, name in enumerate(ITEMS) if name != pairs[i].concept and (pairs[i].style, name) in known]
        if bool(with_object[k]) and allowed:
            item[k] = allowed[int(torch.randint(len(allowed), (), generator=generator))]
    views = Views(mirrored[own], shift[own], first)
    return Scenes(rows, views, torch.where(item >= 0, first, other), item, corner)


def place(corner: int) -> tuple[slice, slice]:
    """Rows and columns of an object in a corner."""
    top, left = ((SIZE - MARGIN - SMALL) if far else MARGIN for far in (corner // 2, corner % 2))
    return slice(top, top + SMALL), slice(left, left + SMALL)


def paste(data: EmojiStyles, image: Tensor, row: int, corner: int) -> tuple[Tensor, Tensor]:
    """An image `[3, 128, 128]` in [-1, 1] with the pair `row` small in a corner; `[128, 128]` bool: where it lies."""
    stored = torch.from_numpy(data.images[SIZE][[row]][0]).permute(2, 0, 1).float()[None] / 255
    small = F.interpolate(stored, (SMALL, SMALL), mode="bilinear", antialias=True)[0]
    rows, columns = place(corner)
    painted = image.clone()
    behind = (painted[:, rows, columns] + 1) / 2
    painted[:, rows, columns] = (small[:3] + (1 - small[3:]) * behind).clamp(0, 1) * 2 - 1
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[rows, columns] = small[3] > 0
    return painted, mask


def render_scenes(data: EmojiStyles, scenes: Scenes) -> tuple[Tensor, Tensor, Tensor]:
    """First and second images `[B, 3, 128, 128]` in [-1, 1], and where an object was added `[B, 128, 128]` bool."""
    first = render(data, scenes.rows, scenes.views, SIZE)
    second = render(data, scenes.rows, Views(scenes.views.mirrored, scenes.views.shift, scenes.colour), SIZE)
    masks = torch.zeros(len(first), SIZE, SIZE, dtype=torch.bool)
    known = item_rows(data.pairs)
    columns: Any = (scenes.rows, scenes.item, scenes.corner)
    for k, (row, item, corner) in enumerate(zip(*(x.tolist() for x in columns), strict=True)):
        if item >= 0:
            second[k], masks[k] = paste(data, second[k], known[data.pairs[row].style, ITEMS[item]], corner)
    return first, second, masks


def instructions(styles: Sequence[str]) -> list[str]:
    """Every instruction that there is, the empty one first."""
    texts = ["", *map(to_style, styles), *map(to_colour, NAMES), *map(removed, ITEMS)]
    return texts + [added(item, corner) for item in ITEMS for corner in CORNERS]


def to_style(style: str) -> str:
    """The instruction to change the style."""
    return f"make it {style}"


def to_colour(name: str) -> str:
    """The instruction to change the background."""
    return f"make the background {name}"


def added(item: str, corner: str) -> str:
    """The instruction to add an object."""
    return f"add the {item} {corner}"


def removed(item: str) -> str:
    """The instruction to remove it."""
    return f"remove the {item}"


def scene_texts(scenes: Scenes) -> tuple[list[str], list[str]]:
    """For each scene the instruction that leads from its first to its second image, and the one back."""
    there, back = [], []
    columns: Any = (scenes.views.colour, scenes.colour, scenes.item, scenes.corner)
    for first, second, item, corner in zip(*(x.tolist() for x in columns), strict=True):
        there.append(added(ITEMS[item], CORNERS[corner]) if item >= 0 else to_colour(NAMES[second]))
        back.append(removed(ITEMS[item]) if item >= 0 else to_colour(NAMES[first]))
    return there, back
