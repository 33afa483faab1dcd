"""Fine-tuning as a defence, on a detector that is made up and quick."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from drape import harden as module
from drape.detectors.base import Candidates, Detector
from drape.errors import AssetError, ConfigError, OutputError
from drape.gamut import Gamut
from drape.harden import KIND, HardenSpec, distillation_loss, harden, load_hardened, save_hardened
from drape.io import save_arrays
from drape.optimise import OptimiseSpec
from drape.scene.scene import Scene

SPEC = HardenSpec(rounds=2, attack_steps=4, steps=14, batch=2, learning_rate=0.02, tuned=1.0)


class Learner(Detector):
    """A network of four cells, each with a box that moves a little, which sees a person where the frame is red."""

    def __init__(self) -> None:
        super().__init__("learner", 64)
        self.colour = nn.Conv2d(3, 1, 1)
        self.size = nn.Linear(1, 1)
        with torch.no_grad():
            self.colour.weight.copy_(torch.tensor([8.0, 0.0, -8.0]).view(1, 3, 1, 1))
            self.colour.bias.fill_(0.2)
            self.size.weight.fill_(0.1)
            self.size.bias.fill_(0.6)
        self.freeze()

    def candidates(self, images: torch.Tensor) -> Candidates:
        seen = nn.functional.adaptive_avg_pool2d(self.colour(images), 2).flatten(1)
        corner = torch.tensor([[0.0, 0], [16, 0], [0, 16], [16, 16]]).expand(len(images), 4, 2)
        side = 48 * self.size(seen[..., None]).clamp(0.2, 1.0).expand(-1, -1, 2)
        return Candidates(torch.cat([corner, corner + side], dim=-1), seen.sigmoid())


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Detector]:
    """The registry knows the made-up detector and nothing else."""
    monkeypatch.setattr(module, "load_detector", lambda name: {"learner": Learner}[name]())
    return Learner


def hardened(scene: Scene, spec: HardenSpec = SPEC) -> module.Hardened:
    return harden(Learner(), [scene], Gamut.proxy(), spec, OptimiseSpec(batch=2, learning_rate=0.05))


def test_loss_is_least_where_student_and_teacher_agree() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 40, 40]]])
    teacher = Candidates(boxes, torch.tensor([[0.9, 0.01]]))
    same = distillation_loss(teacher, teacher)
    assert float(same) == pytest.approx(0.0, abs=1e-6)
    shy = distillation_loss(Candidates(boxes, torch.tensor([[0.5, 0.01]])), teacher)
    moved = distillation_loss(Candidates(boxes + 5, teacher.scores), teacher)
    elsewhere = distillation_loss(Candidates(boxes + torch.tensor([[0.0], [5]])[None], teacher.scores), teacher)
    assert float(shy) > float(same)
    assert float(moved) > float(elsewhere) > float(same)  # the box without a person hardly counts
    with pytest.raises(ConfigError, match="shape"):
        distillation_loss(Candidates(boxes[:, :1], teacher.scores[:, :1]), teacher)


def test_fine_tuning_lowers_its_loss_and_leaves_the_given_detector(scene: Scene) -> None:
    before = Learner()
    given = {name: value.clone() for name, value in before.state_dict().items()}
    done = harden(before, [scene], Gamut.proxy(), SPEC, OptimiseSpec(batch=2, learning_rate=0.05))
    assert len(done.loss) == SPEC.rounds * SPEC.steps
    for number in range(SPEC.rounds):  # each round begins with textures that are new to the detector
        part = done.loss[number * SPEC.steps : (number + 1) * SPEC.steps]
        assert np.mean(part[-4:]) < np.mean(part[:4]) + (0.0 if number == 0 else 0.05)
    assert all(torch.equal(value, given[name]) for name, value in before.state_dict().items())
    changed = [name for name, value in done.detector.state_dict().items() if not torch.equal(value, given[name])]
    assert changed
    assert not any(p.requires_grad for p in done.detector.parameters())
    assert done.detector.name == "learner+hardened"


def test_only_the_last_weights_are_tuned(scene: Scene) -> None:
    spec = replace(SPEC, tuned=0.5, rounds=1, steps=2)
    state, before = hardened(scene, spec).detector.state_dict(), Learner().state_dict()
    changed = {name for name, value in state.items() if not torch.equal(value, before[name])}
    assert changed
    assert changed <= {"size.weight", "size.bias"}


def test_saved_weights_give_the_same_detections(scene: Scene, known: Callable[[], Detector], tmp_path: Path) -> None:
    done = hardened(scene, replace(SPEC, rounds=1, steps=4)).detector
    path = tmp_path / "weights.npz"
    save_hardened(path, done, "learner", SPEC)
    frames = scene.render({n: torch.rand(3, 8, 8) for n in ("shirt", "trousers", "hat")})
    expected, loaded = done(frames), load_hardened(path)(frames)
    assert torch.equal(expected.scores, loaded.scores)
    assert torch.equal(expected.boxes, loaded.boxes)
    assert not torch.equal(expected.scores, known()(frames).scores)
    assert load_hardened(path).name == "learner+hardened"
    assert load_hardened(path).threshold == done.threshold


def test_wrong_weight_files_are_refused(known: Callable[[], Detector], tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="drape harden"):
        load_hardened(tmp_path / "none.npz")
    other = tmp_path / "other.npz"
    save_arrays(other, "drape's textures", {"shirt": np.zeros(3)})
    with pytest.raises(AssetError, match="no file of"):
        load_hardened(other)
    other.write_bytes(b"nothing")
    with pytest.raises(AssetError, match="cannot be read"):
        load_hardened(other)
    with pytest.raises(OutputError, match="npz"):
        save_hardened(tmp_path / "a.pt", known(), "learner", SPEC)
    about = {"base": "learner", "name": "x", "threshold": 0.5}
    save_arrays(other, KIND, {"size.weight": np.zeros(9)}, about)
    with pytest.raises(AssetError, match="does not fit"):
        load_hardened(other)
    shape = known().state_dict()["size.weight"].shape
    save_arrays(other, KIND, {"size.weight": np.full(shape, np.nan)}, about)
    with pytest.raises(AssetError, match="finite"):
        load_hardened(other)
    with pytest.raises(ConfigError, match="a fine-tuned learner, not nanodet"):
        load_hardened(other, "nanodet")


def test_bad_settings_are_refused(scene: Scene) -> None:
    with pytest.raises(ConfigError, match="rounds=0"):
        HardenSpec(rounds=0)
    with pytest.raises(ConfigError, match="tuned=2"):
        HardenSpec(tuned=2)
    with pytest.raises(ConfigError, match="at least one scene"):
        harden(Learner(), [], Gamut.proxy(), SPEC, OptimiseSpec())
