"""Cloth by Newton (PyPI `newton`, Apache-2.0), an engine on top of Warp, on the CPU (the extra `cloth`).

Newton's XPBD (Macklin et al. 2016, "XPBD: Position-Based Simulation of Compliant Constrained Dynamics") moves the
garment as a mesh of particles with springs along its edges and bending constraints across them, under gravity, in many
small steps of one iteration each (Macklin et al. 2019, "Small Steps in Physics Simulation"). After each step drape's
contact with the moving body is applied to places and velocities, as in `drape.scene.cloth`.

Newton adds the corrections of all springs of a vertex without averaging them, so springs that are stiffer than
m / (6 dt^2) overshoot; this is the stiffness at `Cloth.stiffness` 1.
"""

from __future__ import annotations

import numpy as np

from drape.errors import AssetError
from drape.scene.arrays import Floats
from drape.scene.cloth import Cloth, held_to_body
from drape.scene.garments import Garment

__all__ = ["simulate_with_newton"]

DENSITY = 0.25  # kg per square metre: a light cotton
BEND = 1e-4  # N m across edges at Cloth.stiffness 1
NEIGHBOURS = 6  # springs of a vertex
STEP = 1 / 600  # seconds, about


def simulate_with_newton(
    garment: Garment, shells: Floats, normals: Floats, rest_shell: Floats, cloth: Cloth, fps: float
) -> Floats:
    """The garment's vertices over a sequence; see `drape.scene.cloth_engines.simulate`.

    `iterations`, `bending` and `slack` are not used.

    Raises:
        AssetError: Newton is not installed.
    """
    try:
        import newton
        import warp
    except ImportError as error:
        raise AssetError("the cloth engine newton is not installed: pip install newton") from error
    warp.config.log_level = warp.LOG_ERROR
    substeps = int(np.ceil(1 / (fps * STEP)))
    dt = 1.0 / (fps * substeps)
    corners = rest_shell[garment.faces]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1).sum() / 2
    mass = DENSITY * float(area) / len(rest_shell)
    builder = newton.ModelBuilder()
    builder.add_cloth_mesh(
        pos=warp.vec3(0.0, 0.0, 0.0),
        rot=warp.quat_identity(),
        scale=1.0,
        vel=warp.vec3(0.0, 0.0, 0.0),
        vertices=[warp.vec3(*point) for point in rest_shell.tolist()],
        indices=garment.faces.ravel().tolist(),
        density=DENSITY,
        edge_ke=BEND * cloth.stiffness,
        add_springs=True,
        spring_ke=cloth.stiffness * mass / (NEIGHBOURS * dt**2),
        spring_kd=0.0,
        particle_radius=0.0,  # no contact among particles
    )
    model = builder.finalize(device="cpu")
    solver = newton.solvers.SolverXPBD(model, iterations=1)
    before, after = model.state(), model.state()
    x, velocity = shells[0].copy(), np.zeros_like(rest_shell)
    result = np.empty_like(shells)
    for t in range(len(shells)):
        for s in range(substeps):
            mix = (s + 1) / substeps
            shell = (1 - mix) * shells[max(t - 1, 0)] + mix * shells[t]
            before.particle_q.assign(x.astype(np.float32))
            before.particle_qd.assign(velocity.astype(np.float32))
            solver.step(before, after, None, None, dt)
            moved = held_to_body(after.particle_q.numpy().astype(np.float64), shell, normals[t], garment)
            velocity = max(1 - cloth.drag * dt, 0.0) * (moved - x) / dt
            x = moved
        result[t] = x
    return result
