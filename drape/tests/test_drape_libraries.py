"""Metrics by libraries, where they are installed: walks that are seen whole, in parts, and with boxes beside."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from drape import libraries
from drape.detectors.base import Detection
from drape.evaluate import Judge
from drape.libraries import coco_precision, library_metrics, tracking
from drape.scene.scene import Scene

PERSON = torch.tensor([10.0, 8, 26, 56])
NONE = Detection(torch.zeros(0, 4), torch.zeros(0))


@pytest.fixture
def long(scene: Scene) -> Scene:
    """The scene with sixteen true boxes of a person who walks to the right."""
    boxes = torch.stack([PERSON + torch.tensor([2.0, 0, 2, 0]) * t for t in range(16)])
    return replace(scene, buffers=replace(scene.buffers, boxes=boxes))


def seen(scene: Scene, frames: set[int], shift: float = 0.0) -> list[Detection]:
    """The person's box in some of the frames."""
    return [
        Detection(box[None] + shift, torch.tensor([0.9])) if t in frames else NONE
        for t, box in enumerate(scene.buffers.boxes)
    ]


def test_average_precision_of_coco(long: Scene) -> None:
    pytest.importorskip("faster_coco_eval")
    whole, half = seen(long, set(range(16))), seen(long, set(range(0, 16, 2)))
    assert coco_precision([whole], [long]) == pytest.approx({"coco_map": 1, "coco_ap50": 1, "coco_recall": 1})
    assert coco_precision([half], [long])["coco_ap50"] == pytest.approx(0.5, abs=0.02)
    beside = coco_precision([seen(long, set(range(16)), 2.5)], [long])
    assert beside["coco_ap50"] == pytest.approx(1)
    assert beside["coco_map"] < 0.7  # the stricter overlaps miss it
    assert coco_precision([[NONE] * 16], [long])["coco_map"] == 0


def test_identity_and_tracks(long: Scene) -> None:
    pytest.importorskip("motmetrics")
    pytest.importorskip("trackers")
    whole = tracking([seen(long, set(range(16)))], [long])
    lost = tracking([seen(long, set(range(8)))], [long])
    assert whole["idf1"] == pytest.approx(1, abs=0.1)
    assert lost["idf1"] < whole["idf1"] - 0.2
    assert lost["mota"] == pytest.approx(0.5, abs=0.15)
    false = tracking([seen(long, set(range(16)), 40.0)], [long])
    assert false["idf1"] == 0
    assert false["mota"] < 0


def test_what_is_missing_is_named(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda name: None if name == "motmetrics" else name)
    told = library_metrics(Judge([scene]), None, {})  # type: ignore[arg-type]
    assert told["missing"] == ["motmetrics"]
    assert told["remedy"] == "pip install faster-coco-eval motmetrics trackers"
