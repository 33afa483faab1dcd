"""Models at the sizes that people run, with random weights made on the device; tiny ones of the same classes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from harness import Device
from hasten.bench.peers import shared_copy
from torch import Tensor, nn

TINY_HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
TINY_FLUX = {
    **TINY_HEADS,
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 3,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}
TINY_WAN = {**TINY_HEADS, "text_dim": 32, "freq_dim": 32, "ffn_dim": 64, "num_layers": 4}
WAN_1B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}  # the other defaults are of Wan 2.1


@dataclass(frozen=True, eq=False)
class Rig:
    """A pipeline and the arguments of its calls, but for the number of steps.

    Attributes:
        pipe: with a transformer and a scheduler; what encodes text is missing.
        call: its arguments.
        tokens: of the image or clip, as the blocks know them.
        text: tokens of the prompt.
    """

    pipe: Any
    call: dict[str, Any]
    tokens: int
    text: int

    def draw(self, steps: int, **more: Any) -> Tensor:
        """Latents of one call."""
        generator = torch.Generator().manual_seed(0)  # on the host, so that every device begins with the same noise
        output = self.pipe(
            num_inference_steps=steps, output_type="latent", generator=generator, **{**self.call, **more}
        )
        latents: Tensor = output.frames if hasattr(output, "frames") else output.images
        return latents

    def copy(self) -> Rig:
        """A pipeline of its own around copies of the modules that share their weights."""
        parts = {
            name: shared_copy(part) if isinstance(part, nn.Module) else type(part).from_config(part.config)
            for name, part in self.pipe.components.items()
            if part is not None and hasattr(part, "config")
        }
        return Rig(assembled(type(self.pipe).__name__, **parts), self.call, self.tokens, self.text)


def assembled(name: str, **parts: Any) -> Any:
    """A pipeline of these parts; the others are None."""
    cls = getattr(diffusers, name)
    needed = [p for p in inspect.signature(cls.__init__).parameters.values() if p.name != "self"]
    missing = {p.name: None for p in needed if p.default is p.empty and p.name not in parts}
    pipe = cls(**missing, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def made_on(device: Device) -> Iterator[None]:
    """Modules and tensors are made on the device; bfloat16 on a GPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.on_gpu else torch.float32)
    try:
        with torch.device(device.name):
            yield
    finally:
        torch.set_default_dtype(before)


def transformer(name: str, device: Device, **config: Any) -> Any:
    """A transformer with random weights, in evaluation mode."""
    torch.manual_seed(0)
    with made_on(device):
        return getattr(diffusers, name)(**config).eval().requires_grad_(False)


def _randn(device: Device, *shape: int, seed: int) -> Tensor:
    dtype = torch.bfloat16 if device.on_gpu else torch.float32
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device.name, dtype)


def flux_scheduler() -> Any:
    """FLUX.1-dev's."""
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def flux(device: Device, dry: bool, kind: str = "FluxPipeline", **config: Any) -> Rig:
    """FLUX.1-dev, 1024x1024: 19 + 38 blocks, 12 B parameters, 4,096 + 512 tokens; `config` changes the transformer."""
    side, text, width, pooled = (128, 8, 32, 32) if dry else (1024, 512, 4096, 768)
    sizes = {**(TINY_FLUX if dry else {}), "guidance_embeds": True, **config}
    call = {
        "height": side,
        "width": side,
        "guidance_scale": 3.5,
        "prompt_embeds": _randn(device, 1, text, width, seed=1),
        "pooled_prompt_embeds": _randn(device, 1, pooled, seed=2),
    }
    parts = {"transformer": transformer("FluxTransformer2DModel", device, **sizes), "scheduler": flux_scheduler()}
    if kind == "FluxKontextPipeline":
        parts["vae"] = image_vae(device)
        call |= {"image": _randn(device, 1, 3, side, side, seed=3).float().sigmoid(), "_auto_resize": False}
        call["max_area"] = side * side
    return Rig(assembled(kind, **parts), call, (side // 16) ** 2, text)


def image_vae(device: Device) -> Any:
    """An autoencoder of FLUX's geometry (8x, 16 channels) and next to no width: what it computes is not measured."""
    return transformer(
        "AutoencoderKL",
        device,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=16,
        norm_num_groups=1,
        shift_factor=0.0,
        mid_block_add_attention=False,
    )


def wan(device: Device, dry: bool, frames: int, **config: Any) -> Rig:
    """Wan 2.1 (14 B by default), 480x832."""
    height, width, text, size = (96, 128, 8, 32) if dry else (480, 832, 512, 4096)
    call = {
        "height": height,
        "width": width,
        "num_frames": frames,
        "guidance_scale": 1.0,
        "prompt_embeds": _randn(device, 1, text, size, seed=1),
    }
    pipe = assembled(
        "WanPipeline",
        transformer=transformer("WanTransformer3DModel", device, **({**TINY_WAN} if dry else config)),
        vae=video_vae(device),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    return Rig(pipe, call, ((frames - 1) // 4 + 1) * (height // 16) * (width // 16), text)


def video_vae(device: Device) -> Any:
    """Wan's autoencoder with next to no width."""
    return transformer("AutoencoderKLWan", device, base_dim=4, z_dim=16, num_res_blocks=1)
