"""How well a person is seen: average precision, success per frame and per sequence, runs, track recall, curves,
transfer.

All of them work on plain confidences or on `Detection`s, so a detector can be judged with or without a defence in
front or behind. "Success" is the attack's: the share of frames or sequences in which the person is missed.

Shapes: `T` frames of one sequence; boxes as in `drape.detectors.base`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drape.detectors.base import Detection, box_iou
from drape.errors import ConfigError

__all__ = [
    "average_precision",
    "azimuth_curve",
    "confidences",
    "frame_success",
    "group_means",
    "longest_run",
    "recall_area",
    "sequence_success",
    "track_recall",
    "transfer_matrix",
]

Floats = NDArray[np.float64]


def confidences(detections: Sequence[Detection], truth: Tensor, overlap: float = 0.5) -> Floats:
    """The best score among boxes that overlap the true box by `overlap`, 0 if none does, `[T]`."""
    check_same_length(detections, truth)
    best = [
        float((found.scores * (box_iou(found.boxes, box[None])[:, 0] >= overlap)).max()) if len(found.scores) else 0.0
        for found, box in zip(detections, truth, strict=True)
    ]
    return np.array(best)


def check_same_length(detections: Sequence[Detection], truth: Tensor) -> None:
    """Refuse detections and true boxes of different numbers of frames."""
    if truth.shape != (len(detections), 4) or len(detections) == 0:
        raise ConfigError(f"true boxes {tuple(truth.shape)} for {len(detections)} frames; expected one box per frame.")


def average_precision(detections: Sequence[Detection], truth: Tensor, overlap: float = 0.5) -> float:
    """Area under the precision-recall curve, all points interpolated (PASCAL VOC 2010), one true person per frame.

    Each true box is matched once, by the highest score that overlaps it; further boxes are false.
    """
    check_same_length(detections, truth)
    scored: list[tuple[float, bool]] = []
    for found, box in zip(detections, truth, strict=True):
        order = found.scores.argsort(descending=True)
        hits = (
            box_iou(found.boxes[order], box[None])[:, 0] >= overlap if len(order) else torch.zeros(0, dtype=torch.bool)
        )
        first = int(hits.int().argmax()) if bool(hits.any()) else -1
        scored += [(float(s), i == first) for i, s in enumerate(found.scores[order])]
    if not scored:
        return 0.0
    values, correct = np.array([s for s, _ in scored]), np.array([c for _, c in scored])
    correct = correct[np.argsort(-values, kind="stable")]
    recall = np.cumsum(correct) / len(truth)
    precision = np.cumsum(correct) / np.arange(1, len(correct) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(np.concatenate([[0.0], recall])) * envelope))


def detected(d: Floats, threshold: float) -> NDArray[np.bool_]:
    """Which frames see the person; refuses what is no row of confidences."""
    values = np.asarray(d, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ConfigError(f"confidences have shape {values.shape}; expected finite numbers [T], at least one.")
    return values >= threshold


def recall_area(d: Floats) -> float:
    """Area under recall over the threshold, from 0 to 1: the continuous measure of how well a person is seen.

    At a threshold c the recall is the share of frames with a confidence of c or more; its integral over c in [0, 1]
    is the mean of the confidences. It uses how sure the detector is in each frame, where recall at one threshold uses
    a bit.
    """
    detected(d, 0.5)
    return float(np.clip(d, 0.0, 1.0).mean())


def frame_success(d: Floats, threshold: float = 0.5) -> float:
    """Share of frames in which the person is missed."""
    return float(1 - detected(d, threshold).mean())


def sequence_success(sequences: Sequence[Floats], share: float = 0.1, threshold: float = 0.5) -> float:
    """Share of sequences in which the person is seen in fewer than `share` of the frames."""
    if not sequences or not 0 < share <= 1:
        raise ConfigError(f"{len(sequences)} sequences, share={share}; expected at least one, and a share in (0, 1].")
    return float(np.mean([detected(d, threshold).mean() < share for d in sequences]))


def longest_run(d: Floats, threshold: float = 0.5) -> int:
    """The most frames in a row that see the person."""
    longest = run = 0
    for seen in detected(d, threshold):
        run = run + 1 if seen else 0
        longest = max(longest, run)
    return longest


def track_recall(
    detections: Sequence[Detection], truth: Tensor, *, threshold: float = 0.5, memory: int = 5, overlap: float = 0.3
) -> float:
    """Share of frames in which a simple tracker holds the person.

    A box at or above `threshold` that overlaps the true one begins or renews the track; between, the track keeps its
    last box for up to `memory` frames, and holds the person as long as that box still overlaps the true one.
    """
    check_same_length(detections, truth)
    held, age = 0, memory + 1
    last: Tensor | None = None
    for found, box in zip(detections, truth, strict=True):
        boxes = found.boxes[found.scores >= threshold]
        iou = box_iou(boxes, box[None])[:, 0]
        age += 1
        if len(boxes) and float(iou.max()) >= overlap:
            last, age = boxes[iou.argmax()], 0
        if last is not None and age <= memory and float(box_iou(last[None], box[None])) >= overlap:
            held += 1
    return held / len(truth)


def azimuth_curve(azimuth: Floats, d: Floats, angles: int = 37, width: float = 10.0) -> tuple[Floats, Floats]:
    """Mean confidence against the side that is seen.

    Args:
        azimuth: degrees.  d: confidences, as many.  angles: points from 0 to 360, both included.
        width: degrees of the window around each of them, on the circle.

    Returns:
        angles and means, `[angles]`; nan where no frame was seen from.
    """
    sides, values = np.asarray(azimuth, dtype=np.float64), np.asarray(d, dtype=np.float64)
    if sides.shape != values.shape or sides.ndim != 1 or angles < 2 or width <= 0:
        raise ConfigError(f"azimuths {sides.shape}, confidences {values.shape}; expected two rows of the same length.")
    centres = np.linspace(0.0, 360.0, angles)
    away = np.abs((sides[None] - centres[:, None] + 180) % 360 - 180)
    near = away <= width / 2
    count = near.sum(axis=1)
    return centres, np.where(count > 0, (near * values).sum(axis=1) / np.maximum(count, 1), np.nan)


def group_means(labels: Sequence[str], d: Sequence[Floats]) -> dict[str, float]:
    """Mean confidence of the sequences with each label, such as their lights or gaits."""
    if len(labels) != len(d) or not labels:
        raise ConfigError(f"{len(labels)} labels for {len(d)} sequences; expected one each.")
    groups = {label: np.concatenate([x for k, x in zip(labels, d, strict=True) if k == label]) for label in labels}
    return {label: float(values.mean()) for label, values in groups.items()}


def transfer_matrix(results: Mapping[str, Mapping[str, float]]) -> tuple[list[str], list[str], Floats]:
    """A table from nested results: rows are what was optimised against, columns what was tested.

    Raises:
        ConfigError: the rows do not have the same columns.
    """
    rows = list(results)
    columns = list(results[rows[0]]) if rows else []
    if not columns or any(set(results[row]) != set(columns) for row in rows):
        raise ConfigError("every row must have the same columns, and there must be at least one of each.")
    return rows, columns, np.array([[results[row][column] for column in columns] for row in rows])
