"""The mathematics of a change of resolution: jumps, noise fields, noise levels, layouts of tokens."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch
from diffusers import AutoencoderTiny, FluxPipeline
from hasten_zoo.emoji_flux.model import PixelVAE
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hasten.errors import ConfigError
from hasten.resolution.layouts import LATENT_PIXELS, PixelLayout
from hasten.resolution.methods.fresco import Fresco
from hasten.resolution.methods.ralu import PRESETS, Stages, fit_stages, mismatch
from hasten.resolution.methods.spectral import switch_level
from hasten.resolution.noise import (
    Rewind,
    anchor_noise,
    dct_enlarge,
    dct_low,
    descend,
    exchange_noise,
    fresh_children,
    fresh_noise,
    image_generators,
    low_noise,
    up,
)
from hasten.resolution.packed import MixedState
from hasten.resolution.positions import TokenSet, flux_ids, pack, unpack
from hasten.resolution.regions import PromotionInput, channel_variance, highest, temporal_variance

HADAMARD = 0.5 * torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def families(fine: Tensor) -> Tensor:
    """`[N, 1, 2, 2]` as `[N, 4]`."""
    return fine.flatten(1)


def moments(children: Tensor, clean: float) -> tuple[Tensor, Tensor]:
    return children.mean(0) - clean, torch.cov(children.T)


# --- jumps


@pytest.mark.parametrize("z", [2.0, 3.0, 6.317])
@pytest.mark.parametrize("sigma", [0.3, 0.5, 0.7, 0.9])
def test_an_exact_jump_keeps_signal_and_white_noise(sigma: float, z: float) -> None:
    rewind, clean = Rewind(sigma, z), 0.7
    parents = (1 - sigma) * clean + sigma * randn(100_000, 1, 1, 1)
    children = families(fresh_children(parents, randn(100_000, 1, 2, 2, seed=1), rewind))
    mean, covariance = moments(children, (1 - rewind.level) * clean)
    assert mean.abs().max() < 0.01
    assert (covariance - rewind.level**2 * torch.eye(4)).abs().max() < 0.01
    stays = rewind.beta * parents.flatten() + rewind.staying * randn(100_000, seed=2)
    assert stays.var().item() == pytest.approx(rewind.level**2, rel=0.02)
    assert rewind.level > sigma


@pytest.mark.parametrize("sigma", [0.3, 0.5, 0.7, 0.9])
def test_the_hadamard_form_is_the_jump_with_the_least_rewind(sigma: float) -> None:
    rewind, clean = Rewind(sigma), -0.4
    parents = (1 - sigma) * clean + sigma * randn(100_000, 1)
    details = rewind.level * randn(100_000, 3, seed=1)
    children = torch.cat([2 / (1 + sigma) * parents, details], 1) @ HADAMARD
    mean, covariance = moments(children, (1 - rewind.level) * clean)
    assert mean.abs().max() < 0.01
    assert (covariance - rewind.level**2 * torch.eye(4)).abs().max() < 0.01


def test_the_printed_hadamard_form_has_the_wrong_norm() -> None:
    sigma = 0.7
    parents = sigma * randn(100_000, 1)
    children = torch.cat([parents, randn(100_000, 3, seed=1)], 1) @ (2 * HADAMARD)
    _, covariance = moments(children, 0.0)
    assert covariance.diagonal().min() > 3
    assert (covariance - covariance.diagonal().diag()).abs().max() > 0.4


@pytest.mark.parametrize(("sigma", "z"), [(0.0, 2.0), (1.0, 2.0), (0.5, 1.9)])
def test_a_jump_that_cannot_be_exact_is_refused(sigma: float, z: float) -> None:
    with pytest.raises(ConfigError, match="jump"):
        Rewind(sigma, z)


@given(sigma=st.floats(0.05, 0.95), level=st.floats(0.0, 1.0))
def test_an_exchange_brings_a_straight_path_to_the_other_noise(sigma: float, level: float) -> None:
    clean, noise = randn(1, 2, 3, 3), randn(1, 2, 6, 6, seed=1)
    low = low_noise(noise)
    state = (1 - sigma) * clean + sigma * low
    stays = exchange_noise(state, low, low, sigma, level)
    assert torch.allclose(stays, (1 - level) * clean + level * low, atol=1e-4)
    promoted = exchange_noise(up(state), up(low), noise, sigma, level)
    assert torch.allclose(promoted, (1 - level) * up(clean) + level * noise, atol=1e-4)


def test_the_exchange_with_low_noise_has_the_fields_own_details_as_hadamard_children() -> None:
    sigma = 0.6
    rewind, parents, noise = Rewind(sigma), randn(1000, 1, 1, 1), randn(1000, 1, 2, 2, seed=1)
    promoted = families(exchange_noise(up(parents), up(low_noise(noise)), noise, sigma, rewind.level))
    details = families(noise) @ HADAMARD
    coefficients = torch.cat([2 / (1 + sigma) * parents.flatten(1), rewind.level * details[:, 1:]], 1)
    assert torch.allclose(promoted, coefficients @ HADAMARD, atol=1e-5)


def test_a_rewind_of_a_mixed_set_hits_the_straight_path_of_the_field() -> None:
    """Tokens that stay coarse, that become fine and that are fine already, all at the same new level."""
    sigma, size = 0.6, (4, 6)
    noise, clean = randn(1, 4, 16, 24).double(), randn(1, 4, 8, 12, seed=1).double()
    old, new = (torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.4 for seed in (2, 3))
    new &= ~old
    low, large = low_noise(noise), up(clean)
    state = MixedState(
        TokenSet(old),
        pack(noise),
        pack((1 - sigma) * clean + sigma * low),
        pack((1 - sigma) * large + sigma * noise),
    )
    promotion = PromotionInput(None, size, pack(clean), [], sigma, lambda: pack(noise))
    level = Fresco(jump="r2").promote(state, new, promotion)
    assert level == 2 * sigma / (1 + sigma)
    assert torch.equal(state.tokens.fine, old | new)
    assert (old.any(), new.any(), (~old & ~new).any()) == (True, True, True)
    fine, coarse = unpack(state.fine, (8, 12)), unpack(state.coarse, size)
    inside = (old | new).repeat_interleave(4, 0).repeat_interleave(4, 1)
    target = (1 - level) * large + level * noise
    assert (fine - target)[..., inside].abs().max() < 1e-6
    assert (coarse - (1 - level) * clean - level * low).abs().max() < 1e-6


def test_independent_noise_misses_the_target_of_the_straight_path() -> None:
    sigma, level = 0.6, 0.75
    beta = (1 - level) / (1 - sigma)
    fresh = math.sqrt(level**2 - beta**2 * sigma**2)
    noise, other = randn(200_000), randn(200_000, seed=1)
    missed = (beta * sigma * noise + fresh * other - level * noise).square().mean().item()
    assert missed == pytest.approx((beta * sigma - level) ** 2 + fresh**2, rel=0.02)
    assert missed == pytest.approx(0.5625, rel=0.02)


def test_the_spectral_jump_keeps_coarse_coefficients_and_white_noise() -> None:
    sigma, noise = 0.6, randn(400, 1, 8, 8)
    coarse = 0.4 * torch.ones(1, 1, 4, 4) + sigma * dct_low(noise)
    fine = dct_enlarge(coarse, noise, sigma)
    level = 2 * sigma / (1 + sigma)
    assert torch.allclose(fine, (1 - level) * torch.ones(1, 1, 8, 8) + level * noise, atol=1e-5)
    assert dct_low(noise).var().item() == pytest.approx(1, rel=0.03)


# --- noise fields


@pytest.mark.parametrize("make", [low_noise, anchor_noise, dct_low])
def test_coarse_noise_is_white_and_unit(make: object) -> None:
    noise = randn(1, 4, 512, 512)
    coarse = make(noise)  # type: ignore[operator]
    assert coarse.shape == (1, 4, 256, 256)
    assert coarse.std().item() == pytest.approx(1, abs=0.01)
    assert abs(coarse.mean().item()) < 0.01
    for along in (2, 3):
        left, right = coarse.narrow(along, 0, 255), coarse.narrow(along, 1, 255)
        assert abs((left * right).mean().item()) < 0.01
    assert torch.equal(coarse, make(noise))  # type: ignore[operator]
    assert not torch.equal(coarse, make(randn(1, 4, 512, 512, seed=1)))  # type: ignore[operator]


def test_noise_of_an_images_own_depends_on_its_seed_and_the_offset_alone() -> None:
    first = randn(3, 4, 8)
    drawn = fresh_noise(image_generators(first), (4, 8), torch.device("cpu"))
    again = fresh_noise(image_generators(first), (4, 8), torch.device("cpu"))
    alone = fresh_noise(image_generators(first[1:2]), (4, 8), torch.device("cpu"))
    assert torch.equal(drawn, again)
    assert torch.equal(drawn[1:2], alone)  # whatever else is in the batch
    later = fresh_noise(image_generators(first, offset=1), (4, 8), torch.device("cpu"))
    others = [drawn[1], drawn[2], later[0], first[0]]
    assert not any(torch.allclose(drawn[0], other, atol=0.1) for other in others)


# --- packing and bookkeeping


def test_enlarging_tokens_enlarges_latent_pixels() -> None:
    latents = randn(2, 16, 8, 12)
    tokens = pack(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 16, 8, 12))
    assert torch.equal(unpack(tokens, (4, 6)), latents)
    large = LATENT_PIXELS.enlarge(tokens, (4, 6))
    assert torch.equal(unpack(large, (8, 12)), up(latents))
    tiled = tokens.unflatten(1, (4, 6)).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    assert not torch.equal(large, tiled)


def test_latents_that_are_rearranged_pixels_are_enlarged_and_averaged_as_pixels() -> None:
    vae, pixels = PixelVAE(), PixelLayout.of(PixelVAE())
    images = randn(2, 3, 16, 24)
    tokens = pack(vae.encode(images).latents)
    assert torch.equal(pixels.to_pixels(tokens, (4, 6)), images)
    assert torch.equal(pixels.to_tokens(images), tokens)

    def decoded(tokens: Tensor, size: tuple[int, int]) -> Tensor:
        return vae.decode(unpack(tokens, size)).sample  # type: ignore[union-attr]

    assert torch.equal(decoded(pixels.enlarge(tokens, (4, 6)), (8, 12)), up(images))
    small = torch.nn.functional.avg_pool2d(images, 2)
    assert torch.equal(decoded(pixels.shrink(tokens, (4, 6)), (2, 3)), small)
    assert not torch.equal(decoded(LATENT_PIXELS.enlarge(tokens, (4, 6)), (8, 12)), up(images))
    assert PixelLayout.of(AutoencoderTiny()) == LATENT_PIXELS


@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_tokens_of_two_sizes_are_kept_apart_and_come_back(rows: int, columns: int, data: st.DataObject) -> None:
    flags = data.draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    tokens = TokenSet(torch.tensor(flags).reshape(rows, columns))
    assert tokens.count == rows * columns + 3 * sum(flags)
    coarse, fine = randn(1, rows * columns, 4), randn(1, 4 * rows * columns, 4, seed=1)
    sequence = tokens.gather(coarse, fine)
    assert sequence.shape[1] == tokens.count
    back = tokens.gather(*tokens.scatter(sequence))
    assert torch.equal(back, sequence)
    assert torch.equal(tokens.collect(tokens.spread(sequence)), sequence)


def test_when_all_tokens_are_fine_the_ids_are_those_of_the_pipeline() -> None:
    tokens = TokenSet(torch.ones(3, 4, dtype=torch.bool))
    native = FluxPipeline._prepare_latent_image_ids(1, 6, 8, torch.device("cpu"), torch.float32)
    assert torch.equal(flux_ids([tokens.image_tokens("hr_units")]), native)
    halved = flux_ids([tokens.image_tokens("lr_units")])
    assert torch.equal(halved * 2, native)
    assert halved.dtype == torch.float32


@given(st.integers(1, 4), st.integers(1, 4), st.randoms(use_true_random=False))
def test_after_any_promotions_the_tokens_are_those_of_the_pipeline(rows: int, columns: int, random: Random) -> None:
    tokens, waiting = TokenSet(torch.zeros(rows, columns, dtype=torch.bool)), list(range(rows * columns))
    while waiting:
        taken = [waiting.pop(random.randrange(len(waiting))) for _ in range(random.randint(1, len(waiting)))]
        fine = tokens.fine.clone()
        fine.flatten()[taken] = True
        tokens = TokenSet(fine)
        assert tokens.count == len(tokens.image_tokens("hr_units").corners) == rows * columns + 3 * int(fine.sum())
    native = FluxPipeline._prepare_latent_image_ids(1, 2 * rows, 2 * columns, torch.device("cpu"), torch.float32)
    ids = flux_ids([tokens.image_tokens("hr_units")])
    assert torch.equal(ids, native)  # in raster order, too
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    assert torch.equal(ids[order][order.argsort()], native)


# --- noise levels


def test_levels_are_those_of_a_shifted_schedule_and_go_on_from_anywhere() -> None:
    whole = descend(1.0, 0.0, 10, 3.0)
    t = torch.linspace(1, 0, 11)
    assert torch.allclose(whole, 3 * t / (1 + 2 * t))
    assert torch.allclose(descend(float(whole[4]), 0.0, 6, 3.0), whole[4:], atol=1e-6)


@pytest.mark.parametrize(("preset", "starts"), [("18", (1.0, 0.9365, 0.8853)), ("10", (1.0, 0.9616, 0.9359))])
def test_stages_of_ralu(preset: str, starts: tuple[float, ...]) -> None:
    stages, _ = PRESETS[preset]
    assert stages.starts == pytest.approx(starts, abs=1e-4)
    levels = stages.levels(0)
    assert len(levels) == sum(stages.steps) + 1
    assert levels[stages.steps[0]].item() == pytest.approx(stages.ends[0], abs=1e-6)
    after = stages.levels(stages.steps[0])
    assert after[0].item() == pytest.approx(starts[1], abs=1e-4)
    assert after[-1] == 0
    assert len(after) == sum(stages.steps[1:]) + 1
    with pytest.raises(ConfigError, match="no stage"):
        stages.levels(1)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_fit_of_stages_is_as_good_as_the_published_ones(preset: str) -> None:
    stages, _ = PRESETS[preset]
    found = fit_stages(stages.steps, stages.ends)
    assert mismatch(found) < mismatch(stages) + 1e-3
    assert found.shifts == pytest.approx(stages.shifts, rel=0.15)


def test_stages_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="as many"):
        Stages((5, 6), (0.5, 0.4, 0.0), (3.0, 3.0), 2.0)
    with pytest.raises(ConfigError, match="last at 0"):
        Stages((5, 6), (0.5, 0.1), (3.0, 3.0), 2.0)
    with pytest.raises(ConfigError, match="below the level"):
        Stages((5, 6, 7), (0.3, 0.9, 0.0), (3.0, 3.0, 3.0), 2.0)


def test_the_spectral_switch_of_flux() -> None:
    """With delta = 0.05 FLUX at 1024 pixels has 28 coarse steps of 50, by its spectrum and its shift."""
    level = switch_level(64, 0.05, (203.615, 1.9155))
    shift = math.exp(1.15)
    sigmas = descend(1.0, 0.0, 50, shift)
    assert abs(int((sigmas[1:] >= level).sum()) - 28) <= 1
    assert switch_level(64, 0.2, (203.615, 1.9155)) < level
    with pytest.raises(ConfigError, match="delta"):
        switch_level(64, 5.0, (203.615, 1.9155))


# --- scores


def test_scores_and_the_choice() -> None:
    still = torch.zeros(1, 4, 3)
    moving = [still.clone() for _ in range(3)]
    for step, tokens in enumerate(moving):
        tokens[:, 2] = step
    assert temporal_variance(moving)[0].tolist() == pytest.approx([0, 0, 2 / 3, 0])
    moving = [tokens.clone() for tokens in moving]
    moving[0][:, 1] = 3  # a token that moved at the beginning only
    assert temporal_variance(moving)[0].tolist() == pytest.approx([0, 2, 2 / 3, 0])
    with pytest.raises(ConfigError, match="2 coarse steps"):
        temporal_variance(moving[:1])
    assert channel_variance(torch.tensor([[[1.0, 3.0], [2.0, 2.0]]]))[0].tolist() == [1, 0]
    taken = torch.tensor([[False, True], [False, False]])
    scores = torch.tensor([[1.0, 9.0, 3.0, 1.0]])
    assert highest(scores, 2, taken).tolist() == [[True, False], [True, False]]
