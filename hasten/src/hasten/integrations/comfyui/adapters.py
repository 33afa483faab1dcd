"""How ComfyUI's own denoisers are wired, by the full names of their classes (some share theirs with diffusers)."""

from __future__ import annotations

from hasten.models import BlockStack, ModelAdapter, register

__all__ = ["ADAPTERS"]

# Image and text tokens apart, then in one sequence.
DOUBLE = BlockStack("double_blocks", returns=("hidden", "encoder"), hidden="img", encoder="txt")
SINGLE = BlockStack("single_blocks", returns=("hidden",), hidden="x", encoder=None, joint=True)
TWO_STACKS = ModelAdapter(stacks=(DOUBLE, SINGLE), timestep="timestep", hidden="x", width="hidden_size")

ADAPTERS = {
    "comfy.ldm.flux.model.Flux": TWO_STACKS,  # FLUX.1 and FLUX.2
    "comfy.ldm.chroma.model.Chroma": TWO_STACKS,
    "comfy.ldm.hunyuan_video.model.HunyuanVideo": TWO_STACKS,
    "comfy.ldm.qwen_image.model.QwenImageTransformer2DModel": ModelAdapter(
        stacks=(BlockStack("transformer_blocks"),), timestep="timestep", hidden="x"
    ),
    "comfy.ldm.wan.model.WanModel": ModelAdapter(
        stacks=(BlockStack("blocks", returns=("hidden",), hidden="x", encoder=None),),
        timestep="timestep",
        hidden="x",
        width="dim",
    ),
    "comfy.ldm.lumina.model.NextDiT": ModelAdapter(  # Lumina 2 and Z-Image
        stacks=(BlockStack("layers", returns=("hidden",), hidden="x", encoder=None, joint=True),),
        timestep="timesteps",
        hidden="x",
        width="dim",
    ),
    "comfy.ldm.lightricks.model.LTXVModel": ModelAdapter(
        stacks=(BlockStack("transformer_blocks", returns=("hidden",), hidden="x", encoder=None),),
        timestep="timestep",
        hidden="x",
    ),
}

for _name, _adapter in ADAPTERS.items():
    register(_name, _adapter)
