"""From buffers and textures to frames, differentiable in the textures.

    frame = pool(bg (1 - m) + m * shade(normal, light) * sample(texture, uv))

`sample` is bilinear, in a mip-map whose level follows the pixel's footprint: without it a minified texture aliases,
and its gradients are those of the aliases. `pool` averages the supersampled pixels, so mask edges blend by coverage.

Shapes: `B` frames, `R` side of the buffers, `S` side of the frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from drape.errors import ConfigError, unknown
from drape.scene.garments import GARMENTS
from drape.scene.light import Light
from drape.scene.sequence import Buffers

__all__ = ["mip_levels", "render_frames", "render_plain", "sample_texture"]

BODY = 255
COARSEST = 8  # pixels a side that a mip level keeps at least


def mip_levels(texture: Tensor) -> list[Tensor]:
    """The texture `[3, H, W]` and its halvings, as long as both sides stay at 8 pixels or more."""
    levels = [texture]
    while min(levels[-1].shape[1:]) >= 2 * COARSEST:
        levels.append(F.avg_pool2d(levels[-1][None], 2)[0])
    return levels


def sample_texture(texture: Tensor, uv: Tensor, footprint: Tensor) -> Tensor:
    """Trilinear lookup: colours `[P, 3]` at `uv` `[P, 2]`, blended between the two mip levels nearest to `footprint`
    `[P]`.

    u runs along the texture's width, v down its height; (0, 0) is the outer corner of the first pixel.
    """
    levels = mip_levels(texture)
    height, width = texture.shape[1:]
    level = (footprint * (height * width) ** 0.5).clamp_min(1.0).log2().clamp_max(len(levels) - 1)
    grid = (uv * 2 - 1)[None, None]
    result = texture.new_zeros(len(uv), 3)
    for number, image in enumerate(levels):
        share = (1 - (level - number).abs()).clamp_min(0)
        if bool((share > 0).any()):
            found = F.grid_sample(image[None], grid, mode="bilinear", padding_mode="border", align_corners=False)
            result = result + share[:, None] * found[0, :, 0].T
    return result


def compose(buffers: Buffers, index: Tensor, colour: Tensor, light: Light, background: Tensor) -> Tensor:
    """Light the surface colours `[B, R, R, 3]`, put them over the background and pool, `[B, 3, S, S]`."""
    side = buffers.size
    if background.shape not in ((3, side, side), (len(index), 3, side, side)):
        raise ConfigError(
            f"the background has shape {tuple(background.shape)}; expected (3, {side}, {side}), or one a frame."
        )
    k = buffers.supersample
    mask = (buffers.garment[index] > 0).to(colour)[..., None]
    lit = (colour * light.irradiance(buffers.normal[index]).to(colour)).clamp(0, 1) * mask
    pooled = F.avg_pool2d(torch.cat([lit, mask], dim=-1).permute(0, 3, 1, 2), k)
    return pooled[:, :3] + background * (1 - pooled[:, 3:])


def frame_index(buffers: Buffers, frames: Sequence[int] | None) -> Tensor:
    """The chosen frames as an index, all if none are named."""
    chosen = list(range(buffers.frames)) if frames is None else list(frames)
    if not chosen or min(chosen) < 0 or max(chosen) >= buffers.frames:
        raise ConfigError(f"frames {chosen}; expected some of 0 to {buffers.frames - 1}.")
    return torch.tensor(chosen)


def render_frames(
    buffers: Buffers,
    textures: Mapping[str, Tensor],
    light: Light,
    background: Tensor,
    frames: Sequence[int] | None = None,
) -> Tensor:
    """Frames with textured garments, `[B, 3, S, S]` in [0, 1].

    Args:
        textures: `[3, H, W]` in [0, 1] for each of `GARMENTS`, of any size; their dtype is that of the result.
        background: `[3, S, S]`, or one a frame.
        frames: which; all if not given.
    """
    for name in textures:
        if name not in GARMENTS:
            raise unknown("garment", name, GARMENTS)
    missing = [name for name in GARMENTS if name not in textures]
    if missing:
        raise ConfigError(f"no texture for {', '.join(missing)}; give one for each of {', '.join(GARMENTS)}.")
    index = frame_index(buffers, frames)
    garment = buffers.garment[index]
    colour = buffers.albedo[index].to(textures[GARMENTS[0]])
    for number, name in enumerate(GARMENTS, start=1):
        here = garment == number
        uv, footprint = buffers.uv[index][here].to(colour), buffers.footprint[index][here].to(colour)
        colour = colour.index_put((here,), sample_texture(textures[name], uv, footprint))
    return compose(buffers, index, colour, light, background.to(colour))


def render_plain(
    buffers: Buffers,
    colours: Mapping[str, tuple[float, float, float]],
    light: Light,
    background: Tensor,
    frames: Sequence[int] | None = None,
) -> Tensor:
    """Frames with dyed garments and no texture lookup at all: the untouched render, `[B, 3, S, S]`."""
    index = frame_index(buffers, frames)
    table = torch.zeros(256, 3)
    for number, name in enumerate(GARMENTS, start=1):
        table[number] = torch.tensor(colours[name])
    garment = buffers.garment[index]
    colour = torch.where((garment == BODY)[..., None], buffers.albedo[index], table[garment.long()])
    return compose(buffers, index, colour, light, background)
