"""The transformations that the expectation of an optimisation is over: drifting light and framing, light kinds, places.

Everything is drawn once per walk and drifts slowly in it (an AR(1) process, coefficient .95): independent draws per
frame would average out the effect over time that is to be measured. Per frame change contrast, brightness, zoom and
shift; per walk the kind of light on the person (ambient, directional, point) and the place behind it. The exposure is
kept: another light has the mean irradiance of the walk's own.

Ranges are those of AdvCaT (arXiv:2303.08010): contrast .9 to 1.1, brightness +-.1, noise .02, scale exp(-.28) to
exp(.47), shift .8.

Shapes: `T` frames of a walk, `B` of them shown, `S` side of a frame, `Q` pixels of the person.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from drape.errors import ConfigError
from drape.scene.render import Shown
from drape.scene.scene import Scene
from drape.scene.sequence import Buffers

__all__ = [
    "LIGHT_KINDS",
    "Drawn",
    "Lamp",
    "Transforms",
    "drawn_for",
    "drift",
    "framed",
    "mosaics",
    "photometric",
    "shown",
]

LIGHT_KINDS = ("ambient", "directional", "point")
STATES = 5  # contrast, brightness, zoom, shift to the right, shift down
FULL = 0.96  # of the frame's side that a zoomed person fills at most
HEIGHT = 1.75  # metres that a person's box is taken to be high
DIM = 0.45  # share of the light that comes from all sides beside a lamp
MIDDLE = (0.0, 0.0, 1.0)  # of a person, metres, seen from where it stands


@dataclass(frozen=True, kw_only=True)
class Transforms:
    """What is drawn for each walk at each step.

    Args:
        contrast, brightness: half-widths, around 1 and 0.  noise: standard deviation, drawn again for every pixel.
        zoom: logarithms of the least and the largest scale.  shift: share of the room beside the person, each way.
        lights: share of the walks that are lit by another kind of light.  places: and that another place is behind.
        coefficient: of the AR(1) process.
    """

    contrast: float = 0.1
    brightness: float = 0.1
    noise: float = 0.02
    zoom: tuple[float, float] = (-0.28, 0.47)
    shift: float = 0.8
    lights: float = 0.5
    places: float = 0.3
    coefficient: float = 0.95

    def __post_init__(self) -> None:
        if min(self.contrast, self.brightness, self.noise) < 0 or self.contrast >= 1:
            raise ConfigError(
                f"contrast={self.contrast}, brightness={self.brightness}, noise={self.noise}; expected none below 0, "
                "and a contrast below 1."
            )
        if not -2 <= self.zoom[0] <= self.zoom[1] <= 2:
            raise ConfigError(f"zoom={self.zoom}; expected logarithms of scales, the least first, within -2 to 2.")
        shares = (self.shift, self.lights, self.places)
        if not all(0 <= share <= 1 for share in shares):
            raise ConfigError(f"shift, lights, places = {shares}; expected shares from 0 to 1.")
        if not 0 <= self.coefficient < 1:
            raise ConfigError(f"coefficient={self.coefficient}; expected 0 up to, not including, 1.")


NOTHING = Transforms(contrast=0, brightness=0, noise=0, zoom=(0.0, 0.0), shift=0, lights=0, places=0)


def drift(frames: int, channels: int, coefficient: float, generator: torch.Generator | None = None) -> Tensor:
    """A stationary AR(1) process with unit variance, x_t = a x_{t-1} + sqrt(1 - a^2) e_t, `[frames, channels]`."""
    if frames < 1 or not 0 <= coefficient < 1:
        raise ConfigError(f"frames={frames}, coefficient={coefficient}; expected at least 1, and 0 up to below 1.")
    shocks = torch.randn(frames, channels, generator=generator)
    steps = [shocks[0]]
    for shock in shocks[1:]:
        steps.append(coefficient * steps[-1] + (1 - coefficient**2) ** 0.5 * shock)
    return torch.stack(steps)


def photometric(
    frames: Tensor, transforms: Transforms, generator: torch.Generator | None = None, states: Tensor | None = None
) -> Tensor:
    """Frames `[B, 3, S, S]` of one sequence with drifting contrast and brightness, and noise, in [0, 1].

    Args:
        states: `[B, 2 or more]` of `drift`, for frames that are a part of a sequence; drawn if not given.
    """
    if states is None:
        states = drift(len(frames), 2, transforms.coefficient, generator)
    if states.ndim != 2 or len(states) != len(frames) or states.shape[1] < 2:
        raise ConfigError(f"states have shape {tuple(states.shape)}; expected two or more for each frame.")
    amount = torch.tanh(states.to(frames))[:, :, None, None, None]  # stays inside the half-widths
    contrast, brightness = 1 + transforms.contrast * amount[:, 0], transforms.brightness * amount[:, 1]
    noise = torch.randn(frames.shape, generator=generator).to(frames) * transforms.noise
    return ((frames - 0.5) * contrast + 0.5 + brightness + noise).clamp(0, 1)


def framed(
    frames: Tensor, boxes: Tensor, transforms: Transforms, states: Tensor, side: int | None = None
) -> tuple[Tensor, Tensor]:
    """Frames `[B, 3, S, S]` zoomed and shifted so that the person stays inside, and its boxes in them `[B, 4]`.

    Args:
        states: `[B, 3]`, of the zoom and of the shifts; what is beyond the edge mirrors what is inside.
        side: of a smaller cut-out in the frames' own scale; S if not given.
    """
    whole = frames.shape[-1]
    side = whole if side is None else side
    amount = torch.tanh(states.to(boxes))
    low, high = transforms.zoom
    middle, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    scale = torch.exp(low + (high - low) * (amount[:, :1] + 1) / 2)
    scale = torch.minimum(scale, FULL * side / size.amax(dim=1, keepdim=True).clamp_min(1.0))
    half = scale * size / 2
    kept = torch.minimum(torch.maximum(middle * side / whole, half), side - half)
    room = torch.where(amount[:, 1:] > 0, side - half - kept, kept - half)
    target = kept + transforms.shift * amount[:, 1:] * room
    share = side / (whole * scale)
    theta = frames.new_zeros(len(frames), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = share[:, 0].to(frames)
    theta[:, :, 2] = (2 * middle / whole - 1 + share - 2 * target / (whole * scale)).to(frames)
    grid = F.affine_grid(theta, [len(frames), 3, side, side], align_corners=False)
    moved = F.grid_sample(frames, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return moved, torch.cat([target - half, target + half], dim=1)


def mosaics(tiles: Tensor, boxes: Tensor, across: int) -> tuple[Tensor, Tensor]:
    """Tiles `[N, 3, s, s]` put together, `across` times `across` in a frame, and their boxes in the frames `[N, 4]`.

    Tile n lies in frame n // across^2; the last frame is filled with grey.

    Returns:
        frames `[M, 3, s * across, s * across]` and boxes.
    """
    count, side, each = len(tiles), tiles.shape[-1], across**2
    missing = -count % each
    grey = tiles.new_full((missing, 3, side, side), 0.5)
    rows = torch.cat([tiles, grey]).reshape(-1, across, across, 3, side, side)
    place = torch.arange(count) % each
    corner = torch.stack([place % across, place // across], dim=1).to(boxes) * side
    return rows.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, across * side, across * side), boxes + corner.repeat(1, 2)


@dataclass(frozen=True)
class Lamp:
    """Another light on the person: one of `LIGHT_KINDS`, and where its lamp stands, metres from the person's feet."""

    kind: str
    place: tuple[float, float, float]

    def irradiance(self, normals: Tensor, points: Tensor) -> Tensor:
        """Brightness `[Q, 1]` of surfaces with normals `[Q, 3]` at `points` `[Q, 3]`, before the exposure is set."""
        if self.kind == "ambient":
            return torch.ones_like(normals[:, :1])
        far = points.new_tensor(MIDDLE).expand_as(points) if self.kind == "directional" else points
        towards = points.new_tensor(self.place) - far
        distance = towards.norm(dim=1, keepdim=True).clamp_min(0.3)
        facing = (normals * towards / distance).sum(dim=1, keepdim=True).clamp_min(0)
        falling = 1.0 if self.kind == "directional" else (math.dist(self.place, MIDDLE) / distance).square()
        return DIM + (1 - DIM) * 2 * facing * falling

    def __call__(self, buffers: Buffers, seen: Shown, own: Tensor) -> Tensor:
        """Irradiance `[Q, 3]` in place of the walk's own `[Q, 3]`, in its mean colour.

        A point's place is told by where it is in the person's box, which is taken to be `HEIGHT` metres high and flat.
        """
        side = buffers.size
        frame, inside = seen.into // side**2, seen.into % side**2
        boxes = buffers.boxes[torch.tensor(seen.chosen)[frame]]
        metres = HEIGHT / (boxes[:, 3] - boxes[:, 1]).clamp_min(1.0)
        x = (inside % side - (boxes[:, 0] + boxes[:, 2]) / 2) * metres
        z = (boxes[:, 3] - inside // side) * metres
        bright = self.irradiance(buffers.normal[seen.pixels], torch.stack([x, torch.zeros_like(x), z], dim=1))
        return bright / bright.mean().clamp_min(1e-6) * own.mean(dim=0)


@dataclass(frozen=True)
class Drawn:
    """What was drawn for one walk: the scene with its place, states `[T, 5]`, and a light in place of its own."""

    scene: Scene
    states: Tensor
    lamp: Lamp | None = None


def lamp_of(generator: torch.Generator | None) -> Lamp:
    """A lamp of any kind, on the camera's side (-y) of the person."""
    kind = LIGHT_KINDS[int(torch.randint(len(LIGHT_KINDS), (1,), generator=generator))]
    turn, rise, far = torch.rand(3, generator=generator).tolist()
    around, up, distance = math.radians(160 * turn - 80), math.radians(10 + 60 * rise), 1.6 + 2 * far
    flat = distance * math.cos(up)
    return Lamp(kind, (flat * math.sin(around), -flat * math.cos(around), MIDDLE[2] + distance * math.sin(up)))


def drawn_for(
    scenes: Sequence[Scene], number: int, transforms: Transforms, generator: torch.Generator | None, states: Tensor
) -> Drawn:
    """What is drawn for walk `number` of the scenes, with `states` of its frames.

    A place is one of the other walks' that suits: a single image of the same size, for a light with as many lamps.
    """
    scene = scenes[number]
    lit, placed = torch.rand(2, generator=generator).tolist()
    if placed < transforms.places:
        fitting = [
            other.plate
            for other in scenes
            if other.plate.image.shape == scene.plate.image.shape == (3, scene.buffers.size, scene.buffers.size)
            and len(other.light.lamps) == len(scene.light.lamps)
        ]
        if fitting:
            scene = replace(scene, plate=fitting[int(torch.randint(len(fitting), (1,), generator=generator))])
    return Drawn(scene, states, lamp_of(generator) if lit < transforms.lights else None)


def shown(
    drawn: Drawn,
    images: Mapping[str, Tensor],
    frames: Tensor,
    transforms: Transforms,
    generator: torch.Generator | None = None,
    side: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Some frames of a walk, int64 `[B]`, as they are drawn, `[B, 3, S, S]`, and the person's boxes in them.

    Args:
        side: of a smaller cut-out around the person, in place of S.
    """
    states = drawn.states[frames]
    rendered = drawn.scene.render(images, frames.tolist(), drawn.lamp)
    boxes = drawn.scene.buffers.boxes[frames]
    if transforms.zoom != (0.0, 0.0) or transforms.shift or side not in (None, rendered.shape[-1]):
        rendered, boxes = framed(rendered, boxes, transforms, states[:, 2:], side)
    return photometric(rendered, transforms, generator, states), boxes
