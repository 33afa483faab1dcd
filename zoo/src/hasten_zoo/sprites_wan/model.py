"""What `sprites-wan` is made of: the classes of Wan 2.1 in small, and an autoencoder of ours.

Everything is an unmodified class of diffusers or transformers except the autoencoder and the tokenizer, so that an
unmodified `WanPipeline` runs it: `WanTransformer3DModel`, `UMT5EncoderModel`, `FlowMatchEulerDiscreteScheduler`.

There are two editions, and a weights folder says by its autoencoder which it is:

- pixels: 17 frames of 48x48, `KeyframeVAE`, latents `[B, 3, 9, 48, 48]`, 9 x 8 x 8 tokens of 6x6 pixels;
- latents: 33 frames of 64x64, `SpriteVAE`, latents `[B, 8, 17, 16, 16]`, 17 x 8 x 8 tokens of 2x2 cells (Wan's patch).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from hasten.errors import ConfigError
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from hasten_zoo.emoji_flux.model import build_tokenizer
from hasten_zoo.sprites_wan.data import all_clips
from hasten_zoo.sprites_wan.vae import CHANNELS, SpriteVAE
from hasten_zoo.words import WordTokenizer

__all__ = ["LEARNED", "SHIFT", "TEXT_TOKENS", "KeyframeVAE", "build_latent_pipeline", "build_pipeline", "load_pipeline"]

TEXT_TOKENS = 10
LEARNED = ("transformer", "text_encoder")
PATCH = 6  # pixels a token covers in height and width, in the edition in pixels
SHIFT = 5.0  # of the times, as Wan's at 720p: what a clip shows is decided at high noise, many frames showing the same
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


def _text_parts() -> tuple[WordTokenizer, UMT5EncoderModel]:
    """The tokenizer over the words of all captions, and a fresh encoder."""
    tokenizer = build_tokenizer([clip.caption for clip in all_clips()])
    tokenizer.model_max_length = TEXT_TOKENS
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=256, num_layers=1, num_heads=4, dropout_rate=0.0
    )
    return tokenizer, UMT5EncoderModel(config)


def build_pipeline(width: int = 192, layers: int = 5) -> WanPipeline:
    """A fresh, untrained pipeline in pixels; `width` is a multiple of 32."""
    tokenizer, text_encoder = _text_parts()
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


def build_latent_pipeline(vae: SpriteVAE | None = None, width: int = 256, layers: int = 6) -> WanPipeline:
    """A fresh, untrained pipeline around an autoencoder (a fresh one if None).

    Args:
        vae: the autoencoder.
        width: of the transformer: 32, or a multiple of 64 (heads of 64 channels).
        layers: of the transformer.

    Raises:
        ConfigError: for another width.
    """
    if width != 32 and (width < 64 or width % 64):
        raise ConfigError(f"the width {width} is not made of whole heads; choose 32 or a multiple of 64, as 256")
    tokenizer, text_encoder = _text_parts()
    head = min(64, width)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=width // head,
        attention_head_dim=head,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=128,
        freq_dim=256,
        ffn_dim=4 * width,
        num_layers=layers,
        rope_max_seq_len=64,
    )
    nn.init.zeros_(transformer.proj_out.weight)  # a fresh model predicts nothing
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    return WanPipeline(tokenizer, text_encoder, vae or SpriteVAE(), scheduler, transformer)


def load_pipeline(folder: Path) -> WanPipeline:
    """Load a pipeline folder that the training script exported, in float32; only local files are read."""
    kind = json.loads((folder / "vae" / "config.json").read_text())["_class_name"]
    vae = {"KeyframeVAE": KeyframeVAE, "SpriteVAE": SpriteVAE}[kind]
    return WanPipeline(
        tokenizer=WordTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder").float(),
        vae=vae.from_pretrained(folder / "vae").float().eval(),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        transformer=WanTransformer3DModel.from_pretrained(folder / "transformer").float(),
    )
