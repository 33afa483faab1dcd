"""Defences that need no training: aggregation over time, several detectors together, and purification of the input.

Aggregation looks at frames that have passed, never at those to come, so it can run beside a camera. Several detectors
are joined by agreement (`consensus`) or by any of them (`union`). What these cost shows as false boxes on clean walks.
`Purified` takes fine structure away before a detector sees the frame (a median filter, Xu et al., "Feature Squeezing",
arXiv:1704.01155), and costs detail.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from drape.detectors.base import Candidates, Detection, Detector, box_iou, non_maximum_suppression
from drape.errors import ConfigError

__all__ = ["Purified", "aggregate", "consensus", "merge", "union"]

SURE = 0.5  # scores are scaled to this threshold
STEP, GROWTH = 0.5, 1.3  # of a person from frame to frame: share of its height that it moves, factor of its size


def merge(parts: Sequence[Detection], overlap: float = 0.5) -> Detection:
    """All boxes of several detections of one frame, doubles suppressed."""
    boxes, scores = torch.cat([p.boxes for p in parts]), torch.cat([p.scores for p in parts])
    kept = non_maximum_suppression(boxes, scores, overlap)
    return Detection(boxes[kept], scores[kept])


@dataclass(frozen=True)
class Track:
    """A person that was seen: box `[4]`, score, what the box moves by per frame, and frames since it was seen."""

    box: Tensor
    score: Tensor
    step: Tensor
    age: int = 0

    def moved_on(self) -> Track:
        """The same person one frame later, unseen."""
        return Track(self.box + self.step, self.score, self.step, self.age + 1)


def aggregate(detections: Sequence[Detection], reach: int = 2, overlap: float = 0.5) -> list[Detection]:
    """Each frame with the persons that were seen up to `reach` frames before it, moved on: a short miss is bridged.

    A person goes on as between the last two frames that were sure of it, and is given up when a frame is sure of it
    again. Scores are to be scaled to a threshold of .5.
    """
    if reach < 0 or not detections:
        raise ConfigError(f"reach={reach}, {len(detections)} frames; expected 0 or more, and at least one frame.")
    result: list[Detection] = []
    tracks: list[Track] = []
    for now in detections:
        sure = now.scores >= SURE
        expected = [track.moved_on() for track in tracks]
        held, tracks = matched(expected, now.boxes[sure], now.scores[sure])
        held = [track for track in held if track.age <= reach]
        tracks += held
        if held:
            kept = Detection(torch.stack([t.box for t in held]), torch.stack([t.score for t in held]))
            now = merge([now, kept], overlap)
        result.append(now)
    return result


def matched(expected: Sequence[Track], boxes: Tensor, scores: Tensor) -> tuple[list[Track], list[Track]]:
    """Persons that no box `[N, 4]` belongs to, and the tracks of all boxes; the nearest pairs belong together."""
    steps = torch.zeros_like(boxes)
    left = set(range(len(expected)))
    if expected and len(boxes):
        far = distance(torch.stack([track.box for track in expected]), boxes)
        while bool(torch.isfinite(far).any()):
            number, place = divmod(int(far.argmin()), len(boxes))
            far[number], far[:, place] = torch.inf, torch.inf
            track = expected[number]
            begun = track.box - track.age * track.step  # where it was seen last
            steps[place] = (boxes[place] - begun) / track.age
            left.discard(number)
    return [expected[n] for n in sorted(left)], [Track(*row) for row in zip(boxes, scores, steps, strict=True)]


def distance(here: Tensor, there: Tensor) -> Tensor:
    """Between the middles of boxes `[N, 4]` and `[M, 4]`, `[N, M]`; infinite where they cannot be one person's.

    Boxes of a person who walks by need not overlap from frame to frame, so they are told by place and height.
    """
    high, other = (boxes[:, 3] - boxes[:, 1] for boxes in (here, there))
    far = torch.cdist((here[:, :2] + here[:, 2:]) / 2, (there[:, :2] + there[:, 2:]) / 2)
    growth = (high.clamp_min(1e-6)[:, None] / other.clamp_min(1e-6)).log().abs()
    return far.masked_fill((far > STEP * high[:, None]) | (growth > math.log(GROWTH)), torch.inf)


def together(by_detector: Sequence[Sequence[Detection]]) -> list[tuple[Detection, ...]]:
    """The detections of several detectors, frame by frame."""
    lengths = {len(detections) for detections in by_detector}
    if len(lengths) != 1 or lengths == {0}:
        raise ConfigError(f"detections of {sorted(lengths)} frames; expected the same, at least one, of each detector.")
    return list(zip(*by_detector, strict=True))


def union(by_detector: Sequence[Sequence[Detection]], overlap: float = 0.5) -> list[Detection]:
    """Boxes that any of several detectors sees; bring their scores to one threshold first.

    Args:
        by_detector: each detector's detections of the same frames.
    """
    return [merge(parts, overlap) for parts in together(by_detector)]


def consensus(by_detector: Sequence[Sequence[Detection]], least: int = 2, overlap: float = 0.5) -> list[Detection]:
    """Boxes that at least `least` of several detectors agree on; bring their scores to one threshold first.

    A box's score is the `least`-th highest of what the detectors give for boxes that overlap it by `overlap`, so it is
    sure only where so many of them are.
    """
    if not 1 <= least <= len(by_detector):
        raise ConfigError(f"least={least} of {len(by_detector)} detectors; expected 1 up to all of them.")
    result = []
    for parts in together(by_detector):
        boxes = torch.cat([p.boxes for p in parts])
        each = [
            (p.scores * (box_iou(boxes, p.boxes) >= overlap)).amax(dim=1)
            if len(p.scores)
            else boxes.new_zeros(len(boxes))
            for p in parts
        ]
        agreed = torch.stack(each).sort(dim=0, descending=True).values[least - 1]
        boxes, agreed = boxes[agreed > 0], agreed[agreed > 0]
        kept = non_maximum_suppression(boxes, agreed, overlap)
        result.append(Detection(boxes[kept], agreed[kept]))
    return result


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
