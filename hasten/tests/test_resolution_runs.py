"""Whose run it is: pipelines that share a transformer or a scheduler, cancelled and nested calls, threads, copies."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from device import Waits
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline
from pipelines import draw, make_pipe, own_tokenizers
from test_dvg import DVG, STEPS, film, wan
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

import hasten
from hasten.errors import AlreadyAcceleratedError, ConfigError, CopyError, HastenWarning, TargetError
from hasten.pipeline import caller, runs

METHODS = {
    "fresco": hasten.Fresco(stages=(3, 3, 3), shares=0.3),
    "bottleneck": hasten.Bottleneck(stages=(4, 5)),
    "spectral": hasten.Spectral(stages=(4, 5)),
}


class CancelError(Exception):
    pass


def at(step: int, act: Callable[[], Any]) -> Any:
    """A callback that acts at the end of a step."""

    def callback(_: Any, index: int, __: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if index == step:
            act()
        return state

    return callback


def cancel() -> None:
    raise CancelError


def generate(pipe: Any, seed: int = 0, **kwargs: Any) -> Tensor:
    return draw(pipe, 9, seed=seed, **{"height": 64, "width": 64, **kwargs})


@pytest.fixture
def pipe() -> Any:
    return make_pipe()


def other(pipe: Any, kind: Any = FluxPipeline, *, own_scheduler: bool = True) -> Any:
    """Another pipeline over the same transformer."""
    components = pipe.components | own_tokenizers(pipe)
    if own_scheduler:
        components["scheduler"] = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    made = kind(**components)
    made.set_progress_bar_config(disable=True)
    return made


def image_to_image(pipe: Any) -> Tensor:
    source = torch.randn(1, 12, 32, 32, generator=torch.Generator().manual_seed(4))
    return generate(pipe, image=source, strength=0.5)


# --- pipelines that share a transformer


@pytest.mark.parametrize("name", METHODS)
def test_another_pipeline_over_the_transformer_stays_plain(pipe: Any, name: str) -> None:
    second = other(pipe)
    plain, plain_second = generate(pipe), generate(second, 3)
    with hasten.accelerate(pipe, METHODS[name]):
        fast = generate(pipe)
        assert torch.equal(generate(second, 3), plain_second)
        inside: list[Tensor] = []
        for step in (0, 2, 5):
            nested = at(step, lambda: inside.append(generate(second, 3)))
            assert torch.equal(generate(pipe, callback_on_step_end=nested), fast)
            assert torch.equal(inside[-1], plain_second)
        inside.clear()
        around = at(2, lambda: inside.append(generate(pipe)))
        assert torch.equal(generate(second, 3, callback_on_step_end=around), plain_second)
        assert torch.equal(inside[0], fast)
    assert torch.equal(generate(pipe), plain)


@pytest.mark.parametrize("own_scheduler", [True, False])
def test_image_to_image_over_the_same_components_stays_plain(pipe: Any, own_scheduler: bool) -> None:
    second = other(pipe, FluxImg2ImgPipeline, own_scheduler=own_scheduler)
    plain = image_to_image(second)
    with hasten.accelerate(pipe, METHODS["fresco"]):
        fast = generate(pipe)
        assert torch.equal(image_to_image(second), plain)
        assert torch.equal(generate(pipe), fast)


@pytest.mark.parametrize("name", METHODS)
def test_after_a_cancelled_call_others_and_the_next_are_as_ever(pipe: Any, name: str) -> None:
    """A frame that has gone leaves its place in memory to the next one, whose run is another."""
    second, shared = other(pipe), other(pipe, FluxImg2ImgPipeline, own_scheduler=False)
    plain, plain_shared = generate(second, 3), image_to_image(shared)
    with hasten.accelerate(pipe, METHODS[name]):
        fast = generate(pipe)
        for step in (0, 3, 6):
            for call, expected in (
                (lambda: generate(second, 3), plain),
                (lambda: image_to_image(shared), plain_shared),
                (lambda: generate(pipe), fast),
            ):
                with pytest.raises(CancelError):
                    generate(pipe, callback_on_step_end=at(step, cancel))
                assert torch.equal(call(), expected)


def test_a_call_in_the_frame_of_one_that_has_gone_is_another_run(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every call of a pipeline got the frame of the one before."""

    class Recycled(caller.Caller):
        def __init__(self) -> None:
            super().__init__()
            self.owner = self.owner._replace(frame=None if self.pipe is None else 1)

    monkeypatch.setattr(runs, "Caller", Recycled)
    monkeypatch.setattr(runs, "current_owner", lambda: Recycled().owner)
    second = other(pipe)
    plain = generate(second, 3)
    with hasten.accelerate(pipe, METHODS["fresco"]):
        fast = generate(pipe)
        with pytest.raises(CancelError):
            generate(pipe, callback_on_step_end=at(1, cancel))
        assert torch.equal(generate(second, 3), plain)
        assert torch.equal(generate(pipe), fast)


def test_steps_of_another_loop_by_the_same_scheduler_stay_plain(pipe: Any) -> None:
    """A loop of the user's own that was left; the next one goes by the scheduler with another model."""
    sample, seen = torch.ones(1, 4, 4), list[dict[str, Any]]()
    handle = pipe.transformer.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
    generate(pipe)
    handle.remove()
    with hasten.accelerate(pipe, METHODS["fresco"]) as run, torch.no_grad():
        pipe.scheduler.set_timesteps(9, mu=1.0)
        pipe.transformer(**seen[0])
        assert [found.state is not None for found in run.stages._runs.under_way] == [True]
        pipe.scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=1.0)
        after = pipe.scheduler.step(sample, pipe.scheduler.timesteps[0], sample)[0]
        change = pipe.scheduler.sigmas[1] - pipe.scheduler.sigmas[0]
        torch.testing.assert_close(after, sample + change * sample)
        assert run.stages.records == []


def test_a_call_that_sets_the_scheduler_of_a_run_under_way_is_a_clear_error(pipe: Any) -> None:
    shared = other(pipe, FluxImg2ImgPipeline, own_scheduler=False)
    with hasten.accelerate(pipe, METHODS["fresco"]):
        fast = generate(pipe)
        for call in (lambda: generate(pipe), lambda: image_to_image(shared)):
            with pytest.raises(ConfigError, match="in the middle of one with Fresco"):
                generate(pipe, callback_on_step_end=at(2, call))
            assert torch.equal(generate(pipe), fast)


def test_pipelines_on_two_threads(pipe: Any) -> None:
    second = other(pipe)
    plain = generate(second, 3)
    results: dict[str, list[Tensor]] = {"fast": [], "plain": []}
    with hasten.accelerate(pipe, METHODS["fresco"]):
        fast = generate(pipe)
        threads = [
            threading.Thread(target=lambda: results["fast"].extend(generate(pipe) for _ in range(3))),
            threading.Thread(target=lambda: results["plain"].extend(generate(second, 3) for _ in range(3))),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [torch.equal(latents, fast) for latents in results["fast"]] == [True] * 3
    assert [torch.equal(latents, plain) for latents in results["plain"]] == [True] * 3


def test_the_transformer_called_by_hand_stays_plain(pipe: Any) -> None:
    seen: list[dict[str, Any]] = []
    handle = pipe.transformer.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
    generate(pipe)
    handle.remove()
    with torch.no_grad():
        plain = pipe.transformer(**seen[0])[0]
        with hasten.accelerate(pipe, METHODS["fresco"]):
            assert torch.equal(pipe.transformer(**seen[0])[0], plain)
            generate(pipe)
            assert torch.equal(pipe.transformer(**seen[0])[0], plain)


def test_two_resolution_methods_over_one_transformer_are_refused(pipe: Any) -> None:
    second = other(pipe)
    with hasten.accelerate(pipe, METHODS["fresco"]):
        before = dict(vars(second.scheduler))
        with pytest.raises(AlreadyAcceleratedError):
            hasten.accelerate(second, METHODS["bottleneck"])
        assert vars(second.scheduler) == before
    with hasten.accelerate(second, METHODS["bottleneck"]):
        assert torch.isfinite(generate(second)).all()


def test_a_copied_scheduler_takes_its_own_steps(pipe: Any) -> None:
    """A copy goes by its own noise levels, and the one that was copied does not move."""
    with hasten.accelerate(pipe, METHODS["fresco"]):
        pipe.scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=1.0)
        copied = copy.deepcopy(pipe.scheduler)
        sample = torch.ones(1, 4, 4)
        copied.step(sample, copied.timesteps[0], sample)
        assert copied.step_index == 1
        assert pipe.scheduler.step_index is None


def test_a_pipeline_with_a_shallow_copy_of_the_scheduler_takes_its_own_steps(pipe: Any) -> None:
    plain = generate(pipe)
    with hasten.accelerate(pipe, METHODS["fresco"]):
        coarse = generate(pipe)
        second = other(pipe)
        second.scheduler = copy.copy(pipe.scheduler)
        assert torch.equal(generate(second), plain)
        assert torch.equal(generate(pipe), coarse)


def test_a_removed_handle_lets_go_of_the_scheduler(pipe: Any) -> None:
    def callback(owner: Any, step: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            hasten.remove(owner)
        return kwargs

    run = hasten.accelerate(pipe, METHODS["fresco"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generate(pipe, callback_on_step_end=callback)
    scheduler, pipe.scheduler = weakref.ref(pipe.scheduler), FlowMatchEulerDiscreteScheduler()
    gc.collect()
    assert scheduler() is None
    run.remove()  # it was held until here


def test_an_accelerated_scheduler_is_not_pickled(pipe: Any) -> None:
    with hasten.accelerate(pipe, METHODS["fresco"]), pytest.raises(CopyError, match="accelerated"):
        pickle.dumps(pipe.scheduler)


def test_calls_with_gradients_are_plain_whatever_the_pipeline_was_given(pipe: Any) -> None:
    """Among them those of a transformer whose pipeline has another scheduler by now."""
    calls: list[dict[str, Any]] = []
    looking = pipe.transformer.register_forward_pre_hook(lambda *given: calls.append(given[2]), with_kwargs=True)
    generate(pipe)
    looking.remove()
    plain = pipe.transformer(**calls[0])[0]
    with hasten.accelerate(pipe, METHODS["fresco"]) as run:
        pipe.scheduler = copy.deepcopy(pipe.scheduler)
        pipe.scheduler.set_timesteps(4, mu=1.0)
        with pytest.warns(HastenWarning, match="called with gradients enabled"):
            first = pipe.transformer(**calls[0])[0]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second = pipe.transformer(**calls[0])[0]
        assert torch.equal(first, plain)
        assert torch.equal(second, plain)
        assert not run.stages.records


def test_compiled_transformers_are_refused(pipe: Any) -> None:
    pipe.transformer.compile(backend="eager")
    with pytest.raises(TargetError, match="compile_repeated_blocks"):
        hasten.accelerate(pipe, METHODS["fresco"])


def test_a_removed_engine_keeps_no_model(pipe: Any) -> None:
    run = hasten.accelerate(pipe, METHODS["fresco"])
    generate(pipe)
    engine = run.stages
    run.remove()
    gone = weakref.ref(pipe.transformer)
    del run
    pipe.__dict__.clear()
    gc.collect()
    assert gone() is None
    assert len(engine.records) == 9


def test_nothing_of_a_run_is_kept_after_its_last_step(pipe: Any) -> None:
    with hasten.accelerate(pipe, METHODS["fresco"]) as run:
        generate(pipe)
        assert [found.state for found in run.stages._runs.under_way] == [None]


def waits(generate: Callable[..., Any], steps: int) -> list[int]:
    """How often the host waits in each step but the first."""
    read = runs._read

    def on_device(timestep: Any) -> tuple[float, float]:
        """Labels of forwards read a timestep that lies on the host, and there alone."""
        with _disable_current_modes():
            return read(timestep)

    with pytest.MonkeyPatch.context() as patch, Waits() as mode:
        patch.setattr(runs, "_read", on_device)
        ends: list[int] = []

        def look(_: Any, __: int, ___: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
            ends.append(sum(mode.counts.values()))
            return state

        generate(callback_on_step_end=look)
    assert len(ends) == steps
    return [after - before for before, after in pairwise(ends)]


def test_within_a_stage_the_host_waits_no_more_than_in_the_plain_pipeline(pipe: Any) -> None:
    plain = waits(lambda **call: generate(pipe, **call), 9)
    for method in (METHODS["fresco"], hasten.Fresco(stages=(3, 3, 3), jump="r1"), METHODS["bottleneck"]):
        with hasten.accelerate(pipe, method) as run:
            own = waits(lambda **call: generate(pipe, **call), 9)
            switched = [record.step for record in run.stages.records if record.switched]
        # A promotion makes positions of the next step's tokens again; the last step is asked whether it is finite.
        quiet = [step for step in range(2, 8) if step not in switched and step - 1 not in switched]
        assert quiet
        assert [own[step - 1] for step in quiet] == [plain[step - 1] for step in quiet]


def test_within_a_stage_of_a_clip_the_host_waits_no_more_than_in_the_plain_pipeline() -> None:
    pipe = wan()
    plain = waits(lambda **call: film(pipe, **call), STEPS)
    with DVG().attach(pipe) as engine:
        own = waits(lambda **call: film(pipe, **call), STEPS)
        switched = [record.step for record in engine.records if record.switched]
    quiet = [step for step in range(2, STEPS - 1) if step not in switched and step - 1 not in switched]
    assert quiet
    assert [own[step - 1] for step in quiet] == [plain[step - 1] for step in quiet]


# --- clips


def test_clips_of_a_batch_have_noise_of_their_own() -> None:
    """With the same plan, a clip is what it is when generated alone."""
    pipe = wan()
    prompts = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    with DVG(noise="independent", compress="space").attach(pipe):

        def clips(*images: int) -> Tensor:
            generators = [torch.Generator().manual_seed(image) for image in images]
            return film(pipe, len(images), generator=generators, prompt_embeds=prompts[list(images)])

        together = clips(0, 1)
        torch.testing.assert_close(together, torch.cat([clips(0), clips(1)]), atol=1e-4, rtol=1e-4)


def test_the_next_stage_of_a_clip_begins_at_the_next_noise_level() -> None:
    """Where the clean estimate is nothing, the latents are noise of exactly that level."""
    pipe = wan()
    pipe.transformer.forward = lambda hidden_states, timestep, **_: (hidden_states * 1000 / timestep.flatten()[0],)
    kept: list[tuple[int, Tensor]] = []
    with DVG(smooth=0.0).attach(pipe) as engine:

        def look() -> None:
            (found,) = engine._runs.under_way
            if engine.records[-1].switched and found.state is not None and found.state.latents is not None:
                noise = engine._stage_noise(found.state, found.state.noise)
                kept.append((len(engine.records), found.state.latents / noise))

        for step in range(STEPS):
            film(pipe, callback_on_step_end=at(step, look))
    assert {number % STEPS for number, _ in kept} == {4, 7}
    for number, ratio in kept:
        record = engine.records[number - 1]
        assert record.next_sigma != record.sigma
        torch.testing.assert_close(ratio, torch.full_like(ratio, record.next_sigma), atol=1e-3, rtol=1e-3)


# --- reports


def test_a_report_names_stages_tokens_and_operations(pipe: Any) -> None:
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        generate(pipe)
    full = counter.get_total_flops()
    with hasten.accelerate(pipe, METHODS["fresco"]) as run:
        with pytest.raises(ConfigError, match="no run -1 of Fresco"):
            run.stages.report()
        with counter, sdpa_kernel(SDPBackend.MATH):
            generate(pipe)
        report = run.stages.report()
        generate(pipe, height=32, width=32)
        assert run.stages.report().full_tokens == 64
        assert run.stages.report(0) == report
    assert [(stage.name, stage.steps, stage.tokens) for stage in report.stages] == [
        ("coarse", 3, 64),
        ("mixed", 3, 64 + 3 * 19),
        ("full", 3, 256),
    ]
    assert (report.method, report.steps, report.full_tokens) == ("Fresco", 9, 256)
    assert report.flops_ratio == pytest.approx(full / counter.get_total_flops(), rel=0.03)
    assert "3 mixed (121 tokens)" in str(report)
    assert report.to_dict()["stages"][0] == {"name": "coarse", "steps": 3, "tokens": 64}


def test_a_summary_names_stages_tokens_and_operations(pipe: Any) -> None:
    with hasten.accelerate(pipe, METHODS["fresco"]) as run:
        generate(pipe)
        alone = run.summary()
        assert alone.flops_ratio == pytest.approx(run.stages.report().flops_ratio)
    assert (alone.method, alone.steps, alone.computed_steps, alone.cache_bytes) == ("Fresco", 9, 9, 0)
    assert alone.stages == "3 coarse (64 tokens), 3 mixed (121 tokens), 3 full (256 tokens)"
    assert f"{alone.flops_ratio:.2f}x fewer operations" in str(alone)
    assert alone.stages in alone._repr_html_()
    with hasten.accelerate(pipe, METHODS["fresco"], hasten.TaylorSeer(interval=3, warmup=1)) as run:
        generate(pipe)
        both, records = run.summary(), run.stages.records
        computed = {record.step for record in run.records if record.computed}
    assert both.stages == alone.stages
    assert 0 < both.skipped_steps == 9 - len(computed)
    assert both.flops_ratio == pytest.approx(9 / sum(records[step].cost for step in computed))
    assert both.flops_ratio > alone.flops_ratio


def test_a_report_of_a_clip_names_its_grids() -> None:
    pipe = wan()
    with DVG().attach(pipe) as engine:
        film(pipe)
        report = engine.report()
    assert [stage.name for stage in report.stages] == ["x".join(map(str, grid)) for grid in engine.plans[0].grids]
    assert sum(stage.steps for stage in report.stages) == STEPS
    assert report.stages[-1].tokens == report.full_tokens
    assert report.flops_ratio > 1 / engine.plans[0].density
