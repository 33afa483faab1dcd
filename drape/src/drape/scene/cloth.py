"""Cloth: the material, and its contact with the moving body, which all engines share.

A garment's vertex stays within `loose` of the place that the skinned shell gives it, and no vertex comes nearer to the
skin than `least`. An engine's own contact would need a mesh of the whole body that deforms, which
engines of rigid shapes do not take. Self-collision is left out, and the air stands still.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from drape.errors import ConfigError, unknown
from drape.scene.arrays import Floats, dots, lengths
from drape.scene.garments import Garment

__all__ = ["CLOTHS", "ENGINES", "Cloth", "edges_of", "folds_of", "held_to_body", "touching"]

ENGINES = ("drape", "newton", "skinned")  # `pbd_cloth`, `newton_cloth`, and cloth that only follows the body


@dataclass(frozen=True, kw_only=True)
class Cloth:
    """A material and the solver's effort.

    Args:
        stiffness: share of an edge's error that one projection takes away, 0 to 1.
        bending: the same for the distance of the two corners across an edge, 0 to 1.
        slack: share that the cloth is longer than the shell that it is cut by; it makes folds.
        drag: share of its velocity that it loses to the air per second.
        iterations: projections per substep.
        substeps: per pose of the body.
        engine: one of `ENGINES`.
    """

    stiffness: float = 0.7
    bending: float = 0.12
    slack: float = 0.03
    drag: float = 0.8
    iterations: int = 2
    substeps: int = 12
    engine: str = "drape"

    def __post_init__(self) -> None:
        if not 0 < self.stiffness <= 1 or not 0 <= self.bending <= 1:
            raise ConfigError(f"stiffness={self.stiffness}, bending={self.bending}; expected (0, 1] and [0, 1].")
        if not 0 <= self.slack <= 0.3 or not 0 <= self.drag <= 20:
            raise ConfigError(f"slack={self.slack}, drag={self.drag}; expected 0 to 0.3, and 0 to 20.")
        if self.iterations < 1 or self.substeps < 1:
            raise ConfigError(f"iterations={self.iterations}, substeps={self.substeps}; expected at least 1 each.")
        if self.engine not in ENGINES:
            raise unknown("cloth engine", self.engine, ENGINES)


CLOTHS = {
    "cotton": Cloth(),
    "heavy": Cloth(bending=0.35, slack=0.015, drag=0.5),
    "light": Cloth(bending=0.05, slack=0.05, drag=1.6),
    "stretchy": Cloth(stiffness=0.35, bending=0.05, slack=0.0),
}


def edges_of(faces: NDArray[np.int64]) -> NDArray[np.int64]:
    """The undirected edges of a triangle mesh, each once, int64 `[M, 2]`."""
    pairs = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    return np.unique(np.sort(pairs, axis=1), axis=0)


def folds_of(faces: NDArray[np.int64]) -> NDArray[np.int64]:
    """The two corners across each edge that two triangles share, int64 `[N, 2]`."""
    sides = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    across = np.concatenate([faces[:, 2], faces[:, 0], faces[:, 1]])
    order = np.lexsort(np.sort(sides, axis=1).T)
    sides, across = np.sort(sides, axis=1)[order], across[order]
    shared = np.flatnonzero((sides[1:] == sides[:-1]).all(axis=1))
    return np.stack([across[shared], across[shared + 1]], axis=1)


def touching(x: Floats, shell: Floats, normals: Floats, garment: Garment) -> NDArray[np.bool_]:
    """Which vertices `[G]` lie on the skin."""
    return np.asarray(dots(x - shell, normals) < garment.least - garment.offset + 1e-3)


def held_to_body(x: Floats, shell: Floats, normals: Floats, garment: Garment) -> Floats:
    """Positions `[G, 3]` brought out of the skin, and back to where the garment may be."""
    depth = dots(x - shell, normals)
    x = x + np.maximum(garment.least - garment.offset - depth, 0.0)[:, None] * normals
    away = x - shell
    return np.asarray(shell + away * np.minimum(1.0, garment.loose / np.maximum(lengths(away), 1e-9))[:, None])
