"""What makes a walk believable, as numbers: feet that stand still, flights, cloth that swings, shadows at the feet.

Shapes: `T` poses of a walk, `V` vertices of the body, `G` of a garment.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from drape.scene.arrays import Floats, rotation
from drape.scene.body import Rig
from drape.scene.footfall import FLAT, foot_at
from drape.scene.gait import Gait, Walked, foot_of, plan
from drape.scene.garments import Garment
from drape.scene.light import Light
from drape.scene.shade import shadows

__all__ = ["Standing", "contact_shadow", "flat", "foot_vertices", "hem_of", "standing", "swing"]

TOUCHING = 0.006  # metres over the ground up to which a sole touches it
FEWEST = 3  # vertices of a sole that touch it at least, or the foot is rolling off
FLYING = 0.01  # metres over the ground of the lowest vertex from which nobody stands
HEM = 0.6  # of the furthest that a garment's vertices may move: those beyond it are its hem
AROUND, GRID = 1.2, 0.02  # metres around a person in which a contact shadow is looked for, and how finely
ALIKE = 0.9  # of the darkest, what is as dark
SETTLED = 0.5  # seconds after which cloth has left its first pose


@dataclass(frozen=True)
class Standing:
    """How a walk meets the ground.

    Attributes:
        sliding: metres per second, of soles that touch the ground while their foot stands, for each foot and moment.
        flying: share of the moments at which nothing touches the ground.
        lowest: metres, the lowest that the body ever is.
    """

    sliding: Floats
    flying: float
    lowest: float


def foot_vertices(rig: Rig) -> dict[int, NDArray[np.int64]]:
    """Vertices of the left (1) and the right (-1) foot."""
    owner = rig.owners()
    foot = np.char.startswith(owner, "foot") | np.char.startswith(owner, "toe")
    return {side: np.flatnonzero(foot & np.char.endswith(owner, end)) for side, end in ((1, "L"), (-1, "R"))}


def standing(
    rig: Rig, g: Gait, path: str, seconds: float, times: Floats, walked: Walked, phase: float = 0.0
) -> Standing:
    """How a walk of `drape.scene.gait.walk` meets the ground, from poses at equal intervals.

    The sliding of a foot is the median speed of the vertices that touch the ground, so that it is that of the sole and
    not of a toe which rolls.
    """
    landing, foot = plan(rig, g, path, seconds, phase), foot_of(rig, g)
    speeds = []
    for side, vertices in foot_vertices(rig).items():
        share = foot_at(landing, foot, side, g.cadence * times + phase)[3]
        sole = walked.vertices[:, vertices]
        speed = np.linalg.norm(np.diff(sole[..., :2], axis=0), axis=2) / np.diff(times)[:, None]
        low = (sole[:-1, :, 2] < TOUCHING) & (sole[1:, :, 2] < TOUCHING)
        for t in np.flatnonzero(share[1:] > share[:-1]):  # the same contact at both ends
            if low[t].sum() >= FEWEST:
                speeds.append(float(np.median(speed[t][low[t]])))
    lowest = walked.vertices[..., 2].min(axis=1)
    return Standing(np.array(speeds), float((lowest > FLYING).mean()), float(lowest.min()))


def hem_of(garment: Garment) -> NDArray[np.bool_]:
    """The vertices `[G]` that may move most."""
    return np.asarray(garment.loose > HEM * max(float(garment.loose.max()), 1e-9))


def swing(moved: Floats, shells: Floats, heading: Floats, rate: float) -> Floats:
    """How far each vertex is from its mean place beside the skinned shell, metres `[T', G]`, once cloth has settled.

    Args:
        moved, shells: the cloth and where skinning alone puts it, `[T, G, 3]`.  heading: `[T]`, degrees.
        rate: poses per second.
    """
    turned = np.stack([rotation("z", -h) for h in heading])
    away = np.einsum("tij,tgj->tgi", turned, moved - shells)[round(SETTLED * rate) :]
    return np.asarray(np.linalg.norm(away - away.mean(axis=0), axis=2))


def flat(rig: Rig, g: Gait, path: str, seconds: float, times: Floats, phase: float = 0.0) -> NDArray[np.bool_]:
    """The moments `[T]` at which the plan of contacts has a whole foot on the ground: none of a flight, nor of a step
    on heels and toes.
    """
    landing, foot = plan(rig, g, path, seconds, phase), foot_of(rig, g)
    shares = [foot_at(landing, foot, side, g.cadence * times + phase)[3] for side in (1, -1)]
    return np.asarray(np.any([(share >= FLAT[0]) & (share <= FLAT[1]) for share in shares], axis=0))


def contact_shadow(vertices: Floats, lamp: Light, middle: Floats) -> tuple[float, float]:
    """How dark the shadow from the sky is under a person, and how far from the soles it is darkest, on the ground
    itself and not in the pixels of a camera, which may be further apart than feet are long.

    Who stands has a dark spot at the soles; who floats has none, and nothing that could be its soles.

    Args:
        vertices: of the clothed body, `[V, 3]`.  lamp: the light.  middle: the person's place on the ground, `[2]`.

    Returns:
        The share of the sky that is hidden where that is most, and metres from the nearest vertex that is at the
        ground, infinite where none is, to the nearest place that is about as dark: a foot that swings close to the
        ground has such a place too.
    """
    row = np.arange(-AROUND, AROUND, GRID)
    ground = middle + np.stack(np.meshgrid(row, row), axis=-1).reshape(-1, 2)
    pixels, hidden = shadows(vertices, lamp, ground, middle)
    soles = vertices[vertices[:, 2] < FLYING, :2]
    if not len(pixels):
        return 0.0, float("inf")
    darkest = ground[pixels[hidden[0] >= ALIKE * hidden[0].max()]]
    away = np.linalg.norm(darkest[:, None] - soles[None], axis=2)
    return float(hidden[0].max()), float(away.min(initial=np.inf))
