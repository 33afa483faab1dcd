"""Adapters against modules with the outputs of transformers, torchvision and ultralytics."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from drape.detectors.adapters import TorchvisionDetector, TransformersDetector, UltralyticsDetector
from drape.detectors.registry import load_detector
from drape.errors import DetectorError
from drape.objective import confidence


class Fixed(nn.Module):
    """Gives what `make` makes of the frames."""

    def __init__(self, make: object) -> None:
        super().__init__()
        self.make = make
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images: object = None, pixel_values: torch.Tensor | None = None) -> object:
        return self.make(images if pixel_values is None else pixel_values)  # type: ignore[operator]


def detr(x: torch.Tensor) -> SimpleNamespace:
    logits = torch.stack([x.mean(dim=(1, 2, 3)), torch.zeros(len(x)), torch.zeros(len(x))], dim=-1)[:, None]
    return SimpleNamespace(logits=logits, pred_boxes=torch.tensor([0.5, 0.5, 0.25, 0.5]).expand(len(x), 1, 4))


@pytest.mark.parametrize("softmax", [True, False])
def test_detr_boxes_and_scores(softmax: bool) -> None:
    detector = TransformersDetector(Fixed(detr), "detr", person=0, softmax=softmax, normalised=False, input_size=64)
    frames = torch.full((2, 3, 32, 32), 0.5, requires_grad=True)
    found = detector(frames)
    assert found.boxes[1, 0].tolist() == [12, 8, 20, 24]
    e = torch.tensor(0.5).exp()
    assert float(found.scores[0, 0].detach()) == pytest.approx(float(e / (e + 2) if softmax else e / (e + 1)))
    (gradient,) = torch.autograd.grad(found.scores.sum(), frames)
    assert float(gradient.abs().max()) > 0
    assert not any(p.requires_grad for p in detector.parameters())


def test_detr_takes_the_mean_of_imagenet_off() -> None:
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None].expand(1, 3, 64, 64)
    detector = TransformersDetector(Fixed(detr), "detr", person=0, softmax=False, input_size=64)
    assert float(detector(mean).scores) == pytest.approx(0.5)


def test_torchvision_keeps_persons_and_pads_frames_with_fewer() -> None:
    boxes, labels = torch.tensor([[0.0, 0, 4, 4], [1, 1, 9, 9], [2, 2, 8, 8]]), torch.tensor([1, 3, 1])

    def make(frames: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        scores = torch.tensor([0.9, 0.8, 0.7])
        return [
            {"boxes": boxes[:n], "scores": scores[:n], "labels": labels[:n]}
            for n, _ in zip((3, 1), frames, strict=True)
        ]

    found = TorchvisionDetector(Fixed(make), "frcnn", input_size=64)(torch.rand(2, 3, 64, 64))
    assert found.scores.tolist() == [[pytest.approx(0.9), pytest.approx(0.7)], [pytest.approx(0.9), 0]]
    assert found.boxes[0, 1].tolist() == [2, 2, 8, 8]


def test_ultralytics_boxes_in_the_frames_pixels() -> None:
    raw = torch.tensor([[32.0, 32, 16, 32, 0.8, 0.1]])[..., None]
    for output in (raw, (raw, None)):
        detector = UltralyticsDetector(Fixed(lambda x, output=output: output), "yolo", input_size=64)
        found = detector(torch.rand(1, 3, 128, 128))
        assert found.boxes.tolist() == [[[48, 32, 80, 96]]]
        assert found.scores.tolist() == [[pytest.approx(0.8)]]


@pytest.mark.parametrize(
    "detector",
    [
        TransformersDetector(Fixed(lambda x: x), "a", person=0, softmax=True, input_size=64),
        TorchvisionDetector(Fixed(lambda x: x), "b", input_size=64),
        UltralyticsDetector(Fixed(lambda x: x.mean()), "c", input_size=64),
    ],
)
def test_outputs_of_another_kind_are_refused(detector: nn.Module) -> None:
    with pytest.raises(DetectorError, match="gave"):
        detector(torch.rand(1, 3, 64, 64))


@pytest.mark.slow
def test_a_model_of_transformers_runs_with_gradients() -> None:
    """YOLOS with random weights: the classes of the library itself, not only their outputs."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.YolosConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[64, 64],
        patch_size=16,
        num_detection_tokens=5,
        num_labels=3,
    )
    model = transformers.YolosForObjectDetection(config)
    detector = TransformersDetector(model, "yolos", person=1, softmax=True, normalised=False, input_size=64)
    frames = torch.rand(2, 3, 64, 64, requires_grad=True)
    found = detector(frames)
    assert found.boxes.shape == (2, 5, 4)
    (gradient,) = torch.autograd.grad(found.scores.sum(), frames)
    assert float(gradient.abs().max()) > 0
    with torch.no_grad():
        raw = model(pixel_values=frames)
    assert torch.allclose(found.scores, raw.logits.softmax(dim=-1)[..., 1], atol=1e-5)


def nobody(frames: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """What torchvision gives when no frame has a box."""
    none = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long)}
    return [none for _ in frames]


def test_frames_without_a_box_are_frames_without_a_person() -> None:
    detector = TorchvisionDetector(Fixed(nobody), "frcnn", input_size=64)
    frames = torch.rand(2, 3, 64, 64, requires_grad=True)
    truth = torch.tensor([[8.0, 8, 40, 60]]).expand(2, 4)
    for variant in ("max", "best", "smooth"):
        d = confidence(detector(frames), truth, variant)
        assert d.tolist() == [0.0, 0.0]
        (gradient,) = torch.autograd.grad(d.sum(), frames, allow_unused=True)
        assert gradient is None or float(gradient.abs().max()) == 0
    assert [len(found.scores) for found in detector.detect(frames)] == [0, 0]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([32.0, 32, 16, 32, 4.2], "logits"),
        ([32.0, 32, 16, 32, -0.5], "logits"),
        ([32.0, 32, 16, 32, float("nan")], "not finite"),
        ([float("inf"), 32, 16, 32, 0.5], "not finite"),
        ([0.5, 0.5, 0.2, 0.4, 0.5], "pixels"),
    ],
)
def test_scores_and_boxes_that_cannot_be_are_refused(row: list[float], says: str) -> None:
    raw = torch.tensor([row])[..., None]
    detector = UltralyticsDetector(Fixed(lambda x: raw), "yolo", input_size=64)
    with pytest.raises(DetectorError, match=says):
        detector(torch.rand(1, 3, 64, 64))


def test_another_class_than_the_person_is_refused() -> None:
    model = Fixed(detr)
    model.config = SimpleNamespace(id2label={0: "N/A", 1: "person", 2: "bicycle"})  # type: ignore[assignment]
    TransformersDetector(model, "detr", person=1, softmax=True)
    with pytest.raises(DetectorError, match=r"'bicycle'; the person is \[1\]"):
        TransformersDetector(model, "detr", person=2, softmax=True)
    with pytest.raises(DetectorError, match="classes > 9"):
        TransformersDetector(Fixed(detr), "detr", person=9, softmax=True, input_size=64)(torch.rand(1, 3, 64, 64))


def test_a_detector_of_ones_own_by_module_and_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_detectors_of_a_test.py").write_text(
        "import torch\nfrom drape.detectors import Candidates, Detector\n\n"
        "class Mine(Detector):\n    def candidates(self, images):\n"
        "        return Candidates(torch.zeros(len(images), 1, 4), images.mean(dim=(1, 2, 3))[:, None])\n\n"
        "def make():\n    return Mine('mine', 32)\n\ndef wrong():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    detector = load_detector("own_detectors_of_a_test:make")
    assert detector.name == "mine"
    assert not detector.training
    for name, says in (("wrong", "gave a int"), ("none", "cannot be used")):
        with pytest.raises(DetectorError, match=says):
            load_detector(f"own_detectors_of_a_test:{name}")
    with pytest.raises(DetectorError, match="cannot be used"):
        load_detector("no_such_module_of_anybody:make")
