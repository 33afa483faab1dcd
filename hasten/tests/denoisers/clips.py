"""Video and audio-video transformers beside the families of `tiny`."""

from __future__ import annotations

from typing import Any

import torch
from tiny import HEADS, TEXT, VIDEO_LATENT, Tiny, randn, time_of
from torch import Tensor

WAN = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 4,
}
JOY = {
    "in_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 24,
    "num_layers": 4,
    "rope_dim_list": [4, 6, 6],
}
COGVIDEO = {
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
}
LTX2 = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 32,
    "audio_in_channels": 6,
    "audio_out_channels": 6,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": 4,
    "caption_channels": 24,
}


def simple(x: Tensor, t: float) -> dict[str, Any]:
    """What most of them take."""
    return {"hidden_states": x, "timestep": time_of(t), "encoder_hidden_states": randn(1, TEXT, 32)}


def minimax_h3(x: Tensor, t: float) -> dict[str, Any]:
    """Text, then the tokens of a clip, then sound."""
    text, clip, sound = TEXT, x.shape[1], 3
    tags = torch.tensor([0] * text + [1] * clip + [2] * sound)
    order = torch.arange(text + clip + sound)
    return {
        "hidden_states": x,
        "audio_hidden_states": randn(1, sound, 6),
        "encoder_hidden_states": randn(1, text, 24),
        "timestep": time_of(t),
        "timestep_indices": torch.zeros(len(tags), dtype=torch.long),
        "token_tags": tags,
        "position_ids": order[:, None].expand(-1, 3),
        "video_indices": order[text : text + clip],
        "audio_indices": order[text + clip :],
        "text_indices": order[:text],
    }


def cosmos3(x: Tensor, t: float) -> dict[str, Any]:
    """Text that is understood, then the tokens of a clip and of its sound, which are generated."""
    text, clip, sound = TEXT, 2 * 2 * 2, 3
    order = torch.arange(text + clip + sound)
    return {
        "input_ids": torch.arange(text),
        "text_indexes": order[:text],
        "position_ids": order[None].expand(3, -1),
        "und_len": text,
        "sequence_length": len(order),
        "vision_tokens": [x],
        "vision_token_shapes": [(2, 2, 2)],
        "vision_sequence_indexes": order[text : text + clip],
        "vision_mse_loss_indexes": order[text : text + clip],
        "vision_timesteps": time_of(t, clip),
        "vision_noisy_frame_indexes": [torch.arange(2)],
        "sound_tokens": [randn(6, sound)],
        "sound_token_shapes": [(sound, 1, 1)],
        "sound_sequence_indexes": order[text + clip :],
        "sound_mse_loss_indexes": order[text + clip :],
        "sound_timesteps": time_of(t, sound),
        "sound_noisy_frame_indexes": [torch.arange(sound)],
    }


def wan_animate_2(x: Tensor, t: float) -> dict[str, Any]:
    """A clip in the way in which the pipeline asks for it when it has read the reference: with its keys and values."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return {
        "hidden_states": [x],
        "timestep": time_of(t),
        "encoder_hidden_states": [randn(TEXT, 32)],
        "condition_latents": [randn(4, *x.shape[1:])],
        "kv_cache": WanAnimate2KVCache(4),
        "kv_cache_mode": "extract",
        "seq_len": 2 * 4 * 4,
        "encoder_hidden_states_image": None,
        "offset_grid_sizes": torch.tensor([[2, 4, 4]]),
    }


CLIPS: dict[str, Tiny] = {
    "AllegroTransformer3DModel": Tiny(
        {
            **HEADS,
            "in_channels": 4,
            "num_layers": 4,
            "cross_attention_dim": 32,
            "sample_height": 8,
            "sample_width": 8,
            "sample_frames": 2,
            "caption_channels": 24,
        },
        VIDEO_LATENT,
        lambda x, t: {
            "hidden_states": x,
            "timestep": time_of(t).long(),
            "encoder_hidden_states": randn(1, 1, TEXT, 24),
            "attention_mask": torch.ones(1, 2, 8, 8),
            "encoder_attention_mask": torch.ones(1, 1, TEXT),
        },
    ),
    "AnyFlowTransformer3DModel": Tiny(
        WAN,
        (1, 2, 4, 8, 8),
        lambda x, t: {
            **simple(x, t),
            "timestep": time_of(t)[:, None].expand(1, 2),
            "r_timestep": time_of(0.5 * t)[:, None].expand(1, 2),
        },
    ),
    "AnyFlowFARTransformer3DModel": Tiny(
        {**WAN, "chunk_partition": (1, 1), "full_chunk_limit": 2},
        (1, 2, 4, 8, 8),
        lambda x, t: {
            "hidden_states": x,
            "timestep": time_of(t)[:, None].expand(1, 2),
            "r_timestep": time_of(0.5 * t)[:, None].expand(1, 2),
            "encoder_hidden_states": randn(1, TEXT, 32),
            "chunk_partition": [1, 1],
        },
    ),
    "ChronoEditTransformer3DModel": Tiny(WAN, VIDEO_LATENT, simple),
    "ConsisIDTransformer3DModel": Tiny(
        {
            **COGVIDEO,
            "is_train_face": True,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 8,
            "LFE_vit_dim": 16,
            "LFE_depth": 5,
            "LFE_dim_head": 4,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 2,
            "LFE_num_querie": 3,
            "LFE_output_dim": 21,
            "LFE_ff_mult": 1,
        },
        (1, 2, 4, 8, 8),
        lambda x, t: {
            **simple(x, t),
            "id_cond": randn(1, 8),
            "id_vit_hidden": [randn(1, 3, 16, seed=i) for i in range(5)],
        },
    ),
    "Cosmos3OmniTransformer": Tiny(
        {
            "head_dim": 16,
            "hidden_size": 32,
            "intermediate_size": 64,
            "latent_channel": 4,
            "num_attention_heads": 2,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "patch_latent_dim": 16,
            "vocab_size": 16,
            "rope_axes_dim": (4, 2, 2),
            "sound_gen": True,
            "sound_dim": 6,
        },
        (1, 4, 2, 4, 4),
        cosmos3,
    ),
    "CosmosTransformer3DModel": Tiny(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "mlp_ratio": 2.0,
            "text_embed_dim": 32,
            "adaln_lora_dim": 8,
            "max_size": (4, 16, 16),
            "concat_padding_mask": False,
        },
        VIDEO_LATENT,
        simple,
    ),
    "EasyAnimateTransformer3DModel": Tiny(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "sample_width": 8,
            "sample_height": 8,
            "num_layers": 4,
            "mmdit_layers": 4,
            "time_embed_dim": 16,
            "text_embed_dim": 32,
            "norm_eps": 1e-5,
        },
        VIDEO_LATENT,
        simple,
    ),
    "HeliosTransformer3DModel": Tiny(
        {**WAN, "rope_dim": (4, 6, 6)},
        VIDEO_LATENT,
        lambda x, t: {
            **simple(x, t),
            "indices_hidden_states": torch.arange(3, 5)[None],
            "indices_latents_history_short": torch.arange(1, 3)[None],
            "latents_history_short": randn(1, 4, 2, 8, 8),
        },
    ),
    "HunyuanVideoFramepackTransformer3DModel": Tiny(
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
            "has_image_proj": True,
            "image_proj_dim": 16,
            "has_clean_x_embedder": True,
        },
        VIDEO_LATENT,
        lambda x, t: {
            **simple(x, t),
            "encoder_attention_mask": torch.ones(1, TEXT),
            "pooled_projections": randn(1, 32),
            "image_embeds": randn(1, 3, 16),
            "indices_latents": torch.arange(1, 3),
            "guidance": time_of(1.0),
            "latents_clean": randn(1, 4, 1, 8, 8),
            "indices_latents_clean": torch.arange(1),
            "latents_history_2x": randn(1, 4, 2, 8, 8),
            "indices_latents_history_2x": torch.arange(2),
            "latents_history_4x": randn(1, 4, 4, 8, 8),
            "indices_latents_history_4x": torch.arange(4),
        },
    ),
    "JoyImageEditTransformer3DModel": Tiny(
        JOY,
        VIDEO_LATENT,
        lambda x, t: {"hidden_states": x, "timestep": time_of(t), "encoder_hidden_states": randn(1, TEXT, 24)},
    ),
    "JoyImageEditPlusTransformer3DModel": Tiny(
        JOY,
        (1, 8, 4, 1, 2, 2),
        lambda x, t: {
            "hidden_states": x,
            "timestep": time_of(t),
            "encoder_hidden_states": randn(1, TEXT, 24),
            "shape_list": [[(2, 2, 2)]],
        },
    ),
    "Kandinsky5Transformer3DModel": Tiny(
        {
            "in_visual_dim": 4,
            "in_text_dim": 24,
            "in_text_dim2": 12,
            "time_dim": 16,
            "out_visual_dim": 4,
            "model_dim": 32,
            "ff_dim": 64,
            "num_text_blocks": 1,
            "num_visual_blocks": 4,
            "axes_dims": (4, 6, 6),
        },
        (1, 2, 8, 8, 4),
        lambda x, t: {
            "hidden_states": x,
            "timestep": time_of(t),
            "encoder_hidden_states": randn(1, TEXT, 24),
            "pooled_projections": randn(1, 12),
            "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(TEXT),
        },
    ),
    "Kandinsky6Transformer3DModel": Tiny(
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 24,
            "in_text_dim2": 12,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 64,
            "num_text_blocks": 1,
            "num_visual_blocks": 4,
            "axes_dims": (4, 6, 6),
            "visual_cond": False,
            "in_audio_dim": 6,
            "out_audio_dim": 6,
            "model_dim_a": 16,
            "time_dim_a": 16,
            "ff_dim_a": 32,
            "axes_dims_a": (16,),
        },
        (1, 2, 8, 8, 4),
        lambda x, t: {
            "hidden_states": x,
            "timestep": time_of(t),
            "encoder_hidden_states": randn(1, TEXT, 24),
            "pooled_projections": randn(1, 12),
            "audio_hidden_states": randn(1, 3, 6),
        },
    ),
    "Kandinsky6SRTransformer3DModel": Tiny(
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 64,
            "num_visual_blocks": 4,
            "axes_dims": (4, 6, 6),
        },
        (1, 1, 8, 8, 9),  # latents, those of the small clip, and a mask
        lambda x, t: {"hidden_states": x, "timestep": time_of(t)},
    ),
    "LatteTransformer3DModel": Tiny(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "sample_size": 8,
            "patch_size": 2,
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "caption_channels": 24,
            "video_length": 2,
        },
        VIDEO_LATENT,
        lambda x, t: {
            "hidden_states": x,
            "timestep": time_of(t).long(),
            "encoder_hidden_states": randn(1, TEXT, 24),
        },
    ),
    "LTX2VideoTransformer3DModel": Tiny(
        LTX2,
        (1, 32, 4),
        lambda x, t: {
            "hidden_states": x,
            "audio_hidden_states": randn(1, 3, 6),
            "encoder_hidden_states": randn(1, TEXT, 24),
            "audio_encoder_hidden_states": randn(1, TEXT, 24, seed=8),
            "timestep": time_of(t),
            "num_frames": 2,
            "height": 4,
            "width": 4,
            "audio_num_frames": 3,
        },
    ),
    "MiniMaxH3Transformer3DModel": Tiny(
        {
            **HEADS,
            "hidden_size": 32,
            "num_layers": 4,
            "num_refiner_layers": 1,
            "ffn_dim": 64,
            "in_channels": 1,
            "audio_in_channels": 6,
            "text_dim": 24,
            "freq_dim": 16,
            "time_embed_hidden_dim": 32,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        (1, 32, 4),
        minimax_h3,
    ),
    "MotifVideoTransformer3DModel": Tiny(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_single_layers": 3,
            "num_decoder_layers": 1,
            "text_embed_dim": 32,
            "rope_axes_dim": (4, 6, 6),
        },
        VIDEO_LATENT,
        simple,
    ),
    "SanaVideoTransformer3DModel": Tiny(
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
        VIDEO_LATENT,
        simple,
    ),
    "SanaWMTransformer3DModel": Tiny(
        {
            "in_channels": 4,
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "linear_head_dim": 16,
            "softmax_every_n": 2,
            "chunk_plucker_channels": 6,
            "chunk_plucker_post_attn_blocks": 4,
            "caption_channels": 24,
            "image_size": 64,
        },
        (1, 4, 2, 4, 4),
        lambda x, t: {
            "hidden_states": x,
            "timestep": time_of(t)[:, None, None].expand(1, 1, 2),
            "encoder_hidden_states": randn(1, 1, TEXT, 24),
            "encoder_attention_mask": torch.ones(1, TEXT),
        },
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Tiny(
        LTX2,
        (1, 32, 4),
        lambda x, t: {
            "hidden_states": x,
            "timestep": time_of(t),
            "encoder_hidden_states": randn(1, TEXT, 24),
            "video_rotary_emb": (torch.ones(1, 32, 32), torch.zeros(1, 32, 32)),
        },
    ),
    "SkyReelsV2Transformer3DModel": Tiny(WAN, VIDEO_LATENT, simple),
    "WanAnimateTransformer3DModel": Tiny(
        {
            **WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": None,
            "motion_encoder_channel_sizes": {"4": 4, "8": 4, "16": 4},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 8,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        (1, 12, 2, 8, 8),
        lambda x, t: {
            **simple(x, t),
            "pose_hidden_states": randn(1, 4, 1, 8, 8),
            "face_pixel_values": randn(1, 3, 4, 16, 16),
        },
    ),
    "WanAnimate2Transformer3DModel": Tiny(
        {
            "text_len": TEXT,
            "in_dim": 8,
            "dim": 32,
            "ffn_dim": 64,
            "freq_dim": 32,
            "text_dim": 32,
            "out_dim": 4,
            "num_heads": 2,
            "num_layers": 4,
            "use_img_emb": False,
        },
        (4, 2, 8, 8),
        wan_animate_2,
    ),
    "WanVACETransformer3DModel": Tiny(
        {**WAN, "vace_layers": [0, 2], "vace_in_channels": 8},
        VIDEO_LATENT,
        lambda x, t: {**simple(x, t), "control_hidden_states": randn(1, 8, 2, 8, 8)},
    ),
}
