"""Laws of the predictors: what each is exact on, and what no predictor may depend on."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import draw, make_pipe

import hasten
from hasten.caching.methods.ab_cache import AdamsBashforth
from hasten.caching.methods.dmd import DynamicModes, uniform_stretch
from hasten.caching.methods.foca import FoCaPredictor
from hasten.caching.methods.hicache import AdaptiveHermite
from hasten.caching.methods.spectrum import ChebyshevRidge
from hasten.caching.methods.svdcache import MovingAverage
from hasten.caching.multistep import SOLVERS, Multistep
from hasten.caching.predictors import Hermite, Reuse, Taylor

LINE = {
    "taylor1": Taylor(1),
    "taylor2": Taylor(2),
    "taylor2 divided": Taylor(2, ladder="divided"),
    "foca stored": FoCaPredictor("stored"),
    "ab-cache": AdamsBashforth(3),
    "svd velocity": MovingAverage("velocity", 0.5, 4),
    **{name: Multistep(name) for name in SOLVERS if name != "bdf2-damped"},
}
NOT_LINE = {
    "reuse": Reuse(),
    "hermite": Hermite(1, sigma=0.5),
    "foca author": FoCaPredictor("author"),
    "bdf2-damped": Multistep("bdf2-damped"),
    "svd literal": MovingAverage("literal", 0.5, 4),
}
SPECTRUM = ChebyshevRidge(4, 0.1, 0.5, 8, 50)
EVERY = {**LINE, **NOT_LINE, "foca literal": FoCaPredictor("literal"), "spectrum": SPECTRUM}
# The regression is drawn towards zero by its ridge, so that its weights need not add up to 1.
AVERAGES = {name: predictor for name, predictor in EVERY.items() if name != "spectrum"}

gaps = st.lists(st.integers(1, 9), min_size=3, max_size=5)


def stored_of(steps_between, start=0):
    """StoredSteps, newest first, from the distances between them."""
    return tuple(reversed(np.cumsum([start, *steps_between]).tolist()))


def forecast(predictor, target, stored, function):
    weights = predictor.weights(target, stored)
    assert len(weights) == len(stored)
    return sum(w * function(a) for w, a in zip(weights, stored, strict=True))


@pytest.mark.parametrize("name", AVERAGES)
@given(steps_between=gaps, x=st.integers(1, 9))
def test_a_feature_that_stands_still_is_forecast_exactly(name, steps_between, x):
    stored = stored_of(steps_between)
    assert sum(AVERAGES[name].weights(stored[0] + x, stored)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", LINE)
@given(steps_between=gaps, x=st.integers(1, 9), slope=st.floats(-3, 3))
def test_straight_lines_are_exact_at_any_distances(name, steps_between, x, slope):
    stored = stored_of(steps_between)
    target = stored[0] + x
    assert forecast(LINE[name], target, stored, lambda t: 1 + slope * t) == pytest.approx(1 + slope * target, abs=1e-4)


@given(steps_between=gaps, x=st.integers(1, 9))
def test_focas_recursion_is_exact_on_lines_that_begin_with_adjacent_steps(steps_between, x):
    """It begins with the change from the step before, which is known only between adjacent computed steps."""
    stored = stored_of([1, *steps_between])
    assert forecast(FoCaPredictor("literal"), stored[0] + x, stored, float) == pytest.approx(stored[0] + x, abs=1e-4)


@pytest.mark.parametrize("name", NOT_LINE)
def test_the_others_are_not_exact_on_lines(name):
    """Which is what tells them apart, and is not to change unseen."""
    assert abs(forecast(NOT_LINE[name], 13, (10, 5, 0), float) - 13) > 0.3


@pytest.mark.parametrize("predictor", [Multistep("newton"), AdamsBashforth(3)], ids=["newton", "ab-cache"])
@given(steps_between=gaps, x=st.integers(1, 9))
def test_parabolas_are_exact_for_polynomials_through_three_steps(predictor, steps_between, x):
    stored = stored_of(steps_between)
    target = stored[0] + x
    assert forecast(predictor, target, stored, lambda t: (t - stored[0]) ** 2) == pytest.approx(x**2, abs=1e-6)


@pytest.mark.parametrize("name", [n for n in LINE if n not in ("newton", "ab-cache")])
@pytest.mark.parametrize("stored", [(15, 10, 5, 0), (17, 9, 2, 1)], ids=["even", "uneven"])
def test_parabolas_are_not_exact_for_the_others(name, stored):
    assert abs(forecast(LINE[name], stored[0] + 3, stored, lambda t: (t - stored[0]) ** 2) - 9) > 0.5


@given(spacing=st.integers(1, 8), x=st.integers(1, 8))
def test_taylors_bias_on_parabolas_is_the_known_one(spacing, x):
    """-N x / 2 f'' at even spacing."""
    stored = (2 * spacing, spacing, 0)
    error = forecast(Taylor(2), 2 * spacing + x, stored, lambda t: t**2) - (2 * spacing + x) ** 2
    assert error == pytest.approx(-spacing * x / 2 * 2)


@given(spacing=st.integers(1, 8))
def test_the_literal_relation_of_ab_cache_is_right_one_spacing_ahead(spacing):
    stored = (3 * spacing, 2 * spacing, spacing, 0)
    literal, spaced = AdamsBashforth(3, "literal"), AdamsBashforth(3, "spaced")
    assert literal.weights(4 * spacing, stored) == [3, -3, 1, 0]
    assert spaced.weights(4 * spacing, stored) == pytest.approx([3, -3, 1, 0])
    assert literal.weights(3 * spacing + 1, stored) == [3, -3, 1, 0]


@pytest.mark.parametrize("name", EVERY)
@given(steps_between=gaps, x=st.integers(1, 9), start=st.integers(1, 100))
def test_where_a_run_begins_does_not_matter(name, steps_between, x, start):
    here, there = stored_of(steps_between), stored_of(steps_between, start)
    assert EVERY[name].weights(here[0] + x, here) == pytest.approx(EVERY[name].weights(there[0] + x, there), abs=1e-7)


@pytest.mark.parametrize("name", [n for n in EVERY if n not in ("hermite", "foca literal", "spectrum")])
@given(steps_between=gaps, x=st.integers(1, 9), factor=st.integers(2, 4))
def test_the_unit_of_steps_does_not_matter(name, steps_between, x, factor):
    """All but three: Hermite's scale, FoCa's recursion and Spectrum's span count steps."""
    here = stored_of(steps_between)
    there = tuple(factor * a for a in here)
    assert EVERY[name].weights(here[0] + x, here) == pytest.approx(
        EVERY[name].weights(there[0] + factor * x, there), rel=1e-6, abs=1e-7
    )


@pytest.mark.parametrize("name", [n for n in EVERY if n not in ("reuse", "svd literal", "foca literal", "spectrum")])
@given(steps_between=gaps, x=st.integers(1, 9))
def test_what_rises_is_forecast_to_rise(name, steps_between, x):
    """The trap of counting timesteps downwards: with one sign turned, these go down."""
    stored = stored_of(steps_between)
    assert forecast(EVERY[name], stored[0] + x, stored, lambda t: float(t - stored[0])) > 0


@pytest.mark.parametrize("name", EVERY)
def test_one_stored_step_is_reused(name):
    assert EVERY[name].weights(9, (4,)) == [1.0]


def recursion(values, interval, wrong=0.0):
    """Equations 6 to 8 of FoCa, step by step; `wrong` is added to the last forecast of the first interval."""
    computed = [0, 1, 2, *range(2 + interval, len(values), interval)]
    history, slope = [], 0.0
    for step, value in enumerate(values):
        if step in computed:
            before = [f for f in computed if f < step]
            slope = (value - values[before[-1]]) / (step - before[-1]) if before else 0.0
            history.append(value)
            continue
        f1, f0 = history[-2:]
        there = (3 * (4 / 3 * f0 - f1 / 3 + 2 / 3 * (f0 - f1)) - 4 * f0 + f1) / 2
        history.append(f0 + (slope + there) / 2)
        if step == 1 + interval:
            history[-1] += wrong
    return history


@pytest.mark.parametrize(
    ("interval", "gain"), [(2, 0.5), (3, 0.75), (4, 0.875), (5, 0.9375), (6, 0.96875), (8, 0.9921875)]
)
def test_the_only_recursion_damps_its_errors(interval, gain):
    """FoCa's literal form feeds on its forecasts: an error comes back an interval later, but smaller."""
    values = np.random.default_rng(0).normal(size=3 + 4 * interval).tolist()
    clean, disturbed = recursion(values, interval), recursion(values, interval, wrong=1.0)
    later = [disturbed[1 + k * interval] - clean[1 + k * interval] for k in (1, 2, 3)]
    assert later[0] == pytest.approx(1)
    assert abs(later[1]) == pytest.approx(gain, abs=1e-9)
    assert abs(later[2]) == pytest.approx(gain**2, abs=1e-9)
    assert gain < 1


@pytest.mark.parametrize("interval", [2, 4, 7])
def test_focas_weights_are_its_recursion(interval):
    values = np.random.default_rng(1).normal(size=3 + 4 * interval).tolist()
    history = recursion(values, interval)
    computed = [0, 1, 2, *range(2 + interval, len(values), interval)]
    for step in range(3, len(values)):
        stored = tuple(f for f in reversed(computed) if f < step)
        if step not in computed:
            ours = forecast(FoCaPredictor("literal"), step, stored, lambda a: values[a])
            assert ours == pytest.approx(history[step], abs=1e-8)


# --- spectrum


@pytest.mark.parametrize(("span", "end"), [(50, 50), (1, 24), (20, 24)])
def test_the_regression_agrees_with_scikit_style_normal_equations(span, end):
    steps = np.array([0.0, 3, 7, 12, 20])
    stored = tuple(int(s) for s in steps[::-1])
    target = 24
    phi, here = (
        np.cos(np.outer(np.arccos(np.clip(2 * np.atleast_1d(t) / end - 1, -1, 1)), np.arange(4)))
        for t in (steps, target)
    )
    expected = (here @ np.linalg.inv(phi.T @ phi + 0.05 * np.eye(4)) @ phi.T)[0]
    pure = ChebyshevRidge(3, 0.05, 1.0, 8, span)
    assert pure.weights(target, stored) == pytest.approx(expected[::-1], abs=1e-8)


def test_a_small_ridge_interpolates():
    pure = ChebyshevRidge(4, 1e-10, 1.0, 8, 50)
    assert forecast(pure, 20, (16, 11, 7, 3, 0), lambda t: 0.01 * t**3 - t) == pytest.approx(
        0.01 * 20**3 - 20, rel=1e-4
    )


def test_a_ridge_tames_noise_at_long_horizons():
    stored = (30, 24, 18, 12, 6, 0)
    wild = sum(map(abs, ChebyshevRidge(4, 1e-9, 1.0, 8, 50).weights(40, stored)))
    tame = sum(map(abs, ChebyshevRidge(4, 0.1, 1.0, 8, 50).weights(40, stored)))
    assert tame < 0.2 * wild


@given(steps_between=gaps, x=st.integers(1, 9))
def test_a_run_longer_than_the_span_does_not_explode(steps_between, x):
    stored = stored_of([30, *steps_between])
    weights = ChebyshevRidge(4, 0.1, 1.0, 8, 10).weights(stored[0] + x, stored)
    assert sum(map(abs, weights)) < 10


# --- forecasts from inner products


def gram_of(features):
    stack = np.stack(features).reshape(len(features), -1)
    return stack @ stack.T / stack.shape[1]


def exponentials(rates, stored, target, size=200, seed=0):
    rng = np.random.default_rng(seed)
    modes = rng.normal(size=(len(rates), size))

    def feature(t):
        return sum(rate**t * mode for rate, mode in zip(rates, modes, strict=True))

    return [feature(a) for a in stored], feature(target)


def polynomial(degree, seed=0, size=400):
    """A random feature at steps 0 to 39, `[40, size]`."""
    modes = np.random.default_rng(seed).normal(size=(degree + 1, size))
    return (0.1 * np.arange(40.0)[:, None]) ** np.arange(degree + 1) @ modes


def dynamic(kept, target, stored, ridge=1e-8):
    weights = DynamicModes(5, ridge, Hermite(2)).fitted(target, stored, gram_of(kept))
    return sum(w * f for w, f in zip(weights, kept, strict=True))


def distance(ours, truth):
    return float(np.linalg.norm(ours - truth) / np.linalg.norm(truth))


@pytest.mark.parametrize("x", [1, 2, 4, 7])
def test_dynamic_modes_are_exact_on_sums_of_exponentials(x):
    stored = (16, 12, 8, 4, 0)
    features, truth = exponentials([0.98, 0.9, 0.8], stored, 16 + x)
    ours = dynamic(features, 16 + x, stored, ridge=0.0)
    assert distance(ours, truth) < 1e-4
    straight = sum(w * f for w, f in zip(Taylor(1).weights(16 + x, stored), features, strict=True))
    assert distance(straight, truth) > 10 * distance(ours, truth)


@pytest.mark.parametrize("degree", [0, 1, 2])
@pytest.mark.parametrize("x", [1, 3, 8])
def test_dynamic_modes_follow_polynomials(degree, x):
    """The hard case for the amplitudes: a line has the rate 1 twice, a parabola three times."""
    features, stored = polynomial(degree), (20, 16, 12, 8, 4)
    assert distance(dynamic(features[list(stored)], 20 + x, stored), features[20 + x]) < 1e-3


@pytest.mark.parametrize("noise", [0.01, 0.05])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("stored", "horizons", "bound"),
    [((20, 16, 12, 8, 4), (1, 2, 3, 4), 4), ((20, 19, 18, 17, 16), (1, 2, 4, 6), 8)],
    ids=["within a spacing", "after a long warm-up"],
)
def test_noise_does_not_make_dynamic_modes_explode(noise, seed, stored, horizons, bound):
    """Rates are not clamped; yet the error stays near that of the noise, and below that of a line."""
    rng, smooth = np.random.default_rng(seed), polynomial(2, seed)
    kept = (smooth + noise * smooth.std() * rng.normal(size=smooth.shape))[list(stored)]
    for x in horizons:
        error = distance(dynamic(kept, 20 + x, stored), smooth[20 + x])
        line = sum(w * f for w, f in zip(Taylor(1).weights(20 + x, stored), kept, strict=True))
        assert error < min(bound * noise, distance(line, smooth[20 + x]))


def test_growth_is_followed():
    """A clamp of the rates at 1 would lose a third here."""
    stored = (20, 16, 12, 8, 4)
    features, truth = exponentials([1.05, 0.9], stored, 28)
    assert distance(dynamic(features, 28, stored), truth) < 1e-3


def smooth_features(seed):
    """Three changing modes at steps 0 to 29, `[30, 400]`."""
    modes = np.random.default_rng(seed).normal(size=(3, 400))
    t = np.arange(30.0)[:, None]
    return np.sin(0.1 * t) * modes[0] + 0.95**t * modes[1] + np.cos(0.2 * t) * modes[2]


def by_hicache_pp(kept, horizon):
    theirs = pytest.importorskip("hicache_pp")
    return theirs.dmd_forecast([torch.from_numpy(f).float() for f in kept], horizon).numpy()


def by_cache_dit(kept, horizon):
    theirs = pytest.importorskip("cache_dit.caching.cache_contexts.calibrators.dmd")
    fit = theirs._dmd_fit([torch.from_numpy(f)[None] for f in kept])
    return theirs._dmd_eval(fit, horizon)[0].numpy()


@pytest.mark.parametrize("theirs", [by_hicache_pp, by_cache_dit])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "features", [smooth_features, lambda seed: polynomial(1, seed), lambda seed: polynomial(2, seed)]
)
def test_dynamic_modes_agree_with_other_libraries(theirs, seed, features):
    """Theirs work on the features, ours on their inner products."""
    stored = (20, 16, 12, 8, 4)
    kept = features(seed)[list(stored)]
    for x in (1, 2, 4):
        assert distance(dynamic(kept, 20 + x, stored), theirs(kept[::-1].copy(), x / 4)) < 1e-4


def test_features_that_are_zero_or_not_numbers_fall_back():
    """Blocks that begin at zero give such features; the error or the NaN is then the model's, not ours."""
    predictor, stored = DynamicModes(5, 1e-8, Hermite(2)), (9, 7, 5, 3)
    for value in (0.0, math.nan, math.inf):
        assert predictor.fitted(12, stored, np.full((4, 4), value)) == Hermite(2).weights(12, stored)


def test_uneven_or_short_histories_fall_back():
    assert [uniform_stretch(a) for a in ((9, 7, 5, 3), (9, 7, 5, 0), (9,), (9, 3), (20, 15, 10, 2, 1))] == [
        4,
        3,
        1,
        2,
        3,
    ]
    predictor = DynamicModes(5, 1e-8, Hermite(2))
    gram = np.eye(4)
    assert predictor.fitted(12, (9, 7, 5, 0), gram) == Hermite(2).weights(12, (9, 7, 5, 0))
    assert predictor.fitted(12, (9, 7, 5, 3), gram) != Hermite(2).weights(12, (9, 7, 5, 3))


@settings(max_examples=40)
@given(unit=st.floats(0.01, 100), steps_between=gaps)
def test_an_adaptive_scale_does_not_depend_on_the_unit_of_features(unit, steps_between):
    stored = stored_of(steps_between)[:3]
    features, _ = exponentials([0.97, 0.8], stored, 0)
    predictor = AdaptiveHermite(2, alpha=0.1)
    assert predictor.scale(gram_of(features)) == pytest.approx(predictor.scale(gram_of([unit * f for f in features])))


def test_the_adaptive_scale_never_goes_beyond_the_whole_slope():
    features, _ = exponentials([0.9999], (10, 5, 0), 0)
    predictor = AdaptiveHermite(1)
    assert predictor.fitted(13, (10, 5, 0), gram_of(features)) == pytest.approx(Taylor(1).weights(13, (10, 5, 0)))


def test_a_fast_feature_gets_a_small_scale():
    predictor = AdaptiveHermite(2, alpha=0.1)
    slow, _ = exponentials([0.999], (10, 5, 0), 0)
    fast, _ = exponentials([0.8], (10, 5, 0), 0)
    assert predictor.scale(gram_of(fast)) < predictor.scale(gram_of(slow)) == predictor.sigma_max
    # and by hand: |f(10) - f(5)| / |f(10)| for f = 0.8^t is 0.8^-5 - 1
    q = 0.8**-5 - 1
    single = predictor.scale(gram_of(fast)[:2, :2])
    assert single == pytest.approx(max(0.1 / (math.sqrt(2) * q), 0.1))


@pytest.mark.parametrize("name", ["dmd", "hicache"])
def test_fitted_weights_reach_the_image(name):
    """On a pipeline: the same fixed weights would give another image, and the stored are found again."""
    pipe = make_pipe()
    plain = draw(pipe, 24)
    params = {"dmd": {"warmup": 1}, "hicache": {"scale": "adaptive", "alpha": 0.05, "warmup": 1}}[name]
    with hasten.accelerate(pipe, name, interval=3, **params) as run:
        fitted = draw(pipe, 24)
        assert torch.equal(draw(pipe, 24), fitted)
        assert run.summary().skipped_steps == 16
    with hasten.accelerate(pipe, "hicache", interval=3, warmup=1, sigma=0.7 if name == "dmd" else 0.5):
        fixed = draw(pipe, 24)
    assert not torch.equal(fixed, fitted)
    assert (fitted - plain).norm() < 0.2 * plain.norm()
