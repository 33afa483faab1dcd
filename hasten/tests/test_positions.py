"""Positions of mixed tokens: FLUX's ids, and Qwen-Image's rotary factors for the time of one forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedLayer3DRope, QwenEmbedRope
from torch import Tensor

from hasten.errors import AdapterError, ConfigError, UnknownNameError
from hasten.models.rope import PositionProxy, position_proxy, rotary, use_positions
from hasten.resolution.positions import ImageTokens, flux_ids, qwen_positions, token_positions

AXES = [16, 56, 56]
QWEN = "QwenImageTransformer2DModel"


def coarse(rows: int, columns: int, units: Any = "lr_units") -> ImageTokens:
    """Coarse tokens only, on a fine grid of twice the size."""
    corners = 2 * torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return ImageTokens((2 * rows, 2 * columns), corners, units)


@contextmanager
def placed(model: Any, images: list[ImageTokens]) -> Iterator[PositionProxy]:
    """The model with the positions of these tokens."""
    proxy = position_proxy(model, *qwen_positions(images), torch.device("cpu"))
    with use_positions(model, proxy):
        yield proxy


def model_factors(shapes: list[tuple[int, int, int]], text: int) -> tuple[Tensor, Tensor]:
    rope = QwenEmbedRope(theta=10000, axes_dim=AXES, scale_rope=True)
    return rope([shapes], device=torch.device("cpu"), max_txt_seq_len=text)


@pytest.mark.parametrize("sizes", [[(4, 6)], [(5, 7)], [(64, 64), (40, 90)], [(6, 6), (5, 9), (12, 2)]])
def test_uniform_grids_have_the_models_own_positions(sizes: list[tuple[int, int]]) -> None:
    positions, start = qwen_positions([ImageTokens.uniform(*size) for size in sizes])
    images, text = model_factors([(1, *size) for size in sizes], 9)
    torch.testing.assert_close(rotary(positions, AXES, 10000), images, atol=1e-6, rtol=0)
    along = torch.arange(start, start + 9, dtype=torch.float32)[:, None].expand(-1, 3)
    torch.testing.assert_close(rotary(along, AXES, 10000), text, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_coarse_tokens_in_lr_units_have_the_positions_of_a_small_image(size: tuple[int, int]) -> None:
    positions, start = qwen_positions([coarse(*size)])
    small, small_start = qwen_positions([ImageTokens.uniform(*size)])
    assert torch.equal(positions, small)
    assert start == small_start


def test_children_lie_between_their_parent_and_its_neighbour() -> None:
    corners = torch.tensor([[0, 0], [2, 4], [2, 5], [3, 4], [3, 5]])  # one coarse token and four children
    half = token_positions(ImageTokens((4, 6), corners, "lr_units"))
    assert half.tolist() == [[0, 0], [1, 2], [1, 2.5], [1.5, 2], [1.5, 2.5]]
    assert token_positions(ImageTokens((4, 6), corners, "hr_units")).tolist() == corners.tolist()
    assert half.dtype == torch.float32


def test_flux_ids_number_the_images() -> None:
    ids = flux_ids([ImageTokens.uniform(2, 2), coarse(1, 2)])
    assert ids.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0], [1, 0, 1]]
    assert ids.dtype == torch.float32


def test_positions_beyond_bfloat16_are_exact() -> None:
    corners = torch.tensor([[401, 3], [402, 3]])
    ids = flux_ids([ImageTokens((512, 512), corners, "lr_units")])
    assert ids[:, 1].tolist() == [200.5, 201.0]


# --- a forward


def arguments(shapes: list[tuple[int, int, int]], tokens: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(1, tokens, 16, generator=generator)
    return tiny.TINY[QWEN].arguments(hidden, 0.5) | {"img_shapes": [shapes]}


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[(4, 4)], [(4, 4), (4, 6)], [(4, 4), (4, 6), (2, 2)]])
def test_a_forward_with_the_same_positions_is_the_same(sizes: list[tuple[int, int]]) -> None:
    model = tiny.build(QWEN)
    own = model.pos_embed
    called = arguments([(1, *size) for size in sizes], sum(h * w for h, w in sizes))
    plain = tiny.first(model(**called))
    with placed(model, [ImageTokens.uniform(*size) for size in sizes]):
        assert model.pos_embed is not own
        assert torch.equal(tiny.first(model(**called)), plain)
    assert model.pos_embed is own
    assert torch.equal(tiny.first(model(**called)), plain)


@torch.no_grad()
@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_order_of_tokens_does_not_matter(zero_cond_t: bool) -> None:
    torch.manual_seed(0)
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(**tiny.TINY[QWEN].config, zero_cond_t=zero_cond_t).eval()
    corners = torch.cat([coarse(2, 2).corners[1:], torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])])
    reference = ImageTokens.uniform(3, 3)
    tokens = len(corners)
    called = arguments([(1, 1, tokens), (1, 3, 3)], tokens + 9)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
    with placed(model, [ImageTokens((4, 4), corners, "lr_units"), reference]):
        straight = tiny.first(model(**called))[:, :tokens]
    hidden = called["hidden_states"]
    called["hidden_states"] = torch.cat([hidden[:, :tokens][:, order], hidden[:, tokens:]], 1)
    with placed(model, [ImageTokens((4, 4), corners[order], "lr_units"), reference]):
        permuted = tiny.first(model(**called))[:, :tokens]
    torch.testing.assert_close(permuted, straight[:, order], atol=1e-5, rtol=1e-5)
    with placed(model, [ImageTokens((4, 4), corners, "lr_units"), reference]):
        misplaced = tiny.first(model(**called))[:, :tokens]
    assert not torch.allclose(misplaced, straight[:, order], atol=1e-5)


@torch.no_grad()
def test_order_of_tokens_does_not_matter_to_flux() -> None:
    """Mixed tokens in any order, with their ids, have the same results in that order."""
    flux = "FluxTransformer2DModel"
    model = tiny.build(flux)
    corners = torch.cat([coarse(2, 2).corners[1:], torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])])
    hidden = torch.randn(1, len(corners), 4, generator=torch.Generator().manual_seed(3))
    called = tiny.TINY[flux].arguments(hidden, 0.5) | {"img_ids": flux_ids([ImageTokens((4, 4), corners, "lr_units")])}
    straight = tiny.first(model(**called))
    order = torch.randperm(len(corners), generator=torch.Generator().manual_seed(1))
    moved = called | {"hidden_states": hidden[:, order]}
    permuted = tiny.first(model(**moved | {"img_ids": called["img_ids"][order]}))
    torch.testing.assert_close(permuted, straight[:, order], atol=1e-5, rtol=1e-5)
    misplaced = tiny.first(model(**moved))
    assert not torch.allclose(misplaced, straight[:, order], atol=1e-5)


@torch.no_grad()
def test_a_failed_forward_leaves_the_model_as_it_was() -> None:
    model = tiny.build(QWEN)
    own, names = model.pos_embed, [name for name, _ in model.named_modules()]
    called = arguments([(1, 4, 4)], 15)  # one token less than positions
    with pytest.raises(RuntimeError), placed(model, [ImageTokens.uniform(4, 4)]):
        model(**called)
    assert model.pos_embed is own
    assert [name for name, _ in model.named_modules()] == names


def test_other_positions_are_refused() -> None:
    model = tiny.build(QWEN)
    model.pos_embed = QwenEmbedLayer3DRope(theta=10000, axes_dim=[4, 6, 6], scale_rope=True)
    with pytest.raises(AdapterError, match="QwenEmbedLayer3DRope"), placed(model, [ImageTokens.uniform(4, 4)]):
        pass
    with pytest.raises(AdapterError, match="Linear"), placed(torch.nn.Linear(1, 1), [ImageTokens.uniform(4, 4)]):
        pass


def test_bad_images() -> None:
    corners = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ConfigError, match="5x4 tokens cannot be counted"):
        ImageTokens((5, 4), corners, "lr_units")
    with pytest.raises(ConfigError, match="must lie on the fine grid of 4x4"):
        ImageTokens((4, 4), corners + 4, "hr_units")
    with pytest.raises(ConfigError, match=r"\[S, 2\]"):
        ImageTokens((4, 4), corners[0], "hr_units")
    with pytest.raises(UnknownNameError, match="lr_units"):
        ImageTokens((4, 4), corners, "lr_unit")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least one image"):
        qwen_positions([])
    with pytest.raises(ConfigError, match="at least one image"):
        flux_ids([])
    with pytest.raises(ConfigError, match=r"\[S, 3\]"):
        rotary(torch.zeros(4, 2), AXES, 10000)
