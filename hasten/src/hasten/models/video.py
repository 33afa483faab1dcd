"""Video transformers.

HunyuanVideo, 1.5 and FramePack, Wan, VACE and Animate, SkyReels, Sana-Video, LTX-Video, CogVideoX, Mochi, Kandinsky 5
and Cosmos. Those whose clips have sound are in `sound`.
"""

from __future__ import annotations

from hasten.models.adapter import BlockModules, BlockStack, ModelAdapter
from hasten.models.image import CROSS_ATTENTION
from hasten.models.registry import register

_HUNYUAN_DOUBLE = BlockStack(
    "transformer_blocks",
    returns=("hidden", "encoder"),
    modules=BlockModules(forecast=(("attn", ("image", "text")), ("ff", ("image",)), ("ff_context", ("text",)))),
)

_HUNYUAN_SINGLE = BlockStack(
    "single_transformer_blocks",
    returns=("hidden", "encoder"),
    modules=BlockModules(forecast=(("proj_out", ("joint",)),), skip=("attn", "proj_mlp", "act_mlp")),
)

HUNYUAN_VIDEO = register(
    "HunyuanVideoTransformer3DModel",
    ModelAdapter(stacks=(_HUNYUAN_DOUBLE, _HUNYUAN_SINGLE), layout="latent", final_norm="norm_out.norm"),
)

# The same blocks; tokens of the clip so far come first and are forecast with the others.
FRAMEPACK = register(
    "HunyuanVideoFramepackTransformer3DModel",
    ModelAdapter(stacks=(_HUNYUAN_DOUBLE, _HUNYUAN_SINGLE), layout="history", final_norm="norm_out.norm"),
)

HUNYUAN_VIDEO_15 = register(
    "HunyuanVideo15Transformer3DModel",
    ModelAdapter(stacks=(_HUNYUAN_DOUBLE,), layout="latent", final_norm="norm_out.norm"),
)

_WAN = BlockStack(
    "blocks",
    returns=("hidden",),
    modules=BlockModules(forecast=(("attn1", ("image",)), ("attn2", ("image",)), ("ffn", ("image",)))),
)

WAN = register("WanTransformer3DModel", ModelAdapter(stacks=(_WAN,), layout="latent", final_norm="norm_out"))

# The control blocks (8 beside 40 blocks in the 14B model) run on skipped steps too: `vace_layers` may name the last
# block, and what a control block adds comes after the block of its layer.
WAN_VACE = register("WanVACETransformer3DModel", ModelAdapter(stacks=(_WAN,), layout="latent"))

# What the blocks of the face add goes into the blocks behind them, and is of no use where these are skipped.
WAN_ANIMATE = register(
    "WanAnimateTransformer3DModel",
    ModelAdapter(
        stacks=(
            _WAN,
            BlockStack("face_adapter", returns=("hidden",), encoder=None, side=True, modules=BlockModules(())),
        ),
        layout="latent",
    ),
)

WAN_ANIMATE_2 = register(
    "WanAnimate2Transformer3DModel",
    ModelAdapter(
        stacks=(
            BlockStack(
                "blocks",
                returns=("hidden",),
                modules=BlockModules(
                    forecast=(("self_attn", ("image",)), ("cross_attn", ("image",)), ("ffn", ("image",))),
                ),
            ),
        ),
        width="dim",
        layout="list",
    ),
)

SKYREELS = register(
    "SkyReelsV2Transformer3DModel", ModelAdapter(stacks=(_WAN,), layout="latent", final_norm="norm_out")
)

# The text blocks (2 beside 32 or 60) run on every step.
KANDINSKY_5 = register(
    "Kandinsky5Transformer3DModel",
    ModelAdapter(
        stacks=(
            BlockStack(
                "visual_transformer_blocks",
                returns=("hidden",),
                hidden="visual_embed",
                encoder="text_embed",
                modules=BlockModules(
                    forecast=(
                        ("self_attention", ("image",)),
                        ("cross_attention", ("image",)),
                        ("feed_forward", ("image",)),
                    ),
                ),
            ),
        ),
        width="model_dim",
        layout="channels-last",
        final_norm="out_layer.norm",
    ),
)

COSMOS = register(
    "CosmosTransformer3DModel", ModelAdapter(stacks=(CROSS_ATTENTION,), layout="latent", final_norm="norm_out.norm")
)

SANA_VIDEO = register(
    "SanaVideoTransformer3DModel", ModelAdapter(stacks=(CROSS_ATTENTION,), layout="latent", final_norm="norm_out.norm")
)

LTX_VIDEO = register(
    "LTXVideoTransformer3DModel", ModelAdapter(stacks=(CROSS_ATTENTION,), layout="sizes", final_norm="norm_out")
)

COGVIDEOX = register(
    "CogVideoXTransformer3DModel",
    ModelAdapter(
        stacks=(
            BlockStack(
                "transformer_blocks",
                returns=("hidden", "encoder"),
                modules=BlockModules(forecast=(("attn1", ("image", "text")), ("ff", ("joint",)))),
            ),
        ),
        layout="frames",
        final_norm="norm_final",
    ),
)

# The last block has no feed-forward network for the text.
MOCHI = register(
    "MochiTransformer3DModel",
    ModelAdapter(
        stacks=(
            BlockStack(
                "transformer_blocks",
                returns=("hidden", "encoder"),
                modules=BlockModules(
                    forecast=(("attn1", ("image", "text")), ("ff", ("image",)), ("ff_context", ("text",))),
                ),
            ),
        ),
        layout="latent",
        final_norm="norm_out.norm",
    ),
)
