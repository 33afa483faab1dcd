"""A walking sequence: geometry rendered once to buffers, and cached on disk.

Shapes: `T` frames, `S` side of a frame in pixels, `R = S * supersample` side of the buffers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drape.cache import cached_arrays
from drape.errors import ConfigError
from drape.scene.body import Floats, Rig, gait, load_rig, pose_walk, rotation
from drape.scene.camera import Camera, azimuth_of, place_on_path
from drape.scene.cloth import Cloth
from drape.scene.cloth_engines import simulate
from drape.scene.garments import GARMENTS, Garment, make_garment, vertex_normals
from drape.scene.raster import rasterise

__all__ = ["Buffers", "SequenceSpec", "build_sequence"]

SKIN, HAIR, SHOE = (0.72, 0.53, 0.43), (0.16, 0.11, 0.08), (0.12, 0.12, 0.13)
WARM_UP = 12  # frames of walking before the first one that is kept, so that the cloth has settled


@dataclass(frozen=True, kw_only=True)
class SequenceSpec:
    """Everything that the buffers depend on.

    Args:
        gait: a name of `drape.scene.body.GAITS`.  path: a name of `drape.scene.camera.PATHS`.
        frames: T.  fps: frames per second.  size: S.  supersample: 1 to 4.
        camera, cloth: where it stands, how the garments behave.
        gender, weight, height: the body's shape, 0 to 1.  phase: of the gait at the first frame, in cycles.
    """

    gait: str = "normal"
    path: str = "past"
    frames: int = 24
    fps: float = 12.0
    size: int = 416
    supersample: int = 2
    camera: Camera = field(default_factory=Camera)
    cloth: Cloth = field(default_factory=Cloth)
    gender: float = 0.5
    weight: float = 0.5
    height: float = 0.5
    phase: float = 0.0

    def __post_init__(self) -> None:
        gait(self.gait)
        place_on_path(self.path, np.zeros(1))
        if self.frames < 1 or self.fps <= 0 or self.size < 16:
            raise ConfigError(f"frames={self.frames}, fps={self.fps}, size={self.size}; expected >= 1, > 0 and >= 16.")
        if not 1 <= self.supersample <= 4:
            raise ConfigError(f"supersample={self.supersample}; expected 1 to 4.")


@dataclass(frozen=True)
class Buffers:
    """What the camera sees, without textures: `P` pixels that show the person, those of all frames in a row.

    Attributes:
        pixel: int64 `[P]`, place in the frame's R * R pixels, row by row.
        starts: T + 1 places in `[P]`; frame t has the pixels from starts[t] up to starts[t + 1].
        uv: float32 `[P, 2]` in [0, 1], in the square of the pixel's garment.
        garment: uint8 `[P]`: 1.. the garments of `GARMENTS`, 255 body.
        normal: float32 `[P, 3]`, unit, world.
        albedo: float32 `[P, 3]`, the body's own colour where it shows.
        footprint: float32 `[P]`, length in uv that one pixel covers.
        boxes: float32 `[T, 4]`, the person's true box (x0, y0, x1, y1) in frame pixels; nan where out of the image.
        azimuth: float32 `[T]`, degrees, the side that is seen.
        size, supersample: S, and R / S.
    """

    pixel: Tensor
    starts: list[int]
    uv: Tensor
    garment: Tensor
    normal: Tensor
    albedo: Tensor
    footprint: Tensor
    boxes: Tensor
    azimuth: Tensor
    size: int
    supersample: int

    @property
    def frames(self) -> int:
        return len(self.boxes)

    def garment_map(self) -> Tensor:
        """The garments as images, uint8 `[T, R, R]`, 0 where the background shows."""
        side = self.size * self.supersample
        result = torch.zeros(self.frames, side * side, dtype=torch.uint8)
        for t in range(self.frames):
            own = slice(self.starts[t], self.starts[t + 1])
            result[t, self.pixel[own]] = self.garment[own]
        return result.reshape(self.frames, side, side)


def build_sequence(spec: SequenceSpec) -> Buffers:
    """The buffers of a sequence, from the cache if it has them."""
    arrays = cached_arrays("sequence", asdict(spec), lambda: make_arrays(spec))
    uv, normal = arrays["uv"].astype(np.float32) / 65535, arrays["normal"].astype(np.float32) / 32767
    return Buffers(
        pixel=torch.from_numpy(arrays["pixel"].astype(np.int64)),
        starts=arrays["starts"].tolist(),
        uv=torch.from_numpy(uv),
        garment=torch.from_numpy(arrays["garment"]),
        normal=torch.from_numpy(normal),
        albedo=torch.from_numpy(arrays["albedo"].astype(np.float32) / 255),
        footprint=torch.from_numpy(arrays["footprint"].astype(np.float32)),
        boxes=torch.from_numpy(arrays["boxes"]),
        azimuth=torch.from_numpy(arrays["azimuth"]),
        size=spec.size,
        supersample=spec.supersample,
    )


def body_colours(rig: Rig) -> Floats:
    """A plain colour for each vertex: hair, shoes, else skin, `[V, 3]`."""
    owner = np.array(rig.bones)[rig.weights.argmax(axis=1)]
    foot = np.char.startswith(owner, "foot") | np.char.startswith(owner, "toe")
    z, y = rig.vertices[:, 2], rig.vertices[:, 1]
    head = rig.heads[rig.bone("head")]
    top = z.max()
    scalp = (owner == "head") & (z > head[2] + 0.3 * (top - head[2])) & (y > head[1] - 0.015)
    crown = (owner == "head") & (z > head[2] + 0.7 * (top - head[2]))
    colours = np.tile(np.array(SKIN), (len(z), 1))
    colours[foot], colours[scalp | crown] = SHOE, HAIR
    return colours


@dataclass(frozen=True)
class Wardrobe:
    """Body and garments as one mesh: triangle list, its garments, corner uv, and the body's colours."""

    faces: NDArray[np.int64]
    garment: NDArray[np.uint8]
    uv: Floats
    colours: Floats


def dress(rig: Rig, garments: list[Garment]) -> Wardrobe:
    """One mesh; skin that a garment covers is left out."""
    hidden = np.any([g.body_faces for g in garments], axis=0)
    colours = body_colours(rig)
    faces, ids, uvs, rgb = (
        [rig.faces[~hidden]],
        [np.full((~hidden).sum(), 255)],
        [np.zeros(((~hidden).sum(), 3, 2))],
        [],
    )
    start = len(rig.vertices)
    for number, g in enumerate(garments, start=1):
        faces.append(g.faces + start)
        ids.append(np.full(len(g.faces), number))
        uvs.append(g.uv)
        rgb.append(np.zeros((len(g.source), 3)))
        start += len(g.source)
    return Wardrobe(
        np.concatenate(faces),
        np.concatenate(ids).astype(np.uint8),
        np.concatenate(uvs),
        np.concatenate([colours, *rgb]),
    )


def clothed_walk(spec: SequenceSpec, rig: Rig, garments: list[Garment]) -> tuple[Floats, Floats]:
    """Vertices of body and garments together, walking on the spot, `[T, V + G.., 3]`, and metres walked `[T]`."""
    frames = spec.frames + WARM_UP
    start = 2 * np.pi * (spec.phase - gait(spec.gait).cadence * WARM_UP / spec.fps)
    posed, walked = pose_walk(rig, gait(spec.gait), frames, fps=spec.fps, phase=start)
    normals = np.stack([vertex_normals(v, rig.faces) for v in posed])
    rest_normals = vertex_normals(rig.vertices, rig.faces)
    parts = [posed]
    for g in garments:
        shells = g.shell(posed[:, g.source], normals[:, g.source])
        rest = g.shell(rig.vertices[g.source], rest_normals[g.source])
        parts.append(simulate(g, shells, normals[:, g.source], rest, spec.cloth, spec.fps))
    return np.concatenate(parts, axis=1)[WARM_UP:], walked[WARM_UP:] - walked[WARM_UP]


def make_arrays(spec: SequenceSpec) -> dict[str, NDArray[Any]]:
    """The buffers as compact arrays: uv in 1/65535, normals in 1/32767, albedo in 1/255."""
    rig = load_rig(gender=spec.gender, weight=spec.weight, height=spec.height)
    garments = [make_garment(name, rig) for name in GARMENTS]
    mesh = dress(rig, garments)
    bodies, walked = clothed_walk(spec, rig, garments)
    place, heading = place_on_path(spec.path, walked)
    frames = [
        render_geometry(spec, mesh, bodies[t] @ rotation("z", heading[t]).T + place[t]) for t in range(spec.frames)
    ]
    arrays: dict[str, NDArray[Any]] = {name: np.concatenate([f[name] for f in frames]) for name in frames[0]}
    arrays["boxes"] = arrays["boxes"].reshape(spec.frames, 4)
    arrays["starts"] = np.cumsum([0, *(len(f["pixel"]) for f in frames)])
    arrays["azimuth"] = azimuth_of(spec.camera, place, heading).astype(np.float32)
    return arrays


def render_geometry(spec: SequenceSpec, mesh: Wardrobe, vertices: Floats) -> dict[str, NDArray[Any]]:
    """The buffers of one frame."""
    size = spec.size * spec.supersample
    hits = rasterise(spec.camera.project(vertices, size), mesh.faces, size)
    normals = vertex_normals(vertices, mesh.faces)
    corners = mesh.faces[hits.face]
    normal = np.einsum("pk,pkd->pd", hits.weights, normals[corners])
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
    colour = np.einsum("pk,pkd->pd", hits.weights, mesh.colours[corners])
    uv = np.einsum("pk,pkd->pd", hits.weights, mesh.uv[hits.face])
    first, second = mesh.uv[:, 1] - mesh.uv[:, 0], mesh.uv[:, 2] - mesh.uv[:, 0]
    uv_area = np.abs(first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]) / 2
    footprint = np.sqrt(uv_area / np.maximum(hits.area, 1e-6))[hits.face]
    box = np.full(4, np.nan)
    if len(hits.row):
        box[:] = hits.column.min(), hits.row.min(), hits.column.max() + 1, hits.row.max() + 1
    return {
        "pixel": (hits.row * size + hits.column).astype(np.int32),
        "uv": np.round(np.clip(uv, 0, 1) * 65535).astype(np.uint16),
        "garment": mesh.garment[hits.face],
        "normal": np.round(normal * 32767).astype(np.int16),
        "albedo": np.round(np.clip(colour, 0, 1) * 255).astype(np.uint8),
        "footprint": np.minimum(footprint, 1.0).astype(np.float16),
        "boxes": (box / spec.supersample).astype(np.float32),
    }
