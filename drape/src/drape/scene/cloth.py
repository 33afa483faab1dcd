"""Cloth: position-based dynamics of a garment shell that is tied to the moving body.

Position-based dynamics (Mueller et al. 2007, "Position Based Dynamics", J. Vis. Commun. Image Represent. 18), with
three constraints: edges keep their rest length, a vertex stays within `loose` of the place that the skinned shell gives
it, and no vertex comes nearer to the skin than 40 % of the shell's offset. Self-collision and air are left out.
Projection is of Jacobi's kind with averaging, so it vectorises.

The dynamics come from the solver here, or from Newton's XPBD (`Cloth.engine`, see `drape.scene.newton_cloth`). Contact
with the body is the same for both, the last two constraints: an engine's own would need a mesh of the whole body that
deforms, which engines of rigid shapes do not take.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from drape.errors import ConfigError, unknown
from drape.scene.body import Floats
from drape.scene.garments import Garment

__all__ = ["ENGINES", "Cloth", "edges_of", "held_to_body", "simulate"]

ENGINES = ("drape", "newton")
GRAVITY = 9.81
FLOOR = 0.4  # of the offset: the nearest that cloth comes to the skin


@dataclass(frozen=True, kw_only=True)
class Cloth:
    """A material and the solver's effort.

    Args:
        stiffness: share of an edge's error that one iteration takes away, 0 to 1.
        damping: share of the velocity lost in a substep, 0 to 1.
        iterations: projections a substep.
        substeps: a frame.
        engine: one of `ENGINES`, "drape" for the solver of this module or "newton".
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


def project(
    x: Floats,
    shell: Floats,
    normals: Floats,
    garment: Garment,
    edges: NDArray[np.int64],
    rest: Floats,
    degree: Floats,
    stiffness: float,
) -> Floats:
    """One pass over all constraints; returns new positions `[G, 3]`."""
    between = x[edges[:, 1]] - x[edges[:, 0]]
    length = np.linalg.norm(between, axis=1, keepdims=True)
    push = stiffness * 0.5 * (1 - rest / np.maximum(length, 1e-9)) * between
    move = np.zeros_like(x)
    np.add.at(move, edges[:, 0], push)
    np.add.at(move, edges[:, 1], -push)
    return held_to_body(x + move / degree * 2, shell, normals, garment)


def held_to_body(x: Floats, shell: Floats, normals: Floats, garment: Garment) -> Floats:
    """Positions `[G, 3]` brought out of the skin, and back to where the garment may be."""
    depth = ((x - shell) * normals).sum(axis=1)
    x = x + np.maximum(-(1 - FLOOR) * garment.offset - depth, 0.0)[:, None] * normals
    away = x - shell
    reach = np.linalg.norm(away, axis=1)
    return np.asarray(shell + away * np.minimum(1.0, garment.loose / np.maximum(reach, 1e-9))[:, None])


def simulate(garment: Garment, shells: Floats, normals: Floats, rest_shell: Floats, cloth: Cloth, fps: float) -> Floats:
    """The garment's vertices over a sequence, float64 `[T, G, 3]`.

    Args:
        shells: where skinning puts the vertices, `[T, G, 3]`, metres, in a frame that moves with the walk.
        normals: the skin's unit normals there, `[T, G, 3]`.
        rest_shell: `[G, 3]`, gives the rest lengths.
    """
    if shells.shape != normals.shape or shells.shape[1:] != rest_shell.shape:
        raise ConfigError(f"shells {shells.shape}, normals {normals.shape} and rest {rest_shell.shape} do not match.")
    if cloth.engine == "newton":
        from drape.scene.newton_cloth import simulate_with_newton  # an optional extra

        return simulate_with_newton(garment, shells, normals, rest_shell, cloth, fps)
    edges = edges_of(garment.faces)
    rest = np.linalg.norm(rest_shell[edges[:, 1]] - rest_shell[edges[:, 0]], axis=1, keepdims=True)
    degree = np.maximum(np.bincount(edges.ravel(), minlength=len(rest_shell)), 1)[:, None].astype(np.float64)
    dt = 1.0 / (fps * cloth.substeps)
    x, velocity = shells[0].copy(), np.zeros_like(rest_shell)
    result = np.empty_like(shells)
    for t in range(len(shells)):
        before = max(t - 1, 0)
        for s in range(cloth.substeps):
            mix = (s + 1) / cloth.substeps
            shell = (1 - mix) * shells[before] + mix * shells[t]
            velocity[:, 2] -= GRAVITY * dt
            guess = x + dt * (1 - cloth.damping) * velocity
            for _ in range(cloth.iterations):
                guess = project(guess, shell, normals[t], garment, edges, rest, degree, cloth.stiffness)
            velocity = (guess - x) / dt
            x = guess
        result[t] = x
    return result
