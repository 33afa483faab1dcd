"""Defences that need no training: aggregation over time, consensus of detectors, and purification of the input.

The first two merge detections and suppress doubles; what they cost shows as more false boxes, in AP on clean walks.
`Purified` takes fine structure away before a detector sees the frame (a median filter, Xu et al., "Feature Squeezing",
arXiv:1704.01155), and costs detail.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from drape.detectors.base import Candidates, Detection, Detector, non_maximum_suppression
from drape.errors import ConfigError

__all__ = ["Purified", "aggregate", "consensus", "merge"]


def merge(parts: Sequence[Detection], overlap: float = 0.5) -> Detection:
    """All boxes of several detections of one frame, doubles suppressed."""
    boxes, scores = torch.cat([p.boxes for p in parts]), torch.cat([p.scores for p in parts])
    kept = non_maximum_suppression(boxes, scores, overlap)
    return Detection(boxes[kept], scores[kept])


def aggregate(detections: Sequence[Detection], reach: int = 2, overlap: float = 0.5) -> list[Detection]:
    """Each frame with the boxes of the `reach` frames before and after it: a short miss is bridged."""
    if reach < 0 or not detections:
        raise ConfigError(f"reach={reach}, {len(detections)} frames; expected 0 or more, and at least one frame.")
    return [merge(detections[max(t - reach, 0) : t + reach + 1], overlap) for t in range(len(detections))]


def consensus(by_detector: Sequence[Sequence[Detection]], overlap: float = 0.5) -> list[Detection]:
    """Boxes that any of several detectors sees; bring their scores to one threshold first.

    Args:
        by_detector: each detector's detections of the same frames.
    """
    lengths = {len(detections) for detections in by_detector}
    if len(lengths) != 1 or lengths == {0}:
        raise ConfigError(f"detections of {sorted(lengths)} frames; expected the same, at least one, of each detector.")
    return [merge(parts, overlap) for parts in zip(*by_detector, strict=True)]


class Purified(Detector):
    """A detector behind a median filter.

    Args:
        inner: the detector.  size: odd side of the filter's window, in pixels of the detector's input.
    """

    def __init__(self, inner: Detector, size: int = 5) -> None:
        super().__init__(f"{inner.name}+median{size}", inner.input_size, inner.threshold)
        if size < 3 or size % 2 == 0:
            raise ConfigError(f"size={size}; expected an odd number, 3 or more.")
        self.inner, self.size = inner, size
        self.freeze()

    def candidates(self, images: Tensor) -> Candidates:
        reach = self.size // 2
        padded = F.pad(images, (reach, reach, reach, reach), mode="replicate")
        windows = padded.unfold(2, self.size, 1).unfold(3, self.size, 1).flatten(4)
        return self.inner.candidates(windows.median(dim=-1).values)
