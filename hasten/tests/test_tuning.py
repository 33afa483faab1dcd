"""The search of computed steps, alone and on a pipeline."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import draw, make_pipe

import hasten
from hasten.caching.schedule import Explicit, computed_steps, spread
from hasten.errors import CalibrationError, ConfigError, ScheduleError
from hasten.fitting.search import search_steps


def distance(goal):
    return lambda steps: float(sum(abs(a - b) for a, b in zip(steps, goal, strict=True)))


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(1, 29), min_size=3, max_size=6), st.integers(0, 100))
def test_a_smooth_loss_is_followed_to_its_minimum(goal, seed):
    goal = (0, *sorted(goal))
    found = search_steps(spread(len(goal), 30), 30, distance(goal), trials=2000, seed=seed)
    assert found.steps == goal
    assert found.settled
    assert found.loss == 0 <= found.start_loss


def test_no_list_is_looked_at_twice_and_all_of_them_are_valid():
    seen = []

    def loss(steps):
        seen.append(steps)
        return float(sum(steps) % 7)

    found = search_steps((0, 5, 11), 12, loss, trials=40)
    assert len(seen) == len(set(seen)) == found.trials <= 40
    assert all(s[0] == 0 and s[-1] < 12 and list(s) == sorted(set(s)) for s in seen)


def test_trials_run_out():
    found = search_steps((0, 3, 6, 9), 50, distance((0, 20, 30, 40)), trials=5)
    assert found.trials == 5
    assert not found.settled
    assert found.loss < found.start_loss


@pytest.mark.parametrize("start", [(), (1, 2), (0, 5, 5), (0, 30)])
def test_bad_starts_are_refused(start):
    with pytest.raises(ConfigError, match="increasing steps"):
        search_steps(start, 30, lambda steps: 0.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(0, 40), st.floats(0.3, 3.0))
def test_a_spread_has_the_asked_for_steps_and_both_ends(count, more, power):
    total = count + more
    steps = spread(count, total, power)
    assert len(set(steps)) == len(steps) == count
    assert list(steps) == sorted(steps)
    assert (steps[0], steps[-1]) == (0, total - 1)


def call(*seeds):
    return {
        "prompt": ["red apple"] * len(seeds),
        "height": 32,
        "width": 32,
        "max_sequence_length": 8,
        "num_inference_steps": 12,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
    }


def test_tuned_steps_are_better_than_the_spread_they_start_from(tmp_path):
    pipe = make_pipe()
    plain = draw(pipe, 12)
    seen = []
    tuned = hasten.tune_steps(pipe, "taylorseer", [call(0, 1)], [4, 5], trials=25, progress=lambda *a: seen.append(a))
    assert torch.equal(draw(pipe, 12), plain)
    assert {count for count, *_ in seen} == {4, 5}
    for count in (4, 5):
        figures = tuned.report[str(count)]
        assert figures["relative_squared_error"] < figures["at_the_start"]
        assert len(figures["steps"]) == count
        # what is reported is what a run with these steps gives
        with hasten.accelerate(pipe, "taylorseer", steps=figures["steps"], warmup=1):
            fast = draw(pipe, 12, prompt=["red apple"] * 2, generator=call(0, 1)["generator"])
        exact = draw(pipe, 12, prompt=["red apple"] * 2, generator=call(0, 1)["generator"])
        error = float((fast - exact).square().mean() / exact.square().mean())
        assert error == pytest.approx(figures["relative_squared_error"], rel=1e-3)
    path = tuned.save(tmp_path / "steps.safetensors")
    with hasten.accelerate(pipe, "foca", searched=path, interval=3, warmup=2) as run:
        draw(pipe, 12)
        assert [r.step for r in run.records if r.computed] == tuned.report["5"]["steps"]
        with pytest.raises(CalibrationError, match="calibrated for 12 steps, this run has 8"):
            draw(pipe, 8)
    assert hasten.FoCa(searched=tuned, interval=3, warmup=1).plan() == Explicit(tuple(tuned.report["4"]["steps"]))
    assert len(computed_steps(hasten.FoCa(searched=tuned).with_computed_steps(5, 12).plan(), 12)) == 5
    assert hasten.FoCa(schedule="searched", searched=tuned).plan() == hasten.FoCa(searched=tuned).plan()
    with pytest.raises(ConfigError, match="give searched="):
        hasten.FoCa(schedule="searched")
    assert hasten.FoCa(searched=tuned, warmup=1).plan() == Explicit(tuple(tuned.report["4"]["steps"]))  # 4 is fewest
    with pytest.raises(ScheduleError, match="lists were learned for 4, 5"):
        hasten.FoCa(searched=tuned, interval=12, warmup=1)


def test_calls_that_cannot_be_repeated_and_bad_numbers_are_refused():
    pipe = make_pipe()
    unseeded = {k: v for k, v in call(0).items() if k != "generator"}
    with pytest.raises(CalibrationError, match="generator or latents"):
        hasten.tune_steps(pipe, "taylorseer", [unseeded], [4])
    with pytest.raises(CalibrationError, match="nothing to tune on"):
        hasten.tune_steps(pipe, "taylorseer", [], [4])
    with pytest.raises(ConfigError, match=r"computed_steps must be one or more whole numbers from 2 to 11, got \[12\]"):
        hasten.tune_steps(pipe, "taylorseer", [call(0)], [12], trials=2)
    never = {"prompt": "a call was made", "num_inference_steps": 12, "generator": torch.Generator(), "nonsense": 1}
    for method in (hasten.FoCa(schedule="even"), hasten.FoCa(interval=3), hasten.FoCa(computed_steps=4)):
        with pytest.raises(ConfigError, match=r"sets the computed steps of FoCa itself, .*; give it without"):
            hasten.tune_steps(pipe, method, [never], [4])
    draw(pipe, 2)


INTERRUPTED = {
    "tune_steps": lambda pipe, calls, stop: hasten.tune_steps(pipe, "taylorseer", calls, [4], trials=2, progress=stop),
    "tune_method": lambda pipe, calls, stop: hasten.tune_method(pipe, hasten.HiCache(interval=3), calls, progress=stop),
    "fit_leap": lambda pipe, calls, stop: hasten.fit_leap(pipe, calls[:1], [4], held_out=calls[1:], progress=stop),
    "fit_leapcache": lambda pipe, calls, stop: hasten.fit_leapcache(pipe, calls, [[0, 4, 8]], progress=stop),
}


@pytest.mark.parametrize("name", INTERRUPTED)
def test_what_is_cut_short_leaves_the_noise_of_its_calls_as_it_was(name):
    """Or the same calls, given again to go on with, would be others."""
    calls = [call(0, 1), call(2, 3)]  # of fit_leap the second one is held out
    generators = [generator for one in calls for generator in one["generator"]]
    before = [generator.get_state() for generator in generators]
    told = []

    def stop(*done):
        told.append(done)
        if not torch.equal(generators[-1].get_state(), before[-1]):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        INTERRUPTED[name](make_pipe(), calls, stop)
    assert told
    assert all(torch.equal(g.get_state(), state) for g, state in zip(generators, before, strict=True))


def test_a_fit_that_comes_to_its_end_leaves_the_noise_as_it_was_too():
    calls = [call(0, 1), call(2, 3)]
    generators = [generator for one in calls for generator in one["generator"]]
    before = [generator.get_state() for generator in generators]
    hasten.fit_leap(make_pipe(), calls[:1], [4], held_out=calls[1:], trials=1, rounds=0)
    assert all(torch.equal(g.get_state(), state) for g, state in zip(generators, before, strict=True))


# --- parameters by whole runs


def images(*seeds):
    return [{**call(*seeds), "output_type": "pt"}]


def test_a_method_is_tuned_to_the_best_of_its_settings():
    pipe = make_pipe()
    plain = draw(pipe, 12)
    start, values = hasten.HiCache(computed_steps=4), {"sigma": [0.3, 0.7], "order": [0, 1]}
    tuned = hasten.tune_method(pipe, start, images(0, 1), values=values)
    assert torch.equal(draw(pipe, 12), plain)
    assert tuned.settled
    assert tuned.decibels == max(tuned.trials.values()) >= tuned.start
    assert len(tuned.trials) <= 1 + 2 * 3

    def decibels(method):
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        with hasten.accelerate(pipe, method):
            fast = pipe(**images(0, 1)[0] | {"generator": generators})[0]
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        full = pipe(**images(0, 1)[0] | {"generator": generators})[0]
        return float(-10 * (fast - full).square().flatten(1).mean(1).log10().mean())

    assert tuned.decibels == pytest.approx(decibels(tuned.method), abs=1e-3)
    assert tuned.start == pytest.approx(decibels(start), abs=1e-3)
    for sigma, order in ((tuned.method.sigma, 0), (0.3, tuned.method.order), (0.7, tuned.method.order)):
        assert decibels(hasten.HiCache(computed_steps=4, sigma=sigma, order=order)) <= tuned.decibels + 1e-3


def test_what_was_tried_is_not_run_again(monkeypatch):
    pipe, kept = make_pipe(), []
    arguments = (pipe, hasten.TaylorSeer(computed_steps=4), images(0))
    first = hasten.tune_method(*arguments, keep=lambda figures: kept.append(dict(figures)))
    assert kept[-1] == first.trials
    drawn = []
    monkeypatch.setattr(type(pipe), "__call__", _counted(type(pipe).__call__, drawn))
    again = hasten.tune_method(*arguments, known=first.trials)
    assert len(drawn) == 2  # the full run, twice
    assert (again.method, again.decibels) == (first.method, first.decibels)


def _counted(own, drawn):
    def call(self, *args, **kwargs):
        drawn.append(1)
        return own(self, *args, **kwargs)

    return call


def test_hyca_starts_from_the_best_single_solver():
    pipe = make_pipe()
    calls = [call(0)]
    fitted = hasten.calibrate(pipe, "hyca", [{**calls[0], "output_type": "latent"}], clusters=2)
    method = hasten.HyCa(calibration=fitted, computed_steps=4, solvers=("taylor1", "bdf2", "hermite"))
    tuned = hasten.tune_method(pipe, method, images(0))
    single = {
        text: figure for text, figure in tuned.trials.items() if len({*text.split("assigned=")[-1].split("/")}) == 1
    }
    assert len(single) >= 3
    assert tuned.decibels >= max(tuned.trials[text] for text in single)
    assert tuned.method.solvers == method.solvers
    (chosen,) = tuned.method.chosen.values()
    assert {*chosen} <= {*method.solvers}
    assert len(chosen) == 2


def test_settings_that_cannot_work_are_passed_over_and_a_start_that_cannot_is_refused():
    pipe = make_pipe()
    values = {"order": [1], "warmup": [1, 5]}  # a warm-up longer than the computed steps
    tuned = hasten.tune_method(pipe, hasten.TaylorSeer(computed_steps=4, warmup=2), images(0), values=values)
    assert tuned.method.warmup in (1, 2)
    with pytest.raises(ScheduleError):
        hasten.tune_method(pipe, hasten.TaylorSeer(computed_steps=40), images(0))
    with pytest.raises(ConfigError, match=r"FBCache declares no values to try; .*'threshold': .*--try threshold="):
        hasten.tune_method(pipe, "fbcache", images(0))
    with pytest.raises(ConfigError, match="FoCa has no parameter 'sigma' to tune"):
        hasten.tune_method(pipe, "foca", images(0), values={"sigma": [0.3]})


def test_values_that_are_all_refused_are_told_before_the_first_call():
    pipe = make_pipe()
    never = [{"prompt": "a call was made", "generator": torch.Generator(), "output_type": "nonsense"}]
    method = hasten.FoCa(computed_steps=4)
    for values, says in (
        ({"steps": [(0, 4, 8), (0, 3, 7)]}, "values to try for steps can be had: .*steps and computed_steps"),
        ({"form": ["stored"], "interval": [2, 3]}, "none of the values to try for interval .*leave out computed_steps"),
        ({"form": []}, "none of the values to try for form can be had: there are none"),
        ({}, "there are no values to try"),
    ):
        with pytest.raises(ConfigError, match=says):
            hasten.tune_method(pipe, method, never, values=values)
    for values in ({"alpha": [0.1, 0.2]}, {"alpha": [0.1, 0.2], "order": [1]}):
        with pytest.raises(ConfigError, match=r"for alpha can be had: .*alpha=0\.1 does nothing with scale='fixed'"):
            hasten.tune_method(pipe, "hicache", never, values=values)


def test_a_value_may_wait_for_a_change_along_another_axis():
    values = {"alpha": [0.1, 0.2], "scale": ["fixed", "adaptive"]}
    tuned = hasten.tune_method(make_pipe(), hasten.HiCache(computed_steps=4), images(0), values=values, trials=6)
    assert "computed_steps=4:scale=adaptive" in tuned.trials
    assert all("scale=adaptive" in text for text in tuned.trials if "alpha" in text)


def test_settings_that_differ_in_what_does_nothing_are_one_trial():
    pipe = make_pipe()
    fitted = hasten.calibrate(pipe, "svdcache", [{**call(0), "output_type": "latent"}])
    start = hasten.SVDCache(calibration=fitted, computed_steps=4, beta=0.3)
    tuned = hasten.tune_method(pipe, start, images(0))
    assert any("mode=taylor" in text for text in tuned.trials)
    for text in tuned.trials:
        assert ("beta" in text) <= ("mode=taylor" not in text)
        assert ("order" in text) <= ("mode=taylor" in text)


def test_calibrations_are_told_apart_by_their_content():
    pipe = make_pipe()
    recorded = hasten.record(pipe, [{**call(0), "output_type": "latent"}])
    one, other = (hasten.fit(recorded, "svdcache", energy=energy) for energy in (0.9, 0.3))
    start = hasten.SVDCache(calibration=one, computed_steps=4)
    tuned = hasten.tune_method(pipe, start, images(0), values={"calibration": [one, replace(one), other]})
    assert len(tuned.trials) == 2
    assert {one.digest, other.digest} == {text.rpartition("calibration=")[2] for text in tuned.trials}
    assert len({*tuned.trials.values()}) == 2


def test_trials_of_a_method_run_out():
    tuned = hasten.tune_method(make_pipe(), hasten.HiCache(computed_steps=4), images(0), trials=3)
    assert len(tuned.trials) == 3
    assert not tuned.settled
