"""`fashion-dit`: its data, its objective, what it exports, and the distances that judge it."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from hasten_zoo.fashion_dit import CLASSES, data
from hasten_zoo.fashion_dit.data import FashionData, load_fashion_data, prepare, scaled
from hasten_zoo.fashion_dit.distances import frechet, precision_recall
from hasten_zoo.fashion_dit.evaluate import generate
from hasten_zoo.fashion_dit.features import FashionFeatures
from hasten_zoo.fashion_dit.features import train as train_features
from hasten_zoo.fashion_dit.model import NO_CLASS, build_pipeline, load_pipeline, without_label_dropout
from hasten_zoo.fashion_dit.train import Objective, export
from hasten_zoo.training import Settings, Training


@pytest.fixture
def pipe() -> Any:
    torch.manual_seed(0)
    made = build_pipeline(width=32, blocks=2)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    """Forty images whose brightness is their class."""
    labels = torch.arange(40) % 10
    return (labels * 25).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 32, 32).contiguous(), labels


def test_only_the_published_files_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = bytes(range(256)) * (28 * 28 * 3 // 256 + 1)
    contents = {
        "train-images-idx3-ubyte.gz": bytes(16) + pixels[: 28 * 28 * 3],
        "train-labels-idx1-ubyte.gz": bytes(8) + bytes([9, 1, 2]),
        "t10k-images-idx3-ubyte.gz": bytes(16) + pixels[: 28 * 28],
        "t10k-labels-idx1-ubyte.gz": bytes(8) + bytes([7]),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match="not the published file"):
        prepare(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    digests = {name: data.hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in contents}
    monkeypatch.setattr(data, "FILES", digests)
    prepare(tmp_path, tmp_path / "out")
    found = load_fashion_data(tmp_path / "out")
    assert found.train.shape == (3, 1, 32, 32)
    assert found.train_labels.tolist() == [9, 1, 2]
    assert found.train[0, 0, 2, 2:6].tolist() == [0, 1, 2, 3]  # the border is two pixels wide
    assert int(found.train[:, :, :2].max()) == 0
    assert found.test_labels.tolist() == [7]


def test_missing_images_are_named_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"fashion_dit\.data --out"):
        load_fashion_data(tmp_path)


def test_learning_lowers_the_error_and_repeats(pipe: Any, images: tuple[Tensor, Tensor]) -> None:
    start = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}

    def losses() -> list[float]:
        pipe.transformer.load_state_dict(start)
        net = nn.ModuleDict({"transformer": without_label_dropout(pipe.transformer)})
        training = Training(net, Objective(pipe, *images, batch=16), Settings(lr=3e-3, warmup_steps=5))
        return [float(training.step().parts["unweighted"]) for _ in range(40)]

    torch.manual_seed(1)
    first = losses()
    torch.manual_seed(2)  # nothing is drawn from the global generator
    assert losses() == first
    assert sum(first[-10:]) < 0.8 * sum(first[:10])


def test_one_label_in_ten_is_left_out(pipe: Any, images: tuple[Tensor, Tensor]) -> None:
    seen: list[Tensor] = []
    embedder = pipe.transformer.transformer_blocks[0].norm1.emb.class_embedder
    embedder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    objective = Objective(pipe, *images, batch=400)
    without_label_dropout(pipe.transformer).train()
    with torch.no_grad():
        objective(torch.Generator().manual_seed(0))
    labels, final = seen  # the last layer asks the first block's embedding
    assert torch.equal(labels, final)
    assert 20 <= int((labels == NO_CLASS).sum()) <= 60
    assert set(labels[labels != NO_CLASS].tolist()) <= set(range(10))


def test_exported_weights_load_into_an_unmodified_pipeline(
    pipe: Any, images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    net = nn.ModuleDict({"transformer": without_label_dropout(pipe.transformer)})
    training = Training(net, Objective(pipe, *images, batch=4))
    for _ in range(3):
        training.step()
    export(training.state(), pipe, tmp_path)
    loaded = load_pipeline(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    pipe.transformer.float().eval()
    ours, labels = generate(pipe, 4, guidance=1.5, steps=3)
    theirs, _ = generate(loaded, 4, guidance=1.5, steps=3)
    assert labels.tolist() == [0, 1, 2, 3]
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert loaded.get_label_ids(["bag"]) == [CLASSES.index("bag")]


def test_every_image_has_its_own_seed(pipe: Any) -> None:
    many, _ = generate(pipe, 4, guidance=1.0, steps=2, seed=5)
    tail, _ = generate(pipe, 2, guidance=1.0, steps=2, seed=5)
    assert torch.allclose(many[:2], tail, atol=1e-6)
    assert not torch.allclose(many[0], many[1])


def test_the_classifier_learns(images: tuple[Tensor, Tensor]) -> None:
    pixels, labels = images
    many = FashionData(pixels.repeat(48, 1, 1, 1), labels.repeat(48), pixels, labels)
    network = train_features(many, epochs=1)
    found = network.logits(network.of(scaled(pixels))).argmax(1)
    assert float((found == labels).float().mean()) > 0.5  # one in ten by chance


def test_frechet_distance_agrees_with_its_definition() -> None:
    random = torch.Generator().manual_seed(0)
    a = torch.randn(500, 6, generator=random)
    b = torch.randn(400, 6, generator=random) @ torch.randn(6, 6, generator=random) + 1
    p, q = a.double().T.cov().numpy(), b.double().T.cov().numpy()
    traces = p.trace() + q.trace() - 2 * scipy.linalg.sqrtm(p @ q).real.trace()
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + traces
    assert frechet(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_precision_and_recall_tell_poor_from_narrow() -> None:
    random = torch.Generator().manual_seed(0)
    real = torch.randn(300, 4, generator=random)
    narrow = 0.1 * torch.randn(300, 4, generator=random)  # plausible, but hardly varied
    far = torch.randn(300, 4, generator=random) + 20
    precision, recall = precision_recall(narrow, real)
    assert precision > 0.9
    assert recall < 0.3
    assert precision_recall(far, real) == (0.0, 0.0)


def test_features_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    network = FashionFeatures().eval()
    images = torch.randn(5, 1, 32, 32)
    assert torch.allclose(network.of(images)[3:], network.of(images[3:]), atol=1e-5)
