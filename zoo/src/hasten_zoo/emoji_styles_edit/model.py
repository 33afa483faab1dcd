"""What `emoji-styles-edit` is made of: the parts of `emoji-styles` in an unmodified `FluxKontextPipeline`.

The source image enters as 64 further tokens whose position ids start with 1. Transformer and text encoders start from
the trained `emoji-styles`; the words of instructions are new.
"""

from __future__ import annotations

from pathlib import Path

from diffusers import FluxKontextPipeline, FluxPipeline

from hasten_zoo.emoji_kontext.model import start_from
from hasten_zoo.emoji_styles.data import PACKAGES
from hasten_zoo.emoji_styles.model import build_pipeline as build_styles
from hasten_zoo.emoji_styles.model import build_tokenizer
from hasten_zoo.emoji_styles.model import load_pipeline as load_styles
from hasten_zoo.emoji_styles_edit.data import instructions

__all__ = ["STYLES", "as_kontext", "build_pipeline", "load_pipeline"]

STYLES = tuple(PACKAGES)
PARTS = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")


def as_kontext(pipe: FluxPipeline) -> FluxKontextPipeline:
    """The same parts in a pipeline that edits."""
    return FluxKontextPipeline(**{name: getattr(pipe, name) for name in PARTS})


def build_pipeline(old: FluxPipeline) -> FluxKontextPipeline:
    """One that starts from `emoji-styles`, whose transformer it takes over; text encoders get further words."""
    known = [word for word in old.tokenizer.get_vocab() if not word.startswith("<")]
    tokenizer = build_tokenizer([*STYLES, *instructions(STYLES)], known)
    transformer = old.transformer.config
    width = transformer.num_attention_heads * transformer.attention_head_dim
    pipe = build_styles(tokenizer, old.vae, width, transformer.num_layers, transformer.num_single_layers)
    start_from(pipe, old)
    return as_kontext(pipe)


def load_pipeline(folder: Path) -> FluxKontextPipeline:
    """Load a pipeline folder that the training script exported; only local files are read."""
    return as_kontext(load_styles(folder))
