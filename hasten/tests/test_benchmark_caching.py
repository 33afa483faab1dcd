"""The benchmark of the caching methods: what it compares with, when it goes on with what is there."""

from __future__ import annotations

import json
import sys

import pytest
from test_readme import script


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
