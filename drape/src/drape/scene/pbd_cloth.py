"""Cloth by drape's own solver: position-based dynamics of a garment that is tied to the moving body.

Mueller et al. 2007, "Position Based Dynamics", J. Vis. Commun. Image Represent. 18: edges keep their rest length,
corners across an edge theirs more softly (bending), in small steps (Macklin et al. 2019, "Small Steps in Physics
Simulation"); `drape.scene.cloth.held_to_body` is the contact. It moves in the world, so the body's speed, its steps
and turns swing it. Projection is of Jacobi's kind with averaging, so it vectorises.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from drape.scene.arrays import Floats
from drape.scene.cloth import Cloth, edges_of, folds_of, held_to_body, touching
from drape.scene.garments import Garment

__all__ = ["simulate_with_pbd"]

GRAVITY = 9.81
FRICTION = 0.25  # share of the sliding over the skin that is lost per substep
RELAXATION = 1.5  # of the averaged moves, whose mean takes an error away slowly


@dataclass(frozen=True)
class Links:
    """Pairs of vertices `[M, 2]` that keep a distance `[M, 1]`, and the matrix `[G, M]` that shares out their moves."""

    pairs: NDArray[np.int64]
    rest: Floats
    share: csr_array

    @classmethod
    def between(cls, pairs: NDArray[np.int64], shell: Floats, slack: float) -> Links:
        """Links as long as on the shell, and a little longer."""
        rest = np.linalg.norm(shell[pairs[:, 1]] - shell[pairs[:, 0]], axis=1, keepdims=True) * (1 + slack)
        count = np.maximum(np.bincount(pairs.ravel(), minlength=len(shell)), 1)
        each = np.arange(len(pairs))
        rows, columns = np.concatenate([pairs[:, 0], pairs[:, 1]]), np.concatenate([each, each])
        signs = RELAXATION * np.repeat([1.0, -1.0], len(pairs)) / count[rows]
        return cls(pairs, rest, csr_array((signs, (rows, columns)), shape=(len(shell), len(pairs))))

    def moves(self, x: Floats, stiffness: float) -> Floats:
        """How the vertices move to come nearer to the rest lengths, `[G, 3]`."""
        across = x[self.pairs[:, 1]] - x[self.pairs[:, 0]]
        length = np.linalg.norm(across, axis=1, keepdims=True)
        return np.asarray(self.share @ (stiffness * (1 - self.rest / np.maximum(length, 1e-9)) * across))


def simulate_with_pbd(
    garment: Garment, shells: Floats, normals: Floats, rest_shell: Floats, cloth: Cloth, fps: float
) -> Floats:
    """The garment's vertices over a sequence; see `drape.scene.cloth_engines.simulate`."""
    edges = Links.between(edges_of(garment.faces), rest_shell, cloth.slack)
    folds = Links.between(folds_of(garment.faces), rest_shell, cloth.slack)
    dt = 1.0 / (fps * cloth.substeps)
    x, result = shells[0].copy(), np.empty_like(shells)
    last = shells[0]
    velocity = (shells[min(1, len(shells) - 1)] - shells[0]) * fps
    for t in range(len(shells)):
        before = max(t - 1, 0)
        for s in range(cloth.substeps):
            mix = (s + 1) / cloth.substeps
            shell = (1 - mix) * shells[before] + mix * shells[t]
            velocity[:, 2] -= GRAVITY * dt
            guess = x + dt * max(1 - cloth.drag * dt, 0.0) * velocity
            for _ in range(cloth.iterations):
                guess = guess + edges.moves(guess, cloth.stiffness) + folds.moves(guess, cloth.bending)
                guess = held_to_body(guess, shell, normals[t], garment)
            carried = x + (shell - last)  # where a vertex that lies on the skin would be taken
            guess = guess + FRICTION * touching(guess, shell, normals[t], garment)[:, None] * (carried - guess)
            velocity, last = (guess - x) / dt, shell
            x = guess
        result[t] = x
    return result
