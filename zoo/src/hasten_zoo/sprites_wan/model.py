"""What `sprites-wan` is made of: the classes of Wan 2.1 in small, and an autoencoder of ours.

Everything is an unmodified class of diffusers or transformers except the autoencoder and the tokenizer, so that an
unmodified `WanPipeline` runs it: `WanTransformer3DModel`, `UMT5EncoderModel`, `FlowMatchEulerDiscreteScheduler`.

A clip of 33 frames of 64x64 pixels is `[B, 8, 17, 16, 16]` latents, 17 x 8 x 8 tokens of 2x2 cells (Wan's patch).
"""

from __future__ import annotations

from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from hasten.errors import ConfigError
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from hasten_zoo.emoji_flux.model import build_tokenizer
from hasten_zoo.reading import reading
from hasten_zoo.sprites_wan.data import all_clips
from hasten_zoo.sprites_wan.vae import CHANNELS, SpriteVAE
from hasten_zoo.words import WordTokenizer

__all__ = ["LEARNED", "SHIFT", "TEXT_TOKENS", "build_pipeline", "load_pipeline"]

TEXT_TOKENS = 10
LEARNED = ("transformer", "text_encoder")
SHIFT = 5.0  # of the times, as Wan's at 720p: what a clip shows is decided at high noise, many frames showing the same


def _text_parts() -> tuple[WordTokenizer, UMT5EncoderModel]:
    """The tokenizer over the words of all captions, and a fresh encoder."""
    tokenizer = build_tokenizer([clip.caption for clip in all_clips()])
    tokenizer.model_max_length = TEXT_TOKENS
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=256, num_layers=1, num_heads=4, dropout_rate=0.0
    )
    return tokenizer, UMT5EncoderModel(config)


def build_pipeline(vae: SpriteVAE | None = None, width: int = 192, layers: int = 5) -> WanPipeline:
    """A fresh, untrained pipeline around an autoencoder (a fresh one if None).

    Args:
        vae: the autoencoder.
        width: of the transformer: 32, or a multiple of 64 (heads of 64 channels).
        layers: of the transformer.

    Raises:
        ConfigError: for another width.
    """
    if width != 32 and (width < 64 or width % 64):
        raise ConfigError(f"the width {width} is not made of whole heads; choose 32 or a multiple of 64, as 192")
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
    """Load a pipeline folder that the training script exported, in float32; only local files are read.

    Raises:
        ModelError: if a file is missing, or not as it was written.
    """
    with reading("sprites-wan", folder, "transformer"):
        return WanPipeline(
            tokenizer=WordTokenizer.from_pretrained(folder / "tokenizer"),
            text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder").float(),
            vae=SpriteVAE.from_pretrained(folder / "vae").float().eval(),
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
            transformer=WanTransformer3DModel.from_pretrained(folder / "transformer").float(),
        )
