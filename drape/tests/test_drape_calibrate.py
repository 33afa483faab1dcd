"""Thresholds set by false boxes, on a detector whose boxes are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from drape.calibrate import FLOOR, false_scores, scores_of_false_boxes, threshold_keeping, threshold_with
from drape.detectors.base import Candidates, Detection, Detector
from drape.errors import ConfigError
from drape.evaluate import evaluate
from drape.scene.light import light
from drape.scene.places import Plate
from drape.scene.scene import Scene
from drape.scene.sequence import Buffers

GREY = {name: torch.full((3, 8, 8), 0.5) for name in ("shirt", "trousers", "hat")}


class Two(Detector):
    """A box on the person, and one beside it with a score that is the brightness of a corner of the frame."""

    def __init__(self) -> None:
        super().__init__("two", 64)

    def candidates(self, images: torch.Tensor) -> Candidates:
        boxes = torch.tensor([[0.0, 0, 30, 64], [40, 0, 64, 64]]).expand(len(images), 2, 4)
        return Candidates(boxes, torch.stack([torch.full((len(images),), 0.9), images[:, 0, 0, 0]], dim=1))


@pytest.fixture
def scene(walk: Buffers) -> Scene:
    """The corner is as bright as the place is, .3."""
    boxes = torch.tensor([0.0, 0, 30, 64]).expand(4, 4)
    grey = Plate(torch.full((3, 64, 64), 0.3), torch.zeros(64, 64), torch.ones(0, 64, 64))
    return Scene("circle", replace(walk, boxes=boxes), light("overcast"), grey)


def test_boxes_beside_the_person_are_false() -> None:
    truth = torch.tensor([0.0, 0, 10, 10])
    found = Detection(torch.stack([truth, truth + 1, truth + 6]), torch.tensor([0.9, 0.8, 0.7]))
    assert false_scores(found, truth) == pytest.approx([0.7])


def test_scores_of_walks_and_of_empty_places_are_collected(scene: Scene) -> None:
    scores = scores_of_false_boxes(Two(), [scene], [GREY, GREY])
    # in the empty place both boxes are false; in the 2 x 4 frames one is
    assert scores == pytest.approx([0.9, *[0.3] * 9])
    with pytest.raises(ConfigError, match="at least one"):
        scores_of_false_boxes(Two(), [scene], [])


def test_threshold_shuts_out_all_but_the_allowed_ones() -> None:
    scores = [0.6, 0.4, 0.2]
    for allowed in range(3):
        at = threshold_with(scores, allowed, 1.0)
        assert sum(score >= at for score in scores) == allowed
        assert sum(score >= at - 0.002 for score in scores) == allowed + 1  # no lower one would do
    assert threshold_with(scores, 3, 0.5) == FLOOR
    assert threshold_with(scores, 0, 0.5) == 0.5  # never above the highest
    with pytest.raises(ConfigError, match="allowed=-1"):
        threshold_with(scores, -1, 0.5)


def test_as_many_false_boxes_remain_as_there_were() -> None:
    before, after = [0.8, 0.6, 0.3], [0.45, 0.4, 0.35, 0.2]
    at = threshold_keeping(before, after, 0.5)
    assert sum(score >= at for score in after) == sum(score >= 0.5 for score in before) == 2
    assert 0.35 < at < 0.4
    assert threshold_keeping([0.3], [0.9], 0.5) == 0.5  # never above what it was


def test_false_boxes_are_counted_where_they_are_sure_enough(scene: Scene) -> None:
    assert evaluate(Two(), [scene], GREY)["false_boxes"] == 0
    bold = Two()
    bold.threshold = 0.25
    assert evaluate(bold, [scene], GREY)["false_boxes"] == 1
