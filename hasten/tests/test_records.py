"""Times of a device that works behind the host: a stand-in for `torch.cuda` whose clock this file turns."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hasten.pipeline import records
from hasten.pipeline.records import KEPT, Entry, Records, started, stopped

DEVICE = torch.device("meta")


class Stream:
    """A device that has been given `queued` milliseconds of work and has done `done` of it."""

    def __init__(self) -> None:
        self.queued = self.done = 0.0
        self.waits = 0

    def event(self, *, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream, self.at = stream, float("nan")

    def record(self, stream: Stream) -> None:
        assert stream is self.stream
        self.at = stream.queued

    def query(self) -> bool:
        return self.stream.done >= self.at

    def synchronize(self) -> None:
        if not self.query():
            self.stream.waits += 1
            self.stream.done = self.at

    def elapsed_time(self, end: Event) -> float:
        assert end.query(), "the device has not come to this event"
        return end.at - self.at


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    stream = Stream()
    module = SimpleNamespace(Event=stream.event, current_stream=lambda _device: stream)
    monkeypatch.setitem(records.TIMED, "meta", module)
    return stream


def run(kept: Records, stream: Stream, number: int, *costs: float) -> None:
    for step, cost in enumerate(costs):
        start = started(DEVICE)
        stream.queued += cost
        kept.add(Entry(number, step, "cond", 1.0, True, "warm-up", stopped(start), 0, None))


def events(kept: Records) -> int:
    entries: list[Any] = [entry for entries in kept._runs.values() for entry in entries]
    return sum(isinstance(getattr(entry, "time", None), records.DeviceTime) for entry in entries)


def test_forwards_are_timed_on_the_device_and_nobody_waits_until_the_times_are_read(stream: Stream) -> None:
    kept = Records()
    run(kept, stream, 0, 30.0, 2.0, 31.0)
    assert stream.waits == 0
    assert [record.ms for record in kept.of(0)] == [30.0, 2.0, 31.0]
    assert stream.waits == 3
    assert events(kept) == 0
    kept.of(0)
    assert stream.waits == 3


def test_a_long_lived_handle_holds_the_events_of_one_run(stream: Stream) -> None:
    kept = Records()
    for number in range(3 * KEPT):
        run(kept, stream, number, 1.0, 2.0)
        stream.done = stream.queued
        assert events(kept) == 2
    assert stream.waits == 0
    assert kept.runs == list(range(2 * KEPT, 3 * KEPT))
    assert {record.ms for record in kept.all} == {1.0, 2.0}


def test_events_of_a_device_that_lags_behind_are_kept_and_not_waited_for(stream: Stream) -> None:
    kept = Records()
    run(kept, stream, 0, 1.0)
    run(kept, stream, 1, 4.0)
    assert (events(kept), stream.waits) == (2, 0)
    assert [record.ms for record in kept.all] == [1.0, 4.0]


def test_a_host_takes_its_own_time() -> None:
    assert 0.0 <= stopped(started(torch.device("cpu"))) < 1000
