"""Shirt, trousers and hat: shells around regions of the body, each with its own uv square.

A garment is the part of the body's skin inside its cuts (hem, neck, sleeves), pushed out along the normals; triangles
that a cut goes through are divided there, so hems are straight. Trunk and limbs get a cylindrical unwrap each, so that
one cell of texture has about one size everywhere: the trunk (or hips) fills the middle of the square, the left and
right limb a strip at its sides; the hat is laid flat from its crown. Seams run down the back.

Shapes: `V` body vertices, `F` body triangles, `G` vertices and `E` triangles of the garment.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, diags_array

from drape.errors import unknown
from drape.scene.arrays import Floats
from drape.scene.body import Rig

__all__ = ["GARMENTS", "Garment", "make_garment", "strips_of", "vertex_normals"]

GARMENTS = ("shirt", "trousers", "hat")  # garment ids of the buffers are 1, 2, 3
ARMS = ("upperarm", "lowerarm", "wrist", "finger", "metacarpal")
LIMBS = {"shirt": ARMS, "trousers": ("upperleg", "lowerleg"), "hat": ()}
STRIPS = {"trunk": (0.28, 0.72), "left": (0.74, 1.0), "right": (0.0, 0.26)}  # of u, as parts are unwrapped
SLEEVE = 0.9  # of the upper arm
NEAREST = 0.04  # share of an edge that a cut keeps away from the edge's inner end, so that no triangle is a sliver
# metres off the skin at rest, at the garment's top and at its hem
OFFSET = {"shirt": (0.012, 0.048), "trousers": (0.012, 0.034), "hat": (0.022, 0.022)}
SKIN, OVER = 0.005, 0.032  # metres: the nearest that cloth comes to the skin, and to it over another garment
BRIDGING = {"shirt": 25, "trousers": 10, "hat": 4}  # rounds of smoothing that take the garment over hollows
LOOSE = {"shirt": 0.14, "trousers": 0.07, "hat": 0.0}  # metres that cloth may leave its rest shell by, at the hems


@dataclass(frozen=True)
class Garment:
    """A shell around part of the body.

    Attributes:
        name: one of `GARMENTS`.
        source: int64 `[G, 2]`, the body vertices that each vertex lies between.  share: `[G]`, how near the second is.
        faces: int64 `[E, 3]` into the garment's vertices.
        body_faces: bool `[F]`, the body's triangles it covers.
        height: `[G]`, metres over the ground at rest.
        uv: float64 `[E, 3, 2]` in [0, 1], at the triangles' corners.
        offset: `[G]`, metres off the skin.  least: `[G]`, metres that it keeps off it when it moves.
        loose: `[G]`, metres the cloth may move; 0 where it is held.
    """

    name: str
    source: NDArray[np.int64]
    share: Floats
    faces: NDArray[np.int64]
    body_faces: NDArray[np.bool_]
    height: Floats
    uv: Floats
    offset: Floats
    least: Floats
    loose: Floats

    def on_body(self, values: Floats) -> Floats:
        """Values of the body's vertices `[..., V, 3]` at the garment's, `[..., G, 3]`."""
        return between(values, self.source, self.share)

    def facing(self, normals: Floats) -> Floats:
        """The skin's unit normals at the garment's vertices, `[..., G, 3]`, from those of the body's `[..., V, 3]`."""
        mixed = self.on_body(normals)
        return np.asarray(mixed / np.maximum(np.linalg.norm(mixed, axis=-1, keepdims=True), 1e-12))

    def worn(self, vertices: Floats, normals: Floats) -> tuple[Floats, Floats]:
        """The shell over a body's vertices, with unit normals `[..., V, 3]`, and those under it, both `[..., G, 3]`."""
        facing = self.facing(normals)
        return self.shell(self.on_body(vertices), facing), facing

    def shell(self, skin: Floats, normals: Floats) -> Floats:
        """The garment as skinning alone gives it, `[..., G, 3]`: off the skin, and straight across hollows.

        Cloth spans a hollow of the body (between the legs of the pelvis, under the chest) where skin would follow it.
        So the shell is smoothed by its neighbours' mean, and keeps what lies further out.

        Args:
            skin, normals: the body's vertices and unit normals there (`on_body`, `facing`), `[..., G, 3]`.
        """
        shell = skin + self.offset[:, None] * normals
        if not BRIDGING[self.name]:
            return shell
        mean = neighbour_mean(self.faces, len(self.source))
        for _ in range(BRIDGING[self.name]):
            flat = shell.reshape(-1, len(self.source), 3).transpose(1, 0, 2).reshape(len(self.source), -1)
            smooth = (mean @ flat).reshape(len(self.source), -1, 3).transpose(1, 0, 2).reshape(shell.shape)
            outwards = ((smooth - shell) * normals).sum(axis=-1, keepdims=True)
            shell = shell + np.maximum(outwards, 0.0) * normals
        return shell


def neighbour_mean(faces: NDArray[np.int64], count: int) -> csr_array:
    """The matrix `[G, G]` that gives each vertex the mean of its neighbours."""
    pairs = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    rows, columns = np.concatenate([pairs, pairs[:, ::-1]]).T
    linked = csr_array((np.ones(len(rows)), (rows, columns)), shape=(count, count))
    linked.data[:] = 1.0
    return csr_array(diags_array(1 / np.maximum(linked.sum(axis=1), 1.0)) @ linked)


def vertex_normals(vertices: Floats, faces: NDArray[np.int64]) -> Floats:
    """Unit normals of a mesh by area-weighted mean of its triangles', `[V, 3]`."""
    corners = vertices[faces]
    face = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    total = np.stack([sum_by(faces, face[:, axis], len(vertices)) for axis in range(3)], axis=1)
    return np.asarray(total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12))


def sum_by(faces: NDArray[np.int64], values: Floats, count: int) -> Floats:
    """The sum, for each of `count` vertices, of the values `[F]` of its triangles."""
    return np.asarray(np.bincount(faces.ravel(), np.repeat(values, 3), minlength=count), dtype=np.float64)


def between(values: Floats, pairs: NDArray[np.int64], share: Floats) -> Floats:
    """Values `[..., V, 3]` blended between pairs of vertices `[G, 2]`, `[..., G, 3]`."""
    first, second = values[..., pairs[:, 0], :], values[..., pairs[:, 1], :]
    return np.asarray(first + share[:, None] * (second - first))


def region_of(name: str, rig: Rig) -> tuple[Floats, NDArray[np.int64]]:
    """How far inside a garment's cuts each vertex lies, metres, and its part: 0 trunk, 1 left limb, 2 right limb."""
    owner = rig.owners()
    x, z = rig.vertices[:, 0], rig.vertices[:, 2]
    arm = np.any([np.char.startswith(owner, b) for b in ARMS], axis=0)
    limb = np.any([np.char.startswith(owner, b) for b in LIMBS[name]], axis=0) if LIMBS[name] else np.zeros_like(arm)
    part = np.where(limb, np.where(x > 0, 1, 2), 0)
    outside = np.full(len(z), -1.0)
    if name == "hat":
        top, neck = z.max(), rig.heads[rig.bone("head"), 2]
        return np.where(np.char.startswith(owner, "head"), z - neck - 0.62 * (top - neck), outside), part
    if name == "trousers":
        waist, ankle = rig.heads[rig.bone("spine05"), 2] + 0.03, rig.heads[rig.bone("foot.L"), 2] + 0.05
        return np.where(arm, outside, np.minimum(z - ankle, waist - z)), part
    hem, collar = rig.heads[rig.bone("upperleg01.L"), 2] - 0.04, rig.heads[rig.bone("neck01"), 2] + 0.015
    shoulder, elbow = rig.heads[rig.bone("upperarm01.L")], rig.heads[rig.bone("lowerarm01.L")]
    length = float(np.linalg.norm(elbow - shoulder))
    mirrored = rig.vertices * np.stack([np.sign(x), np.ones_like(x), np.ones_like(x)], axis=1)
    along = (mirrored - shoulder) @ (elbow - shoulder) / length
    return np.where(arm, SLEEVE * length - along, np.minimum(z - hem, collar - z)), part


@dataclass(frozen=True)
class Cut:
    """A mesh cut at a level of a field: vertices as pairs of the old ones `[G, 2]` and shares `[G]`, triangles `[E, 3]`
    of them."""

    pairs: NDArray[np.int64]
    share: Floats
    faces: NDArray[np.int64]


def cut(faces: NDArray[np.int64], inside: Floats) -> Cut:
    """The part of a mesh where a field `[V]` is above 0; triangles `[F, 3]` that it changes its sign in are divided."""
    within = inside > 0
    count = within[faces].sum(axis=1)
    whole = faces[count == 3]
    one = turned(faces[count == 1], within[faces[count == 1]].argmax(axis=1))
    two = turned(faces[count == 2], within[faces[count == 2]].argmin(axis=1))
    same = [np.stack([part, part], axis=-1) for part in (whole, one, two)]
    tip = np.stack([same[1][:, 0], one[:, [0, 1]], one[:, [0, 2]]], axis=1)
    left, right = two[:, [1, 0]], two[:, [2, 0]]
    quad = [np.stack([left, same[2][:, 1], same[2][:, 2]], axis=1), np.stack([left, same[2][:, 2], right], axis=1)]
    corners = np.concatenate([same[0], tip, *quad])
    pairs, numbers = np.unique(corners.reshape(-1, 2), axis=0, return_inverse=True)
    first, second = inside[pairs].T
    crosses = pairs[:, 0] != pairs[:, 1]
    share = np.where(crosses, np.maximum(first / np.where(crosses, first - second, 1.0), NEAREST), 0.0)
    return Cut(pairs, share, numbers.reshape(-1, 3))


def turned(faces: NDArray[np.int64], start: NDArray[np.int64]) -> NDArray[np.int64]:
    """Triangles `[N, 3]` that begin at another of their corners `[N]`, as oriented as before."""
    return np.take_along_axis(faces, (start[:, None] + np.arange(3)) % 3, axis=1)


def unwrap(name: str, points: Floats, part: int) -> Floats:
    """Coordinates of one part in [0, 1]: turn around its axis, seam at the back, and height; the hat's from above."""
    centre = points.mean(axis=0)
    if name == "hat":
        across = points[:, :2] - centre[:2]
        radius = np.linalg.norm(across, axis=1, keepdims=True)
        drop = (points[:, 2].max() - points[:, 2:]) / float(np.ptp(points[:, 2]))
        return np.asarray(0.5 + 0.25 * across / np.maximum(radius, 1e-9) * (radius / radius.max() + drop))
    turn = np.arctan2(points[:, 0] - centre[0], -(points[:, 1] - centre[1])) / (2 * np.pi) + 0.5
    axis = points[:, 2].copy()
    if name == "shirt" and part > 0:
        direction = np.array([1.0 if part == 1 else -1.0, 0.0, -1.0]) / np.sqrt(2)  # arms hang at 45 degrees at rest
        along = (points - centre) @ direction
        side = (points - centre) - along[:, None] * direction
        turn = np.arctan2(side @ np.cross(direction, [0.0, 1.0, 0.0]), -side[:, 1]) / (2 * np.pi) + 0.5
        axis = -along
    height = (axis - axis.min()) / max(float(np.ptp(axis)), 1e-9)
    return np.stack([turn, 1 - height], axis=1)


def strips_of(name: str) -> dict[str, tuple[float, float]]:
    """The strip of u that each part of a garment fills, in the order of the parts' numbers in `region_of`."""
    return {"trunk": (0.0, 1.0)} if name == "hat" else STRIPS


def corner_uv(name: str, points: Floats, faces: NDArray[np.int64], part: NDArray[np.int64]) -> Floats:
    """uv at the corners of triangles, in the garment's square; triangles across the seam do not run around it.

    Args:
        points: `[G, 3]`, at rest.  part: `[G]`, of `region_of`.
    """
    face_part = np.sort(part[faces], axis=1)[:, 1]
    uv = np.zeros((len(faces), 3, 2))
    for p, (left, right) in enumerate(strips_of(name).values()):
        mine = face_part == p
        if not mine.any():
            continue
        used = np.unique(faces[mine])
        place = np.zeros((len(points), 2))
        place[used] = unwrap(name, points[used], p)
        corners = place[faces[mine]]
        wraps = (np.ptp(corners[..., 0], axis=1) > 0.5) & (name != "hat")
        corners[wraps, :, 0] = np.where(corners[wraps, :, 0] < 0.5, 1.0, corners[wraps, :, 0])
        corners[..., 0] = left + (right - left) * corners[..., 0]
        uv[mine] = corners
    return np.clip(uv, 0.0, 1.0)


def looseness(name: str, z: Floats, part: NDArray[np.int64]) -> Floats:
    """How far each vertex may leave the shell: nothing where the garment is held, most at the hems."""
    if name == "hat":
        return np.zeros(len(z))
    height = (z - z.min()) / float(np.ptp(z))
    free = np.clip(1.25 * (1 - height), 0.0, 1.0) if name == "shirt" else np.clip(1.4 * (0.8 - height), 0.0, 1.0)
    if name == "shirt":
        free = np.where(part > 0, 0.35, free)
    return np.asarray(LOOSE[name] * free)


def offsets(name: str, z: Floats) -> Floats:
    """Metres off the skin of each vertex: a garment widens towards its hem, and a sleeve as much."""
    top, hem = OFFSET[name]
    return np.asarray(top + (hem - top) * (z.max() - z) / float(np.ptp(z)))


def make_garment(name: str, rig: Rig) -> Garment:
    """A garment of `GARMENTS` for a body."""
    if name not in GARMENTS:
        raise unknown("garment", name, GARMENTS)
    inside, part = region_of(name, rig)
    made = cut(rig.faces, inside)
    points, part = between(rig.vertices, made.pairs, made.share), part[made.pairs[:, 0]]
    z = points[:, 2]
    least = np.full(len(z), SKIN)
    if name == "shirt":  # it hangs over the trousers
        least[z < rig.heads[rig.bone("spine05"), 2] + 0.04] = OVER
    return Garment(
        name=name,
        source=made.pairs,
        share=made.share,
        faces=made.faces,
        body_faces=np.asarray((inside > 0)[rig.faces].all(axis=1)),
        height=z - rig.vertices[:, 2].min(),
        uv=corner_uv(name, points, made.faces, part),
        offset=np.maximum(offsets(name, z), least),
        least=least,
        loose=looseness(name, z, part),
    )
