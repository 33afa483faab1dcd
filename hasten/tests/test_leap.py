"""LEAP: the closed form, the search of times, and the scheduler on pipelines."""

import warnings
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from pipelines import draw, make_pipe

from hasten.caching.schedule import spread
from hasten.calibration import Calibration
from hasten.errors import CalibrationError, ConfigError, HastenWarning, ScheduleError
from hasten.fitting.leap import fit_leap
from hasten.fitting.leap_fitter import STARTS, Fitter
from hasten.fitting.references import record_references
from hasten.fitting.refine import refine
from hasten.pipeline.replay import Replay
from hasten.solvers import LeapScheduler
from hasten.solvers.multistep import NormalEquations, advance

STEPS = 20


class Toy:
    """The smallest pipeline: a velocity field in the place of the transformer, an unmodified scheduler."""

    def __init__(self, field, scheduler=None):
        self.field, self.transformer = field, torch.nn.Identity()  # asked for a fingerprint only
        self.scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0)

    def __call__(self, latents=None, generator=None, num_inference_steps=STEPS, output_type="latent"):
        if latents is None:
            latents = torch.randn(4, 16, generator=generator, dtype=torch.float32)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            latents = self.scheduler.step(self.field(latents, float(t)), t, latents, return_dict=False)[0]
        return (latents,)


def toy_call(seed=0):
    return {"generator": torch.Generator().manual_seed(seed), "num_inference_steps": STEPS}


def curved(x, t):
    """A field that bends with time and depends on the state."""
    return torch.sin(x + t / 200) - 0.3 * x + t / 1000


def fitter(pipe, calls, ridge=0.0):
    replay = Replay(calls)
    return Fitter(pipe, replay, record_references(pipe, replay), ridge)


def error(pipe, calls, steps, ridge=0.0):
    own = fitter(pipe, calls, ridge)
    with own.probing():
        return own.fit(steps).error


# --- the closed form


def test_normal_equations_agree_with_least_squares():
    generator = torch.Generator().manual_seed(0)
    batches = [[torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(5)] for _ in range(3)]
    equations = NormalEquations(3)
    for start, goal, *velocities in batches:
        equations.add(start, velocities, goal)
    left = torch.cat([torch.stack([v.flatten() for v in velocities], 1) for _, _, *velocities in batches]).double()
    right = torch.cat([(goal - start).flatten() for start, goal, *_ in batches]).double()
    expected = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
    assert equations.solve([0.0] * 3, 0.0) == pytest.approx(expected.tolist(), rel=1e-9)


def test_a_large_ridge_is_the_prior_and_the_order_of_a_batch_does_not_matter():
    generator = torch.Generator().manual_seed(1)
    start, goal, *velocities = [torch.randn(6, 9, generator=generator) for _ in range(5)]
    plain, turned = NormalEquations(3), NormalEquations(3)
    plain.add(start, velocities, goal)
    order = torch.randperm(6, generator=generator)
    turned.add(start[order], [v[order] for v in velocities], goal[order])
    assert plain.solve([0, 0, 0], 1e-6) == pytest.approx(turned.solve([0, 0, 0], 1e-6))
    assert plain.solve([1.0, -2.0, 0.5], 1e12) == pytest.approx([1.0, -2.0, 0.5], abs=1e-6)


def test_advancing_is_the_formula_and_keeps_what_others_did():
    x0, v0, v1 = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)
    x1 = advance(x0, [v0], [0.5], [])
    assert x1 == 1 + 0.5 * 2
    assert advance(x1, [v0, v1], [0.2, 0.7], [0.5]) == x0 + 0.2 * v0 + 0.7 * v1
    assert advance(x1 + 10, [v0, v1], [0.2, 0.7], [0.5]) == x0 + 10 + 0.2 * v0 + 0.7 * v1
    assert advance(x1, [None, v1], [0.2, 0.7], [0.5]) == x1 + (0.7 - 0.3) * v1  # a later start: the share is passed on


# --- fits on fields that are known


def test_a_constant_velocity_is_exact_with_one_evaluation():
    pull = torch.randn(16, generator=torch.Generator().manual_seed(3))
    assert error(Toy(lambda x, t: pull.expand_as(x)), [toy_call()], (0,)) < 1e-12


def test_a_velocity_linear_in_sigma_is_exact_with_two_evaluations():
    a, b = torch.randn(2, 16, generator=torch.Generator().manual_seed(3))
    pipe = Toy(lambda x, t: (a + b * t / 1000).expand_as(x))
    assert error(pipe, [toy_call()], (0, 9)) < 1e-12
    assert error(pipe, [toy_call()], (0,)) > 1e-6


def test_each_evaluation_is_brought_to_the_references_state_at_its_own_step():
    own = fitter(Toy(curved), [toy_call(0), toy_call(1)])
    steps = (0, 4, 9, 15)
    with own.probing():
        leap = own.fit(steps)
    for path, velocities in zip(own.references.states, leap.velocities, strict=True):
        for k, goal in enumerate(steps[1:]):
            reached = advance(path[0], velocities[: k + 1], leap.coefficients[k], ())
            assert (reached - path[goal]).norm() < 0.5 * (reached - path[-1]).norm()


@pytest.mark.parametrize("steps", [(0, 10), (0, 5, 12), (0, 3, 8, 15)])
def test_the_fit_is_no_worse_than_euler_on_its_batch(steps):
    pipe, calls = Toy(curved), [toy_call(0), toy_call(1)]
    references = record_references(pipe, Replay(calls))
    states = torch.cat([s[0] for s in references.states])
    for k, step in enumerate(steps):
        goal = (*steps[1:], STEPS)[k]
        states = states + (references.sigmas[goal] - references.sigmas[step]) * curved(
            states, references.timesteps[step]
        )
    truth = torch.cat([s[-1] for s in references.states])
    euler = float((states - truth).square().sum() / truth.square().sum())
    assert error(pipe, calls, steps) < euler


def test_more_evaluations_are_no_worse():
    nested = [(0,), (0, 10), (0, 5, 10), (0, 5, 10, 15), (0, 3, 5, 10, 15, 18)]
    errors = [error(Toy(curved), [toy_call()], steps) for steps in nested]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * errors[1]


def test_all_steps_with_the_samplers_coefficients_are_the_sampler():
    found = fitter(Toy(curved), [toy_call()], ridge=1e6)
    with found.probing():
        every = found.fit(tuple(range(STEPS)))
    assert every.error < 1e-10


def test_evaluations_that_two_lists_share_are_made_once():
    own = fitter(Toy(curved), [toy_call()])
    with own.probing():
        own.loss((0, 5, 10, 15))
        assert own.evaluations == 4 * 4  # four images
        again = own.fit((0, 5, 10, 16))
        assert own.evaluations == 5 * 4
    fresh = fitter(Toy(curved), [toy_call()])
    with fresh.probing():
        assert fresh.fit((0, 5, 10, 16)).error == pytest.approx(again.error, rel=1e-9)


def test_the_search_improves_on_the_spread():
    pipe, calls = Toy(curved), [toy_call(0), toy_call(1)]
    one = fit_leap_toy(pipe, calls, trials=1)
    many = fit_leap_toy(pipe, calls, trials=40)
    assert many < one


def test_a_search_starts_from_the_best_of_its_spreads():
    own = fitter(Toy(curved), [toy_call(0), toy_call(1)])
    with own.probing():
        losses = [own.fit(spread(4, STEPS, power)).error for power in STARTS]
        found = own.search(4, 8, 0, None)[1]
    assert max(losses) > 1.05 * min(losses)
    assert found.start_loss == pytest.approx(min(losses))


def fit_leap_toy(pipe, calls, trials):
    own = fitter(pipe, calls)
    with own.probing():
        return own.search(4, trials, 0, None)[0].error


# --- the joint refinement


def test_a_damped_step_is_least_squares_at_no_damping_and_nothing_at_much():
    generator = torch.Generator().manual_seed(2)
    start, goal, *columns = [torch.randn(40, generator=generator, dtype=torch.float64) for _ in range(5)]
    equations = NormalEquations(3)
    equations.add(start, columns, goal)
    expected = torch.linalg.lstsq(torch.stack(columns, 1), (goal - start)[:, None]).solution[:, 0]
    assert equations.damped(1e-12) == pytest.approx(expected.tolist(), rel=1e-6)
    assert equations.damped(1e9) == pytest.approx([0, 0, 0], abs=1e-6)


def test_damping_does_not_mind_the_unit_of_a_parameter():
    """Times are counted up to 1000 and coefficients are about 1."""
    generator = torch.Generator().manual_seed(2)
    start, goal, *columns = [torch.randn(40, generator=generator, dtype=torch.float64) for _ in range(4)]
    one, other = NormalEquations(2), NormalEquations(2)
    one.add(start, columns, goal)
    other.add(start, [1000 * columns[0], columns[1]], goal)
    (a, b), (c, d) = one.damped(0.1), other.damped(0.1)
    assert (1000 * c, d) == pytest.approx((a, b), rel=1e-6)


def test_refinement_lowers_the_error_and_moves_the_times_between_the_steps():
    own = fitter(Toy(curved), [toy_call(0), toy_call(1)], ridge=1e-9)
    seen = []
    with own.probing():
        closed = own.fit((0, 6, 12, 17))
        better = refine(own, closed, 3, seen.append)
    assert better.error < 0.5 * closed.error
    assert seen == sorted(seen, reverse=True)
    assert better.timesteps[0] == closed.timesteps[0]
    assert all(a > b > 0 for a, b in pairwise(better.timesteps))
    assert any(t not in own.references.timesteps for t in better.timesteps[1:])
    assert better.sigmas == pytest.approx([t / 1000 for t in better.timesteps], rel=1e-5)
    held_out = fitter(Toy(curved), [toy_call(7)])
    with held_out.probing():
        before = final_error(held_out, closed)
        assert final_error(held_out, better) < before


@pytest.mark.parametrize(("wild", "share"), [(False, 1e-3), (True, 0.5)])
def test_round_after_round_lowers_the_error_and_none_raises_it(wild, share):
    """By orders of magnitude where the field is smooth; where it is not, steps that go too far are not taken."""
    field = (lambda x, t: torch.sin(6 * x + t / 50) - 0.3 * x) if wild else curved
    own = fitter(Toy(field), [toy_call(0), toy_call(1)], ridge=1e-9)
    seen = []
    with own.probing():
        closed = own.fit((0, 6, 12, 17))
        better = refine(own, closed, 8, seen.append)
    assert seen == sorted(seen, reverse=True)
    assert better.error < share * closed.error


def final_error(own, leap):
    """The error of a solver on other references, with its own last row."""
    (velocities,) = [own.follow(0, leap.timesteps, leap.sigmas, leap.coefficients, ())]
    (path,) = own.references.states
    return float((advance(path[0], velocities, leap.coefficients[-1], ()) - path[-1]).square().sum())


def test_the_columns_of_the_refinement_are_derivatives():
    """On a linear field the final state is a polynomial in the parameters; differences of another size agree."""
    from hasten.fitting.refine import _Columns

    own = fitter(Toy(lambda x, t: 0.5 * x + t / 1000), [toy_call()], ridge=1e-9)
    with own.probing():
        leap = own.fit((0, 8, 14))
        columns = _Columns(own, leap, 0)
        for k, j in ((0, 0), (1, 0), (1, 1), (2, 1)):
            rows = [list(row) for row in leap.coefficients]
            rows[k][j] += 0.05
            velocities = own.follow(0, leap.timesteps, leap.sigmas, rows, ())
            moved = advance(own.references.states[0][0], velocities, rows[-1], ())
            assert torch.allclose((moved - columns.final) / 0.05, columns.coefficient(k, j), atol=2e-3)
        times = [*leap.timesteps[:2], leap.timesteps[2] + 5]
        velocities = own.follow(0, times, leap.sigmas, leap.coefficients, ())
        moved = advance(own.references.states[0][0], velocities, leap.coefficients[-1], ())
        assert torch.allclose((moved - columns.final) / 5, columns.time(2), atol=1e-4)


def test_a_variance_preserving_model_keeps_its_times():
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)
    own = fitter(Toy(lambda x, t: torch.tanh(x) * (0.5 + t / 2000), scheduler), [toy_call()], ridge=1e-9)
    with own.probing():
        closed = own.fit((0, 6, 12, 17))
        better = refine(own, closed, 2)
    assert better.timesteps == closed.timesteps
    assert better.error < closed.error


# --- a fit that is cut short


def test_a_fit_goes_on_where_it_was_cut_short():
    pipe, kept = make_pipe(), []
    options = {"trials": 2, "rounds": 0}
    fit_leap(pipe, [call(0)], [3, 4], keep=kept.append, **options)
    assert [sorted(result.report) for result in kept] == [["3"], ["3", "4"]]
    seen = []
    again = fit_leap(pipe, [call(0)], [3, 4], known=kept[0], progress=lambda *p: seen.append(p[0]), **options)
    assert set(seen) == {0, 4}  # the references, and what was not fitted yet
    assert torch.equal(again.tensors["3/coefficients"], kept[0].tensors["3/coefficients"])
    for other, settings in (([call(1)], options), ([call(0)], options | {"trials": 3})):
        afresh = fit_leap(pipe, other, [4], known=kept[0], **settings)
        assert sorted(afresh.report) == ["4"]


def test_the_same_calls_can_be_fitted_twice():
    pipe, calls = make_pipe(), [call(0)]
    first, second = (fit_leap(pipe, calls, [3], trials=1, rounds=1) for _ in range(2))
    assert torch.equal(first.tensors["3/coefficients"], second.tensors["3/coefficients"])


# --- the scheduler on pipelines


def euler_tables(scheduler):
    """Tables with the plain sampler's own coefficients."""
    sigmas = scheduler.sigmas
    moves = [float(b - a) for a, b in pairwise(sigmas)]
    rows = [moves[: k + 1] for k in range(len(moves))]
    return {
        str(len(rows)): {
            "timesteps": scheduler.timesteps.tolist(),
            "sigmas": sigmas[:-1].tolist(),
            "coefficients": rows,
        }
    }


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
    pipe = make_pipe()
    return fit_leap(pipe, [call(0, 1), call(2, 3)], [3, 5], trials=10)


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


def test_guidance_is_learned_with_the_pipelines_own(fitted):
    pipe = make_pipe()
    guided = {"true_cfg_scale": 3.0, "negative_prompt": ["banana"] * 2}
    own = fit_leap(pipe, [call(0, 1, **guided), call(2, 3, **guided)], [4], trials=6)
    reference = draw(pipe, 12, prompt=["red apple"] * 2, generator=call(7, 8)["generator"], **guided)
    assert own.fingerprint.passes == ("cond", "uncond")
    assert norm_error(pipe, LeapScheduler.of(own), 4, reference, **guided) < 0.8 * norm_error(
        pipe, pipe.scheduler, 4, reference, **guided
    )


def test_a_saved_file_draws_the_same(fitted, tmp_path):
    pipe = make_pipe()
    path = fitted.save(tmp_path / "leap.safetensors")
    pipe.scheduler = LeapScheduler.of(fitted)
    image = draw(pipe, 5)
    pipe.scheduler = LeapScheduler.load(path, pipe)
    assert torch.equal(draw(pipe, 5), image)
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    pipe.scheduler = LeapScheduler.from_pretrained(tmp_path / "scheduler")
    assert torch.allclose(draw(pipe, 5), image, atol=1e-6)


def test_another_model_another_number_and_another_size(fitted, tmp_path):
    with pytest.raises(CalibrationError, match="other weights"):
        LeapScheduler.of(fitted, make_pipe(5))
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
    with pytest.raises(CalibrationError, match="not of 'leap'"):
        LeapScheduler.of(Calibration.of("leap", Calibration("l2p", {}, fitted.fingerprint)))


def test_at_the_first_time_noise_is_all_that_an_image_starts_with():
    table = {"timesteps": [1000.0, 500.0], "sigmas": [1.0, 0.5], "coefficients": [[-0.5], [-0.5, -0.5]]}
    scheduler = LeapScheduler({"2": table})
    image, noise = torch.full((1, 4, 8, 8), 3.0), torch.randn(1, 4, 8, 8)
    assert torch.equal(scheduler.scale_noise(image, torch.tensor([1000.0]), noise), noise)
    halfway = scheduler.scale_noise(image, torch.tensor([500.0]), noise)
    assert torch.allclose(halfway, (image + noise) / 2)


def test_a_later_start_uses_the_later_rows():
    """A model without memory of where it began: from the middle on, the second row is a step of its own length."""
    table = {"timesteps": [1000.0, 500.0], "sigmas": [1.0, 0.5], "coefficients": [[-0.5], [-0.5, -0.5]]}
    scheduler = LeapScheduler({"2": table})
    scheduler.set_timesteps(2)
    scheduler.set_begin_index(1)
    image, noise = torch.full((1, 4, 8, 8), 3.0), torch.randn(1, 4, 8, 8)
    state = scheduler.scale_noise(image, torch.tensor([500.0]), noise)
    (end,) = scheduler.step(noise - image, scheduler.timesteps[1], state, return_dict=False)
    assert torch.allclose(end, image, atol=1e-5)
    assert scheduler.step_index == 2


def test_image_to_image_starts_later(fitted):
    from diffusers import FluxImg2ImgPipeline

    pipe = make_pipe()
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    both = FluxImg2ImgPipeline(**pipe.components)
    both.set_progress_bar_config(disable=True)
    both.scheduler = LeapScheduler.of(fitted)
    arguments = {"image": image, "height": 32, "width": 32, "max_sequence_length": 8, "output_type": "latent"}
    seen = []
    pipe.transformer.register_forward_hook(lambda *_: seen.append(1))
    result = both(
        "red apple", num_inference_steps=5, strength=0.6, generator=torch.Generator().manual_seed(0), **arguments
    )
    assert len(seen) == 3
    assert torch.isfinite(result.images).all()


def test_variance_preserving_models():
    """Epsilon prediction with DDIM: the plain sampler is linear in x / alpha, and so is the fit."""
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )

    def epsilon(x, t):
        return torch.tanh(x) * (0.5 + t / 2000)

    pipe = Toy(epsilon, scheduler)
    own = fitter(pipe, [toy_call()], ridge=1e6)
    with own.probing():
        assert own.fit(tuple(range(STEPS))).error < 1e-6
    free = fitter(pipe, [toy_call()])
    with free.probing():
        leap, _ = free.search(5, 20, 0, None)
    references = record_references(pipe, Replay([toy_call(9)]))
    options = {"prediction_type": "epsilon", "num_train_timesteps": 1000, "shift_mu": None}
    table = {
        "timesteps": [references.timesteps[s] for s in leap.steps],
        "sigmas": [references.sigmas[s] for s in leap.steps],
        "coefficients": leap.coefficients,
    }
    truth = references.states[0][-1]
    (plain,) = Toy(epsilon, scheduler)(**{**toy_call(9), "num_inference_steps": 5})
    (fast,) = Toy(epsilon, LeapScheduler({"5": table}, **options))(**{**toy_call(9), "num_inference_steps": 5})
    assert (fast - truth).norm() < 0.5 * (plain - truth).norm()


def variance_preserving(prediction_type):
    """The same denoiser and plain sampler, with the noise or the velocity for the model's answer."""
    scheduler = DDIMScheduler(
        timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True, prediction_type=prediction_type
    )

    def answer(x, t):
        noise = torch.tanh(x) * (0.5 + t / 2000)
        signal = scheduler.alphas_cumprod[int(t)]
        return noise if prediction_type == "epsilon" else (noise - (1 - signal).sqrt() * x) / signal.sqrt()

    return Toy(answer, scheduler)


def test_velocities_are_sampled_as_the_noise_that_they_say():
    """Fit and scheduler alike: the two forms of one model have the same references, coefficients and images."""
    made = {}
    for kind in ("epsilon", "v_prediction"):
        pipe = variance_preserving(kind)
        own = fitter(pipe, [toy_call()], ridge=1e-9)
        with own.probing():
            leap = own.fit((0, 6, 12, 17))
        table = {"timesteps": leap.timesteps, "sigmas": leap.sigmas, "coefficients": leap.coefficients}
        pipe.scheduler = LeapScheduler({"4": table}, prediction_type=kind)
        (image,) = pipe(**{**toy_call(9), "num_inference_steps": 4})
        made[kind] = (own.references.states[0][-1], leap.error, image)
    (path, error_, image), (other_path, other_error, other_image) = made.values()
    assert torch.allclose(path, other_path, rtol=1e-3, atol=1e-3)
    assert other_error == pytest.approx(error_, rel=0.05)
    assert (image - other_image).norm() < 0.01 * image.norm()


@pytest.mark.parametrize("kind", ["flow", "epsilon", "v_prediction"])
def test_half_precision_is_float32_rounded_once_per_step(kind):
    """Large coefficients that nearly cancel, as fits have them."""
    rows = [[-30.0], [70.0, -100.3], [-55.0, 77.7, -23.1]]
    table = {"timesteps": [900.0, 600.0, 300.0], "sigmas": [3.0, 1.5, 0.5], "coefficients": rows}
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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "needs tables"),
        ({"tables": {"2": {"timesteps": [1.0], "sigmas": [1.0], "coefficients": [[1.0]]}}}, "2 times"),
        (
            {"tables": {"1": {"timesteps": [1.0], "sigmas": [1.0], "coefficients": [[1.0]]}}, "prediction_type": "x"},
            "flow",
        ),
    ],
)
def test_bad_tables_are_refused(arguments, says):
    with pytest.raises(ConfigError, match=says):
        LeapScheduler(**arguments)


def test_bad_fits_are_refused():
    pipe = make_pipe()
    with pytest.raises(CalibrationError, match="nothing to learn from"):
        fit_leap(pipe, [], [4])
    with pytest.raises(ConfigError, match="between 1 and the 12 steps"):
        fit_leap(pipe, [call(0)], [13], trials=1)
    assert type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    draw(pipe, 2)
