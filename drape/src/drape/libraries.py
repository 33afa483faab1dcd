"""Metrics by the libraries that teams already use, where they are installed (the extra `metrics`).

COCO's mean average precision by faster-coco-eval; ByteTrack (Zhang et al., arXiv:2110.06864) of trackers, with IDF1,
identity switches and MOTA by motmetrics. They stand beside drape's own metrics, which need no library.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drape.detectors.base import Detection, Detector, box_iou
from drape.evaluate import FOUND, Judge
from drape.scene.scene import Scene

__all__ = ["coco_precision", "library_metrics", "tracking"]

NEEDED = ("faster_coco_eval", "motmetrics", "trackers")
MEMORY = 5  # frames that a track lives on unseen, as in `drape.metrics.track_recall`
OVERLAP = 0.5  # of a track's box with the person's, for IDF1


def library_metrics(judge: Judge, detector: Detector, textures: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """`coco_precision` and `tracking` of each texture, or what is missing for them."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return {"missing": missing, "remedy": "pip install faster-coco-eval motmetrics trackers"}
    return {
        name: {**coco_precision(walks, judge.scenes), **tracking(walks, judge.scenes)}
        for name, walks in ((name, judge.walks(detector, name, images)) for name, images in textures.items())
    }


def coco_precision(walks: Sequence[Sequence[Detection]], scenes: Sequence[Scene]) -> dict[str, float]:
    """COCO's AP over overlaps .5 to .95, at .5, and the recall of 100 boxes, for the person in each frame."""
    from faster_coco_eval import COCO, COCOeval_faster

    pairs = [(d, box) for w, s in zip(walks, scenes, strict=True) for d, box in zip(w, s.buffers.boxes, strict=True)]
    images = [{"id": n} for n in range(1, len(pairs) + 1)]
    truth = [
        {"id": n, "image_id": n, "category_id": 1, "bbox": corner_and_size(box), "area": area(box), "iscrowd": 0}
        for n, (_, box) in enumerate(pairs, start=1)
    ]
    found = [
        {"image_id": n, "category_id": 1, "bbox": corner_and_size(box), "score": float(score)}
        for n, (d, _) in enumerate(pairs, start=1)
        for box, score in zip(d.boxes, d.scores, strict=True)
    ]
    if not found:
        return {"coco_map": 0.0, "coco_ap50": 0.0, "coco_recall": 0.0}
    known = COCO({"images": images, "annotations": truth, "categories": [{"id": 1, "name": "person"}], "info": {}})
    run = COCOeval_faster(known, known.loadRes(found), iouType="bbox", print_function=lambda *_: None)
    run.evaluate()
    run.accumulate()
    run.summarize()
    return {"coco_map": float(run.stats[0]), "coco_ap50": float(run.stats[1]), "coco_recall": float(run.stats[8])}


def corner_and_size(box: Tensor) -> list[float]:
    """A box as COCO writes it: x, y, width, height."""
    x0, y0, x1, y1 = (float(v) for v in box)
    return [x0, y0, x1 - x0, y1 - y0]


def area(box: Tensor) -> float:
    """Square pixels of a box."""
    return float((box[2] - box[0]) * (box[3] - box[1]))


def tracking(walks: Sequence[Sequence[Detection]], scenes: Sequence[Scene]) -> dict[str, float]:
    """IDF1, MOTA and identity switches of ByteTrack over all walks, which looks at frames that have passed alone.

    The frames come as they are, so at few per second persons who walk by move further than a video's do; compare
    textures and defences at the same rate only.
    """
    import motmetrics
    import supervision
    import trackers

    accumulators = []
    for walk, scene in zip(walks, scenes, strict=True):
        tracker = trackers.ByteTrackTracker(
            lost_track_buffer=MEMORY,
            frame_rate=30.0,  # with it the buffer is in frames
            track_activation_threshold=FOUND,
            high_conf_det_threshold=FOUND,
            minimum_consecutive_frames=1,
        )
        accumulator = motmetrics.MOTAccumulator(auto_id=True)
        for found, box in zip(walk, scene.buffers.boxes, strict=True):
            tracks = tracker.update(
                supervision.Detections(
                    xyxy=found.boxes.double().numpy().reshape(-1, 4),
                    confidence=found.scores.double().numpy(),
                    class_id=np.zeros(len(found.scores), dtype=int),
                )
            )
            known = np.asarray([] if tracks.tracker_id is None else tracks.tracker_id, dtype=int)
            boxes = torch.from_numpy(np.asarray(tracks.xyxy, dtype=np.float32).reshape(-1, 4))[known >= 0]
            accumulator.update([1], known[known >= 0].tolist(), distances(box, boxes))
        accumulators.append(accumulator)
    host = motmetrics.metrics.create()
    told = host.compute_many(
        accumulators, metrics=["idf1", "mota", "num_switches"], names=[s.label for s in scenes], generate_overall=True
    ).loc["OVERALL"]
    return {"idf1": float(told["idf1"]), "mota": float(told["mota"]), "switches": float(told["num_switches"])}


def distances(box: Tensor, tracks: Tensor) -> Any:
    """1 - overlap of the person's box with each track's, `[1, N]`; nan where it is too small to be a match."""
    apart = 1 - box_iou(box[None], tracks).double().numpy()
    return np.where(apart <= 1 - OVERLAP, apart, np.nan)
