"""What `emoji-styles` is made of: the classes of FLUX.1 at a twelfth of the width, in a real latent space.

Everything but the autoencoder is an unmodified class of diffusers or transformers, so that an unmodified
`FluxPipeline` runs it: `FluxTransformer2DModel` (2 double and 5 single blocks), `T5EncoderModel` (text tokens),
`CLIPTextModel` (pooled text), a word-level tokenizer and `FlowMatchEulerDiscreteScheduler` with FLUX's dynamic shift,
its ends laid on the lengths used here. Guidance is classifier-free (`true_cfg_scale` and an empty negative prompt).

Shapes: latents `[B, 16, S/8, S/8]` of images of S pixels are packed to `[B, (S/16)^2, 64]`: 16, 64, 144 tokens for 64,
128, 192 pixels; text is `[B, 16, 192]` and `[B, 128]`.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import pre_tokenizers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from hasten_zoo.emoji_styles.augment import COLOURS
from hasten_zoo.emoji_styles.vae import EmojiVAE
from hasten_zoo.low_rank import weights_digest
from hasten_zoo.reading import reading
from hasten_zoo.words import WordTokenizer, word_tokenizer

__all__ = ["LEARNING", "TEXT_TOKENS", "build_pipeline", "build_tokenizer", "digest", "load_pipeline", "shift"]

TEXT_TOKENS = 16
LEARNING = ("transformer", "text_encoder", "text_encoder_2")  # the parts that the flow trains
SHORTEST, LONGEST = (16, 0.5), (144, 1.15)  # image tokens, and the logarithm of the shift of times there


def build_tokenizer(styles: list[str], concepts: list[str]) -> WordTokenizer:
    """A tokenizer over the words of styles, concepts and colours."""
    words = {word for text in (*styles, *concepts, *COLOURS) for word in text.split()} | {",", "on"}
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(",", "isolated")])
    return word_tokenizer(words, TEXT_TOKENS, split)


def shift(tokens: int) -> float:
    """The factor by which the sampler moves times towards noise, for a number of image tokens."""
    (low, low_log), (high, high_log) = SHORTEST, LONGEST
    return math.exp(low_log + (tokens - low) * (high_log - low_log) / (high - low))


def build_pipeline(
    tokenizer: WordTokenizer, vae: EmojiVAE, width: int = 256, double: int = 2, single: int = 5
) -> FluxPipeline:
    """A fresh, untrained pipeline around an autoencoder."""
    head = min(64, width // 2)
    rope = head // 4 + head % 8, head * 3 // 8, head * 3 // 8
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * vae.config.latent_channels,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=head,
        num_attention_heads=width // head,
        joint_attention_dim=192,
        pooled_projection_dim=128,
        guidance_embeds=False,
        axes_dims_rope=rope,
    )
    _silence(transformer)
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=192,
            d_kv=32,
            d_ff=384,
            num_layers=2,
            num_heads=6,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_TOKENS,
            bos_token_id=2,
            eos_token_id=3,
            pad_token_id=0,
        )
    )
    (low, low_log), (high, high_log) = SHORTEST, LONGEST
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=low_log,
        max_shift=high_log,
        base_image_seq_len=low,
        max_image_seq_len=high,
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


def _silence(transformer: FluxTransformer2DModel) -> None:
    """Gates and output start at zero, so that every block starts as the identity (adaLN-zero)."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (name.endswith("norm.linear") or ".norm1" in name or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def digest(pipe: FluxPipeline) -> str:
    """`weights_digest` of all parts that have weights, for models that are differences from this one."""
    return weights_digest(nn.ModuleDict({name: getattr(pipe, name) for name in (*LEARNING, "vae")}))


def load_pipeline(folder: Path) -> FluxPipeline:
    """Load a pipeline folder that the training script exported; only local files are read.

    Raises:
        ModelError: if a file is missing, or not as it was written.
    """
    with reading("emoji-styles", folder, "transformer", "training.json"):
        tokenizer = WordTokenizer.from_pretrained(folder / "tokenizer")
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
            vae=EmojiVAE.from_pretrained(folder / "vae"),
            text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
            tokenizer=tokenizer,
            text_encoder_2=T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=torch.float32),
            tokenizer_2=tokenizer,
            transformer=FluxTransformer2DModel.from_pretrained(folder / "transformer"),
        )
