"""Transformers of clips that have sound: LTX-2, Kandinsky 6, MiniMax-H3 and Cosmos 3.

Where sound is a stream of its own it is forecast beside the clip, with the same weights.
"""

from __future__ import annotations

from hasten.models.adapter import BlockModules, BlockStack, ModelAdapter
from hasten.models.registry import register

LTX_2 = register(
    "LTX2VideoTransformer3DModel",
    ModelAdapter(
        stacks=(
            BlockStack(
                "transformer_blocks",
                returns=("hidden", "audio_hidden_states"),
                modules=BlockModules(
                    forecast=(
                        ("attn1", ("image",)),
                        ("attn2", ("image",)),
                        ("audio_to_video_attn", ("image",)),
                        ("ff", ("image",)),
                        ("audio_attn1", ()),
                        ("audio_attn2", ()),
                        ("video_to_audio_attn", ()),
                        ("audio_ff", ()),
                    ),
                ),
            ),
        ),
        layout="sizes",
        final_norm="norm_out",
    ),
)

# The text blocks (4 for the clip and 4 for the sound, beside 60) run on every step.
KANDINSKY_6 = register(
    "Kandinsky6Transformer3DModel",
    ModelAdapter(
        stacks=(BlockStack("visual_transformer_blocks", returns=("hidden", "aud"), hidden="vis", encoder="text_v"),),
        width="model_dim",
        layout="channels-last",
    ),
)

# One sequence of text, clip and sound.
MINIMAX_H3 = register(
    "MiniMaxH3Transformer3DModel",
    ModelAdapter(
        stacks=(
            BlockStack(
                "transformer_blocks",
                returns=("hidden",),
                encoder=None,
                joint=True,
                modules=BlockModules(forecast=(("attn", ("joint",)), ("ff", ("joint",)))),
            ),
        ),
        width="hidden_size",
    ),
)

# Text is understood, then everything else generated: clip, sound and action are one sequence.
COSMOS_3 = register(
    "Cosmos3OmniTransformer",
    ModelAdapter(
        stacks=(
            BlockStack(
                "layers",
                returns=("und_seq", "hidden"),
                hidden="gen_seq",
                encoder=None,
                modules=BlockModules(
                    forecast=(("self_attn", ("text", "image")), ("mlp", ("text",)), ("mlp_moe_gen", ("image",))),
                ),
            ),
        ),
        timestep="vision_timesteps",
        hidden="vision_tokens",
        width="hidden_size",
    ),
)
