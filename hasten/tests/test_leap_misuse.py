"""What users of diffusers do with LEAP that would go wrong without a word."""

import copy
import pickle

import diffusers
import pytest
import torch
from leap_pipelines import OWN, SD, XL
from pipelines import draw, make_pipe

import hasten
from hasten.bench.tune import TuneSettings
from hasten.errors import (
    AlreadyAcceleratedError,
    CalibrationError,
    ConfigError,
    HastenWarning,
    ScheduleError,
)
from hasten.fitting.group import guidance_of_calls
from hasten.fitting.leap import fit_leap
from hasten.pipeline.hooks import hooks_on
from hasten.solvers import LeapScheduler
from hasten.solvers.scales import _check_beside

GUIDED = {"negative_prompt": "blue", "true_cfg_scale": 3.0}


def call(seed=0, **more):
    noise = torch.Generator().manual_seed(seed)
    size = {"height": 32, "width": 32, "max_sequence_length": 8, "num_inference_steps": 6}
    return {"prompt": "red apple", **size, "generator": noise, **more}


def sd_call(seed=0, xl=False, **more):
    noise = torch.Generator().manual_seed(seed)
    texts = {name: value for name, value in (XL if xl else SD).items() if name != "guidance_scale"}
    return {**texts, "num_inference_steps": 4, "output_type": "latent", "generator": noise, **more}


def fit(pipe, *calls, **more):
    return fit_leap(pipe, calls or (call(),), [3], trials=1, rounds=0, **more)


@pytest.fixture(scope="module")
def plain_fit():
    return fit(make_pipe())


@pytest.fixture(scope="module")
def guided_fit():
    return fit(make_pipe(), call(**GUIDED))


# --- with a cache


@pytest.mark.parametrize("first", ["leap", "foca"])
def test_leap_and_a_cache_are_refused_one_after_the_other_as_together(plain_fit, first):
    pipe, leap = make_pipe(), hasten.Leap(plain_fit)
    methods = {"leap": lambda: hasten.accelerate(pipe, leap), "foca": lambda: hasten.accelerate(pipe, "foca")}
    (second,) = methods.keys() - {first}
    run, scheduler = methods[first](), pipe.scheduler
    with pytest.raises(AlreadyAcceleratedError, match=r"already at work here: .*LEAP replaces the scheduler"):
        methods[second]()
    assert len(hooks_on(pipe.transformer)) == 1
    assert pipe.scheduler is scheduler
    draw(pipe, 3)
    run.remove()
    methods[second]()
    hasten.accelerate(pipe, leap, replace=True)
    assert [hook.kind for hook in hooks_on(pipe.transformer)] == ["leap"]


# --- guidance


def test_guidance_by_default_is_that_of_the_fit():
    """Stable Diffusion guides by 7.5 unless it is told otherwise, and most calls do not tell it."""
    pipe = OWN["stable diffusion, ddim"][0]()
    found = fit_leap(pipe, [sd_call()], [2], trials=1, rounds=0)
    assert found.options["guidances"] == [7.5]
    for attach in (lambda: hasten.accelerate(pipe, hasten.Leap(found)), None):
        if attach is None:
            pipe.scheduler = LeapScheduler.of(found, pipe)
        else:
            attach()
        pipe(**sd_call(num_inference_steps=2))
        with pytest.raises(ScheduleError, match=r"fitted for guidance 7\.5, and this run has 2"):
            pipe(**sd_call(num_inference_steps=2, guidance_scale=2.0))
        hasten.remove(pipe)


def test_calls_of_one_fit_guide_alike_beside_the_scale():
    pipe = OWN["stable diffusion, ddim"][0]()
    calls = [sd_call(guidance_scale=3.0), sd_call(1, guidance_scale=3.0, guidance_rescale=0.7)]
    with pytest.raises(ConfigError, match=r"call 0 has .*'guidance_rescale': 0\.0.*, call 1 has .*0\.7"):
        fit_leap(pipe, calls, [2], trials=1, rounds=0)


def test_the_same_instruction_for_another_image_may_be_held_out():
    a, b = ({"prompt": "make it blue", "image": object(), "generator": torch.Generator().manual_seed(0)} for _ in "ab")
    assert guidance_of_calls([a], [b], ()) == (None, None)


@pytest.mark.parametrize("alone", [False, True])
def test_what_guides_beside_the_scale_is_part_of_the_fit(alone):
    pipe = OWN["stable diffusion, ddim"][0]()
    found = fit_leap(pipe, [sd_call(guidance_scale=3.0)], [2], trials=1, rounds=0)
    if alone:
        pipe.scheduler = LeapScheduler.of(found, pipe)
    else:
        hasten.accelerate(pipe, hasten.Leap(found))
    call = sd_call(num_inference_steps=2, guidance_scale=3.0)
    pipe(**call)
    pipe(**call, guidance_rescale=0.0)
    with pytest.raises(ScheduleError, match=r"fitted with guidance_rescale at 0, and this run has 0\.7"):
        pipe(**call, guidance_rescale=0.7)


@pytest.mark.parametrize(
    ("fitted", "first", "second", "served"),
    [
        (None, 3.0, None, True),
        (None, 3.0, 3.0, True),  # as Wan fills it in
        (None, 3.0, 4.0, False),
        (4.0, 4.0, None, True),
        (4.0, 3.0, None, False),
        (4.0, 3.0, 4.0, True),
        (3.0, 3.0, 3.0, True),
    ],
)
def test_a_second_scale_that_is_not_given_is_the_first_one(fitted, first, second, served):
    given = {"guidance_scale": first, "guidance_scale_2": second}
    if served:
        _check_beside({"guidance_scale_2": fitted}, given)
    else:
        with pytest.raises(ScheduleError, match="LEAP was fitted with guidance_scale_2 at"):
            _check_beside({"guidance_scale_2": fitted}, given)


def test_guidance_that_does_nothing_is_not_that_of_the_fit(plain_fit):
    """The model is not told `guidance_scale`, which the pipeline has a default for."""
    assert plain_fit.options["guidances"] == [None]
    pipe = make_pipe()
    pipe.scheduler = LeapScheduler.of(plain_fit, pipe)
    draw(pipe, 3, guidance_scale=1.0)


def test_true_guidance_with_a_fit_without_it_is_told(plain_fit):
    pipe = make_pipe()
    pipe.scheduler = LeapScheduler.of(plain_fit, pipe)
    with pytest.warns(HastenWarning, match=r"LEAP was fitted without guidance, and this run has 3: .* fit with it"):
        draw(pipe, 3, **GUIDED)
    pipe = make_pipe()
    with (
        hasten.accelerate(pipe, hasten.Leap(plain_fit)),
        pytest.warns(HastenWarning),
        pytest.raises(ScheduleError, match="LEAP was fitted without guidance, one pass"),
    ):
        draw(pipe, 3, **GUIDED)


@pytest.mark.parametrize(
    "others", [{"negative_prompt": "blue", "true_cfg_scale": 5.0}, {}], ids=["another scale", "none"]
)
def test_calls_of_one_fit_have_one_guidance(others):
    with pytest.raises(ConfigError, match=r"call 0 has true_cfg_scale 3\.0, call 1 has .*; give all the same"):
        fit(make_pipe(), call(0, **GUIDED), call(1, **others))
    held_out = [call(2, negative_prompt="blue", true_cfg_scale=4.0)]
    with pytest.raises(ConfigError, match=r"call 0 has true_cfg_scale 3\.0, held-out call 0 has true_cfg_scale 4\.0"):
        fit(make_pipe(), call(0, **GUIDED), held_out=held_out)


def test_what_is_learned_from_is_not_held_out():
    with pytest.raises(ConfigError, match="held-out call 1 asks for what call 0 does, with the same noise"):
        fit(make_pipe(), call(0), call(1), held_out=[call(2), call(0)])
    settings = TuneSettings(prompts=2, held_out=2)
    settings.check_prompts(["red apple", "red apple", "blue car", "moon", "sun"])
    with pytest.raises(ConfigError, match="the prompt 'sun' occurs 2 times: what was learned from"):
        settings.check_prompts(["sun", "red apple", "moon", "sun"])


def test_a_callback_that_changes_the_guidance_is_refused_at_the_next_evaluation(guided_fit):
    pipe = make_pipe()
    steps = []

    def change(pipe, step, timestep, kept):
        steps.append(step)
        pipe._guidance_scale = 30.0 if step == 1 else pipe._guidance_scale
        return kept

    with hasten.accelerate(pipe, hasten.Leap(guided_fit)):
        draw(pipe, 3, **GUIDED, callback_on_step_end=lambda *given: given[3])
        with pytest.raises(ScheduleError, match="guidance of this call changed before evaluation 2, and LEAP needs it"):
            draw(pipe, 3, **GUIDED, callback_on_step_end=change)
        assert steps == [0, 1]
        draw(pipe, 3, **GUIDED, callback_on_step_end=lambda *given: given[3])
        again = pickle.loads(pickle.dumps(pipe.scheduler))
    pipe.scheduler = again
    draw(pipe, 3, **GUIDED)


# --- schedulers that are kept, copied and handed over


@pytest.mark.parametrize("how", ["removed", "copied", "pickled"])
def test_a_scheduler_of_an_accelerated_pipeline_serves_another_one_without_its_hook(guided_fit, how):
    pipe = make_pipe()
    alone = LeapScheduler.of(guided_fit, pipe)
    run = hasten.accelerate(pipe, hasten.Leap(guided_fit))
    kept = pipe.scheduler
    draw(pipe, 3, **GUIDED)
    if how == "removed":
        run.remove()
    other = make_pipe()
    ways = {"removed": lambda one: one, "copied": copy.deepcopy, "pickled": lambda one: pickle.loads(pickle.dumps(one))}
    other.scheduler = ways[how](kept)
    found = draw(other, 3, **GUIDED)
    other.scheduler = alone
    assert torch.equal(found, draw(other, 3, **GUIDED))


def test_what_a_refiner_is_handed_has_another_scale_and_is_told():
    pipe = OWN["stable diffusion xl, euler"][0]()
    found = fit_leap(pipe, [sd_call(xl=True)], [4], trials=1, rounds=0)
    with hasten.accelerate(pipe, hasten.Leap(found)):
        pipe(**sd_call(xl=True))
        with pytest.warns(HastenWarning, match=r"ends early \(denoising_end\).* give LEAP to the pipeline"):
            pipe(**sd_call(xl=True, denoising_end=0.5))


def test_noise_is_added_at_times_between_the_learned_ones(plain_fit):
    scheduler = LeapScheduler.of(plain_fit, make_pipe())
    scheduler.set_timesteps(3)
    clean, noise = torch.zeros(1, 4), torch.ones(1, 4)
    times = torch.linspace(float(scheduler.timesteps[0]), 0, 9)
    added = [float(scheduler.add_noise(clean, noise, time[None])[0, 0]) for time in times]
    assert added == sorted(added, reverse=True)
    assert len(set(added)) == 9
    for time, level in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        assert float(scheduler.add_noise(clean, noise, time[None])[0, 0]) == pytest.approx(float(level), rel=1e-5)


# --- other weights


def test_an_adapter_is_told_whenever_it_is_loaded(plain_fit):
    peft = pytest.importorskip("peft")
    pipe = make_pipe()
    with hasten.accelerate(pipe, hasten.Leap(plain_fit)):
        draw(pipe, 3)
        pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
        with pytest.raises(CalibrationError, match=r"without the adapter that is loaded .* unload it"):
            draw(pipe, 3)
        pipe.transformer.delete_adapters("default")
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(CalibrationError, match="without the adapter that is loaded"):
        hasten.accelerate(pipe, hasten.Leap(plain_fit))


@pytest.mark.parametrize("how", ["written over", "through .data", "exchanged"])
def test_other_weights_are_told_in_the_next_call(plain_fit, how):
    pipe = make_pipe()
    pipe.scheduler = LeapScheduler.of(plain_fit, pipe)
    draw(pipe, 3)
    if how == "exchanged":
        pipe.transformer = make_pipe(5).transformer
    for name, weight in pipe.transformer.named_parameters():
        if name.endswith("to_q.weight") and how == "through .data":  # as a LoRA is fused
            weight.data += 0.1 * weight.data.roll(1)
        elif name.endswith("to_q.weight") and how == "written over":
            torch.nn.init.normal_(weight)
    with pytest.raises(CalibrationError, match="fitted for other weights"):
        draw(pipe, 3)


def test_a_scheduler_without_noise_levels_is_refused_by_name():
    pipe = OWN["stable diffusion, ddim"][0]()
    pipe.scheduler = diffusers.IPNDMScheduler()
    with pytest.raises(CalibrationError, match="IPNDMScheduler has no noise levels, and LEAP cannot follow it"):
        fit_leap(pipe, [sd_call()], [2], trials=1, rounds=0)
