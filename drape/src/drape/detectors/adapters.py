"""Detectors that a user has: modules with the outputs of transformers, torchvision or ultralytics.

None of the three is a dependency. Each adapter takes the loaded module, and states what it reads from its output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from drape.detectors.base import Candidates, Detector
from drape.errors import DetectorError

__all__ = ["TorchvisionDetector", "TransformersDetector", "UltralyticsDetector"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, in RGB


def corners(centre_size: Tensor) -> Tensor:
    """Boxes (cx, cy, w, h) as (x0, y0, x1, y1)."""
    centre, half = centre_size[..., :2], centre_size[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def check_class(name: str, person: int, labels: Any) -> None:
    """Refuse another class than the person, where the model says what its classes are; made-up names say nothing."""
    if not isinstance(labels, Mapping) or person not in labels:
        return
    said = str(labels[person]).lower()
    if "person" not in said and not said.startswith("label_"):
        found = [number for number, label in labels.items() if str(label).lower() == "person"]
        raise DetectorError(f"class {person} of {name} is {said!r}; the person is {found or 'not among its classes'}.")


class TransformersDetector(Detector):
    """DETR's family in transformers: outputs `logits` `[B, A, classes]` and `pred_boxes` (cx, cy, w, h) in [0, 1].

    Args:
        model: takes `pixel_values`.  person: the class's index, 1 in DETR's COCO and 0 in RT-DETR's.
        softmax: DETR's scores, whose last class is "no object"; else sigmoids (RT-DETR, deformable DETR).
        normalised: whether the model expects ImageNet's mean and deviation taken off.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        *,
        person: int,
        softmax: bool,
        normalised: bool = True,
        input_size: int = 640,
        threshold: float = 0.5,
    ) -> None:
        super().__init__(name, input_size, threshold)
        self.model, self.person, self.softmax, self.normalised = model, person, softmax, normalised
        labels = getattr(getattr(model, "config", None), "id2label", None)
        check_class(name, person, labels)
        self.freeze()

    def candidates(self, images: Tensor) -> Candidates:
        if self.normalised:
            mean, deviation = (images.new_tensor(v)[:, None, None] for v in (MEAN, STD))
            images = (images - mean) / deviation
        found = self.model(pixel_values=images)
        logits, boxes = read(self.name, found, "logits"), read(self.name, found, "pred_boxes")
        if logits.ndim != 3 or not 0 <= self.person < logits.shape[-1]:
            raise DetectorError(
                f"{self.name} gave logits {tuple(logits.shape)}; expected [B, A, classes > {self.person}]."
            )
        scores = logits.softmax(dim=-1) if self.softmax else logits.sigmoid()
        return Candidates(corners(boxes) * self.input_size, scores[..., self.person])


def read(name: str, output: Any, field: str) -> Tensor:
    """A field of a model's output."""
    value = getattr(output, field, None)
    if not isinstance(value, Tensor):
        raise DetectorError(f"{name} gave {type(output).__name__} without a tensor {field!r}; use another adapter.")
    return value


class TorchvisionDetector(Detector):
    """torchvision's detectors in evaluation mode: a list of dicts with `boxes`, `scores`, `labels` for each frame.

    They suppress doubles themselves, so only boxes that stayed carry gradients.

    Args:
        person: the label, 1 in torchvision's COCO.
    """

    def __init__(
        self, model: nn.Module, name: str, *, person: int = 1, input_size: int = 640, threshold: float = 0.5
    ) -> None:
        super().__init__(name, input_size, threshold)
        self.model, self.person = model, person
        self.freeze()

    def candidates(self, images: Tensor) -> Candidates:
        found = self.model(list(images))
        if not isinstance(found, list) or not all({"boxes", "scores", "labels"} <= set(f) for f in found):
            raise DetectorError(f"{self.name} gave no list of boxes, scores and labels; use another adapter.")
        kept = [(f["boxes"][f["labels"] == self.person], f["scores"][f["labels"] == self.person]) for f in found]
        return Candidates(
            nn.utils.rnn.pad_sequence([boxes for boxes, _ in kept], batch_first=True),
            nn.utils.rnn.pad_sequence([scores for _, scores in kept], batch_first=True),
        )


class UltralyticsDetector(Detector):
    """The inner module of an ultralytics YOLO (`YOLO(path).model`), v8 and later: gives `[B, 4 + classes, A]`.

    Args:
        model: boxes are (cx, cy, w, h) in pixels, scores are sigmoids already.  person: the class's index.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        *,
        person: int = 0,
        input_size: int = 640,
        threshold: float = 0.25,
    ) -> None:
        super().__init__(name, input_size, threshold)
        self.model, self.person = model, person
        check_class(name, person, getattr(model, "names", None))
        self.freeze()

    def candidates(self, images: Tensor) -> Candidates:
        found = self.model(images)
        found = found[0] if isinstance(found, (tuple, list)) else found
        if not isinstance(found, Tensor) or found.ndim != 3 or found.shape[1] <= 4 + self.person:
            raise DetectorError(f"{self.name} gave no tensor [B, 4 + classes, A]; give the inner module of a YOLO.")
        return Candidates(corners(found[:, :4].transpose(1, 2)), found[:, 4 + self.person])
