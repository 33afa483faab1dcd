"""Caching at FLUX.1-dev's size: device time per step, Python overhead, peak memory, beside other libraries.

Every arm is a pipeline of its own around the same weights, switched on once and called in turn with the others. An
arm's first call is not timed on the device: it waits for the device after each step, which tells what Python and the
launches take. FLOPs are counted on the plain model and, for each site, on one method.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import hasten
import models
from harness import Bench, Device
from hasten import registry
from hasten.bench.peers import chosen_peers
from hasten.bench.sampling import counted_layer, flop_counter
from hasten.errors import HastenError
from models import Rig
from torch import nn

METHODS = ("reuse", "taylorseer", "hicache", "foca", "freqca", "svdcache", "hyca")
SITES = ("hidden", "output")
COMPILED = (("plain", ""), ("taylorseer", "hidden"), ("taylorseer", "output"), ("hicache", "hidden"))
COMPONENTS = ("freqca", "svdcache", "hyca")  # forecast parts of a feature, with two temporaries of its size
SCHEDULED_PEERS = ("dbcache", "dbcache-taylorseer", "taylorseer-lite", "hermite")
COUNTS = {50: 9, 28: 7}  # computed steps
DRY_COUNTS = {10: 4, 8: 4}
ROUNDS = 3
THRESHOLD_TRIALS = 5


@dataclass(eq=False)
class Call:
    """What one call of a pipeline took.

    Attributes:
        device_ms, host_ms: of each step; between stamps on the device, and from one step's end to the next one's.
        total_ms: of the whole call, on the device.
        computed: whether the blocks ran, for each step.
        above: most bytes held, above what was held before the call; None on a CPU.
        finite: whether the latents are.
    """

    device_ms: list[float]
    host_ms: list[float]
    total_ms: float
    computed: list[bool]
    above: int | None
    finite: bool

    def of(self, computed: bool, times: list[float]) -> float | None:
        """Median over the steps that were, or were not, computed; the first one has to begin the call as well."""
        chosen = [ms for ms, ran in zip(times[1:], self.computed[1:], strict=True) if ran == computed]
        return median(chosen) if chosen else None


@dataclass(eq=False)
class Arm:
    """One way of sampling.

    Attributes:
        name: in the rows.
        rig: a pipeline with the method or peer switched on.
        steps: of the sampler.
        site: of a caching method; empty for others.
        allowed: bytes above the plain run that it may hold; None where there is no target.
        extra: bytes that switching it on holds for good.
        renew: makes the pipeline again; peers count their steps from when they were switched on.
    """

    name: str
    rig: Rig
    steps: int
    site: str = ""
    allowed: int | None = None
    extra: int | None = None
    renew: Callable[[], Rig] | None = None
    calls: list[Call] = field(default_factory=list)
    overhead: Call | None = None


Make = Callable[[], Arm]


@contextlib.contextmanager
def counting(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Calls so far of a layer in the last block but one, which run only where a step is computed."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hook = model.get_submodule(counted_layer(model)).register_forward_pre_hook(count)
    try:
        yield lambda: calls
    finally:
        hook.remove()


def timed(
    device: Device, rig: Rig, steps: int, waiting: bool = False, counted: Callable[[], int] | None = None
) -> Call:
    """One call, stamped at the end of each step.

    Args:
        device: where it runs.
        rig: what is called.
        steps: of the sampler.
        waiting: wait for the device after each step, so that `host_ms` is what Python and the launches take.
        counted: calls of a layer that runs in computed steps; without it every step counts as computed.
    """
    stamps, host, seen = [], [], [0]
    resumed = 0.0

    def mark(_pipe: Any, _step: int, _t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        nonlocal resumed
        host.append(1e3 * (time.perf_counter() - resumed))
        stamps.append(device.stamp())
        seen.append(counted() if counted is not None else seen[-1] + 1)
        if waiting:
            device.wait()
        resumed = time.perf_counter()
        return kwargs

    device.wait()
    before = device.held()
    device.reset_peak()
    resumed = time.perf_counter()
    seen[0] = counted() if counted is not None else 0
    start = device.stamp()
    latents = rig.draw(steps, callback_on_step_end=mark)
    end = device.stamp()
    device.wait()
    peak = device.peak()
    return Call(
        device_ms=[device.between(a, b) for a, b in zip([start, *stamps], stamps, strict=False)],
        host_ms=host,
        total_ms=device.between(start, end),
        computed=[b > a for a, b in pairwise(seen)],
        above=None if peak is None or before is None else peak - before,
        finite=bool(latents.isfinite().all()),
    )


def step_flops(rig: Rig, steps: int) -> float:
    """Operations of one call, counted."""
    with flop_counter() as counter:
        rig.draw(steps)
    return float(counter.get_total_flops())


def method_arm(base: Rig, bench: Bench, name: str, site: str, steps: int, computed: int, **params: Any) -> Arm:
    """A caching method of hasten."""
    method = registry.build(name, computed_steps=computed, site=site, **params)
    rig = base.copy()
    before = bench.device.held()
    run = hasten.accelerate(rig.pipe, method)
    after = bench.device.held()
    held = run.estimate_bytes(base.tokens, text_tokens=base.text, dtype=base.pipe.transformer.dtype)
    width = rig.pipe.transformer.config.num_attention_heads * rig.pipe.transformer.config.attention_head_dim
    channels = rig.pipe.transformer.config.in_channels if site == "output" else width
    temporary = base.tokens * channels * rig.pipe.transformer.dtype.itemsize
    return Arm(
        name=f"{name} {site}, {computed} of {steps}",
        rig=rig,
        steps=steps,
        site=site,
        allowed=held + temporary * (2 if name in COMPONENTS else 1),
        extra=None if after is None or before is None else after - before,
    )


def leap_arm(base: Rig, steps: int, computed: int) -> Arm:
    """LEAP's scheduler with the coefficients of Euler: what it costs does not depend on their values."""
    levels = [1 - k / computed for k in range(computed)]
    euler = [[1.0, *[-1 / computed] * (k + 1)] for k in range(computed)]  # over the first latents and every output
    table = {"timesteps": [1000 * level for level in levels], "levels": levels, "guided": [euler]}
    rig = base.copy()
    rig.pipe.scheduler = hasten.LeapScheduler(tables={str(computed): table})
    return Arm(f"leap, {computed} of {steps}", rig, computed)


# --- other libraries


def peer_settings(name: str, steps: int) -> list[dict[str, Any]]:
    """Settings of a peer with a schedule, from the most computed steps to the fewest."""
    longest = range(1, steps)
    if name.startswith("dbcache"):  # a threshold that is always met leaves the number of cached steps in a row
        common = {
            "Fn_compute_blocks": 1,
            "Bn_compute_blocks": 0,
            "num_inference_steps": steps,
            "enable_separate_cfg": False,
            "residual_diff_threshold": 1.0,
            "max_warmup_steps": 3,
            "warmup_interval": 1,
        }
        return [{**common, "max_continuous_cached_steps": n} for n in longest]
    if name == "taylorseer-lite":
        common = {"disable_cache_before_step": 3, "use_lite_mode": True, "max_order": 1}
        return [{**common, "cache_interval": n} for n in longest]
    common = {"num_steps": steps, "first_enhance": 3, "passes": 1, "max_order": 1, "sigma": 0.5}
    return [{**common, "interval": n} for n in longest]


def switched(base: Rig, name: str, params: dict[str, Any]) -> Rig:
    """A pipeline of its own with a peer at work."""
    (peer,) = chosen_peers([name])
    peer.available()
    rig = base.copy()
    peer.switch(rig.pipe.transformer, params)
    return rig


def computed_by(rig: Rig, steps: int) -> int:
    """Computed steps of one call."""
    with counting(rig.pipe.transformer) as counted:
        rig.draw(steps)
        return counted()


def peer_arm(base: Rig, small: Rig, name: str, steps: int, computed: int) -> Arm:
    """A peer that computes as many steps.

    Args:
        base: the model.
        small: a tiny one of the same class: how many steps a schedule computes does not depend on the model.
        name: of the peer.
        steps, computed: of the sampler, and of those computed at the most.
    """
    for params in peer_settings(name, steps):
        if computed_by(switched(small, name, params), steps) <= computed:
            renew = partial(switched, base, name, params)
            return Arm(f"{name} (peer), {computed} of {steps}", base, steps, renew=renew)
    raise ValueError(f"no setting of {name} computes only {computed} of {steps} steps")


def first_block_arm(base: Rig, steps: int, computed: int) -> Arm:
    """The first-block cache of diffusers, which has a threshold alone: the nearest that a few bisections find."""
    low, high, best = 1e-3, 2.0, None
    for _ in range(THRESHOLD_TRIALS):
        middle = math.sqrt(low * high)
        renew = partial(switched, base, "first-block", {"threshold": middle})
        found = computed_by(renew(), steps)
        if best is None or abs(found - computed) < abs(best[0] - computed):
            best = found, renew
        if found == computed:
            break
        low, high = (middle, high) if found > computed else (low, middle)
    assert best is not None
    return Arm(f"first-block (peer), {computed} of {steps}", base, steps, renew=best[1])


# --- the section


def measure(bench: Bench) -> None:
    """Eager at 50 and at 28 steps, then with compiled blocks, then further rounds for as long as there is time."""
    base = models.flux(bench.device, bench.dry)
    small = models.flux(Device("cpu"), dry=True)
    parameters = sum(p.numel() for p in base.pipe.transformer.parameters())
    bench.facts |= {"parameters": parameters, "image_tokens": base.tokens, "text_tokens": base.text}
    counts = DRY_COUNTS if bench.dry else COUNTS
    (steps, computed), (fewer, fewer_computed) = counts.items()
    base.draw(2)  # whatever is slow the first time is not an arm's
    ratios = flops_ratios(bench, base, steps, computed)
    arms = warmed(bench, base, small, steps, computed)
    in_turn(bench, arms, steps, ratios)
    if bench.has_time(90, "compiled blocks"):
        measure_compiled(bench, base, steps, computed, ratios)
    if bench.has_time(60, f"{fewer} steps"):
        in_turn(bench, warmed(bench, base, small, fewer, fewer_computed), fewer, {})
    for number in range(1, ROUNDS):
        if bench.has_time(60, f"round {number + 1} at {steps} steps"):
            in_turn(bench, arms, steps, ratios)


def flops_ratios(bench: Bench, base: Rig, steps: int, computed: int) -> dict[str, float]:
    """Counted operations of a plain call relative to one that is cached at a site, by site; LEAP's by the steps."""
    plain = step_flops(base, 2) / 2 * steps
    ratios = {"leap": steps / computed}
    for site in (*SITES, "module"):
        arm = method_arm(base, bench, "taylorseer", site, steps, computed)
        ratios[site] = plain / step_flops(arm.rig, steps)
    bench.facts["flops_ratios"] = ratios
    return ratios


def wanted(bench: Bench, base: Rig, small: Rig, steps: int, computed: int) -> Iterator[tuple[str, float, Make]]:
    """Names of all arms, what making and calling one twice takes in plain calls, and what makes it."""
    share = 2 * computed / steps
    plain = f"plain, {steps} steps"
    yield plain, 2.0, lambda: Arm(plain, base.copy(), steps)
    short = f"plain, {computed} steps"  # what a call of so many computed steps takes at the least
    yield short, share, lambda: Arm(short, base.copy(), computed)
    calibrations = calibrated(bench, base, steps)
    for name, site in [*((name, site) for site in SITES for name in METHODS), ("taylorseer", "module")]:
        if site in sites_of(name):
            params = {"calibration": calibrations[name]} if name in calibrations else {}
            key = f"{name} {site}, {computed} of {steps}"
            yield key, share, partial(method_arm, base, bench, name, site, steps, computed, **params)
    yield f"leap, {computed} of {steps}", share, partial(leap_arm, base, steps, computed)
    for name in SCHEDULED_PEERS:
        yield f"{name} (peer), {computed} of {steps}", share, partial(peer_arm, base, small, name, steps, computed)
    trials = share + THRESHOLD_TRIALS / 2
    yield f"first-block (peer), {computed} of {steps}", trials, partial(first_block_arm, base, steps, computed)


def sites_of(name: str) -> tuple[str, ...]:
    """Sites that a method can work at."""
    found = []
    for site in (*SITES, "module"):
        with contextlib.suppress(HastenError):
            registry.info(name).parameters["site"].accept(site, name)
            found.append(site)
    return tuple(found)


def calibrated(bench: Bench, base: Rig, steps: int) -> dict[str, Any]:
    """Calibrations of the methods that need one, from one recorded call."""
    needed = [name for name in METHODS if registry.info(name).needs_calibration]
    rig = base.copy()
    try:
        trace = hasten.record(rig.pipe, [lambda: rig.draw(steps)])
        return {name: hasten.fit(trace, name) for name in needed}
    except Exception as error:
        bench.failed("calibration", error)
        return {}


def warmed(bench: Bench, base: Rig, small: Rig, steps: int, computed: int) -> list[Arm]:
    """Every arm after a first call, which shows Python's part; as many as there is time to call once more."""
    arms: list[Arm] = []
    plain_seconds = 0.0
    for key, plain_calls, make in wanted(bench, base, small, steps, computed):
        again = sum(arm.overhead.total_ms for arm in arms if arm.overhead is not None) / 1e3
        if not bench.has_time(again + plain_calls * plain_seconds, key):
            continue
        try:
            arm = make()
            arm.overhead = called(bench.device, arm, waiting=True)
        except Exception as error:  # one arm's failure ends no other
            bench.failed(key, error)
            continue
        if key == f"plain, {steps} steps":
            plain_seconds = arm.overhead.total_ms / 1e3
        arms.append(arm)
    return arms


def called(device: Device, arm: Arm, waiting: bool = False) -> Call:
    """One call of an arm, and which of its steps were computed."""
    rig = arm.rig if arm.renew is None else arm.renew()
    with counting(rig.pipe.transformer) as counted:
        return timed(device, rig, arm.steps, waiting, counted)


def in_turn(bench: Bench, arms: list[Arm], steps: int, ratios: dict[str, float]) -> None:
    """One timed call of each arm; the plain one, if it could be had, comes first."""
    plain = next((arm for arm in arms if arm.name == f"plain, {steps} steps"), None)
    for arm in arms:
        try:
            arm.calls.append(called(bench.device, arm))
        except Exception as error:
            bench.failed(arm.name, error)
            continue
        report(bench, arm, plain or arm, ratios.get("leap" if arm.name.startswith("leap") else arm.site))
    judge_peers(bench, arms)


def measure_compiled(bench: Bench, base: Rig, steps: int, computed: int, ratios: dict[str, float]) -> None:
    """A few arms on compiled blocks; the same compiled transformer serves them one after another."""
    rig = base.copy()
    rig.pipe.transformer.compile_repeated_blocks(**({"backend": "eager"} if bench.dry else {}))
    rig.draw(2)  # compiles
    plain: Arm | None = None
    for name, site in COMPILED:
        key = f"compiled blocks: {name} {site}".strip() + f", {steps} steps"
        try:
            with contextlib.ExitStack() as stack:
                run = None
                if site:
                    run = stack.enter_context(hasten.accelerate(rig.pipe, name, site=site, computed_steps=computed))
                arm = Arm(key, rig, steps, site)
                arm.overhead = timed(bench.device, rig, steps, waiting=True)
                arm.calls.append(timed(bench.device, rig, steps))
                if run is not None:
                    arm.overhead.computed, arm.calls[0].computed = told_by(run)
        except Exception as error:
            bench.failed(key, error)
            continue
        plain = plain or arm
        report(bench, arm, plain, ratios.get(site))


def told_by(run: Any) -> list[list[bool]]:
    """Whether each step was computed, run by run. Reading it waits for the device: not within a timed call."""
    runs: dict[int, dict[int, bool]] = {}
    for record in run.records:
        runs.setdefault(record.run, {})[record.step] = record.computed
    return [list(steps.values()) for steps in runs.values()]


def report(bench: Bench, arm: Arm, plain: Arm, flops_ratio: float | None) -> None:
    """Write an arm's row and hold it to the targets."""
    assert arm.overhead is not None
    whole = median(call.total_ms for call in arm.calls)
    row: dict[str, Any] = {
        "computed_steps": sum(arm.calls[-1].computed),
        "total_ms": whole,
        "computed_ms": middle(call.of(True, call.device_ms) for call in arm.calls),
        "skipped_ms": middle(call.of(False, call.device_ms) for call in arm.calls),
        "host_computed_ms": arm.overhead.of(True, arm.overhead.host_ms),
        "host_skipped_ms": arm.overhead.of(False, arm.overhead.host_ms),
        "rounds": len(arm.calls),
        "finite": all(call.finite for call in arm.calls),
    }
    if arm is not plain and plain.calls:
        reference = median(call.total_ms for call in plain.calls)
        step = middle(call.of(True, call.device_ms) for call in plain.calls)
        row["latency_ratio"] = reference / whole
        row["skipped_share"] = None if row["skipped_ms"] is None or not step else row["skipped_ms"] / step
        row["above_plain_bytes"] = above_plain(arm, plain)
        if flops_ratio is not None:
            row["flops_ratio"] = flops_ratio
            row["latency_share"] = row["latency_ratio"] / flops_ratio
            bench.target(f"latency against operations, {arm.name}", row["latency_share"], 0.97, "more")
        if arm.site in SITES and not arm.name.startswith("compiled"):
            limit = 0.005 if arm.site == "output" else 0.02
            bench.target(f"skipped step, {arm.name}", row["skipped_share"], limit)
        if arm.allowed is not None and arm.site in SITES:
            row["allowed_bytes"] = arm.allowed
            bench.target(f"memory above plain, {arm.name}", row["above_plain_bytes"], arm.allowed)
    bench.row(arm.name, **row)


def above_plain(arm: Arm, plain: Arm) -> int | None:
    """Most bytes held above the plain call's, with what switching the arm on holds for good."""
    own, other = arm.calls[-1].above, plain.calls[-1].above
    if own is None or other is None:
        return None
    return own - other + (arm.extra or 0)


def middle(values: Any) -> float | None:
    """Median of those that are known."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def judge_peers(bench: Bench, arms: list[Arm]) -> None:
    """Whether hasten's methods at the same sites are faster than every peer that computes as many steps or more."""
    measured = [arm for arm in arms if "total_ms" in bench.rows.get(arm.name, {})]
    rows = [bench.rows[arm.name] for arm in measured if arm.site in SITES]
    for peer in (arm for arm in measured if rows and "(peer)" in arm.name):
        theirs = bench.rows[peer.name]
        if theirs["computed_steps"] < rows[0]["computed_steps"]:
            theirs["note"] = "computes fewer steps: not compared"
            continue
        slowest = max(row["total_ms"] for row in rows)
        bench.target(f"slowest of hasten's over {peer.name}", slowest / theirs["total_ms"], 1.0)
