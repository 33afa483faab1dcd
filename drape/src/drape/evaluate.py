"""Textures judged over whole walks, plainly and behind defences, as plain values for JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drape.defences import Purified, aggregate, consensus
from drape.detectors.base import Detection, Detector
from drape.errors import ConfigError
from drape.metrics import (
    average_precision,
    confidences,
    frame_success,
    longest_run,
    sequence_success,
    track_recall,
)
from drape.optimise import Scene

__all__ = ["DEFENCES", "detect_walk", "evaluate", "evaluate_defences", "recovered"]

DEFENCES = ("aggregate", "median", "consensus")
BATCH = 4  # frames a detector sees at once
Textures = Mapping[str, Tensor]


def detect_walk(detector: Detector, scene: Scene, textures: Textures) -> list[Detection]:
    """Detections of every frame, with scores brought to a threshold of .5 so that detectors can be compared.

    Scores below the detector's own threshold are stretched over [0, .5], those above over [.5, 1].
    """
    with torch.no_grad():
        frames = scene.render(textures)
    found = [d for part in frames.split(BATCH) for d in detector.detect(part)]
    at = detector.threshold
    return [
        Detection(d.boxes, torch.where(d.scores < at, d.scores / (2 * at), 0.5 + (d.scores - at) / (2 * (1 - at))))
        for d in found
    ]


def summary(walks: Sequence[list[Detection]], scenes: Sequence[Scene]) -> dict[str, Any]:
    """The metrics of `drape.metrics` over all walks, and the confidences of each."""
    curves = [confidences(d, s.buffers.boxes) for d, s in zip(walks, scenes, strict=True)]
    runs = [longest_run(d) for d in curves]
    tracks = [track_recall(d, s.buffers.boxes) for d, s in zip(walks, scenes, strict=True)]
    frames = np.concatenate(curves)
    return {
        "ap50": average_precision([d for w in walks for d in w], torch.cat([s.buffers.boxes for s in scenes])),
        "recall": 1 - frame_success(frames),
        "mean_confidence": float(frames.mean()),
        "sequence_success_10": sequence_success(curves, 0.1),
        "sequence_success_50": sequence_success(curves, 0.5),
        "longest_run": float(np.mean(runs)),
        "track_recall": float(np.mean(tracks)),
        "curves": {s.label: d.tolist() for s, d in zip(scenes, curves, strict=True)},
    }


def evaluate(detector: Detector, scenes: Sequence[Scene], textures: Textures) -> dict[str, Any]:
    """A detector without defence."""
    check_scenes(scenes)
    return summary([detect_walk(detector, scene, textures) for scene in scenes], scenes)


def evaluate_defences(
    detector: Detector, scenes: Sequence[Scene], textures: Textures, others: Sequence[Detector] = ()
) -> dict[str, dict[str, Any]]:
    """A detector behind each of `DEFENCES`; consensus only with `others` to agree with."""
    check_scenes(scenes)
    plain = [detect_walk(detector, scene, textures) for scene in scenes]
    median = Purified(detector)
    result = {
        "aggregate": summary([aggregate(walk) for walk in plain], scenes),
        "median": summary([detect_walk(median, scene, textures) for scene in scenes], scenes),
    }
    if others:
        walks = [
            consensus([walk, *(detect_walk(other, scene, textures) for other in others)])
            for walk, scene in zip(plain, scenes, strict=True)
        ]
        result["consensus"] = summary(walks, scenes)
    return result


def recovered(clean: float, attacked: float, defended: float) -> float | None:
    """Share of the lost recall that a defence wins back; none if nothing was lost."""
    lost = clean - attacked
    return (defended - attacked) / lost if lost > 1e-9 else None


def check_scenes(scenes: Sequence[Scene]) -> None:
    """Refuse an empty list, and two scenes of the same label."""
    labels = [scene.label for scene in scenes]
    if not labels or len(set(labels)) != len(labels):
        raise ConfigError(f"scenes {labels}; expected at least one, each with a label of its own.")
