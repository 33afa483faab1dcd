"""The engines that move cloth, by name."""

from __future__ import annotations

from drape.errors import ConfigError
from drape.scene.arrays import Floats
from drape.scene.cloth import Cloth
from drape.scene.garments import Garment
from drape.scene.newton_cloth import simulate_with_newton
from drape.scene.pbd_cloth import simulate_with_pbd

__all__ = ["simulate"]


def follow_body(
    garment: Garment, shells: Floats, normals: Floats, rest_shell: Floats, cloth: Cloth, fps: float
) -> Floats:
    """No dynamics: the garment is where skinning puts it."""
    return shells


SOLVERS = {"drape": simulate_with_pbd, "newton": simulate_with_newton, "skinned": follow_body}


def simulate(garment: Garment, shells: Floats, normals: Floats, rest_shell: Floats, cloth: Cloth, fps: float) -> Floats:
    """The garment's vertices over a sequence, float64 `[T, G, 3]`, from a body that is posed often (25 times a second).

    Args:
        shells: where skinning puts the vertices, `[T, G, 3]`, metres, in the world.
        normals: the skin's unit normals there, `[T, G, 3]`.
        rest_shell: `[G, 3]`, gives the rest lengths.

    Raises:
        ConfigError: the shapes do not match.
        AssetError: the engine is not installed.
    """
    if shells.shape != normals.shape or shells.shape[1:] != rest_shell.shape:
        raise ConfigError(f"shells {shells.shape}, normals {normals.shape} and rest {rest_shell.shape} do not match.")
    return SOLVERS[cloth.engine](garment, shells, normals, rest_shell, cloth, fps)
