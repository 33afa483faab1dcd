"""Bad values on the command line: one line that says what to do, exit code 2, before any work."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from drape import cli
from drape.controls import save_images
from drape.io import save_arrays

WRONG = [
    ("optimise --detector nanodte", "Did you mean 'nanodet'?"),
    ("optimise --detector nowhere:f", "nowhere:f cannot be used"),
    ("optimise --detector det:f", "det:f gave a int"),
    ("optimise --detector det:g", "det:g cannot be used (KeyError: 1)"),
    ("optimise --mode frame", "Did you mean 'frames'?"),
    ("optimise --weighting best", "unknown temporal weighting 'best'"),
    ("optimise --steps 0", "expected at least 1"),
    ("optimise --steps 1e30", "'--steps'"),
    ("optimise --fps 0", "'--fps'"),
    ("optimise --fps nan", "'--fps'"),
    ("optimise --size -64", "'--size'"),
    ("optimise --size 1000000", "'--size'"),
    ("optimise --cloth silk", "unknown cloth engine 'silk'"),
    ("optimise --train-walks 99", "'--train-walks'"),
    ("optimise --icc nowhere.icc", "cannot be read as an ICC profile"),
    ("optimise --icc folder", "cannot be read as an ICC profile"),
    ("optimise --against nothing", "unknown defence to attack 'nothing'"),
    ("optimise --against hardened", "needs --hardened FILE"),
    ("optimise --against hardened --hardened nowhere.npz", "nowhere.npz does not exist"),
    ("optimise --against hardened --hardened good/textures.npz", "is no file of drape's fine-tuned weights"),
    ("optimise --product empty.txt", "cannot be read as an image"),
    ("optimise --seed -1", "'--seed'"),
    ("optimise --seed 1e30", "'--seed'"),
    ("optimise --out empty.txt", "empty.txt is no folder"),
    ("optimise --out /proc/nowhere", "cannot be written"),
    ("harden --to folder", "folder is a folder"),
    ("harden --to out.pt", "must end in .npz"),
    ("harden --rounds 0", "expected at least 1 each"),
    ("evaluate --out nowhere", "nowhere/textures.npz does not exist"),
    ("evaluate --out cut", "cut/textures.npz cannot be read"),
    ("evaluate --out nan", "shirt is no image"),
    ("evaluate --out flat", "shirt is no image"),
    ("evaluate --out less", "is no image"),
    ("evaluate --out other", "is no file of drape's textures"),
    ("evaluate --out good --compare folder", "expected NAME=FOLDER"),
    ("evaluate --out good --compare x=nowhere", "nowhere/textures.npz does not exist"),
    ("evaluate --out good --adaptive nothing=good", "unknown defence 'nothing'"),
    ("evaluate --out good --fail-under recal=0.5", "Did you mean 'recall'?"),
    ("evaluate --out good --fail-under recall=nan", "expected MEASURE=VALUE"),
    ("evaluate --out good --fail-under recall=1.1", "from 0 to 1"),
    ("evaluate --out good --fail-under recall=0.1 --fail-under recall=0.9", "recall: that name is taken"),
    ("evaluate --out good --compare optimised=good", "optimised: that name is taken"),
    ("evaluate --out good --compare x=good --compare x=good", "x: that name is taken"),
    ("evaluate --out good --adaptive median=good --adaptive median=good", "median: that name is taken"),
    ("evaluate --out good --detector det:h --adaptive hardened=good", "needs --hardened FILE"),
    ("evaluate --out good --detector det:h --detector det:h", "given twice"),
    ("evaluate --out good --walks 3 --walk-file walks.json", "leave one of them out"),
    ("evaluate --out good --detector det:h --walk-file walks.json --plate a.png --plate b.png", "2 plates for 1 walks"),
    ("evaluate --out good --detector det:h --walk-file walks.json --plate empty.txt", "empty.txt"),
    ("evaluate --out good --detector det:h --walk-file phase.json", "a phase up to"),
    ("evaluate --out good --detector det:h --walk-file seed.json", "a seed of 0 or more"),
    ("harden --detector det:h --to h.npz", "no weights that fine-tuning could change"),
    ("evaluate --out good --walk-file empty.txt", "empty.txt"),
    ("evaluate --out good --walk-file nowhere.json", "nowhere.json cannot be read"),
    ("evaluate --out good --jobs 0", "'--jobs'"),
    ("optimise --product sock=empty.txt", "unknown garment 'sock'"),
    ("optimise --detector nanodet@333", "multiple of 32"),
    ("report --out good", "good/evaluate.json does not exist"),
    ("demo --steps 0", "expected at least 1"),
    ("bench --seeds 0", "'--seeds'"),
    ("bench --steps 0", "expected at least one step"),
    ("bench --other nanodet", "others that are not the detector"),
    ("bench --to folder", "folder is a folder"),
    ("bench --work empty.txt", "empty.txt/spec.json cannot be written"),
    ("bench --walks 99", "'--walks'"),
    ("benhc", "No such command 'benhc'"),
]


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an empty file, a folder, textures that are good, cut off, of other shapes and no numbers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("empty.txt").touch()
    Path("folder").mkdir()
    Path("det.py").write_text(
        "from drape.detectors import Detector\n\n\ndef f():\n    return 3\n\n\ndef g():\n    raise KeyError(1)\n\n\n"
        "def h():\n    return Detector('h', 64)\n"
    )
    walk = {"gait": "stroll", "path": "towards", "light": "sun", "place": "street"}
    for name, changes in {"walks": {}, "phase": {"phase": 1e308}, "seed": {"seed": -3}}.items():
        Path(f"{name}.json").write_text(json.dumps([walk | changes]))
    names = ("shirt", "trousers", "hat")
    save_images(Path("good/textures.npz"), {name: torch.full((3, 8, 8), 0.5) for name in names})
    for folder, shape, value in (("nan", (3, 8, 8), np.nan), ("flat", (8, 8), 0.5)):
        arrays = {name: np.full(shape, value, np.float32) for name in names}
        save_arrays(Path(folder) / "textures.npz", "drape's textures", arrays)
    image = np.zeros((3, 8, 8), np.uint8)
    save_arrays(Path("less/textures.npz"), "drape's textures", {"shirt": image[:2]})
    save_arrays(Path("other/textures.npz"), "drape's things", {"shirt": image})
    Path("cut").mkdir()
    Path("cut/textures.npz").write_bytes(Path("good/textures.npz").read_bytes()[:200])
    return tmp_path


@pytest.mark.parametrize(("line", "says"), WRONG, ids=[line for line, _ in WRONG])
def test_bad_values_are_one_line_before_any_work(
    line: str, says: str, nowhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path for path in nowhere.rglob("*") if path.is_file() and path.suffix != ".pyc")
    for module in ("cli", "own"):
        monkeypatch.setattr(f"drape.{module}.scenes", lambda *_: pytest.fail("walks were rendered"))
    monkeypatch.setattr("drape.detectors.registry.fetch", lambda _: pytest.fail("a detector was fetched"))
    monkeypatch.setattr(sys, "argv", ["drape", *line.split()])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2, error
    assert len(error.splitlines()) == 1
    assert error.startswith("error: ")
    assert says in error
    left = sorted(path for path in nowhere.rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert left == before
