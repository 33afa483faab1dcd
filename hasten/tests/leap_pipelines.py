"""Pipelines of diffusers with tiny random weights: does LEAP with all steps and plain coefficients reproduce them?

What `test_leap_pipelines.py` asserts and `benchmarks/leap_pipelines.py` writes down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import test_variants as variants
import torch
from denoisers.unets import CONDITION, SDXL, TYPES_2D
from test_variants import CLIP, FLUX_TEXT, GUIDED, MASKED_TEXT, QWEN_TEXT, SMALL, VARIANTS, assemble, build, flow
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
)

from hasten.errors import HastenError
from hasten.fitting.leap_under_way import plain_config
from hasten.fitting.references import record_references
from hasten.pipeline.replay import Replay
from hasten.solvers import LeapScheduler

STEPS = 12
EXACT = 1e-5
Pipeline = tuple[Callable[[], Any], dict[str, Any]]


def _unet(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    common = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
    return diffusers.UNet2DConditionModel(
        **common,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        **config,
    ).eval()


def stable_diffusion(scheduler: str, **config: Any) -> Callable[[], Any]:
    """Stable Diffusion with a UNet and a scheduler."""

    def make() -> Any:
        settings = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, **config}
        made = getattr(diffusers, scheduler)(**settings)
        return assemble(
            "StableDiffusionPipeline",
            unet=_unet(),
            vae=variants.image_vae(),
            scheduler=made,
            requires_safety_checker=False,
        )

    return make


def stable_diffusion_xl(scheduler: str, **config: Any) -> Callable[[], Any]:
    """Stable Diffusion XL with a scheduler."""

    def make() -> Any:
        torch.manual_seed(0)
        return assemble(
            "StableDiffusionXLPipeline",
            unet=diffusers.UNet2DConditionModel(**SDXL).eval(),
            vae=variants.image_vae(),
            scheduler=getattr(diffusers, scheduler)(**config),
            add_watermarker=False,
        )

    return make


def sound() -> Any:
    """AudioLDM 2: a spectrogram under two texts; vocoder and language models are asked for their settings alone."""
    torch.manual_seed(0)
    unet = diffusers.AudioLDM2UNet2DConditionModel(
        **{**CONDITION, **TYPES_2D, "cross_attention_dim": ((24, 24), (24, 24), (24, 24))},
        transformer_layers_per_block=1,
    ).eval()
    vocoder = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(model_in_dim=8, upsample_initial_channel=8, upsample_rates=[4], upsample_kernel_sizes=[8])
    )
    return assemble(
        "AudioLDM2Pipeline",
        unet=unet,
        vae=variants.image_vae(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        vocoder=vocoder,
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
        language_model=GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=2)),
    )


def unconditional(pipeline: str, scheduler: str, **config: Any) -> Callable[[], Any]:
    """A UNet that is told nothing."""

    def make() -> Any:
        torch.manual_seed(0)
        unet = diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        ).eval()
        return assemble(pipeline, unet=unet, scheduler=getattr(diffusers, scheduler)(**config))

    return make


def transformed(pipeline: str, model: str, vae: Callable[[], nn.Module], scheduler: Any, **config: Any) -> Any:
    """A pipeline of a tiny transformer."""

    def make() -> Any:
        return assemble(pipeline, transformer=build(model, **config), vae=vae(), scheduler=scheduler())

    return make


def dit() -> Any:
    """Class-conditional DiT, whose answers have a half that the pipeline cuts off."""
    transformer = build("DiTTransformer2DModel", out_channels=8)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return diffusers.DiTPipeline(transformer=transformer, vae=variants.image_vae(), scheduler=scheduler)


SD = {**GUIDED, "guidance_scale": 3.0, "height": 8, "width": 8}
NARROW, WORDS = variants.randn(1, 7, 24), variants.randn(1, 5, 24, seed=2)
XL = {
    "prompt_embeds": NARROW,
    "negative_prompt_embeds": NARROW.flip(1),
    "pooled_prompt_embeds": variants.randn(1, 16),
    "negative_pooled_prompt_embeds": variants.randn(1, 16, seed=1),
    "guidance_scale": 3.0,
    "height": 8,
    "width": 8,
}
SOUND = {
    "prompt_embeds": NARROW,
    "negative_prompt_embeds": NARROW.flip(1),
    "attention_mask": torch.ones(1, 7, dtype=torch.long),
    "negative_attention_mask": torch.ones(1, 7, dtype=torch.long),
    "generated_prompt_embeds": WORDS,
    "negative_generated_prompt_embeds": WORDS.flip(1),
    "guidance_scale": 3.0,
    "audio_length_in_s": 0.002,
}
UNCLIPPED = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}

OWN: dict[str, Pipeline] = {
    "flux": (variants.flux("FluxPipeline"), {**FLUX_TEXT, **SMALL}),
    "flux with true guidance": (
        variants.flux("FluxPipeline"),
        {**FLUX_TEXT, **SMALL, "true_cfg_scale": 3.0, "negative_prompt_embeds": GUIDED["negative_prompt_embeds"]}
        | {"negative_pooled_prompt_embeds": FLUX_TEXT["pooled_prompt_embeds"].flip(1)},
    ),
    "sd3": (
        variants.sd3("StableDiffusion3Pipeline", 4, 4),
        {**FLUX_TEXT, "guidance_scale": 1.0, "height": 12, "width": 16},
    ),
    "qwen": (variants.qwen("QwenImagePipeline"), {**QWEN_TEXT, "height": 48, "width": 80}),
    "wan": (variants.wan("WanPipeline", "WanTransformer3DModel"), {**GUIDED, **CLIP}),
    "ltx": (
        variants.ltx("LTXPipeline"),
        {**MASKED_TEXT, "height": 32, "width": 64, "num_frames": 5, "guidance_scale": 1.0},
    ),
    "hunyuan video": (
        transformed("HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel", variants.hunyuan_vae, flow),
        {**FLUX_TEXT, **MASKED_TEXT, **CLIP},
    ),
    "cogvideox": (
        transformed(
            "CogVideoXPipeline",
            "CogVideoXTransformer3DModel",
            variants.cogvideox_vae,
            lambda: diffusers.CogVideoXDDIMScheduler(**ZERO_SNR),
        ),
        {**GUIDED, **CLIP},
    ),
    "cogview4": (
        transformed("CogView4Pipeline", "CogView4Transformer2DModel", variants.image_vae, flow),
        {**GUIDED, "height": 16, "width": 16},
    ),
    "dit": (dit, {"class_labels": [3], "guidance_scale": 2.0, "output_type": "np"}),
    "ddim": (unconditional("DDIMPipeline", "DDIMScheduler", clip_sample=False), {"output_type": "np"}),
    "ddpm": (unconditional("DDPMPipeline", "DDPMScheduler"), {"output_type": "np"}),
    "ddim that clips": (unconditional("DDIMPipeline", "DDIMScheduler"), {"output_type": "np"}),
    "stable diffusion, ddim": (stable_diffusion("DDIMScheduler", **UNCLIPPED), SD),
    "stable diffusion, euler": (stable_diffusion("EulerDiscreteScheduler"), SD),
    "stable diffusion, euler with karras": (stable_diffusion("EulerDiscreteScheduler", use_karras_sigmas=True), SD),
    "stable diffusion, lms": (stable_diffusion("LMSDiscreteScheduler"), SD),
    "stable diffusion, dpmpp": (stable_diffusion("DPMSolverMultistepScheduler"), SD),
    "stable diffusion, dpmpp of the sde": (
        stable_diffusion("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"),
        SD,
    ),
    "stable diffusion, unipc": (stable_diffusion("UniPCMultistepScheduler"), SD),
    "stable diffusion, deis": (stable_diffusion("DEISMultistepScheduler"), SD),
    "stable diffusion, plms": (stable_diffusion("PNDMScheduler", skip_prk_steps=True), SD),
    "stable diffusion, ancestral": (stable_diffusion("EulerAncestralDiscreteScheduler"), SD),
    "stable diffusion, heun": (stable_diffusion("HeunDiscreteScheduler"), SD),
    "stable diffusion, lcm": (stable_diffusion("LCMScheduler"), SD),
    "stable diffusion xl, euler": (stable_diffusion_xl("EulerDiscreteScheduler"), XL),
    "stable diffusion xl, dpmpp": (stable_diffusion_xl("DPMSolverMultistepScheduler", use_karras_sigmas=True), XL),
    "stable diffusion xl, v": (stable_diffusion_xl("EulerDiscreteScheduler", prediction_type="v_prediction"), XL),
    "audioldm 2": (sound, SOUND),
    "stable diffusion, v and zero snr": (
        stable_diffusion("DDIMScheduler", clip_sample=False, **ZERO_SNR),
        SD,
    ),
}
PIPELINES: dict[str, Pipeline] = OWN | {name: (one.make, one.call) for name, one in VARIANTS.items()}


@dataclass(frozen=True)
class Outcome:
    """What became of a pipeline.

    Attributes:
        pipeline: its class.
        scheduler: the class of its scheduler.
        error: relative error of the result, LEAP with all steps and plain coefficients against the plain run.
        formula: largest relative error of a state, the scheduler's formula against its own trajectory.
        refused: the message, if it was refused.
    """

    pipeline: str
    scheduler: str
    error: float | None
    formula: float | None
    refused: str | None


@contextmanager
def _small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # these pipelines scale what they are given to a megapixel
        edit, plus = variants.pipeline_qwenimage_edit, variants.pipeline_qwenimage_edit_plus
        patch.setattr(edit, "calculate_dimensions", lambda area, ratio: (64, 32, None))
        patch.setattr(plus, "calculate_dimensions", lambda area, ratio: (64, 32))
        yield


def _result(pipe: Any, call: dict[str, Any]) -> Tensor:
    result = pipe(**{**call, "generator": torch.Generator().manual_seed(0)})[0]
    return torch.as_tensor(result[-1] if isinstance(result, list) else result).double()


def check(name: str) -> Outcome:
    """Follow a pipeline, then run it with LEAP at all of its steps."""
    make, arguments = PIPELINES[name]
    call = {"num_inference_steps": STEPS, "output_type": "latent", **arguments}
    with _small():
        pipe = make()
        pipe.set_progress_bar_config(disable=True)
        about = type(pipe).__name__, type(pipe.scheduler).__name__
        plain, original = _result(pipe, call), pipe.scheduler
        try:
            replay = Replay([{**call, "generator": torch.Generator().manual_seed(0)}])
            references = record_references(pipe, replay)
        except HastenError as refused:
            return Outcome(*about, None, None, " ".join(str(refused).split()))
        own = references.plain
        count = len(own.timesteps)
        table = {"timesteps": own.timesteps, "levels": own.levels[:-1], "guided": [own.rows]}
        pipe.scheduler = LeapScheduler(
            {str(count): table},
            prediction_type=references.kind,
            num_train_timesteps=original.config.num_train_timesteps,
            noise_scale=own.noise_scale,
            plain=plain_config(original),
        )
        reached = _result(pipe, call)
    return Outcome(*about, float((reached - plain).norm() / plain.norm()), references.error, None)
