"""What was decided and what it cost, forward by forward, of the latest runs."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

__all__ = ["KEPT", "DeviceTime", "Entry", "Records", "StepRecord", "started", "stopped"]

KEPT = 64  # runs; a server's handle lives for as long as the server
TIMED: dict[str, Any] = {"cuda": torch.cuda, "xpu": torch.xpu}  # devices that work behind the host, and take the time


@dataclass(frozen=True)
class StepRecord:
    """What was decided for one forward, and what it cost.

    Attributes:
        run: counts runs from 0.
        step: counts sampler steps from 0 within the run.
        pass_name: the forward within the step.
        timestep: the value that the transformer was called with, in the model's own unit.
        computed: True if the blocks ran, False if their result was forecast.
        reason: why, as text, such as `"warm-up"`, `"interval"` or `"forecast"`.
        ms: milliseconds of the forward: on the device where that takes the time (CUDA, XPU), elsewhere on the host.
        cache_bytes: bytes of features held after this forward, for all passes together.
        indicator: the number that an adaptive gate went by; None where the schedule was known beforehand.
    """

    run: int
    step: int
    pass_name: str
    timestep: float
    computed: bool
    reason: str
    ms: float
    cache_bytes: int
    indicator: float | None = None

    def to_dict(self) -> dict[str, object]:
        """The record as plain data."""
        return asdict(self)


class DeviceTime:
    """Time between two points of a device's stream, read without waiting when it is known by then."""

    def __init__(self, device: torch.device) -> None:
        self._module = TIMED[device.type]
        self._stream = self._module.current_stream(device)
        self._start = self._point()
        self._end: Any = None

    def _point(self) -> Any:
        event = self._module.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def stop(self) -> None:
        """Mark the end."""
        self._end = self._point()

    @property
    def over(self) -> bool:
        """Whether the device has come to the end."""
        return bool(self._end.query())

    @property
    def ms(self) -> float:
        """Milliseconds; waits for the device if it has not come to the end."""
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end))


def started(device: torch.device) -> float | DeviceTime:
    """Begin to take the time of what is about to happen on a device."""
    if device.type in TIMED and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return DeviceTime(device)
    return time.perf_counter()


def stopped(start: float | DeviceTime) -> float | DeviceTime:
    """Milliseconds since `start`, or what will know them."""
    if isinstance(start, DeviceTime):
        start.stop()
        return start
    return 1e3 * (time.perf_counter() - start)


class Entry(NamedTuple):
    """Fields of a `StepRecord` whose time may not be known yet. Records are made when somebody reads them."""

    run: int
    step: int
    pass_name: str
    timestep: float
    computed: bool
    reason: str
    time: float | DeviceTime
    cache_bytes: int
    indicator: float | None

    def record(self) -> StepRecord:
        """The record; waits for the time."""
        run, step, pass_name, timestep, computed, reason, time, held, indicator = self
        ms = time.ms if isinstance(time, DeviceTime) else time
        return StepRecord(run, step, pass_name, timestep, computed, reason, ms, held, indicator)


class Records:
    """Records by run; those of the oldest runs go when there are more than `KEPT`."""

    def __init__(self) -> None:
        self._runs: dict[int, list[Entry | StepRecord]] = {}

    def add(self, entry: Entry) -> None:
        """Keep the fields of a record, with a time that may be known later."""
        run = self._runs.get(entry.run)
        if run is None:
            self._let_go_of_events()
            run = self._runs[entry.run] = []
            if len(self._runs) > KEPT:
                self._runs.pop(next(iter(self._runs)))
        run.append(entry)

    def _let_go_of_events(self) -> None:
        """A run begins: of the one before, the device has come to the end."""
        for run in list(self._runs.values())[-1:]:
            for i, entry in enumerate(run):
                if isinstance(entry, Entry) and isinstance(entry.time, DeviceTime) and entry.time.over:
                    run[i] = entry.record()

    def of(self, run: int) -> list[StepRecord]:
        """The records of a run."""
        entries = self._runs.get(run, [])
        records = [entry.record() if isinstance(entry, Entry) else entry for entry in entries]
        entries[: len(records)] = records
        return records

    @property
    def runs(self) -> list[int]:
        """Numbers of the runs, in the order in which they began."""
        return list(self._runs)

    @property
    def all(self) -> list[StepRecord]:
        """All records, run by run."""
        return [record for run in list(self._runs) for record in self.of(run)]

    def clear(self) -> None:
        """Drop all."""
        self._runs.clear()
