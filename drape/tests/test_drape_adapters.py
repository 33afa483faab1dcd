"""Adapters against modules with the outputs of transformers, torchvision and ultralytics."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from drape.controls import random_textures
from drape.detectors.adapters import OnnxDetector, TorchvisionDetector, TransformersDetector, UltralyticsDetector
from drape.detectors.base import Candidates, Detector
from drape.detectors.registry import LOADERS, load_detector
from drape.errors import AssetError, ConfigError, DetectorError, UnknownNameError
from drape.evaluate import Subject
from drape.gamut import Gamut
from drape.harden import HardenSpec, harden
from drape.objective import confidence
from drape.optimise import OptimiseSpec, optimise
from drape.scene.scene import Scene


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
        "def make():\n    return Mine('mine', 32)\n\ndef wrong():\n    return 3\n\n"
        "def ends():\n    raise SystemExit(5)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    detector = load_detector("own_detectors_of_a_test:make")
    assert detector.name == "mine"
    assert not detector.training
    for name, says in (("wrong", "gave a int"), ("none", "cannot be used"), ("ends", r"SystemExit: 5\)")):
        with pytest.raises(DetectorError, match=says):
            load_detector(f"own_detectors_of_a_test:{name}")
    with pytest.raises(DetectorError, match="cannot be used"):
        load_detector("no_such_module_of_anybody:make")


def onnx_file(path: Path, layout: str, batch: int | None = None) -> Path:
    """A network in ONNX: person scores that follow the frame's mean, boxes that stay."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, number = onnx.helper, onnx.TensorProto.FLOAT
    entry = helper.make_tensor_value_info("frames", number, [batch, 3, 64, 64])
    constants, nodes = [], [helper.make_node("ReduceMean", ["frames"], ["mean"], axes=[1, 2, 3], keepdims=0)]

    def constant(name: str, values: list[float], shape: list[int], kind: int = number) -> None:
        constants.append(helper.make_tensor(name, kind, shape, values))

    nodes.append(helper.make_node("Reshape", ["mean", "to_rows"], ["score"]))
    constant("to_rows", [-1, 1, 1], [3], onnx.TensorProto.INT64)
    boxes = (
        [32.0, 32, 16, 32] if layout == "yolo" else [0.5, 0.5, 0.25, 0.5] if layout == "detr" else [24.0, 16, 40, 48]
    )
    shape = [1, 4, 1] if layout == "yolo" else [1, 1, 4]
    constant("zero", [0.0] * 4, shape)
    constant("own", boxes, shape)
    nodes.append(helper.make_node("Mul", ["score", "zero"], ["nothing"]))
    nodes.append(helper.make_node("Add", ["nothing", "own"], ["boxes"]))
    if layout == "yolo":
        nodes.append(helper.make_node("Concat", ["boxes", "score"], ["out"], axis=1))
        outputs = ["out"]
    elif layout == "detr":
        outputs = ["score", "boxes"]
    else:
        nodes.append(helper.make_node("Squeeze", ["score"], ["scores"], axes=[2]))
        outputs = ["boxes", "scores"]
    infos = [helper.make_tensor_value_info(name, number, None) for name in outputs]
    graph = helper.make_graph(nodes, "detector", [entry], infos, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=8), str(path))
    return path


@pytest.mark.parametrize("layout", ["yolo", "detr", "boxes"])
@pytest.mark.parametrize("batch", [None, 1])
def test_a_file_of_onnx_gives_boxes_and_scores(layout: str, batch: int | None, tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "m.onnx", layout, batch)
    detector = OnnxDetector(path, "onnx", layout=layout, input_size=64)
    frames = torch.stack([torch.full((3, 64, 64), value) for value in (0.25, 0.75)])
    found = detector(frames)
    expected = [0.25, 0.75] if layout != "detr" else torch.tensor([0.25, 0.75]).sigmoid().tolist()
    assert found.scores[:, 0].tolist() == pytest.approx(expected)
    assert found.boxes.tolist() == [[[24, 16, 40, 48]]] * 2
    assert [len(d.scores) for d in detector.detect(frames)] == [1, 1]


def test_files_of_onnx_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "m.onnx", "yolo")
    with pytest.raises(DetectorError, match="layout 'detr'"):
        OnnxDetector(path, "onnx", layout="detr", input_size=64)(torch.rand(1, 3, 64, 64))
    with pytest.raises(UnknownNameError, match="yolo"):
        OnnxDetector(path, "onnx", layout="yol")
    with pytest.raises(ConfigError, match="person=-1"):
        OnnxDetector(path, "onnx", person=-1)
    with pytest.raises(AssetError, match="does not exist"):
        OnnxDetector(tmp_path / "none.onnx", "onnx")
    (tmp_path / "empty.onnx").write_bytes(b"nothing")
    with pytest.raises(AssetError, match="cannot be read as an ONNX model"):
        OnnxDetector(tmp_path / "empty.onnx", "onnx")


def test_onnxruntime_refuses_to_be_optimised_against(tmp_path: Path) -> None:
    detector = OnnxDetector(onnx_file(tmp_path / "m.onnx", "yolo"), "onnx", input_size=64)
    if type(detector.model).__name__ != "OnnxSession":
        pytest.skip("onnx2torch gives gradients")
    with pytest.raises(DetectorError, match="onnx2torch"):
        detector(torch.rand(1, 3, 64, 64, requires_grad=True))


def test_sides_of_the_input_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, int]] = []

    def load(**size: int) -> TransformersDetector:
        made.append(size)
        return TransformersDetector(Fixed(detr), "detr", person=0, softmax=False)

    monkeypatch.setitem(LOADERS, "nanodet", load)
    assert load_detector("nanodet@320").name == "nanodet@320"
    assert load_detector("nanodet").name == "detr"
    assert made == [{"input_size": 320}, {}]
    for name in ("nanodet@321", "nanodet@", "nanodet@64", "nanodet@99999999"):
        with pytest.raises(ConfigError, match="multiple of 32"):
            load_detector(name)
    with pytest.raises(UnknownNameError, match="nanodet"):
        load_detector("nanodte@320")


@pytest.mark.slow
def test_two_stages_of_torchvision_run_with_gradients() -> None:
    """Faster R-CNN with random weights, the library's own class; its threshold for boxes is taken down."""
    models = pytest.importorskip("torchvision.models.detection")
    torch.manual_seed(0)
    model = models.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, box_score_thresh=0.0, box_detections_per_img=20
    )
    detector = TorchvisionDetector(model, "faster r-cnn", input_size=64)
    frames = torch.rand(2, 3, 64, 64, requires_grad=True)
    found = detector(frames)
    assert found.boxes.shape[::2] == (2, 4)
    assert found.scores.shape[1] > 1
    (gradient,) = torch.autograd.grad(found.scores.sum(), frames)
    assert float(gradient.abs().max()) > 0
    assert not any(parameter.requires_grad for parameter in detector.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("refined", [False, True], ids=["one stage", "two stages"])
def test_detr_of_transformers_runs_with_gradients(refined: bool) -> None:
    """Deformable DETR with random weights, also with its first stage's proposals, on a trunk without downloads."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    trunk = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=trunk, num_queries=6,
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_feature_levels=3, two_stage=refined, with_box_refine=refined,
        two_stage_num_proposals=6, id2label={0: "person", 1: "car"}, label2id={"person": 0, "car": 1},
    )  # fmt: skip
    model = transformers.DeformableDetrForObjectDetection(config)
    detector = TransformersDetector(model, "detr", person=0, softmax=False, input_size=64)
    frames = torch.rand(2, 3, 64, 64, requires_grad=True)
    found = detector(frames)
    assert found.boxes.shape == (2, 6, 4)
    (gradient,) = torch.autograd.grad(found.scores.sum(), frames)
    assert float(gradient.abs().max()) > 0
    with pytest.raises(DetectorError, match="the person is"):
        TransformersDetector(model, "detr", person=1, softmax=False)


class Told(Detector):
    """Gives what a function makes of the frames."""

    def __init__(self, give: Callable[[torch.Tensor], object], threshold: float = 0.5) -> None:
        super().__init__("told", 64, threshold)
        self.give = give

    def candidates(self, images: torch.Tensor) -> Candidates:
        return self.give(images)  # type: ignore[return-value]


def one_box(images: torch.Tensor, box: tuple[float, ...] = (5, 5, 40, 60)) -> Candidates:
    scores = images.mean(dim=(1, 2, 3))[:, None]
    return Candidates(torch.tensor(box).float().expand(len(images), 1, 4), scores)


def failing(images: torch.Tensor) -> Candidates:
    raise RuntimeError("out of\nmemory")


@pytest.mark.parametrize(
    ("give", "says"),
    [
        (lambda x: (x, x), "gave a tuple; expected drape.detectors.base.Candidates"),
        (
            failing,
            r"told failed on frames \(2, 3, 64, 64\) \(RuntimeError: out of\nmemory; test_drape_ad",
        ),
        (lambda x: one_box(x, (50, 50, 20, 30)), "end before they begin"),
        (lambda x: one_box(x.detach()), "without a gradient to the frames"),
    ],
    ids=["tuple", "failing", "centre and size", "no gradient"],
)
def test_a_users_network_that_cannot_serve_is_told_what_is_wrong(
    give: Callable[[torch.Tensor], object], says: str
) -> None:
    with pytest.raises(DetectorError, match=says):
        Told(give)(torch.full((2, 3, 64, 64), 0.5, requires_grad=True))
    assert Told(one_box)(torch.full((2, 3, 64, 64), 0.5, requires_grad=True)).scores.requires_grad


def test_without_a_gradient_a_detector_is_judged_all_the_same() -> None:
    assert len(Told(lambda x: one_box(x.detach())).detect(torch.full((2, 3, 64, 64), 0.5))[0].scores) == 1


@pytest.mark.parametrize("threshold", [0.0, 1.0, float("nan")])
def test_a_threshold_that_scores_cannot_be_scaled_by_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        Told(one_box, threshold)


def test_detectors_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="told are given twice"):
        Subject(Told(one_box), [Told(one_box)])


def test_a_detector_without_weights_is_not_fine_tuned(scene: Scene) -> None:
    with pytest.raises(DetectorError, match="no weights"):
        harden(Told(one_box), [scene], Gamut.proxy(), HardenSpec(), OptimiseSpec())


def test_an_optimisation_says_that_nobody_was_seen(scene: Scene) -> None:
    blind = Told(lambda x: Candidates(x.new_zeros(len(x), 0, 4), x.new_zeros(len(x), 0)))
    frames = replace(scene, buffers=replace(scene.buffers, boxes=torch.tensor([[0.0, 0, 60, 60]]).expand(4, 4)))
    places = torch.tensor([0.0, 0, 60, 60]).expand(500, 4)  # many boxes, as dense detectors have, none of them likely
    unsure = Told(
        lambda x: Candidates(places.expand(len(x), -1, -1), x.mean(dim=(1, 2, 3))[:, None].expand(-1, 500) / 50)
    )
    for detector, nobody in ((blind, True), (unsure, True), (Told(one_box), False)):
        run = optimise(random_textures(Gamut.proxy()), [detector], [frames], OptimiseSpec(steps=2))
        assert run.saw_nobody == nobody
