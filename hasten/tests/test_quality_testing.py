"""p-values, bounds and procedures: exact where there is an exact answer; their promised error by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hasten.errors import ConfigError, UnknownNameError
from hasten.quality import testing
from hasten.quality.tolerance import TIERS, Tolerance, measured, tier

LEVEL = 0.1


@given(st.integers(1, 400), st.floats(0.01, 0.99), st.data())
def test_the_p_value_of_a_share_is_the_binomial_test_of_scipy(requests, share, data):
    within = data.draw(st.integers(0, requests))
    expected = stats.binomtest(within, requests, share, alternative="greater").pvalue
    assert testing.share_p_value(within, requests, share) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@given(st.integers(1, 400), st.floats(0.6, 0.99), st.data())
def test_the_bound_of_a_share_is_that_of_clopper_and_pearson(requests, confidence, data):
    within = data.draw(st.integers(1, requests))
    expected = stats.beta.ppf(1 - confidence, within, requests - within + 1)
    assert testing.share_lower_bound(within, requests, confidence) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("share", "level"), [(0.95, 0.1), (0.9, 0.05), (0.5, 0.3)])
def test_the_fewest_requests_and_the_most_failures_are_where_the_test_turns(share, level):
    fewest = testing.fewest_for_share(share, level)
    assert testing.share_p_value(fewest, fewest, share) <= level < testing.share_p_value(fewest - 1, fewest - 1, share)
    most = testing.most_failures(200, share, level)
    assert testing.share_p_value(200 - most, 200, share) <= level < testing.share_p_value(199 - most, 200, share)


@pytest.mark.parametrize("draw", [
    lambda rng, n: (rng.random(n) < 0.1).astype(float),  # all or nothing
    lambda rng, n: rng.beta(0.5, 4.5, n),
    lambda rng, n: np.full(n, 0.1),
])  # fmt: skip
def test_the_mean_test_rejects_a_true_hypothesis_as_seldom_as_it_says(draw):
    """The mean is exactly the bound, so that every rejection is wrong."""
    rng = np.random.default_rng(0)
    wrong = [testing.mean_p_value(draw(rng, 200), 0.1, LEVEL) <= LEVEL for _ in range(400)]
    assert np.mean(wrong) <= LEVEL + 3 * np.sqrt(LEVEL * (1 - LEVEL) / 400)


def test_the_mean_test_sees_what_is_well_below_the_bound_and_its_bound_covers():
    rng = np.random.default_rng(1)
    assert np.mean([testing.mean_p_value(rng.beta(1, 49, 150), 0.08) <= LEVEL for _ in range(50)]) > 0.9
    bounds = [testing.mean_upper_bound(rng.beta(1, 9, 150), 0.9) for _ in range(200)]
    assert np.mean(np.array(bounds) < 0.1) <= LEVEL + 3 * np.sqrt(LEVEL * (1 - LEVEL) / 200)
    assert np.median(bounds) < 0.2
    fewest = testing.fewest_for_mean(0.05, LEVEL)
    assert testing.mean_p_value([0.0] * (fewest - 1), 0.05, LEVEL) > LEVEL


@pytest.mark.parametrize("procedure", [testing.fixed_sequence, testing.holm])
@pytest.mark.parametrize("shares", [(0.99, 0.97, 0.9), (0.9, 0.9, 0.9), (0.9, 0.99, 0.9), (0.99, 0.9, 0.5)])
def test_one_wrong_claim_or_more_is_as_rare_as_the_level(procedure, shares):
    """Settings keep with these true shares and fail together (one latent difficulty); 0.9 does not keep 0.95."""
    rng = np.random.default_rng(2)
    wrong = 0
    for _ in range(600):
        difficulty = rng.random(120)
        p_values = [testing.share_p_value(int((difficulty < share).sum()), 120, 0.95) for share in shares]
        passed = procedure(p_values, LEVEL)
        wrong += any(yes and share < 0.95 for yes, share in zip(passed, shares, strict=True))
    assert wrong / 600 <= LEVEL + 3 * np.sqrt(LEVEL * (1 - LEVEL) / 600)


def test_a_sequence_stops_at_the_first_failure_and_holm_corrects():
    assert testing.fixed_sequence([0.05, 0.09, 0.2, 0.01], LEVEL) == [True, True, False, False]
    assert testing.holm([0.06, 0.03, 0.2, 0.01], LEVEL) == [False, True, False, True]


@pytest.mark.parametrize("values", [(5, 4, 0.5), (1, 2, 1.0), (1, 2, 0.0)])
def test_no_test_without_sense(values):
    with pytest.raises(ValueError, match="no test"):
        testing.share_p_value(*values)


def test_a_tolerance_is_kept_if_every_bound_is():
    tolerance = Tolerance(max_lpips=0.02, min_psnr=30)
    assert tolerance.kept({"lpips": 0.02, "psnr": 30.0})
    assert not tolerance.kept({"lpips": 0.021, "psnr": 50.0})
    assert not tolerance.kept({"lpips": 0.0, "psnr": 29.9})
    assert tolerance.strain({"lpips": 0.01, "psnr": 20.0}) == pytest.approx(10)
    assert TIERS["lossless"].strain({"lpips": 0.02, "psnr": 30.0}) > TIERS["high"].strain({"lpips": 0.02, "psnr": 30.0})


def test_a_mean_is_bounded_metric_by_metric():
    tolerance = Tolerance(max_lpips=0.1, min_psnr=10, share=None)
    good = [{"lpips": 0.01, "psnr": 25.0}] * 60
    assert tolerance.p_value(good) <= LEVEL
    assert tolerance.p_value([{"lpips": 0.01, "psnr": 9.0}] * 60) > LEVEL
    assert tolerance.p_value([{"lpips": 0.12, "psnr": 25.0}] * 60) > LEVEL
    bound = tolerance.bound(good)
    assert 0.01 < bound["lpips"] < 0.1
    assert 10 < bound["psnr"] < 25
    assert tolerance.fewest < 60
    assert not tolerance.hopeless([{"lpips": 1.0, "psnr": 1.0}] * 60, 60)  # means are tested in the end


def test_a_broken_tolerance_is_noticed_and_a_kept_one_is_not():
    tolerance = Tolerance(min_psnr=30, share=0.9)
    rng = np.random.default_rng(3)

    def worst(failing):
        values = [{"psnr": 20.0 if rng.random() < failing else 40.0} for _ in range(150)]
        return min(tolerance.broken_p_value(values[:n], 0.01) for n in range(1, 151))

    assert np.mean([worst(0.1) <= 0.01 for _ in range(100)]) <= 0.05  # looked at after every call
    assert np.mean([worst(0.4) <= 0.01 for _ in range(20)]) > 0.9


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_looking_after_every_call_makes_false_alarms_no_more_frequent(share):
    """The true share is the one that is promised, so that every alarm is false."""
    tolerance, level = Tolerance(min_psnr=30, share=share), 0.01
    rng = np.random.default_rng(4)
    runs = [[{"psnr": 40.0 if rng.random() < share else 20.0} for _ in range(300)] for _ in range(500)]
    looks = [[tolerance.broken_p_value(run[:n], level) for n in range(1, 101)] for run in runs[:3]]
    assert all(found == sorted(found, reverse=True) for found in looks)  # so that the last look is as good as all
    wrong = np.mean([tolerance.broken_p_value(run, level) <= level for run in runs])
    assert wrong <= level + 3 * np.sqrt(level * (1 - level) / len(runs))


@pytest.mark.parametrize(("params", "message"), [
    ({}, "needs a bound"),
    ({"max_lpips": 0}, "max_lpips must be"),
    ({"max_lpips": 0.1, "share": 1.0}, "share must be"),
    ({"min_psnr": 30, "confidence": 0.4}, "confidence must be"),
])  # fmt: skip
def test_bad_tolerances_are_refused(params, message):
    with pytest.raises(ConfigError, match=message):
        Tolerance(**params)


def test_tiers_are_named():
    with pytest.raises(UnknownNameError, match="lossless"):
        tier("losless")


def test_metrics_are_those_that_are_bounded():
    import torch

    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = measured(Tolerance(min_psnr=30, min_ssim=0.5, max_flip=0.1), image, image)
    assert found == {"psnr": 100.0, "ssim": pytest.approx(1.0), "flip": pytest.approx(0.0, abs=1e-6)}
    clip = torch.stack([image, 1 - image])
    assert measured(Tolerance(min_psnr=30), clip, torch.stack([image, image]))["psnr"] < 60
