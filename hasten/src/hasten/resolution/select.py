"""Which coarse tokens an edit touches: selectors, guards, dilation, the coverage set. Maps are `[h, w]` of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from hasten.errors import ConfigError, unknown

__all__ = [
    "EditMap",
    "Selection",
    "Selector",
    "above",
    "changed_tokens",
    "coverage",
    "dilate",
    "everything",
    "select",
    "top",
    "two_means",
]

Selector = Literal["two-means", "threshold", "top"]
ROUNDS = 20
LEAST = 0.05  # share that is taken where nothing stands out
UNEDITED, MARGIN = 0.95, 4.0  # quantile of unedited tokens' squared distances, and how far beyond it an edit begins


@dataclass(frozen=True)
class Selection:
    """Which tokens an edit touches.

    Attributes:
        chosen: `[h, w]` bool, before dilation.
        everywhere: whether all are chosen, as in a global edit.
        cut: least score among the chosen.
    """

    chosen: Tensor
    everywhere: bool
    cut: float

    @property
    def share(self) -> float:
        """Share of the tokens that were chosen."""
        return float(self.chosen.float().mean())


@dataclass(frozen=True, eq=False)
class EditMap:
    """What was found when an image's draft was verified. Maps are `[h, w]` of coarse tokens.

    Attributes:
        run: counts runs from 0.
        image: number within the batch.
        distance: discrepancy between draft and source.
        chosen: bool, selected, before dilation.
        fine: bool, promoted.
        everywhere: whether the edit is global.
        cut: least distance among the selected tokens.
        reverified: bool, selected when the locked tokens were verified again.
    """

    run: int
    image: int
    distance: Tensor
    chosen: Tensor
    fine: Tensor
    everywhere: bool
    cut: float
    reverified: Tensor

    def __str__(self) -> str:
        edited, promoted = int(self.edited.sum()), int(self.fine.sum())
        kind = "global edit, " if self.everywhere else ""
        return f"{kind}{edited} of {self.fine.numel()} coarse tokens edited, {promoted} fine"

    @classmethod
    def of(cls, run: int, image: int, distance: Tensor, selection: Selection, stride: int | None) -> EditMap:
        """The map of an image: what is selected, dilated, and the coverage set of `stride`."""
        chosen = selection.chosen
        spread = coverage((chosen.shape[0], chosen.shape[1]), stride, chosen.device)
        fine = torch.ones_like(chosen) if selection.everywhere else dilate(chosen) | spread
        return cls(run, image, distance, chosen, fine, selection.everywhere, selection.cut, torch.zeros_like(chosen))

    @property
    def edited(self) -> Tensor:
        """`[h, w]` bool, all that was selected, dilated: the coverage set is not in it."""
        return dilate(self.chosen | self.reverified)


def two_means(scores: Tensor) -> Tensor:
    """The tokens of the higher of two clusters of scores (k-means in one dimension, begun at the least and greatest).

    All scores equal means none.
    """
    low, high = scores.min(), scores.max()
    upper = torch.zeros_like(scores, dtype=torch.bool)
    if low == high:
        return upper
    for _ in range(ROUNDS):
        upper = scores > (low + high) / 2
        low, high = scores[~upper].mean(), scores[upper].mean()
    return upper


def above(scores: Tensor, threshold: float) -> Tensor:
    """The tokens whose score is above a fixed threshold."""
    return scores > threshold


def top(scores: Tensor, share: float) -> Tensor:
    """The `ceil(share n)` tokens with the highest scores; among equal ones the first in raster order."""
    flat = scores.flatten()
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.sort(descending=True, stable=True).indices[: math.ceil(share * len(flat) - 1e-9)]] = True
    return chosen.reshape(scores.shape)


def select(
    scores: Tensor,
    selector: Selector = "two-means",
    *,
    threshold: float = 0.2,
    share: float = 0.2,
    bounds: tuple[float, float] = (0.05, 0.6),
) -> Selection:
    """The tokens that an edit touches, never none of them.

    Args:
        scores: `[h, w]`, higher where draft and source differ more.
        selector: `"two-means"`, `"threshold"` or `"top"`.
        threshold: of the selector `"threshold"`.
        share: of the selector `"top"`.
        bounds: least and greatest share. Fewer are filled up with the highest scores, and none becomes at least 5 per
            cent; with more the edit counts as global and all tokens are chosen. `"top"` has its own share instead.
    """
    if scores.dim() != 2 or not bool(torch.isfinite(scores).all()):
        raise ConfigError(f"scores are a finite map [h, w], got shape {list(scores.shape)}")
    if selector not in get_args(Selector):
        raise unknown("selector", selector, get_args(Selector))
    if selector == "top":
        return _selection(scores, top(scores, share))
    chosen = two_means(scores) if selector == "two-means" else above(scores, threshold)
    found = int(chosen.sum()) / chosen.numel()  # exact: a share equal to a bound is within it
    if found > bounds[1]:
        return everything(scores)
    if found == 0:
        chosen = top(scores, max(LEAST, bounds[0]))
    elif found < bounds[0]:
        chosen = top(scores, bounds[0])
    return _selection(scores, chosen)


def _selection(scores: Tensor, chosen: Tensor) -> Selection:
    return Selection(chosen, bool(chosen.all()), float(scores[chosen].min()))


def dilate(chosen: Tensor, by: int = 1) -> Tensor:
    """The tokens and their neighbours up to `by` steps away, diagonals too."""
    grown = functional.max_pool2d(chosen[None, None].float(), 2 * by + 1, stride=1, padding=by)
    return grown[0, 0] > 0


def everything(scores: Tensor) -> Selection:
    """All tokens."""
    return _selection(scores, torch.ones_like(scores, dtype=torch.bool))


def coverage(size: tuple[int, int], stride: int | None, device: torch.device | None = None) -> Tensor:
    """An evenly spread set that holds the structure together: one token in `stride` along rows and columns.

    Args:
        size: rows and columns.
        stride: `g`; tokens with `row % g == g // 2` and `column % g == g // 2`. None for no tokens.
        device: of the map.
    """
    if stride is None:
        return torch.zeros(size, dtype=torch.bool, device=device)
    if stride < 1:
        raise ConfigError(f"the stride of the coverage set is a positive number or None, got {stride}")
    rows, columns = (torch.arange(side, device=device) % stride == stride // 2 for side in size)
    return rows[:, None] & columns[None]


def changed_tokens(clean: Tensor, source: Tensor, edited: Tensor, fine: Tensor) -> Tensor:
    """Fine tokens of the edited region that differ from the source by more than tokens do that no edit touches.

    Args:
        clean: estimate of the clean fine tokens, `[B, 4 h w, C]`.
        source: the source's.
        edited: `[h, w]` bool, coarse tokens of the region.
        fine: `[h, w]` bool, coarse tokens for which `clean` is known; those outside the region are unedited.

    Returns:
        `[2 h, 2 w]` bool, in any image of the batch; the whole region if no unedited token is known, or if nothing
        of it stands out.
    """
    region, control = _spread(edited), _spread(fine & ~edited)
    if not bool(control.any()):
        return region
    distance = (clean - source).float().square().mean(-1).unflatten(1, region.shape)
    floor = distance[:, control].quantile(UNEDITED, dim=1)
    changed = region & (distance > MARGIN * floor[:, None, None]).any(0)
    return changed if bool(changed.any()) else region


def _spread(mask: Tensor) -> Tensor:
    """`[h, w]` of coarse tokens as `[2 h, 2 w]` of fine ones."""
    return mask.repeat_interleave(2, 0).repeat_interleave(2, 1)
