"""Pictures and classes of the tokenizer and the autoregressive models: the emoji of `emoji-flux`, in two sets.

One picture in ten is held out. Classes are the last words of the captions that occur often enough ("red apple" and
"green apple" are apples), and "other". Training pictures are varied by mirroring, shifts and hue.

Shapes: pictures `[N, 3, 64, 64]` float32 in [0, 1], on white.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.zoo.emoji_flux.data import load_emoji_set

__all__ = ["TokenSet", "load_token_set", "varied"]

HELD_OUT = 10
LEAST = 3  # pictures of a class
SHIFT = 4  # pixels


@dataclass(frozen=True)
class TokenSet:
    """Two sets of pictures with their classes.

    Attributes:
        names: of the classes; the last is `"other"`.
        train, test: pictures.
        train_classes, test_classes: `[N]` int64.
    """

    names: list[str]
    train: Tensor
    train_classes: Tensor
    test: Tensor
    test_classes: Tensor


def load_token_set() -> TokenSet:
    """The shipped pictures, always split alike."""
    data = load_emoji_set()
    words = [caption.split()[-1] for caption in data.captions]
    names = sorted(word for word, count in Counter(words).items() if count >= LEAST)
    names.append("other")
    classes = torch.tensor([names.index(word) if word in names else len(names) - 1 for word in words])
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(words) // HELD_OUT], order[len(words) // HELD_OUT :]
    return TokenSet(names, data.pictures[train], classes[train], data.pictures[test], classes[test])


def varied(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """The pictures, each mirrored or not, shifted by up to 4 pixels, its colour channels exchanged now and then."""
    n = len(pictures)
    padded = torch.nn.functional.pad(pictures, [SHIFT] * 4, value=1.0)
    size = pictures.shape[-1]
    dy, dx = torch.randint(2 * SHIFT + 1, (2, n), generator=generator)
    rows = torch.arange(size) + dy[:, None]
    columns = torch.arange(size) + dx[:, None]
    mirrored = torch.rand(n, generator=generator) < 0.5
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    moved = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    for i in torch.nonzero(torch.rand(n, generator=generator) < 0.3).flatten().tolist():
        moved[i] = moved[i, torch.randperm(3, generator=generator)]
    return moved
