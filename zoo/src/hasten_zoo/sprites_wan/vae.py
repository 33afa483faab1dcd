"""The video autoencoder of `sprites-wan`: 4x down in space, 2x in time, 8 channels.

Every second frame is encoded by itself, the first and the last among them, as in Wan's causal autoencoder a first frame
stands alone. The latent of a frame between two others is found from their latents, and then decoded like any other; at
first it is their mean.

Pixels are rearranged in 4x4 patches, and convolutions run at a quarter of the side; the head works at a half, across
the borders of the patches. There is no normalisation over positions: a smaller frame is encoded like any other. Latents
have zero mean and unit variance per channel by construction (a batch norm without parameters ends the encoder).

Shapes: videos `[B, 3, 2k + 1, H, W]` in [-1, 1], latents `[B, 8, k + 1, H/4, W/4]`, H and W multiples of 4.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from hasten.errors import ModelError
from hasten.io import check_sealed, read_json
from torch import Tensor, nn

from hasten_zoo.emoji_styles.vae import Block

__all__ = ["CHANNELS", "SpriteVAE", "load_vae"]

CHANNELS, DOWN = 8, 4
LIST = "digests.json"  # of a sealed folder


class SpriteVAE(ModelMixin, ConfigMixin):
    """See the module's text; names in the configuration that `AutoencoderKLWan` has too mean the same.

    Args:
        z_dim: channels of a latent.
        encoder_width: channels of the encoder's convolutions.
        decoder_width: of the decoder's.
        head_width: of the decoder's at half the side.
        latents_mean: by channel.
        latents_std: by channel.
        temperal_downsample: one entry per halving of the number of frames (the spelling is that of diffusers).
        scale_factor_temporal: frames per latent frame.
        scale_factor_spatial: pixels per latent cell, along each axis.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        z_dim: int = CHANNELS,
        encoder_width: int = 64,
        decoder_width: int = 96,
        head_width: int = 32,
        latents_mean: tuple[float, ...] = (0.0,) * CHANNELS,
        latents_std: tuple[float, ...] = (1.0,) * CHANNELS,
        temperal_downsample: tuple[bool, ...] = (True,),
        scale_factor_temporal: int = 2,
        scale_factor_spatial: int = DOWN,
    ) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(DOWN),
            nn.Conv2d(3 * DOWN**2, encoder_width, 3, padding=1),
            Block(encoder_width),
            Block(encoder_width),
            nn.Conv2d(encoder_width, z_dim, 3, padding=1),
        )
        self.norm = nn.BatchNorm2d(z_dim, affine=False, momentum=0.01)
        self.between = nn.Sequential(
            nn.Conv2d(2 * z_dim, encoder_width, 3, padding=1),
            Block(encoder_width),
            Block(encoder_width),
            nn.Conv2d(encoder_width, z_dim, 3, padding=1),
        )
        last = self.between[-1]
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.decoder = nn.Sequential(
            nn.Conv2d(z_dim, decoder_width, 3, padding=1),
            *[Block(decoder_width) for _ in range(3)],
            nn.Conv2d(decoder_width, 4 * head_width, 3, padding=1),
            nn.PixelShuffle(2),
            Block(head_width),
            nn.Conv2d(head_width, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Single frames `[N, 3, H, W]` to latents `[N, 8, H/4, W/4]`."""
        latents: Tensor = self.norm(self.encoder(frames))
        return latents

    def middle(self, before: Tensor, after: Tensor) -> Tensor:
        """Latents `[N, 8, h, w]` of the frames between those of two batches."""
        middle: Tensor = (before + after) / 2 + self.between(torch.cat([before, after], 1))
        return middle

    def decode_frames(self, latents: Tensor) -> Tensor:
        """Latents `[N, 8, h, w]` to frames `[N, 3, 4h, 4w]`."""
        frames: Tensor = self.decoder(latents)
        return frames

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[Tensor]:
        """`[B, 3, 2k + 1, H, W]` to `[B, 8, k + 1, H/4, W/4]` (mean and deviation not yet taken out)."""
        frames = x[:, :, ::2].transpose(1, 2)
        latents = self.encode_frames(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)
        return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)

    def decode(self, z: Tensor, return_dict: bool = True, **_: Any) -> DecoderOutput | tuple[Tensor]:
        """`[B, 8, k + 1, h, w]` to `[B, 3, 2k + 1, 4h, 4w]`."""
        latents = z.transpose(1, 2)
        first, second = latents[:, :-1], latents[:, 1:]
        filled = latents.new_empty(len(z), 2 * latents.shape[1] - 1, *latents.shape[2:])
        filled[:, ::2] = latents
        filled[:, 1::2] = self.middle(first.flatten(0, 1), second.flatten(0, 1)).unflatten(0, first.shape[:2])
        sample = self.decode_frames(filled.flatten(0, 1)).unflatten(0, filled.shape[:2]).transpose(1, 2)
        return DecoderOutput(sample=sample) if return_dict else (sample,)


def load_vae(folder: Path) -> SpriteVAE:
    """A trained autoencoder, float32, as `train_vae` exported it or as a part of an exported pipeline.

    Raises:
        ModelError: if there is none in the folder, it is of another class, or its files are not as they were written.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"no autoencoder in {folder}; train one with python -m hasten_zoo.sprites_wan.train_vae")
    in_pipeline = not (folder / LIST).is_file() and (folder.parent / LIST).is_file()  # which is sealed as a whole
    remedy = "Export it again with python -m hasten_zoo.sprites_wan.train_vae --export."
    check_sealed(folder.parent if in_pipeline else folder, ModelError, remedy)
    config = read_json(folder / "config.json", error=ModelError)
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind != SpriteVAE.__name__:
        raise ModelError(
            f"the autoencoder in {folder} is of class {kind}, expected SpriteVAE; "
            "train one with python -m hasten_zoo.sprites_wan.train_vae"
        )
    try:
        vae: SpriteVAE = SpriteVAE.from_pretrained(folder).float()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"the autoencoder in {folder} cannot be read ({reason}). {remedy}") from error
    return vae
