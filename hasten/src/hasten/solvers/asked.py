"""Noise levels that a call asks for, at which LEAP does not sample: its coefficients hold at its own times alone."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from hasten.errors import HastenWarning, ScheduleError
from hasten.pipeline.caller import Caller

__all__ = ["asked_by_user", "check_asked", "warn_of_scale"]

EVEN = 0.02  # relative difference of the distances between levels that count as evenly spread
LATER = 0.95  # of the first level: a run that begins below is one of an image with less noise
REMEDY = "leave them out, or put the plain scheduler back (hasten.remove(pipe)) to sample at your own"


def asked_by_user(sigmas: Any, timesteps: Any) -> dict[str, npt.NDArray[np.float64]]:
    """Of the levels that a scheduler is given, by name, those that the user chose.

    Most pipelines of flows propose levels that are spread evenly, to be shifted by their scheduler. Where the call does
    not show (a loop of the user's own), other levels are taken for the user's.
    """
    given = Caller().given
    found = {name: levels for name, levels in (("sigmas", sigmas), ("timesteps", timesteps)) if levels is not None}
    asked = {name: np.asarray(levels, np.float64) for name, levels in found.items()}
    if given is not None:
        return {name: levels for name, levels in asked.items() if given.get(name) is not None}
    return {name: levels for name, levels in asked.items() if name == "timesteps" or not _evenly_spread(levels)}


def _evenly_spread(levels: npt.NDArray[np.float64]) -> bool:
    distances = -np.diff(levels)
    return len(distances) < 2 or bool(np.ptp(distances) <= EVEN * abs(distances.mean()))


def check_asked(asked: dict[str, npt.NDArray[np.float64]], own: dict[str, Tensor]) -> None:
    """Warn if a user's levels are not those of the scheduler, by name.

    Raises:
        ScheduleError: if they begin at less noise: such a run would be wrong from its first step on.
    """
    for name, levels in asked.items():
        mine = own[name][: len(levels)].double().cpu().numpy()
        if len(levels) and levels[0] < LATER * mine[0]:
            raise ScheduleError(
                f"{name} of this call begin at {levels[0]:.4g}, and LEAP's coefficients hold from {mine[0]:.4g} on; "
                f"{REMEDY}, or give an image-to-image pipeline its strength"
            )
        if not np.allclose(levels, mine, rtol=1e-3):
            warnings.warn(
                f"LEAP samples at the times that it learned, and not at the {name} of this call; {REMEDY}",
                HastenWarning,
                stacklevel=3,
            )


def warn_of_scale(noise_scale: float) -> None:
    """Warn if a call ends early and hands over its latents, which have another scale than the plain scheduler's.

    Args:
        noise_scale: of the plain scheduler; 1 where its states are variance-preserving, as LEAP's are.
    """
    if abs(noise_scale - 1) > 1e-6 and Caller().arguments.get("denoising_end") is not None:
        warnings.warn(
            "this call ends early (denoising_end), and its latents have the scale of LEAP's states, not of the plain "
            "scheduler's: give LEAP to the pipeline that goes on from them as well, or to neither "
            "(hasten.remove(pipe))",
            HastenWarning,
            stacklevel=3,
        )
