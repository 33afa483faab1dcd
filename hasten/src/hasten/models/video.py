"""Video transformers: HunyuanVideo, 1.5 and FramePack, Wan and VACE, Sana-Video, LTX-Video, CogVideoX and Mochi."""

from __future__ import annotations

from hasten.models.adapter import HostSpec, ModuleSpec, StackSpec
from hasten.models.image import CROSS_ATTENTION
from hasten.models.registry import register

_HUNYUAN_DOUBLE = StackSpec(
    "transformer_blocks",
    returns=("hidden", "encoder"),
    modules=ModuleSpec(forecast=(("attn", ("image", "text")), ("ff", ("image",)), ("ff_context", ("text",)))),
)

_HUNYUAN_SINGLE = StackSpec(
    "single_transformer_blocks",
    returns=("hidden", "encoder"),
    modules=ModuleSpec(forecast=(("proj_out", ("joint",)),), skip=("attn", "proj_mlp", "act_mlp")),
)

HUNYUAN_VIDEO = register(
    "HunyuanVideoTransformer3DModel", HostSpec(stacks=(_HUNYUAN_DOUBLE, _HUNYUAN_SINGLE), layout="latent")
)

# The same blocks; tokens of the clip so far come first and are forecast with the others.
FRAMEPACK = register(
    "HunyuanVideoFramepackTransformer3DModel",
    HostSpec(stacks=(_HUNYUAN_DOUBLE, _HUNYUAN_SINGLE), layout="history"),
)

HUNYUAN_VIDEO_15 = register("HunyuanVideo15Transformer3DModel", HostSpec(stacks=(_HUNYUAN_DOUBLE,), layout="latent"))

_WAN = StackSpec(
    "blocks",
    returns=("hidden",),
    modules=ModuleSpec(forecast=(("attn1", ("image",)), ("attn2", ("image",)), ("ffn", ("image",)))),
)

WAN = register("WanTransformer3DModel", HostSpec(stacks=(_WAN,), layout="latent"))

# The control blocks (8 beside 40 blocks in the 14B model) run on skipped steps too: `vace_layers` may name the last
# block, and what a control block adds comes after the block of its layer.
WAN_VACE = register("WanVACETransformer3DModel", HostSpec(stacks=(_WAN,), layout="latent"))

SANA_VIDEO = register("SanaVideoTransformer3DModel", HostSpec(stacks=(CROSS_ATTENTION,), layout="latent"))

LTX_VIDEO = register("LTXVideoTransformer3DModel", HostSpec(stacks=(CROSS_ATTENTION,), layout="sizes"))

COGVIDEOX = register(
    "CogVideoXTransformer3DModel",
    HostSpec(
        stacks=(
            StackSpec(
                "transformer_blocks",
                returns=("hidden", "encoder"),
                modules=ModuleSpec(forecast=(("attn1", ("image", "text")), ("ff", ("joint",)))),
            ),
        ),
        layout="frames",
    ),
)

# The last block has no feed-forward network for the text.
MOCHI = register(
    "MochiTransformer3DModel",
    HostSpec(
        stacks=(
            StackSpec(
                "transformer_blocks",
                returns=("hidden", "encoder"),
                modules=ModuleSpec(
                    forecast=(("attn1", ("image", "text")), ("ff", ("image",)), ("ff_context", ("text",))),
                ),
            ),
        ),
        layout="latent",
    ),
)
