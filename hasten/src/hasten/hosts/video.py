"""Video transformers: HunyuanVideo and 1.5, Wan, LTX-Video, CogVideoX and Mochi."""

from __future__ import annotations

from hasten.hosts.image import CROSS_ATTENTION
from hasten.hosts.registry import register
from hasten.hosts.spec import HostSpec, ModuleSpec, StackSpec

_HUNYUAN_DOUBLE = StackSpec(
    "transformer_blocks",
    returns=("hidden", "encoder"),
    modules=ModuleSpec(forecast=(("attn", ("image", "text")), ("ff", ("image",)), ("ff_context", ("text",)))),
)

HUNYUAN_VIDEO = register(
    "HunyuanVideoTransformer3DModel",
    HostSpec(
        stacks=(
            _HUNYUAN_DOUBLE,
            StackSpec(
                "single_transformer_blocks",
                returns=("hidden", "encoder"),
                modules=ModuleSpec(forecast=(("proj_out", ("joint",)),), skip=("attn", "proj_mlp", "act_mlp")),
            ),
        ),
    ),
)

HUNYUAN_VIDEO_15 = register("HunyuanVideo15Transformer3DModel", HostSpec(stacks=(_HUNYUAN_DOUBLE,)))

WAN = register(
    "WanTransformer3DModel",
    HostSpec(
        stacks=(
            StackSpec(
                "blocks",
                returns=("hidden",),
                modules=ModuleSpec(forecast=(("attn1", ("image",)), ("attn2", ("image",)), ("ffn", ("image",)))),
            ),
        ),
    ),
)

LTX_VIDEO = register("LTXVideoTransformer3DModel", HostSpec(stacks=(CROSS_ATTENTION,)))

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
    ),
)
