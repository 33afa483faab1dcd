"""FLUX.1, FLUX.2, Chroma: double-stream blocks, then single-stream ones. FLUX.3: blocks of each mode, then of all."""

from __future__ import annotations

from hasten.models.adapter import BlockModules, BlockStack, ModelAdapter
from hasten.models.registry import register

DOUBLE = BlockStack(
    "transformer_blocks",
    modules=BlockModules(forecast=(("attn", ("image", "text")), ("ff", ("image",)), ("ff_context", ("text",)))),
)
# One pre-gate output; attention and the first half of the MLP only feed it.
SINGLE_OUTPUT = BlockModules(forecast=(("proj_out", ("joint",)),), skip=("attn", "proj_mlp", "act_mlp"))

FLUX = register(
    "FluxTransformer2DModel",
    ModelAdapter(
        stacks=(DOUBLE, BlockStack("single_transformer_blocks", modules=SINGLE_OUTPUT)),
        layout="ids",
        final_norm="norm_out.norm",
    ),
)

# From here on the single blocks see text and image tokens in one sequence; the hidden site forecasts all of it.
FLUX2 = register(
    "Flux2Transformer2DModel",
    ModelAdapter(
        stacks=(
            DOUBLE,
            BlockStack(
                "single_transformer_blocks",
                returns=("hidden",),
                encoder=None,
                joint=True,
                modules=BlockModules(forecast=(("attn", ("joint",)),)),
            ),
        ),
        layout="ids",
        final_norm="norm_out.norm",
    ),
)

CHROMA = register(
    "ChromaTransformer2DModel",
    ModelAdapter(
        stacks=(
            DOUBLE,
            BlockStack(
                "single_transformer_blocks", returns=("hidden",), encoder=None, joint=True, modules=SINGLE_OUTPUT
            ),
        ),
        layout="ids",
        final_norm="norm_out.norm",
    ),
)


def _beside(name: str) -> BlockStack:
    """A stack of FLUX.3 that carries no token of the image."""
    return BlockStack(name, returns=("hidden",), encoder=None, side=True, modules=BlockModules(()))


# Text, the image and reference images each go through blocks of their own before they meet. Text and references are at
# no noise, so that what enters their blocks is the same in every step and tells a gate nothing.
FLUX3 = register(
    "Flux3Transformer2DModel",
    ModelAdapter(
        stacks=(
            _beside("txt_mode_blocks"),
            BlockStack(
                "mode_blocks.image",
                returns=("hidden",),
                encoder=None,
                modules=BlockModules(forecast=(("attn", ("image",)), ("ff", ("image",)))),
            ),
            _beside("mode_blocks.image_cond"),
            BlockStack(
                "single_transformer_blocks",
                modules=BlockModules(forecast=(("attn", ("joint",)), ("ff", ("joint",)))),
            ),
        ),
        layout="ids",
    ),
)
