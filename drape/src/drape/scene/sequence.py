"""A walking sequence: geometry rendered once to buffers, and cached on disk.

Shapes: `T` frames, `S` side of a frame in pixels, `R = S * supersample` side of the buffers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drape.cache import cached_arrays
from drape.errors import ConfigError, unknown
from drape.scene.arrays import Floats
from drape.scene.body import BODIES, Rig, load_rig
from drape.scene.camera import Camera, azimuth_of
from drape.scene.cloth import Cloth
from drape.scene.cloth_engines import simulate
from drape.scene.gait import Walked, gait, walk
from drape.scene.garments import GARMENTS, Garment, make_garment, vertex_normals
from drape.scene.light import light
from drape.scene.paths import PATHS
from drape.scene.raster import rasterise
from drape.scene.shade import ground_points, hollows, shadows

__all__ = ["SKINS", "Buffers", "SequenceSpec", "build_sequence"]

Colour = tuple[float, float, float]
SKINS: dict[str, tuple[Colour, Colour]] = {  # of skin and hair
    "light": ((0.82, 0.64, 0.54), (0.42, 0.3, 0.18)),
    "middle": ((0.72, 0.53, 0.43), (0.16, 0.11, 0.08)),
    "tan": ((0.6, 0.42, 0.31), (0.1, 0.08, 0.07)),
    "brown": ((0.44, 0.29, 0.21), (0.07, 0.06, 0.05)),
    "dark": ((0.29, 0.19, 0.14), (0.05, 0.045, 0.04)),
    "grey hair": ((0.78, 0.6, 0.52), (0.62, 0.6, 0.58)),
}
SHOE = (0.12, 0.12, 0.13)
WARM_UP = 1.0  # seconds of walking before the first frame, so that the cloth has settled
POSES = 24.0  # poses per second that cloth is moved with, at least
UNDER = 0.05  # metres that the trousers are taken to lie deeper where the shirt hangs over them, to stay under it
ANY_LIGHT = "overcast"  # of a spec whose light nothing depends on
OVERLAP = 0.1  # metres below the shirt's hem down to which that holds


@dataclass(frozen=True, kw_only=True)
class SequenceSpec:
    """Everything that the buffers depend on.

    Args:
        gait: a name of `drape.scene.gait.GAITS`.  path: a name of `drape.scene.paths.PATHS`.
        light: a name of `drape.scene.light.LIGHTS`, for the shadows on the ground.
        frames: T.  fps: frames per second.  size: S.  supersample: 1 to 4.
        camera, cloth: where it stands, how the garments behave.
        body: a name of `drape.scene.body.BODIES`.  skin: a name of `SKINS`.
        phase: of the gait at the first frame, in cycles.
    """

    gait: str = "normal"
    path: str = "past"
    light: str = "overcast"
    frames: int = 24
    fps: float = 6.0
    size: int = 416
    supersample: int = 2
    camera: Camera = field(default_factory=Camera)
    cloth: Cloth = field(default_factory=Cloth)
    body: str = "middle"
    skin: str = "middle"
    phase: float = 0.0

    def __post_init__(self) -> None:
        gait(self.gait)
        light(self.light)
        for kind, name, known in (("path", self.path, PATHS), ("body", self.body, BODIES), ("skin", self.skin, SKINS)):
            if name not in known:
                raise unknown(kind, name, known)
        if not 1 <= self.frames <= 5000 or not 0 < self.fps <= 120 or not 16 <= self.size <= 4096:
            raise ConfigError(
                f"frames={self.frames}, fps={self.fps}, size={self.size}; expected 1-5000, up to 120, and 16-4096."
            )
        if not 1 <= self.supersample <= 4:
            raise ConfigError(f"supersample={self.supersample}; expected 1 to 4.")

    @property
    def seconds(self) -> float:
        """How long the walk takes."""
        return self.frames / self.fps


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
        open: float32 `[P]`, share of the light that hollows of the body let through.
        footprint: float32 `[P]`, length in uv that one pixel covers.
        shaded: int64 `[Q]`, the pixels of the frames' S * S that lie in a shadow on the ground, those of all frames
        in a row. shaded_starts: T + 1 places in `[Q]`. hidden: float32 `[1 + L, Q]`, what the person hides there of
        the sky and of each lamp of the light. boxes: float32 `[T, 4]`, the person's true box (x0, y0, x1, y1) in
        frame pixels; nan where out of the image. azimuth: float32 `[T]`, degrees, the side that is seen. distance:
        float32 `[T]`, metres along the ground to the camera. size, supersample: S, and R / S.
    """

    pixel: Tensor
    starts: list[int]
    uv: Tensor
    garment: Tensor
    normal: Tensor
    albedo: Tensor
    open: Tensor
    footprint: Tensor
    shaded: Tensor
    shaded_starts: list[int]
    hidden: Tensor
    boxes: Tensor
    azimuth: Tensor
    distance: Tensor
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
        open=torch.from_numpy(arrays["open"].astype(np.float32) / 255),
        footprint=torch.from_numpy(arrays["footprint"].astype(np.float32)),
        shaded=torch.from_numpy(arrays["shaded"].astype(np.int64)),
        shaded_starts=arrays["shaded_starts"].tolist(),
        hidden=torch.from_numpy(arrays["hidden"].astype(np.float32) / 255),
        boxes=torch.from_numpy(arrays["boxes"]),
        azimuth=torch.from_numpy(arrays["azimuth"]),
        distance=torch.from_numpy(arrays["distance"]),
        size=spec.size,
        supersample=spec.supersample,
    )


def body_colours(rig: Rig, skin: str) -> Floats:
    """A plain colour for each vertex: hair, shoes, else skin, `[V, 3]`."""
    owner = rig.owners()
    foot = np.char.startswith(owner, "foot") | np.char.startswith(owner, "toe")
    z, y = rig.vertices[:, 2], rig.vertices[:, 1]
    head = rig.heads[rig.bone("head")]
    top = z.max()
    scalp = (owner == "head") & (z > head[2] + 0.3 * (top - head[2])) & (y > head[1] - 0.015)
    crown = (owner == "head") & (z > head[2] + 0.7 * (top - head[2]))
    colours = np.tile(np.array(SKINS[skin][0]), (len(z), 1))
    colours[foot], colours[scalp | crown] = SHOE, SKINS[skin][1]
    return colours


@dataclass(frozen=True)
class Wardrobe:
    """Body and garments as one mesh: triangle list, its garments, corner uv, what is under another garment (metres that
    it is taken to lie deeper by), and the body's colours."""

    faces: NDArray[np.int64]
    garment: NDArray[np.uint8]
    uv: Floats
    under: Floats
    colours: Floats


def dress(rig: Rig, garments: list[Garment], skin: str) -> Wardrobe:
    """One mesh; skin that a garment covers is left out."""
    kept = rig.faces[~np.any([g.body_faces for g in garments], axis=0)]
    faces, ids, uvs, under = [kept], [np.full(len(kept), 255)], [np.zeros((len(kept), 3, 2))], [np.zeros(len(kept))]
    colours = [body_colours(rig, skin)]
    hem = next(g.height.min() for g in garments if g.name == "shirt")
    start = len(rig.vertices)
    for number, g in enumerate(garments, start=1):
        faces.append(g.faces + start)
        ids.append(np.full(len(g.faces), number))
        uvs.append(g.uv)
        covered = (g.height[g.faces].mean(axis=1) > hem - OVERLAP) & (g.name == "trousers")
        under.append(np.where(covered, UNDER, 0.0))
        colours.append(np.zeros((len(g.share), 3)))
        start += len(g.share)
    return Wardrobe(
        np.concatenate(faces),
        np.concatenate(ids).astype(np.uint8),
        np.concatenate(uvs),
        np.concatenate(under),
        np.concatenate(colours),
    )


def clothed_walk(spec: SequenceSpec, rig: Rig, garments: list[Garment]) -> Walked:
    """The walk with the vertices of body and garments together, `[T, V + G.., 3]`."""
    swings = spec.cloth.engine != "skinned"
    each = int(np.ceil(POSES / spec.fps)) if swings else 1  # poses per frame
    rate = each * spec.fps
    before = int(np.ceil(WARM_UP * rate)) if swings else 0
    times = np.arange(-before, (spec.frames - 1) * each + 1) / rate
    posed = walk(rig, gait(spec.gait), spec.path, spec.seconds, times, spec.phase)
    kept = np.arange(before, len(times), each)
    normals = np.stack([vertex_normals(v, rig.faces) for v in posed.vertices])
    rest_normals = vertex_normals(rig.vertices, rig.faces)
    parts = [posed.vertices[kept]]
    for g in garments:
        shells, facing = g.worn(posed.vertices, normals)
        rest, _ = g.worn(rig.vertices, rest_normals)
        parts.append(simulate(g, shells, facing, rest, spec.cloth, rate)[kept])
    return Walked(np.concatenate(parts, axis=1), posed.place[kept], posed.heading[kept])


@lru_cache(maxsize=1)  # the last one, so that a walk which is seen under several lights is moved once
def dressed_walk(spec: SequenceSpec) -> tuple[Wardrobe, Walked]:
    """The mesh of a walk and where its vertices are."""
    rig = load_rig(spec.body)
    garments = [make_garment(name, rig) for name in GARMENTS]
    return dress(rig, garments, spec.skin), clothed_walk(spec, rig, garments)


def make_arrays(spec: SequenceSpec) -> dict[str, NDArray[Any]]:
    """The buffers as compact arrays: uv in 1/65535, normals in 1/32767, albedo, open and hidden in 1/255."""
    mesh, walked = dressed_walk(replace(spec, light=ANY_LIGHT))
    ground, lamp = ground_points(spec.camera, spec.size), light(spec.light)
    frames, falls = [], []
    for vertices, middle in zip(walked.vertices, walked.place, strict=True):
        frames.append(render_geometry(spec, mesh, vertices))
        falls.append(shadows(vertices, lamp, ground, middle))
    arrays: dict[str, NDArray[Any]] = {name: np.concatenate([f[name] for f in frames]) for name in frames[0]}
    arrays["boxes"] = arrays["boxes"].reshape(spec.frames, 4)
    arrays["starts"] = np.cumsum([0, *(len(f["pixel"]) for f in frames)])
    arrays["shaded"] = np.concatenate([pixels for pixels, _ in falls])
    arrays["shaded_starts"] = np.cumsum([0, *(len(pixels) for pixels, _ in falls)])
    arrays["hidden"] = np.round(np.concatenate([hidden for _, hidden in falls], axis=1) * 255).astype(np.uint8)
    arrays["azimuth"] = azimuth_of(spec.camera, walked.place, walked.heading).astype(np.float32)
    away = walked.place - spec.camera.position()[:2]
    arrays["distance"] = np.linalg.norm(away, axis=1).astype(np.float32)
    return arrays


def render_geometry(spec: SequenceSpec, mesh: Wardrobe, vertices: Floats) -> dict[str, NDArray[Any]]:
    """The buffers of one frame."""
    size = spec.size * spec.supersample
    hits = rasterise(spec.camera.project(vertices, size), mesh.faces, size, mesh.under)
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
        "open": np.round(hollows(hits.row, hits.column, hits.depth, spec.camera.focal(size)) * 255).astype(np.uint8),
        "footprint": np.minimum(footprint, 1.0).astype(np.float16),
        "boxes": (box / spec.supersample).astype(np.float32),
    }
