"""UNets: of images, clips and sound."""

from __future__ import annotations

from typing import Any

import torch
from tiny import HEADS, TEXT, Tiny, randn, time_of
from torch import Tensor

LEVELS = (16, 32, 32)
COMMON = {"block_out_channels": LEVELS, "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
CONDITION = {**COMMON, "cross_attention_dim": 24, "attention_head_dim": 2}
TYPES_2D = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
# Stable Diffusion XL: a shallow level without attention, size and crop as added conditions.
SDXL = {
    **CONDITION,
    **TYPES_2D,
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
}
IMAGE, CLIP = (1, 4, 8, 8), (1, 4, 2, 8, 8)


def types(kind: str) -> dict[str, Any]:
    """Names of the blocks of a kind of UNet: `3D`, `Motion`, `SpatioTemporal`."""
    return {
        "down_block_types": (f"CrossAttnDownBlock{kind}", f"CrossAttnDownBlock{kind}", f"DownBlock{kind}"),
        "up_block_types": (f"UpBlock{kind}", f"CrossAttnUpBlock{kind}", f"CrossAttnUpBlock{kind}"),
    }


def plain(x: Tensor, t: float) -> dict[str, Any]:
    """What most of them take."""
    return {"sample": x, "timestep": time_of(t), "encoder_hidden_states": randn(1, TEXT, 24)}


def sizes(x: Tensor, t: float) -> dict[str, Any]:
    """With what Stable Diffusion XL takes beside."""
    added = {"text_embeds": randn(1, 16), "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]])}
    return {**plain(x, t), "added_cond_kwargs": added}


UNETS: dict[str, Tiny] = {
    "UNet1DModel": Tiny(
        {
            "sample_size": 32,
            "in_channels": 2,
            "out_channels": 2,
            "extra_in_channels": 64,
            "block_out_channels": (32, 32, 64),
            "down_block_types": ("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
            "up_block_types": ("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
        },
        (1, 2, 32),
        lambda x, t: {"sample": x, "timestep": time_of(t)},
    ),
    "UNet2DModel": Tiny(
        {
            **COMMON,
            "in_channels": 4,
            "out_channels": 4,
            "attention_head_dim": 8,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        },
        IMAGE,
        lambda x, t: {"sample": x, "timestep": time_of(t)},
    ),
    "UNet2DConditionModel": Tiny(SDXL, IMAGE, sizes),
    "UNetControlNetXSModel": Tiny(
        {
            "sample_size": 8,
            "down_block_types": TYPES_2D["down_block_types"],
            "up_block_types": TYPES_2D["up_block_types"],
            "block_out_channels": LEVELS,
            "norm_num_groups": 4,
            "cross_attention_dim": 24,
            "num_attention_heads": 2,
            "ctrl_conditioning_embedding_out_channels": (4,),
            "ctrl_block_out_channels": (8, 8, 8),
            "ctrl_num_attention_heads": 2,
            "ctrl_max_norm_num_groups": 4,
        },
        IMAGE,
        lambda x, t: {**plain(x, t), "controlnet_cond": randn(1, 3, 8, 8)},
    ),
    "UNet3DConditionModel": Tiny({**CONDITION, **types("3D")}, CLIP, plain),
    "UNetMotionModel": Tiny(
        {
            **{key: value for key, value in CONDITION.items() if key != "attention_head_dim"},
            **types("Motion"),
            "num_attention_heads": 2,
            "motion_num_attention_heads": 2,
            "motion_max_seq_length": 4,
        },
        CLIP,
        lambda x, t: {**plain(x, t), "encoder_hidden_states": randn(2, TEXT, 24)},
    ),
    "UNetSpatioTemporalConditionModel": Tiny(
        {
            "block_out_channels": (32, 32, 64),
            "layers_per_block": 1,
            "sample_size": 8,
            "cross_attention_dim": 24,
            "in_channels": 4,
            **types("SpatioTemporal"),
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
            "num_attention_heads": (2, 2, 2),
            "num_frames": 2,
        },
        (1, 2, 4, 8, 8),
        lambda x, t: {**plain(x, t), "added_time_ids": torch.tensor([[6.0, 127.0, 0.0]])},
    ),
    "I2VGenXLUNet": Tiny(
        {**CONDITION, **types("3D"), "num_attention_heads": 2},
        CLIP,
        lambda x, t: {
            **plain(x, t),
            "fps": torch.tensor([8.0]),
            "image_latents": randn(1, 4, 2, 8, 8),
            "image_embeddings": randn(1, 24),
        },
    ),
    "DreamLiteUNetModel": Tiny(
        {
            **CONDITION,
            "transformer_layers_per_block": 1,
            "ff_mult": 2,
            "num_kv_heads": 2,
        },
        IMAGE,
        plain,
    ),
    "Kandinsky3UNet": Tiny(
        {
            "time_embedding_dim": 16,
            "groups": 4,
            "attention_head_dim": 4,
            "layers_per_block": 2,
            "block_out_channels": (16, 16, 32, 32),
            "cross_attention_dim": 24,
            "encoder_hid_dim": 16,
        },
        IMAGE,
        lambda x, t: {
            "sample": x,
            "timestep": time_of(t),
            "encoder_hidden_states": randn(1, TEXT, 16),
            "encoder_attention_mask": torch.ones(1, TEXT),
        },
    ),
    "StableCascadeUNet": Tiny(
        {
            "in_channels": 4,
            "out_channels": 4,
            "timestep_ratio_embedding_dim": 8,
            "conditioning_dim": 16,
            "block_out_channels": (16, 32),
            "num_attention_heads": (2, 2),
            "down_num_layers_per_block": (1, 2),
            "up_num_layers_per_block": (2, 1),
            "clip_text_in_channels": 12,
            "clip_text_pooled_in_channels": 12,
            "clip_image_in_channels": 12,
            "clip_seq": 2,
            "dropout": (0.0, 0.0),
            "switch_level": (False,),
        },
        IMAGE,
        lambda x, t: {
            "sample": x,
            "timestep_ratio": time_of(t, scale=1),
            "clip_text_pooled": randn(1, 1, 12),
            "clip_text": randn(1, TEXT, 12),
            "clip_img": randn(1, 1, 12),
        },
    ),
    "AudioLDM2UNet2DConditionModel": Tiny(
        {**CONDITION, **TYPES_2D, "cross_attention_dim": ((24,), (24,), (24,)), "attention_head_dim": 2},
        IMAGE,
        plain,
    ),
    "UVit2DModel": Tiny(
        {
            "hidden_size": 32,
            "cond_embed_dim": 16,
            "micro_cond_encode_dim": 4,
            "micro_cond_embed_dim": 20,
            "encoder_hidden_size": 24,
            "vocab_size": 17,
            "codebook_size": 16,
            "in_channels": 16,
            "block_out_channels": 16,
            "num_res_blocks": 1,
            "block_num_heads": 2,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "sample_size": 8,
        },
        (1, 8, 8),
        lambda x, t: {
            "input_ids": torch.where(x < t, 16, (100 * x).long().abs() % 16),
            "encoder_hidden_states": randn(1, TEXT, 24),
            "pooled_text_emb": randn(1, 16),
            "micro_conds": torch.tensor([[64.0, 64.0, 0.0, 0.0, 6.0]]),
        },
    ),
    "UniDiffuserModel": Tiny(
        {
            **HEADS,
            "text_dim": 24,
            "clip_img_dim": 16,
            "num_text_tokens": TEXT,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "sample_size": 8,
            "patch_size": 2,
            "norm_elementwise_affine": True,
        },
        (1, 4, 8, 8),
        lambda x, t: {
            "latent_image_embeds": x,
            "image_embeds": randn(1, 1, 16),
            "prompt_embeds": randn(1, TEXT, 24),
            "timestep_img": time_of(t),
            "timestep_text": time_of(t),
        },
    ),
}
