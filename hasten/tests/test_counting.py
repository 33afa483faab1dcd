"""What a step costs beside arithmetic: reads that wait for the device, copies to it, features that are held at a time.

Counted on a device that `device.py` makes up, in bfloat16, in a pipeline's loop. Each case is one row of a table: a
method at a site. The numbers of a row hold for every step but the first, which reads the schedule.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter, defaultdict
from contextlib import nullcontext

import pytest
import torch
from device import DEVICE, Device, Held, host, move
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from tiny import TINY, build, first

import hasten
from hasten.caching import sums
from hasten.caching.memory import PassMemory
from hasten.caching.run import CachingRun
from hasten.fitting.calibrate import Tape

STEPS = 10
NAME = "FluxTransformer2DModel"
WIDTH, TOKENS, CHANNELS = 32, 16, 4
FEATURE = {"hidden": TOKENS * WIDTH * 2, "module": TOKENS * WIDTH * 2, "output": TOKENS * CHANNELS * 2}

WHOLE = ["reuse", "taylorseer", "hicache", "foca", "ab-cache", "spectrum", "l2p", "leapcache"]
FITTED = ["dmd", "hicache:adaptive"]  # to inner products, which a computed step reads at once
COMPONENTS = ["freqca", "svdcache", "hyca"]
GATES = ["fbcache", "teacache", "easycache"]


def row(method, site, skipped_reads=0, computed_reads=0, temporaries=1):
    return pytest.param(method, site, skipped_reads, computed_reads, temporaries, id=f"{method}@{site}")


TABLE = [
    *(row(method, "hidden") for method in WHOLE),
    *(row(method, "output") for method in WHOLE if method != "leapcache"),
    *(row(method, "module") for method in ("reuse", "hicache")),
    *(row(method, site, 0, 1) for method in FITTED for site in ("hidden", "output")),
    row("dmd", "module", 0, 1),
    *(row(method, "hidden", temporaries=2) for method in ("freqca", "svdcache")),
    row("foca:normed", "hidden"),
    row("hyca", "hidden"),  # one sum with a weight for each channel
    *(row(method, "output" if method == "easycache" else "hidden", 1, 1) for method in GATES),
    row("magcache", "hidden"),
    row("speca", "hidden", 1, 0),
]


class Loop(DiffusionPipeline):
    """A pipeline's loop on the device; counts each of the transformer's forwards."""

    def __init__(self, transformer):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler())

    def __call__(self, device, passes=1):
        self.scheduler.set_timesteps(STEPS, device=DEVICE)
        self.scheduler.set_begin_index(0)
        latents, counts = self.start().to(DEVICE), []
        given = {name: value.to(DEVICE) for name, value in self.given().items()}
        for t in self.scheduler.timesteps:
            for _ in range(passes):
                device.reset()
                result = first(self.transformer(**{**given, "hidden_states": latents, "timestep": t.expand(1) / 1000}))
                counts.append((device.reads, device.copies))
            latents = self.scheduler.step(result, t, latents)[0]
        return latents, counts

    def start(self):
        return torch.randn(1, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)

    def given(self):
        arguments = TINY[NAME].arguments(self.start(), 1.0)
        return {k: v.to(torch.bfloat16) if "ids" not in k else v for k, v in arguments.items() if k != "timestep"}


@pytest.fixture(scope="module")
def calibrations():
    """Of all methods that have one, from the same loop on the host."""
    pipe = Plain(build(NAME).to(torch.bfloat16).eval())
    trace = hasten.record(pipe, [{"seed": 0}, {"seed": 1}])
    fits = {name: hasten.fit(trace, name) for name in ("l2p", "svdcache", "hyca", "magcache")}
    return fits | {"leapcache": hasten.fit(trace, "leapcache", steps=(0, 1, 2, 4, 7))}


class Plain(Loop):
    """The loop on the host."""

    @torch.no_grad()
    def __call__(self, seed):
        self.scheduler.set_timesteps(STEPS)
        self.scheduler.set_begin_index(0)
        latents = torch.randn(1, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
        for t in self.scheduler.timesteps:
            arguments = {**self.given(), "hidden_states": latents, "timestep": t.expand(1) / 1000}
            latents = self.scheduler.step(first(self.transformer(**arguments)), t, latents)[0]
        return latents


def parameters(method, site, calibrations):
    """A method's name and parameters, with which it skips some steps of the run."""
    name = method.partition(":")[0]
    params = {"site": site, "interval": 4}
    if method == "hicache:adaptive":
        params["scale"] = "adaptive"
    if method == "foca:normed":
        params["domain"] = "normed"
    if name in calibrations:
        params["calibration"] = calibrations[name]
        params["strict"] = False
    if name in ("l2p", "leapcache"):
        params |= {"computed_steps": 5, "schedule": "even"} if name == "l2p" else {}
    if name in (*GATES, "speca", "magcache"):
        params |= {"threshold": 10.0}
    if name == "magcache":
        params.pop("strict")
    if name == "leapcache":
        params |= {"computed_steps": 5}
        params.pop("interval")
    if name == "l2p":
        params.pop("interval")
    return name, params


def watched(monkeypatch, cls, name, device, seen):
    """Let a method of a class note the most storages that it held beside those before, and the new ones."""
    own = getattr(cls, name)

    def call(self, *args, **kwargs):
        before, peak, made = device.live, device.peak, device.made
        device.peak = before
        result = own(self, *args, **kwargs)
        seen[name].append((device.peak - before, device.made - made))
        device.peak = max(peak, device.peak)
        return result

    monkeypatch.setattr(cls, name, call)


@pytest.mark.parametrize(("method", "site", "skipped_reads", "computed_reads", "temporaries"), TABLE)
def test_the_table(monkeypatch, calibrations, method, site, skipped_reads, computed_reads, temporaries):
    name, params = parameters(method, site, calibrations)
    monkeypatch.setattr(sums, "LARGE_CHUNK", FEATURE[site] // 8)  # smaller than a feature, as on a large model
    pipe, device = Loop(move(build(NAME).to(torch.bfloat16).eval())), Device(FEATURE[site])
    pipe.set_progress_bar_config(disable=True)
    seen = defaultdict(list)
    with device, torch.no_grad(), hasten.accelerate(pipe, name, **params) as run:
        pipe(device)  # tables go to the device once
        for cls, function in ((PassMemory, "forecast"), (PassMemory, "record"), (CachingRun, "decide")):
            watched(monkeypatch, cls, function, device, seen)
        _, counts = pipe(device)
        records = [record for record in run.records if record.run == 1]
    assert len(records) == STEPS
    skipped = [counts[i] for i, record in enumerate(records) if not record.computed]
    computed = [counts[i] for i, record in enumerate(records) if record.computed and i]
    assert len(skipped) >= 3
    assert set(skipped) == {(skipped_reads, 0)}
    # A gate that has nothing to compare with yet reads nothing.
    assert {copies for _, copies in computed} == {0}
    assert max(reads for reads, _ in computed) == computed_reads
    assert max(peak for peak, _ in seen["forecast"]) == temporaries
    assert max(peak for peak, _ in seen["decide"]) <= (1 if name in GATES else 0)
    if site != "module":
        # A ring's buffers are made as it fills, and written over from then on.
        keys = 2 if name == "speca" else 1
        stored = max(record.cache_bytes for record in records) // FEATURE[site]
        assert sum(made for _, made in seen["record"]) <= max(stored, keys)
        assert max(peak for peak, _ in seen["record"]) <= keys  # the buffer, and nothing beside it


class StopError(Exception):
    pass


FREED = ["foca@hidden", "hicache@output", "fbcache@hidden", "easycache@output", "svdcache@hidden", "foca@module"]


@pytest.mark.parametrize("case", FREED)
def test_features_are_gone_with_the_last_forward_and_with_the_acceleration(calibrations, case):
    name, params = parameters(*case.split("@"), calibrations)
    pipe, device = Loop(move(build(NAME).to(torch.bfloat16).eval())), Device(64)
    pipe.set_progress_bar_config(disable=True)

    def stop(*args):
        if pipe.scheduler.step_index == 6:
            raise StopError
        return own_step(*args)

    with device, torch.no_grad():
        with hasten.accelerate(pipe, name, **params):
            pipe(device)
        gc.collect()
        bare = device.live
        with hasten.accelerate(pipe, name, **params) as run:
            pipe(device)
            gc.collect()
            after_the_run = device.live - bare
            assert run.summary().cache_bytes
            own_step, pipe.scheduler.step = pipe.scheduler.step, stop
            with pytest.raises(StopError):
                pipe(device)
        del run
        gc.collect()
        assert after_the_run == (1 if name == "svdcache" else 0)  # its basis, which is the method's
        assert device.live == bare


def test_recording_for_a_calibration_reads_once_per_forward():
    pipe, device, tape = Loop(move(build(NAME).to(torch.bfloat16).eval())), Device(), Tape(8)
    pipe.set_progress_bar_config(disable=True)
    with device, torch.no_grad(), hasten.accelerate(pipe, "reuse", interval=1, site="module") as run:
        next(iter(run.engines.values())).listener = tape
        _, counts = pipe(device)
        tape.end_run()
    assert {reads for reads, _ in counts[1:]} == {1}  # of the forward before
    features = tape.features()["pass0"]
    assert len(features) > 10
    assert all(runs.device.type == "cpu" and runs.shape[:2] == (1, STEPS) for runs in features.values())


def skipped_calls(site, **blocks):
    """Python functions that a forward calls, skipped or, without a site, of a transformer with no blocks."""
    tiny = TINY[NAME]
    model = FluxTransformer2DModel(**{**tiny.config, **blocks}).eval()
    start, counts = torch.randn(tiny.latent), []
    with torch.no_grad(), hasten.accelerate(model, "hicache", site=site) if site else nullcontext():
        for run in range(2):
            for step in range(6):
                arguments = tiny.arguments((1 - step / 6) * start, 1 - step / 6)
                counted = Counter()
                if run and step in (4, 5):  # forecasts whose weights are known
                    sys.setprofile(lambda _frame, event, _arg, counted=counted: counted.update((event,)))
                model(**arguments, return_dict=False)
                sys.setprofile(None)
                counts.append(counted["call"])
    return max(counts)


def test_a_skipped_forward_calls_few_functions():
    """A bound on what Python does, since time on a shared machine is none."""
    bare = skipped_calls(None, num_layers=0, num_single_layers=0)
    assert skipped_calls("output") <= 100
    small, large = (skipped_calls("hidden", num_layers=n, num_single_layers=2 * n) for n in (2, 6))
    assert small - bare <= 155
    assert large - small <= 12 + 2  # one per block


def test_buffers_of_a_ring_keep_their_addresses_and_hold_what_was_recorded_last():
    method = hasten.HiCache(order=1)
    memory, addresses = PassMemory(method.components), []
    for step in range(6):
        memory.step = step
        memory.record("hidden", torch.full((1, 4, 8), float(step)))
        addresses.append(memory._rings["hidden"].features[0].data_ptr())
        assert [float(f.mean()) for f in memory._rings["hidden"].features] == [float(step), float(step - 1)][: step + 1]
    assert len(set(addresses)) == 2
    assert memory.bytes == 2 * 4 * 8 * 4
    memory.step = 8
    forecast = memory.forecast("hidden")
    assert forecast.data_ptr() not in addresses


def test_the_device_of_these_tests_counts_what_a_gpu_would_wait_for():
    device = Device(16)
    with device:
        there = torch.arange(8.0).to(DEVICE)
        assert isinstance(there, Held)
        assert (device.copies, device.reads, device.made) == (1, 0, 1)
        device.reset()
        total = (there * 2 + 1).sum()
        assert (device.copies, device.reads, device.made, device.peak) == (0, 0, 2, 3)
        assert float(total) == 64.0
        assert bool(total > 3)
        assert there.tolist() == list(map(float, range(8)))
        assert there.cpu().sum() == 28
        assert device.reads == 4
        assert (there.add_(1) is there, float(host(there)[0])) == (True, 1.0)
        with pytest.raises(RuntimeError, match="a tensor of the host"):
            there + torch.ones(8)
        del there, total
        gc.collect()
        assert device.live == 0
