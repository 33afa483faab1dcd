"""Cloth by drape's own solver: position-based dynamics of a garment that is tied to the moving body.

Mueller et al. 2007, "Position Based Dynamics", J. Vis. Commun. Image Represent. 18: edges keep their rest length,
corners across an edge theirs more softly (bending), in small steps (Macklin et al. 2019, "Small Steps in Physics
Simulation"); `drape.scene.cloth.held_to_body` is the contact. It moves in the world, so the body's speed, its steps
and turns swing it. Projection is of Jacobi's kind with averaging, so it vectorises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from drape.scene.arrays import Floats, lengths
from drape.scene.cloth import Cloth, edges_of, folds_of, held_to_body, touching
from drape.scene.garments import Garment

__all__ = ["simulate_with_pbd"]

GRAVITY = 9.81
FRICTION = 0.25  # share of the sliding over the skin that is lost per substep
RELAXATION = 1.5  # of the averaged moves, whose mean takes an error away slowly


@dataclass(frozen=True)
class Links:
    """Pairs of vertices, `first` and `second` `[M]`, that keep a distance `[M]`, and the matrix `[G, M]` that shares
    out their moves, weighted by their stiffness.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    rest: Floats
    share: csr_array

    @classmethod
    def between(cls, kinds: Sequence[tuple[NDArray[np.int64], float]], shell: Floats, slack: float) -> Links:
        """Links as long as on the shell, and a little longer.

        Args:
            kinds: pairs `[N, 2]` of each kind, whose moves are averaged by themselves, and their stiffness.
        """
        signs = []
        for pairs, stiffness in kinds:
            count = np.maximum(np.bincount(pairs.ravel(), minlength=len(shell)), 1)
            signs.append(RELAXATION * stiffness * np.stack([1 / count[pairs[:, 0]], -1 / count[pairs[:, 1]]]))
        joined = np.concatenate([pairs for pairs, _ in kinds])
        first, second = np.ascontiguousarray(joined.T)
        rest = np.linalg.norm(shell[second] - shell[first], axis=1) * (1 + slack)
        each = np.arange(len(joined))
        places = (np.concatenate([first, second]), np.concatenate([each, each]))
        return cls(first, second, rest, csr_array((np.hstack(signs).ravel(), places), shape=(len(shell), len(joined))))

    def moves(self, x: Floats) -> Floats:
        """How the vertices move to come nearer to the rest lengths, `[G, 3]`."""
        across = np.take(x, self.second, axis=0) - np.take(x, self.first, axis=0)
        across *= (1 - self.rest / np.maximum(lengths(across), 1e-9))[:, None]
        return np.asarray(self.share @ across)


def simulate_with_pbd(
    garment: Garment, shells: Floats, normals: Floats, rest_shell: Floats, cloth: Cloth, fps: float
) -> Floats:
    """The garment's vertices over a sequence; see `drape.scene.cloth_engines.simulate`."""
    kinds = [(edges_of(garment.faces), cloth.stiffness), (folds_of(garment.faces), cloth.bending)]
    links = Links.between(kinds, rest_shell, cloth.slack)
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
                guess = held_to_body(guess + links.moves(guess), shell, normals[t], garment)
            carried = x + (shell - last)  # where a vertex that lies on the skin would be taken
            guess = guess + FRICTION * touching(guess, shell, normals[t], garment)[:, None] * (carried - guess)
            velocity, last = (guess - x) / dt, shell
            x = guess
        result[t] = x
    return result
