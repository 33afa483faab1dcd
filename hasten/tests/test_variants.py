"""Pipelines that edit images, fill them in or set them in motion, on transformers that share a family's entry.

Each runs through its own diffusers pipeline, with random weights, prompt embeddings instead of text encoders and a
tiny autoencoder: interval 1 is the plain pipeline bit by bit, a skipped step runs no block, removal is exact, and the
layout is the grid of the image (or clip) that is being made, whatever else is in the sequence.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import tiny
import torch
from diffusers import CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler, SCMScheduler
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image
from test_engine import leftovers
from test_families import count_work
from torch import Tensor, nn
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

import hasten
from hasten import LeapScheduler, fit_leap, models
from hasten.caching import Uniform, computed_steps
from hasten.errors import HastenWarning
from hasten.models import TokenLayout
from hasten.models import registry as host_registry
from hasten.models.blocks import hidden_in

pipeline_qwenimage_edit_plus = pytest.importorskip(  # not in diffusers 0.35
    "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus"
)

SLOW = pytest.mark.slow
SITES = ["hidden", pytest.param("output", marks=SLOW), pytest.param("module", marks=SLOW)]
STEPS = 8
INTERVAL = 3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def image(height: int, width: int, seed: int = 3) -> Tensor:
    """Noise in [0, 1], `[1, 3, H, W]`."""
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def build(name: str, family: str | None = None, **changes: Any) -> nn.Module:
    """A tiny transformer whose configuration differs from its family's; every zero-initialised weight has a value."""
    torch.manual_seed(0)
    config = tiny.TINY[family or name].config | changes
    model = getattr(diffusers, name)(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


def assemble(name: str, **parts: Any) -> Any:
    """A pipeline of these parts; the others are None."""
    cls = getattr(diffusers, name)
    needed = [p for p in inspect.signature(cls.__init__).parameters.values() if p.name != "self"]
    missing = {p.name: None for p in needed if p.default is p.empty and p.name not in parts}
    pipe = cls(**missing, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def autoencoder(name: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    return getattr(diffusers, name)(**config).eval()


# --- autoencoders


def image_vae(channels: int = 4) -> nn.Module:
    """A latent for each pixel."""
    return autoencoder(
        "AutoencoderKL",
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        norm_num_groups=1,
        latent_channels=channels,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def flux2_vae() -> nn.Module:
    """A latent for 4x4 pixels, of 4 channels; the pipelines make patches of 2x2 of them."""
    return autoencoder(
        "AutoencoderKLFlux2",
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4),
        norm_num_groups=1,
        latent_channels=4,
    )


def qwen_vae() -> nn.Module:
    """A latent for 4x4 pixels."""
    return autoencoder(
        "AutoencoderKLQwenImage",
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def wan_vae() -> nn.Module:
    """A latent for 4 frames of 8x8 pixels."""
    return autoencoder(
        "AutoencoderKLWan",
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def hunyuan_vae() -> nn.Module:
    """A latent for 4 frames of 8x8 pixels."""
    return autoencoder(
        "AutoencoderKLHunyuanVideo",
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )


def ltx_vae() -> nn.Module:
    """A latent for 4 frames of 4x4 pixels."""
    return autoencoder(
        "AutoencoderKLLTXVideo",
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )


def cogvideox_vae() -> nn.Module:
    """A latent for 4 frames of 8x8 pixels."""
    return autoencoder(
        "AutoencoderKLCogVideoX",
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )


def sana_vae() -> nn.Module:
    """A latent for 2x2 pixels."""
    return autoencoder(
        "AutoencoderDC",
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )


# --- pipelines


@dataclass(frozen=True)
class Variant:
    """A pipeline, a call of it, and what is expected.

    Attributes:
        make: builds the pipeline.
        call: arguments beside the number of steps, the generator and the kind of output.
        layout: of the first forward.
        runs: for each transformer the steps of its runs, in order.
    """

    make: Callable[[], Any]
    call: dict[str, Any]
    layout: TokenLayout
    runs: dict[str, tuple[int, ...]] = field(default_factory=lambda: {"transformer": (STEPS,)})


def flow(**config: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, **config)


def flux(pipeline: str, **config: Any) -> Callable[[], Any]:
    def make() -> Any:
        transformer = build("FluxTransformer2DModel", **{"in_channels": 16, "out_channels": 16, **config})
        return assemble(pipeline, transformer=transformer, vae=image_vae(), scheduler=flow())

    return make


def qwen(pipeline: str) -> Callable[[], Any]:
    def make() -> Any:
        return assemble(pipeline, transformer=build("QwenImageTransformer2DModel"), vae=qwen_vae(), scheduler=flow())

    return make


def wan(
    pipeline: str, transformer: str, experts: int = 1, config: dict[str, Any] | None = None, **settings: Any
) -> Any:
    def make() -> Any:
        names = ("transformer", "transformer_2")[:experts]
        models = {name: build(transformer, "WanTransformer3DModel", **(config or {})) for name in names}
        return assemble(pipeline, **models, vae=wan_vae(), scheduler=flow(), **settings)

    return make


def hunyuan(condition: str, in_channels: int) -> Callable[[], Any]:
    def make() -> Any:
        transformer = build("HunyuanVideoTransformer3DModel", in_channels=in_channels, image_condition_type=condition)
        return assemble(
            "HunyuanVideoImageToVideoPipeline", transformer=transformer, vae=hunyuan_vae(), scheduler=flow()
        )

    return make


def framepack() -> Any:
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    transformer = build(
        "HunyuanVideoFramepackTransformer3DModel",
        "HunyuanVideoTransformer3DModel",
        has_image_proj=True,
        image_proj_dim=16,
        has_clean_x_embedder=True,
    )
    return assemble(
        "HunyuanVideoFramepackPipeline",
        transformer=transformer,
        vae=hunyuan_vae(),
        scheduler=flow(),
        image_encoder=SiglipVisionModel(vision).eval(),
        feature_extractor=SiglipImageProcessor(size={"height": 28, "width": 28}),
    )


def ltx(pipeline: str) -> Callable[[], Any]:
    def make() -> Any:
        transformer = build("LTXVideoTransformer3DModel")
        return assemble(pipeline, transformer=transformer, vae=ltx_vae(), scheduler=flow())

    return make


def flux2(pipeline: str) -> Callable[[], Any]:
    def make() -> Any:
        transformer = build("Flux2Transformer2DModel", in_channels=16, out_channels=16)
        return assemble(pipeline, transformer=transformer, vae=flux2_vae(), scheduler=flow())

    return make


def cogvideox() -> Any:
    transformer = build("CogVideoXTransformer3DModel", in_channels=8)
    return assemble(
        "CogVideoXImageToVideoPipeline",
        transformer=transformer,
        vae=cogvideox_vae(),
        scheduler=CogVideoXDDIMScheduler(),
    )


def sd3(pipeline: str, channels: int, in_channels: int) -> Callable[[], Any]:
    def make() -> Any:
        transformer = build("SD3Transformer2DModel", in_channels=in_channels, out_channels=channels)
        return assemble(pipeline, transformer=transformer, vae=image_vae(channels), scheduler=flow())

    return make


def sana() -> Any:
    transformer = build("SanaTransformer2DModel", guidance_embeds=True)
    return assemble("SanaSprintImg2ImgPipeline", transformer=transformer, vae=sana_vae(), scheduler=SCMScheduler())


def sana_video() -> Any:
    transformer = build(
        "SanaVideoTransformer3DModel", "SanaTransformer2DModel", num_layers=4, patch_size=(1, 2, 2), sample_size=8
    )
    return assemble("SanaImageToVideoPipeline", transformer=transformer, vae=wan_vae(), scheduler=flow())


SMALL = {"height": 12, "width": 20}
CLIP = {"height": 48, "width": 80, "num_frames": 5}
FLUX_TEXT = {"prompt_embeds": randn(1, tiny.TEXT, 32), "pooled_prompt_embeds": randn(1, 32, seed=1)}
MASK = torch.zeros(1, 1, 12, 20).index_fill_(3, torch.arange(10), 1.0)
TEXT = {"prompt_embeds": randn(1, tiny.TEXT, 32)}
GUIDED = {**TEXT, "negative_prompt_embeds": randn(1, tiny.TEXT, 32, seed=1)}
QWEN_TEXT = {**TEXT, "prompt_embeds_mask": torch.ones(1, tiny.TEXT, dtype=torch.long), "true_cfg_scale": 1.0}
MASKED_TEXT = {**TEXT, "prompt_attention_mask": torch.ones(1, tiny.TEXT, dtype=torch.long)}
SQUARE = Image.effect_noise((64, 64), 60).convert("RGB")
STILL = Image.effect_noise((80, 48), 60).convert("RGB")
SEVEN_OF_TEN = {"transformer": (7,)}

VARIANTS = {
    "flux image to image": Variant(
        flux("FluxImg2ImgPipeline"),
        {**FLUX_TEXT, **SMALL, "image": image(12, 20), "strength": 0.7, "num_inference_steps": 10},
        TokenLayout((6, 10)),
        SEVEN_OF_TEN,
    ),
    "flux inpaint": Variant(
        flux("FluxInpaintPipeline"),
        {
            **{**FLUX_TEXT, **SMALL, "image": image(12, 20), "mask_image": MASK},
            **{"strength": 0.7, "num_inference_steps": 10},
        },
        TokenLayout((6, 10)),
        SEVEN_OF_TEN,
    ),
    "flux kontext": Variant(
        flux("FluxKontextPipeline"),
        {**FLUX_TEXT, **SMALL, "image": image(16, 8), "max_area": 12 * 20, "_auto_resize": False},
        TokenLayout((6, 10)),
    ),
    "flux fill": Variant(
        flux("FluxFillPipeline", in_channels=16 + 16 + 4),
        {**FLUX_TEXT, **SMALL, "image": image(12, 20), "mask_image": MASK},
        TokenLayout((6, 10)),
    ),
    "flux control": Variant(
        flux("FluxControlPipeline", in_channels=32),
        {**FLUX_TEXT, **SMALL, "control_image": image(12, 20)},
        TokenLayout((6, 10)),
    ),
    "flux2 with reference images": Variant(
        flux2("Flux2Pipeline"),
        {**TEXT, "height": 48, "width": 80, "image": [SQUARE, SQUARE]},
        TokenLayout((6, 10), tiny.TEXT),
    ),
    "flux2 klein with a reference image": Variant(
        flux2("Flux2KleinPipeline"),
        {**TEXT, "height": 48, "width": 80, "image": SQUARE, "guidance_scale": 1.0},
        TokenLayout((6, 10), tiny.TEXT),
    ),
    # The first step reads the reference image, whose tokens come first; the others reuse its keys and values.
    "flux2 klein with remembered keys of a reference image": Variant(
        flux2("Flux2KleinKVPipeline"),
        {**TEXT, "height": 48, "width": 80, "image": SQUARE},
        TokenLayout((6, 10), tiny.TEXT + 8 * 8),
    ),
    "qwen image to image": Variant(
        qwen("QwenImageImg2ImgPipeline"),
        {**QWEN_TEXT, "height": 48, "width": 80, "image": STILL, "strength": 0.7, "num_inference_steps": 10},
        TokenLayout((6, 10)),
        SEVEN_OF_TEN,
    ),
    "qwen edit": Variant(
        qwen("QwenImageEditPipeline"),
        {**QWEN_TEXT, "height": 48, "width": 80, "image": STILL},
        TokenLayout((6, 10)),
    ),
    "qwen edit plus": Variant(
        qwen("QwenImageEditPlusPipeline"),
        {**QWEN_TEXT, "height": 48, "width": 80, "image": [STILL, STILL.rotate(90, expand=True)]},
        TokenLayout((6, 10)),
    ),
    "wan image to video": Variant(
        wan("WanImageToVideoPipeline", "WanTransformer3DModel", config={"in_channels": 12}),
        {**GUIDED, **CLIP, "image": STILL},
        TokenLayout((2, 3, 5)),
    ),
    "wan 2.2 image to video": Variant(
        wan(
            "WanImageToVideoPipeline",
            "WanTransformer3DModel",
            experts=2,
            config={"in_channels": 12},
            boundary_ratio=0.7,
        ),
        {**GUIDED, **CLIP, "image": STILL, "num_inference_steps": 16},
        TokenLayout((2, 3, 5)),
        {"transformer": (9,), "transformer_2": (7,)},
    ),
    "wan 2.2 with a timestep for each token": Variant(
        wan("WanImageToVideoPipeline", "WanTransformer3DModel", expand_timesteps=True),
        {**GUIDED, **CLIP, "image": STILL},
        TokenLayout((2, 3, 5)),
    ),
    "wan vace": Variant(
        wan(
            "WanVACEPipeline",
            "WanVACETransformer3DModel",
            config={"vace_layers": [0, 2], "vace_in_channels": 2 * 4 + 64},
        ),
        {**GUIDED, **CLIP, "video": [STILL] * 5, "reference_images": [STILL]},
        TokenLayout((3, 3, 5)),
    ),
    "hunyuan image to video": Variant(
        hunyuan("latent_concat", 9),
        {**FLUX_TEXT, **MASKED_TEXT, **CLIP, "image": STILL},
        TokenLayout((2, 3, 5)),
    ),
    "hunyuan image to video by replaced tokens": Variant(
        hunyuan("token_replace", 4),
        {**FLUX_TEXT, **MASKED_TEXT, **CLIP, "image": STILL},
        TokenLayout((2, 3, 5)),
    ),
    # History: 2 frames whole, 2 at half and 16 at a quarter of the resolution.
    "framepack": Variant(
        framepack,
        {**FLUX_TEXT, **MASKED_TEXT, **CLIP, "num_frames": 17, "latent_window_size": 3, "image": STILL},
        TokenLayout((3, 3, 5), 2 * 15 + 1 * 2 * 3 + 4 * 1 * 2),
        {"transformer": (STEPS, STEPS)},
    ),
    "ltx image to video": Variant(
        ltx("LTXImageToVideoPipeline"),
        {**MASKED_TEXT, "height": 32, "width": 64, "num_frames": 5, "image": STILL, "guidance_scale": 1.0},
        TokenLayout((2, 8, 16)),
    ),
    "ltx condition": Variant(
        ltx("LTXConditionPipeline"),
        {
            **{**MASKED_TEXT, "height": 32, "width": 64, "num_frames": 9, "guidance_scale": 1.0},
            "conditions": [LTXVideoCondition(STILL, frame_index=i) for i in (0, 4)],
        },
        TokenLayout((3, 8, 16), 128),
    ),
    "cogvideox image to video": Variant(
        cogvideox,
        {**GUIDED, **CLIP, "image": STILL},
        TokenLayout((2, 3, 5)),
    ),
    "sd3 image to image": Variant(
        sd3("StableDiffusion3Img2ImgPipeline", 4, 4),
        {
            **{**FLUX_TEXT, "guidance_scale": 1.0, "height": 12, "width": 16, "image": image(12, 16)},
            **{"strength": 0.7, "num_inference_steps": 10},
        },
        TokenLayout((6, 8)),
        SEVEN_OF_TEN,
    ),
    "sd3 inpaint": Variant(
        sd3("StableDiffusion3InpaintPipeline", 16, 16 + 1 + 16),
        {
            **{**FLUX_TEXT, "guidance_scale": 1.0, "height": 12, "width": 16, "image": image(12, 16)},
            **{"mask_image": MASK[..., :16], "strength": 0.7, "num_inference_steps": 10},
        },
        TokenLayout((6, 8)),
        SEVEN_OF_TEN,
    ),
    "sana image to image": Variant(
        sana,
        {
            **{**MASKED_TEXT, "height": 32, "width": 64, "image": image(32, 64), "use_resolution_binning": False},
            **{"strength": 0.7, "num_inference_steps": 10, "intermediate_timesteps": None},
        },
        TokenLayout((16, 32)),
        SEVEN_OF_TEN,
    ),
    "sana image to video": Variant(
        sana_video,
        {
            **{**GUIDED, "height": 32, "width": 64, "frames": 5, "image": STILL, "use_resolution_binning": False},
            "prompt_attention_mask": MASKED_TEXT["prompt_attention_mask"],
            "negative_prompt": None,
            "negative_prompt_attention_mask": MASKED_TEXT["prompt_attention_mask"],
        },
        TokenLayout((2, 2, 4)),
    ),
}


def run_once(pipe: Any, call: dict[str, Any]) -> Tensor:
    arguments = {"num_inference_steps": STEPS, "output_type": "latent", **call}
    result = pipe(**arguments, generator=torch.Generator().manual_seed(0))[0]
    return result[-1] if isinstance(result, list) else result  # FramePack: the clip after each section


@dataclass(frozen=True)
class Built:
    """A pipeline that has been called once: what came out, and the arguments of each transformer's first forward."""

    variant: Variant
    pipe: Any
    plain: Tensor
    arguments: dict[str, dict[str, Any]]

    def transformers(self) -> dict[str, nn.Module]:
        return {name: getattr(self.pipe, name) for name in self.variant.runs}

    def call(self) -> Tensor:
        return run_once(self.pipe, self.variant.call)


@pytest.fixture(scope="module", params=VARIANTS)
def built(request: Any) -> Iterator[Built]:
    variant = VARIANTS[request.param]
    seen: dict[str, dict[str, Any]] = {}
    with pytest.MonkeyPatch.context() as patch:
        # These pipelines scale what they are given to a megapixel.
        patch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (64, 32, None))
        patch.setattr(pipeline_qwenimage_edit_plus, "calculate_dimensions", lambda area, ratio: (64, 32))
        pipe = variant.make()

        def note(name: str) -> Callable[..., None]:
            def hook(model: nn.Module, args: Any, kwargs: Any) -> None:
                names = inspect.signature(type(model).forward).parameters
                seen.setdefault(name, dict(zip(list(names)[1:], args, strict=False)) | kwargs)

            return hook

        handles = [getattr(pipe, n).register_forward_pre_hook(note(n), with_kwargs=True) for n in variant.runs]
        plain = run_once(pipe, variant.call)
        for handle in handles:
            handle.remove()
        yield Built(variant, pipe, plain, seen)


def test_the_layout_is_the_grid_of_what_is_made(built):
    for name, model in built.transformers().items():
        assert models.layout_of(model, models.find(model), built.arguments[name]) == built.variant.layout


def test_the_recorded_tokens_hold_the_grid(built):
    for name, model in built.transformers().items():
        stack = models.find(model).used(model)[-1]
        sizes = []
        handle = stack.blocks(model)[-1].register_forward_hook(
            lambda _, args, output, stack=stack, sizes=sizes: sizes.append(hidden_in(stack, output).shape[1])
        )
        with torch.no_grad():
            model(**built.arguments[name])
        handle.remove()
        layout = built.variant.layout
        assert layout.offset + math.prod(layout.grid) <= sizes[0]


@pytest.mark.parametrize("site", SITES)
def test_interval_one_is_bit_identical(built, site):
    with hasten.accelerate(built.pipe, "taylorseer", interval=1, site=site):
        assert torch.equal(built.call(), built.plain)


@pytest.mark.parametrize("site", SITES)
def test_a_skip_skips_and_removal_is_exact(built, site):
    models = built.transformers()
    before = {name: leftovers(model) for name, model in models.items()}
    work = {name: count_work(model, site) for name, model in models.items()}
    per_forward = {}
    for name, model in models.items():
        with torch.no_grad():
            model(**built.arguments[name])
        per_forward[name] = len(work[name][0])
        work[name][0].clear()
    with hasten.accelerate(built.pipe, "taylorseer", interval=INTERVAL, site=site) as run:
        fast = built.call()
        for name in models:
            records = run.engines[name].records
            runs = sorted({record.run for record in records})
            assert tuple(len({r.step for r in records if r.run == i}) for i in runs) == built.variant.runs[name]
            for i, steps in zip(runs, built.variant.runs[name], strict=True):
                full = {record.step for record in records if record.run == i and record.computed}
                assert sorted(full) == computed_steps(Uniform(INTERVAL, 3), steps)
            assert len(work[name][0]) == per_forward[name] * sum(record.computed for record in records)
        assert torch.equal(built.call(), fast)
    for _, handles in work.values():
        for handle in handles:
            handle.remove()
    # How far a forecast may be off says little on random weights; garbage is off by all of it.
    assert 0 < (fast - built.plain).norm() < 0.3 * built.plain.norm()
    assert {name: leftovers(model) for name, model in models.items()} == before
    assert torch.equal(built.call(), built.plain)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("WanVACETransformer3DModel", "wan vace"),
        ("HunyuanVideoFramepackTransformer3DModel", "framepack"),
        ("SanaVideoTransformer3DModel", "sana image to video"),
    ],
)
def test_the_probe_wires_them_as_their_entries_do(name, variant, monkeypatch):
    variant = VARIANTS[variant]
    pipe = variant.make()
    with hasten.accelerate(pipe, "taylorseer", interval=INTERVAL):
        known = run_once(pipe, variant.call)
    monkeypatch.delitem(host_registry._HOSTS, name)
    with hasten.accelerate(pipe, "taylorseer", interval=INTERVAL):
        assert torch.equal(run_once(pipe, variant.call), known)


@torch.no_grad()
def test_a_control_block_may_add_to_the_last_block():
    """VACE adds what a control block makes behind the block of its layer, and that may be the last one."""
    model = build("WanVACETransformer3DModel", "WanTransformer3DModel", vace_layers=[0, 3], vace_in_channels=4)
    given = {"encoder_hidden_states": randn(1, tiny.TEXT, 32), "control_hidden_states": randn(1, 4, 2, 6, 10, seed=1)}

    def sample() -> Tensor:
        x = randn(1, 4, 2, 6, 10, seed=2)
        for i in range(12):
            velocity = tiny.first(model(hidden_states=x, timestep=torch.tensor([1000 - 80.0 * i]), **given))
            x = x - 0.03 * velocity / velocity.std() * x.std()
        return x

    plain = sample()
    with hasten.accelerate(model, "taylorseer", interval=INTERVAL) as run:
        fast = sample()
        assert run.summary().skipped_steps > 3
    assert 0 < (fast - plain).norm() < 0.03 * plain.norm()


# --- ControlNet: what it adds comes between the blocks, from outside


@torch.no_grad()
def controlled(model: nn.Module) -> Tensor:
    """A toy sampler of FLUX with what a ControlNet adds after each block, as FluxControlNetPipeline passes it."""
    family = tiny.TINY["FluxTransformer2DModel"]
    double = [2 * randn(1, 16, 32, seed=seed) for seed in range(2)]
    single = [2 * randn(1, 16, 32, seed=seed) for seed in range(2, 5)]
    added = {"controlnet_block_samples": double, "controlnet_single_block_samples": single}
    x = randn(*family.latent, seed=1)
    for i in range(12):
        velocity = tiny.first(model(**family.arguments(x, 1 - i / 12), **added))
        x = x - 0.03 * velocity / velocity.std() * x.std()
    return x


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("taylorseer", {"interval": 3}),
        ("taylorseer", {"interval": 3, "site": "output"}),
        ("taylorseer", {"interval": 3, "site": "module"}),
        ("speca", {}),
        ("fbcache", {"threshold": 0.5}),
        ("teacache", {"threshold": 0.5}),
    ],
)
def test_what_a_controlnet_adds_is_not_added_twice(method, params):
    model = build("FluxTransformer2DModel")
    plain = controlled(model)
    with hasten.accelerate(model, method, **params) as run:
        fast = controlled(model)
        assert run.summary().skipped_steps > 3
    assert 0 < (fast - plain).norm() < 0.03 * plain.norm()


# --- two runs of one transformer


@torch.no_grad()
def wide(model: nn.Module, height: int, width: int) -> Tensor:
    """A toy sampler of FLUX at a size of so many tokens."""
    family = tiny.TINY["FluxTransformer2DModel"]
    x = randn(1, height * width, 4, seed=1)
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width)).float()
    for i in range(12):
        velocity = tiny.first(model(**family.arguments(x, 1 - i / 12) | {"img_ids": ids}))
        x = x - 0.03 * velocity / velocity.std() * x.std()
    return x


def test_a_run_of_as_many_tokens_in_another_grid_has_its_own_layout():
    model = build("FluxTransformer2DModel")
    with hasten.accelerate(model, "freqca", interval=3):
        wide(model, 2, 8)
        second = wide(model, 8, 2)
    with hasten.accelerate(model, "freqca", interval=3):
        assert torch.equal(wide(model, 8, 2), second)


# Its first step reads the reference image into a memory that the others use: no step can be evaluated alone.
# The other gives each token a time of its own, and LEAP's coefficients hold for one time.
NOT_LEARNED = {"flux2 klein with remembered keys of a reference image", "ltx condition"}


def test_a_learned_scheduler_serves_them(built):
    """LEAP is fitted through the pipeline itself, whatever it conditions on and however it keeps its latents."""
    variant, pipe, original = built.variant, built.pipe, built.pipe.scheduler
    name = next(name for name, other in VARIANTS.items() if other is variant)
    if list(variant.runs.values()) != [(STEPS,)] or name in NOT_LEARNED:
        pytest.skip("starts later, or has several transformers or runs")
    call = {**variant.call, "num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(0)}
    fit = fit_leap(pipe, [call], [4], trials=1, rounds=0)
    assert pipe.scheduler is original
    assert torch.equal(built.call(), built.plain)
    few = {**variant.call, "num_inference_steps": 4}
    plain = run_once(pipe, few)
    pipe.scheduler = LeapScheduler.of(fit, pipe)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", HastenWarning)
            learned = run_once(pipe, few)
    finally:
        pipe.scheduler = original
    assert (learned - built.plain).norm() < 0.8 * (plain - built.plain).norm()
