"""FLUX.1: double-stream blocks, then single-stream blocks; both take and return text and image tokens apart."""

from hasten.hosts.registry import register
from hasten.hosts.spec import HostSpec, ModuleSpec, StackSpec

FLUX = register(
    "FluxTransformer2DModel",
    HostSpec(
        stacks=(
            StackSpec(
                "transformer_blocks",
                modules=ModuleSpec(
                    forecast=(("attn", ("image", "text")), ("ff", ("image",)), ("ff_context", ("text",))),
                ),
            ),
            StackSpec(
                "single_transformer_blocks",
                # The block's one pre-gate output; attention and MLP only feed it.
                modules=ModuleSpec(forecast=(("proj_out", ("joint",)),), skip=("attn", "proj_mlp", "act_mlp")),
            ),
        ),
    ),
)
