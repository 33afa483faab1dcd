"""What `sprites-wan` is made of: the classes of Wan 2.1 in small, and a "VAE" that keeps every second frame.

Everything is an unmodified class of diffusers or transformers except `KeyframeVAE` and the tokenizer, so that an
unmodified `WanPipeline` runs it: `WanTransformer3DModel`, `UMT5EncoderModel`, `FlowMatchEulerDiscreteScheduler`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from hasten_zoo.emoji_flux.model import build_tokenizer
from hasten_zoo.sprites_wan.data import all_clips
from hasten_zoo.words import WordTokenizer

__all__ = ["LEARNED", "TEXT_TOKENS", "KeyframeVAE", "build_pipeline", "load_pipeline"]

TEXT_TOKENS = 10
LEARNED = ("transformer", "text_encoder")
PATCH = 6  # pixels a token covers in height and width
MEAN, STD = (0.52, 0.68, 0.61), (0.42, 0.30, 0.47)  # of the clips in [-1, 1], by channel


class KeyframeVAE(ModelMixin, ConfigMixin):
    """Keeps frames 0, 2, 4, ... and fills in the others by averaging their neighbours; pixels are latents otherwise.

    `2k + 1` frames `[B, 3, 2k + 1, H, W]` in [-1, 1] become `[B, 3, k + 1, H, W]`. The names in the configuration are
    those of `AutoencoderKLWan`.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        z_dim: int = 3,
        latents_mean: tuple[float, ...] = MEAN,
        latents_std: tuple[float, ...] = STD,
        temperal_downsample: tuple[bool, ...] = (True,),
        scale_factor_temporal: int = 2,
        scale_factor_spatial: int = 1,
    ) -> None:
        super().__init__()
        self.anchor = nn.Buffer(torch.zeros(()), persistent=True)  # gives the module a dtype and a device

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[Tensor]:
        """`[B, 3, 2k + 1, H, W]` to `[B, 3, k + 1, H, W]` (mean and deviation not yet taken out)."""
        latent = x[:, :, ::2]
        return AutoencoderTinyOutput(latents=latent) if return_dict else (latent,)

    def decode(self, z: Tensor, return_dict: bool = True, **_: Any) -> DecoderOutput | tuple[Tensor]:
        """`[B, 3, k + 1, H, W]` to `[B, 3, 2k + 1, H, W]` pixels in [-1, 1]."""
        between = (z[:, :, :-1] + z[:, :, 1:]) / 2
        pairs = torch.stack([z[:, :, :-1], between], 3).flatten(2, 3)
        sample = torch.cat([pairs, z[:, :, -1:]], 2)
        return DecoderOutput(sample=sample) if return_dict else (sample,)


def build_pipeline(width: int = 192, layers: int = 5) -> WanPipeline:
    """A fresh, untrained pipeline; `width` is a multiple of 32."""
    tokenizer = build_tokenizer([clip.caption for clip in all_clips()])
    tokenizer.model_max_length = TEXT_TOKENS
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=256, num_layers=1, num_heads=4, dropout_rate=0.0
        )
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, PATCH, PATCH),
        num_attention_heads=width // 32,
        attention_head_dim=32,
        in_channels=3,
        out_channels=3,
        text_dim=128,
        freq_dim=128,
        ffn_dim=2 * width,
        num_layers=layers,
        rope_max_seq_len=64,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return WanPipeline(tokenizer, text_encoder, KeyframeVAE(), scheduler, transformer)


def load_pipeline(folder: Path) -> WanPipeline:
    """Load a pipeline folder that the training script exported, in float32; only local files are read."""
    return WanPipeline(
        tokenizer=WordTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder").float(),
        vae=KeyframeVAE.from_pretrained(folder / "vae"),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        transformer=WanTransformer3DModel.from_pretrained(folder / "transformer").float(),
    )
