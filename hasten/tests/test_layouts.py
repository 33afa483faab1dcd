"""Where the tokens of the image lie: families at sizes that are not square, and reference images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from denoisers.checks import DENOISERS
from denoisers.images import positions
from diffusers import ChromaPipeline, Flux2Pipeline, FluxPipeline, LTXPipeline, QwenImagePipeline
from diffusers.modular_pipelines.flux3.before_denoise import _prepare_image_ids
from torch import Tensor

from hasten import models
from hasten.errors import AdapterError, UnknownNameError
from hasten.models import BlockStack, ModelAdapter, TokenLayout, layout_of
from hasten.models.blocks import hidden_in, hidden_of

Pack = Callable[[Tensor], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """What a latent of a given shape has to become.

    Attributes:
        latent: its shape, before it is packed.
        grid: in tokens.
        pixel: index of a latent pixel, in all channels.
        token: the place of that pixel in the grid.
        pack: makes the transformer's arguments out of the latent, as the pipeline does.
        offset: tokens before the image.
    """

    latent: tuple[int, ...]
    grid: tuple[int, ...]
    pixel: Any
    token: tuple[int, ...]
    pack: Pack
    offset: int = 0


def plain(latent: Tensor) -> dict[str, Any]:
    return {"hidden_states": latent}


def flux(pipeline: Any) -> Pack:
    def pack(latent: Tensor) -> dict[str, Any]:
        height, width = latent.shape[2:]
        ids = pipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32)
        return {"hidden_states": pipeline._pack_latents(latent[:, :1], 1, 1, height, width), "img_ids": ids}

    return pack


def flux2(latent: Tensor) -> dict[str, Any]:
    return {"hidden_states": Flux2Pipeline._pack_latents(latent), "img_ids": Flux2Pipeline._prepare_latent_ids(latent)}


def flux3(latent: Tensor) -> dict[str, Any]:
    return {"hidden_states": tokens(latent), "img_ids": _prepare_image_ids(*latent.shape[2:], 1.0)}


def qwen(latent: Tensor) -> dict[str, Any]:
    height, width = latent.shape[2:]
    packed = QwenImagePipeline._pack_latents(latent, 1, 4, height, width)
    return {"hidden_states": packed, "img_shapes": [[(1, height // 2, width // 2)]]}


def ltx(latent: Tensor) -> dict[str, Any]:
    frames, height, width = latent.shape[2:]
    packed = LTXPipeline._pack_latents(latent)
    return {"hidden_states": packed, "num_frames": frames, "height": height, "width": width}


def tokens(latent: Tensor) -> Tensor:
    """Latents `[1, C, H, W]` as tokens `[1, N, C]`."""
    return latent.flatten(2).transpose(1, 2)


def ideogram(latent: Tensor) -> dict[str, Any]:
    height, width = latent.shape[2:]
    count = tiny.TEXT + height * width
    return {
        "hidden_states": torch.cat([torch.zeros(1, tiny.TEXT, 4), tokens(latent)], 1),
        "encoder_hidden_states": randn(1, count, 24),
        "position_ids": positions(tiny.TEXT, height, width)[None].long() + 7,
        "segment_ids": torch.ones(1, count, dtype=torch.long),
        "indicator": torch.tensor([[3] * tiny.TEXT + [2] * height * width]),
    }


def krea(latent: Tensor) -> dict[str, Any]:
    return {"hidden_states": tokens(latent), "position_ids": positions(tiny.TEXT, *latent.shape[2:])}


def animate(latent: Tensor) -> dict[str, Any]:
    frames, height, width = latent.shape[2:]
    return {
        "hidden_states": latent,
        "pose_hidden_states": randn(1, 4, frames - 1, height, width),
        "face_pixel_values": randn(1, 3, 4 * (frames - 1), 16, 16),
    }


def animate_2(latent: Tensor) -> dict[str, Any]:
    grid = [latent.shape[1], latent.shape[2] // 2, latent.shape[3] // 2]
    more = {"condition_latents": [randn(*latent.shape)], "offset_grid_sizes": torch.tensor([grid])}
    return {"hidden_states": [latent], "seq_len": math.prod(grid), **more}


def kandinsky(latent: Tensor) -> dict[str, Any]:
    frames, height, width = latent.shape[1:4]
    return {"hidden_states": latent, "visual_rope_pos": list(map(torch.arange, (frames, height // 2, width // 2)))}


PACKED = {"latent": (1, 4, 6, 10), "grid": (3, 5), "pixel": np.s_[0, :, 2, 7], "token": (1, 3)}
IMAGE = Case(**PACKED, pack=plain)
VIDEO = Case((1, 4, 3, 6, 10), (3, 3, 5), np.s_[0, :, 2, 3, 6], (2, 1, 3), plain)
FINE = {"latent": (1, 4, 3, 6, 10), "grid": (3, 6, 10), "pixel": np.s_[0, :, 2, 3, 6], "token": (2, 3, 6)}
CASES = {
    "FluxTransformer2DModel": Case(**PACKED, pack=flux(FluxPipeline)),
    "Flux2Transformer2DModel": Case((1, 4, 3, 5), (3, 5), np.s_[0, :, 1, 3], (1, 3), flux2, offset=tiny.TEXT),
    "Flux3Transformer2DModel": Case((1, 4, 3, 5), (3, 5), np.s_[0, :, 1, 3], (1, 3), flux3),
    "QwenImageTransformer2DModel": Case(**PACKED, pack=qwen),
    "HunyuanVideoTransformer3DModel": VIDEO,
    "HunyuanVideo15Transformer3DModel": Case(**FINE, pack=plain),
    "WanTransformer3DModel": VIDEO,
    "SD3Transformer2DModel": IMAGE,
    # This one draws squares only.
    "DiTTransformer2DModel": Case((1, 4, 8, 8), (4, 4), np.s_[0, :, 2, 7], (1, 3), plain),
    "PixArtTransformer2DModel": IMAGE,
    "LTXVideoTransformer3DModel": Case(**FINE, pack=ltx),
    "CogVideoXTransformer3DModel": Case((1, 3, 4, 6, 10), (3, 3, 5), np.s_[0, 2, :, 3, 6], (2, 1, 3), plain),
    "ZImageTransformer2DModel": Case((4, 1, 6, 10), (3, 5), np.s_[:, 0, 2, 7], (1, 3), lambda latent: {"x": [latent]}),
    "ChromaTransformer2DModel": Case(**PACKED, pack=flux(ChromaPipeline), offset=tiny.TEXT),
    "CogView4Transformer2DModel": IMAGE,
    "MochiTransformer3DModel": VIDEO,
    "HunyuanDiT2DModel": Case((1, 4, 8, 8), (4, 4), np.s_[0, :, 2, 7], (1, 3), plain),
    "HunyuanImageTransformer2DModel": Case((1, 4, 6, 10), (6, 10), np.s_[0, :, 2, 7], (2, 7), plain),
    "Ideogram4Transformer2DModel": Case((1, 4, 3, 5), (3, 5), np.s_[0, :, 1, 3], (1, 3), ideogram, offset=tiny.TEXT),
    "Krea2Transformer2DModel": Case((1, 4, 3, 5), (3, 5), np.s_[0, :, 1, 3], (1, 3), krea, offset=tiny.TEXT),
    "SkyReelsV2Transformer3DModel": VIDEO,
    "CosmosTransformer3DModel": VIDEO,
    "WanAnimateTransformer3DModel": Case((1, 12, 3, 6, 10), (3, 3, 5), np.s_[0, :, 2, 3, 6], (2, 1, 3), animate),
    "WanAnimate2Transformer3DModel": Case((4, 3, 6, 10), (3, 3, 5), np.s_[:, 2, 3, 6], (2, 1, 3), animate_2),
    "Kandinsky5Transformer3DModel": Case((1, 3, 6, 10, 4), (3, 3, 5), np.s_[0, 2, 3, 6], (2, 1, 3), kandinsky),
    "Kandinsky6Transformer3DModel": Case((1, 3, 6, 10, 4), (3, 3, 5), np.s_[0, 2, 3, 6], (2, 1, 3), kandinsky),
    "LTX2VideoTransformer3DModel": Case(**FINE, pack=ltx),
    "SanaTransformer2DModel": Case((1, 4, 6, 10), (6, 10), np.s_[0, :, 2, 7], (2, 7), plain),
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=CASES)
def family(request):
    return request.param, tiny.build(request.param, DENOISERS[request.param]), CASES[request.param]


def arguments(name: str, case: Case, latent: Tensor) -> dict[str, Any]:
    return DENOISERS[name].arguments(latent, 0.5) | case.pack(latent)


@torch.no_grad()
def at_blocks(model: Any, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What the last stack is given, and what the hidden site records: `[N, D]` of the first image."""
    stack = models.find(model).used(model)[-1]
    seen: dict[str, Tensor] = {}
    blocks = stack.blocks(model)
    handles = [
        blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(first=hidden_of(stack, blocks[0], args, kwargs).clone()),
            with_kwargs=True,
        ),
        blocks[-1].register_forward_hook(lambda _, args, output: seen.update(last=hidden_in(stack, output))),
    ]
    model(**given)
    for handle in handles:
        handle.remove()
    return seen["first"][0], seen["last"][0]


def test_every_known_family_says_where_its_tokens_lie():
    told = {name for name, adapter in models.registered().items() if adapter.layout and name in DENOISERS}
    elsewhere = {"HunyuanVideoFramepackTransformer3DModel", "WanVACETransformer3DModel", "SanaVideoTransformer3DModel"}
    assert set(CASES) == told - elsewhere  # which are in test_variants
    assert set(tiny.TINY) <= set(CASES)


def test_the_grid_is_what_was_given_and_lies_inside_what_is_recorded(family):
    name, model, case = family
    given = arguments(name, case, randn(*case.latent))
    layout = layout_of(model, models.find(model), given)
    assert layout == TokenLayout(case.grid, case.offset)
    _, recorded = at_blocks(model, given)
    assert layout.offset + math.prod(layout.grid) <= len(recorded)
    if not isinstance(given.get("x"), list):  # Z-Image pads
        assert layout.offset + math.prod(layout.grid) == len(recorded)


def test_a_pixel_changes_its_own_token_most(family):
    """The tokens that leave the patch embedding (and the first of two stacks) are in row-major order."""
    name, model, case = family
    latent = randn(*case.latent)
    given = arguments(name, case, latent)
    layout = layout_of(model, models.find(model), given)
    changed = latent.clone()
    changed[case.pixel] += 3
    change = at_blocks(model, arguments(name, case, changed))[0] - at_blocks(model, given)[0]
    expected = layout.offset + int(np.ravel_multi_index(case.token, layout.grid))
    assert int(change.norm(dim=-1).argmax()) == expected


def test_a_patch_of_several_frames_is_one_token():
    model = tiny.build("CogVideoXTransformer3DModel")
    model.register_to_config(patch_size_t=2)
    layout = layout_of(model, models.find(model), {"hidden_states": randn(1, 4, 4, 6, 10)})
    assert layout == TokenLayout((2, 3, 5))


# --- reference images, and frames that a clip is conditioned on


def grid_ids(number: int, height: int, width: int, axes: int = 3) -> Tensor:
    ids = torch.zeros(height, width, axes)
    ids[..., 0] = number
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)
    return ids.flatten(0, 1)


def flux_layout(ids: Tensor, name: str = "FluxTransformer2DModel") -> TokenLayout:
    model = tiny.build(name)
    return layout_of(model, models.find(model), {"img_ids": ids, "encoder_hidden_states": randn(1, tiny.TEXT, 32)})


def test_reference_images_of_flux_lie_outside():
    own, reference = grid_ids(0, 3, 5), grid_ids(1, 4, 2)
    assert flux_layout(torch.cat([own, reference])) == TokenLayout((3, 5))


def test_reference_images_of_flux2_lie_outside_wherever_they_are():
    own, first, second = grid_ids(0, 3, 5, 4), grid_ids(10, 4, 2, 4), grid_ids(20, 2, 2, 4)
    name = "Flux2Transformer2DModel"
    assert flux_layout(torch.cat([own, first, second])[None], name) == TokenLayout((3, 5), tiny.TEXT)
    assert flux_layout(torch.cat([first, second, own])[None], name) == TokenLayout((3, 5), tiny.TEXT + 12)


def test_without_single_blocks_no_text_comes_first():
    name = "Flux2Transformer2DModel"
    model = tiny.build(name)
    model.single_transformer_blocks = torch.nn.ModuleList()
    layout = layout_of(
        model, models.find(model), {"img_ids": grid_ids(0, 3, 5, 4), "encoder_hidden_states": randn(1, 7, 32)}
    )
    assert layout == TokenLayout((3, 5))


@pytest.mark.parametrize("shape", [(300, 4), (4, 300), (1, 5), (5, 1), (1, 1)])
def test_positions_in_bfloat16_are_read_right(shape):
    """bfloat16 rounds 257 to 256, and the pipelines make their positions in the model's dtype."""
    assert flux_layout(grid_ids(0, *shape).bfloat16()) == TokenLayout(shape)


@pytest.mark.parametrize(
    "shapes",
    [
        [[(1, 3, 5), (1, 4, 2), (1, 2, 2)]] * 2,
        [(1, 3, 5), (1, 3, 5)],  # the ControlNet pipelines leave out the inner list
    ],
)
def test_reference_images_of_qwen_image_lie_outside(shapes):
    model = tiny.build("QwenImageTransformer2DModel")
    assert layout_of(model, models.find(model), {"img_shapes": shapes}) == TokenLayout((3, 5))


def clip_coordinates(frames: int, height: int, width: int, first: int) -> Tensor:
    """As LTXConditionPipeline makes them: pixels, the first frame of a clip counting for one, seconds in time."""
    t, y, x = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    t = (8 * t - 7).clamp(min=0) + first
    return torch.stack([t / 25, 32.0 * y, 32.0 * x]).flatten(1)[None]


@pytest.mark.parametrize("conditions", [[], [(1, 16)], [(2, 8), (1, 40)]])
def test_conditioning_frames_of_ltx_lie_outside(conditions):
    coordinates = [clip_coordinates(frames, 3, 5, first) for frames, first in conditions]
    coordinates.append(clip_coordinates(4, 3, 5, 0))
    model = tiny.build("LTXVideoTransformer3DModel")
    layout = layout_of(model, models.find(model), {"video_coords": torch.cat(coordinates, dim=2)})
    assert layout == TokenLayout((4, 3, 5), 15 * sum(frames for frames, _ in conditions))


# --- what cannot be read is refused


def test_an_unknown_layout_is_refused_with_the_remedy():
    model = tiny.build("FluxTransformer2DModel")
    for host in (None, ModelAdapter(stacks=())):
        with pytest.raises(
            AdapterError, match=r"models\.register\('FluxTransformer2DModel', ModelAdapter\(\.\.\., layout="
        ):
            layout_of(model, host, {})


def test_a_layout_of_another_name_is_refused():
    with pytest.raises(UnknownNameError, match="Did you mean 'latent'"):
        ModelAdapter(stacks=(BlockStack("blocks"),), layout="latents")


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("FluxTransformer2DModel", "img_ids"),
        ("QwenImageTransformer2DModel", "img_shapes"),
        ("LTXVideoTransformer3DModel", "num_frames"),
        ("WanTransformer3DModel", "hidden_states"),
        ("ZImageTransformer2DModel", "x"),
    ],
)
def test_a_missing_argument_is_named(name, missing):
    model = tiny.build(name)
    with pytest.raises(AdapterError, match=f"without '{missing}'"):
        layout_of(model, models.find(model), {missing: None})


@pytest.mark.parametrize(
    "ids",
    [
        grid_ids(0, 3, 5)[:-1],  # a token is missing
        grid_ids(0, 3, 5).unflatten(0, (3, 5)).transpose(0, 1).flatten(0, 1),  # columns first
        grid_ids(0, 3, 5)[torch.randperm(15, generator=torch.Generator().manual_seed(0))],
        grid_ids(1, 3, 5),
        torch.cat([grid_ids(0, 3, 5), grid_ids(1, 2, 2), grid_ids(0, 3, 5)]),
    ],
    ids=["cut", "columns first", "shuffled", "references only", "two targets"],
)
def test_positions_that_are_no_grid_are_refused(ids):
    with pytest.raises(AdapterError, match="expected"):
        flux_layout(ids)


def test_images_of_several_sizes_in_a_batch_are_refused():
    model = tiny.build("ZImageTransformer2DModel")
    host = models.find(model)
    with pytest.raises(AdapterError, match="one size"):
        layout_of(model, host, {"x": [randn(4, 1, 6, 10), randn(4, 1, 10, 6)]})
    with pytest.raises(AdapterError, match="several latents"):
        layout_of(model, host, {"x": [[randn(4, 1, 6, 10), randn(4, 1, 6, 10)]]})
    model = tiny.build("QwenImageTransformer2DModel")
    with pytest.raises(AdapterError, match="one size"):
        layout_of(model, models.find(model), {"img_shapes": [[(1, 3, 5)], [(1, 5, 3)]]})
