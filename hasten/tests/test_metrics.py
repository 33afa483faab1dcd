"""Image metrics: known values, independent implementations, and the faults that they must not have."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from hasten.quality.metrics import Lpips, flip, psnr, relative_l2, ssim, summary_statistics

images = st.integers(0, 2**31).map(lambda seed: torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(seed)))
needs_lpips = pytest.mark.skipif(not Lpips.available(), reason="the lpips extra is not installed")


def disk(side=64):
    y, x = np.mgrid[:side, :side] / side
    inside = ((x - 0.5) ** 2 + (y - 0.5) ** 2) < 0.1
    return torch.tensor(
        np.stack([np.where(inside, x, 0.9), np.where(inside, y, 0.9), np.where(inside, 0.2, 0.9)])
    ).float()


def blurred(image, sigma):
    return torch.from_numpy(gaussian_filter(image.numpy(), (0, sigma, sigma)))


def test_psnr_of_black_against_white_is_zero_and_does_not_wrap():
    assert psnr(torch.zeros(3, 8, 8), torch.ones(3, 8, 8)) == pytest.approx(0)
    assert psnr(torch.full((3, 8, 8), 0.5), torch.full((3, 8, 8), 0.6)) == pytest.approx(20, abs=1e-4)
    assert psnr(disk(), disk()) == math.inf


@settings(max_examples=20, deadline=None)
@given(images, images)
def test_psnr_is_symmetric_and_equals_scikit_images(a, b):
    assume(not torch.equal(a, b))
    assert psnr(a, b) == pytest.approx(psnr(b, a))
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(b.double().numpy(), a.double().numpy(), data_range=1))


def test_ssim_is_one_at_identity_and_equals_scikit_images():
    a, b = disk(), blurred(disk(), 1.0)
    assert ssim(a, a) == pytest.approx(1)
    expected = structural_similarity(
        a.double().numpy(), b.double().numpy(), channel_axis=0, data_range=1.0,
        gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    )  # fmt: skip
    assert ssim(a, b) == pytest.approx(expected)
    small = disk(8)  # smaller than the usual window
    assert 0 < ssim(small, 0.9 * small) < 1


@pytest.mark.parametrize("metric", [flip, pytest.param(lambda a, b: Lpips()(a, b), marks=needs_lpips, id="lpips")])
def test_perceptual_distances_are_zero_at_identity_and_grow_with_blur(metric):
    clean = disk()
    distances = [metric(blurred(clean, sigma), clean) for sigma in (1.0, 2.0, 4.0)]
    assert metric(clean, clean) == pytest.approx(0, abs=1e-6)
    assert 0 < distances[0] < distances[1] < distances[2]


@needs_lpips
def test_lpips_takes_small_images():
    assert Lpips()(disk(32), blurred(disk(32), 2.0)) > 0


@pytest.mark.parametrize("metric", [psnr, ssim, flip])
@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "divide 8-bit"),
        (torch.zeros(8, 8, 3), "shape"),
        (torch.full((3, 8, 8), 255.0), "outside"),
        (torch.full((3, 8, 8), math.nan), "NaN"),
        (torch.zeros(3, 9, 8), "differ in size"),
    ],
)
def test_what_is_not_a_image_in_zero_to_one_is_refused(metric, bad, says):
    with pytest.raises(ValueError, match=says):
        metric(bad, torch.zeros(3, 8, 8))


def test_relative_l2():
    assert relative_l2(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 5.0])) == pytest.approx(math.sqrt(10) / 5)
    assert relative_l2(torch.ones(3), torch.ones(3)) == 0


def test_statistics_hold_only_finite_figures():
    got = summary_statistics([1.0, 2.0, 9.0, math.inf, None])
    assert got["median"] == 5.5  # an identical image is the best one, not a missing one
    assert all(value is None or math.isfinite(value) for value in got.values())
