"""Splits of features: bands (FreqCa), subspaces (SVD-Cache), clusters of channels (HyCa)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import draw

import hasten
from hasten.caching.methods.freqca import Bands, low_mask
from hasten.caching.methods.hyca import ChannelClusters, descriptors
from hasten.caching.methods.svdcache import Subspace
from hasten.caching.sums import finite, weighted_sum
from hasten.errors import ConfigError
from hasten.models import TokenLayout
from hasten.pipeline.transforms import dct_matrix

GRIDS = [(4, 4), (3, 7), (1, 6), (2, 3, 5), (16, 16)]


def tokens(count, batch=2, width=6, seed=0):
    return torch.randn(batch, count, width, generator=torch.Generator().manual_seed(seed))


def basis(width, k):
    return torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(1)))[0][:, :k]


def projectors(grid):
    count = math.prod(grid)
    labels = torch.arange(6) % 3
    return count, [
        Bands(TokenLayout(grid), "dct", 0.3),
        Bands(TokenLayout(grid), "fft", 0.3),
        Subspace(basis(6, 2)),
        ChannelClusters(labels, 3),
    ]


def low(bands, field):
    """The low band of tokens."""
    return bands.combine([field], {"low": [1.0], "high": [0.0]})


@pytest.mark.parametrize("grid", GRIDS)
def test_parts_add_up_and_are_projections(grid):
    """Completeness (the parts of F add up to F), idempotence, and orthogonality of different parts."""
    count, every = projectors(grid)
    feature = tokens(count)
    for projector in every:
        parts = {}
        for part in projector.components:
            only = {name: [1.0 if name == part else 0.0] for name in projector.components}
            parts[part] = projector.combine([feature], only)
            assert torch.allclose(projector.combine([parts[part]], only), parts[part], atol=1e-5)
            for other in projector.components:
                if other != part:
                    away = {name: [1.0 if name == other else 0.0] for name in projector.components}
                    assert projector.combine([parts[part]], away).abs().max() < 1e-5
        assert torch.allclose(sum(parts.values()), feature, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
def test_equal_weights_in_all_parts_are_the_whole(grid):
    count, every = projectors(grid)
    features, weights = [tokens(count, seed=i) for i in range(3)], [1.5, -0.7, 0.2]
    whole = weighted_sum(features, weights)
    for projector in every:
        assert torch.allclose(
            projector.combine(features, dict.fromkeys(projector.components, weights)), whole, atol=1e-5
        )


@pytest.mark.parametrize("wide", ["one channel", "all channels"])
@pytest.mark.parametrize("split", ["subspace", "dct", "fft"])
def test_an_overflow_of_float16_is_clipped_and_spoils_nothing_else(split, wide):
    """A forecast of 12e4 is the largest number there is; what is summed on the way to it is larger still."""
    newest, older = torch.full((1, 256, 64), 100.0), torch.full((1, 256, 64), 100.0)
    channels = slice(1) if wide == "one channel" else slice(None)
    newest[..., channels], older[..., channels] = 4e4, -4e4
    features = [newest.half(), older.half()]
    if split == "subspace":
        directions = torch.eye(64)[:, :2] if wide == "one channel" else torch.full((64, 1), 1 / 8)
        projector, moving, still = Subspace(directions), "principal", "residual"
    else:
        projector, moving, still = Bands(TokenLayout((16, 16)), split, 0.1), "low", "high"
    forecast = finite(projector.combine(features, {moving: [2.0, -1.0], still: [1.0, 0.0]}))
    assert forecast.isfinite().all()
    assert torch.allclose(forecast[..., channels].float(), torch.tensor(65504.0), rtol=2e-3)
    others = forecast[..., 1:] if wide == "one channel" else forecast[..., :0]
    assert torch.allclose(others.float(), torch.tensor(100.0), atol=0.5)


@pytest.mark.parametrize("grid", GRIDS)
def test_splits_in_float16_are_those_in_float32(grid):
    """Also where a coefficient of the transform is more than float16 holds."""
    count, every = projectors(grid)
    features = [4e4 + 100 * tokens(count, seed=i) for i in range(2)]
    for projector in every[:3]:
        names = projector.components
        weights = {names[0]: [0.5, 0.4], names[1]: [1.0, -0.9]}
        exact = projector.combine([f.half().float() for f in features], weights)
        assert (projector.combine([f.half() for f in features], weights).float() - exact).abs().max() < 80


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_dct_matrix_agrees_with_scipy(n):
    fft = pytest.importorskip("scipy.fft")
    x = np.random.default_rng(0).normal(size=n)
    assert np.allclose(dct_matrix(n).numpy() @ x, fft.dct(x, norm="ortho"), atol=1e-5)
    assert torch.allclose(dct_matrix(n) @ dct_matrix(n).T, torch.eye(n), atol=1e-5)


@pytest.mark.parametrize("grid", [(8, 8), (4, 6), (3, 4, 5)])
def test_low_band_agrees_with_scipy(grid):
    fft = pytest.importorskip("scipy.fft")
    field = tokens(math.prod(grid), 1, 2)
    ours = low(Bands(TokenLayout(grid), "dct", 0.4), field)[0].unflatten(0, grid)
    spectrum = fft.dctn(field[0].unflatten(0, grid).numpy(), axes=range(len(grid)), norm="ortho")
    theirs = fft.idctn(spectrum * low_mask(grid, 0.4).numpy()[..., None], axes=range(len(grid)), norm="ortho")
    assert np.allclose(ours.numpy(), theirs, atol=1e-5)


def test_a_square_grids_mask_is_the_papers():
    """sqrt(u^2 + v^2) <= 0.1 sqrt(2) (H - 1)."""
    u, v = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    assert torch.equal(low_mask((32, 32), 0.1), ((u**2 + v**2).sqrt() <= 0.1 * math.sqrt(2) * 31 + 1e-9).float())


def test_a_constant_image_is_all_low_and_a_checkerboard_all_high():
    grid = (8, 8)
    flat = torch.ones(1, 64, 1)
    board = ((torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1).reshape(1, 64, 1)
    for split in ("dct", "fft"):
        bands = Bands(TokenLayout(grid), split, 0.1)
        assert torch.allclose(low(bands, flat), flat, atol=1e-5)
    assert low(Bands(TokenLayout(grid), "dct", 0.1), board).abs().max() < 0.1


def test_tokens_outside_the_image_are_forecast_whole():
    bands = Bands(TokenLayout((2, 3), offset=4), "dct", 0.5)
    features = [tokens(12, seed=i) for i in range(2)]
    out = bands.combine(features, {"low": [1.0, 0.0], "high": [2.0, -1.0]})
    whole = weighted_sum(features, [2.0, -1.0])
    outside = [0, 1, 2, 3, 10, 11]
    assert torch.allclose(out[:, outside], whole[:, outside])
    assert not torch.allclose(out[:, 4:10], whole[:, 4:10])


def test_too_few_tokens_for_the_grid_are_refused():
    with pytest.raises(ConfigError, match="4x4 grid"):
        Bands(TokenLayout((4, 4)), "dct", 0.1).combine([tokens(8)], {"low": [1.0], "high": [1.0]})


def test_sums_of_parts_are_in_float32():
    features = [tokens(16).to(torch.bfloat16), tokens(16, seed=1).to(torch.bfloat16)]
    weights = [9.0, -8.0]
    for projector in projectors((4, 4))[1]:
        out = projector.combine(features, dict.fromkeys(projector.components, weights))
        exact = weighted_sum([f.double() for f in features], weights)
        assert out.dtype == torch.bfloat16
        assert (out.double() - exact).abs().max() <= exact.abs().max() * 2**-8


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=9, max_size=9))
def test_channel_clusters_weigh_each_channel_by_its_cluster(numbers):
    table = np.asarray(numbers).reshape(3, 3)
    labels = torch.tensor([2, 0, 1, 1, 0, 2])
    features = [tokens(5, seed=i) for i in range(3)]
    out = ChannelClusters(labels, 3).combine(features, {f"cluster{c}": list(table[c]) for c in range(3)})
    for channel, cluster in enumerate(labels.tolist()):
        column = sum(w * f[..., channel] for w, f in zip(table[cluster], features, strict=True))
        assert torch.allclose(out[..., channel], column, atol=1e-4)


def test_descriptors_tell_smooth_channels_from_noisy_ones():
    t = torch.linspace(0, 1, 24)[None, :, None, None]
    smooth = t * torch.randn(1, 1, 10, 4, generator=torch.Generator().manual_seed(0))
    noisy = torch.randn(1, 24, 10, 4, generator=torch.Generator().manual_seed(1))
    table = descriptors(torch.cat([smooth, noisy], -1))
    assert table.shape == (8, 10)
    assert torch.isfinite(table).all()
    gap = (table[:4].mean(0) - table[4:].mean(0)).abs()
    assert gap.max() > 1.5


# --- freqca on a pipeline


def test_equal_orders_in_both_bands_are_hicache(pipe):
    """With the same predictor in both bands nothing is split."""
    with hasten.accelerate(pipe, "hicache", interval=3, sigma=0.71, domain="normed"):
        whole = draw(pipe)
    for split, low in (("dct", {"low_order": 2}), ("fft", {"low_order": 2}), ("none", {})):
        with hasten.accelerate(pipe, "freqca", interval=3, split=split, **low):
            assert torch.allclose(draw(pipe), whole, atol=1e-4)


def test_the_cutoff_goes_from_forecast_to_reuse(pipe):
    with hasten.accelerate(pipe, "reuse", interval=3):
        reused = draw(pipe)
    with hasten.accelerate(pipe, "freqca", interval=3, cutoff=1.0):
        assert torch.allclose(draw(pipe), reused, atol=1e-4)
    with hasten.accelerate(pipe, "freqca", interval=3, cutoff=0.3):
        assert not torch.allclose(draw(pipe), reused, atol=1e-3)


def test_freqca_takes_images_that_are_not_square(pipe):
    plain = draw(pipe, height=32, width=64)
    with hasten.accelerate(pipe, "freqca", interval=3) as run:
        fast = draw(pipe, height=32, width=64)
        assert run.summary().skipped_steps > 0
    assert 0 < (fast - plain).norm() / plain.norm() < 0.2
