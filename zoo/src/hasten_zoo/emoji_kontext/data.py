"""The pairs that `emoji-kontext` learns: an image, an instruction, the edited image and where they differ.

Everything is made by code from the emoji set that `emoji-flux` ships (MIT licence): a large emoji in the middle, up
to two small ones in named corners. A local edit adds, removes, replaces or recolours a small one; a global edit makes
the image grey, inverts it or changes its background. One composition in ten is never trained on.

Images are `[3, 64, 64]` float32 in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from random import Random
from typing import Literal

import torch
from hasten.bench.subject import Edit
from torch import Tensor
from torch.nn import functional

from hasten_zoo.emoji_flux.data import load_emoji_set

__all__ = [
    "BACKGROUNDS",
    "EFFECTS",
    "ITEMS",
    "TINTS",
    "EditPlan",
    "Painter",
    "Placed",
    "Scene",
    "draw_plan",
    "held_out_plans",
    "painter",
]

SIDE, MAIN, SMALL = 64, 36, 20
CORNERS = ("top left", "top right", "bottom left", "bottom right")
ITEMS = (
    *("lemon", "banana", "red apple", "green apple", "grapes", "tangerine", "cherries", "strawberry", "kiwifruit"),
    *("tomato", "carrot", "broccoli", "bread", "cookie", "doughnut", "cupcake", "sunflower", "tulip", "butterfly"),
    *("fish", "crab", "frog face", "penguin", "pig face"),
)
TINTS = {"red": (0.95, 0.2, 0.2), "green": (0.2, 0.8, 0.3), "blue": (0.2, 0.4, 0.95), "purple": (0.65, 0.25, 0.85)}
BACKGROUNDS = {
    "white": (1.0, 1.0, 1.0),
    "blue": (0.55, 0.75, 1.0),
    "yellow": (1.0, 0.93, 0.5),
    "pink": (1.0, 0.72, 0.82),
}
EFFECTS = {"grey": "make the image grey", "inverted": "invert the image"}


@dataclass(frozen=True)
class Placed:
    """A small emoji: its index in `ITEMS`, its corner, and its tint if it is recoloured."""

    item: int
    corner: int
    tint: str | None = None


@dataclass(frozen=True)
class Scene:
    """An image before it is drawn. `main` counts in the emoji set, `shift` is in pixels from the middle."""

    main: int
    shift: tuple[int, int]
    items: tuple[Placed, ...] = ()
    background: str = "white"
    effect: str | None = None


@dataclass(frozen=True)
class EditPlan:
    """An edit before it is drawn. `changed` is what a local edit adds, removes or alters, before or after it."""

    prompt: str
    before: Scene
    after: Scene
    kind: Literal["local", "global"]
    changed: Placed | None = None

    @property
    def held_out(self) -> bool:
        """Whether training leaves this composition out."""
        key = self.before.main * 7 + (self.changed.item * 3 if self.changed else 0)
        return key % 10 == 0


def cutouts(images: Tensor, side: int) -> Tensor:
    """`[N, 3, 64, 64]` on white to `[N, 4, side, side]`, colours and opacity.

    A pixel belongs to the emoji if it is not white, or if something not white lies on each of its four sides.
    """
    ink = (images < 0.985).any(1).float()
    left, up = ink.cummax(2).values, ink.cummax(1).values
    right, down = ink.flip(2).cummax(2).values.flip(2), ink.flip(1).cummax(1).values.flip(1)
    alpha = torch.maximum(ink, left * right * up * down)[:, None]
    small = functional.interpolate(
        torch.cat([images * alpha, alpha], 1), size=(side, side), mode="bilinear", antialias=True
    )
    colour = small[:, :3] / small[:, 3:].clamp(min=1e-3)
    return torch.cat([colour.clamp(0, 1), small[:, 3:]], 1)


class Painter:
    """Draws scenes."""

    def __init__(self) -> None:
        data = load_emoji_set()
        self.mains = [i for i, caption in enumerate(data.captions) if caption not in ITEMS]
        self.main = cutouts(data.images, MAIN)
        self.small = cutouts(data.images[[data.captions.index(name) for name in ITEMS]], SMALL)

    @staticmethod
    def _corner(corner: int) -> tuple[slice, slice]:
        y, x = (corner // 2) * (SIDE - SMALL), (corner % 2) * (SIDE - SMALL)
        return slice(y, y + SMALL), slice(x, x + SMALL)

    def draw(self, scene: Scene) -> Tensor:
        """The image `[3, 64, 64]`."""
        canvas = torch.tensor(BACKGROUNDS[scene.background])[:, None, None].repeat(1, SIDE, SIDE)
        top, left = (SIDE - MAIN) // 2 + scene.shift[0], (SIDE - MAIN) // 2 + scene.shift[1]
        self._paste(canvas, self.main[scene.main], slice(top, top + MAIN), slice(left, left + MAIN))
        for placed in scene.items:
            cutout = self.small[placed.item]
            if placed.tint is not None:
                light = cutout[:3].mean(0, keepdim=True)
                tint = torch.tensor(TINTS[placed.tint])[:, None, None]
                cutout = torch.cat([(1.25 * light * tint + 0.25 * light**3).clamp(0, 1), cutout[3:]])
            self._paste(canvas, cutout, *self._corner(placed.corner))
        if scene.effect == "grey":
            return canvas.mean(0, keepdim=True).expand(3, -1, -1).clone()
        return 1 - canvas if scene.effect == "inverted" else canvas

    @staticmethod
    def _paste(canvas: Tensor, cutout: Tensor, rows: slice, columns: slice) -> None:
        alpha = cutout[3:]
        canvas[:, rows, columns] = alpha * cutout[:3] + (1 - alpha) * canvas[:, rows, columns]

    def mask(self, plan: EditPlan) -> Tensor:
        """`[64, 64]` bool: where the edit may change the image, known from the construction."""
        if plan.kind == "global":
            return torch.ones(SIDE, SIDE, dtype=torch.bool)
        mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
        for placed in set(plan.before.items) ^ set(plan.after.items):
            rows, columns = self._corner(placed.corner)
            mask[rows, columns] |= self.small[placed.item, 3] > 0
        return mask

    def edit(self, plan: EditPlan) -> Edit:
        """The plan with its images."""
        return Edit(plan.prompt, self.draw(plan.before), self.draw(plan.after), self.mask(plan), plan.kind)


@cache
def painter() -> Painter:
    """The one painter of the process."""
    return Painter()


def _scene(rng: Random, mains: Sequence[int], items: int) -> Scene:
    kinds = rng.sample(range(len(ITEMS)), items)
    corners = rng.sample(range(4), items)
    background = "white" if rng.random() < 0.6 else rng.choice(list(BACKGROUNDS))
    placed = tuple(Placed(kind, corner) for kind, corner in zip(kinds, corners, strict=True))
    return Scene(rng.choice(mains), (rng.randint(-2, 2), rng.randint(-2, 2)), placed, background)


def _global(rng: Random, mains: Sequence[int]) -> EditPlan:
    before = _scene(rng, mains, rng.randint(0, 2))
    choice = rng.choice([*EFFECTS, *(colour for colour in BACKGROUNDS if colour != before.background)])
    if choice in EFFECTS:
        return EditPlan(EFFECTS[choice], before, replace(before, effect=choice), "global")
    return EditPlan(f"make the background {choice}", before, replace(before, background=choice), "global")


def _local(rng: Random, mains: Sequence[int]) -> EditPlan:
    verb = rng.choices(["add", "remove", "replace", "make"], [3, 2, 2, 2])[0]
    scene = _scene(rng, mains, rng.randint(1, 2))
    first, rest = scene.items[0], scene.items[1:]
    name = ITEMS[first.item]
    if verb == "add":
        before = replace(scene, items=rest)
        return EditPlan(f"add a small {name} {CORNERS[first.corner]}", before, scene, "local", first)
    if verb == "remove":
        return EditPlan(f"remove the {name}", scene, replace(scene, items=rest), "local", first)
    if verb == "make":
        tint = rng.choice(list(TINTS))
        changed = replace(first, tint=tint)
        return EditPlan(f"make the {name} {tint}", scene, replace(scene, items=(changed, *rest)), "local", changed)
    free = [i for i in range(len(ITEMS)) if i not in {placed.item for placed in scene.items}]
    changed = replace(first, item=rng.choice(free))
    after = replace(scene, items=(changed, *rest))
    return EditPlan(f"replace the {name} with the {ITEMS[changed.item]}", scene, after, "local", changed)


def draw_plan(rng: Random, mains: Sequence[int]) -> EditPlan:
    """A random edit on one of the large emoji `mains`, one in five global; held-out compositions come up too."""
    return _global(rng, mains) if rng.random() < 0.2 else _local(rng, mains)


def held_out_plans(n: int, seed: int = 0) -> list[EditPlan]:
    """The first `n` held-out edits of a seed, with distinct prompts; at most one in eight is global."""
    rng, mains, plans, prompts = Random(seed), painter().mains, list[EditPlan](), set[str]()
    while len(plans) < n:
        plan = draw_plan(rng, mains)
        many = 8 * sum(p.kind == "global" for p in plans) > len(plans)
        if plan.held_out and plan.prompt not in prompts and not (plan.kind == "global" and many):
            plans.append(plan)
            prompts.add(plan.prompt)
    return plans
