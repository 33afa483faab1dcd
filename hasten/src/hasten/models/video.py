"""Video transformers: HunyuanVideo, 1.5 and FramePack, Wan and VACE, Sana-Video, LTX-Video, CogVideoX and Mochi."""

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
    "HunyuanVideoTransformer3DModel", ModelAdapter(stacks=(_HUNYUAN_DOUBLE, _HUNYUAN_SINGLE), layout="latent")
)

# The same blocks; tokens of the clip so far come first and are forecast with the others.
FRAMEPACK = register(
    "HunyuanVideoFramepackTransformer3DModel",
    ModelAdapter(stacks=(_HUNYUAN_DOUBLE, _HUNYUAN_SINGLE), layout="history"),
)

HUNYUAN_VIDEO_15 = register(
    "HunyuanVideo15Transformer3DModel", ModelAdapter(stacks=(_HUNYUAN_DOUBLE,), layout="latent")
)

_WAN = BlockStack(
    "blocks",
    returns=("hidden",),
    modules=BlockModules(forecast=(("attn1", ("image",)), ("attn2", ("image",)), ("ffn", ("image",)))),
)

WAN = register("WanTransformer3DModel", ModelAdapter(stacks=(_WAN,), layout="latent"))

# The control blocks (8 beside 40 blocks in the 14B model) run on skipped steps too: `vace_layers` may name the last
# block, and what a control block adds comes after the block of its layer.
WAN_VACE = register("WanVACETransformer3DModel", ModelAdapter(stacks=(_WAN,), layout="latent"))

SANA_VIDEO = register("SanaVideoTransformer3DModel", ModelAdapter(stacks=(CROSS_ATTENTION,), layout="latent"))

LTX_VIDEO = register("LTXVideoTransformer3DModel", ModelAdapter(stacks=(CROSS_ATTENTION,), layout="sizes"))

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
    ),
)
