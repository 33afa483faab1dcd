"""The threshold of a detector, set by its false boxes: as low as clean frames allow.

Fine-tuning moves scores, so a threshold that suited a detector before may not suit it after. Here it is brought to the
lowest value at which clean walks and empty places give no more false boxes than a limit. The walks are those that
textures are optimised on, never those that judge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from drape.detectors.base import Detection, Detector, box_iou
from drape.errors import ConfigError
from drape.scene.scene import Scene

__all__ = ["FLOOR", "false_scores", "scores_of_false_boxes", "threshold_keeping", "threshold_with"]

FLOOR = 0.05  # below it detectors give no boxes
STEP = 1e-3  # that a threshold is put above the score that it has to shut out


def false_scores(found: Detection, truth: Tensor, overlap: float = 0.5) -> list[float]:
    """Scores of the boxes of one frame that are not on the person, whose box is `truth` `[4]`."""
    wrong = box_iou(found.boxes, truth[None])[:, 0] < overlap
    return [float(score) for score in found.scores[wrong]]


def scores_of_false_boxes(
    detector: Detector, scenes: Sequence[Scene], clothes: Sequence[Mapping[str, Tensor]]
) -> list[float]:
    """The scores of all false boxes on the scenes in each of the clothes, and in their empty places, highest first."""
    if not scenes or not clothes:
        raise ConfigError("nothing to set a threshold by: give at least one scene and clothes for it.")
    scores: list[float] = []
    for scene in scenes:
        empty = detector.detect(scene.plate.still()[None], threshold=FLOOR)[0]
        scores += [float(score) for score in empty.scores]
        for textures in clothes:
            for t in range(scene.buffers.frames):
                with torch.no_grad():
                    found = detector.detect(scene.render(textures, [t]), threshold=FLOOR)[0]
                scores += false_scores(found, scene.buffers.boxes[t])
    return sorted(scores, reverse=True)


def threshold_with(scores: Sequence[float], allowed: int, highest: float) -> float:
    """The lowest threshold at which no more than `allowed` of the false boxes remain, and not above `highest`.

    Args:
        scores: of false boxes, highest first.
    """
    if allowed < 0 or not FLOOR <= highest <= 1:
        raise ConfigError(f"allowed={allowed}, highest={highest}; expected 0 or more, and {FLOOR} to 1.")
    lowest = FLOOR if len(scores) <= allowed else scores[allowed] + STEP
    return min(max(lowest, FLOOR), highest)


def threshold_keeping(before: Sequence[float], after: Sequence[float], threshold: float) -> float:
    """The lowest threshold at which as many false boxes remain as there were before at `threshold`, and not above it.

    Args:
        before, after: scores of false boxes, highest first.
    """
    return threshold_with(after, sum(score >= threshold for score in before), threshold)
