"""Autoregressive models of the shapes that people train, tiny: 64 image tokens among or beside text."""

import numpy as np
import torch
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    Emu3Config,
    Emu3ForConditionalGeneration,
    JanusConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
)

from hasten.tokens import SemanticTree

TOKENS = 64
TEXT = 40
CODES = np.random.default_rng(0).standard_normal((TOKENS, 4)).astype(np.float32)
USED = np.arange(TOKENS) % 5  # one code in five never occurs
MAP = SemanticTree.fit(CODES, normalize="none", used=USED).map(20)
BODY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
VQ = {
    "embed_dim": 4,
    "latent_channels": 4,
    "base_channels": 32,
    "channel_multiplier": [1],
    "num_res_blocks": 1,
}


def llama(text=TEXT, tokens=TOKENS, **options):
    """Text rows first, then image rows; which are which it does not say."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=text + tokens, **BODY, **{**SPECIAL, **options})).eval()


def emu3():
    """Text rows, image rows, and two further ones; a token ends each row of an image."""
    names = {f"<|visual token {i:06d}|>": TEXT + i for i in range(TOKENS)}
    torch.manual_seed(0)
    return Emu3ForConditionalGeneration(
        Emu3Config(
            text_config={"vocab_size": TEXT + TOKENS + 2, **BODY, **SPECIAL},
            vq_config={
                "codebook_size": TOKENS,
                "attn_resolutions": [],
                "temporal_downsample_factor": 1,
                "hidden_size": 32,
                "num_attention_heads": 1,
                **VQ,
            },
            vocabulary_map={**names, "<image>": 5, "<|extra_200|>": TEXT + TOKENS},
        )
    ).eval()


def chameleon():
    """Four special rows, image rows, then text; its forward forbids image tokens."""

    def name(token):
        return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(token)) + "Z"

    torch.manual_seed(0)
    return ChameleonForConditionalGeneration(
        ChameleonConfig(
            vocab_size=TEXT + TOKENS,
            vocabulary_map={**{name(i): 4 + i for i in range(TOKENS)}, "<image>": 4 + TOKENS + 5},
            vq_config={"num_embeddings": TOKENS, "attn_resolutions": [], "resolution": 16, **VQ},
            **BODY,
            **SPECIAL,
        )
    ).eval()


def janus():
    """A text table of as many rows as there are image tokens, which have tables of their own."""
    torch.manual_seed(0)
    return JanusForConditionalGeneration(
        JanusConfig(
            text_config=LlamaConfig(vocab_size=TOKENS, **BODY, **SPECIAL).to_dict(),
            vision_config={
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
                "projection_dim": 16,
                "depth": 2,
            },
            vq_config={
                "num_embeddings": TOKENS,
                "projection_dim": 16,
                "num_hidden_layers": 2,
                "image_token_embed_dim": 16,
                **VQ,
            },
            image_token_id=7,
        )
    ).eval()
