"""The benchmark of the caching methods: what it compares with, when it goes on with what is there."""

from __future__ import annotations

import json
import sys

import pytest
from test_readme import script

from hasten.bench.subject import open_model


def run(monkeypatch, out, work):
    few = {"steps": 6, "counts": 3, "schedules": "even", "arms": "reuse", "learn": 2, "held-out": 2, "batch": 2}
    options = [word for name, value in few.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["caching.py", *options, "--work", str(work), "--out", str(out)])
    script("caching.py")["main"]()
    return json.loads(out.read_text())


def test_going_on_with_an_empty_work_folder_gives_the_same_figures(monkeypatch, tmp_path):
    """The full run is drawn anew then, and must not be drawn with the cache that is being measured."""
    out = tmp_path / "caching.json"
    whole = run(monkeypatch, out, tmp_path / "first")
    lost = whole["rows"].pop("reuse @ even 3")
    assert max(lost["psnr"]) < 60  # reuse is not the full run
    out.write_text(json.dumps(whole))
    again = run(monkeypatch, out, tmp_path / "second")
    assert again["rows"]["reuse @ even 3"]["psnr"] == pytest.approx(lost["psnr"], abs=0.01)


def test_tables_are_of_the_weights_that_models_come_with_or_say_so() -> None:
    """A model is exchanged, and what was measured of the one before stays: nobody may take it for the new one's."""
    common, held_out = script("page_tables/common.py"), script("held_out.py")
    now: dict[str, str] = {}
    for file in sorted((common["ROOT"] / "benchmarks").glob("*.json")):
        result = json.loads(file.read_text())
        name = result.get("model", result.get("options", {}).get("model")) if "weights" in result else None
        if name is None:
            continue  # of a benchmark of one model, which checks them itself
        if name not in now:
            now[name] = held_out["weights_of"](open_model(name))
        is_old = result["weights"] != now[name]
        assert common["model_of"](result) == (f"{name}, first edition" if is_old else name), file.name
    assert len(now) >= 4
