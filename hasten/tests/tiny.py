"""Sixteen families of diffusers transformers with random weights: a few blocks, width 32, a dozen tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

TEXT = 5
# Qwen-Image counts its text tokens itself since diffusers 0.36.
QWEN: dict[str, Any] = {"txt_seq_lens": [TEXT]} if diffusers.__version__.startswith("0.35") else {}


@dataclass(frozen=True)
class Tiny:
    """How to build a transformer and the arguments of one forward at time `t` in (0, 1] for a latent of fixed shape."""

    config: dict[str, Any]
    latent: tuple[int, ...]
    arguments: Callable[[Tensor, float], dict[str, Any]]


def randn(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def time_of(t: float, batch: int = 1, scale: float = 1000.0) -> Tensor:
    return torch.full((batch,), scale * t)


def ids(height: int, width: int, axes: int = 3) -> Tensor:
    ids = torch.zeros(height, width, axes)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None]
    return ids.reshape(-1, axes)


HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
FLUX_LIKE = {
    **HEADS,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 3,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}
VIDEO_LATENT = (1, 4, 2, 8, 8)

TINY: dict[str, Tiny] = {
    "FluxTransformer2DModel": Tiny(
        {**FLUX_LIKE, "pooled_projection_dim": 32},
        (1, 16, 4),
        lambda x, t: {
            "hidden_states": x,
            "timestep": time_of(t, scale=1),
            "encoder_hidden_states": randn(1, TEXT, 32),
            "pooled_projections": randn(1, 32),
            "img_ids": ids(4, 4),
            "txt_ids": torch.zeros(TEXT, 3),
        },
    ),
    "Flux2Transformer2DModel": Tiny(
        {**FLUX_LIKE, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16},
        (1, 16, 4),
        lambda x, t: {
            "hidden_states": x,
            "timestep": time_of(t, scale=1),
            "encoder_hidden_states": randn(1, TEXT, 32),
            "guidance": torch.ones(1),
            "img_ids": ids(4, 4, 4),
            "txt_ids": torch.zeros(TEXT, 4),
        },
    ),
    "QwenImageTransformer2DModel": Tiny(
        {
            **HEADS,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 4,
            "joint_attention_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        },
        (1, 16, 16),
        lambda x, t: {
            "hidden_states": x,
            "timestep": time_of(t, scale=1),
            "encoder_hidden_states": randn(1, TEXT, 32),
            "encoder_hidden_states_mask": torch.ones(1, TEXT, dtype=torch.long),
            "img_shapes": [[(1, 4, 4)]],
            **QWEN,
        },
    ),
    "HunyuanVideoTransformer3DModel": Tiny(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_single_layers": 3,
            "num_refiner_layers": 1,
            "text_embed_dim": 32,
            "pooled_projection_dim": 32,
            "rope_axes_dim": (4, 6, 6),
        },
        VIDEO_LATENT,
        lambda x, t: {
            "hidden_states": x,
            "timestep": time_of(t),
            "encoder_hidden_states": randn(1, TEXT, 32),
            "encoder_attention_mask": torch.ones(1, TEXT),
            "pooled_projections": randn(1, 32),
            "guidance": time_of(1.0),
        },
    ),
    "HunyuanVideo15Transformer3DModel": Tiny(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "num_refiner_layers": 1,
            "text_embed_dim": 32,
            "text_embed_2_dim": 32,
            "image_embed_dim": 16,
            "rope_axes_dim": (4, 6, 6),
            "target_size": 16,
            "task_type": "t2v",
        },
        VIDEO_LATENT,
        lambda x, t: {
            "hidden_states": x,
            "timestep": time_of(t),
            "encoder_hidden_states": randn(1, TEXT, 32),
            "encoder_attention_mask": torch.ones(1, TEXT),
            "encoder_hidden_states_2": randn(1, TEXT, 32),
            "encoder_attention_mask_2": torch.ones(1, TEXT),
            "image_embeds": torch.zeros(1, 3, 16),
        },
    ),
    "WanTransformer3DModel": Tiny(
        {**HEADS, "in_channels": 4, "out_channels": 4, "text_dim": 32, "freq_dim": 32, "ffn_dim": 64, "num_layers": 4},
        VIDEO_LATENT,
        lambda x, t: {"hidden_states": x, "timestep": time_of(t), "encoder_hidden_states": randn(1, TEXT, 32)},
    ),
    "SD3Transformer2DModel": Tiny(
        {
            **HEADS,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 8,
        },
        (1, 4, 8, 8),
        lambda x, t: {
            "hidden_states": x,
            "timestep": time_of(t),
            "encoder_hidden_states": randn(1, TEXT, 32),
            "pooled_projections": randn(1, 32),
        },
    ),
    "DiTTransformer2DModel": Tiny(
        {
            **HEADS,
            "in_channels": 4,
            "num_layers": 4,
            "sample_size": 8,
            "num_embeds_ada_norm": 1000,
            "norm_num_groups": 4,
        },
        (1, 4, 8, 8),
        lambda x, t: {
            "hidden_states": x,
            "timestep": time_of(t).long().clamp(max=999),
            "class_labels": torch.tensor([3]),
        },
    ),
    "PixArtTransformer2DModel": Tiny(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "cross_attention_dim": 32,
            "sample_size": 8,
            "caption_channels": 32,
            "use_additional_conditions": False,
            "norm_num_groups": 4,
        },
        (1, 4, 8, 8),
        lambda x, t: {
            "hidden_states": x,
            "timestep": time_of(t),
            "encoder_hidden_states": randn(1, TEXT, 32),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "LTXVideoTransformer3DModel": Tiny(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 32,
            "num_layers": 4,
            "caption_channels": 32,
        },
        (1, 32, 4),
        lambda x, t: {
            "hidden_states": x,
            "timestep": time_of(t),
            "encoder_hidden_states": randn(1, TEXT, 32),
            "encoder_attention_mask": torch.ones(1, TEXT),
            "num_frames": 2,
            "height": 4,
            "width": 4,
        },
    ),
    "CogVideoXTransformer3DModel": Tiny(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 16,
            "text_embed_dim": 32,
            "num_layers": 4,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": TEXT,
        },
        (1, 2, 4, 8, 8),
        lambda x, t: {"hidden_states": x, "timestep": time_of(t), "encoder_hidden_states": randn(1, TEXT, 32)},
    ),
    "ZImageTransformer2DModel": Tiny(
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 4,
            "n_refiner_layers": 2,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 32,
            "axes_dims": [4, 6, 6],
            "axes_lens": [64, 32, 32],
        },
        (4, 1, 8, 8),
        lambda x, t: {"x": [x], "t": time_of(1 - t, scale=1), "cap_feats": [randn(TEXT, 32)]},
    ),
    "ChromaTransformer2DModel": Tiny(
        {**FLUX_LIKE, "approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 1},
        (1, 16, 4),
        lambda x, t: {
            "hidden_states": x,
            "timestep": time_of(t, scale=1),
            "encoder_hidden_states": randn(1, TEXT, 32),
            "img_ids": ids(4, 4),
            "txt_ids": torch.zeros(TEXT, 3),
        },
    ),
    "CogView4Transformer2DModel": Tiny(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "text_embed_dim": 32,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "pos_embed_max_size": 8,
            "sample_size": 8,
            "rope_axes_dim": (8, 8),
        },
        (1, 4, 8, 8),
        lambda x, t: {
            "hidden_states": x,
            "timestep": time_of(t),
            "encoder_hidden_states": randn(1, TEXT, 32),
            "original_size": torch.tensor([[64.0, 64.0]]),
            "target_size": torch.tensor([[64.0, 64.0]]),
            "crop_coords": torch.tensor([[0.0, 0.0]]),
        },
    ),
    "MochiTransformer3DModel": Tiny(
        {
            **HEADS,
            "num_layers": 4,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 32,
            "time_embed_dim": 16,
            "max_sequence_length": TEXT,
        },
        VIDEO_LATENT,
        lambda x, t: {
            "hidden_states": x,
            "timestep": time_of(t),
            "encoder_hidden_states": randn(1, TEXT, 32),
            "encoder_attention_mask": torch.ones(1, TEXT, dtype=torch.bool),
        },
    ),
    "SanaTransformer2DModel": Tiny(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 32,
            "sample_size": 8,
        },
        (1, 4, 8, 8),
        lambda x, t: {"hidden_states": x, "timestep": time_of(t), "encoder_hidden_states": randn(1, TEXT, 32)},
    ),
}


def build(name: str, tiny: Tiny | None = None) -> Any:
    """The tiny model of that class, in evaluation mode, every zero-initialised weight given a value."""
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**(tiny or TINY[name]).config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any() or not (parameter.abs() < 1e3).all():  # zeroed, or never initialised
                parameter.normal_(std=0.1)
    return model


def first(output: Any) -> Tensor:
    """The prediction in a model's output, whatever its form."""
    sample = output[0] if isinstance(output, tuple) else output.sample
    return sample[0] if isinstance(sample, list) else sample


@torch.no_grad()
def sample(name: str, model: Any, steps: int = 12, guided: bool = False) -> Tensor:
    """A toy Euler sampler that changes the latent by a few per cent a step."""
    tiny = TINY[name]
    x = randn(*tiny.latent, seed=1)
    for i in range(steps):
        t = 1 - i / steps
        velocity = first(model(**tiny.arguments(x, t)))
        if guided:
            velocity = 2 * velocity - first(model(**tiny.arguments(x, t)))
        if velocity.shape[1] != x.shape[1] and velocity.shape[1] == 2 * x.shape[1]:
            velocity = velocity.chunk(2, dim=1)[0]
        x = x - 0.03 * velocity / velocity.std() * x.std()
    return x
