"""`benchmarks/gpu`: sections are skipped, tried again and kept apart, as its README says; `.ci/run` does a dry run."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from hasten.pipeline import records

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module as `run.py` finds it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import harness  # type: ignore[import-not-found,unused-ignore]

    yield harness
    sys.modules.pop("harness", None)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules of the benchmark."""
    names = ("harness", "models", "flux", "exact")
    monkeypatch.syspath_prepend(str(FOLDER))
    with torch.no_grad():
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name, None)


def bench_of(gpu: SimpleNamespace, folder: Path, device: Any = None) -> Any:
    device = device or gpu.harness.Device("cpu")
    return gpu.harness.Bench("some", folder / "some.json", device, True, time.monotonic() + 1e6)


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

    run(harness, tmp_path, dry=False, some=section)
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


def test_a_dry_run_is_not_done_where_a_row_failed_or_something_does_not_hold(
    harness: ModuleType, tmp_path: Path
) -> None:
    def rows(error: Exception | None, holds: bool) -> Any:
        def section(bench: Any) -> None:
            bench.holds("equal", holds)
            if error is not None:
                bench.failed("a", error)

        return section

    missing = ImportError("some-package is not installed")
    sections = {"bad": (ValueError("no"), True), "untrue": (None, False), "bare": (missing, True), "good": (None, True)}
    for dry, expected in ((True, ["failed", "failed", "done", "done"]), (False, ["done"] * 4)):
        folder = tmp_path / str(dry)
        assert list(run(harness, folder, dry, **{k: rows(*v) for k, v in sections.items()}).values()) == expected
    assert content(tmp_path / "True", "bad")["error"] == "a: ValueError: no"


def test_leap_draws_what_eulers_method_draws(gpu: SimpleNamespace) -> None:
    rig = gpu.models.flux(gpu.harness.Device("cpu"), dry=True)
    levels = [1.0, 0.75, 0.5, 0.25]
    plain = rig.copy()
    plain.pipe.scheduler = type(rig.pipe.scheduler)(shift=1.0)
    arm = gpu.flux.leap_arm(rig, 8, 4)
    assert torch.allclose(arm.rig.draw(4), plain.draw(4, sigmas=levels), atol=1e-4)


class Events:
    """A device that takes the time, and counts how often its host waits for it."""

    def __init__(self) -> None:
        self.waits = 0
        self.Event = self.event

    def current_stream(self, _: Any) -> None:
        return None

    def event(self, **_: Any) -> Any:
        def wait() -> None:
            self.waits += 1

        return SimpleNamespace(record=lambda _: None, query=lambda: True, synchronize=wait, elapsed_time=lambda _: 1.0)


def test_no_timed_step_waits_for_the_device_and_skipped_ones_are_told_apart(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, seen = Events(), []
    monkeypatch.setitem(records.TIMED, "cpu", events)
    monkeypatch.setattr(gpu.flux, "COMPILED", (("plain", ""), ("taylorseer", "hidden")))
    bench = bench_of(gpu, tmp_path)
    own, timed = bench.device.stamp, gpu.flux.timed

    def stamp() -> Any:
        seen.append(events.waits)
        return own()

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.clear()
        call = timed(*args, **kwargs)
        assert len(set(seen[:-1])) == 1  # from the start to the end of the last step
        return call

    monkeypatch.setattr(bench.device, "stamp", stamp)
    monkeypatch.setattr(gpu.flux, "timed", watched)
    gpu.flux.measure_compiled(bench, gpu.models.flux(bench.device, dry=True), 8, 4, {})
    plain, fast = bench.rows.values()
    assert (plain["computed_steps"], plain["skipped_ms"]) == (8, None)
    assert fast["computed_steps"] == 4
    assert None not in (fast["skipped_ms"], fast["host_skipped_ms"], fast["host_computed_ms"])


def test_an_arm_that_fails_in_its_round_ends_no_other(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, base = bench_of(gpu, tmp_path), gpu.models.flux(gpu.harness.Device("cpu"), dry=True)
    arms = [gpu.flux.Arm(name, base, 4, "hidden" * (name == "b")) for name in ("plain, 4 steps", "a (peer)", "b", "c")]
    own = gpu.flux.called
    for arm in arms:
        arm.overhead = own(bench.device, arm, waiting=True)

    def called(device: Any, arm: Any) -> Any:
        if arm.name in ("plain, 4 steps", "a (peer)"):
            raise torch.OutOfMemoryError("out of memory")
        return own(device, arm)

    monkeypatch.setattr(gpu.flux, "called", called)
    gpu.flux.in_turn(bench, arms, 4, {})
    assert ["failed" in row for row in bench.rows.values()] == [True, True, False, False]
    assert bench.rows["c"]["total_ms"] > 0


def test_arms_for_which_there_is_no_time_are_left_out(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, base = bench_of(gpu, tmp_path), gpu.models.flux(gpu.harness.Device("cpu"), dry=True)
    kept: list[str] = []

    def has_time(seconds: float, what: str) -> bool:
        kept.append(what)
        return what.startswith("plain") or (0 < seconds < 1e4 and what == "cheap")

    def wanted(*_: Any) -> Iterator[Any]:
        for name, plain_calls in (("plain", 2.0), ("cheap", 0.1), ("dear", 1e9)):
            yield name, plain_calls, lambda name=name: gpu.flux.Arm(name, base, 4)

    monkeypatch.setattr(bench, "has_time", has_time)
    monkeypatch.setattr(gpu.flux, "wanted", wanted)
    assert [arm.name for arm in gpu.flux.warmed(bench, base, base, 4, 2)] == ["plain", "cheap"]
    assert kept == ["plain", "cheap", "dear"]


@pytest.mark.parametrize("sees", [True, False])
def test_a_profiler_that_sees_nothing_of_the_device_proves_nothing(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sees: bool
) -> None:
    bench = bench_of(gpu, tmp_path)
    rig = gpu.models.flux(bench.device, dry=True)
    monkeypatch.setattr(bench.device, "on_gpu", True)  # of what follows only the judgement
    monkeypatch.setattr(bench.device, "wait", lambda: None)
    found = {"scalar_reads": 0.0, "waits": float(sees), "copies": 0.0}
    monkeypatch.setattr(gpu.exact, "per_step", lambda *_: found)
    monkeypatch.setattr(gpu.exact, "SCHEDULED", ("reuse", "taylorseer"))
    gpu.exact.waits(bench, rig)
    values = {name: target["value"] for name, target in bench.targets.items()}
    assert values["waits of a skipped step, taylorseer hidden"] == (0.0 if sees else None)
    assert values["copies of a skipped step, taylorseer output"] == (0.0 if sees else None)
    assert values["some steps are skipped, fbcache"] is True


def test_no_torch_travels() -> None:
    names = [line.split("==")[0].lower() for line in (FOLDER / "wheels.txt").read_text().splitlines() if "==" in line]
    assert {"diffusers", "cache-dit", "hicache-pp", "pydantic", "pydantic-core", "flip-evaluator"} <= set(names)
    assert not {"torch", "torchvision", "triton"} & set(names)
    assert not [name for name in names if name.startswith("nvidia")]
