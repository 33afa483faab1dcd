"""What `emoji-flux` is made of: the classes of FLUX.1 at a fiftieth of the width, and an exact "VAE" for pixels.

Everything is an unmodified class of diffusers or transformers except `PixelVAE`, so that an unmodified `FluxPipeline`
runs it: `FluxTransformer2DModel`, `T5EncoderModel` (text tokens), `CLIPTextModel` (pooled text), a word-level
tokenizer and `FlowMatchEulerDiscreteScheduler` with the dynamic shift of FLUX.1-dev.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
from transformers.utils import logging as transformers_logging

from hasten_zoo.reading import reading
from hasten_zoo.words import WordTokenizer, word_tokenizer

__all__ = ["PixelVAE", "build_pipeline", "build_tokenizer", "load_pipeline"]

TEXT_TOKENS = 8
PATCH = 2  # FluxPipeline packs another 2x2 on top, so that a token covers 4x4 pixels


class PixelVAE(ModelMixin, ConfigMixin):
    """Space-to-depth in place of an autoencoder: `[B, 3, H, W]` in [-1, 1] to `[B, 12, H/2, W/2]` and back, exactly.

    `shift_factor` and `scaling_factor` have the meaning that they have in `AutoencoderKL`. They centre the training
    images and give them unit variance.
    """

    space_to_depth = PATCH  # latents are rearranged pixels, and are made larger as pixels

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        block_out_channels: tuple[int, ...] = (3, 12),
        latent_channels: int = 12,
        shift_factor: float = 0.0,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.anchor = nn.Buffer(torch.zeros(()), persistent=True)  # gives the module a dtype and a device

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[Tensor]:
        """`[B, 3, H, W]` pixels to `[B, 12, H/2, W/2]` latents (not yet shifted and scaled)."""
        latent = nn.functional.pixel_unshuffle(x, PATCH)
        return AutoencoderTinyOutput(latents=latent) if return_dict else (latent,)

    def decode(self, z: Tensor, return_dict: bool = True, **_: Any) -> DecoderOutput | tuple[Tensor]:
        """`[B, 12, H/2, W/2]` latents (shift and scale undone) to `[B, 3, H, W]` pixels in [-1, 1]."""
        sample = nn.functional.pixel_shuffle(z, PATCH)
        return DecoderOutput(sample=sample) if return_dict else (sample,)


def build_tokenizer(captions: list[str]) -> WordTokenizer:
    """A tokenizer over the words of the captions."""
    words = {word for caption in captions for word in caption.split()}
    return word_tokenizer(words, TEXT_TOKENS, pre_tokenizers.Whitespace())


def build_pipeline(captions: list[str], images: Tensor, width: int = 128) -> FluxPipeline:
    """A fresh, untrained pipeline for a caption list and images `[N, 3, R, R]` in [0, 1]."""
    heads = width // 32
    tokenizer = build_tokenizer(captions)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=3 * (2 * PATCH) ** 2,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=heads,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=1,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=TEXT_TOKENS,
            bos_token_id=2,
            eos_token_id=3,
            pad_token_id=0,
        )
    )
    signal = images * 2 - 1
    vae = PixelVAE(shift_factor=float(signal.mean()), scaling_factor=float(1 / signal.std()))
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    return FluxPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer,
        transformer=transformer,
    )


@contextmanager
def _without_bars() -> Iterator[None]:
    """The bars of transformers are of no use for files that load in milliseconds."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def load_pipeline(folder: Path) -> FluxPipeline:
    """Load a pipeline folder that the training script exported; only local files are read.

    Raises:
        ModelError: if a file is missing, or not as it was written.
    """
    with reading("emoji-flux", folder, "transformer"), _without_bars():
        tokenizer = WordTokenizer.from_pretrained(folder / "tokenizer")
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
            vae=PixelVAE.from_pretrained(folder / "vae"),
            text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
            tokenizer=tokenizer,
            text_encoder_2=T5EncoderModel.from_pretrained(folder / "text_encoder_2"),
            tokenizer_2=tokenizer,
            transformer=FluxTransformer2DModel.from_pretrained(folder / "transformer"),
        )
