"""What every detector gives: candidate person boxes with scores, differentiable, before and after suppression.

Shapes: `B` frames, `A` candidates per frame, `N` boxes left in one frame. Boxes are (x0, y0, x1, y1) in pixels of the
given frames; scores lie in [0, 1].
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drape.errors import ConfigError

__all__ = ["Candidates", "Detection", "Detector", "box_iou", "non_maximum_suppression"]


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

    @abstractmethod
    def candidates(self, images: Tensor) -> Candidates:
        """Candidates for frames `[B, 3, input_size, input_size]`, boxes in those pixels."""

    def forward(self, images: Tensor) -> Candidates:
        """Candidates for frames `[B, 3, S, S]` in [0, 1], boxes in the frames' pixels.

        Raises:
            ConfigError: the frames are not square RGB.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
            raise ConfigError(f"frames have shape {tuple(images.shape)}; expected [B, 3, S, S]. Pad them to squares.")
        side = images.shape[-1]
        if side != self.input_size:
            size = (self.input_size, self.input_size)
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=side > size[0])
        found = self.candidates(images)
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

    def weights(self) -> list[nn.Parameter]:
        """The weights that fine-tuning may change, from the input to the output."""
        return list(self.parameters())

    def freeze(self) -> Detector:
        """Evaluation mode and no gradients to the weights; the gradient to the frames stays."""
        self.eval()
        self.requires_grad_(False)
        return self
