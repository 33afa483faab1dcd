"""Gaits: how a body walks along a way, with feet that stand where they stand.

The contacts are planned first (`drape.scene.footfall`). The pelvis moves at constant speed along the way, as high as
the legs reach; each leg is bent at hip and knee so that its ankle is where the plan has it (inverse kinematics of two
bones); the trunk and the arms swing with the phase. Ranges follow clinical gait curves, roughly.

Shapes: `T` frames, `V` vertices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d, minimum_filter1d

from drape.errors import ConfigError, unknown
from drape.scene.arrays import Floats, about, rotation
from drape.scene.body import Rig, bone_transforms, skinned
from drape.scene.footfall import Foot, Landing, foot_at
from drape.scene.paths import curve

__all__ = ["GAITS", "Gait", "Walked", "gait", "leg_length", "walk"]

RATE = 60.0  # moments per second at which the pelvis is planned
REACH = 0.985  # of the leg's length that a step may use
SMOOTHING = 0.06  # seconds over which the pelvis's height is smoothed
REST_ELBOW = 38.0  # degrees that the rig's elbows are bent by at rest
BALL = "toe3-1"  # the joint that a foot rolls off over
CURL = 28.0  # degrees that each finger joint of a relaxed hand is bent by


@dataclass(frozen=True, kw_only=True)
class Gait:
    """A walking cycle of two steps.

    Args:
        cadence: cycles per second.  stride: length of a cycle in lengths of the leg.
        duty: share of the cycle that a foot is on the ground; below .5 there is a flight.
        crouch: share of the leg's length that the pelvis is lower than it could be.  bounce: metres that it goes up in
            a flight.  sway: metres to the side of the standing foot.
        width: metres between the feet's tracks.  toe_out: degrees.  clearance: metres that a foot is lifted by.
        strike, push: degrees that the toes are up when a foot comes down, and the heel when it leaves.
        arm, arm_offset: amplitude and mean of the upper arm's swing in degrees, forwards.
        elbow, elbow_swing: flexion of the elbow, and how much more of it there is in front than behind.
        lean: of the trunk, forwards.  twist: of the shoulders against the hips, amplitude.
        spread: of the arms, away from the trunk.
    """

    cadence: float = 0.95
    stride: float = 1.62
    duty: float = 0.62
    crouch: float = 0.0
    bounce: float = 0.0
    sway: float = 0.018
    width: float = 0.16
    toe_out: float = 6.0
    clearance: float = 0.04
    strike: float = 16.0
    push: float = 38.0
    arm: float = 22.0
    arm_offset: float = -2.0
    elbow: float = 18.0
    elbow_swing: float = 6.0
    lean: float = 3.0
    twist: float = 6.0
    spread: float = 11.0

    def __post_init__(self) -> None:
        if not 0.2 <= self.cadence <= 3 or not 0.2 <= self.stride <= 4:
            raise ConfigError(f"cadence={self.cadence}, stride={self.stride}; expected 0.2 to 3, and 0.2 to 4.")
        if not 0.2 <= self.duty <= 0.9 or not 0 <= self.crouch <= 0.3:
            raise ConfigError(f"duty={self.duty}, crouch={self.crouch}; expected 0.2 to 0.9, and 0 to 0.3.")


GAITS = {
    "normal": Gait(),
    "amble": Gait(cadence=0.82, stride=1.4, duty=0.64, arm=15, twist=5, spread=13, toe_out=9),
    "brisk": Gait(cadence=1.1, stride=1.85, duty=0.6, arm=28, arm_offset=-5, elbow=38, lean=6, twist=9, push=44),
    "stroll": Gait(cadence=0.7, stride=1.22, duty=0.66, arm=11, elbow=10, lean=1, twist=4, strike=11, push=30),
    "heavy": Gait(cadence=0.78, stride=1.25, duty=0.67, crouch=0.03, arm=14, elbow=26, lean=11, spread=15, width=0.22,
                  sway=0.04, toe_out=14, strike=9, push=28),
    "march": Gait(cadence=1.0, stride=1.55, duty=0.6, arm=36, elbow=8, lean=0, twist=7, clearance=0.11, toe_out=3),
    "hurry": Gait(cadence=1.25, stride=1.95, duty=0.57, crouch=0.02, arm=30, elbow=70, lean=9, twist=10, push=46),
    "hands in pockets": Gait(cadence=0.85, stride=1.45, duty=0.63, arm=3, arm_offset=6, elbow=62, elbow_swing=2, lean=5,
                             twist=3, spread=16),
    "jog": Gait(cadence=1.35, stride=2.55, duty=0.36, crouch=0.06, bounce=0.035, width=0.09, clearance=0.16, strike=6,
                push=52, arm=30, arm_offset=-20, elbow=92, elbow_swing=10, lean=10, twist=10, spread=10),
    "run slowly": Gait(cadence=1.3, stride=2.1, duty=0.4, crouch=0.05, bounce=0.03, width=0.1, clearance=0.12, strike=4,
                       push=46, arm=24, arm_offset=-16, elbow=84, elbow_swing=8, lean=8, twist=9, spread=13),
}  # fmt: skip


def gait(name: str) -> Gait:
    """A gait by its name."""
    if name not in GAITS:
        raise unknown("gait", name, GAITS)
    return GAITS[name]


@dataclass(frozen=True)
class Walked:
    """A walk: vertices `[T, V, 3]` in the world, place on the ground `[T, 2]`, heading `[T]` in degrees."""

    vertices: Floats
    place: Floats
    heading: Floats


def leg_length(rig: Rig) -> float:
    """From hip to ankle, metres."""
    hip, knee, ankle = (rig.heads[rig.bone(name)] for name in ("upperleg01.L", "lowerleg01.L", "foot.L"))
    return float(np.linalg.norm(knee - hip) + np.linalg.norm(ankle - knee))


def foot_of(rig: Rig, g: Gait) -> Foot:
    """The left foot's measures from the rig; the right one is its mirror image."""
    ground = rig.vertices[:, 2].min()
    ankle, ball = rig.heads[rig.bone("foot.L")], rig.heads[rig.bone(f"{BALL}.L")]
    sole = rig.vertices[(rig.vertices[:, 2] < ground + 0.012) & (rig.vertices[:, 0] > 0)]
    heel = float(sole[:, 1].max() - ankle[1]) - 0.01
    return Foot(float(ankle[2] - ground), heel, (float(ball[1] - ankle[1]), float(ball[2] - ground)), g.strike, g.push)


def plan(rig: Rig, g: Gait, path: str, seconds: float, phase: float = 0.0) -> Landing:
    """The contacts of a walk of so many seconds that starts at a phase of the gait, in cycles."""
    stride = g.stride * leg_length(rig)
    way = curve(path, stride * g.cadence * seconds)
    return Landing(way, stride, phase, g.duty, g.width / 2, g.toe_out, g.clearance)


def pelvis_height(rig: Rig, g: Gait, landing: Landing, foot: Foot, phases: Floats) -> Floats:
    """Height of the root's joint at phases of the gait, `[T]`: as high as the legs reach, smoothed, less the crouch."""
    margin, step = g.cadence * 5 * SMOOTHING, g.cadence / RATE
    dense = np.arange(phases.min() - margin, phases.max() + margin + step, step)
    root, length = rig.heads[rig.bone("root")], leg_length(rig)
    highest = np.full(len(dense), np.inf)
    place, heading = landing.at(dense)
    turn = np.radians(heading)
    for side, name in ((1, "L"), (-1, "R")):
        hip = rig.heads[rig.bone(f"upperleg01.{name}")] - root
        ankle, _, _, share = foot_at(landing, foot, side, dense)
        over = place + np.stack([np.cos(turn), np.sin(turn)], axis=-1) * hip[0]
        over += np.stack([-np.sin(turn), np.cos(turn)], axis=-1) * hip[1]
        across = np.linalg.norm(ankle[:, :2] - over, axis=1)
        reach = np.where(np.isnan(share), 0.998, REACH) * length
        highest = np.minimum(highest, ankle[:, 2] - hip[2] + np.sqrt(np.maximum(reach**2 - across**2, 0.0)))
    standing = foot.ankle + REACH * length - (rig.heads[rig.bone("upperleg01.L")] - root)[2]
    flight = (landing.duty + 0.5) / 2  # the middle of a flight; for a gait without one, of both feet on the ground
    wanted = standing - g.crouch * length + g.bounce * np.cos(4 * np.pi * (dense - flight))
    wide = max(round(4 * SMOOTHING * RATE), 1)
    smooth = gaussian_filter1d(minimum_filter1d(np.minimum(highest, wanted), wide), SMOOTHING * RATE)
    return np.interp(phases, dense, smooth)


def joint_rotations(g: Gait, phase: float) -> dict[str, Floats]:
    """Rotation of each moving bone of trunk and arms in the rest frame's axes, at a phase of the cycle in radians."""
    turns: dict[str, Floats] = {
        "spine05": rotation("x", g.lean / 2),
        "spine03": rotation("z", g.twist * np.cos(phase)) @ rotation("x", g.lean / 2),
        "neck01": rotation("z", -g.twist * np.cos(phase)) @ rotation("x", -g.lean / 2),
    }
    for side, sign, shift in (("L", 1.0, 0.0), ("R", -1.0, np.pi)):
        p = phase + shift
        swing = g.arm_offset - g.arm * np.cos(p)
        elbow = g.elbow - g.elbow_swing * np.cos(p)
        hang = rotation("y", sign * (42 - g.spread))
        turns[f"upperarm01.{side}"] = rotation("x", -swing) @ hang
        turns[f"lowerarm01.{side}"] = hang.T @ rotation("x", REST_ELBOW - elbow) @ hang
    return turns


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


def frame_of(along: Floats, hinge: Floats) -> Floats:
    """Orthonormal axes `[3, 3]`, as columns: along a bone, and the part of `hinge` across it."""
    first = along / np.linalg.norm(along)
    second = hinge - (hinge @ first) * first
    second /= np.linalg.norm(second)
    return np.stack([first, second, np.cross(first, second)], axis=1)


def leg_rotations(rig: Rig, side: str, ankle: Floats, toes: float, tilt: float) -> dict[str, Floats]:
    """Hip, knee, foot and toes of one leg.

    Args:
        ankle: where it has to be, `[3]`, in the frame of the rig at rest.
        toes: heading of the foot in that frame, degrees.  tilt: of the foot, degrees, above 0 the heel is up.
    """
    hip, knee, rest = (rig.heads[rig.bone(f"{name}.{side}")] for name in ("upperleg01", "lowerleg01", "foot"))
    thigh, shank = float(np.linalg.norm(knee - hip)), float(np.linalg.norm(rest - knee))
    reach = ankle - hip
    distance = min(float(np.linalg.norm(reach)), 0.9995 * (thigh + shank))
    along = reach / np.linalg.norm(reach)
    ahead = rotation("z", toes / 2) @ np.array([0.0, -1.0, 0.0])  # the knee points between trunk and toes
    ahead = ahead - (ahead @ along) * along
    ahead /= np.linalg.norm(ahead)
    share = (distance**2 + thigh**2 - shank**2) / (2 * distance)
    bent = hip + share * along + np.sqrt(max(thigh**2 - share**2, 0.0)) * ahead
    hinge = np.cross(ahead, along)
    across = np.array([1.0, 0.0, 0.0])
    upper = frame_of(bent - hip, hinge) @ frame_of(knee - hip, across).T
    lower = frame_of(hip + distance * along - bent, hinge) @ frame_of(rest - knee, across).T
    level = rotation("z", toes)
    foot = level @ rotation("x", tilt)
    turns = {f"upperleg01.{side}": upper, f"lowerleg01.{side}": upper.T @ lower, f"foot.{side}": lower.T @ foot}
    if tilt > 0:  # the toes stay on the ground when the heel is up
        turns |= dict.fromkeys(toes_of(side), foot.T @ level)
    return turns


def toes_of(side: str) -> list[str]:
    """The first bones of a foot's toes."""
    return [f"toe{number}-1.{side}" for number in range(1, 6)]


def balls(rig: Rig) -> dict[str, Floats]:
    """The point of each foot, `[3]`, that it rolls off over, for all its toes: about their own joints, which lie up to
    45 mm apart, they would be drawn over the ground while the heel rises.
    """
    return {toe: rig.heads[rig.bone(f"{BALL}.{side}")] for side in ("L", "R") for toe in toes_of(side)}


def walk(rig: Rig, g: Gait, path: str, seconds: float, times: Floats, phase: float = 0.0) -> Walked:
    """A body that walks along a way.

    Args:
        seconds: that the whole walk takes; the way is laid out for it.
        times: `[T]`, seconds from its start; some may lie before it.
        phase: of the gait at the start, in cycles.
    """
    if len(times) < 1 or seconds <= 0:
        raise ConfigError(f"{len(times)} times, seconds={seconds}; expected at least one, and more than 0 seconds.")
    landing, foot = plan(rig, g, path, seconds, phase), foot_of(rig, g)
    cycles = g.cadence * times + phase
    place, heading = landing.at(cycles)
    height = pelvis_height(rig, g, landing, foot, cycles)
    root, hands, rolled = rig.heads[rig.bone("root")], relaxed_hands(rig), balls(rig)
    feet = {name: foot_at(landing, foot, side, cycles) for side, name in ((1, "L"), (-1, "R"))}
    result = np.empty((len(times), *rig.vertices.shape))
    for t, cycle in enumerate(cycles):
        sway = g.sway * np.cos(2 * np.pi * (cycle - g.duty / 2))
        turn = rotation("z", heading[t])
        middle = np.array([*place[t], height[t]]) + turn @ np.array([sway, 0.0, 0.0])
        turns = hands | joint_rotations(g, 2 * np.pi * cycle)
        for name, (ankle, towards, tilt, _) in feet.items():
            local = turn.T @ (ankle[t] - middle) + root
            turns |= leg_rotations(rig, name, local, towards[t] - heading[t], float(tilt[t]))
        result[t] = (skinned(rig, bone_transforms(rig, turns, rolled)) - root) @ turn.T + middle
    return Walked(result, place, heading)
