"""Image transformers with one stack: Qwen-Image, Stable Diffusion 3, DiT, PixArt, Z-Image, CogView4 and Sana."""

from __future__ import annotations

from hasten.models.adapter import BlockModules, BlockStack, ModelAdapter
from hasten.models.registry import register

QWEN_IMAGE = register(
    "QwenImageTransformer2DModel",
    ModelAdapter(
        stacks=(
            BlockStack(
                "transformer_blocks",
                modules=BlockModules(
                    forecast=(("attn", ("image", "text")), ("img_mlp", ("image",)), ("txt_mlp", ("text",))),
                ),
            ),
        ),
        layout="shapes",
    ),
)

# The last block returns no text, and has no feed-forward network for it.
SD3 = register(
    "SD3Transformer2DModel",
    ModelAdapter(
        stacks=(
            BlockStack(
                "transformer_blocks",
                modules=BlockModules(
                    forecast=(
                        ("attn", ("image", "text")),
                        ("attn2", ("image",)),
                        ("ff", ("image",)),
                        ("ff_context", ("text",)),
                    ),
                ),
            ),
        ),
        layout="latent",
    ),
)

DIT = register(
    "DiTTransformer2DModel",
    ModelAdapter(
        stacks=(
            BlockStack(
                "transformer_blocks",
                returns=("hidden",),
                encoder=None,
                modules=BlockModules(forecast=(("attn1", ("image",)), ("ff", ("image",)))),
            ),
        ),
        layout="latent",
    ),
)

CROSS_ATTENTION = BlockStack(
    "transformer_blocks",
    returns=("hidden",),
    modules=BlockModules(forecast=(("attn1", ("image",)), ("attn2", ("image",)), ("ff", ("image",)))),
)

PIXART = register("PixArtTransformer2DModel", ModelAdapter(stacks=(CROSS_ATTENTION,), layout="latent"))

SANA = register("SanaTransformer2DModel", ModelAdapter(stacks=(CROSS_ATTENTION,), layout="latent"))

# The refiners before `layers` are small and prepare the text and image tokens: they run on every step.
Z_IMAGE = register(
    "ZImageTransformer2DModel",
    ModelAdapter(
        stacks=(
            BlockStack(
                "layers",
                returns=("hidden",),
                hidden="x",
                encoder=None,
                joint=True,
                modules=BlockModules(forecast=(("attention", ("joint",)), ("feed_forward", ("joint",)))),
            ),
        ),
        timestep="t",
        hidden="x",
        width="dim",
        layout="list",
    ),
)

# One feed-forward network serves both streams: image tokens first, then text.
COGVIEW4 = register(
    "CogView4Transformer2DModel",
    ModelAdapter(
        stacks=(
            BlockStack(
                "transformer_blocks",
                returns=("hidden", "encoder"),
                modules=BlockModules(forecast=(("attn1", ("image", "text")), ("ff", ("image", "text")))),
            ),
        ),
        layout="latent",
    ),
)
