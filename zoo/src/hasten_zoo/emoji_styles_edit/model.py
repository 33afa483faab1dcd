"""What `emoji-styles-edit` is made of: the parts of `emoji-styles` in an unmodified `FluxKontextPipeline`.

The source image enters as 64 further tokens whose position ids start with 1. Transformer and text encoders are the
trained `emoji-styles` and low-rank differences; the words of instructions are new, so tables of embeddings, norms and
biases come as a whole.
"""

from __future__ import annotations

from pathlib import Path

from diffusers import FluxKontextPipeline, FluxPipeline
from torch import nn

from hasten_zoo.emoji_kontext.model import start_from
from hasten_zoo.emoji_styles import WEIGHTS
from hasten_zoo.emoji_styles.data import PACKAGES
from hasten_zoo.emoji_styles.model import LEARNING, build_tokenizer, digest
from hasten_zoo.emoji_styles.model import build_pipeline as build_styles
from hasten_zoo.emoji_styles.model import load_pipeline as load_styles
from hasten_zoo.emoji_styles_edit.data import instructions
from hasten_zoo.low_rank import DIFFERENCES, merge, read_low_rank
from hasten_zoo.reading import reading
from hasten_zoo.words import WordTokenizer

__all__ = ["BASE", "STYLES", "as_kontext", "build_pipeline", "learning", "load_pipeline"]

BASE = "emoji-styles"  # what the differences are from, for messages
STYLES = tuple(PACKAGES)
PARTS = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")


def as_kontext(pipe: FluxPipeline) -> FluxKontextPipeline:
    """The same parts in a pipeline that edits."""
    return FluxKontextPipeline(**{name: getattr(pipe, name) for name in PARTS})


def build_pipeline(old: FluxPipeline, tokenizer: WordTokenizer | None = None) -> FluxKontextPipeline:
    """One that starts from `emoji-styles`, whose transformer it takes over; text encoders get further words.

    Args:
        old: `emoji-styles`.
        tokenizer: of a model that was trained; one with the words of `old` and of all instructions if None.
    """
    if tokenizer is None:
        known = [word for word in old.tokenizer.get_vocab() if not word.startswith("<")]
        tokenizer = build_tokenizer([*STYLES, *instructions(STYLES)], known)
    transformer = old.transformer.config
    width = transformer.num_attention_heads * transformer.attention_head_dim
    pipe = build_styles(tokenizer, old.vae, width, transformer.num_layers, transformer.num_single_layers)
    start_from(pipe, old)
    return as_kontext(pipe)


def learning(pipe: FluxKontextPipeline) -> nn.ModuleDict:
    """The parts that differ from `emoji-styles`."""
    return nn.ModuleDict({name: getattr(pipe, name) for name in LEARNING})


def load_pipeline(folder: Path, styles: Path = WEIGHTS) -> FluxKontextPipeline:
    """An unmodified pipeline from a folder that the training script exported, the rest from that of `emoji-styles`.

    Raises:
        ModelError: if a file is missing or damaged, or was trained from other weights of `emoji-styles`.
    """
    with reading("emoji-styles-edit", folder, DIFFERENCES, "tokenizer"):
        old = load_styles(styles)
        pipe = build_pipeline(old, WordTokenizer.from_pretrained(folder / "tokenizer"))
        net = learning(pipe)
        read_low_rank(folder / DIFFERENCES, net, digest(old), BASE)
    merge(net)
    net.eval()
    return pipe
