"""The state machine of `machine.py`, for seconds; `benchmarks/fuzz.py` runs it for long."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings
from machine import Machine

TestAnyOrder = Machine.TestCase
TestAnyOrder.settings = settings(
    max_examples=5,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    phases=(Phase.generate,),  # shrinking takes minutes; `benchmarks/fuzz.py --shrink` does it
    suppress_health_check=list(HealthCheck),
)
