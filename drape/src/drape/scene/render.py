"""From buffers and textures to frames, differentiable in the textures.

    frame = pool(shadowed(plate) (1 - m) + m * open * irradiance(normal, light) * sample(texture, uv))

`sample` is bilinear, in a mip-map whose level follows the pixel's footprint: without it a minified texture aliases,
and its gradients are those of the aliases. `pool` averages the supersampled pixels, so mask edges blend by coverage.

Shapes: `B` frames, `Q` pixels of the buffers that they show, `S` side of the frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from drape.errors import ConfigError, unknown
from drape.scene.garments import GARMENTS
from drape.scene.light import Light
from drape.scene.places import Plate
from drape.scene.sequence import Buffers

__all__ = ["Relight", "Shown", "coverage", "mip_levels", "render_frames", "render_plain", "sample_texture"]

BODY = 255
COARSEST = 8  # pixels per side that a mip level keeps at least


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


@dataclass(frozen=True)
class Shown:
    """What the chosen frames show: `Q` indices into the buffers' pixels, and into the frames' `B * S * S` pixels."""

    pixels: Tensor
    into: Tensor
    chosen: list[int]


Relight = Callable[[Buffers, Shown, Tensor], Tensor]  # irradiance `[Q, 3]` in place of the light's own `[Q, 3]`


def shown(buffers: Buffers, frames: Sequence[int]) -> Shown:
    """What the chosen frames show of the person."""
    k, side = buffers.supersample, buffers.size
    pixels = torch.cat([torch.arange(buffers.starts[t], buffers.starts[t + 1]) for t in frames])
    counts = torch.tensor([buffers.starts[t + 1] - buffers.starts[t] for t in frames])
    place = buffers.pixel[pixels]
    row, column = place // (side * k) // k, place % (side * k) // k
    frame = torch.arange(len(frames)).repeat_interleave(counts)
    return Shown(pixels, (frame * side + row) * side + column, list(frames))


def coverage(buffers: Buffers, frames: Sequence[int]) -> Tensor:
    """How much of each pixel the person covers, `[B, 1, S, S]`."""
    seen = shown(buffers, frames)
    share = torch.full((len(seen.into),), 1 / buffers.supersample**2)
    pooled = torch.zeros(len(seen.chosen) * buffers.size**2).index_add(0, seen.into, share)
    return pooled.reshape(len(seen.chosen), 1, buffers.size, buffers.size)


def compose(
    buffers: Buffers, seen: Shown, colour: Tensor, light: Light, plate: Plate, relight: Relight | None = None
) -> Tensor:
    """Light the surface colours `[Q, 3]`, put them over the shadowed plate and pool, `[B, 3, S, S]`."""
    side, count = buffers.size, len(seen.chosen)
    own = light.irradiance(buffers.normal[seen.pixels])
    irradiance = (own if relight is None else relight(buffers, seen, own)) * buffers.open[seen.pixels, None]
    lit = (colour * irradiance.to(colour)).clamp(0, 1)
    covered = torch.cat([lit, torch.ones_like(lit[:, :1])], dim=1) / buffers.supersample**2
    pooled = colour.new_zeros(count * side * side, 4).index_add(0, seen.into, covered)
    pooled = pooled.reshape(count, side, side, 4).permute(0, 3, 1, 2)
    return pooled[:, :3] + shadowed(buffers, light, plate, seen.chosen).to(colour) * (1 - pooled[:, 3:])


def shadowed(buffers: Buffers, light: Light, plate: Plate, frames: Sequence[int]) -> Tensor:
    """The plate under the person's shadow, `[B, 3, S, S]`."""
    side = buffers.size
    fits = plate.image.shape in ((3, side, side), (buffers.frames, 3, side, side))
    if not fits or len(buffers.hidden) != 1 + len(light.lamps):
        raise ConfigError(
            f"the plate has shape {tuple(plate.image.shape)}, the shadows those of {len(buffers.hidden) - 1} lamps; "
            f"expected (3, {side}, {side}) or one per frame, and {len(light.lamps)} lamps. Build the sequence "
            "with this light."
        )
    upwards = torch.tensor([0.0, 0.0, 1.0])
    result = plate.of(frames).flatten(2).clone()
    for number, frame in enumerate(frames):
        part = slice(buffers.shaded_starts[frame], buffers.shaded_starts[frame + 1])
        pixels = buffers.shaded[part]
        if len(pixels):
            there = plate.lit.flatten(1)[:, pixels]
            whole = light.reached(upwards, torch.ones(len(pixels)), there)
            left = light.reached(upwards, 1 - buffers.hidden[0, part], there * (1 - buffers.hidden[1:, part]))
            share = 1 - plate.ground.flatten()[pixels] * (1 - left / whole.clamp_min(1e-6)).T
            result[number][:, pixels] *= share
    return result.reshape(len(frames), 3, side, side)


def chosen_frames(buffers: Buffers, frames: Sequence[int] | None) -> list[int]:
    """The chosen frames, all if none are named."""
    chosen = list(range(buffers.frames)) if frames is None else list(frames)
    if not chosen or min(chosen) < 0 or max(chosen) >= buffers.frames:
        raise ConfigError(f"frames {chosen}; expected some of 0 to {buffers.frames - 1}.")
    return chosen


def render_frames(
    buffers: Buffers,
    textures: Mapping[str, Tensor],
    light: Light,
    plate: Plate,
    frames: Sequence[int] | None = None,
    relight: Relight | None = None,
) -> Tensor:
    """Frames with textured garments, `[B, 3, S, S]` in [0, 1].

    Args:
        textures: `[3, H, W]` in [0, 1] for each of `GARMENTS`, of any size; their dtype is that of the result.
        light: the one that the buffers were made for.  plate: what is behind the person.
        frames: which; all if not given.  relight: another light on the person alone.
    """
    for name in textures:
        if name not in GARMENTS:
            raise unknown("garment", name, GARMENTS)
    missing = [name for name in GARMENTS if name not in textures]
    if missing:
        raise ConfigError(f"no texture for {', '.join(missing)}; give one for each of {', '.join(GARMENTS)}.")
    chosen = chosen_frames(buffers, frames)
    seen = shown(buffers, chosen)
    garment = buffers.garment[seen.pixels]
    colour = buffers.albedo[seen.pixels].to(textures[GARMENTS[0]])
    for number, name in enumerate(GARMENTS, start=1):
        here = (garment == number).nonzero()[:, 0]
        pixels = seen.pixels[here]
        uv, footprint = buffers.uv[pixels].to(colour), buffers.footprint[pixels].to(colour)
        colour = colour.index_copy(0, here, sample_texture(textures[name], uv, footprint))
    return compose(buffers, seen, colour, light, plate, relight)


def render_plain(
    buffers: Buffers,
    colours: Mapping[str, tuple[float, float, float]],
    light: Light,
    plate: Plate,
    frames: Sequence[int] | None = None,
) -> Tensor:
    """Frames with dyed garments and no texture lookup at all: the untouched render, `[B, 3, S, S]`."""
    chosen = chosen_frames(buffers, frames)
    seen = shown(buffers, chosen)
    table = torch.zeros(256, 3)
    for number, name in enumerate(GARMENTS, start=1):
        table[number] = torch.tensor(colours[name])
    garment = buffers.garment[seen.pixels]
    colour = torch.where((garment == BODY)[:, None], buffers.albedo[seen.pixels], table[garment.long()])
    return compose(buffers, seen, colour, light, plate)
