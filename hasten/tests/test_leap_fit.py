"""The fit of LEAP: closed form, starts, refinement, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise
from statistics import geometric_mean

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSDEScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from solvable import STEPS, Net, Toy, curved, noise, relative, toy_call

from hasten.bench.learned_solvers import SOLVERS, fit_learned_solver, optimal_steps
from hasten.caching.schedule import spread
from hasten.calibration import Calibration
from hasten.errors import CalibrationError, ConfigError, UnknownNameError
from hasten.fitting import guidance, starts
from hasten.fitting.evaluator import Evaluator
from hasten.fitting.group import Group
from hasten.fitting.guidance import Family, Place, axis_of, families_from, halfway, refined_together
from hasten.fitting.leap import fit_leap
from hasten.fitting.leap_fitter import Fitter, yardsticks
from hasten.fitting.references import record_references
from hasten.fitting.refine import Jacobian, Move, kept_apart, moves_of, refine
from hasten.fitting.starts import _without, extended, plain_solvers, shortened
from hasten.fitting.surrogate import Surrogate
from hasten.fitting.symbolic import prepared, read_off
from hasten.pipeline.replay import Replay
from hasten.solvers import LeapScheduler
from hasten.solvers.multistep import NormalEquations, combine
from hasten.solvers.tables import COLUMNS, Axis, unpacked

pytestmark = pytest.mark.filterwarnings("ignore:The `scale_model_input` function")
UNCLIPPED = {"clip_sample": False, "timestep_spacing": "trailing"}


def fitter(pipe, calls, ridge=0.0, width=1):
    replay = Replay(calls)
    return Fitter(Evaluator(pipe, replay), record_references(pipe, replay), ridge, width)


def at(own, steps):
    """Times at steps of the references."""
    return [own.references.plain.timesteps[step] for step in steps]


def error(pipe, calls, steps, ridge=0.0):
    own = fitter(pipe, calls, ridge)
    with own.evaluator.probing():
        return own.fit(at(own, steps)).relative_squared_error


# --- the closed form


def test_normal_equations_agree_with_least_squares():
    generator = torch.Generator().manual_seed(0)
    batches = [[torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(4)] for _ in range(3)]
    equations = NormalEquations(3)
    for goal, *columns in batches:
        equations.add(columns, goal)
    left = torch.cat([torch.stack([v.flatten() for v in columns], 1) for _, *columns in batches])
    right = torch.cat([goal.flatten() for goal, *_ in batches])
    expected = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
    assert equations.solve([0.0] * 3, 0.0) == pytest.approx(expected.tolist(), rel=1e-9)
    assert equations.solve([1.0, -2.0, 0.5], 1e12) == pytest.approx([1.0, -2.0, 0.5], abs=1e-6)


def test_a_damped_step_is_least_squares_at_no_damping_and_nothing_at_much_in_any_unit():
    generator = torch.Generator().manual_seed(2)
    goal, *columns = [torch.randn(40, generator=generator, dtype=torch.float64) for _ in range(4)]
    one, other = NormalEquations(3), NormalEquations(3)
    one.add(columns, goal)
    other.add([1000 * columns[0], *columns[1:]], goal)
    expected = torch.linalg.lstsq(torch.stack(columns, 1), goal[:, None]).solution[:, 0]
    assert one.damped(1e-12) == pytest.approx(expected.tolist(), rel=1e-6)
    assert one.damped(1e9) == pytest.approx([0, 0, 0], abs=1e-6)
    assert [1000 * other.damped(0.1)[0], *other.damped(0.1)[1:]] == pytest.approx(one.damped(0.1), rel=1e-6)


def test_a_constant_velocity_is_exact_with_one_evaluation_and_a_linear_one_with_two():
    a, b = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(3))
    assert error(Toy(lambda x, t: a.expand_as(x)), [toy_call()], (0,)) < 1e-12
    linear = Toy(lambda x, t: (a + b * t / 1000).expand_as(x))
    assert error(linear, [toy_call()], (0, 9)) < 1e-12
    assert error(linear, [toy_call()], (0,)) > 1e-6


def test_each_evaluation_is_brought_to_the_references_state_at_its_own_time():
    own, steps = fitter(Toy(), [toy_call(0), toy_call(1)]), (0, 4, 9, 15)
    with own.evaluator.probing():
        leap = own.fit(at(own, steps))
    for path, columns in zip(own.references.states, leap.columns, strict=True):
        for k, goal in enumerate(steps[1:]):
            reached = combine(columns, leap.rows[k])
            assert (reached - path[goal]).norm() < 0.5 * (reached - path[-1]).norm()


def test_all_steps_with_a_strong_ridge_are_the_plain_sampler():
    for pipe in (Toy(), Toy(noise, DDIMScheduler(**UNCLIPPED))):
        own = fitter(pipe, [toy_call()], ridge=1e6)
        with own.evaluator.probing():
            assert own.fit(at(own, range(STEPS))).relative_squared_error < 1e-10


def hard_and_easy():
    """A fitter of four images, one of which has nearly all of a sum of squared errors, and a fitter by such sums."""

    def field(x, t):
        strength = torch.ones(len(x), 1, 1)
        strength[0] = 10.0
        return strength * curved(x, t)

    own, alike = (fitter(Toy(field), [toy_call()], ridge=1e-9) for _ in range(2))
    alike.roots = [torch.ones_like(roots) for roots in alike.roots]
    return own, alike


def left_of_each(own, leap):
    """The squared error of each image."""
    return (combine(leap.columns[0], leap.rows[-1]) - own.references.states[0][-1]).flatten(1).square().sum(1)


def test_an_image_that_is_hard_counts_as_much_as_the_others():
    left = []
    for own in hard_and_easy():
        with own.evaluator.probing():
            left.append(left_of_each(own, own.fit(at(own, (0, 6, 13)))))
    assert (left[0][1:] < 0.1 * left[1][1:]).all()
    assert left[0][0] > left[1][0]


@pytest.mark.parametrize("together", [False, True])
def test_an_image_that_is_hard_counts_as_much_as_the_others_in_the_refinement(together):
    """Steps by a sum of squares would be for the hard one alone, and none of them would be taken."""
    own, _ = hard_and_easy()
    with own.evaluator.probing():
        start = own.fit(at(own, (0, 6, 13)))
    if together:
        family = refined_together(Family(Axis((2.0,)), (start.timesteps,), (start.rows,)), [Place(2.0, own)], 2)
        found = Place(2.0, own).run(family)
    else:
        with own.evaluator.probing():
            found = refine(own, start, 2)
    assert found.error < 0.7 * start.error


def test_the_surrogate_looks_at_all_images_alike():
    """However much larger one of them is: it has the share to itself where its weight says so."""
    own = fitter(Toy(lambda x, t: torch.sin(x * 3 + t / 100)), [toy_call()])
    large = torch.tensor([1e6, 1.0, 1.0, 1.0], dtype=torch.float64)
    lost = [
        Surrogate(own.references, 1, [roots]).left_out((0, 6, 13), 0.3) for roots in (large.sqrt(), 1 / large.sqrt())
    ]
    first = [Surrogate(_alone(own.references, i), 1, [torch.ones(1)]).left_out((0, 6, 13), 0.3) for i in range(4)]
    assert lost[0] == pytest.approx(first[0], rel=0.05)
    assert lost[1] != pytest.approx(first[0], rel=0.05)


def _alone(references, image):
    """The references of one image."""
    return replace(
        references,
        states=[path[:, image : image + 1] for path in references.states],
        outputs=[path[:, image : image + 1] for path in references.outputs],
    )


def test_yardsticks_are_told_of():
    calls = [toy_call(i, guidance_scale=2.0) for i in range(2)]
    images, checks = 8, 3 * 4
    fit = fit_leap(Toy(fused=True), calls, [2], trials=1, rounds=0)
    assert fit.report["2"]["evaluations_of_references"] == STEPS * images
    assert fit.report["2"]["evaluations_of_checks"] == 8 * images + checks


def test_yardsticks_are_not_spoilt_by_one_image():
    numbers = partial(torch.tensor, dtype=torch.float64)
    left = [numbers([math.inf, 2.0]), numbers([1.0, 1e15, math.nan, 0.0])]
    sizes = [numbers([50.0, 60.0]), numbers([70.0, 80.0, 90.0, 100.0])]
    (one, two), (three, four, five, six) = (own.tolist() for own in yardsticks(left, sizes))
    assert (one, two, three, four, five) == (50.0, 2.0, 1.0, 80.0, 90.0)  # an image's own size at most
    assert 0 < six < 1  # what costs nothing does not count for all
    (most_are_easy,) = yardsticks([numbers([1e5, 1.0, 2.0])], [numbers([1e5] * 3)])
    assert most_are_easy.tolist() == [1e5, 1.0, 2.0]
    (nothing,) = yardsticks([numbers([0.0, 0.0])], [numbers([4.0, 9.0])])
    assert nothing[1] / nothing[0] == pytest.approx(9 / 4)  # relative to its own size
    (of_zeros,) = yardsticks([numbers([0.0])], [numbers([0.0])])
    assert of_zeros > 0


def test_the_start_is_a_column_of_its_own():
    """A field that shrinks the state: only what is left of the noise has to be known."""
    own = fitter(Toy(lambda x, t: 2.0 * x), [toy_call()])
    with own.evaluator.probing():
        free = own.fit(at(own, (0,)))
    assert free.relative_squared_error < 1e-10
    assert free.rows[0][0] != 1.0 or free.rows[0][1] != -1.0


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_between_the_steps_goals_lie_on_the_plain_samplers_own_path(prediction):
    """One whole step of a constant answer, against two halves of it."""
    scheduler = DDIMScheduler(**UNCLIPPED, prediction_type=prediction)
    own = fitter(Toy(lambda x, t: torch.full_like(x, 0.3), scheduler), [toy_call(batch=1)])
    references = own.references
    coarse = references.plain.levels
    between = 0.5 * (coarse[7] + coarse[8])
    rows = own.prior([], [*coarse[:8], between, coarse[8]])
    columns = [references.states[0][0], *references.outputs[0][:9]]
    assert torch.allclose(references.goal(0, between), combine(columns[:9], rows[7]), atol=1e-5)


# --- schedulers as formulas

FOLLOWED = {
    "flow euler": (curved, lambda: FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "ddim": (noise, lambda: DDIMScheduler(**UNCLIPPED)),
    "ddim of stable diffusion": (
        noise,
        lambda: DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    ),
    "ddim, v": (noise, lambda: DDIMScheduler(**UNCLIPPED, prediction_type="v_prediction")),
    "zero terminal snr": (
        noise,
        lambda: DDIMScheduler(**UNCLIPPED, prediction_type="v_prediction", rescale_betas_zero_snr=True),
    ),
    "euler discrete": (noise, EulerDiscreteScheduler),
    "euler discrete, karras": (noise, lambda: EulerDiscreteScheduler(use_karras_sigmas=True)),
    "lms": (noise, LMSDiscreteScheduler),
    "dpmpp": (noise, DPMSolverMultistepScheduler),
    "unipc": (noise, UniPCMultistepScheduler),
    "unipc of a flow": (
        curved,
        lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ),
}
REFUSED = {
    "ancestral": EulerAncestralDiscreteScheduler,
    "clipping": DDIMScheduler,
    "thresholding": lambda: DDIMScheduler(clip_sample=False, thresholding=True),
    "noise": DDPMScheduler,
    "heun": HeunDiscreteScheduler,
    "flow heun": FlowMatchHeunDiscreteScheduler,
    "kdpm2": KDPM2DiscreteScheduler,
    "plms": PNDMScheduler,
    "consistency": LCMScheduler,
    "edm": EDMEulerScheduler,
    "sde": lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "stochastic flow": lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_with_all_steps_and_plain_coefficients_it_is_the_plain_sampler(name):
    """Through the scheduler itself, as pipelines call it."""
    field, made = FOLLOWED[name]
    pipe = Toy(field, made())
    references = record_references(pipe, Replay([toy_call()]))
    assert references.error < 1e-5
    plain = references.plain
    table = {"timesteps": plain.timesteps, "levels": plain.levels[:-1], "guided": [plain.rows]}
    scheduler = LeapScheduler(
        {str(STEPS): table}, prediction_type=references.kind, noise_scale=plain.noise_scale, shift_mu=None
    )
    (reference,) = pipe(**toy_call(9))
    assert relative(pipe, scheduler, STEPS, reference) < 1e-5


@pytest.mark.parametrize("name", FOLLOWED)
def test_few_steps_are_nearer_than_plain_ones_on_other_seeds(name):
    field, made = FOLLOWED[name]
    pipe = Toy(field, made())
    fit = fit_leap(pipe, [toy_call(0), toy_call(1)], [5], trials=3, rounds=1, held_out=[toy_call(2)])
    (reference,) = pipe(**toy_call(9))
    assert relative(pipe, LeapScheduler.of(fit, pipe), 5, reference) < 0.5 * relative(pipe, None, 5, reference)
    told = fit.report["5"]
    assert told["relative_squared_error"] < 100 * told["held_out"] < 1e4 * told["relative_squared_error"]


@pytest.mark.parametrize("name", REFUSED)
def test_schedulers_that_cannot_be_followed_are_refused_by_name(name):
    scheduler = REFUSED[name]()
    field = curved if "flow" in name else noise
    with pytest.raises(
        (CalibrationError, ConfigError), match=f"{type(scheduler).__name__}.*give the pipeline a linear"
    ):
        fit_leap(Toy(field, scheduler), [toy_call()], [5], trials=2, rounds=0)


def test_an_sde_solver_is_refused():
    pytest.importorskip("torchsde")
    with pytest.raises(CalibrationError, match="DPMSolverSDEScheduler"):
        fit_leap(Toy(noise, DPMSolverSDEScheduler()), [toy_call()], [5], trials=2, rounds=0)


@pytest.mark.parametrize(("name", "count"), [("flow euler", 8), ("dpmpp", 7), ("zero terminal snr", 6)])
def test_plain_solvers_are_read_off_exactly(name, count):
    """Each solver and spacing: its rows, run through the fitter, are what its own scheduler makes."""
    from hasten.solvers.plain import Sampler

    field, made = FOLLOWED[name]
    pipe = Toy(field, made())
    own = fitter(pipe, [toy_call()])
    with own.evaluator.probing():
        solvers = plain_solvers(own.evaluator.scheduler, own.evaluator.arguments(count), own.references.kind)
        errors = {label: own.plain(solver).relative_squared_error for label, solver in solvers.items()}
    assert {"euler", "unipc"} <= set(solvers)
    (reference,) = pipe(**toy_call())
    for label, found in errors.items():
        solver, _, spacing = label.partition(":spacing=")
        scheduler = Sampler(solver, spacing).scheduler(pipe.scheduler)
        truth = relative(pipe, scheduler, count, reference, seed=0)
        assert found**0.5 == pytest.approx(truth, rel=1e-3, abs=1e-6), label


def test_reading_off_leaves_the_scheduler_as_it_was():
    scheduler = UniPCMultistepScheduler()
    scheduler.set_timesteps(7)
    before = scheduler.timesteps
    read_off(prepared(scheduler, {"num_inference_steps": 5}), "epsilon")
    assert scheduler.timesteps is before


# --- starts and the search


@pytest.mark.parametrize("name", ["flow euler", "ddim", "unipc"])
def test_a_fit_is_never_worse_than_the_best_plain_solver_and_falls_with_every_evaluation(name):
    field, made = FOLLOWED[name]
    fit = fit_leap(Toy(field, made()), [toy_call(0), toy_call(1)], [5, 3, 4, 6, 8], trials=18, rounds=1)
    assert list(fit.report) == ["3", "4", "5", "6", "8"]
    errors = [told["relative_to_first_order"] for told in fit.report.values()]
    assert errors == sorted(errors, reverse=True)
    for told in fit.report.values():
        assert told["relative_to_first_order"] <= told["plain"]["relative_to_first_order"]


def test_one_evaluation_more_is_never_worse_before_anything_else_is_done():
    own = fitter(Toy(), [toy_call(0), toy_call(1)], ridge=1e-9)
    with own.evaluator.probing():
        leap = own.fit(at(own, (0, 6, 13)))
        made = own.evaluator.made
        longer = extended(own, leap)
        assert own.evaluator.made - made == 3 * 8  # the new evaluation alone, at three places
        assert own.exact(longer.timesteps, longer.rows).error == pytest.approx(longer.error, rel=1e-4)
    assert len(longer.timesteps) == 4
    assert longer.error <= leap.error


@pytest.mark.parametrize("width", [1, 2])
def test_one_evaluation_less_costs_no_more_than_what_it_had_brought(width):
    scale = {} if width == 1 else {"guidance_scale": 2.0}
    own = fitter(Toy(), [toy_call(i, **scale) for i in range(2)], ridge=1e-9, width=width)
    with own.evaluator.probing():
        leap = refine(own, own.fit(at(own, (0, 6, 13))), 1)
        shorter = shortened(own, extended(own, leap))
        assert own.exact(shorter.timesteps, shorter.rows).error == pytest.approx(shorter.error, rel=1e-4)
    assert len(shorter.timesteps) == 3
    assert [len(row) for row in shorter.rows] == [1 + width * k for k in (1, 2, 3)]
    assert shorter.error <= leap.error * (1 + 1e-6)


def test_an_evaluation_whose_answer_is_a_combination_of_others_can_be_left_out():
    """The answers of a field that is constant in space are combinations of two of them where it is linear in time."""
    own = fitter(Toy(lambda x, t: torch.ones_like(x) * t / 1000), [toy_call(0), toy_call(1)], ridge=0.0)
    rows = [[1.0, -0.2], [1.0, -0.2, -0.2], [1.0, -0.2, -0.2, -0.2], [1.0, -0.2, -0.2, -0.2, -0.2]]
    with own.evaluator.probing():
        leap = own.exact(at(own, (0, 5, 10, 15)), rows)
        for place in (2, 3):
            times = (*leap.timesteps[:place], *leap.timesteps[place + 1 :])
            made = own.exact(times, _without(own, leap, place))
            for whole, part in zip(leap.columns, made.columns, strict=True):
                expected = combine(whole, leap.rows[-1])
                assert torch.allclose(combine(part, made.rows[-1]), expected, atol=1e-5), place


def both_ways(monkeypatch, on, **given):
    if not on:
        monkeypatch.setattr("hasten.fitting.leap.BOTH_WAYS", 99)
    calls = [toy_call(i) for i in range(4)]
    return fit_leap(Toy(), calls, [3, 4, 5, 6, 8], trials=3, rounds=1, **given)


def test_solvers_begin_with_those_that_have_more_evaluations_and_are_never_worse(monkeypatch):
    kept = []
    both = both_ways(monkeypatch, True, keep=kept.append)
    one = both_ways(monkeypatch, False)
    assert len(kept) == 9  # five numbers, and four pairs of neighbours
    tried = [{name for name, told in result.report.items() if "tried_from" in told} for result in kept[4:]]
    assert [sorted(now - before) for before, now in pairwise(tried)] == [["6"], ["5"], ["4"], ["3"]]
    errors = [[told["relative_to_first_order"] for told in fit.report.values()] for fit in (both, one)]
    assert all(a <= b for a, b in zip(*errors, strict=True))
    assert sum(errors[0]) < 0.9 * sum(errors[1])
    assert errors[0] == sorted(errors[0], reverse=True)
    better = [name for name, told in both.report.items() if told["start"] == "more evaluations"]
    assert better
    assert [told.get("tried_from") for told in both.report.values()] == [4, 5, 6, 8, None]
    judge = fitter(Toy(), [toy_call(i) for i in range(4)])
    for name, told in both.report.items():
        assert told["evaluations_of_fit"] > one.report[name]["evaluations_of_fit"] or name == "8"
        assert told["plain"] == one.report[name]["plain"]
        assert ("tried_from" in told) == (name != "8")
        table = unpacked(both.tensors)[name]
        with judge.evaluator.probing():
            made = judge.exact(table["timesteps"], table["guided"][0]).relative_squared_error
        assert told["relative_squared_error"] == pytest.approx(made, rel=1e-3)


def test_what_was_begun_both_ways_is_not_tried_again_and_goes_on_where_it_was_cut_short(monkeypatch):
    kept, seen = [], []
    both = both_ways(monkeypatch, True, keep=kept.append)
    again = both_ways(monkeypatch, True, known=both, progress=lambda *told: seen.append(told[0]))
    assert set(seen) == {0}  # the references alone
    assert again.report == both.report
    cut = both_ways(monkeypatch, True, known=kept[6])
    for name, tensor in both.tensors.items():
        assert torch.allclose(cut.tensors[name], tensor, rtol=1e-6, atol=1e-9), name


def test_a_number_alone_begins_with_one_evaluation_more_as_well(monkeypatch):
    calls, fits = [toy_call(i) for i in range(4)], {}
    for ways in (99, 3):
        monkeypatch.setattr("hasten.fitting.leap.BOTH_WAYS", ways)
        fits[ways] = fit_leap(Toy(), calls, [10], rounds=1).report["10"]
    assert fits[3]["trials"] == fits[99]["trials"] + 1
    assert fits[3]["start"] == "more evaluations" != fits[99]["start"]
    assert fits[3]["relative_to_first_order"] < 0.2 * fits[99]["relative_to_first_order"]


def test_one_evaluation_more_is_made_for_the_longest_alone_and_for_no_range():
    """Beside five starts: one with more that is made for it, one with fewer, and one with more that there is."""

    def trials(counts, rounds=1, **more):
        call = toy_call(0, **({"guidance_scale": 3.0} if "guidances" in more else {}))
        report = fit_leap(Toy(), [call], counts, rounds=rounds, **more).report
        return {name: told["trials"] for name, told in report.items()}

    assert trials([5]) == {"5": 6}
    assert trials([3, 4]) == {"3": 5 + 1, "4": 6 + 1}
    assert trials([19]) == {"19": 6}
    assert trials([20]) == {"20": 2}  # a run has no more steps
    assert trials([5], trials=2) == {"5": 2}
    assert trials([5], trials=3) == {"5": 4}
    assert trials([5], rounds=0) == {"5": 5}  # nothing is moved
    assert trials([5], guidances=(3.0,)) == {"5": 6}
    assert trials([5], guidances=(2.0, 3.0)) == {"5": 5}
    known = fit_leap(Toy(), [toy_call(0)], [6], rounds=1)
    assert trials([4], known=known) == {"6": 6, "4": 6}  # 4 is tried from 6


def test_a_number_that_is_asked_for_later_is_tried_from_as_well():
    calls, options = [toy_call(i) for i in range(4)], {"trials": 3, "rounds": 1}
    part = fit_leap(Toy(), calls, [4, 6], **options)
    whole = fit_leap(Toy(), calls, [4, 5, 6], known=part, **options)
    assert part.report["4"]["tried_from"] == 6
    assert {name: told.get("tried_from") for name, told in whole.report.items()} == {"4": 5, "5": 6, "6": None}
    assert whole.report["4"]["relative_to_first_order"] <= part.report["4"]["relative_to_first_order"]
    above = fit_leap(Toy(), calls, [5], known=part, **options)
    assert {name: told.get("tried_from") for name, told in above.report.items()} == {"4": 5, "5": 6, "6": None}


def test_what_goes_on_is_checked_before_anything_is_drawn(tmp_path):
    calls, options = [toy_call(0)], {"trials": 1, "rounds": 0}
    file = fit_leap(Toy(), calls, [2], **options).save(tmp_path / "leap.safetensors")
    assert list(fit_leap(Toy(), calls, [3], known=file, **options).report) == ["2", "3"]
    for wrong, error, message in (
        ({"known": tmp_path / "none"}, CalibrationError, "no such file"),
        ({"known": {}}, ConfigError, "a path"),
        ({"keep": "x"}, ConfigError, "keep must be a function of a calibration, such as .*, got 'x'"),
        ({"guidances": 3.0}, ConfigError, r"guidances must be .*got 3\.0"),
    ):
        with pytest.raises(error, match=message):
            fit_leap(Idle(), calls, [2], **options | wrong)


def test_the_way_back_tells_how_far_it_is_and_what_it_kept(monkeypatch):
    seen = []
    calls = [toy_call(i) for i in range(2)]
    fit = fit_leap(Toy(), calls, [3, 7], trials=3, rounds=2, progress=lambda *told: seen.append(told))
    back = [told[1:] for told in seen[[i for i, told in enumerate(seen) if told[0] == 7][-1] + 1 :]]
    assert [told[0] for told in seen[-len(back) :]] == [3] * len(back)
    assert [done for done, _, _ in back] == sorted(done for done, _, _ in back)
    assert {total for _, total, _ in back} == {5}  # three that are left out before the last, and two rounds
    assert len(back) > 3
    assert back[-1] == (5, 5, fit.report["3"]["relative_squared_error"])


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_model_may_have_answers_at_the_times_of_its_sampler_alone(rounds):
    grid = set(at(fitter(Toy(), [toy_call(0)]), range(STEPS)))

    def field(x, t):
        return curved(x, t) * (1.0 if any(abs(float(t) - own) < 1e-3 for own in grid) else math.nan)

    fit = fit_leap(Toy(field), [toy_call(0), toy_call(1)], [2, 3], trials=3, rounds=rounds)
    errors = [told["relative_to_first_order"] for told in fit.report.values()]
    assert all(map(math.isfinite, errors))
    assert errors[1] <= errors[0]


def test_what_is_told_of_a_solver_that_is_no_more_is_gone(monkeypatch):
    held_out = [toy_call(9)]
    monkeypatch.setattr("hasten.fitting.leap.BOTH_WAYS", 99)
    calls, options = [toy_call(i) for i in range(4)], {"trials": 3, "rounds": 1}
    one = fit_leap(Toy(), calls, [3, 4, 5], held_out=held_out, **options)
    monkeypatch.undo()
    both = fit_leap(Toy(), calls, [3, 4, 5], known=one, **options)
    replaced = [name for name, told in both.report.items() if told["start"] == "more evaluations"]
    assert replaced
    for name, told in both.report.items():
        assert ("held_out" in told) == (name not in replaced)
    again = fit_leap(Toy(), calls, [3, 4, 5], known=both, held_out=held_out, **options)
    judge = fitter(Toy(), held_out)
    for name in replaced:
        table = unpacked(again.tensors)[name]
        with judge.evaluator.probing():
            made = judge.exact(table["timesteps"], table["guided"][0]).relative_squared_error
        assert again.report[name]["held_out"] == pytest.approx(made, rel=1e-3)


def test_fewer_evaluations_that_have_less_error_are_gone_on_from(monkeypatch):
    both = both_ways(monkeypatch, True)
    worse = both.report["8"] | {"relative_to_first_order": 1.0}
    told = both_ways(monkeypatch, True, known=replace(both, report=both.report | {"8": worse})).report
    assert told["8"]["start"] == "fewer evaluations"
    assert told["8"]["relative_to_first_order"] <= told["6"]["relative_to_first_order"]
    assert {name: own for name, own in told.items() if name != "8"} == {
        name: own for name, own in both.report.items() if name != "8"
    }


@pytest.mark.parametrize("place", [1, 2, 3])
def test_a_new_evaluation_leaves_the_others_as_they_were_wherever_it_stands(place):
    own = fitter(Toy(), [toy_call(0), toy_call(1)], ridge=1e-9)
    with own.evaluator.probing():
        leap = own.fit(at(own, (0, 6, 13)))
        made = starts._inserted(own, leap, place)
        assert made.error <= (1 + 1e-5) * leap.error
        assert own.exact(made.timesteps, made.rows).error == pytest.approx(made.error, rel=1e-4)


def test_a_given_last_row_is_fitted_anew_where_that_is_nearer():
    own = fitter(Toy(), [toy_call(0), toy_call(1)], ridge=1e-9)
    with own.evaluator.probing():
        leap = own.fit(at(own, (0, 6, 13)))
        bent = [*leap.rows[:-1], [1.1 * number for number in leap.rows[-1]]]
        assert own.exact(leap.timesteps, bent).error > 2 * leap.error
        assert own.score(leap.timesteps, bent).error == pytest.approx(leap.error, rel=1e-4)


def test_starts_are_moved_before_one_is_chosen():
    own = fitter(Toy(), [toy_call(0), toy_call(1)], ridge=1e-6)
    surrogate = Surrogate(own.references, 1, own.roots)
    settings = {"trials": 6, "longer": False, "progress": lambda *_: None}
    with own.evaluator.probing():
        (start, closed), (other, moved) = (
            starts.best_start(own, surrogate, {}, None, 4, move=move, **settings) for move in (False, True)
        )
    assert closed.figures == start.unmoved
    assert moved.error < 0.5 * closed.error
    assert moved.error < 0.5 * other.unmoved["relative_to_first_order"]


def test_lists_that_coincide_are_tried_once():
    fit = fit_leap(Toy(steps=4), [toy_call(0, num_inference_steps=4)], [4], rounds=0)
    assert fit.report["4"]["trials"] == 2  # all steps, and the best plain solver


def test_a_fit_that_goes_on_from_another_begins_with_its_solvers():
    calls = [toy_call(0), toy_call(1)]
    known = None
    for count in (3, 4, 5, 6, 7):
        known = fit_leap(Toy(), calls, [count], known=known, rounds=1)
    errors = [told["relative_to_first_order"] for told in known.report.values()]
    assert errors == sorted(errors, reverse=True)
    assert fit_leap(Toy(), calls, [7], known=known, rounds=1, trials=40).report == known.report  # 40 are as many as 6


def test_a_schedule_that_ends_at_time_0_is_refined_too():
    pipe = Toy(noise, DDIMScheduler(clip_sample=False))  # leading spacing: its last time is 0
    own = fitter(pipe, [toy_call(0), toy_call(1)], ridge=1e-6)
    with own.evaluator.probing():
        closed = own.fit(at(own, (0, 6, 12, 19)))
        assert closed.timesteps[-1] == 0
        assert refine(own, closed, 2).error < 0.9 * closed.error
        assert extended(own, closed).timesteps == tuple(sorted(set(extended(own, closed).timesteps), reverse=True))


def test_a_start_that_leaves_what_the_model_knows_only_loses():
    """The model has no answer a little outside of what the references visit."""
    own = fitter(Toy(), [toy_call(0), toy_call(1)])
    most = max(float(path[:-1].abs().max()) for path in own.references.states)

    def fenced(x, t):
        return torch.where(x.abs() > 1.01 * most, torch.tensor(float("nan")), curved(x, t))

    fit = fit_leap(Toy(fenced), [toy_call(0), toy_call(1)], [2, 3, 4])
    assert all(0 <= told["relative_squared_error"] < 0.1 for told in fit.report.values())


def test_progress_counts_rounds_as_well():
    seen = []
    fit_leap(Toy(), [toy_call(0), toy_call(1)], [4], rounds=2, progress=lambda *told: seen.append(told[:3]))
    steps = [done for count, done, total in seen if count == 4]
    assert steps == sorted(steps)
    assert {8, 9} <= set(steps)
    assert steps[-1] == 9 == next(total for count, _, total in seen if count == 4)


def test_the_surrogate_ranks_lists_as_the_model_does():
    own = fitter(Toy(), [toy_call(0), toy_call(1)], ridge=1e-9)
    surrogate = Surrogate(own.references, 1, own.roots)
    lists = [(0, 1, 2, 3), (0, 5, 10, 15), (0, 8, 14, 17), (0, 16, 17, 18)]
    with own.evaluator.probing():
        errors = [own.fit(at(own, steps)).error for steps in lists]
        best = own.fit(at(own, surrogate.best(4, 0.3))).error
    told = [surrogate.left_out(steps, 0.3) for steps in lists]
    assert sorted(range(4), key=errors.__getitem__)[:1] == sorted(range(4), key=told.__getitem__)[:1]
    assert best <= min(errors)


def test_more_starts_end_nearer_than_one():
    errors = [
        fit_leap(Toy(), [toy_call(0), toy_call(1)], [4], trials=trials, rounds=rounds).report["4"]
        for trials, rounds in ((1, 0), (6, 0), (1, 2), (6, 2))
    ]
    figures = [told["relative_squared_error"] for told in errors]
    assert figures[1] < figures[0]  # closed forms alone: the nearest of several
    assert figures[3] < 0.1 * figures[2]
    assert figures[3] < figures[1]
    assert [told["trials"] for told in errors] == [1, 5, 1, 6]  # nothing with fewer evaluations to begin with


# --- the joint refinement


def test_refinement_lowers_the_error_and_moves_the_times_between_the_steps():
    own = fitter(Toy(), [toy_call(0), toy_call(1)], ridge=1e-9)
    seen = []
    with own.evaluator.probing():
        closed = own.fit(at(own, (0, 6, 12, 17)))
        better = refine(own, closed, 3, seen.append)
        still = refine(own, closed, 1, times=False)
    assert better.error < 0.5 * closed.error
    assert seen == sorted(seen, reverse=True)
    assert better.timesteps[0] == closed.timesteps[0]
    assert all(a > b > 0 for a, b in pairwise(better.timesteps))
    assert any(t not in own.references.plain.timesteps for t in better.timesteps[1:])
    assert still.timesteps == closed.timesteps
    assert still.error < closed.error
    held_out = fitter(Toy(), [toy_call(7)])
    with held_out.evaluator.probing():
        assert held_out.exact(better.timesteps, better.rows).error < held_out.exact(closed.timesteps, closed.rows).error


def test_a_round_leaves_a_part_of_the_calls_out_and_another_one_each_time():
    """One call wants something else than the others: they come off better in the round that does not learn from it."""
    own = fitter(Toy(), [toy_call(i) for i in range(4)], ridge=1e-9)
    with own.evaluator.probing():
        closed = own.fit(at(own, (0, 6, 12, 17)))
        own.references.states[0][-1] = 1.03 * own.references.states[0][-1]
        start = own.exact(closed.timesteps, closed.rows)
        rounds = [refine(own, start, 1, first=first) for first in (0, 1, 4)]
    without, learned, again = (sum(leap.errors[1:]) for leap in rounds)
    assert without < 0.5 * sum(start.errors[1:])
    assert without < 0.5 * learned
    assert again == without


def test_closed_forms_are_asked_on_the_other_half_of_the_calls():
    own = fitter(Toy(), [toy_call(i) for i in range(4)], ridge=1e-9)
    with own.evaluator.probing():
        times = at(own, (0, 6, 12, 17))
        halves = [own.restricted((0, 2)), own.restricted((1, 3))]
        fits = [half.fit(times) for half in halves]
        errors = [halves[1].exact(times, fits[0].rows).error, halves[0].exact(times, fits[1].rows).error]
        assert own.elsewhere(times) == pytest.approx(sum(errors))
        assert own.elsewhere(times) > sum(fit.error for fit in fits)
        assert own.restricted((0,)).elsewhere(times) > 0


def test_variance_preserving_models_have_their_times_refined_too():
    own = fitter(Toy(noise, DDIMScheduler(**UNCLIPPED)), [toy_call()], ridge=1e-9)
    with own.evaluator.probing():
        closed = own.fit(at(own, (0, 6, 12, 17)))
        better = refine(own, closed, 2)
        fixed = refine(own, closed, 2, times=False)
    assert better.timesteps != closed.timesteps
    assert better.error < fixed.error < closed.error


def test_steps_that_go_too_far_are_not_taken():
    own = fitter(Toy(lambda x, t: torch.sin(6 * x + t / 50) - 0.3 * x), [toy_call(0), toy_call(1)], ridge=1e-9)
    with own.evaluator.probing():
        closed = own.fit(at(own, (0, 6, 12, 17)))
        errors = [refine(own, closed, rounds).error for rounds in range(5)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < closed.error


def test_the_columns_of_the_refinement_are_derivatives():
    """On a linear field the final state is a polynomial in the parameters; differences of another size agree."""
    own = fitter(Toy(lambda x, t: 0.5 * x + t / 1000), [toy_call()], ridge=1e-9)
    with own.evaluator.probing():
        leap = own.fit(at(own, (0, 8, 14)))
        moves = moves_of(own, leap, True, 2)
        columns = Jacobian(own, leap, 0, moves).columns
        final = combine(leap.columns[0], leap.rows[-1])
        assert [move.along is None for move in moves] == [False] * 4 + [True] * 2
        for move, column in zip(moves, columns, strict=True):
            size = 5.0 if move.along is None else 0.02
            times, rows = move.applied(leap.timesteps, leap.rows, size)
            moved = combine(own.follow(0, times, rows, []), rows[-1])
            assert torch.allclose((moved - final) / size, column, rtol=0.02, atol=2e-3 * float(column.abs().max()))


def test_goals_between_steps_lie_on_the_path():
    """On a straight path states of many steps are found between those of few."""
    few, many = (fitter(Toy(lambda x, t: 0 * x + 0.7, steps=n), [toy_call()]).references for n in (5, STEPS))
    for level, state in zip(many.plain.levels, many.states[0], strict=True):
        assert torch.allclose(few.goal(0, level), state, atol=1e-5)


# --- learned solvers of the literature


def test_learned_solvers_of_the_literature_learn_within_their_families():
    own = fitter(Toy(), [toy_call(0), toy_call(1)], ridge=1e-9)
    references = own.references
    errors, leaps = {}, {}
    with own.evaluator.probing():
        even = [references.at(STEPS * k / 4) for k in range(4)]
        start = own.exact(even, own.prior([], [*map(references.level_at, even), 0.0]))
        for name in SOLVERS:
            leaps[name] = fit_learned_solver(name, own, 4, 3)
            errors[name] = leaps[name].error
            assert own.exact(leaps[name].timesteps, leaps[name].rows).error == pytest.approx(errors[name], rel=1e-3)
    assert max(errors[name] for name in ("bns", "s4s", "dyweight")) < start.error
    assert errors["bns"] < min(errors["dyweight"], errors["s4s"])
    for name, window in (("s4s", 3), ("dyweight", 4)):  # what is out of the window stays as it was
        for k in range(1, 4):
            old = leaps[name].rows[k - 1][: 1 + max(0, k + 1 - window)]
            assert leaps[name].rows[k][: len(old)] == pytest.approx(old, abs=1e-6)
    with pytest.raises(UnknownNameError):
        fit_learned_solver("bsn", own, 4, 1)
    other = fitter(Toy(noise, DDIMScheduler(**UNCLIPPED)), [toy_call(0)])
    with pytest.raises(ConfigError, match="flow-matching models alone"):
        fit_learned_solver("bns", other, 4, 1)


def test_optimal_steps_is_the_best_list_of_its_objective():
    """Against all lists of three."""
    from itertools import combinations

    own = fitter(Toy(), [toy_call(0)])
    references, path = own.references, own.references.states[0]

    def lost(steps):
        total = 0.0
        for i, j in pairwise([*steps, STEPS]):
            made = path[i] + (references.plain.levels[j] - references.plain.levels[i]) * references.outputs[0][i]
            total += float((made - path[j]).double().square().sum())
        return total

    best = min(((0, *rest) for rest in combinations(range(1, STEPS), 2)), key=lost)
    assert optimal_steps(own, 3) == at(own, best)


# --- calls, and a fit that is cut short


def test_every_scale_of_a_range_begins_with_the_same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups share the generators of the calls, and what is checked between them moves these on."""
    groups: list[Group] = []
    monkeypatch.setattr(
        "hasten.fitting.leap_under_way.Group", lambda *given: groups.append(Group(*given)) or groups[-1]
    )
    calls = [toy_call(i, guidance_scale=3.0) for i in range(2)]
    noise = [torch.randn(4, 2, 8, generator=toy_call(i)["generator"]) for i in range(2)]
    fit_leap(Toy(), calls, [2], guidances=(1.5, 3.0, 5.0), rounds=0)
    assert [len(group.references.states) for group in groups] == [2, 2, 2, 1, 1]  # the scales, and halfway between
    for group in groups:
        for states, own in zip(group.references.states, noise, strict=False):
            assert torch.equal(states[0].float(), own)
    ends = {tuple(group.references.states[0][-1].flatten().tolist()) for group in groups}
    assert len(ends) == len(groups)


def test_calls_that_are_held_out_need_no_guidance():
    """Those that have none are drawn with the rows over the outputs alone."""
    for call, form in ((toy_call(5), "guided"), (toy_call(5, guidance_scale=1.5), "passes")):
        fit = fit_leap(Toy(), [toy_call(0, guidance_scale=1.5)], [2], held_out=[call], trials=1, rounds=0)
        table, own = unpacked(fit.tensors)["2"], fitter(Toy(), [call], width=COLUMNS[form])
        with own.evaluator.probing():
            assert fit.report["2"]["held_out"] == own.exact(table["timesteps"], table[form][0]).relative_squared_error


def test_a_fit_goes_on_where_it_was_cut_short():
    kept, options = [], {"trials": 2, "rounds": 0}
    fit_leap(Toy(), [toy_call(0)], [3, 4], keep=kept.append, **options)
    assert [sorted(result.report) for result in kept] == [["3"], ["3", "4"]]
    seen = []
    again = fit_leap(Toy(), [toy_call(0)], [3, 4], known=kept[0], progress=lambda *p: seen.append(p[0]), **options)
    assert set(seen) == {0, 4}  # the references, and what was not fitted yet
    assert torch.equal(again.tensors["3/guided"], kept[0].tensors["3/guided"])
    worse, better = (one["relative_squared_error"] for one in again.report.values())
    assert better <= worse  # the solver that was known is a start of the next one
    for other, settings in (([toy_call(1)], options), ([toy_call(0)], options | {"trials": 3})):
        afresh = fit_leap(Toy(), other, [4], known=kept[0], **settings)
        assert sorted(afresh.report) == ["4"]


def test_the_same_calls_can_be_fitted_twice():
    pipe, calls = Toy(), [toy_call(0)]
    first, second = (fit_leap(pipe, calls, [3], trials=1, rounds=1) for _ in range(2))
    assert torch.equal(first.tensors["3/guided"], second.tensors["3/guided"])
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    assert "step" not in vars(pipe.scheduler)


class Idle(Toy):
    """A pipeline that must not be called."""

    def __call__(self, *args, num_inference_steps=STEPS, **kwargs):
        pytest.fail("the pipeline was called")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"evaluations": [99]}, "evaluations must be one or more whole numbers from 1 to 20, got [99]"),
        ({"evaluations": [4, 0]}, "evaluations must be one or more whole numbers from 1 to 20, got [4, 0]"),
        ({"evaluations": [4.5]}, "whole numbers from 1 to 20, got [4.5]"),
        ({"evaluations": [True]}, "whole numbers from 1 to 20, got [True]"),
        ({"evaluations": []}, "whole numbers from 1 to 20, got []"),
        ({"evaluations": 4}, "whole numbers from 1 to 20, got 4"),
        ({"calls": [{"num_inference_steps": 6}], "evaluations": [7]}, "whole numbers from 1 to 6, got [7]"),
        ({"calls": [{"sigmas": [1.0, 0.5]}], "evaluations": [3]}, "whole numbers from 1 to 2, got [3]"),
        ({"calls": {"prompt": "a red apple"}}, "such as [{'prompt': 'a red apple'}]; got a dict"),
        ({"calls": ["a red apple"]}, "such as [{'prompt': 'a red apple'}]; got a str"),
        ({"held_out": ["a red apple"]}, "such as [{'prompt': 'a red apple'}]; got a str"),
        ({"trials": 0}, "trials must be a whole number of 1 or more, got 0"),
        ({"trials": "40"}, "trials must be a whole number of 1 or more, got '40'"),
        ({"rounds": -1}, "rounds must be a whole number of 0 or more, got -1"),
        ({"ridge": math.nan}, "ridge must be a number of 0 or more, got nan"),
        ({"guidances": (1.5, math.inf)}, "guidances must be one or more numbers from 0 to 1000, got (1.5, inf)"),
        ({"guidances": (-1.0,)}, "guidances must be one or more numbers from 0 to 1000, got (-1.0,)"),
        ({"pipe": Net(curved)}, "and Net has none; give a diffusers pipeline"),
        ({"pipe": None}, "and NoneType has none; give a diffusers pipeline"),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_any_call(changes, says):
    given = {"pipe": Idle(), "calls": [{}], "evaluations": [4], **changes}
    with pytest.raises(ConfigError) as refused:
        fit_leap(given.pop("pipe"), given.pop("calls"), given.pop("evaluations"), **given)
    assert says in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["transformer", "unet", "prior"])
def test_any_denoiser_will_do(name):
    fit = fit_leap(Toy(name=name), [toy_call(0)], [4], trials=2, rounds=1)
    assert fit.fingerprint.model == "Net"
    LeapScheduler.of(fit, Toy(name=name))


def test_bad_fits_are_refused():
    with pytest.raises(CalibrationError, match="nothing to learn from"):
        fit_leap(Toy(), [], [4])
    with pytest.raises(ConfigError, match=r"evaluations must be one or more whole numbers from 1 to 10, got \[11\]"):
        fit_leap(Toy(steps=10), [toy_call(0, num_inference_steps=20)], [11], trials=1)  # it makes ten, whatever it says
    with pytest.raises(ConfigError, match="guidances have to differ"):
        fit_leap(Toy(), [toy_call(0, guidance_scale=3.0)], [4], guidances=(2.0, 2.0))
    with pytest.raises(ConfigError, match="prediction_type 'sample'"):
        fit_leap(Toy(noise, DDIMScheduler(prediction_type="sample")), [toy_call(0)], [4])
    with pytest.raises(CalibrationError, match="not of 'leap'"):
        Calibration.of("leap", Calibration("l2p", {}, fit_leap(Toy(), [toy_call()], [2], trials=1).fingerprint))


# --- a range of guidance


def family_of_fits(scales, count=4):
    """Fits at some scales that know nothing of one another, and paths at them and between."""
    places = [
        Place(scale, fitter(Toy(), [toy_call(i, guidance_scale=scale) for i in range(4)]))
        for scale in sorted([*scales, *halfway(axis_of(scales))])
    ]
    own = {place.scale: place.fitter for place in places}
    leaps = []
    for scale in scales:
        with own[scale].evaluator.probing():
            leaps.append(refine(own[scale], own[scale].fit(at(own[scale], spread(count, STEPS, 1.0))), 2))
    return Family(axis_of(scales), tuple(leap.timesteps for leap in leaps), tuple(leap.rows for leap in leaps)), places


def test_solvers_for_a_range_are_refined_where_they_are_interpolated():
    family, places = family_of_fits((1.5, 3.0, 5.0))
    before = [place.run(family).error for place in places]
    told = []
    found = refined_together(family, places, 2, told.append)
    after = [place.run(found).error for place in places]
    assert after[1] < before[1] / 10  # nothing was fitted there
    assert after[3] < before[3] / 10
    assert sum(map(math.log, after)) < sum(map(math.log, before)) - 10
    assert told == sorted(told, reverse=True)
    squared = [place.run(found).relative_squared_error for place in places]
    assert told[-1] == pytest.approx(geometric_mean(squared), rel=1e-3)


def test_last_rows_for_a_range_are_fitted_together_without_a_round():
    family, places = family_of_fits((1.5, 3.0, 5.0))
    found = refined_together(family, places, 0)
    assert [rows[:-1] for rows in found.rows] == [rows[:-1] for rows in family.rows]
    assert found.timesteps == family.timesteps
    scores = [sum(math.log(place.run(one).error) for place in places) for one in (family, found)]
    assert scores[1] < scores[0] - 1


def test_times_go_as_far_as_their_order_allows():
    assert kept_apart((9.0, 6.0, 2.0), (9.0, 5.0, 3.0)) == (9.0, 5.0, 3.0)
    for wrong in ((9.0, 2.0, 8.0), (9.0, 6.0, -4.0), (9.0, 9.5, 2.0)):
        held = kept_apart((9.0, 6.0, 2.0), wrong)
        assert all(a > b for a, b in pairwise((*held, 0.0)))
        assert held != (9.0, 6.0, 2.0)
    assert kept_apart((9.0, 6.0, 0.0), (9.0, 5.0, -1.0)) == (9.0, 5.0, 0.0)  # a last time of 0 stays, and alone


def test_times_of_a_range_stay_apart_between_its_scales():
    """Each list falls at its scale, and where they are interpolated they would cross."""
    rows = [[1.0, 0.0], [1.0, 0.0, 0.0]]
    family = Family(Axis((1.0, 3.0, 5.0)), ((9.0, 5.0),) * 3, (rows,) * 3)
    moves = [Move(1, None)]
    found = family.moved(moves, [3.9, 0.0, 0.0, 0.0, -4.9, 0.0, 0.0, 0.0, 3.9, 0.0, 0.0, 0.0])
    wished = Family(Axis((1.0, 3.0, 5.0)), ((9.0, 8.9), (9.0, 0.1), (9.0, 8.9)), (rows,) * 3)
    assert not Family(Axis((1.0, 3.0, 5.0)), ((9.0, 8.9), (9.0, 8.9), (9.0, 0.1)), (rows,) * 3).is_passable()
    assert wished.is_passable()
    assert found.is_passable()
    assert found.timesteps[0][1] > 5.0 > found.timesteps[1][1] > 0.1
    bent = family.moved(moves, [0.0] * 4 + [3.9, 0.0, 0.0, 0.0] + [-4.9, 0.0, 0.0, 0.0])  # highest between two scales
    assert min(9.0 - bent.times(1.0 + 0.05 * i)[1] for i in range(81)) > 1.99  # half of the distance that there was
    still = Family(Axis((1.0, 3.0, 5.0)), ((9.0, 5.0, 0.0),) * 3, ([*rows, [1.0, 0.0, 0.0, 0.0]],) * 3)
    step = [1.0, 2.0, 0.0, 0.0, 0.0, 0.0] + [1.0, 0.0, 0.0, 0.0, 0.0, 0.0] * 2
    assert [times[1:] for times in still.moved([Move(1, None), Move(2, None)], step).timesteps] == [(6.0, 0.0)] * 3


def groups_at(scales, calls=2):
    return {
        scale: Group(Toy(), Replay([toy_call(i, guidance_scale=scale) for i in range(calls)]), 1e-6, lambda done: None)
        for scale in scales
    }


def closed_at(group, count, power):
    own = group.fitters["guided"]
    with own.evaluator.probing():
        return own.fit(at(own, spread(count, STEPS, power)))


def refined_at(group, count, power, rounds):
    own, leap = group.fitters["guided"], closed_at(group, count, power)
    with own.evaluator.probing():
        return refine(own, leap, rounds)


def test_a_range_is_looked_at_within_its_ends_and_in_the_middle_between_its_scales():
    assert halfway(axis_of((6.0, 1.5, 24.0))) == pytest.approx([3.0, 12.0])  # by as many times as often
    assert halfway(axis_of((0.0, 4.0))) == [2.0]
    for axis in (axis_of((1.5, 6.0, 24.0)), axis_of((0.0, 4.0))):
        looks = axis.looks()
        assert (looks[0], looks[-1]) == (axis.scales[0], axis.scales[-1])
        assert looks == sorted(looks)


def families_at(scales, lowest, highest, rounds=0):
    """From closed forms whose times are spread by some powers."""
    groups, between = groups_at(scales), groups_at(halfway(axis_of(scales)), 1)
    ends = closed_at(groups[scales[0]], 4, lowest).timesteps, closed_at(groups[scales[-1]], 4, highest)
    return ends, groups | between, families_from(ends[0], (ends[1].timesteps, ends[1].rows), groups, between, rounds)


def test_a_range_begins_between_the_solvers_of_its_ends():
    """Times in proportion, and closed forms: what lies between the scales is as good as what lies at them."""
    (lowest, highest), groups, families = families_at((1.5, 3.0, 6.0), 1.0, 1.6)
    found = families["guided"]
    assert (found.timesteps[0], found.timesteps[2]) == (lowest, highest.timesteps)
    middle = [0.5 * (low + high) for low, high in zip(lowest, highest.timesteps, strict=True)]
    assert found.timesteps[1] == pytest.approx(middle)  # twice the lowest, half the highest
    for scale, group in groups.items():
        own = group.fitters["guided"]
        with own.evaluator.probing():
            closed = own.fit(found.times(scale)).error
        assert Place(scale, own).run(found).error < 1.5 * closed


def test_a_range_goes_on_from_its_highest_scale_where_that_is_nearer():
    """After a round of both: solvers that were refined one after the other are far nearer on two calls."""
    scales = (1.5, 3.0, 6.0)
    groups = groups_at(scales)
    _, _, families = families_at(scales, 4.0, 1.0, rounds=2)
    found = families["guided"]
    for scale in scales:
        own = groups[scale].fitters["guided"]
        alone = refined_at(groups[scale], 4, 1.0, 2)
        assert Place(scale, own).run(found).error < 1.5 * alone.error


@pytest.mark.parametrize("error", [0.9, 0.5])
def test_a_range_that_fits_its_prompts_more_is_taken_where_it_is_clearly_nearer(error, monkeypatch):
    (_, highest), _, families = families_at((1.5, 3.0, 6.0), 1.0, 1.6)
    begins = [families["guided"], Family(axis_of((1.5, 3.0, 6.0)), (highest.timesteps,) * 3, (highest.rows,) * 3)]
    errors = {id(begins[0]): 1.0, id(begins[1]): error}
    monkeypatch.setattr(guidance, "refined_together", lambda family, *given, **named: family)
    monkeypatch.setattr(guidance, "_run", lambda family, places: errors[id(family)])
    monkeypatch.setattr(guidance, "_score", math.log)
    chosen = guidance._best_refined([*begins, begins[0]], [], 1, None)
    assert chosen is begins[error < 0.7]


def test_a_range_begins_with_the_same_times_where_neighbours_are_too_far_apart(monkeypatch):
    """Solvers may be near at each scale, and the ones between have times that cross."""
    (_, highest), _, _ = families_at((1.5, 3.0, 6.0), 1.0, 1.0)
    crossing = ((1000.0, 990.0, 500.0, 20.0), highest.timesteps, (1000.0, 30.0, 20.0, 10.0))

    def far_apart(axis):
        return Family(axis, crossing, (highest.rows,) * 3)

    monkeypatch.setattr(guidance, "_continued", lambda highest, axis, groups, rounds: far_apart(axis))
    monkeypatch.setattr(guidance, "_smooth", lambda lowest, highest, axis, groups: far_apart(axis))
    _, _, families = families_at((1.5, 3.0, 6.0), 1.0, 1.0)
    assert families["guided"].timesteps == (highest.timesteps,) * 3


def test_a_range_tells_of_its_highest_scale(monkeypatch) -> None:
    """Where errors are largest: what is searched, and what the report tells, are those of a fit at that scale alone.

    Of the same starts: a range has none with more evaluations.
    """
    monkeypatch.setattr("hasten.fitting.leap.BOTH_WAYS", 99)
    settings = {"trials": 4, "rounds": 1}
    held_out = [toy_call(9, guidance_scale=3.0)]
    calls = [toy_call(i, guidance_scale=3.0) for i in range(2)]
    fit = fit_leap(Toy(), calls, [4], guidances=(1.5, 3.0, 5.0), held_out=held_out, **settings)
    shared, table = fit.report["4"], unpacked(fit.tensors)["4"]
    highest = [toy_call(i, guidance_scale=5.0) for i in range(2)]
    own = fit_leap(Toy(), highest, [4], held_out=[toy_call(9, guidance_scale=5.0)], **settings).report["4"]
    judge = fitter(Toy(), highest)
    with judge.evaluator.probing():
        made = judge.exact(table["timesteps_by_scale"][-1], table["guided"][-1])
    assert shared["relative_squared_error"] == pytest.approx(made.relative_squared_error, rel=1e-3)
    assert shared["guidance"] == 5.0
    assert not {"guidance", "by_guidance"} & own.keys()
    assert list(shared["by_guidance"]) == ["1.5", "2.12132", "3", "3.87298", "5"]
    for name, figures in shared["by_guidance"].items():
        scale = float(name)
        part = calls if scale in (1.5, 3.0, 5.0) else calls[:1]  # half of the calls between the scales
        judge = fitter(Toy(), [toy_call(i, guidance_scale=scale) for i in range(len(part))])
        family = Family(axis_of((1.5, 3.0, 5.0)), tuple(map(tuple, table["timesteps_by_scale"])), table["guided"])
        expected = Place(scale, judge).run(family).relative_squared_error
        assert figures["relative_squared_error"] == pytest.approx(expected, rel=0.05), name
    assert shared["by_guidance"]["5"]["relative_squared_error"] == shared["relative_squared_error"]
    for name in ("start", "at_the_start", "plain"):
        assert shared[name] == own[name]
    assert shared["held_out"] == pytest.approx(own["held_out"], rel=1.0)


def test_a_range_begins_at_one_time_where_plain_solvers_begin_at_others():
    """With "leading" spacing: fewer steps begin at less noise, and files with several first times cannot be read."""
    plain = DDIMScheduler(clip_sample=False)
    calls = [toy_call(i, guidance_scale=3.0) for i in range(2)]
    fit = fit_leap(Toy(noise, plain), calls, [2, 3], guidances=(1.5, 3.0, 6.0), rounds=1)
    for table in unpacked(fit.tensors).values():
        assert len({times[0] for times in table["timesteps_by_scale"]}) == 1
    LeapScheduler.of(fit)
    own = fitter(Toy(noise, plain), [toy_call(i, guidance_scale=6.0) for i in range(2)])
    first = [
        starts.Seeker(own, whole).solver(2, 6, 1, False, lambda error: None)[1].timesteps[0] for whole in (False, True)
    ]
    assert first[0] < first[1] == own.references.plain.timesteps[0]
    rows = [[1.0, 0.0], [1.0, 0.0, 0.0]]
    assert Family(Axis((1.0, 3.0)), ((9.0, 5.0), (9.0, 4.0)), (rows,) * 2).is_passable()
    assert not Family(Axis((1.0, 3.0)), ((9.0, 5.0), (8.0, 4.0)), (rows,) * 2).is_passable()


@pytest.mark.parametrize(("calls", "settings"), [(2, {"trials": 4, "rounds": 1}), (4, {"trials": 6, "rounds": 3})])
def test_a_range_is_as_good_between_its_scales_as_at_them(calls, settings):
    scales = (1.5, 3.0, 6.0)
    given = [toy_call(i, guidance_scale=3.0) for i in range(calls)]
    fit = fit_leap(Toy(), given, [4, 5], guidances=scales, **settings)
    for table in unpacked(fit.tensors).values():
        family = Family(axis_of(scales), tuple(map(tuple, table["timesteps_by_scale"])), tuple(table["guided"]))
        errors = {}
        for scale in (1.5, 1.8, 2.12, 2.5, 3.0, 3.6, 4.24, 5.0, 6.0):
            own = fitter(Toy(), [toy_call(9, guidance_scale=scale)])
            errors[scale] = Place(scale, own).run(family).error
        worst = max(errors[scale] for scale in scales)
        assert max(errors.values()) < 4 * worst, errors


def test_a_range_goes_on_with_more_evaluations_as_if_it_had_not_stopped() -> None:
    calls, options = [toy_call(i, guidance_scale=3.0) for i in range(2)], {"guidances": (1.5, 5.0), "rounds": 1}
    whole = fit_leap(Toy(), calls, [3, 4], **options)
    part = fit_leap(Toy(), calls, [3], **options)
    again = fit_leap(Toy(), calls, [3, 4], known=part, **options)
    assert whole.tensors.keys() == again.tensors.keys()
    for name, tensor in whole.tensors.items():
        assert torch.allclose(tensor, again.tensors[name], rtol=1e-6, atol=1e-9), name
    told = fit_leap(Toy(), calls, [4], known=again, held_out=[toy_call(9, guidance_scale=3.0)], **options)
    assert told.report["4"]["held_out"] < 10 * told.report["4"]["relative_squared_error"] + 1e-6
