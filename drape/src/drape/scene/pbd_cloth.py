"""Cloth by drape's own solver: position-based dynamics of a garment shell that is tied to the moving body.

Mueller et al. 2007, "Position Based Dynamics", J. Vis. Commun. Image Represent. 18: edges keep their rest length, and
`drape.scene.cloth.held_to_body` is the contact. Projection is of Jacobi's kind with averaging, so it vectorises.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from drape.scene.body import Floats
from drape.scene.cloth import Cloth, edges_of, held_to_body
from drape.scene.garments import Garment

__all__ = ["simulate_with_pbd"]

GRAVITY = 9.81


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


def simulate_with_pbd(
    garment: Garment, shells: Floats, normals: Floats, rest_shell: Floats, cloth: Cloth, fps: float
) -> Floats:
    """The garment's vertices over a sequence; see `drape.scene.cloth_engines.simulate`."""
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
