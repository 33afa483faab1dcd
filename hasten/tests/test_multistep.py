"""Multistep formulas and FoCa: textbook coefficients, exactness, and the recursion that the closed form stands for."""

from fractions import Fraction
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.caching import Uniform, computed_steps
from hasten.caching.methods.foca import FoCa, FoCaPredictor
from hasten.caching.multistep import SOLVERS, Multistep
from hasten.errors import ConfigError

UNIT = {
    "newton": (3, -3, 1),
    "ab2": (Fraction(5, 2), -2, Fraction(1, 2)),
    "rk2": (Fraction(3, 2), 0, Fraction(-1, 2)),
    "bdf2": (Fraction(7, 3), Fraction(-5, 3), Fraction(1, 3)),
    "bdf2-damped": (Fraction(4, 3), Fraction(-1, 3), 0),
    "am2": (Fraction(55, 24), Fraction(-19, 12), Fraction(7, 24)),
}
gaps = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))


def forecast(predictor, target, stored, function):
    return sum(w * function(a) for w, a in zip(predictor.weights(target, stored), stored, strict=True))


@pytest.mark.parametrize("solver", SOLVERS)
def test_unit_steps_have_the_textbook_coefficients(solver):
    assert Multistep(solver).weights(3, (2, 1, 0)) == pytest.approx([float(c) for c in UNIT[solver]])


@given(st.sampled_from([s for s in SOLVERS if s != "bdf2-damped"]), gaps)
def test_straight_lines_are_exact_at_any_gaps(solver, gap):
    g0, g1, x = gap
    stored = (g0 + g1, g1, 0)
    for known in (stored, stored[:2]):
        got = forecast(Multistep(solver), stored[0] + x, known, lambda t: 3.0 - 2.0 * t)
        assert got == pytest.approx(3.0 - 2.0 * (stored[0] + x))


@given(gaps)
def test_newton_is_exact_on_quadratics_at_any_gaps(gap):
    g0, g1, x = gap
    stored = (g0 + g1, g1, 0)
    square = lambda t: 1.0 + t - 0.5 * t * t  # noqa: E731
    assert forecast(Multistep("newton"), stored[0] + x, stored, square) == pytest.approx(square(stored[0] + x))


@given(st.sampled_from([*map(Multistep, SOLVERS), *map(FoCaPredictor, ("stored", "literal", "author"))]), gaps)
def test_constants_are_kept_and_a_short_history_falls_back(predictor, gap):
    g0, g1, x = gap
    stored = (g0 + g1, g1, 0)
    for known in (stored, stored[:2], stored[:1]):
        assert sum(predictor.weights(stored[0] + x, known)) == pytest.approx(1)


def test_the_damped_form_never_moves_more_than_half_a_gap():
    assert Multistep("bdf2-damped").weights(30, (4, 2, 0)) == pytest.approx([1.5, -0.5, 0])


def test_foca_stored_has_the_known_unit_form_and_is_exact_on_lines():
    assert FoCaPredictor("stored").weights(3, (2, 1, 0)) == pytest.approx([2.5, -2, 0.5])
    got = forecast(FoCaPredictor("stored"), 9, (7, 2, 1), lambda t: 4.0 * t)
    assert got == pytest.approx(36)


@pytest.mark.parametrize("make", [partial(FoCaPredictor, "stored"), partial(Multistep, "newton")])
def test_the_gate_makes_the_first_interval_a_straight_line(make):
    free, gated = make(), make(first=2)
    assert free.weights(6, (2, 1, 0))[2] != 0
    assert gated.weights(6, (2, 1, 0)) == pytest.approx([5, -4, 0])
    assert gated.weights(12, (9, 2, 1)) == free.weights(12, (9, 2, 1))
    assert make(first=3).weights(6, (2, 1, 0)) == [1, 0, 0]


def test_uniform_schedules_alone_have_the_gate():
    def weights(**params):
        return FoCa(computed_steps=9, **params).predictors()["whole"].weights(6, (2, 1, 0))

    assert weights() == pytest.approx([5, -4, 0])
    assert weights(schedule="even") == FoCaPredictor("stored").weights(6, (2, 1, 0))


def test_foca_author_is_the_same_for_the_whole_interval():
    assert FoCaPredictor("author").weights(8, (7, 2)) == FoCaPredictor("author").weights(11, (7, 2))
    assert FoCaPredictor("author").weights(8, (7, 2)) == pytest.approx([7 / 6, -1 / 6])


@pytest.mark.parametrize("interval", [2, 4, 7])
def test_foca_literal_equals_its_recursion(interval):
    trajectory = np.random.default_rng(0).normal(size=40).cumsum()
    computed = computed_steps(Uniform(interval, 3), 40)
    values, stored, slope = [], [], 0.0
    predictor = FoCaPredictor("literal")
    for step in range(40):
        if step in computed:
            values.append(trajectory[step])
            if stored:
                slope = (trajectory[step] - trajectory[stored[0]]) / (step - stored[0])
            stored = [step, *stored]
            continue
        newest, before = values[-1], values[-2]
        guess = 4 / 3 * newest - before / 3 + 2 / 3 * (newest - before)
        values.append(newest + 0.5 * (slope + (3 * guess - 4 * newest + before) / 2))
        ours = forecast(predictor, step, stored, lambda t: trajectory[t])
        assert ours == pytest.approx(values[-1], abs=1e-9)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'stored'"):
        FoCa(form="stord")
    with pytest.raises(ConfigError, match="did you mean 'ab2'"):
        Multistep("ab3")
