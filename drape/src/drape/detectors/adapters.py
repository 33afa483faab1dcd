"""Detectors that a user has: modules with the outputs of transformers, torchvision or ultralytics, and ONNX files.

None of them is a dependency. Each adapter takes the loaded module, and states what it reads from its output.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from drape.detectors.base import Candidates, Detector
from drape.errors import AssetError, ConfigError, DetectorError, unknown

__all__ = ["OnnxDetector", "TorchvisionDetector", "TransformersDetector", "UltralyticsDetector"]

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


LAYOUTS = ("yolo", "detr", "boxes")


class OnnxDetector(Detector):
    """A detector in an ONNX file.

    With onnx2torch it becomes a torch module, with gradients to the frames, so textures can be optimised against it.
    Else onnxruntime runs it: it can be judged, take part in transfer and consensus, and a gradient is refused.

    Args:
        path: the file.
        layout: "yolo", one output `[B, 4 + classes, A]` as ultralytics exports it; "detr", outputs `[B, A, classes]` of
            logits and `[B, A, 4]` of boxes (cx, cy, w, h) in [0, 1]; "boxes", outputs `[B, A, 4]` of corners in pixels
            and `[B, A]` of person scores.
        person: the class's index, of the first two.  softmax, normalised: of `TransformersDetector`.

    Raises:
        AssetError: the file cannot be read, or neither library is installed.
    """

    def __init__(
        self,
        path: Path | str,
        name: str,
        *,
        layout: str = "yolo",
        person: int = 0,
        softmax: bool = False,
        normalised: bool = False,
        input_size: int = 640,
        threshold: float = 0.25,
    ) -> None:
        super().__init__(name, input_size, threshold)
        if layout not in LAYOUTS:
            raise unknown("layout of an ONNX file", layout, LAYOUTS)
        if person < 0:
            raise ConfigError(f"person={person}; expected the index of a class, 0 or more.")
        self.layout, self.person, self.softmax, self.normalised = layout, person, softmax, normalised
        self.model = onnx_module(Path(path))
        self.freeze()

    def candidates(self, images: Tensor) -> Candidates:
        if self.normalised:
            mean, deviation = (images.new_tensor(v)[:, None, None] for v in (MEAN, STD))
            images = (images - mean) / deviation
        found = self.model(images)
        outputs = list(found) if isinstance(found, (tuple, list)) else [found]
        if self.layout == "yolo":
            (raw,) = self.shaped(outputs, [(None, 4 + self.person + 1)], 3)
            return Candidates(corners(raw[:, :4].transpose(1, 2)), raw[:, 4 + self.person])
        if self.layout == "boxes":
            boxes, scores = self.shaped(outputs, [(2, 4), (None, 1)], None)
            return Candidates(boxes, scores.reshape(len(images), -1))
        logits, boxes = self.shaped(outputs, [(2, self.person + 1), (2, 4)], 3)
        scores = logits.softmax(dim=-1) if self.softmax else logits.sigmoid()
        return Candidates(corners(boxes) * self.input_size, scores[..., self.person])

    def shaped(self, outputs: list[Tensor], wanted: Sequence[tuple[int | None, int]], rank: int | None) -> list[Tensor]:
        """The outputs, if they are as many as wanted and wide enough: of each an axis, or the second, and a size."""
        shapes = [tuple(output.shape) for output in outputs]
        fits = len(outputs) == len(wanted) and all(
            (rank is None or o.ndim == rank) and o.ndim > 1 and o.shape[1 if axis is None else axis] >= least
            for o, (axis, least) in zip(outputs, wanted, strict=True)
        )
        if not fits:
            raise DetectorError(
                f"{self.name} gave outputs {shapes}, not those of the layout {self.layout!r}; see OnnxDetector."
            )
        return outputs


def onnx_module(path: Path) -> nn.Module:
    """An ONNX file as a module, by onnx2torch, or by onnxruntime without gradients."""
    if not path.is_file():
        raise AssetError(f"{path} does not exist; give an ONNX file.")
    libraries = [name for name in ("onnx2torch", "onnxruntime") if importlib.util.find_spec(name) is not None]
    if not libraries:
        raise AssetError(f"{path} needs onnxruntime or onnx2torch: pip install onnxruntime.")
    try:
        if libraries[0] == "onnx2torch":
            import onnx2torch

            return onnx2torch.convert(str(path))
        return OnnxSession(path)
    except Exception as error:  # whatever a parser raises on a file of a user
        reason = " ".join(str(error).split())[:200]
        raise AssetError(f"{path} cannot be read as an ONNX model ({reason}); export it again.") from error


class OnnxSession(nn.Module):
    """An ONNX file run by onnxruntime on the CPU, without gradients; frames go through one by one if it takes one."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        (entry,) = self.session.get_inputs()
        self.entry, self.one = entry.name, entry.shape[0] == 1

    def forward(self, images: Tensor) -> list[Tensor]:
        if images.requires_grad:
            raise DetectorError(
                "onnxruntime gives no gradients, so nothing can be optimised against this detector; install onnx2torch "
                "or evaluate with it only."
            )
        parts = images.split(1) if self.one else [images]
        found = [self.session.run(None, {self.entry: part.numpy()}) for part in parts]
        return [torch.from_numpy(np.concatenate(values)) for values in zip(*found, strict=True)]
