"""Walks that controls decide are left out, by a rule that no attack has a part in."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from drape.detectors.base import Candidates, Detector
from drape.errors import ConfigError
from drape.scene.scene import Scene
from drape.screening import SEEN, SPARED, TAKEN, decided, screen
from drape.walks import CANDIDATES, SCREENED, TEST, TRAIN, TRAIN_CANDIDATES

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


class Brightness(Detector):
    """Sees a person in the whole frame, as surely as the frame is bright at the middle of the person."""

    def __init__(self) -> None:
        super().__init__("brightness", 64)
        self.looked = 0

    def candidates(self, images: torch.Tensor) -> Candidates:
        self.looked += len(images)
        whole = torch.tensor([0.0, 0, 64, 64]).expand(len(images), 1, 4)
        return Candidates(whole, (images.amax(dim=(1, 2, 3)) > 0.9).float()[:, None])


def clothes(**shades: float) -> dict[str, dict[str, torch.Tensor]]:
    garments = ("shirt", "trousers", "hat")
    return {name: dict.fromkeys(garments, torch.full((3, 8, 8), shade)) for name, shade in shades.items()}


@pytest.mark.parametrize(
    ("recalls", "reason"),
    [
        ({"plain": SEEN - 0.01}, "not seen"),
        ({"plain": 1.0, "noise": SPARED - 0.01, "random": 0.0}, "hidden"),
        ({"plain": 1.0, "noise": 1.01 - TAKEN, "random": 1.0}, "touched"),
        ({"plain": 0.7, "noise": 0.7, "random": 0.72}, "touched"),
        ({"plain": SEEN, "noise": SPARED - 0.01, "random": SPARED}, ""),
        ({"plain": 1.0, "noise": 0.99 - TAKEN, "random": 1.0}, ""),
    ],
)
def test_controls_decide_where_no_texture_could_change_the_verdict(recalls: dict[str, float], reason: str) -> None:
    assert decided(recalls).startswith(reason)
    assert bool(decided(recalls)) == bool(reason)


def test_verdicts_need_plain_clothes_and_another_control(scene: Scene) -> None:
    for recalls in ({"noise": 1.0}, {"plain": 1.0}):
        with pytest.raises(ConfigError, match="expected"):
            decided(recalls)
    with pytest.raises(ConfigError, match="at least one other"):
        screen(Brightness(), scene, clothes(plain=1.0))


def test_no_more_controls_are_looked_at_than_the_verdict_needs(scene: Scene) -> None:
    seen, hidden = 1.0, 0.0
    unseen = screen(Brightness(), scene, clothes(noise=seen, plain=hidden, random=seen))
    assert unseen == {"plain": 0.0}
    detector = Brightness()
    all_of_them = screen(detector, scene, clothes(noise=seen, plain=seen, random=seen))
    assert all_of_them == {"plain": 1.0, "noise": 1.0, "random": 1.0}
    assert detector.looked == 3 * scene.buffers.frames
    assert decided(all_of_them).startswith("touched")
    assert screen(Brightness(), scene, clothes(plain=seen, noise=hidden, random=seen, product=seen)) == {
        "plain": 1.0,
        "noise": 0.0,
        "random": 1.0,  # one that spares and one that takes: the rest changes nothing
    }


def test_the_walks_are_those_that_the_kept_figures_leave() -> None:
    kept: dict[str, Any] = json.loads(SCREENED.read_text(encoding="utf-8"))
    for name, candidates, taken in (("test", CANDIDATES, TEST), ("train", TRAIN_CANDIDATES, TRAIN)):
        rows = kept[name]
        assert [row["number"] for row in rows] == list(range(len(rows)))
        assert [row["walk"] for row in rows] == [walk.label() for walk in candidates[: len(rows)]]
        assert all(row["left_out"] == decided(row["recall"]) for row in rows)
        left = {row["walk"] for row in rows if row["left_out"]}
        assert left.isdisjoint(walk.label() for walk in taken)
        first = [walk for walk in candidates if walk.label() not in left]
        assert list(taken) == first[: len(taken)]


def test_a_script_that_chooses_walks_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("choose_walks", BENCHMARKS / "choose_walks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    asked: list[int] = []

    def looked_at(walk: object, number: int, fps: float, size: int, tools: object) -> dict[str, Any]:
        asked.append(number)
        return {"number": number, "left_out": "" if number % 2 else "not seen in plain clothes"}

    monkeypatch.setattr(module, "SCREENED", tmp_path / "walks.json")
    monkeypatch.setattr(module, "looked_at", looked_at)
    monkeypatch.setattr(module, "load_detector", lambda name: None)
    monkeypatch.setattr(module, "SETS", {"test": (CANDIDATES[:9], 3), "train": (CANDIDATES[:2], 5)})
    module.main(3.0, 64)
    assert asked == [0, 1, 2, 3, 4, 5, 0, 1]
    module.main(3.0, 64)
    assert len(asked) == 8
    kept = json.loads((tmp_path / "walks.json").read_text(encoding="utf-8"))
    assert [len(kept[name]) for name in ("test", "train")] == [6, 2]
    module.main(3.0, 32)  # other frames: nothing of before holds
    assert len(asked) == 16
