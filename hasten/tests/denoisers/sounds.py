"""Transformers of sound, and of what is neither image nor clip."""

from __future__ import annotations

import torch
from tiny import HEADS, TEXT, Tiny, randn, time_of

SOUNDS: dict[str, Tiny] = {
    "AceStepTransformer1DModel": Tiny(
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "in_channels": 12,
            "audio_acoustic_hidden_dim": 4,
            "encoder_hidden_size": 24,
        },
        (1, 8, 4),
        lambda x, t: {
            "hidden_states": x,
            "timestep": time_of(t, scale=1),
            "timestep_r": time_of(t, scale=1),
            "encoder_hidden_states": randn(1, TEXT, 24),
            "context_latents": randn(1, 8, 8),
        },
    ),
    "LongCatAudioDiTTransformer": Tiny(
        {"dit_dim": 32, "dit_depth": 4, "dit_heads": 2, "dit_text_dim": 24, "latent_dim": 4},
        (1, 8, 4),
        lambda x, t: {
            "hidden_states": x,
            "timestep": time_of(t, scale=1),
            "encoder_hidden_states": randn(1, TEXT, 24),
            "encoder_attention_mask": torch.ones(1, TEXT, dtype=torch.bool),
        },
    ),
    "MiniMaxMusic3Transformer1DModel": Tiny(
        {
            **HEADS,
            "in_channels": 4,
            "condition_dim": 24,
            "num_layers": 4,
            "ff_inner_dim": 64,
            "rotary_dim": 8,
            "fourier_embedding_dim": 16,
        },
        (1, 4, 8),
        lambda x, t: {"hidden_states": x, "timestep": time_of(t, scale=1), "encoder_hidden_states": randn(1, 8, 24)},
    ),
    "StableAudioDiTModel": Tiny(
        {
            **HEADS,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "num_key_value_attention_heads": 2,
            "cross_attention_dim": 32,
            "time_proj_dim": 16,
            "global_states_input_dim": 24,
            "cross_attention_input_dim": 24,
        },
        (1, 4, 8),
        lambda x, t: {
            "hidden_states": x,
            "timestep": time_of(t, scale=1),
            "encoder_hidden_states": randn(1, TEXT, 24),
            "global_hidden_states": randn(1, 1, 24),
            "rotary_embedding": (torch.ones(9, 8), torch.zeros(9, 8)),
        },
    ),
    "StableAudio3DiTModel": Tiny(
        {
            "io_channels": 4,
            "embed_dim": 32,
            "depth": 4,
            "num_heads": 2,
            "cond_token_dim": 24,
            "global_cond_dim": 24,
            "local_add_cond_dim": 5,
            "timestep_features_dim": 16,
            "num_memory_tokens": 4,
        },
        (1, 4, 8),
        lambda x, t: {
            "hidden_states": x,
            "timestep": time_of(t, scale=1),
            "encoder_hidden_states": randn(1, TEXT, 24),
            "global_hidden_states": randn(1, 24),
        },
    ),
    "T5FilmDecoder": Tiny(
        {
            "input_dims": 4,
            "targets_length": 8,
            "d_model": 32,
            "num_layers": 4,
            "num_heads": 2,
            "d_kv": 16,
            "d_ff": 64,
        },
        (1, 8, 4),
        lambda x, t: {
            "encodings_and_masks": [(randn(1, TEXT, 32), torch.ones(1, TEXT))],
            "decoder_input_tokens": x,
            "decoder_noise_time": time_of(t, scale=1),
        },
    ),
    "RFD4ProteinaTransformer": Tiny(
        {
            "nlayers": 4,
            "token_dim": 32,
            "nheads": 2,
            "dim_cond": 16,
            "pair_repr_dim": 16,
            "latent_dim": 4,
            "token_type_emb_dim": 4,
            "cath_emb_dim": 4,
            "t_emb_dim": 16,
            "seq_sep_dim": 8,
            "xt_pair_dist_dim": 6,
            "feats_seq": ("xt_bb_ca", "xt_local_latents"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists",),
            "tri_mult_c": 16,
        },
        (1, 6, 3),
        lambda x, t: {
            "bb_ca": x,
            "local_latents": randn(1, 6, 4),
            "bb_ca_time": time_of(1 - t, scale=1),
            "local_latents_time": time_of(1 - t, scale=1),
            "padding_mask": torch.ones(1, 6),
            "conditioning": {
                "is_in_context_conditioning": torch.zeros(1, 6),
                "supports_local_latent": torch.ones(1, 6),
            },
        },
    ),
}
