"""A run belongs to the pipeline call that it happens in: shared transformers, calls nested, threaded and cancelled,
sections of long videos. Each of them gives what it gives on a fresh pipeline."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import gc
import itertools
import threading
import warnings
import weakref

import diffusers
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    UniPCMultistepScheduler,
)
from endless import Endless, Growth
from pipelines import asking, draw, make_pipe, own_tokenizers

import hasten
from hasten.caching import Uniform, computed_steps
from hasten.caching.engine import CachingEngine
from hasten.errors import ConfigError, CopyError, HastenWarning
from hasten.pipeline import hooks
from hasten.pipeline.bypass import Watch
from hasten.pipeline.hooks import hooks_on, still
from hasten.pipeline.runs import MOST_PASSES

METHODS = [("taylorseer", {}), ("taylorseer", {"schedule": "even"}), ("fbcache", {"threshold": 0.4})]
A = {"prompt": "red apple", "seed": 0}
B = {"prompt": "blue car", "seed": 1}


class Cancelled(Exception):  # noqa: N818 - what services call it
    """Thrown by a callback, as services do when a client goes away."""


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sharing(pipe, kind=None, scheduler=None):
    """Another pipeline over the same transformer, with a scheduler and tokenizers of its own."""
    components = {**pipe.components, **own_tokenizers(pipe), "scheduler": scheduler or copy.deepcopy(pipe.scheduler)}
    other = (kind or type(pipe))(**components)
    other.set_progress_bar_config(disable=True)
    return other


def alone(method, params, **call):
    """What a call gives on a fresh accelerated pipeline."""
    pipe = make_pipe()
    with hasten.accelerate(pipe, method, interval=4, **params):
        return draw(pipe, **call)


def at(step, act):
    """A callback that acts after a step."""

    def callback(_pipe, index, _timestep, kwargs):
        if index == step:
            act()
        return kwargs

    return callback


def cancel():
    raise Cancelled


@pytest.mark.parametrize(("method", "params"), METHODS)
def test_two_pipelines_over_one_transformer_are_as_if_alone(method, params):
    pipe = make_pipe()
    other = sharing(pipe)
    first, second = alone(method, params, **A), alone(method, params, **B)
    with hasten.accelerate(pipe, method, interval=4, **params):
        assert torch.equal(draw(pipe, **A), first)
        assert torch.equal(draw(other, **B), second)
        assert torch.equal(draw(pipe, **A), first)


@pytest.mark.parametrize(("method", "params"), METHODS)
@pytest.mark.parametrize("step", [0, 1, 6])
def test_a_cancelled_call_leaves_nothing_to_any_pipeline(method, params, step):
    pipe = make_pipe()
    other = sharing(pipe)
    second = alone(method, params, **B)
    with hasten.accelerate(pipe, method, interval=4, **params) as run:
        for caller in (other, pipe, other):
            with pytest.raises(Cancelled):
                draw(caller, **A, callback_on_step_end=at(step, cancel))
            assert torch.equal(draw(caller, **B), second)
        assert not run.engines["transformer"].runs.under_way


@pytest.mark.parametrize(("method", "params"), METHODS)
@pytest.mark.parametrize("steps", [12, 9])
def test_a_call_inside_another_is_as_if_alone(method, params, steps):
    """A callback draws a preview, of another prompt, size or number of steps, on the same transformer."""
    pipe = make_pipe()
    other = sharing(pipe)
    outer = alone(method, params, **A)
    inner = alone(method, params, **B, steps=steps, height=64)
    seen = []
    preview = at(5, lambda: seen.append(draw(other, **B, steps=steps, height=64)))
    with hasten.accelerate(pipe, method, interval=4, **params):
        assert torch.equal(draw(pipe, **A, callback_on_step_end=preview), outer)
        assert torch.equal(seen[0], inner)
        with pytest.raises(Cancelled):  # the inner one is cancelled, the outer one goes on
            draw(other, **B, callback_on_step_end=at(3, cancel))
        assert torch.equal(draw(pipe, **A, callback_on_step_end=preview), outer)


@pytest.mark.parametrize(("method", "params"), METHODS)
def test_threads_over_one_transformer_are_as_if_alone(method, params):
    """Guided, so that the names of their passes interleave; proxies of one must not be seen by another."""
    pipe = make_pipe()
    callers = [pipe, sharing(pipe), sharing(pipe)]
    calls = [{**A}, {**B}, {"prompt": "banana", "seed": 2}]
    calls = [{**call, "true_cfg_scale": 3.0, "negative_prompt": "cat"} for call in calls]
    expected = [alone(method, params, **call) for call in calls]
    got, failed, start = {}, [], threading.Barrier(3)

    def work(i):
        try:
            start.wait()
            got[i] = [draw(callers[i], **calls[i]) for _ in range(2)]
        except Exception as error:
            failed.append(error)

    with hasten.accelerate(pipe, method, interval=4, **params):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
    for i, right in enumerate(expected):
        assert all(torch.equal(latents, right) for latents in got[i])


@pytest.mark.parametrize("how", ["function", "partial", "decorated", "object"])
@pytest.mark.parametrize(
    "method",
    [hasten.TaylorSeer(interval=4), hasten.FBCache(threshold=0.4), hasten.Fresco(stages=(4, 4, 4), shares=0.4)],
)
def test_what_a_callback_asks_the_transformer_is_no_step(method, how):
    """It is computed in full, and changes neither the image nor the records."""
    pipe = make_pipe()
    answers = []
    asks = asking(pipe, lambda: draw(pipe, **A), answers)
    asks(None, 0, None, {})
    callback = {
        "function": asks,
        "partial": functools.partial(asks),
        "decorated": torch.no_grad()(asks),
        "object": type("Callback", (), {"__call__": lambda _, *given: asks(*given)})(),
    }[how]
    with hasten.accelerate(pipe, method) as run:
        right, steps = draw(pipe, **A), run.summary().steps
        assert torch.equal(draw(pipe, **A, callback_on_step_end=callback), right)
        assert run.summary().steps == steps == 12
    assert len(answers) == 13
    assert all(torch.equal(answer, answers[0]) for answer in answers)


class Heun(FlowMatchHeunDiscreteScheduler):
    """The pipeline tells its scheduler the shift and the levels, which this one makes on its own."""

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None):
        super().set_timesteps(num_inference_steps or len(sigmas), device)


def test_another_scheduler_and_another_task_over_one_transformer():
    """An image-to-image call that begins in the middle, and a sampler with two evaluations per step."""
    pipe = make_pipe()
    image = {"image": randn(1, 12, 16, 16), "strength": 0.6, "steps": 20}
    others = [(sharing(pipe, FluxImg2ImgPipeline), image), (sharing(pipe, scheduler=Heun()), {"steps": 6})]
    fresh = make_pipe()
    for other, call in others:
        twin = sharing(fresh, type(other), copy.deepcopy(other.scheduler))
        with hasten.accelerate(twin, "taylorseer", interval=4):
            right = draw(twin, **call)
        with hasten.accelerate(pipe, "taylorseer", interval=4) as run:
            first = draw(pipe, **A)
            assert torch.equal(draw(other, **call), right)
            assert torch.equal(draw(pipe, **A), first)
            counts = [max(r.step for r in run.records if r.run == number) + 1 for number in (0, 1, 2)]
        assert counts == [12, 12 if "image" in call else 11, 12]


@pytest.mark.parametrize("step", [0, 1, 5])
@pytest.mark.parametrize("site", ["hidden", "output"])
def test_a_bare_transformer_whose_pipeline_was_cancelled(site, step):
    pipe = make_pipe()
    with hasten.accelerate(pipe.transformer, "hicache", interval=4, site=site):
        fresh = draw(pipe, **B)
        with pytest.raises(Cancelled):
            draw(pipe, **A, callback_on_step_end=at(step, cancel))
        assert torch.equal(draw(pipe, **B), fresh)
    image = sharing(pipe, FluxImg2ImgPipeline)
    call = {"image": randn(1, 12, 16, 16), "strength": 0.5, "steps": 20}
    with hasten.accelerate(image.transformer, "hicache", interval=4, site=site):
        fresh = draw(image, **call)
        with pytest.raises(Cancelled):  # and the next call begins at a time where this one would have gone on
            draw(pipe, **A, callback_on_step_end=at(step, cancel))
        assert torch.equal(draw(image, **call), fresh)


def test_a_bare_transformer_in_a_pipeline_knows_its_steps():
    pipe = make_pipe()
    with hasten.accelerate(pipe.transformer, "taylorseer", interval=4, schedule="even") as run:
        draw(pipe)
    assert [r.step for r in run.records if r.computed][-1] == 11


# --- long video, each section with copies of the scheduler


def forcing():
    torch.manual_seed(0)
    model = diffusers.SkyReelsV2Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=4,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = SkyReelsV2DiffusionForcingPipeline(None, None, model, None, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def long_film(pipe, **kwargs):
    size = {"height": 64, "width": 64, "num_frames": 29, "base_num_frames": 17, "overlap_history": 5}
    text = {"prompt": None, "prompt_embeds": randn(1, 5, 32), "negative_prompt_embeds": randn(1, 5, 32, seed=1)}
    torch.manual_seed(5)  # the pipeline draws noise for the overlap from the global generator
    return pipe(
        **{**size, **text, **kwargs},
        num_inference_steps=12,
        guidance_scale=2.0,
        addnoise_condition=20,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).frames


@pytest.mark.parametrize("asynchronous", [{}, {"ar_step": 3, "causal_block_size": 1}])
@pytest.mark.parametrize("site", ["hidden", "output"])
def test_sections_of_a_long_video_are_runs_of_their_own(asynchronous, site):
    pipe = forcing()
    plain = long_film(pipe, **asynchronous)
    with hasten.accelerate(pipe, "taylorseer", interval=1, site=site):
        assert torch.equal(long_film(pipe, **asynchronous), plain)
    with hasten.accelerate(pipe, "taylorseer", interval=3, site=site) as run:
        film = long_film(pipe, **asynchronous)
        records = [r for r in run.records if r.pass_name == run.records[0].pass_name]
        assert torch.equal(long_film(pipe, **asynchronous), film)
    assert len({r.run for r in records}) == 2
    for number in (0, 1):
        section = [r for r in records if r.run == number]
        count = len(section)
        assert [r.step for r in section] == list(range(count))
        assert [r.step for r in section if r.computed] == computed_steps(Uniform(3, 3), count)
    assert (film - plain).norm() < 0.2 * plain.norm()


# --- nothing is left


@pytest.mark.parametrize("method", ["taylorseer", "fbcache", "teacache", "easycache", "speca", "reuse"])
def test_nothing_is_held_when_the_vae_decodes(method):
    """Features and what gates keep go with the last pass of the last step, at the peak of memory."""
    pipe = make_pipe()
    held = []
    with hasten.accelerate(pipe, method, interval=4) as run:
        (engine,) = run.engines.values()
        decode = pipe.vae.decode
        pipe.vae.decode = lambda *args, **kwargs: (
            held.append([(r.state.held, len(r.state.memories)) for r in engine.runs.under_way]),
            decode(*args, **kwargs),
        )[1]
        draw(pipe, output_type="pt", true_cfg_scale=3.0, negative_prompt="cat")
        assert run.summary().cache_bytes > 0
    assert held == [[(0, 0)]]


def test_memory_of_many_calls_is_that_of_the_latest():
    from hasten.pipeline.records import KEPT

    pipe = make_pipe()
    with hasten.accelerate(pipe, "taylorseer", warmup=1, interval=2) as run:
        (engine,) = run.engines.values()
        for _ in range(KEPT + 3):
            draw(pipe, 2)
        assert len(run.records) == 2 * KEPT
        assert run.records[0].run == 3
        assert run.summary(0).steps == 2
        assert not engine.runs.under_way


@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize("site", ["hidden", "output", "module"])
def test_model_and_pipeline_can_go(site, removed):
    """A removed handle lets go of them; without removal they go together with it."""
    pipe = make_pipe()
    run = hasten.accelerate(pipe, "taylorseer", interval=3, site=site)
    draw(pipe, 4)
    gone = [weakref.ref(pipe), weakref.ref(pipe.transformer), weakref.ref(pipe.transformer.transformer_blocks[0])]
    if removed:
        run.remove()
    else:
        del run
    del pipe
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3
    if removed:
        assert len(run.records) == 4
        assert run.summary().steps == 4


def test_the_schedulers_count_spares_reading_the_device():
    """From the second step on nothing is read: a timestep on `meta` has no value that could be."""
    from test_steps import LATENTS, pipe

    from hasten.pipeline.runs import Runs

    log, runs = [], Runs(torch.nn.Identity())

    def forward(t):
        t = t if len(log) < 1 else t.to("meta")
        log.append(runs.label(t, LATENTS)[1])

    caller = pipe(FlowMatchEulerDiscreteScheduler)
    caller(forward, 8)
    assert [info.step for info in log] == list(range(8))
    assert [info.timestep for info in log] == pytest.approx(caller.scheduler.timesteps.tolist())
    assert log[-1].last


@pytest.mark.parametrize("method", [("hicache", {"interval": 2, "warmup": 2}), ("fbcache", {"threshold": 0.1})])
def test_calls_without_end_make_nothing_grow(method):
    """`benchmarks/endurance.py` makes 100,000 of them and looks at the time as well."""
    name, params = method
    pipe, growth = Endless(), Growth()
    with hasten.accelerate(pipe, name, **params):
        for _ in range(4):
            growth.run(lambda i: pipe(5 if i % 7 == 0 else 4, 32 if i % 10 == 0 else 16), 70)
    objects = [row["objects"] for row in growth.rows]
    assert max(objects[1:]) - min(objects[1:]) < 70  # less than one for each call


def test_a_model_that_is_always_asked_at_one_time_makes_nothing_grow():
    """Without a pipeline each of these forwards may be one more pass of the same step."""
    pipe, growth = Endless(), Growth()
    latents, time = torch.ones(1, 16, 8), torch.ones(1)
    with hasten.accelerate(pipe.transformer, "taylorseer", interval=2, warmup=1) as run, torch.no_grad():
        for _ in range(4):
            growth.run(lambda _: pipe.transformer(latents, time), 3 * MOST_PASSES)
        (engine,) = run.engines.values()
        assert len(engine.runs.current.state.memories) <= MOST_PASSES
        assert all(record.computed for record in run.records)
        assert len({record.run for record in run.records}) == 12


def test_a_resolution_method_keeps_the_latest_runs(monkeypatch):
    monkeypatch.setattr("hasten.resolution.engine.KEPT", 3)
    monkeypatch.setattr("hasten.resolution.engine.PLANS", 2)
    pipe = make_pipe()
    size = {"height": 64, "width": 64}
    with hasten.accelerate(pipe, hasten.Fresco(stages=(2, 1, 1), shares=0.3)) as run:
        for _ in range(6):
            draw(pipe, 4, **size)
        assert sorted({record.run for record in run.stages.records}) == [3, 4, 5]
        assert len(run.stages.plans) <= 2 + 2  # and those of the run itself
        assert run.summary().steps == 4
        assert run.summary(0) == run.summary(-3)
        with pytest.raises(hasten.errors.ConfigError, match="no run 3"):
            run.summary(3)


# --- switched off, on or over while a call is under way


@pytest.mark.parametrize("site", ["hidden", "output", "module"])
def test_an_acceleration_removed_in_mid_call_leaves_the_rest_of_the_call_plain(site):
    pipe = make_pipe()
    plain = draw(pipe, **A)
    run = hasten.accelerate(pipe, "taylorseer", steps=(0, 1, 2, 3, 4, 5), site=site)
    assert torch.equal(draw(pipe, **A, callback_on_step_end=at(4, run.remove)), plain)
    assert len(run.records) == 5
    assert torch.equal(draw(pipe, **A), plain)


def test_a_call_that_waits_while_hooks_are_replaced_meets_the_new_ones_and_nobody_else():
    """It must not run plain, nor beside a call of the new hooks, whose proxies would stand in its way."""
    pipe = make_pipe()
    model, given, ran = pipe.transformer, [], threading.Event()
    looking = model.register_forward_pre_hook(lambda _module, args, kwargs: given.append(kwargs), with_kwargs=True)
    draw(pipe, 1)
    looking.remove()
    hasten.accelerate(pipe, "taylorseer", warmup=1, interval=2)
    model.norm_out.register_forward_pre_hook(lambda *_: ran.set())
    waiting = threading.Thread(target=torch.no_grad()(lambda: model(**given[0])))
    busy = still([model])
    with busy:  # as if another thread's call were under way
        waiting.start()
        waiting.join(0.2)
        run = hasten.accelerate(pipe, "reuse", warmup=1, interval=2, replace=True)
        again = still([model])
        again.__enter__()
    assert not ran.wait(0.3), "it ran beside a call of the new hooks"
    again.__exit__(None, None, None)
    waiting.join()
    assert ran.is_set()
    assert len(run.records) == 1
    run.remove()


def test_removal_waits_for_the_end_of_a_call(monkeypatch):
    """Else a call that another thread has all but finished would lose its image."""
    pipe = make_pipe()
    hasten.accelerate(pipe, "reuse", warmup=1, interval=2)
    (engine,) = hooks_on(pipe.transformer)
    removal, own, waited = threading.Thread(target=hasten.remove, args=(pipe,)), engine.end_run, []

    def end_run():
        removal.start()
        removal.join(0.2)
        waited.append(removal.is_alive())
        own()

    monkeypatch.setattr(engine, "end_run", end_run)
    assert draw(pipe, 3).isfinite().all()
    removal.join()
    assert waited == [True]
    assert not hooks_on(pipe.transformer)


def test_a_setting_of_single_calls_is_made_before_removal_or_refused(monkeypatch):
    pipe = make_pipe()
    run = hasten.accelerate(pipe, "reuse", warmup=1, interval=2)
    removal, own, waited = threading.Thread(target=run.remove), run._requests._lane, []

    def lane(setting):
        removal.start()
        removal.join(0.2)
        waited.append(removal.is_alive())
        return own(setting)

    monkeypatch.setattr(run._requests, "_lane", lane)
    with run.using(computed_steps=2):
        removal.join()
    assert waited == [True]
    with pytest.raises(ConfigError, match="the acceleration was removed"), run.using(computed_steps=2):
        pass


def test_threads_that_replace_each_other_take_turns(monkeypatch):
    """Else one finds what the other has just put there, and is told to give `replace=True`, which it did."""
    pipe, own, waited = make_pipe(), CachingEngine.attach, []
    other = threading.Thread(target=lambda: hasten.accelerate(pipe, "taylorseer", replace=True))

    def attach(engine, *args):
        if threading.current_thread() is not other:
            other.start()
            other.join(0.2)
            waited.append(other.is_alive())
        own(engine, *args)

    monkeypatch.setattr(CachingEngine, "attach", attach)
    hasten.accelerate(pipe, "reuse", replace=True)
    other.join()
    assert waited == [True]
    (engine,) = hooks_on(pipe.transformer)
    assert type(engine.method).__name__ == "TaylorSeer"


def test_a_forward_may_look_while_its_watch_is_made():
    class Called(torch.nn.Linear):
        def register_forward_pre_hook(self, hook, **kwargs):
            handle = super().register_forward_pre_hook(hook, **kwargs)
            self(torch.zeros(1, 2))  # as a forward on another thread does
            return handle

    Watch(torch.nn.Sequential(Called(2, 2), Called(2, 2)), lambda: True).remove()


def test_a_watch_may_settle_while_another_thread_ends_it():
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(4)))
    watch = Watch(model, lambda: True)

    class Ending:
        def __init__(self, handle):
            self.handle = handle

        def remove(self):
            self.handle.remove()
            watch.remove()  # as a forward on another thread does

    watch._handles.update({name: Ending(handle) for name, handle in watch._handles.items() if name != "0"})
    watch.look("0")
    assert not any(child._forward_pre_hooks for child in model)


def test_threads_may_call_while_another_switches_off_and_on():
    """Removal waits for the forward under way; what comes after it is plain. Nothing raises."""
    pipe = make_pipe()
    callers, failed, done = [pipe, sharing(pipe)], [], threading.Event()

    def work(caller):
        try:
            while not done.is_set():
                assert draw(caller, 3).isfinite().all()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(caller,)) for caller in callers]
    for thread in threads:
        thread.start()
    for method in (("taylorseer", {"warmup": 1, "interval": 2}), ("reuse", {"site": "module", "warmup": 1})) * 8:
        hasten.accelerate(pipe, method[0], **method[1], replace=True)
    hasten.remove(pipe)
    done.set()
    for thread in threads:
        thread.join()
    assert not failed
    assert torch.equal(draw(pipe, **A), draw(callers[1], **A))


@pytest.mark.parametrize("step", [0, 7])
def test_a_call_goes_on_as_it_began_when_a_resolution_method_comes(step):
    pipe, call = make_pipe(), {**A, "steps": 9, "height": 64, "width": 64}
    plain = draw(pipe, **call)
    method = hasten.Fresco(stages=(3, 3, 3), shares=0.3)
    handles = []
    switch = at(step, lambda: handles.append(hasten.accelerate(pipe, method)))
    assert torch.equal(draw(pipe, **call, callback_on_step_end=switch), plain)
    assert not handles[0].stages.records
    coarse = draw(pipe, **call)
    assert len(handles[0].stages.records) == 9
    handles[0].remove()
    with hasten.accelerate(pipe, method):
        assert torch.equal(draw(pipe, **call), coarse)


@pytest.mark.parametrize("step", [2, 10])
def test_the_tail_of_a_call_is_no_run_in_which_nothing_was_skipped(step):
    pipe = make_pipe()
    hasten.accelerate(pipe, "hicache", interval=3, warmup=1)
    switch = at(step, lambda: hasten.accelerate(pipe, "taylorseer", interval=3, warmup=9, replace=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error", HastenWarning)
        draw(pipe, 12, callback_on_step_end=switch)


def test_a_resolution_method_removed_in_a_coarse_step_says_what_is_lost():
    pipe = make_pipe()
    run = hasten.accelerate(pipe, hasten.Fresco(stages=(4, 4, 4), shares=0.3))
    with pytest.warns(HastenWarning, match="removed in the middle of a call that is still coarse"):
        draw(pipe, **A, height=64, width=64, callback_on_step_end=at(2, run.remove))
    with warnings.catch_warnings(), hasten.accelerate(pipe, hasten.Fresco(stages=(4, 4, 4), shares=0.3)):
        warnings.simplefilter("error", HastenWarning)
        draw(pipe, **A, height=64, width=64)


def test_a_call_that_a_pipeline_interrupts_itself_leaves_nothing(pipe):
    """`pipe._interrupt`, the documented way to stop a call: the rest of the loop is passed over."""
    expected = alone("taylorseer", {}, **B)
    with hasten.accelerate(pipe, "taylorseer", interval=4) as run:
        draw(pipe, **A, callback_on_step_end=at(5, lambda: setattr(pipe, "_interrupt", True)))
        assert torch.equal(draw(pipe, **B), expected)
        assert not run.engines["transformer"].runs.under_way


def pieces(count=1):
    """Arguments of the first forwards of a call."""
    pipe, asked = make_pipe(), []
    pipe.transformer.register_forward_pre_hook(lambda *given: asked.append(given[2]), with_kwargs=True)
    draw(pipe, 2)
    return asked[:count]


def loop(transformer, asked, passes, steps=12, names=False):
    """A loop of the user's own, with as many passes as `passes` says of each step."""
    latents = asked["hidden_states"].clone()
    for step in range(steps):
        for number in range(passes(step)):
            given = {**asked, "hidden_states": latents, "timestep": torch.tensor([1 - step / steps])}
            text = given["encoder_hidden_states"] * (passes(step) - number)
            with torch.no_grad(), transformer.cache_context(str(number)) if names else contextlib.nullcontext():
                out = transformer(**{**given, "encoder_hidden_states": text})[0]
        latents = latents - out / steps
        yield latents


@pytest.mark.parametrize("names", [False, True])
def test_passes_without_names_that_become_more_are_told(names):
    pipe, (asked,) = make_pipe(), pieces()
    with (
        hasten.accelerate(pipe.transformer, "reuse", interval=3, warmup=1),
        warnings.catch_warnings(record=True) as told,
    ):
        warnings.simplefilter("always")
        list(loop(pipe.transformer, asked, lambda step: 1 if step < 4 else 2, names=names))
    said = [str(one.message) for one in told if "more passes than the one before" in str(one.message)]
    assert len(said) == (not names)


def test_tasks_on_one_thread_have_runs_of_their_own():
    (asked,) = pieces()

    async def task(transformer, scale, results):
        for latents in loop(transformer, {**asked, "hidden_states": asked["hidden_states"] * scale}, lambda _: 1):
            await asyncio.sleep(0)
            results.append(latents)

    async def tasks(transformer, results, *scales):
        await asyncio.gather(*(task(transformer, scale, results) for scale in scales))

    together, apart = [], []
    with hasten.accelerate(make_pipe().transformer, "hicache", interval=3, warmup=1) as run:
        (model,) = run.modules.values()
        asyncio.run(tasks(model, together, 1.0, 0.5))
    for scale in (1.0, 0.5):
        with hasten.accelerate(make_pipe().transformer, "hicache", interval=3, warmup=1) as run:
            (model,) = run.modules.values()
            asyncio.run(tasks(model, apart, scale))
    assert all(map(torch.equal, together[-2:], (apart[11], apart[-1])))


def test_a_run_is_not_gone_on_with_by_a_later_thread():
    """Its identifier may be the one of the thread that ended."""
    (asked,), transformer, idents = pieces(), make_pipe().transformer, []
    steps = loop(transformer, asked, lambda _: 1)

    def work():
        idents.append(threading.get_ident())
        list(itertools.islice(steps, 2))

    with hasten.accelerate(transformer, "reuse", interval=3, warmup=1) as run:
        for _ in range(5):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
    assert len(set(idents)) < 5
    assert len({record.run for record in run.records}) == 5


def test_locks_of_several_modules_are_taken_in_one_order(monkeypatch):
    """Else two threads with the same two experts the other way round would wait for each other for ever."""
    first, second = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    own, orders = hooks._lock_of, []
    monkeypatch.setattr(hooks, "_lock_of", lambda module: orders[-1].append(module) or own(module))
    for modules in ([first, second], [second, first]):
        orders.append([])
        with still(modules):
            pass
    assert orders[0] == orders[1]


def test_what_is_replaced_on_other_modules_is_locked_with_the_rest(monkeypatch):
    pipe, held = make_pipe(), []
    pipe.transformer_2 = copy.deepcopy(pipe.transformer)
    hasten.accelerate(pipe, "reuse")

    @contextlib.contextmanager
    def watched(modules):
        held.append(set(modules))
        with still(held[-1]):
            yield

    monkeypatch.setattr(hasten.acceleration, "still", watched)
    hasten.accelerate(pipe.transformer, "reuse", replace=True)
    assert held == [{pipe.transformer, pipe.transformer_2}]


def test_a_shallow_copy_of_what_is_accelerated_is_refused():
    model = make_pipe().transformer
    with hasten.accelerate(model, "reuse"), pytest.raises(CopyError, match="is accelerated"):
        copy.copy(model)
    copy.copy(model)


def test_another_transformer_that_shares_submodules_did_not_come_past():
    one, other = make_pipe(), make_pipe(1)
    other.transformer.x_embedder = one.transformer.x_embedder
    other.transformer.time_text_embed = one.transformer.time_text_embed
    with hasten.accelerate(one, "reuse"), warnings.catch_warnings():
        warnings.simplefilter("error", HastenWarning)
        draw(one)
        draw(other)


@pytest.mark.parametrize("act", ["call", "remove", "replace"])
def test_what_a_part_does_to_the_acceleration_within_a_forward_is_one_clear_error(act):
    pipe = make_pipe()
    run = hasten.accelerate(pipe, hasten.SpeCa())
    acts = {
        "call": lambda: draw(pipe, 2),
        "remove": run.remove,
        "replace": lambda: hasten.accelerate(pipe, "reuse", replace=True),
    }
    part = pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *_: acts[act]() and None)
    with pytest.raises(ConfigError, match="within its own forward" if act == "call" else "is within a forward"):
        draw(pipe)
    part.remove()
    assert draw(pipe).isfinite().all()
    assert run.summary().steps == 12


def test_warnings_that_are_errors_leave_no_run():
    pipe = make_pipe()
    run = hasten.accelerate(pipe, "fbcache", threshold=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("error", HastenWarning)
        with pytest.raises(HastenWarning, match="let no step"):
            draw(pipe)
    assert not run.engines["transformer"].runs.under_way


class InSteps(diffusers.FluxPipeline):
    """A pipeline whose call is a generator."""

    def __call__(self, asked):
        for step in loop(self.transformer, asked, lambda _: 1):  # noqa: UP028
            yield step


def test_calls_that_are_generators_in_turn_are_said_to_save_nothing():
    plain, (asked,) = make_pipe(), pieces()
    pipe = InSteps(**plain.components)
    with hasten.accelerate(pipe, "reuse", interval=3, warmup=1):
        with warnings.catch_warnings():
            warnings.simplefilter("error", HastenWarning)
            list(pipe(asked))
        with pytest.warns(HastenWarning, match="calls that take turns"):
            list(zip(pipe(asked), pipe(asked), strict=True))
