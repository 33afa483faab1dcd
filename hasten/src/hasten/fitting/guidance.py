"""One list of times with coefficients for several guidance scales, between which they are interpolated.

Coefficients that were fitted at each scale alone lie anywhere in the flat valley of their error, and a polynomial
through them misses it between the scales. So each fit goes on from the one in the middle, which keeps them near to each
other; then the last rows of all scales are fitted together, on the paths that the interpolated rows make at the scales
and halfway between them: the last row mends what the others miss.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hasten.fitting.leap_fitter import Fitter, Leap
from hasten.fitting.refine import refine
from hasten.solvers.multistep import NormalEquations, Row
from hasten.solvers.tables import interpolated, lagrange

__all__ = ["continued", "halfway", "joined", "path_at"]

RIDGE = 1e-9


def halfway(scales: Sequence[float]) -> list[float]:
    """The scales in the middle between neighbours."""
    return [0.5 * (a + b) for a, b in pairwise(sorted(scales))]


def continued(fitter: Fitter, leap: Leap, rounds: int, directions: int | None = None) -> Leap:
    """A solver for one scale from that for another, with the same times.

    Args:
        fitter: at the scale, while its evaluator is probing.
        leap: at the other one.
        rounds: of the refinement.
        directions: most directions of each row in it; None for all.
    """
    return refine(fitter, fitter.score(leap.timesteps, leap.rows), rounds, times=False, directions=directions)


def joined(
    fits: Sequence[list[Row]], scales: Sequence[float], paths: Sequence[tuple[float, Fitter, Leap]]
) -> list[list[Row]]:
    """The rows at all scales with last rows that are fitted together.

    Args:
        fits: rows at each scale.
        scales: of the fits.
        paths: at some scales: the scale, the fitter there, and what `interpolated` rows do there.
    """
    size = len(fits[0][-1])
    equations = NormalEquations(size * len(scales))
    for scale, fitter, leap in paths:
        weights = lagrange(scales, scale)
        norm = sum(float(fitter.references.states[call][-1].double().square().sum()) for call in fitter.calls) ** 0.5
        for columns, call in zip(leap.columns, fitter.calls, strict=True):
            wide = [weight / norm * column.double() for weight in weights for column in columns[:size]]
            equations.add(wide, fitter.references.states[call][-1].double() / norm)
    solved = equations.solve([number for rows in fits for number in rows[-1]], RIDGE)
    return [[*rows[:-1], solved[i * size : (i + 1) * size]] for i, rows in enumerate(fits)]


def path_at(
    fitter: Fitter, times: Sequence[float], fits: Sequence[list[Row]], scales: Sequence[float], scale: float
) -> Leap:
    """What interpolated rows do at a scale, while the fitter's evaluator is probing."""
    return fitter.exact(times, interpolated(fits, scales, scale))
