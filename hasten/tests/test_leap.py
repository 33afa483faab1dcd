"""LEAP in use: the scheduler, the hook, guidance, later starts, files."""

from __future__ import annotations

import copy
import gc
import json
import math
import pickle
import warnings
import weakref
from itertools import pairwise
from statistics import geometric_mean

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, UniPCMultistepScheduler
from pipelines import asking, draw, make_pipe
from solvable import STEPS, Called, Toy, noise, relative, toy_call

import hasten
from hasten.calibration import Calibration
from hasten.errors import AlreadyAcceleratedError, CalibrationError, ConfigError, HastenWarning, ScheduleError
from hasten.fitting.leap import fit_leap
from hasten.pipeline.hooks import hooks_on
from hasten.quality.setting import FULL, FixedLeap, Setting
from hasten.solvers import LeapScheduler
from hasten.solvers.content import MORE
from hasten.solvers.formula import Learned, SecondOrder, signal
from hasten.solvers.tables import Axis, interpolated

SAVED = "5ab52ff93e98093fd20fcca3e72bc0d38dbfdad0822a869d934113e123e7f785"
GUIDED, FOUR = {"guidance_scale": 3.0}, {"guidance_scale": 4.0}
TABLE = {"timesteps": [1000.0, 500.0], "levels": [1.0, 0.5], "guided": [[[1.0, -0.5], [1.0, -0.5, -0.5]]]}
SCALES = {"guidances": [1.5, 3.0], "mixtures": [1.5, 3.0]}
LOGARITHM = SCALES | {"interpolated_over": "logarithm"}
NOISE = {"noise_timesteps": [0.0, 1000.0], "noise_levels": [0.0, 1.0]}
BY_SCALE = NOISE | {"timesteps_by_scale": [[1000.0, 500.0], [1000.0, 300.0]]}
RANGE = TABLE | {"guided": TABLE["guided"] * 2} | BY_SCALE
CROSSING = (
    TABLE
    | NOISE
    | {  # falls at each of three scales, and not everywhere between
        "guided": TABLE["guided"] * 3,
        "timesteps": [1000.0, 990.0],
        "levels": [1.0, 0.99],
        "timesteps_by_scale": [[1000.0, 500.0], [1000.0, 990.0], [1000.0, 500.0]],
    }
)


# --- the formula


def test_steps_are_the_formula_and_keep_what_others_did():
    rows, levels = [[0.9, 0.5], [0.8, 0.2, 0.7]], [1.0, 0.5, 0.0]
    x0, v0, v1 = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([3.0])
    one, other = (Learned(rows, levels, "flow_prediction", 1) for _ in range(2))
    x1 = one.advance(0, x0, v0, None)
    assert torch.allclose(x1, 0.9 * x0 + 0.5 * v0)
    assert torch.allclose(one.advance(1, x1, v1, None), 0.8 * x0 + 0.2 * v0 + 0.7 * v1)
    other.advance(0, x0, v0, None)
    assert torch.allclose(other.advance(1, x1 + 10, v1, None), 0.8 * x0 + 0.2 * v0 + 0.7 * v1 + 10)


def test_what_is_kept_is_nobody_elses():
    """Captured graphs, and loops with fixed buffers, write latents and results where those of the step before were."""
    rows, levels = [[0.9, 0.5], [0.8, 0.2, 0.7]], [1.0, 0.5, 0.0]
    formula, x, v = Learned(rows, levels, "flow_prediction", 1), torch.tensor([1.0]), torch.tensor([2.0])
    x.copy_(formula.advance(0, x, v, None))
    v.fill_(3.0)
    assert torch.allclose(formula.advance(1, x, v, None), torch.tensor([0.8 * 1.0 + 0.2 * 2.0 + 0.7 * 3.0]))


def test_a_variance_preserving_state_hands_on_what_others_did_as_ddim_does():
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(2)
    signals = [float(scheduler.alphas_cumprod[t]) ** 0.5 for t in scheduler.timesteps]
    levels = [(1 - s * s) ** 0.5 for s in signals]
    formula = Learned([[1.0, 0.0], [1.0, 0.0, 0.0]], [*levels, 0.0], "epsilon", 1)
    zero, change = torch.zeros(1), 1e-2
    formula.advance(0, zero, zero, None)
    plain = scheduler.step(zero, scheduler.timesteps[1], zero + change, return_dict=False)[0]
    assert formula.advance(1, zero + change, zero, None) == pytest.approx(float(plain), rel=1e-3)


@pytest.mark.parametrize("kind", ["flow_prediction", "epsilon", "v_prediction"])
def test_the_formula_without_memory_is_exact_where_the_image_is_known(kind):
    """A model that knows the image: any solver that is right ends there."""
    levels = [0.9, 0.7, 0.4, 0.2, 0.0]
    image, noisy = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    state = signal(0.9, kind) * image + 0.9 * noisy
    formula = SecondOrder(levels, kind)
    for k, level in enumerate(levels[:-1]):
        share = signal(level, kind)
        here = (state - share * image) / level
        output = {"flow_prediction": here - image, "epsilon": here, "v_prediction": share * here - level * image}[kind]
        state = formula.advance(k, state, output, None)
        later = levels[k + 1]
        assert torch.allclose(state, signal(later, kind) * image + later * noisy, atol=1e-5)


def test_the_formula_without_memory_is_the_multistep_solver_of_diffusers():
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(final_sigmas_type="zero")
    scheduler.set_timesteps(8)
    ratios = scheduler.sigmas[:-1].tolist()
    formula = SecondOrder([*(r / (1 + r * r) ** 0.5 for r in ratios), 0.0], "epsilon")
    state = own = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    for k, t in enumerate(scheduler.timesteps):
        (state,) = scheduler.step(noise(state, float(t)), t, state, return_dict=False)
        own = formula.advance(k, own, noise(own, float(t)), None)
        assert torch.allclose(own, state, atol=1e-4), k


# --- both passes


@pytest.fixture(scope="module")
def guided():
    calls = [toy_call(0, **GUIDED), toy_call(1, **GUIDED)]
    return fit_leap(Toy(), calls, [4], guidances=(1.5, 3.0, 5.0), trials=20, rounds=2)


def reference_at(scale, fused=False, seed=9):
    return Toy(fused=fused)(**toy_call(seed, guidance_scale=scale))[0]


@pytest.mark.parametrize("fused", [False, True])
def test_the_hook_hands_over_both_passes_and_nothing_of_it_is_left(fused):
    pipe, reference = Toy(fused=fused), reference_at(3.0)
    own = pipe.scheduler
    fit = fit_leap(pipe, [toy_call(i, **GUIDED) for i in range(6)], [4], trials=20, rounds=0)
    without = relative(pipe, LeapScheduler.of(fit, pipe), 4, reference, **GUIDED)
    before = dict(vars(pipe.transformer))
    with hasten.accelerate(pipe, hasten.Leap(fit)) as run:
        with_passes = relative(pipe, None, 4, reference, **GUIDED)
        assert run.summary().steps == 4
        relative(pipe, None, 4, reference, **GUIDED)
        assert hasten.summary(pipe).steps == 4
        assert str(run.summary()).startswith("Leap: 4 of 4 steps")
        assert isinstance(run.methods[0], hasten.Leap)
    assert pipe.scheduler is own
    assert dict(vars(pipe.transformer)) == before
    assert not hooks_on(pipe.transformer)
    assert with_passes < 0.7 * without
    assert without < 0.5 * relative(pipe, None, 4, reference, **GUIDED)


def test_leap_has_a_name_and_stands_alone(guided, tmp_path):
    path, pipe = guided.save(tmp_path / "leap.safetensors"), Toy()
    run = hasten.accelerate(pipe, "leap", calibration=str(path))
    assert isinstance(pipe.scheduler, LeapScheduler)
    with pytest.raises(AlreadyAcceleratedError, match="LeapScheduler already"):
        hasten.accelerate(pipe, hasten.Leap(guided))
    other = hasten.accelerate(pipe, hasten.Leap(guided), replace=True)
    assert run is not other
    hasten.remove(pipe)
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    with pytest.raises(ConfigError, match="give it alone"):
        hasten.accelerate(pipe, hasten.Leap(guided), "hicache")
    with pytest.raises(ConfigError, match="replaces the scheduler of a pipeline"):
        hasten.accelerate(pipe.transformer, hasten.Leap(guided))
    hasten.accelerate(pipe, hasten.Leap(guided))
    pipe.scheduler = mine = FlowMatchEulerDiscreteScheduler()
    hasten.remove(pipe)
    assert pipe.scheduler is mine  # somebody else's stays


@pytest.mark.parametrize("scale", [1.5, 2.0, 3.0, 4.0, 5.0])
def test_one_file_serves_a_range_of_guidance(guided, scale):
    """In a pipeline's call, which shows the scale; in a loop of one's own and without a hook, where it is told."""
    pipe, reference = Called(), reference_at(scale)
    with hasten.accelerate(pipe, hasten.Leap(guided)):
        shared = relative(pipe, None, 4, reference, guidance_scale=scale)
    plain = relative(pipe, None, 4, reference, guidance_scale=scale)
    assert shared < 0.02 * plain
    with hasten.accelerate(loop := Toy(), hasten.Leap(guided, guidance=scale)):
        assert relative(loop, None, 4, reference, guidance_scale=scale) == pytest.approx(shared, rel=1e-3)
    told = LeapScheduler.of(guided, pipe, guidance=scale)
    assert relative(pipe, told, 4, reference, guidance_scale=scale) < 0.5 * plain


@pytest.mark.parametrize("scale", [1.5, 2.0, 4.0, 5.0])
def test_a_range_is_as_near_as_a_fit_of_its_own(scale, monkeypatch):
    """At the ends, where the times of the middle do not suit, and between the scales, where nothing was fitted.

    Of the same starts: a range has none with more evaluations.
    """
    monkeypatch.setattr("hasten.fitting.leap.BOTH_WAYS", 99)
    calls, settings = [toy_call(i, **GUIDED) for i in range(4)], {"trials": 6, "rounds": 4}
    shared = fit_leap(Toy(), calls, [4], guidances=(1.5, 3.0, 5.0), **settings)
    call = {"guidance_scale": scale}
    own = fit_leap(Toy(), [toy_call(i, **call) for i in range(4)], [4], **settings)
    errors = []
    for fit in (shared, own):
        with hasten.accelerate(pipe := Called(), hasten.Leap(fit)):
            errors.append([relative(pipe, None, 4, reference_at(scale, seed=i), i, **call) for i in range(9, 15)])
    assert geometric_mean(errors[0]) < 1.1 * geometric_mean(errors[1])


def test_times_go_with_the_guidance_and_a_scale_that_does_not_show_is_asked_for(guided):
    pipe, taken = Called(), {}
    for scale in (1.5, 2.0, 5.0):
        with hasten.accelerate(pipe, hasten.Leap(guided)):
            pipe(**toy_call(9, guidance_scale=scale) | {"num_inference_steps": 4})
            taken[scale] = pipe.scheduler.timesteps
    assert not torch.allclose(taken[1.5], taken[5.0], rtol=1e-3)
    assert taken[1.5][0] == taken[2.0][0] == taken[5.0][0]  # all runs begin with the same noise
    with (
        hasten.accelerate(loop := Toy(), hasten.Leap(guided)),
        pytest.raises(ScheduleError, match="does not show its own"),
    ):
        loop(**toy_call(9, **GUIDED) | {"num_inference_steps": 4})


def test_passes_that_are_mixed_otherwise_than_the_call_says_are_refused(guided):
    """Times are chosen by the call's guidance before anything shows how the passes are mixed."""
    with hasten.accelerate(pipe := Toy(), hasten.Leap(guided, guidance=3.0)):
        pipe(**toy_call(9, guidance_scale=3.0) | {"num_inference_steps": 4})
        with pytest.raises(ScheduleError, match="said to have, but its passes are mixed for 2: name"):
            pipe(**toy_call(9, guidance_scale=2.0) | {"num_inference_steps": 4})


def test_a_call_that_shows_its_guidance_decides_without_a_hook_too(guided, tmp_path):
    """Whatever the scheduler was told, and after it was saved, copied and pickled."""
    pipe, reference = Called(), reference_at(1.5)
    plain = relative(pipe, LeapScheduler.of(guided, pipe, guidance=1.5), 4, reference, guidance_scale=1.5)
    LeapScheduler.of(guided, pipe, guidance=5.0).save_pretrained(tmp_path)
    told = LeapScheduler.from_pretrained(tmp_path)
    for scheduler in (LeapScheduler.of(guided, pipe), told, copy.deepcopy(told), pickle.loads(pickle.dumps(told))):
        assert relative(pipe, scheduler, 4, reference, guidance_scale=1.5) == pytest.approx(plain, rel=1e-4)


def test_a_little_outside_of_a_range_is_at_its_end(guided):
    pipe = Called()
    with hasten.accelerate(pipe, hasten.Leap(guided)):
        pipe(**toy_call(9, guidance_scale=1.4) | {"num_inference_steps": 4})
        taken = pipe.scheduler.timesteps
        pipe(**toy_call(9, guidance_scale=1.5) | {"num_inference_steps": 4})
        assert torch.equal(taken, pipe.scheduler.timesteps)
        with pytest.raises(ScheduleError, match=r"this run has 1\.3"):
            pipe(**toy_call(9, guidance_scale=1.3) | {"num_inference_steps": 4})


class Both(Called):
    """Guidance that does nothing, and true guidance by a negative prompt."""

    def __call__(
        self,
        generator=None,
        num_inference_steps=STEPS,
        guidance_scale=3.5,
        true_cfg_scale=1.0,
        negative_prompt=None,
        **_,
    ):
        return self.run(generator, num_inference_steps, true_cfg_scale if negative_prompt else None)


def test_guidance_that_does_nothing_or_cannot_be_read_is_told_from_what_counts():
    calls = [toy_call(0, guidance_scale=3.0, true_cfg_scale=4.0)]  # without a negative prompt, true guidance is none
    fit = fit_leap(Both(), calls, [3], trials=1, rounds=0)
    assert fit.options["guidance_argument"] == "guidance_scale"
    assert fit.options["guidances"] == [3.0]
    pipe, few = Both(), {"num_inference_steps": 3}
    pipe.scheduler = LeapScheduler.of(fit, pipe)
    for value in (3.0, np.float32(3.0), torch.tensor(3.0), np.array([3.0])):
        pipe(**toy_call(9, guidance_scale=value) | few)
    with pytest.raises(ScheduleError, match="this run has true guidance 4"):
        pipe(**toy_call(9, guidance_scale=3.0, true_cfg_scale=4.0, negative_prompt="x") | few)
    with pytest.raises(ScheduleError, match=r"guidance_scale of this call is \[3\.0\], and LEAP needs one number"):
        pipe(**toy_call(9, guidance_scale=[3.0]) | few)
    with pytest.raises(ConfigError, match="guidance_scale of the calls must be a number"):
        fit_leap(Both(), [toy_call(0, guidance_scale=[3.0])], [3])
    for calls in ([toy_call(0, true_cfg_scale=3.0)], [toy_call(0, guidance_scale=3.0)]):  # this one embeds nothing
        with pytest.raises(ConfigError, match="does nothing in these calls"):
            fit_leap(Both(), calls, [3], guidances=(2.0, 4.0), trials=1, rounds=0)


class Embedded(Called):
    """Takes its guidance into the denoiser, and has true guidance, unused, among its arguments."""

    def __call__(self, generator=None, num_inference_steps=STEPS, guidance_scale=3.5, true_cfg_scale=1.0, **_):
        self.transformer.field = lambda x, t: torch.sin(guidance_scale * x + t / 200) - 0.3 * x
        return self.run(generator, num_inference_steps)


@pytest.mark.parametrize("scale", [1.0, 2.0, 3.0])
def test_the_argument_that_a_fit_was_given_its_scales_by_is_the_one_that_counts(scale):
    """True guidance of 1 is within the range, and says nothing."""
    calls = [toy_call(i, guidance_scale=2.0, true_cfg_scale=1.0) for i in range(2)]
    fit = fit_leap(Embedded(), calls, [4], guidances=(1.0, 2.0, 3.0), trials=3, rounds=1)
    pipe = Embedded()
    (reference,) = pipe(**toy_call(9, guidance_scale=scale))
    own = relative(pipe, LeapScheduler.of(fit, pipe), 4, reference, guidance_scale=scale)
    with hasten.accelerate(pipe, hasten.Leap(fit)):
        assert relative(pipe, None, 4, reference, guidance_scale=scale) == pytest.approx(own, rel=1e-4)
    with hasten.accelerate(loop := Toy(), hasten.Leap(fit, guidance=scale)):
        loop.transformer.field = pipe.transformer.field
        assert relative(loop, None, 4, reference) == pytest.approx(own, rel=1e-4)


def test_levels_of_a_range_are_those_of_its_times_for_variance_preserving_models():
    """Between the scales as at them: what is noised to the level of a time has the noise that the model expects."""
    plain = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    calls = [toy_call(i, guidance_scale=3.0) for i in range(2)]
    fit = fit_leap(Toy(noise, plain), calls, [4], guidances=(1.5, 3.0, 8.0), trials=3, rounds=1)
    for scale in (1.5, 2.0, 5.5):
        scheduler = LeapScheduler.of(fit, guidance=scale)
        kept = plain.alphas_cumprod[scheduler.timesteps.round().long().clamp(0, 999)]
        noised = scheduler.add_noise(torch.zeros(4, 1), torch.ones(4, 1), scheduler.timesteps)
        assert noised[:, 0] == pytest.approx((1 - kept).sqrt(), abs=0.02)


def test_a_range_whose_plain_sampler_ends_at_time_0_is_saved_and_read(tmp_path):
    plain = DDIMScheduler(clip_sample=False)  # "leading" spacing
    calls = [toy_call(i, **GUIDED) for i in range(2)]
    fit = fit_leap(Toy(noise, plain), calls, [3], guidances=tuple(np.float32([2, 3, 4])), trials=3, rounds=1)
    read = Calibration.load(fit.save(tmp_path / "leap.safetensors"))
    assert torch.equal(LeapScheduler.of(read, guidance=2.5).timesteps, LeapScheduler.of(fit, guidance=2.5).timesteps)


def test_a_fixed_number_of_evaluations_serves_a_range(guided):
    pipe, reference = Called(), reference_at(2.0)
    own = relative(pipe, LeapScheduler.of(guided, pipe), 4, reference, guidance_scale=2.0)
    fixed = FixedLeap.make(hasten.Leap(guided), 4, Setting(FULL))
    assert relative(pipe, fixed, 50, reference, guidance_scale=2.0) == pytest.approx(own, rel=1e-4)
    told = FixedLeap.make(hasten.Leap(guided, guidance=2.0), 4, Setting(FULL))
    assert relative(Toy(), told, 50, reference, guidance_scale=2.0) == pytest.approx(own, rel=1e-4)


def test_interpolation_is_exact_for_quadratic_coefficients():
    scales = (1.5, 3.0, 5.0)
    fits = [[[1.0 + s, s * s]] for s in scales]
    assert interpolated(fits, Axis(scales), 2.2)[0] == pytest.approx([3.2, 2.2 * 2.2])
    assert interpolated(fits[:1], Axis((1.5,)), 2.2)[0] == fits[0][0]
    fits = [[[1.0 + math.log(s), math.log(s) ** 2]] for s in scales]
    found = interpolated(fits, Axis(scales, logarithmic=True), 2.2)[0]
    assert found == pytest.approx([1.0 + math.log(2.2), math.log(2.2) ** 2])


def test_a_file_says_over_what_it_is_interpolated():
    """Earlier files are read as they were made."""
    scales = [1.5, 6.0]
    given = {"tables": {"2": RANGE}, "guidances": scales, "mixtures": scales}
    for over, halfway in ((None, 3.75), ("logarithm", 3.0)):
        scheduler = LeapScheduler(**given, interpolated_over=over, guidance=halfway)
        assert scheduler.timesteps.tolist() == pytest.approx([1000.0, 400.0])  # 500 at one end, 300 at the other
        again = LeapScheduler.from_config(dict(scheduler.config))
        assert again.timesteps.tolist() == scheduler.timesteps.tolist()
    assert LeapScheduler(**given).config.digest == LeapScheduler(**given, interpolated_over=None).config.digest


def test_a_range_is_fitted_over_the_logarithm_where_there_is_one():
    settings = {"trials": 1, "rounds": 0}
    fit = fit_leap(Toy(), [toy_call(0, **GUIDED)], [3], guidances=(1.5, 6.0), **settings)
    assert fit.options["interpolated_over"] == "logarithm"
    ends = [LeapScheduler.of(fit, guidance=scale).timesteps for scale in (1.5, 6.0)]
    assert LeapScheduler.of(fit, guidance=3.0).timesteps.tolist() == pytest.approx((0.5 * sum(ends)).tolist())
    for scales in ((0.0, 3.0), ()):
        other = fit_leap(Toy(), [toy_call(0, **GUIDED)], [3], guidances=scales, **settings)
        assert "interpolated_over" not in other.options


def test_other_guidance_is_refused(guided):
    pipe = Called()
    with hasten.accelerate(pipe, hasten.Leap(guided)):
        for scale in (1.0, 7.0):
            with pytest.raises(ScheduleError, match=f"fitted for guidance 1.5 to 5, and this run has {scale:g}"):
                pipe(**toy_call(9, guidance_scale=scale) | {"num_inference_steps": 4})
        with pytest.raises(ScheduleError, match=r"does not show its own.*guidance=\.\.\."):
            pipe(**toy_call(9) | {"num_inference_steps": 4})
    one = pytest.raises(ScheduleError, match="two passes for each evaluation, and this run makes one")
    with hasten.accelerate(loop := Toy(), hasten.Leap(guided, guidance=3.0)), one:
        loop(**toy_call(9) | {"num_inference_steps": 4})
    loop.scheduler = LeapScheduler.of(guided, loop)
    with pytest.raises(ScheduleError, match=r"does not show its own.*guidance=\.\.\."):
        loop(**toy_call(9, **GUIDED) | {"num_inference_steps": 4})
    for make in (lambda: LeapScheduler.of(guided, pipe, guidance=7.0), lambda: hasten.Leap(guided, 7.0).scheduler()):
        with pytest.raises(ConfigError, match=r"fitted for, 1\.5 to 5, got 7"):
            make()


def test_a_file_with_the_same_times_at_all_scales_sees_the_scale_by_the_passes(guided):
    """As files have them that were fitted before times went with the scale."""
    tensors = {
        name: tensor for name, tensor in guided.tensors.items() if "by_scale" not in name and "noise" not in name
    }
    options = {name: value for name, value in guided.options.items() if name not in MORE}
    older = Calibration(guided.method, tensors, guided.fingerprint, guided.report, options)
    with hasten.accelerate(loop := Toy(), hasten.Leap(older)):
        for scale in (1.5, 4.0):
            loop(**toy_call(9, guidance_scale=scale) | {"num_inference_steps": 4})
        with pytest.raises(ScheduleError, match=r"guidance 1\.5 to 5, and this run has 7:"):
            loop(**toy_call(9, guidance_scale=7.0) | {"num_inference_steps": 4})
    loop.scheduler = LeapScheduler.of(older, loop)
    with pytest.raises(ScheduleError, match=r"does not show its own: name it.*guidance=\.\.\."):
        loop(**toy_call(9, **GUIDED) | {"num_inference_steps": 4})
    pipe, reference = Called(), reference_at(4.0)
    own, told = (relative(pipe, LeapScheduler.of(older, pipe, scale), 4, reference, **FOUR) for scale in (4.0, 1.5))
    assert own == told  # the call shows it


def test_schedulers_that_were_saved_before_fits_named_the_argument_are_read(tmp_path):
    """The digest is one that the code of then wrote."""
    config = {"_class_name": "LeapScheduler", "_diffusers_version": "0.36.0", "tables": {"2": TABLE}}
    config |= {"prediction_type": "flow_prediction", "num_train_timesteps": 1000, "shift_mu": None}
    config |= {"guidances": [None], "mixtures": [None], "guidance": None, "noise_scale": 1.0, "fingerprint": None}
    config |= {"certificate": None, "plain": None, "digest": SAVED}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    assert LeapScheduler.from_pretrained(tmp_path).timesteps.tolist() == TABLE["timesteps"]


def test_another_pipeline_with_the_same_denoiser_hands_nothing_over(guided):
    from hasten.solvers.passes import PassesHook

    seen = []
    hook = PassesHook(Toy(), seen.append)
    answer = hook.call(None, lambda x: (x,), (torch.ones(1),), {})
    assert len(seen) == 1
    assert seen[0] is not answer[0]  # what is kept cannot be written into


# --- on a pipeline of diffusers


def euler_tables(scheduler):
    """Tables with the plain sampler's own coefficients."""
    moves = [float(b - a) for a, b in pairwise(scheduler.sigmas)]
    rows = [[1.0, *moves[: k + 1]] for k in range(len(moves))]
    times = {"timesteps": scheduler.timesteps.tolist(), "levels": scheduler.sigmas[:-1].tolist()}
    return {str(len(rows)): {**times, "guided": [rows]}}


@pytest.mark.parametrize(
    "guidance", [{}, {"true_cfg_scale": 3.0, "negative_prompt": "banana"}], ids=["plain", "guided"]
)
def test_all_steps_with_eulers_coefficients_are_bit_identical(guidance):
    pipe = make_pipe()
    plain = draw(pipe, 12, **guidance)
    pipe.scheduler = LeapScheduler(euler_tables(pipe.scheduler))
    assert torch.equal(draw(pipe, 12, **guidance), plain)
    assert torch.equal(draw(pipe, 12, **guidance), plain)  # and a second run begins anew


def call(*seeds, **more):
    return {
        "prompt": ["red apple"] * len(seeds),
        "height": 32,
        "width": 32,
        "max_sequence_length": 8,
        "num_inference_steps": 12,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        **more,
    }


@pytest.fixture(scope="module")
def fitted():
    return fit_leap(make_pipe(), [call(0, 1), call(2, 3)], [3, 5], trials=8, rounds=1)


def test_a_removed_handle_lets_go_of_model_and_pipeline(fitted):
    pipe = make_pipe()
    run = hasten.accelerate(pipe, hasten.Leap(fitted))
    draw(pipe, 3)
    gone = [weakref.ref(pipe), weakref.ref(pipe.transformer)]
    run.remove()
    run.remove()
    del pipe
    gc.collect()
    assert [ref() for ref in gone] == [None] * 2
    assert run.summary().steps == 3


def norm_error(pipe, scheduler, steps, reference, **more):
    original, pipe.scheduler = pipe.scheduler, scheduler
    try:
        result = draw(pipe, steps, prompt=["red apple"] * 2, generator=call(7, 8)["generator"], **more)
    finally:
        pipe.scheduler = original
    return float((result - reference).norm() / reference.norm())


def test_a_fit_beats_the_plain_sampler_on_other_seeds(fitted):
    pipe = make_pipe()
    reference = draw(pipe, 12, prompt=["red apple"] * 2, generator=call(7, 8)["generator"])
    for count in (3, 5):
        leap = norm_error(pipe, LeapScheduler.of(fitted, pipe), count, reference)
        plain = norm_error(pipe, pipe.scheduler, count, reference)
        assert leap < 0.6 * plain
    assert torch.equal(draw(pipe, 12), draw(make_pipe(), 12))  # fitting and drawing left the pipeline as it was


def test_true_guidance_of_a_pipeline_is_seen_and_learned():
    pipe = make_pipe()
    guidance = {"true_cfg_scale": 3.0, "negative_prompt": ["banana"] * 2}
    own = fit_leap(pipe, [call(0, 1, **guidance), call(2, 3, **guidance)], [4], trials=6, rounds=1)
    assert own.options["mixtures"] == pytest.approx([3.0], rel=1e-4)
    assert own.options["guidances"] == [3.0]
    reference = draw(pipe, 12, prompt=["red apple"] * 2, generator=call(7, 8)["generator"], **guidance)
    plain = norm_error(pipe, pipe.scheduler, 4, reference, **guidance)
    with hasten.accelerate(pipe, hasten.Leap(own)):
        assert norm_error(pipe, pipe.scheduler, 4, reference, **guidance) < 0.6 * plain
        right = draw(pipe, 4, **guidance | {"negative_prompt": "banana"})
        asked = asking(pipe, lambda: draw(pipe, 4, **guidance | {"negative_prompt": "banana"}))
        assert torch.equal(draw(pipe, 4, **guidance | {"negative_prompt": "banana"}, callback_on_step_end=asked), right)


def test_half_precision_is_near_to_single(fitted):
    pipe = make_pipe()
    pipe.scheduler = LeapScheduler.of(fitted)
    single = draw(pipe, 5)
    pipe.to(torch.bfloat16)
    half = draw(pipe, 5).float()
    assert (half - single).norm() < 0.05 * single.norm()


@pytest.mark.parametrize("kind", ["flow_prediction", "epsilon", "v_prediction"])
def test_half_precision_is_float32_rounded_once_per_step(kind):
    """Large coefficients that nearly cancel, as fits have them."""
    rows = [[1.1, -30.0], [0.9, 70.0, -100.3], [0.5, -55.0, 77.7, -23.1]]
    table = {"timesteps": [900.0, 600.0, 300.0], "levels": [0.95, 0.8, 0.4], "guided": [rows]}
    half, single = (LeapScheduler({"3": table}, prediction_type=kind) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(1, 4, 8, 8, generator=generator).bfloat16()
    for scheduler in (half, single):
        scheduler.set_timesteps(3)
    for t in half.timesteps:
        output = torch.randn(1, 4, 8, 8, generator=generator).bfloat16()
        (expected,) = single.step(output.float(), t, state.float(), return_dict=False)
        (state,) = half.step(output, t, state, return_dict=False)
        assert state.dtype == torch.bfloat16
        assert torch.equal(state, expected.bfloat16())


# --- image to image


def test_noise_is_mixed_at_the_levels_of_the_times():
    scheduler = LeapScheduler({"2": TABLE})
    image, noisy = torch.full((1, 4, 8, 8), 3.0), torch.randn(1, 4, 8, 8)
    assert torch.equal(scheduler.scale_noise(image, torch.tensor([1000.0]), noisy), noisy)
    assert torch.allclose(scheduler.scale_noise(image, torch.tensor([500.0]), noisy), (image + noisy) / 2)
    preserving = LeapScheduler({"2": TABLE}, prediction_type="epsilon")
    mixed = preserving.add_noise(image, noisy, torch.tensor([500.0]))
    assert torch.allclose(mixed, 0.75**0.5 * image + 0.5 * noisy)


def test_a_run_that_is_said_to_begin_at_the_first_evaluation_does(fitted):
    """Whatever its timestep is nearest to: in half precision that of a neighbour."""
    table = {**TABLE, "timesteps": [1000.0, 999.0]}
    scheduler = LeapScheduler({"2": table})
    scheduler.set_timesteps(2)
    scheduler.set_begin_index(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", HastenWarning)
        scheduler.step(torch.ones(1, 2), 999.0, torch.ones(1, 2))
    assert scheduler.step_index == 1


@pytest.mark.parametrize("strength", [0.4, 0.6, 1.0])
def test_image_to_image_starts_later_and_says_so(fitted, strength):
    """A run that starts later says so, with a remedy, and ends finite; a whole one is nearer than the plain sampler."""
    pipe = make_pipe()
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    both = FluxImg2ImgPipeline(**pipe.components)
    both.set_progress_bar_config(disable=True)
    arguments = {"image": image, "height": 32, "width": 32, "max_sequence_length": 8, "output_type": "latent"}

    def run(scheduler, steps):
        both.scheduler, generator = scheduler, torch.Generator().manual_seed(0)
        return both("red apple", num_inference_steps=steps, strength=strength, generator=generator, **arguments).images

    plain = pipe.scheduler
    reference, euler = run(plain, 60), run(plain, 5)
    scheduler = LeapScheduler.of(fitted)
    if strength < 1:
        with pytest.warns(HastenWarning, match=r"starts at evaluation \d of 5.*DPM-Solver.*call hasten.remove"):
            leap = run(scheduler, 5)
    else:
        leap = run(scheduler, 5)
    assert torch.isfinite(leap).all()
    if strength == 1:
        assert (leap - reference).norm() < (euler - reference).norm()


# --- files, and whose they are


def test_a_saved_file_draws_the_same(fitted, tmp_path):
    pipe = make_pipe()
    path = fitted.save(tmp_path / "leap.safetensors")
    pipe.scheduler = LeapScheduler.of(fitted)
    image = draw(pipe, 5)
    pipe.scheduler = LeapScheduler.load(path, pipe)
    assert torch.equal(draw(pipe, 5), image)
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    pipe.scheduler = LeapScheduler.from_pretrained(tmp_path / "scheduler")
    assert torch.equal(draw(pipe, 5), image)
    assert torch.equal(draw(pipe, 5), image)


def test_a_mismatch_is_refused_on_every_way_in(fitted, tmp_path):
    other = make_pipe(5)
    path = fitted.save(tmp_path / "leap.safetensors")
    LeapScheduler.of(fitted).save_pretrained(tmp_path / "scheduler")
    for enter in (
        lambda: LeapScheduler.of(fitted, other),
        lambda: LeapScheduler.load(path, other),
        lambda: hasten.accelerate(other, hasten.Leap(str(path))),
        lambda: hasten.accelerate(other, "leap", calibration=str(path)),
        lambda: hasten.from_hub(str(tmp_path / "scheduler"), other),
    ):
        with pytest.raises(CalibrationError, match="other weights"):
            enter()
    assert not hooks_on(other.transformer)
    other.scheduler = LeapScheduler.from_pretrained(tmp_path / "scheduler")
    with pytest.raises(CalibrationError, match="other weights"):
        draw(other, 5)
    pipe = make_pipe()
    pipe.scheduler = hasten.from_hub(str(tmp_path / "scheduler"), pipe)
    draw(pipe, 5)


def test_it_goes_to_the_hub_and_comes_back(fitted, tmp_path, monkeypatch):
    from shutil import copytree
    from types import SimpleNamespace

    from diffusers.utils import hub_utils

    def upload(*_, folder_path, **__):
        copytree(folder_path, tmp_path / "repository")

    monkeypatch.setattr(hub_utils, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="owner/leap"))
    monkeypatch.setattr(hub_utils, "upload_folder", upload)
    monkeypatch.setattr(hub_utils, "load_or_create_model_card", lambda *_, **__: None)
    monkeypatch.setattr(hub_utils, "populate_model_card", lambda *_, **__: SimpleNamespace(save=lambda _: None))
    pipe = make_pipe()
    scheduler = LeapScheduler.of(fitted, pipe)
    scheduler.push_to_hub("owner/leap")
    back = hasten.from_hub(tmp_path / "repository", pipe)
    for name in ("tables", "fingerprint", "certificate", "digest"):
        assert back.config[name] == scheduler.config[name]


def test_another_number_and_another_size(fitted, tmp_path):
    pipe = make_pipe()
    pipe.scheduler = LeapScheduler.of(fitted, pipe)
    with pytest.raises(ScheduleError, match="fitted for 3, 5 evaluations, not for 9"):
        draw(pipe, 9)
    with pytest.warns(HastenWarning, match="another image size"):
        draw(pipe, 5, height=64, width=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", HastenWarning)
        draw(pipe, 5)
    path = fitted.save(tmp_path / "leap.safetensors")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CalibrationError, match="cut off"):
        LeapScheduler.load(path)


@pytest.mark.parametrize("way", ["as it is", "saved"])
def test_the_plain_schedule_comes_back_from_its_configuration(fitted, tmp_path, way):
    pipe = make_pipe()
    plain, own = draw(pipe, 12), pipe.scheduler
    leap = LeapScheduler.of(fitted, pipe)
    if way == "saved":
        leap.save_pretrained(tmp_path)
        leap = LeapScheduler.from_pretrained(tmp_path)
    for name in ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"):
        assert leap.config[name] == own.config[name]  # pipelines compute their shift from these
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(leap.config)
    assert torch.equal(draw(pipe, 12), plain)


def test_the_configuration_of_a_variance_preserving_scheduler_comes_back_too():
    scheduler = UniPCMultistepScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing")
    fit = fit_leap(Toy(noise, scheduler), [toy_call()], [4], trials=1, rounds=0)
    again = UniPCMultistepScheduler.from_config(LeapScheduler.of(fit).config)
    for one in (scheduler, again):
        one.set_timesteps(7)
    assert torch.equal(again.timesteps, scheduler.timesteps)
    assert torch.equal(again.sigmas, scheduler.sigmas)


def test_a_changed_file_is_refused(fitted, tmp_path):
    LeapScheduler.of(fitted).save_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    content = json.loads(file.read_text())
    for change in (
        lambda c: c["tables"]["3"]["guided"][0][0].__setitem__(0, 2.0),
        lambda c: c["fingerprint"].__setitem__("weights", "0" * 16),
        lambda c: c.__setitem__("certificate", {"psnr": 99.0}),
    ):
        damaged = copy.deepcopy(content)
        change(damaged)
        file.write_text(json.dumps(damaged))
        with pytest.raises(ConfigError, match="damaged or changed"):
            LeapScheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tables": None}, "needs tables"),
        ({"tables": {"3": TABLE}}, "3 times"),
        ({"tables": {"2": TABLE | {"timesteps": [500.0, 1000.0]}}}, "does not decrease"),
        ({"tables": {"2": TABLE | {"timesteps": [500.0, float("nan")]}}}, "finite"),
        ({"tables": {"2": TABLE | {"levels": [1.5, 0.5]}}}, "within the run"),
        ({"tables": {"2": TABLE | {"guided": [[[1.0, 1.0], [1.0, 1.0]]]}}}, "2 rows that grow by 1"),
        ({"tables": {"2": TABLE | {"passes": [[[1.0, 1.0], [1.0, 1.0, 1.0]]]}}}, "2 rows that grow by 2"),
        ({"tables": {"2": TABLE}, "guidances": [1.5, 3.0], "mixtures": [1.5, 3.0]}, "1 fits for 2"),
        ({"tables": {"2": RANGE | {"noise_levels": None}}, **SCALES}, "without levels"),
        ({"tables": {"2": RANGE | {"noise_levels": [0.0]}}, **SCALES}, "without levels"),
        ({"tables": {"2": RANGE | {"noise_levels": [0.0, 2.0]}}, **SCALES}, "rise within 0 and 1"),
        ({"tables": {"2": RANGE | {"noise_timesteps": [9.0, 0.0]}}, **SCALES}, "does not increase"),
        ({"tables": {"2": RANGE | {"timesteps_by_scale": [[1000.0, 500.0]]}}, **SCALES}, "2 times for each scale"),
        ({"tables": {"2": RANGE | {"timesteps_by_scale": [[1000.0, 500.0], [1000.0]]}}, **SCALES}, "for each scale"),
        ({"tables": {"2": RANGE | {"timesteps_by_scale": [[1000.0, 500.0], [999.0, 300.0]]}}, **SCALES}, "go together"),
        ({"tables": {"2": RANGE | {"timesteps": [1000.0, 400.0]}}, **SCALES}, "go together"),
        ({"tables": {"2": TABLE | NOISE | {"timesteps_by_scale": [[1000.0, 500.0]]}}}, "for each scale"),
        ({"tables": {"2": CROSSING}, "guidances": [1.0, 2.0, 5.0], "mixtures": [1.0, 2.0, 5.0]}, "does not decrease"),
        ({"tables": {"2": RANGE}, **SCALES, "interpolated_over": "scale"}, "logarithm"),
        ({"tables": {"2": RANGE}, **LOGARITHM, "guidances": [0.0, 3.0]}, "positive"),
        (
            {"tables": {"2": TABLE | {"guided": RANGE["guided"]}}, **SCALES, "interpolated_over": "logarithm"},
            "by scale",
        ),
        ({"tables": {"2": RANGE}, **LOGARITHM, "guidances": [3.0, math.nextafter(3.0, 4.0)]}, "same guidance"),
        ({"tables": {"2": TABLE}, "prediction_type": "sample"}, "epsilon"),
        ({"tables": {"2": TABLE}, "noise_scale": 0.0}, "positive"),
    ],
)
def test_bad_tables_are_refused(change, says):
    with pytest.raises(ConfigError, match=says):
        LeapScheduler(**change)


def test_a_calibration_that_is_no_table_is_refused(fitted):
    tensors = dict(fitted.tensors)
    tensors["3/guided"] = tensors["3/guided"].clone()
    tensors["3/guided"][0, 0, 3] = 1.0
    with pytest.raises(CalibrationError, match="makes use of later evaluations"):
        Calibration.of("leap", Calibration("leap", tensors, fitted.fingerprint, fitted.report, fitted.options))


def test_with_all_steps_it_is_the_plain_sampler_to_the_pipeline(fitted):
    assert fitted.report["5"]["formula_error"] < 1e-5
    assert STEPS > 5
