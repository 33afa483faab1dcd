"""What the sections of `run.py` share: a clock on the device, a file that is written as the work goes on, verdicts."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hasten.bench.environment import environment
from hasten.io import write_atomically

MIB = 2**20


class Device:
    """Where it runs: stamps, memory and graphs of a GPU, and what stands for them on a CPU in a dry run."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.on_gpu = name != "cpu"

    def stamp(self) -> Any:
        """A point in the device's own time, recorded without waiting."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Milliseconds between two stamps; call `wait` first."""
        return float(start.elapsed_time(end)) if self.on_gpu else 1e3 * (end - start)

    def wait(self) -> None:
        """Until everything that was launched is done."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def held(self) -> int | None:
        """Bytes of tensors now; None on a CPU, which does not count them."""
        return int(torch.cuda.memory_allocated()) if self.on_gpu else None

    def reset_peak(self) -> None:
        """Begin to watch for the most bytes held."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        """Most bytes of tensors since `reset_peak`; None on a CPU."""
        return int(torch.cuda.max_memory_allocated()) if self.on_gpu else None

    def free(self) -> None:
        """Give memory back that nothing holds any more."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def captured(self, run: Callable[[], Any]) -> Any:
        """What `run` returns when it is replayed from a CUDA graph; on a CPU, when it is called."""
        if not self.on_gpu:
            return run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()
        graph.replay()
        self.wait()
        return result

    def median_ms(self, run: Callable[[], Any], repeats: int, warmups: int = 2) -> float:
        """Median milliseconds of a call, between events on the device."""
        for _ in range(warmups):
            run()
        stamps = [self.stamp()]
        for _ in range(repeats):
            run()
            stamps.append(self.stamp())
        self.wait()
        return median(self.between(a, b) for a, b in pairwise(stamps))


@dataclass(eq=False)
class Bench:
    """One section at work: its rows and verdicts, which are on the disk as soon as they are known.

    Args:
        name: of the section.
        path: of its JSON file.
        device: where it runs.
        dry: tiny shapes, which show that everything runs and nothing else.
        deadline: when it should be done, as `time.monotonic` counts.
    """

    name: str
    path: Path
    device: Device
    dry: bool
    deadline: float
    options: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    targets: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds until it should be done."""
        return self.deadline - time.monotonic()

    def has_time(self, seconds: float, what: str) -> bool:
        """Whether there are so many seconds for something; if not, the file says that it was left out."""
        enough = self.dry or self.left >= seconds
        if not enough:
            self.left_out.append(what)
        return enough

    def row(self, key: str, **figures: Any) -> None:
        """Add figures to a row; the file is written again."""
        self.rows.setdefault(key, {}).update(figures)
        self.write("running")

    def failed(self, key: str, error: BaseException) -> None:
        """A row that could not be measured, and why; the others go on."""
        self.row(key, failed=one_line(error))
        self.device.free()

    def target(self, key: str, value: float | None, limit: float, better: str = "less") -> None:
        """Hold a figure to its target; one that was not measured (None), or of tiny shapes, is not judged."""
        judged = value is not None and not self.dry
        passed = (value <= limit if better == "less" else value >= limit) if judged and value is not None else None
        self.targets[key] = {"value": value, "target": limit, "better": better, "passed": passed}

    def holds(self, key: str, value: bool) -> None:
        """A target that holds or does not, for tiny shapes too."""
        self.targets[key] = {"value": value, "target": True, "better": "equal", "passed": value}

    def write(self, status: str, error: str | None = None) -> None:
        """Write the section's file, atomically."""
        content = {
            "section": self.name,
            "status": status,
            **({"error": error} if error else {}),
            "dry_run": self.dry,
            "environment": environment(),
            "seconds": round(time.monotonic() - self.started, 1),
            **self.facts,
            "targets": self.targets,
            "rows": [{"name": name, **row} for name, row in self.rows.items()],
            "left_out": self.left_out,
        }
        write_atomically(self.path, json.dumps(rounded(content), indent=1) + "\n")


Section = Callable[[Bench], None]


@dataclass(frozen=True)
class Plan:
    """A section and the share of the time that it may take, if those before it took theirs."""

    name: str
    measure: Section
    share: float


def run_sections(
    plans: Sequence[Plan],
    out: Path,
    device: Device,
    dry: bool,
    minutes: float,
    options: dict[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, str]:
    """Work through the sections in their order; one that was done earlier is skipped, one that fails ends no other.

    Args:
        plans: in order of worth.
        out: folder of the files, one per section.
        device: where to run.
        dry: with tiny shapes.
        minutes: for all of them; a section that is done early leaves its time to those behind it.
        options: what sections may ask for.
        say: told about each section.

    Returns:
        the status of each section: `"done"`, `"failed"`, or `"no time"` for one that was not begun.
    """
    begun, statuses = time.monotonic(), {}
    whole = sum(plan.share for plan in plans)
    for i, plan in enumerate(plans):
        path = out / f"{plan.name}.json"
        if already_done(path, dry):
            say(f"{plan.name}: done earlier, in {path}")
            statuses[plan.name] = "done"
            continue
        deadline = begun + 60 * minutes * sum(earlier.share for earlier in plans[: i + 1]) / whole
        bench = Bench(plan.name, path, device, dry, deadline, options or {})
        if bench.left <= 0 and not dry:
            bench.write("no time")
            say(f"{plan.name}: no time")
            statuses[plan.name] = "no time"
            continue
        statuses[plan.name] = _run(plan, bench)
        say(summary_of(bench, statuses[plan.name]))
        device.free()
    return statuses


def _run(plan: Plan, bench: Bench) -> str:
    try:
        bench.write("running")
        plan.measure(bench)
    except Exception as error:  # whatever it is, the sections behind it are worth running
        traceback.print_exc()
        bench.write("failed", one_line(error))
        return "failed"
    wrong = found_wrong(bench) if bench.dry else []
    if wrong:  # a dry run is there to find what would be lost on a GPU
        bench.write("failed", "; ".join(wrong))
        return "failed"
    bench.write("done")
    return "done"


def found_wrong(bench: Bench) -> list[str]:
    """Rows of a section that failed, but for a package that is not installed, and what does not hold."""
    rows = [f"{name}: {row['failed']}" for name, row in bench.rows.items() if "failed" in row]
    untrue = [f"{name} does not hold" for name, target in bench.targets.items() if target["passed"] is False]
    return [row for row in rows if "not installed" not in row] + untrue


def already_done(path: Path, dry: bool) -> bool:
    """Whether a file holds a finished section; one of a dry run does not stand for one that measured."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("status") == "done" and content.get("dry_run") == dry


def summary_of(bench: Bench, status: str) -> str:
    """A section's targets as lines of text."""
    signs = {True: "pass", False: "FAIL", None: "-"}
    lines = [f"{bench.name}: {status}, {time.monotonic() - bench.started:.0f} s"]
    for name, target in bench.targets.items():
        value, limit = (f"{x:.4g}" if isinstance(x, float) else str(x) for x in (target["value"], target["target"]))
        bound = {"less": "<= ", "more": ">= ", "equal": ""}[target["better"]]
        lines.append(f"  {signs[target['passed']]:4s}  {name}: {value} (target {bound}{limit})")
    lines += [f"  failed  {name}: {row['failed']}" for name, row in bench.rows.items() if "failed" in row]
    return "\n".join(lines + [f"  left out  {what}" for what in bench.left_out])


def one_line(error: BaseException) -> str:
    """An error as one line of text."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}"


def rounded(value: Any) -> Any:
    """Floats to five significant digits; not-a-number and infinity, which JSON does not know, as text."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if abs(value) < float("inf") else str(value)
    return value
