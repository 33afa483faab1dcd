"""`benchmarks/gpu`: sections are skipped, tried again and kept apart, as its README says; `.ci/run` does a dry run."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module as `run.py` finds it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import harness  # type: ignore[import-not-found,unused-ignore]

    yield harness
    sys.modules.pop("harness", None)


def content(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


def run(harness: ModuleType, folder: Path, dry: bool = True, minutes: float = 1.0, **sections: Any) -> dict[str, str]:
    plans = [harness.Plan(name, measure, 1.0) for name, measure in sections.items()]
    statuses: dict[str, str] = harness.run_sections(
        plans, folder, harness.Device("cpu"), dry, minutes, say=lambda _: None
    )
    return statuses


def test_what_is_done_is_skipped_and_what_failed_is_tried_again(harness: ModuleType, tmp_path: Path) -> None:
    calls: list[str] = []
    broken = True

    def good(bench: Any) -> None:
        calls.append("good")
        bench.row("a", ms=1.0)

    def bad(bench: Any) -> None:
        calls.append("bad")
        bench.row("before", ms=2.0)
        if broken:
            raise ValueError("no such kernel")

    assert run(harness, tmp_path, bad=bad, good=good) == {"bad": "failed", "good": "done"}
    found = content(tmp_path, "bad")
    assert (found["status"], found["error"]) == ("failed", "ValueError: no such kernel")
    assert found["rows"] == [{"name": "before", "ms": 2.0}]  # what was measured before it failed
    assert content(tmp_path, "good")["rows"] == [{"name": "a", "ms": 1.0}]
    broken = False
    assert run(harness, tmp_path, bad=bad, good=good) == {"bad": "done", "good": "done"}
    assert calls == ["bad", "good", "bad"]
    assert "error" not in content(tmp_path, "bad")


def test_a_dry_run_does_not_stand_for_a_measurement(harness: ModuleType, tmp_path: Path) -> None:
    calls: list[bool] = []
    for dry in (True, False, True):
        run(harness, tmp_path, dry=dry, some=lambda bench: calls.append(bench.dry))
    assert calls == [True, False, True]


def test_rows_are_on_the_disk_while_a_section_is_at_work(harness: ModuleType, tmp_path: Path) -> None:
    seen: list[Any] = []

    def section(bench: Any) -> None:
        bench.row("first", ms=1.0)
        seen.append(content(tmp_path, "slow"))
        bench.row("first", bytes=2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(harness, tmp_path, slow=section)
    assert (seen[0]["status"], seen[0]["rows"]) == ("running", [{"name": "first", "ms": 1.0}])
    left = content(tmp_path, "slow")  # whoever interrupts finds what there is, and it is not taken for finished
    assert (left["status"], left["rows"]) == ("running", [{"name": "first", "ms": 1.0, "bytes": 2}])
    assert run(harness, tmp_path, slow=lambda bench: None) == {"slow": "done"}


def test_a_damaged_file_is_no_finished_section(harness: ModuleType, tmp_path: Path) -> None:
    for text in ("", "{", "[]", '"done"'):
        (tmp_path / "some.json").write_text(text)
        assert not harness.already_done(tmp_path / "some.json", True)


def test_sections_share_the_time_and_a_fast_one_leaves_its_part(harness: ModuleType, tmp_path: Path) -> None:
    left: dict[str, float] = {}

    def note(bench: Any) -> None:
        left[bench.name] = bench.left

    run(harness, tmp_path, dry=False, first=note, second=note)
    assert 25 < left["first"] <= 30
    assert 55 < left["second"] <= 60


def test_without_time_a_section_says_so_and_is_not_done(harness: ModuleType, tmp_path: Path) -> None:
    def slow(bench: Any) -> None:
        assert not bench.has_time(1e6, "the rest")
        time.sleep(0.05)

    statuses = run(harness, tmp_path, dry=False, minutes=1e-4, first=slow, second=lambda bench: None)
    assert statuses == {"first": "done", "second": "no time"}
    assert content(tmp_path, "first")["left_out"] == ["the rest"]
    assert content(tmp_path, "second")["status"] == "no time"


def test_targets(harness: ModuleType, tmp_path: Path) -> None:
    def section(bench: Any) -> None:
        bench.target("fast enough", 1.5, 1.48, "more")
        bench.target("small enough", 0.2, 0.1)
        bench.target("not to be had", None, 0.1)
        bench.holds("equal", True)

    run(harness, tmp_path, dry=False, some=section)
    found = {name: target["passed"] for name, target in content(tmp_path, "some")["targets"].items()}
    assert found == {"fast enough": True, "small enough": False, "not to be had": None, "equal": True}
    run(harness, tmp_path, dry=True, some=section)  # times of tiny shapes are not judged, equality is
    found = {name: target["passed"] for name, target in content(tmp_path, "some")["targets"].items()}
    assert found == {"fast enough": None, "small enough": None, "not to be had": None, "equal": True}


def test_one_row_that_fails_ends_no_other(harness: ModuleType, tmp_path: Path) -> None:
    def section(bench: Any) -> None:
        for name, value in (("a", 1.0), ("b", 0.0), ("c", 2.0)):
            try:
                bench.row(name, ms=1 / value)
            except ZeroDivisionError as error:
                bench.failed(name, error)

    run(harness, tmp_path, some=section)
    assert content(tmp_path, "some")["status"] == "done"
    assert [("failed" in row, row.get("ms")) for row in content(tmp_path, "some")["rows"]] == [
        (False, 1.0),
        (True, None),
        (False, 0.5),
    ]


def test_the_device_times_what_it_runs(harness: ModuleType) -> None:
    device = harness.Device("cpu")
    start = device.stamp()
    time.sleep(0.02)
    assert 20 <= device.between(start, device.stamp()) < 2000
    assert device.median_ms(lambda: time.sleep(0.01), repeats=3, warmups=0) >= 10
    assert torch.equal(device.captured(lambda: torch.ones(2)), torch.ones(2))
    assert device.peak() is None  # a CPU counts no bytes, and a zero would pass for a figure


def test_no_torch_travels() -> None:
    names = [line.split("==")[0].lower() for line in (FOLDER / "wheels.txt").read_text().splitlines() if "==" in line]
    assert {"diffusers", "cache-dit", "hicache-pp", "pydantic", "pydantic-core", "flip-evaluator"} <= set(names)
    assert not {"torch", "torchvision", "triton"} & set(names)
    assert not [name for name in names if name.startswith("nvidia")]
