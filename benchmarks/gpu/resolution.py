"""Do resolution methods save as much time as operations? At FLUX.1's, Kontext's and Wan 2.1's sizes.

Operations are counted in an arm's first call; its second one is timed. A plain step is counted and timed in a few
steps, all of which are alike.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import hasten
import models
from flux import step_flops
from harness import Bench
from models import Rig

PLAIN_STEPS = 6
VIDEO_STEPS = 10
LEAST = 0.9  # of the operations' ratio


@dataclass(frozen=True)
class Case:
    """A model and the methods to try on it.

    Attributes:
        name: of the model.
        make: the model.
        methods: each with the steps of its run.
        steps: of the plain run that they are compared with.
        seconds: that it needs, about.
    """

    name: str
    make: Callable[[Bench], Rig]
    methods: tuple[tuple[str, Any, int], ...]
    steps: int
    seconds: float


def cases(dry: bool) -> list[Case]:
    """Images, edits, videos."""
    presets: tuple[Literal["30", "18", "11", "9"], ...] = ("30", "18", "11", "9")
    fresco = tuple((f"fresco {preset}", hasten.Fresco(preset=preset), int(preset)) for preset in presets)
    edit = (("specedit", hasten.SpecEdit(discrepancy="latent", selector="top"), 20),)
    dvg = (("dvg", hasten.DVG(budget=0.5), VIDEO_STEPS),)
    small = models.WAN_1B
    long, short = (25, 25) if dry else (81, 33)  # frames
    return [
        Case("FLUX.1-dev, 1024x1024", lambda b: models.flux(b.device, b.dry), fresco, 50, 20),
        Case("FLUX.1 Kontext, 1024x1024", lambda b: models.flux(b.device, b.dry, "FluxKontextPipeline"), edit, 50, 15),
        Case("Wan 2.1 1.3B, 480x832", lambda b: models.wan(b.device, b.dry, long, **small), dvg, VIDEO_STEPS, 20),
        Case("Wan 2.1 14B, 480x832", lambda b: models.wan(b.device, b.dry, short), dvg, VIDEO_STEPS, 25),
    ]


def measure(bench: Bench) -> None:
    """Section 3 of `gpu.md`."""
    for case in cases(bench.dry):
        if not bench.has_time(case.seconds, case.name):
            continue
        try:
            measure_case(bench, case)
        except Exception as error:
            bench.failed(case.name, error)
        bench.device.free()


def measure_case(bench: Bench, case: Case) -> None:
    """A model's methods against its plain run."""
    rig = case.make(bench)
    flops = step_flops(rig, 2) / 2 * case.steps
    plain_ms = call_ms(bench, rig, PLAIN_STEPS) / PLAIN_STEPS * case.steps
    bench.row(case.name, steps=case.steps, tokens=rig.tokens, total_ms=plain_ms, tflops=flops / 1e12)
    for label, method, steps in case.methods:
        key = f"{case.name}: {label}"
        try:
            with ExitStack() as stack:
                run = stack.enter_context(hasten.accelerate(rig.pipe, method))
                own = step_flops(rig, steps)
                ms = call_ms(bench, rig, steps)
                plan = str(run.summary().stages)
        except Exception as error:
            bench.failed(key, error)
            continue
        ratio, faster = flops / own, plain_ms / ms
        bench.row(key, steps=steps, total_ms=ms, tflops=own / 1e12, plan=plan, flops_ratio=ratio, latency_ratio=faster)
        bench.target(f"latency against operations, {key}", faster / ratio, LEAST, "more")


def call_ms(bench: Bench, rig: Rig, steps: int) -> float:
    """Milliseconds of one call on the device."""
    return bench.device.median_ms(lambda: rig.draw(steps), repeats=1, warmups=0)
