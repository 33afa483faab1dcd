"""What was decided and what it cost, forward by forward, of the latest runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass

__all__ = ["KEPT", "Records", "StepRecord"]

KEPT = 64  # runs; a server's handle lives for as long as the server


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
        ms: wall-clock milliseconds of the forward on the host (asynchronous devices may still be computing).
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


class Records:
    """Records by run; those of the oldest runs go when there are more than `KEPT`."""

    def __init__(self) -> None:
        self._runs: dict[int, list[StepRecord]] = {}

    def add(self, record: StepRecord) -> None:
        """Keep a record."""
        run = self._runs.get(record.run)
        if run is None:
            run = self._runs[record.run] = []
            if len(self._runs) > KEPT:
                self._runs.pop(next(iter(self._runs)))
        run.append(record)

    def of(self, run: int) -> list[StepRecord]:
        """The records of a run."""
        return self._runs.get(run, [])

    @property
    def runs(self) -> list[int]:
        """Numbers of the runs, in the order in which they began."""
        return list(self._runs)

    @property
    def all(self) -> list[StepRecord]:
        """All records, run by run."""
        return [record for run in list(self._runs.values()) for record in run]

    def clear(self) -> None:
        """Drop all."""
        self._runs.clear()
