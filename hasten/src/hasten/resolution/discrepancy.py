"""How far a draft is from its source, token by token, on latents `[B, C, H, W]` as the transformer sees them.

A token is 2x2 latent pixels, and a distance is a map `[B, H/2, W/2]` in float32:

    perceptual   features of the VAE decoder's first layers (`conv_in`, `mid_block`, first block of `up_blocks`), at
                 unit length over channels; squared difference, averaged over the layers. As SpotEdit, arXiv:2512.22323
    latent       Euclidean distance of the token's values, divided by the image's median
    cosine       1 - cosine of the token's values

`above_floor` takes the median away, which is what a round trip through the VAE and a colour shift of the draft cost in
tokens that no edit touches; `median_change` tells an edit that touches most of them. `global_shift` finds out whether
the draft is the source moved as a whole.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from hasten.errors import AdapterError, ConfigError

__all__ = [
    "Discrepancy",
    "above_floor",
    "cosine_distance",
    "discrepancy",
    "global_shift",
    "has_features",
    "latent_distance",
    "latents_to_vae",
    "median_change",
    "perceptual_distance",
    "resized",
]

Discrepancy = Literal["perceptual", "latent", "cosine"]
TINY = 1e-8


def _checked(draft: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    if draft.shape != source.shape or draft.dim() != 4 or draft.shape[2] % 2 or draft.shape[3] % 2:
        raise ConfigError(
            "a draft is compared with its source as latents [B, C, H, W] of one shape and even sides, "
            f"got {list(draft.shape)} and {list(source.shape)}"
        )
    return draft.float(), source.float()


def _tokens(latents: Tensor) -> Tensor:
    """`[B, C, H, W]` to `[B, H/2, W/2, 4 C]`."""
    return functional.pixel_unshuffle(latents, 2).movedim(1, -1)


def latent_distance(draft: Tensor, source: Tensor) -> Tensor:
    """Euclidean distance over the image's median; over its mean where the median is 0 (most tokens are equal).

    Raises:
        ConfigError: for latents of different shapes or odd sides.
    """
    draft, source = _checked(draft, source)
    distance = (_tokens(draft) - _tokens(source)).norm(dim=-1)
    flat = distance.flatten(1)
    median, mean = flat.median(1).values, flat.mean(1)
    scale = torch.where(median > TINY, median, mean.clamp(min=TINY))
    return distance / scale[:, None, None]


def cosine_distance(draft: Tensor, source: Tensor) -> Tensor:
    """1 - cosine, from 0 to 2; 0 where both tokens are zero.

    Raises:
        ConfigError: for latents of different shapes or odd sides.
    """
    first, second = map(_tokens, _checked(draft, source))
    lengths = first.norm(dim=-1) * second.norm(dim=-1)
    cosine = (first * second).sum(-1) / lengths.clamp(min=TINY)
    same = (first.norm(dim=-1) < TINY) & (second.norm(dim=-1) < TINY)
    return (1 - torch.where(same, torch.ones_like(cosine), cosine)).clamp(min=0)


def has_features(vae: Any) -> bool:
    """Whether the VAE has a learned decoder of the kind that `perceptual_distance` reads."""
    decoder = getattr(vae, "decoder", None)
    return all(hasattr(decoder, name) for name in ("conv_in", "mid_block", "up_blocks"))


def latents_to_vae(vae: Any, latents: Tensor) -> Tensor:
    """Latents as the VAE's decoder takes them: `latents / scale + shift`, `[B, C, 1, H, W]` for a video VAE.

    Args:
        vae: with `scaling_factor` and `shift_factor` (FLUX), or `latents_mean` and `latents_std` (Qwen-Image).
        latents: `[B, C, H, W]`.

    Raises:
        AdapterError: if its configuration has neither.
    """
    config = vae.config
    # FLUX's configuration has `latents_mean: None`.
    if getattr(config, "latents_mean", None) is not None:
        mean, std = (latents.new_tensor(config[name])[:, None, None] for name in ("latents_mean", "latents_std"))
        return (latents * std + mean)[:, :, None]
    if getattr(config, "scaling_factor", None) is None:
        raise AdapterError(
            f"{type(vae).__name__} says neither scaling_factor nor latents_mean, and its latents cannot be decoded"
        )
    return latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)


@torch.no_grad()
def resized(pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """The image of `latents` at another size, by way of pixels: decoded, resized, encoded.

    Args:
        pipe: an editing pipeline with a `vae`, which encodes as it does its own sources.
        latents: `[B, C, H, W]` as the transformer sees them.
        size: rows and columns of the latents that are wanted.

    Returns:
        `[B, C, *size]` float32.
    """
    vae = pipe.vae
    decoded = vae.decode(latents_to_vae(vae, latents).to(vae.dtype), return_dict=False)[0]
    pixels = decoded[:, :, 0] if decoded.dim() == 5 else decoded
    factor = pixels.shape[-1] // latents.shape[-1]
    smaller = size[0] <= latents.shape[2] and size[1] <= latents.shape[3]
    pixels = functional.interpolate(
        pixels.float().clamp(-1, 1), [factor * side for side in size], mode="area" if smaller else "bilinear"
    ).to(vae.dtype)
    encoded: Tensor = pipe._encode_vae_image(pixels[:, :, None] if decoded.dim() == 5 else pixels, None)
    return (encoded[:, :, 0] if encoded.dim() == 5 else encoded).float()


def _features(vae: Any, latents: Tensor) -> list[Tensor]:
    """Features after the decoder's first three layers, `[B, C, h, w]` each, at unit length over channels."""
    decoder, state = vae.decoder, latents_to_vae(vae, latents).to(vae.dtype)
    if getattr(vae, "post_quant_conv", None) is not None:
        state = vae.post_quant_conv(state)
    features = []
    for layer in (decoder.conv_in, decoder.mid_block, decoder.up_blocks[0]):
        state = layer(state)
        flat = state[:, :, 0] if state.dim() == 5 else state
        features.append(functional.normalize(flat.float(), dim=1, eps=TINY))
    return features


@torch.no_grad()
def perceptual_distance(vae: Any, draft: Tensor, source: Tensor) -> Tensor:
    """Distance in the features of the VAE's decoder, from 0 to 4.

    Raises:
        AdapterError: if the VAE has no decoder that was learned.
        ConfigError: for latents of different shapes or odd sides.
    """
    draft, source = _checked(draft, source)
    if not has_features(vae):
        raise AdapterError(
            f"{type(vae).__name__} has no learned decoder to compare images with; use discrepancy='latent'"
        )
    maps = [
        functional.interpolate((a - b).square().sum(1, keepdim=True), size=draft.shape[2:], mode="area")
        for a, b in zip(_features(vae, draft), _features(vae, source), strict=True)
    ]
    return functional.avg_pool2d(torch.cat(maps, 1).mean(1, keepdim=True), 2)[:, 0]


def discrepancy(kind: Discrepancy, vae: Any, draft: Tensor, source: Tensor) -> Tensor:
    """The distance of that kind."""
    if kind == "perceptual":
        return perceptual_distance(vae, draft, source)
    return latent_distance(draft, source) if kind == "latent" else cosine_distance(draft, source)


def above_floor(distance: Tensor) -> Tensor:
    """The distance less the image's median, not below 0."""
    floor = distance.flatten(1).median(1).values
    return (distance - floor[:, None, None]).clamp(min=0)


def median_change(draft: Tensor, source: Tensor) -> Tensor:
    """How much the image's median token has changed, in units of the root mean square of the source's: `[B]`.

    What `above_floor` cannot see: an edit that changes most tokens raises the median itself.
    """
    first, second = map(_tokens, _checked(draft, source))
    change = (first - second).norm(dim=-1).flatten(1).median(1).values
    return change / second.norm(dim=-1).flatten(1).square().mean(1).sqrt().clamp(min=TINY)


def global_shift(draft: Tensor, source: Tensor) -> list[tuple[int, int]]:
    """By how many latent pixels (down, right) the draft is the source moved as a whole, by phase correlation.

    Args:
        draft: `[B, C, H, W]`.
        source: the same shape; moving it by the result (`torch.roll`) brings it upon the draft.

    Returns:
        a pair for each image, from -H/2 to H/2 and -W/2 to W/2.
    """
    draft, source = _checked(draft, source)
    spectra = [torch.fft.rfft2(x - x.mean((2, 3), keepdim=True)) for x in (draft, source)]
    cross = (spectra[0] * spectra[1].conj()).sum(1)
    peaks = torch.fft.irfft2(cross / cross.abs().clamp(min=TINY), s=draft.shape[2:]).flatten(1).argmax(1)
    height, width = draft.shape[2:]
    places = [divmod(int(peak), width) for peak in peaks]
    return [(y - height if y > height // 2 else y, x - width if x > width // 2 else x) for y, x in places]
