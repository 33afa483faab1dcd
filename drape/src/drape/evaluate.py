"""Textures judged over whole walks, plainly and behind defences, as plain values for JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drape.calibrate import false_scores
from drape.defences import Purified, aggregate, consensus, union
from drape.detectors.base import Detection, Detector
from drape.errors import ConfigError, unknown
from drape.metrics import (
    average_precision,
    azimuth_curve,
    confidences,
    frame_success,
    group_means,
    longest_run,
    recall_area,
    sequence_success,
    track_recall,
)
from drape.parallel import mapped
from drape.progress import counted
from drape.scene.light import light_name
from drape.scene.scene import Scene

__all__ = [
    "DEFENCES",
    "Judge",
    "Subject",
    "Walks",
    "defended",
    "detect_walk",
    "evaluate",
    "evaluate_defences",
    "light_curve",
    "recovered",
    "summary",
]

DEFENCES = (
    "threshold",
    "aggregate",
    "median",
    "consensus",
    "union",
    "hardened",
    "consensus+aggregate",
    "union+aggregate",
    "hardened+aggregate",
    "hardened+consensus",
)
FOUND = 0.5  # the scaled score of a detector's threshold
BATCH = 4  # frames a detector sees at once
Textures = Mapping[str, Tensor]
Walks = list[list[Detection]]


def detect_walk(detector: Detector, scene: Scene, textures: Textures) -> list[Detection]:
    """Detections of every frame, with scores brought to a threshold of .5 (`Detector.scaled`)."""
    with torch.no_grad():
        frames = scene.render(textures)
    found = [d for part in frames.split(BATCH) for d in detector.detect(part)]
    return [Detection(d.boxes, detector.scaled(d.scores)) for d in found]


def looked_at(item: tuple[Detector, Scene, Textures]) -> list[Detection]:
    """`detect_walk` of one item, for several processes."""
    return detect_walk(*item)


def summary(walks: Sequence[Sequence[Detection]], scenes: Sequence[Scene]) -> dict[str, Any]:
    """The metrics of `drape.metrics`: means over walks, which count the same whatever their length, and each walk's
    values.

    "area" is the main one; "longest_run" is a share of the walk. Beside them AP, false boxes, the confidences of each
    walk, and those by side and by light.
    """
    curves = [confidences(d, s.buffers.boxes) for d, s in zip(walks, scenes, strict=True)]
    tracks = [track_recall(d, s.buffers.boxes) for d, s in zip(walks, scenes, strict=True)]
    by_walk = {
        "area": [recall_area(d) for d in curves],
        "recall": [1 - frame_success(d) for d in curves],
        "sequence_success_50": [sequence_success([d], 0.5) for d in curves],
        "sequence_success_10": [sequence_success([d], 0.1) for d in curves],
        "longest_run": [longest_run(d) / s.buffers.frames for d, s in zip(curves, scenes, strict=True)],
        "track_recall": tracks,
    }
    beside = {
        "ap50": [average_precision(d, s.buffers.boxes) for d, s in zip(walks, scenes, strict=True)],
        "false_boxes": [false_boxes([d], [s]) for d, s in zip(walks, scenes, strict=True)],
    }
    frames = np.concatenate(curves)
    sides = np.concatenate([s.buffers.azimuth.double().numpy() for s in scenes])
    angles, means = azimuth_curve(sides, frames, width=30.0)
    return {
        "ap50": average_precision([d for w in walks for d in w], torch.cat([s.buffers.boxes for s in scenes])),
        **{name: float(np.mean(values)) for name, values in by_walk.items()},
        "mean_confidence": float(frames.mean()),
        "by_walk": {**by_walk, **beside},
        "false_boxes": false_boxes(walks, scenes),
        "curves": {s.label: d.tolist() for s, d in zip(scenes, curves, strict=True)},
        "azimuth": {f"{a:g}": None if np.isnan(m) else float(m) for a, m in zip(angles, means, strict=True)},
        "lights": group_means([light_name(s.light) for s in scenes], curves),
    }


def false_boxes(walks: Sequence[Sequence[Detection]], scenes: Sequence[Scene]) -> float:
    """Boxes per frame that are sure enough and not on the person."""
    counts = [
        sum(score >= FOUND for score in false_scores(found, box))
        for walk, scene in zip(walks, scenes, strict=True)
        for found, box in zip(walk, scene.buffers.boxes, strict=True)
    ]
    return float(np.mean(counts))


class Judge:
    """Detections of textures on walks, each looked at once.

    Args:
        scenes: at least one, with labels of their own.  jobs: processes that look at walks side by side.
    """

    def __init__(self, scenes: Sequence[Scene], jobs: int = 1) -> None:
        labels = [scene.label for scene in scenes]
        if not labels or len(set(labels)) != len(labels):
            raise ConfigError(f"scenes {labels}; expected at least one, each with a label of its own.")
        self.scenes, self.jobs = list(scenes), jobs
        self.seen: dict[tuple[str, str], Walks] = {}

    def walks(self, detector: Detector, name: str, textures: Textures) -> Walks:
        """Detections on all walks; `name` must be one texture's only."""
        key = (detector.name, name)
        if key not in self.seen:
            found = {n: self.kept(detector, name, n) for n in range(len(self.scenes))}
            missing = [n for n, walk in found.items() if walk is None]
            items = ((detector, self.scenes[n], textures) for n in missing)
            looked = zip(missing, mapped(looked_at, items, self.jobs), strict=True)
            for number, walk in counted(looked, len(missing), f"{detector.name}: {name}"):
                self.keep(detector, name, number, walk)
                found[number] = walk
            self.seen[key] = [walk for walk in found.values() if walk is not None]
        return self.seen[key]

    def kept(self, detector: Detector, name: str, number: int) -> list[Detection] | None:
        """What an earlier run saw; nothing here (`drape.store.KeptJudge` has files)."""
        return None

    def keep(self, detector: Detector, name: str, number: int, walk: list[Detection]) -> None:
        """Keep one walk's detections; nothing is done here."""

    def result(self, detector: Detector, name: str, textures: Textures) -> dict[str, Any]:
        """The metrics without defence."""
        return summary(self.walks(detector, name, textures), self.scenes)


def check_names(detectors: Sequence[Detector]) -> None:
    """Refuse detectors that have one name, by which what they saw is kept."""
    names = [detector.name for detector in detectors]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"detectors {', '.join(twice)} are given twice; give others, or names of their own.")


@dataclass(frozen=True)
class Subject:
    """What is measured: a detector, those it may agree with, itself fine-tuned, itself with a threshold set again."""

    detector: Detector
    others: Sequence[Detector] = field(default_factory=tuple)
    hardened: Detector | None = None
    recalibrated: Detector | None = None

    def __post_init__(self) -> None:
        check_names([d for d in (self.detector, *self.others, self.hardened, self.recalibrated) if d is not None])

    def defences(self) -> tuple[str, ...]:
        """Those of `DEFENCES` that it has what is needed for."""
        missing = set() if self.others else {"consensus", "union"}
        missing |= set() if self.hardened else {"hardened"}
        missing |= set() if self.recalibrated else {"threshold"}
        return tuple(name for name in DEFENCES if not missing & set(name.split("+")))


def defended(judge: Judge, subject: Subject, defence: str, name: str, textures: Textures) -> dict[str, Any]:
    """The metrics of a texture behind one defence.

    Raises:
        UnknownNameError: the defence is none of those that the subject has.
    """
    if defence not in subject.defences():
        raise unknown("defence", defence, subject.defences())
    parts = defence.split("+")
    detector = subject.detector
    if "hardened" in parts:
        assert subject.hardened is not None
        detector = subject.hardened
    if "threshold" in parts:
        assert subject.recalibrated is not None
        detector = subject.recalibrated
    if "median" in parts:
        detector = Purified(detector)
    walks = judge.walks(detector, name, textures)
    if "consensus" in parts or "union" in parts:
        others = [judge.walks(other, name, textures) for other in subject.others]
        join = consensus if "consensus" in parts else union
        walks = [join(views) for views in zip(walks, *others, strict=True)]
    if "aggregate" in parts:
        walks = [aggregate(walk) for walk in walks]
    return summary(walks, judge.scenes)


def evaluate(detector: Detector, scenes: Sequence[Scene], textures: Textures) -> dict[str, Any]:
    """A detector without defence."""
    return Judge(scenes).result(detector, "textures", textures)


def evaluate_defences(
    detector: Detector,
    scenes: Sequence[Scene],
    textures: Textures,
    others: Sequence[Detector] = (),
    hardened: Detector | None = None,
) -> dict[str, dict[str, Any]]:
    """A detector behind each of `DEFENCES`; consensus only with `others`, "hardened" only with a fine-tuned copy."""
    judge, subject = Judge(scenes), Subject(detector, others, hardened)
    return {name: defended(judge, subject, name, "textures", textures) for name in subject.defences()}


def light_curve(detector: Detector, lit: Sequence[Scene], textures: Textures) -> dict[str, float]:
    """Mean confidence on one walk under each light; `lit` is the walk once per light (`drape.walks.under_lights`)."""
    return dict(evaluate(detector, lit, textures)["lights"])


def recovered(clean: float, attacked: float, defended: float) -> float | None:
    """Share of the lost recall that a defence wins back; none if nothing was lost."""
    lost = clean - attacked
    return (defended - attacked) / lost if lost > 1e-9 else None
