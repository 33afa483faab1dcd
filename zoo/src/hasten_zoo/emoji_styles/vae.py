"""The autoencoder of `emoji-styles`: 8x down, 16 channels, as FLUX.1's, at a hundredth of its cost.

Pixels are first rearranged in 4x4 patches, so that convolutions run at a quarter and an eighth of the side. The head
works at half the side, across the borders of the patches, which keeps their grid out of the images. There is no
normalisation over positions: an image half as large, or a part of one, is encoded like any other.

Latents have zero mean and unit variance per channel by construction (a batch norm without parameters ends the
encoder), so `shift_factor` and `scaling_factor` only take up what little is left.

Shapes: pixels `[B, 3, H, W]` in [-1, 1], latents `[B, 16, H/8, W/8]`, H and W multiples of 8.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

__all__ = ["EmojiVAE"]

PATCH = 4


class Block(nn.Module):
    """`x + f(x)` with two convolutions; the second starts at zero, so that a fresh block does nothing."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.second(torch.relu(self.first(torch.relu(x))))
        return x + change


class EmojiVAE(ModelMixin, ConfigMixin):
    """See the module's text.

    Args:
        block_out_channels: channels at a half, a quarter (patches), a quarter (convolutions) and an eighth of the
            side; its length tells pipelines that latents are 8 times smaller, and the last two are widths.
        blocks: residual blocks at a quarter and at an eighth of the side, in the encoder.
        decoder_blocks: likewise, in the decoder.
        latent_channels: channels of a latent.
        shift_factor: as in `AutoencoderKL`.
        scaling_factor: as in `AutoencoderKL`.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        block_out_channels: tuple[int, ...] = (12, 48, 64, 128),
        blocks: tuple[int, int] = (1, 2),
        decoder_blocks: tuple[int, int] = (2, 3),
        latent_channels: int = 16,
        shift_factor: float = 0.0,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        wide, deep = block_out_channels[-2:]
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(PATCH),
            nn.Conv2d(3 * PATCH**2, wide, 3, padding=1),
            *[Block(wide) for _ in range(blocks[0])],
            nn.Conv2d(wide, deep, 3, stride=2, padding=1),
            *[Block(deep) for _ in range(blocks[1])],
            nn.Conv2d(deep, latent_channels, 3, padding=1),
        )
        self.norm = nn.BatchNorm2d(latent_channels, affine=False, momentum=0.01)
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, deep, 3, padding=1),
            *[Block(deep) for _ in range(decoder_blocks[1])],
            nn.Conv2d(deep, 4 * wide, 3, padding=1),
            nn.PixelShuffle(2),
            *[Block(wide) for _ in range(decoder_blocks[0])],
            nn.Conv2d(wide, 2 * wide, 3, padding=1),
            nn.PixelShuffle(2),
            nn.ReLU(),
            nn.Conv2d(wide // 2, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[Tensor]:
        """Pixels to latents (not yet shifted and scaled)."""
        latents = self.norm(self.encoder(x))
        return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)

    def decode(self, z: Tensor, return_dict: bool = True, **_: Any) -> DecoderOutput | tuple[Tensor]:
        """Latents (shift and scale undone) to pixels."""
        sample = self.decoder(z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)
