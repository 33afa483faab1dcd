"""Walks and plates of a team's own, and the same figures with several processes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from drape import cli
from drape.controls import control, save_images
from drape.detectors.base import Candidates, Detector
from drape.errors import AssetError, ConfigError, UnknownNameError, WorkerError
from drape.evaluate import Judge
from drape.gamut import Gamut
from drape.own import at_times, own_scenes, read_clip, read_walks
from drape.parallel import end_workers, mapped
from drape.scene.scene import Scene

WALK = {"gait": "stroll", "path": "towards", "light": "overcast", "place": "street", "seconds": 2, "fov": 50}


class Bright(Detector):
    """Sees a person in the whole frame, the surer the brighter it is."""

    def __init__(self, name: str = "bright") -> None:
        super().__init__(name, 64)

    def candidates(self, images: torch.Tensor) -> Candidates:
        box = torch.tensor([0.0, 0, 64, 64]).expand(len(images), 1, 4)
        return Candidates(box, images.mean(dim=(1, 2, 3))[:, None])


def clip(path: Path, frames: int, milliseconds: int = 100) -> Path:
    """An animated GIF that gets brighter."""
    images = [Image.new("RGB", (80, 60), (10 * n, 10 * n, 10 * n)) for n in range(frames)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=milliseconds)
    return path


def walk_file(path: Path, *rows: object) -> Path:
    path.write_text(json.dumps(list(rows)))
    return path


def test_walks_of_a_file(tmp_path: Path) -> None:
    walks = read_walks(walk_file(tmp_path / "walks.json", WALK, {**WALK, "body": "tall"}))
    assert [walk.body for walk in walks] == ["middle", "tall"]
    assert walks[0].fov == 50
    scenes = own_scenes(walks, [], 1.0, 64, "skinned")
    assert [scene.buffers.frames for scene in scenes] == [2, 2]
    assert len({scene.label for scene in scenes}) == 2  # they differ in nothing that a label says


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({**WALK, "gate": "stroll"}, "Did you mean 'gait'"),
        ({**WALK, "gait": "strol"}, "Did you mean 'stroll'"),
        ({**WALK, "place": "moon"}, "place .*walk 1.* 'moon'"),
        ({**WALK, "cloth": "silk"}, "cloth .*'silk'"),
        ({**WALK, "seconds": "long"}, "seconds='long'; expected a number"),
        ({**WALK, "seconds": True}, "expected a number"),
        ({**WALK, "seconds": 900}, "seconds=900"),
        ({"gait": "stroll"}, "has no path, light, place"),
    ],
)
def test_walks_that_cannot_be_are_refused_by_name(row: object, says: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, UnknownNameError), match=says):
        read_walks(walk_file(tmp_path / "walks.json", row))


def test_files_that_hold_no_walks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(AssetError, match="cannot be read"):
        read_walks(tmp_path / "broken.json")
    for rows in ((), (3,)):
        with pytest.raises(ConfigError, match="no list of walks"):
            read_walks(walk_file(tmp_path / "walks.json", *rows))


def test_clips_are_taken_at_the_times_of_a_walk(tmp_path: Path) -> None:
    images, rate = read_clip(clip(tmp_path / "a.gif", 20))
    assert rate == pytest.approx(10)
    assert at_times(images, rate, 4, 2.0, "a")[:, 0, 0, 0].tolist() == [0, 50, 100, 150]
    with pytest.raises(ConfigError, match=r"lasts 2\.0 s and the walk 4\.0 s"):
        at_times(images, rate, 8, 2.0, "a")


def test_a_folder_of_images_is_a_clip_and_other_files_are_none(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for n in (2, 0, 1):
        Image.new("RGB", (8, 8), (n, n, n)).save(folder / f"{n}.png")
    assert read_clip(folder)[0][:, 0, 0, 0].tolist() == [0, 1, 2]
    (tmp_path / "noise.mp4").write_bytes(b"nothing")
    for path in (tmp_path / "noise.mp4", tmp_path / "none.png", tmp_path):
        with pytest.raises(AssetError, match=r"give a|holds no images|imageio\[pyav\]"):
            read_clip(path)


def test_plates_take_turns_and_clips_move(tmp_path: Path) -> None:
    Image.new("RGB", (50, 40), (200, 20, 20)).save(tmp_path / "red.png")
    walks = read_walks(walk_file(tmp_path / "walks.json", WALK, {**WALK, "body": "tall"}))
    moving, still = own_scenes(walks, [clip(tmp_path / "a.gif", 30), tmp_path / "red.png"], 1.0, 64, "skinned")
    corners = [scene.render(control("plain", Gamut.proxy()))[:, :, 0, 0] for scene in (moving, still)]
    assert float(corners[0][1].mean() - corners[0][0].mean()) > 0.2  # one image per second, each 0.4 brighter
    assert float((corners[1][0] - corners[1][1]).abs().max()) < 0.1
    assert float(corners[1][0][0]) > 0.6
    assert "a.gif" in moving.label


def double(value: int) -> int:
    return 2 * value


def own_number(_: int) -> int:
    return os.getpid()


def test_processes_give_the_same_in_the_same_order(scene: Scene) -> None:
    assert list(mapped(double, range(5), jobs=2)) == [0, 2, 4, 6, 8]
    with pytest.raises(ConfigError, match="jobs=0"):
        list(mapped(double, [1], jobs=0))
    with pytest.raises(TypeError):
        list(mapped(double, [None], jobs=2))  # type: ignore[list-item]
    assert len({*mapped(own_number, range(8), jobs=2), *mapped(own_number, range(8), jobs=2)}) <= 2  # they stay
    end_workers()
    with pytest.raises(WorkerError, match="fewer --jobs"):
        list(mapped(os._exit, [9], jobs=2))
    assert list(mapped(double, range(3), jobs=2)) == [0, 2, 4]


@pytest.mark.slow
def test_several_processes_judge_as_one(tmp_path: Path) -> None:
    scenes = own_scenes(
        read_walks(walk_file(tmp_path / "w.json", WALK, {**WALK, "body": "tall"})), [], 1.0, 64, "skinned"
    )
    images = control("plain", Gamut.proxy())
    one, two = (Judge(scenes, jobs).result(Bright(), "plain", images) for jobs in (1, 2))
    assert one == two


def test_own_walks_and_plates_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "load_detector", Bright)
    grey = {name: np.full((3, 8, 8), 0.5, np.float32) for name in ("shirt", "trousers", "hat")}
    save_images(tmp_path / "textures.npz", {name: torch.from_numpy(value) for name, value in grey.items()})
    walks = walk_file(tmp_path / "walks.json", WALK)
    common = ["--out", str(tmp_path)]
    options = ["--walk-file", str(walks), "--plate", str(clip(tmp_path / "a.gif", 30)), "--no-lights"]
    size = ["--fps", "1", "--size", "64", "--cloth", "skinned"]
    for line in (["evaluate", *common, *options, *size], ["report", *common]):
        monkeypatch.setattr(sys, "argv", ["drape", *line])
        cli.app(standalone_mode=False)
    told = json.loads((tmp_path / "evaluate.json").read_text())["conditions"]
    assert told["walks"][0]["fov"] == 50
    assert told["plates"] == [str(tmp_path / "a.gif")]
    assert told["detectors"] == [{"name": "nanodet", "input_size": 64, "threshold": 0.5}]
    assert {"drape", "torch", "numpy", "python", "fps", "gamut"} <= set(told)
    text = (tmp_path / "report.html").read_text()
    assert "a.gif" in text
    assert "<td>stroll</td>" in text
