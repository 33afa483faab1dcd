"""What has to hold exactly, on a few blocks of FLUX.1-dev's width: equality, waiting, graphs, half precision."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import hasten
import models
import torch
from harness import Bench
from models import Rig
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

STEPS, COMPUTED = 12, 6
SITES = ("hidden", "output", "module")
SCHEDULED = ("reuse", "taylorseer", "hicache", "foca", "freqca")
GATED = {"fbcache": 1, "teacache": 1, "easycache": 1}  # scalars that a decision may read
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
COPIES = ("Memcpy DtoH", "Memcpy HtoD")
SCALAR = "aten::_local_scalar_dense"
STEP_END = "end of a step"


def blocks(bench: Bench) -> dict[str, int]:
    """A few of FLUX.1-dev's blocks; all of the tiny model's."""
    return {} if bench.dry else {"num_layers": 2, "num_single_layers": 4}


class EndOfCallError(Exception):
    """Ends a pipeline's call from within."""


def measure(bench: Bench) -> None:
    """Section 2 of `gpu.md`."""
    rig = models.flux(bench.device, bench.dry, **blocks(bench))
    rig.draw(2)
    parts = (equal_where_everything_is_computed, removed_without_a_trace, waits, nothing_held, captured, half_precision)
    for part in parts:
        begun = time.monotonic()
        try:
            part(bench, rig)
            bench.row(part.__name__.replace("_", " "), seconds=time.monotonic() - begun)
        except Exception as error:  # the other checks are worth as much
            bench.failed(part.__name__, error)
            bench.holds(part.__name__.replace("_", " "), False)


def equal_where_everything_is_computed(bench: Bench, rig: Rig) -> None:
    """Interval 1 gives the plain latents, bit for bit."""
    plain = rig.draw(STEPS)
    bench.holds("the plain pipeline repeats itself", torch.equal(plain, rig.draw(STEPS)))
    for site in SITES:
        for name in ("reuse", "taylorseer", "hicache", "foca"):
            with hasten.accelerate(rig.pipe, name, site=site, interval=1):
                bench.holds(f"interval 1 is the plain run, {name} {site}", torch.equal(plain, rig.draw(STEPS)))


def removed_without_a_trace(bench: Bench, rig: Rig) -> None:
    """After removal the latents are the plain ones, and the modules as they were."""
    plain, before = rig.draw(STEPS), attributes(rig)
    for site in SITES:
        run = hasten.accelerate(rig.pipe, "taylorseer", site=site, computed_steps=COMPUTED)
        cached = rig.draw(STEPS)
        run.remove()
        same = torch.equal(plain, rig.draw(STEPS)) and attributes(rig) == before
        bench.row(f"removal, {site}", changed_while_on=not torch.equal(plain, cached))
        bench.holds(f"removal leaves no trace, {site}", same)


def attributes(rig: Rig) -> list[tuple[str, list[str]]]:
    """Names that modules have of their own."""
    return [(name, sorted(vars(module))) for name, module in rig.pipe.transformer.named_modules()]


# --- waiting


def waits(bench: Bench, rig: Rig) -> None:
    """Scalar reads, waits and copies between host and device in skipped steps, above those of a plain step."""
    scheduled, gated = (SCHEDULED[1:3], ("fbcache",)) if bench.dry else (SCHEDULED, tuple(GATED))
    plain = per_step(bench, rig, range(2, STEPS))
    bench.row("waits, plain", **plain)
    # Each step ends with a wait of our own: a profiler that has not seen it sees nothing of the device.
    told = bench.device.on_gpu and plain["waits"] >= 1
    arms: list[tuple[str, str, dict[str, Any], int]] = [
        (name, site, {"site": site, "computed_steps": COMPUTED}, 0)
        for site in ("hidden", "output")
        for name in scheduled
        if not (name == "freqca" and site == "output")
    ]
    arms += [(name, "", {"threshold": 1e9}, GATED[name]) for name in gated]
    for name, site, params, allowed in arms:
        label = f"{name} {site}".strip()
        with hasten.accelerate(rig.pipe, name, **params) as run:
            rig.draw(STEPS)
            skipped = [record.step for record in run.records if not record.computed]
            run.reset()
            found = per_step(bench, rig, skipped)
        bench.row(f"waits, {label}", **found, skipped_steps=len(skipped))
        above = {kind: found[kind] - plain[kind] for kind in found}
        bench.holds(f"some steps are skipped, {label}", bool(skipped))
        # On a CPU a scalar is read without waiting, and is: the timestep of each step.
        bench.target(f"scalar reads of a skipped step, {label}", above["scalar_reads"], allowed)
        bench.target(f"waits of a skipped step, {label}", above["waits"] if told else None, allowed)
        bench.target(f"copies of a skipped step, {label}", above["copies"] if told else None, allowed)


def per_step(bench: Bench, rig: Rig, steps: Sequence[int]) -> dict[str, float]:
    """What the profiler counts in some steps of a call, per step."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.device.on_gpu else [])]

    def mark(_pipe: Any, _step: int, _t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        bench.device.wait()  # so that everything on the device's side of a step comes before its end, too
        with record_function(STEP_END):
            return kwargs

    with profile(activities=kinds) as watcher:
        rig.draw(STEPS, callback_on_step_end=mark)
    found = sorted((event.time_range.start, event.name) for event in watcher.events())
    counts, step = Counter[str](), 0
    for _, name in found:
        step += name == STEP_END
        if step in steps:
            counts[name] += 1
    share = max(len(steps), 1)
    return {
        "scalar_reads": counts[SCALAR] / share,
        "waits": sum(counts[name] for name in WAITS) / share,
        "copies": sum(count for name, count in counts.items() if name.startswith(COPIES)) / share,
    }


def nothing_held(bench: Bench, rig: Rig) -> None:
    """Features are freed when the last step is over, before a VAE would decode."""
    for name in ("taylorseer", "hicache", "foca", "fbcache", "teacache", "easycache"):
        params: dict[str, Any] = {"threshold": 0.2} if name in GATED else {"computed_steps": COMPUTED}
        with hasten.accelerate(rig.pipe, name, **params) as run:
            rig.draw(STEPS)  # buffers that stay for good are made now
            run.reset()
            bench.device.free()
            before = bench.device.held()
            latents = rig.draw(STEPS)
            own = latents.nbytes
            after = bench.device.held()
            held = None if after is None or before is None else after - before - own
            bench.row(f"held after a run, {name}", bytes=held, cache_bytes=run.summary().cache_bytes)
            bench.target(f"bytes held after a run, {name}", held, 0)


# --- graphs and precision


def captured(bench: Bench, rig: Rig) -> None:
    """A skipped forward can be captured in a CUDA graph and gives, replayed, what it gives when it is called."""
    for site in ("hidden", "output"):
        for name in ("reuse", "taylorseer", "hicache", "foca"):
            eager = skipped_forward(rig, name, site, lambda forward: forward())
            replayed = skipped_forward(rig, name, site, bench.device.captured)
            error = float((eager - replayed).abs().max() / eager.abs().max().clamp_min(1e-12))
            bench.row(f"graph, {name} {site}", relative_error=error)
            bench.holds(f"a skipped step as a CUDA graph, {name} {site}", error <= 1e-5)


def skipped_forward(rig: Rig, name: str, site: str, how: Callable[[Callable[[], Tensor]], Tensor]) -> Tensor:
    """What the transformer returns in the first skipped step of a call, when it is called in the given way."""
    found: list[Tensor] = []
    seen: dict[str, Any] = {}
    model = rig.pipe.transformer

    def keep(_model: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    with hasten.accelerate(rig.pipe, name, site=site, computed_steps=COMPUTED, warmup=3):
        hook = model.register_forward_pre_hook(keep, with_kwargs=True)  # runs in computed steps

        def call_early(pipe: Any, step: int, _t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            if step < 2:
                return kwargs
            following = pipe.scheduler.timesteps[step + 1].expand(1).to(kwargs["latents"].dtype) / 1000
            arguments = {**seen, "hidden_states": kwargs["latents"], "timestep": following}
            found.append(how(lambda: model(**arguments)[0]).clone())
            raise EndOfCallError

        with contextlib.suppress(EndOfCallError):
            rig.draw(STEPS, callback_on_step_end=call_early)
        hook.remove()
    return found[0]


def half_precision(bench: Bench, rig: Rig) -> None:
    """Forecasts in bfloat16 are finite and err by no more than the plain run in bfloat16 does, within a factor."""
    narrow, wide = (models.flux(bench.device, bench.dry, **blocks(bench)) for _ in range(2))
    narrow.pipe.transformer.bfloat16()
    wide.pipe.transformer.float()
    call = {name: value.float() if isinstance(value, Tensor) else value for name, value in rig.call.items()}
    half = {name: value.bfloat16() if isinstance(value, Tensor) else value for name, value in rig.call.items()}
    plain = distance(narrow.draw(STEPS, **half), wide.draw(STEPS, **call))
    for name in ("taylorseer", "hicache", "foca", "freqca"):
        latents = []
        for own, arguments in ((narrow, half), (wide, call)):
            with hasten.accelerate(own.pipe, name, computed_steps=COMPUTED):
                latents.append(own.draw(STEPS, **arguments))
        error = distance(*latents)
        bench.row(f"bfloat16, {name}", error=error, plain_error=plain)
        finite, near = bool(latents[0].isfinite().all()), error <= 3 * plain
        bench.holds(f"bfloat16 is finite, and no farther from float32 than the plain run, {name}", finite and near)


def distance(latents: Tensor, reference: Tensor) -> float:
    """Relative error."""
    return float((latents.float() - reference.float()).norm() / reference.float().norm())
