"""Forecasts: exact where they should be, in the right direction, and equal to what others compute."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.caching import Uniform, computed_steps
from hasten.caching.predictors import Hermite, Reuse, Taylor, difference_ladder, hermite_coefficient
from hasten.caching.sums import weighted_sum
from hasten.errors import ConfigError

stored_lists = st.lists(st.integers(0, 60), min_size=1, max_size=6, unique=True).map(lambda a: sorted(a, reverse=True))
PREDICTORS = [Reuse(), Taylor(0), Taylor(1), Taylor(3), Hermite(1), Hermite(2, sigma=0.7), Taylor(2, ladder="divided")]


def forecast(predictor, target, stored, function):
    stored = stored[: predictor.memory]
    return sum(w * function(a) for w, a in zip(predictor.weights(target, stored), stored, strict=True))


@given(st.sampled_from(PREDICTORS), stored_lists, st.integers(1, 12))
def test_every_predictor_keeps_a_constant(predictor, stored, x):
    stored = stored[: predictor.memory]
    assert sum(predictor.weights(stored[0] + x, stored)) == pytest.approx(1, abs=1e-9)


@given(stored_lists.filter(lambda a: len(a) > 1), st.integers(1, 12), st.floats(-3, 3), st.floats(-3, 3))
def test_taylor_is_exact_on_lines_at_any_gaps(stored, x, slope, offset):
    line = lambda t: offset + slope * t  # noqa: E731
    for predictor in (Taylor(1), Taylor(2), Taylor(2, ladder="divided")):
        assert forecast(predictor, stored[0] + x, stored, line) == pytest.approx(line(stored[0] + x), abs=1e-6)


def test_the_ladders_differ_exactly_as_their_definitions_say():
    square = lambda t: t * t  # noqa: E731
    stored = (7, 2, 1)  # gaps 5 and 1: the boundary of the warm-up at interval 5

    def second(kind):
        row = difference_ladder(stored, 2, ladder=kind)[2]
        return sum(w * square(a) for w, a in zip(row, stored, strict=True))

    assert second("recursive") == pytest.approx(1.2)
    assert second("divided") == pytest.approx(2.0)


def test_taylor_of_order_two_misses_a_quadratic_by_the_known_bias():
    spacing, x = 4, 3
    square = lambda t: t * t  # noqa: E731
    got = forecast(Taylor(2), 12 + x, (12, 8, 4), square)
    assert got - square(12 + x) == pytest.approx(-spacing * x / 2 * 2)


def test_hermite_coefficients_match_the_closed_form_and_the_table():
    for sigma in (0.3, 0.5, 0.71, 1.0):
        for x in (1, 3, 5, 9):
            assert hermite_coefficient(1, x, sigma) == pytest.approx(2 * sigma**2 * x)
            assert hermite_coefficient(2, x, sigma) == pytest.approx(2 * sigma**4 * x**2 - sigma**2)
    assert hermite_coefficient(2, 5, 0.5) == pytest.approx(2.875)
    assert hermite_coefficient(2, 9, 1.0) == pytest.approx(161)
    assert hermite_coefficient(1, 4, 1 / math.sqrt(2)) == pytest.approx(4)


@pytest.mark.parametrize("predictor", [Taylor(1), Hermite(1, sigma=0.5), Hermite(2, sigma=0.5)])
def test_forecasts_move_on_in_the_direction_of_travel(predictor):
    rising = lambda t: float(t)  # noqa: E731
    stored = (9, 4, 2)
    assert forecast(predictor, 12, stored, rising) > rising(9)


def test_differences_wait_for_the_last_warmup_step():
    gated = Taylor(2, first=2)  # warm-up of 3
    assert gated.weights(2, (1, 0)) == [1.0, 0.0]  # step 1 has no difference yet
    assert gated.weights(3, (2, 1, 0)) == [2.0, -1.0, 0.0]  # step 2 has the first
    assert gated.weights(8, (7, 2, 1))[2] != 0  # step 2 + N has the second


def test_order_falls_back_to_what_is_stored_allows():
    assert Taylor(3).weights(4, (2,)) == [1.0]
    assert Hermite(2, sigma=0.5).weights(4, (2, 1)) == pytest.approx([2.0, -1.0])


@pytest.mark.parametrize("bad", [lambda: Taylor(-1), lambda: Hermite(2, sigma=0), lambda: Hermite(2, sigma=1.5)])
def test_impossible_parameters_are_refused(bad):
    with pytest.raises(ConfigError):
        bad()
    with pytest.raises(ConfigError, match="recursive"):
        Taylor(1, ladder="other")


def test_weighted_sum_is_in_float32_and_returns_the_features_dtype():
    torch.manual_seed(0)
    base = torch.randn(4096)
    features = [(base + 1e-3 * k).bfloat16() for k in range(3)]
    weights = [12.34, -23.45, 12.11]
    exact = sum(w * f.double() for w, f in zip(weights, features, strict=True))
    got = weighted_sum(features, weights)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, exact.float().bfloat16()) or (got.double() - exact).abs().max() < 0.01
    kept = features[0].clone()
    weighted_sum(features, [1.0, 0.0, 0.0]).zero_()
    assert torch.equal(features[0], kept)  # the result never shares memory with a stored feature


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_taylor_agrees_with_diffusers_state(order):
    taylor = pytest.importorskip("diffusers.hooks.taylorseer_cache")
    torch.manual_seed(1)
    trajectory = torch.randn(30, 2, 5, 7, dtype=torch.float64).cumsum(0).float()
    computed = set(computed_steps(Uniform(5, 3), 30))
    state = taylor.TaylorSeerState(taylor_factors_dtype=torch.float32, max_order=order)
    predictor, stored, compared = Taylor(order), [], 0
    for step in range(30):
        state.current_step = step
        if step in computed:
            state.update((trajectory[step],))
            stored = [step, *stored][: predictor.memory]
            continue
        ours = weighted_sum([trajectory[a] for a in stored], predictor.weights(step, stored))
        (theirs,) = state.predict()
        assert (ours - theirs).norm() / theirs.norm() < 1e-5
        compared += 1
    assert compared == 30 - len(computed)


@pytest.mark.parametrize(("order", "sigma", "interval"), [(1, 0.5, 4), (2, 0.5, 7), (2, 0.71, 5), (3, 0.3, 6)])
def test_hermite_agrees_with_hicache_pp_at_positive_horizon(order, sigma, interval):
    pp = pytest.importorskip("hicache_pp.hermite")
    torch.manual_seed(2)
    trajectory = torch.randn(40, 3, 11, dtype=torch.float64).cumsum(0).float()
    state = pp.hicache_init(40, interval=interval, max_order=order, first_enhance=3, sigma=sigma)
    predictor, stored, compared = Hermite(order, sigma=sigma), [], 0
    for step in range(40):
        state["step"] = step
        if pp.hicache_decide(state) == "full":
            pp.hicache_update_derivatives(state, trajectory[step])
            stored = [step, *stored][: predictor.memory]
            continue
        ours = weighted_sum([trajectory[a] for a in stored], predictor.weights(step, stored))
        theirs = pp.hicache_forecast(state)
        assert (ours - theirs).norm() / theirs.norm() < 1e-5
        compared += 1
    assert stored[0] == computed_steps(Uniform(interval, 3), 40)[-1]
    assert compared > 20
