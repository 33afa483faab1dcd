"""Where the feet are: a plan of contacts along a way, in which a foot on the ground does not move.

A foot that stands is planted: it comes down on the heel, lies flat, and rolls off over the ball, around points that
stay where they are; between two contacts it swings. With a share of contact (`duty`) above a half one foot is always
on the ground, below it there is a flight.

Shapes: `N` moments. Phases count cycles of two steps; the left foot comes down at whole numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from drape.scene.arrays import Floats
from drape.scene.paths import Curve

__all__ = ["FLAT", "Foot", "Landing", "foot_at"]

FLAT = (0.16, 0.58)  # share of a contact between which the whole foot lies on the ground


@dataclass(frozen=True)
class Foot:
    """A foot at rest, metres, in a frame whose origin is on the ground under the ankle; toes towards -y.

    Attributes:
        ankle: its height.  heel: y of the heel, above 0.  ball: y and height of the joint of the toes.
        strike, push: degrees that the toes are up when it comes down, and the heel when it leaves.
    """

    ankle: float
    heel: float
    ball: tuple[float, float]
    strike: float
    push: float


@dataclass(frozen=True)
class Landing:
    """A plan of contacts.

    Attributes:
        curve: the way.  stride: metres per cycle along it.  start: cycles that the gait is in at the start of the way.
        duty: share of a cycle that a foot is down.  width: metres of each foot's track from the middle.
        toe_out: degrees.  clearance: metres that a foot is lifted by.
    """

    curve: Curve
    stride: float
    start: float
    duty: float
    width: float
    toe_out: float
    clearance: float

    def at(self, phase: Floats) -> tuple[Floats, Floats]:
        """Places `[N, 2]` and headings `[N]` on the way at phases of the gait."""
        return self.curve.at((phase - self.start) * self.stride)

    def planted(self, number: Floats, side: int) -> tuple[Floats, Floats]:
        """Places `[N, 2]` and headings `[N]` of the contacts that begin at phases `number`; side 1 left, -1 right."""
        place, heading = self.at(number + self.duty / 2)
        turn = np.radians(heading)
        left = np.stack([np.cos(turn), np.sin(turn)], axis=-1)
        return place + side * self.width * left, heading + side * self.toe_out


def smooth(x: Floats) -> Floats:
    """From 0 to 1 with level ends."""
    x = np.clip(x, 0.0, 1.0)
    return np.asarray(x * x * (3 - 2 * x))


def tilt(foot: Foot, share: Floats) -> Floats:
    """Degrees that the foot is tilted by at a share of its contact: below 0 the toes are up, above 0 the heel."""
    down, up = FLAT
    return np.where(
        share < down, -foot.strike * (1 - smooth(share / down)), foot.push * smooth((share - up) / (1 - up))
    )


def ankle_over(foot: Foot, degrees: Floats) -> tuple[Floats, Floats]:
    """How far behind the planted place (y) and how high the ankle is when the foot is tilted about heel or ball."""
    turn = np.radians(degrees)
    y = np.where(degrees < 0, foot.heel, foot.ball[0])
    z = np.where(degrees < 0, 0.0, foot.ball[1])
    across, up = -y, foot.ankle - z
    return y + np.cos(turn) * across - np.sin(turn) * up, z + np.sin(turn) * across + np.cos(turn) * up


def lowest(foot: Foot, degrees: Floats, ankle_height: Floats) -> Floats:
    """How far the lower one of heel and toes of a tilted foot is above the ground."""
    turn = np.radians(degrees)
    ends = [np.sin(turn) * y - np.cos(turn) * foot.ankle for y in (foot.heel, 1.35 * foot.ball[0])]
    return ankle_height + np.minimum(*ends)


def foot_at(landing: Landing, foot: Foot, side: int, phase: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Ankle `[N, 3]`, heading `[N]` and tilt `[N]` in degrees of one foot, and its share of contact `[N]`, nan in the
    air.

    Args:
        side: 1 left, -1 right, whose contacts begin half a cycle later.
    """
    shift = 0.0 if side > 0 else 0.5
    number = np.floor(phase - shift) + shift
    since = phase - number
    share = since / landing.duty
    here, turned = landing.planted(number, side)
    there, turned_next = landing.planted(number + 1, side)
    degrees = tilt(foot, np.minimum(share, 1.0))
    gone = np.clip((since - landing.duty) / (1 - landing.duty), 0.0, 1.0)  # share of the swing
    swing = smooth(gone)
    degrees = np.where(share <= 1, degrees, foot.push + (-foot.strike - foot.push) * swing)
    first = ankle_over(foot, np.where(share <= 1, degrees, foot.push))
    last = ankle_over(foot, np.full_like(degrees, -foot.strike))
    behind = first[0] + (last[0] - first[0]) * swing
    air = share > 1
    height = first[1] + (last[1] - first[1]) * swing + landing.clearance * np.sin(np.pi * gone)
    graze = np.minimum(0.5 * landing.clearance * np.sin(np.pi * gone), 0.02) - lowest(foot, degrees, height)
    height = height + np.where(air, np.maximum(graze, 0.0), 0.0)
    heading = turned + (turned_next - turned) * swing
    turn = np.radians(heading)
    place = here + (there - here) * swing[:, None] + behind[:, None] * np.stack([-np.sin(turn), np.cos(turn)], axis=-1)
    return np.concatenate([place, height[:, None]], axis=1), heading, degrees, np.where(air, np.nan, share)
