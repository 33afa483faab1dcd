"""Cloth: the material, and its contact with the moving body, which all engines share.

A garment's vertex stays within `loose` of the place that the skinned shell gives it, and no vertex comes nearer to the
skin than 40 % of the shell's offset. An engine's own contact would need a mesh of the whole body that deforms, which
engines of rigid shapes do not take. Self-collision and air are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from drape.errors import ConfigError, unknown
from drape.scene.body import Floats
from drape.scene.garments import Garment

__all__ = ["ENGINES", "Cloth", "edges_of", "held_to_body"]

ENGINES = ("drape", "newton")  # `drape.scene.pbd_cloth` and `drape.scene.newton_cloth`
FLOOR = 0.4  # of the offset: the nearest that cloth comes to the skin


@dataclass(frozen=True, kw_only=True)
class Cloth:
    """A material and the solver's effort.

    Args:
        stiffness: share of an edge's error that one iteration takes away, 0 to 1.
        damping: share of the velocity lost per substep, 0 to 1.
        iterations: projections per substep.
        substeps: per frame.
        engine: one of `ENGINES`.
    """

    stiffness: float = 0.8
    damping: float = 0.04
    iterations: int = 6
    substeps: int = 4
    engine: str = "drape"

    def __post_init__(self) -> None:
        if not 0 < self.stiffness <= 1 or not 0 <= self.damping <= 1:
            raise ConfigError(f"stiffness={self.stiffness}, damping={self.damping}; expected (0, 1] and [0, 1].")
        if self.iterations < 1 or self.substeps < 1:
            raise ConfigError(f"iterations={self.iterations}, substeps={self.substeps}; expected at least 1 each.")
        if self.engine not in ENGINES:
            raise unknown("cloth engine", self.engine, ENGINES)


def edges_of(faces: NDArray[np.int64]) -> NDArray[np.int64]:
    """The undirected edges of a triangle mesh, each once, int64 `[M, 2]`."""
    pairs = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    return np.unique(np.sort(pairs, axis=1), axis=0)


def held_to_body(x: Floats, shell: Floats, normals: Floats, garment: Garment) -> Floats:
    """Positions `[G, 3]` brought out of the skin, and back to where the garment may be."""
    depth = ((x - shell) * normals).sum(axis=1)
    x = x + np.maximum(-(1 - FLOOR) * garment.offset - depth, 0.0)[:, None] * normals
    away = x - shell
    reach = np.linalg.norm(away, axis=1)
    return np.asarray(shell + away * np.minimum(1.0, garment.loose / np.maximum(reach, 1e-9))[:, None])
