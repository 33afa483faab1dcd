"""Optimisation, evaluation, report and command line, against a detector that is made up and quick."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from drape import cli
from drape.controls import control, random_textures
from drape.detectors.base import Candidates, Detector
from drape.errors import AssetError, ConfigError, UnknownNameError
from drape.evaluate import evaluate, evaluate_defences
from drape.gamut import Gamut
from drape.objective import Temporal
from drape.optimise import MODES, OptimiseSpec, Run, optimise
from drape.report import animation
from drape.scene.light import light
from drape.scene.places import Plate
from drape.scene.scene import Scene
from drape.scene.sequence import Buffers

SMALL = OptimiseSpec(steps=8, batch=2, mosaic=1, learning_rate=0.04)


class Red(Detector):
    """Sees a person where the frame is more red than blue; its box is the whole frame."""

    def __init__(self) -> None:
        super().__init__("red", 64)
        self.calls: list[tuple[int, bool]] = []

    def candidates(self, images: torch.Tensor) -> Candidates:
        self.calls.append((len(images), images.requires_grad))
        redness = (images[:, 0] - images[:, 2]).mean(dim=(1, 2)) * 25 + 0.6
        box = torch.tensor([0.0, 0, 64, 64]).expand(len(images), 1, 4)
        return Candidates(box, redness.clamp(0.01, 0.99)[:, None])


def run(mode: str, detector: Detector, scene: Scene, **changes: object) -> tuple[Run, dict[str, torch.Tensor]]:
    textures = random_textures(Gamut.proxy(), seed=3)
    result = optimise(textures, [detector], [scene], replace(SMALL, mode=mode, **changes))  # type: ignore[arg-type]
    return result, {name: t(hard=True).detach() for name, t in textures.items()}


@pytest.mark.parametrize("mode", MODES)
def test_optimised_textures_are_seen_less_and_stay_printable(mode: str, scene: Scene) -> None:
    before = evaluate(Red(), [scene], control("random", Gamut.proxy(), seed=3))
    result, images = run(mode, Red(), scene)
    after = evaluate(Red(), [scene], images)
    assert after["mean_confidence"] < before["mean_confidence"] - 0.05
    assert len(result.confidence) == SMALL.steps
    assert all(Gamut.proxy().is_fixed(image.permute(1, 2, 0)) for image in images.values())


@pytest.mark.parametrize("mode", MODES)
def test_all_modes_take_as_many_backward_passes(mode: str, scene: Scene) -> None:
    """Counted at the detector: frames with a gradient, and frames that were only looked at."""
    detector = Red()
    result, _ = run(mode, detector, scene, steps=3)
    backward = sum(count for count, gradient in detector.calls if gradient)
    assert backward == result.backward == 3 * SMALL.batch
    looked = sum(count for count, gradient in detector.calls if not gradient)
    assert looked == result.forward == (scene.buffers.frames if mode == "sequence" else 0)


@pytest.mark.parametrize("mode", MODES)
def test_mosaics_take_more_persons_for_as_many_passes(mode: str, scene: Scene) -> None:
    """Four cut-outs of a quarter each in one pass: looked at and followed backwards."""
    detector, shown = Red(), scene.buffers.frames
    result, _ = run(mode, detector, scene, steps=3, batch=1, mosaic=2)
    assert [count for count, gradient in detector.calls if gradient] == [1, 1, 1]
    assert result.backward == 3
    assert result.forward == sum(count for count, gradient in detector.calls if not gradient)
    assert result.forward == (shown / 4 if mode == "sequence" else 0)
    before = evaluate(Red(), [scene], control("random", Gamut.proxy(), seed=3))
    _, images = run(mode, Red(), scene, batch=1, mosaic=2)
    assert evaluate(Red(), [scene], images)["mean_confidence"] < before["mean_confidence"] - 0.03


def test_static_poses_are_one_frame_per_walk(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: set[int] = set()
    real = Scene.render

    def render(self: Scene, images: object, frames: list[int] | None = None, relight: object = None) -> torch.Tensor:
        shown.update(frames or range(self.buffers.frames))
        return real(self, images, frames, relight)  # type: ignore[arg-type]

    monkeypatch.setattr(Scene, "render", render)
    run("static", Red(), scene, steps=4)
    assert shown == {scene.buffers.frames // 2}
    run("frames", Red(), scene, steps=4)
    assert len(shown) > 1


def test_optimisation_is_that_of_its_seed(scene: Scene) -> None:
    first, second, other = (run("sequence", Red(), scene, seed=s, steps=2)[0].confidence for s in (0, 0, 1))
    assert first == second
    assert first != other


@pytest.mark.parametrize("weighting", ["uniform", "hard", "curriculum", "run"])
def test_every_weighting_lowers_the_confidence(weighting: str, scene: Scene) -> None:
    result, _ = run("sequence", Red(), scene, temporal=Temporal(mode=weighting))
    assert result.confidence[-1] < result.confidence[0]


def test_bad_optimisations_are_refused(scene: Scene, walk: Buffers, plate: Plate) -> None:
    with pytest.raises(UnknownNameError, match="sequence"):
        OptimiseSpec(mode="sequnce")
    with pytest.raises(ConfigError, match="steps=0"):
        OptimiseSpec(steps=0)
    with pytest.raises(ConfigError, match="mosaic=0"):
        OptimiseSpec(mosaic=0)
    with pytest.raises(ConfigError, match="at least one"):
        optimise({}, [Red()], [scene], SMALL)
    with pytest.raises(ConfigError, match="leaves the image"):
        Scene("x", replace(walk, boxes=torch.full((4, 4), torch.nan)), light("overcast"), plate)
    with pytest.raises(ConfigError, match="label"):
        evaluate(Red(), [scene, scene], control("plain", Gamut.proxy()))


def test_evaluation_scales_scores_to_one_threshold(scene: Scene) -> None:
    """A detector with a threshold of .2 that gives .6 is as sure as one with .5 that gives .75."""
    detector = Red()
    detector.threshold = 0.2
    grey = {name: torch.full((3, 8, 8), 0.5) for name in ("shirt", "trousers", "hat")}
    raw, scaled = (evaluate(d, [scene], grey)["curves"]["circle"] for d in (Red(), detector))
    expected = [0.5 + (r - 0.2) / 1.6 if r >= 0.2 else r / 0.4 for r in raw]
    assert scaled == pytest.approx(expected, abs=1e-5)
    assert scaled != pytest.approx(raw, abs=1e-2)


def test_defences_are_reported_beside_the_attack(scene: Scene) -> None:
    plain = control("plain", Gamut.proxy())
    rows = evaluate_defences(Red(), [scene], plain)
    assert set(rows) == {"aggregate", "median"}
    expected = {"aggregate", "median", "consensus", "union", "consensus+aggregate", "union+aggregate"}
    second, third = Red(), Red()
    second.name, third.name = "second", "third"
    assert set(evaluate_defences(Red(), [scene], plain, [second])) == expected
    assert "hardened+consensus" not in evaluate_defences(Red(), [scene], plain, hardened=third)
    bare = evaluate(Red(), [scene], plain)
    assert rows["aggregate"]["recall"] >= bare["recall"]


def test_animation_draws_the_box() -> None:
    gif = Image.open(io.BytesIO(animation(torch.zeros(3, 3, 20, 20), [None, torch.tensor([2.0, 3, 15, 18]), None])))
    assert gif.n_frames >= 2
    gif.seek(1)
    assert gif.convert("RGB").getpixel((2, 10))[1] > 150  # type: ignore[index]
    assert gif.convert("RGB").getpixel((8, 10))[1] < 50  # type: ignore[index]
    with pytest.raises(ConfigError, match="boxes"):
        animation(torch.zeros(3, 3, 20, 20), [None])


def test_demo_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "load_detector", lambda name: Red())
    arguments = ["demo", "--steps", "2", "--fps", "0.5", "--size", "64", "--cloth", "skinned", "--out", str(tmp_path)]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    measured = json.loads((tmp_path / "evaluate.json").read_text())
    assert {"plain", "random", "product", "noise", "optimised"} <= set(measured["results"])
    assert set(measured["defences"]) == {"aggregate", "median"}
    assert json.loads((tmp_path / "demo.json").read_text())["seconds"] > 0
    text = (tmp_path / "report.html").read_text()
    assert text.count("data:image/gif") == 2
    assert "proxy gamut" in text
    assert 'src="http' not in text  # one page, no outside files


def test_report_without_evaluation_says_what_to_run(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["report", "--out", str(tmp_path)])
    assert isinstance(result.exception, AssetError)
    assert "drape evaluate" in str(result.exception)
