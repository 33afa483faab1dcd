"""What `emoji-kontext` is made of: the parts of `emoji-flux` in an unmodified `FluxKontextPipeline`.

The source image enters as extra tokens whose position ids start with 1. The transformer and the text encoders may
start from the trained `emoji-flux`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5EncoderModel

from hasten_zoo.emoji_flux.data import load_emoji_set
from hasten_zoo.emoji_flux.model import PixelVAE
from hasten_zoo.emoji_flux.model import build_pipeline as build_emoji_flux
from hasten_zoo.emoji_flux.model import load_pipeline as load_emoji_flux
from hasten_zoo.emoji_kontext.data import BACKGROUNDS, CORNERS, EFFECTS, ITEMS, TINTS
from hasten_zoo.reading import reading
from hasten_zoo.words import WordTokenizer

__all__ = ["LEARNED", "TEXT_TOKENS", "build_pipeline", "load_pipeline", "start_from"]

TEXT_TOKENS = 12
LEARNED = ("transformer", "text_encoder", "text_encoder_2")
VERBS = ("add a small", "remove the", "replace the with", "make the background")


def start_from(pipe: FluxPipeline, old: FluxPipeline) -> None:
    """Copy every tensor of equal name and shape, and the embeddings of the words that both vocabularies have."""
    old_words = old.tokenizer.get_vocab()
    shared = [(i, old_words[word]) for word, i in pipe.tokenizer.get_vocab().items() if word in old_words]
    rows, old_rows = [i for i, _ in shared], [j for _, j in shared]
    for name in LEARNED:
        module, known = getattr(pipe, name), getattr(old, name).state_dict()
        new = module.state_dict()
        module.load_state_dict({k: known[k] if known[k].shape == v.shape else v for k, v in new.items()})
    with torch.no_grad():
        for name in ("text_encoder", "text_encoder_2"):
            table, old_table = (getattr(owner, name).get_input_embeddings().weight for owner in (pipe, old))
            table[rows] = old_table[old_rows]


def build_pipeline(start: Path | None = None, width: int = 128) -> FluxKontextPipeline:
    """An untrained pipeline, or one that starts from the `emoji-flux` weights in the folder `start` (width 128)."""
    phrases = [*ITEMS, *TINTS, *BACKGROUNDS, *CORNERS, *EFFECTS.values(), *VERBS]
    pipe = build_emoji_flux(phrases, load_emoji_set().images, width)
    pipe.tokenizer.model_max_length = TEXT_TOKENS
    config = pipe.text_encoder.config.to_dict() | {"max_position_embeddings": TEXT_TOKENS}
    pipe.register_modules(text_encoder=CLIPTextModel(CLIPTextConfig(**config)))
    if start is not None:
        start_from(pipe, load_emoji_flux(start))
    parts = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")
    return FluxKontextPipeline(**{name: getattr(pipe, name) for name in parts})


def load_pipeline(folder: Path) -> FluxKontextPipeline:
    """Load a pipeline folder that the training script exported, in float32; only local files are read.

    Raises:
        ModelError: if a file is missing, or not as it was written.
    """
    with reading("emoji-kontext", folder, "transformer"):
        tokenizer = WordTokenizer.from_pretrained(folder / "tokenizer")
        return FluxKontextPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
            vae=PixelVAE.from_pretrained(folder / "vae"),
            text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder").float(),
            tokenizer=tokenizer,
            text_encoder_2=T5EncoderModel.from_pretrained(folder / "text_encoder_2").float(),
            tokenizer_2=tokenizer,
            transformer=FluxTransformer2DModel.from_pretrained(folder / "transformer").float(),
        )
