"""What every detector gives: candidate person boxes with scores, differentiable, before and after suppression.

Shapes: `B` frames, `A` candidates per frame, `N` boxes left in one frame. Boxes are (x0, y0, x1, y1) in pixels of the
given frames; scores lie in [0, 1].
"""

from __future__ import annotations

import traceback
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drape.errors import ConfigError, DetectorError, DrapeError

__all__ = ["Candidates", "Detection", "Detector", "box_iou", "non_maximum_suppression"]

TOLERANCE = 1e-3  # that scores may lie beside [0, 1] by
INVERTED = 0.5  # share of the boxes that may end before they begin
SHARES = 1.5  # boxes that all lie below it are not in pixels


@dataclass(frozen=True)
class Candidates:
    """Every person box a detector considers.

    Attributes:
        boxes: `[B, A, 4]`.  scores: `[B, A]`, with gradients to the frames.
    """

    boxes: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Detection:
    """What is left in one frame, best first: boxes `[N, 4]`, scores `[N]`."""

    boxes: Tensor
    scores: Tensor


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes `[..., A, 4]` with boxes `[..., C, 4]`, `[..., A, C]`."""
    low = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])
    high = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    shared = (high - low).clamp_min(0).prod(dim=-1)
    area_a, area_b = ((x[..., 2:] - x[..., :2]).clamp_min(0).prod(dim=-1) for x in (a, b))
    return shared / (area_a[..., :, None] + area_b[..., None, :] - shared).clamp_min(1e-9)


def non_maximum_suppression(boxes: Tensor, scores: Tensor, overlap: float = 0.5) -> Tensor:
    """Greedy suppression of boxes `[A, 4]`; the indices that stay, best first."""
    order = scores.argsort(descending=True)
    iou = box_iou(boxes, boxes)
    kept: list[int] = []
    while len(order):
        best = int(order[0])
        kept.append(best)
        order = order[1:][iou[best, order[1:]] <= overlap]
    return torch.tensor(kept, dtype=torch.long, device=boxes.device)


def checked(name: str, found: Candidates, images: Tensor) -> Candidates:
    """The candidates, if they are what `Candidates` says; where there are none, one of no size with the score 0.

    Raises:
        DetectorError: shapes do not match, a value is not finite, scores are not in [0, 1], boxes are not in pixels or
            end before they begin, or a gradient is asked for and there is none.
    """
    if not isinstance(found, Candidates):
        raise DetectorError(f"{name} gave a {type(found).__name__}; expected drape.detectors.base.Candidates.")
    boxes, scores, count = found.boxes, found.scores, len(images)
    if scores.ndim != 2 or len(scores) != count or boxes.shape != (*scores.shape, 4):
        shapes = f"boxes {tuple(boxes.shape)} and scores {tuple(scores.shape)}"
        raise DetectorError(f"{name} gave {shapes} for {count} frames; expected [B, A, 4] and [B, A].")
    if scores.shape[1] == 0:
        nothing = images.flatten(1).sum(dim=1, keepdim=True) * 0  # keeps the way back to the frames
        return Candidates(boxes.new_zeros(count, 1, 4), nothing.to(scores))
    if not bool(torch.isfinite(scores).all()) or not bool(torch.isfinite(boxes).all()):
        raise DetectorError(
            f"{name} gave scores or boxes that are not finite; check its weights and its input's scale."
        )
    low, high = float(scores.detach().min()), float(scores.detach().max())
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        raise DetectorError(f"{name} gave scores from {low:.3g} to {high:.3g}; expected 0 to 1. Are they logits?")
    largest = float(boxes.detach().abs().max())
    if 0 < largest <= SHARES:
        raise DetectorError(f"{name} gave boxes up to {largest:.3g}; expected pixels. Are they shares of the image?")
    if float(((boxes[..., 2:] < boxes[..., :2]).any(dim=-1)).float().mean()) > INVERTED:
        raise DetectorError(
            f"{name} gave boxes that end before they begin; expected (x0, y0, x1, y1). Are they centre and size?"
        )
    if torch.is_grad_enabled() and images.requires_grad and not scores.requires_grad:
        raise DetectorError(
            f"{name} gave scores without a gradient to the frames, so nothing can be optimised against it; it can be "
            "evaluated only."
        )
    return found


def check_scale(detector: Detector) -> None:
    """Refuse a threshold or an input's side with which scores and boxes cannot be scaled."""
    if not 0 < detector.threshold < 1 or detector.input_size < 1:
        raise ConfigError(
            f"detector {detector.name!r}: threshold={detector.threshold}, input_size={detector.input_size}; expected a "
            "threshold between 0 and 1, and a side of 1 or more."
        )


class Detector(nn.Module):
    """Base of all detectors. Frozen and in evaluation mode: batch norms must not learn from what they are shown.

    Args:
        name: what reports call it.
        input_size: side in pixels of the square that the network sees; frames are resized to it.
        threshold: the score at or above which a person counts as found.
    """

    def __init__(self, name: str, input_size: int, threshold: float = 0.5) -> None:
        super().__init__()
        self.name = name
        self.input_size = input_size
        self.threshold = threshold
        check_scale(self)

    @abstractmethod
    def candidates(self, images: Tensor) -> Candidates:
        """Candidates for frames `[B, 3, input_size, input_size]`, boxes in those pixels."""

    def forward(self, images: Tensor) -> Candidates:
        """Candidates for frames `[B, 3, S, S]` in [0, 1], boxes in the frames' pixels.

        Raises:
            ConfigError: the frames are not square RGB.
            DetectorError: the network failed, or what it gave are not boxes in pixels with scores in [0, 1].
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
            raise ConfigError(f"frames have shape {tuple(images.shape)}; expected [B, 3, S, S]. Pad them to squares.")
        side = images.shape[-1]
        if side != self.input_size:
            size = (self.input_size, self.input_size)
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=side > size[0])
        try:
            found = self.candidates(images)
        except DrapeError:
            raise
        except Exception as error:  # whatever a user's network raises, it is not a fault of drape
            at = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__}: {error}; {Path(at.filename).name}, line {at.lineno}"
            raise DetectorError(f"{self.name} failed on frames {tuple(images.shape)} ({where}).") from error
        found = checked(self.name, found, images)
        return Candidates(found.boxes * (side / self.input_size), found.scores)

    @torch.no_grad()
    def detect(self, images: Tensor, threshold: float = 0.05, overlap: float = 0.5) -> list[Detection]:
        """Boxes at or above `threshold` that suppression leaves, for each frame."""
        found = self(images)
        result = []
        for boxes, scores in zip(found.boxes, found.scores, strict=True):
            above = scores >= threshold
            kept = non_maximum_suppression(boxes[above], scores[above], overlap)
            result.append(Detection(boxes[above][kept], scores[above][kept]))
        return result

    def scaled(self, scores: Tensor) -> Tensor:
        """Scores brought to a threshold of .5, so that detectors can be compared and averaged.

        Those below the detector's own threshold are stretched over [0, .5], those above over [.5, 1].
        """
        at = self.threshold
        return torch.where(scores < at, scores / (2 * at), 0.5 + (scores - at) / (2 * (1 - at)))

    def weights(self) -> list[nn.Parameter]:
        """The weights that fine-tuning may change, from the input to the output."""
        return list(self.parameters())

    def freeze(self) -> Detector:
        """Evaluation mode and no gradients to the weights; the gradient to the frames stays."""
        self.eval()
        self.requires_grad_(False)
        return self
