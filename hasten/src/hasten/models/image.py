"""Image transformers that are not of FLUX's kind.

Qwen-Image, Stable Diffusion 3, DiT, PixArt, Z-Image, CogView4, Sana, HunyuanDiT, HunyuanImage, Ideogram 4, Krea 2,
Bria Fibo 2 and Amused.
"""

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
        final_norm="norm_out.norm",
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
        final_norm="norm_out.norm",
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
        final_norm="norm_out",
    ),
)

CROSS_ATTENTION = BlockStack(
    "transformer_blocks",
    returns=("hidden",),
    modules=BlockModules(forecast=(("attn1", ("image",)), ("attn2", ("image",)), ("ff", ("image",)))),
)

PIXART = register(
    "PixArtTransformer2DModel", ModelAdapter(stacks=(CROSS_ATTENTION,), layout="latent", final_norm="norm_out")
)

SANA = register(
    "SanaTransformer2DModel", ModelAdapter(stacks=(CROSS_ATTENTION,), layout="latent", final_norm="norm_out.norm")
)

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
        final_norm="all_final_layer.2-1.norm_final",
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
        final_norm="norm_out.norm",
    ),
)

# One sequence of text, reference images and, last, the image that is made.
QWEN_IMAGE_21 = register(
    "QwenImage21Transformer2DModel",
    ModelAdapter(
        stacks=(
            BlockStack(
                "transformer_blocks",
                returns=("hidden",),
                encoder=None,
                joint=True,
                modules=BlockModules(forecast=(("attn", ("joint",)), ("img_mlp", ("joint",)))),
            ),
        ),
    ),
)

# The second half of the blocks also gets what left the first half: passed by when both are skipped.
HUNYUAN_DIT = register(
    "HunyuanDiT2DModel",
    ModelAdapter(
        stacks=(
            BlockStack(
                "blocks",
                returns=("hidden",),
                modules=BlockModules(forecast=(("attn1", ("image",)), ("attn2", ("image",)), ("ff", ("image",)))),
            ),
        ),
        layout="latent",
        final_norm="norm_out.norm",
    ),
)

# In the single blocks image tokens come first; they are handed on apart.
HUNYUAN_IMAGE = register(
    "HunyuanImageTransformer2DModel",
    ModelAdapter(
        stacks=(
            BlockStack(
                "transformer_blocks",
                returns=("hidden", "encoder"),
                modules=BlockModules(
                    forecast=(("attn", ("image", "text")), ("ff", ("image",)), ("ff_context", ("text",))),
                ),
            ),
            BlockStack(
                "single_transformer_blocks",
                returns=("hidden", "encoder"),
                modules=BlockModules(forecast=(("proj_out", ("joint",)),), skip=("attn", "proj_mlp", "act_mlp")),
            ),
        ),
        layout="latent",
        final_norm="norm_out.norm",
    ),
)

IDEOGRAM_4 = register(
    "Ideogram4Transformer2DModel",
    ModelAdapter(
        stacks=(
            BlockStack(
                "layers",
                returns=("hidden",),
                encoder=None,
                joint=True,
                modules=BlockModules(forecast=(("attention", ("joint",)), ("feed_forward", ("joint",)))),
            ),
        ),
        layout="positions",
        final_norm="final_layer.norm_final",
    ),
)

KREA_2 = register(
    "Krea2Transformer2DModel",
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
        layout="positions",
    ),
)

# The text is condensed to a few tokens before the blocks; the refiners there run on every step.
BRIA_FIBO_2 = register(
    "BriaFibo2Transformer2DModel",
    ModelAdapter(
        stacks=(
            BlockStack(
                "layers",
                returns=("hidden",),
                hidden="x",
                encoder=None,
                joint=True,
                modules=BlockModules(
                    forecast=(("attention", ("joint",)), ("cross_attention", ("joint",)), ("feed_forward", ("joint",))),
                ),
            ),
        ),
        width="dim",
        final_norm="final_layer.norm_final",
    ),
)

# Amused: predicts the codes of an image, and is not told how far it has come.
UVIT = register(
    "UVit2DModel",
    ModelAdapter(
        stacks=(BlockStack("transformer_layers", returns=("hidden",)),),
        timestep=None,
        hidden="input_ids",
        width="hidden_size",
    ),
)
