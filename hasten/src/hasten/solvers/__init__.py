"""LEAP in use: a multistep solver with fitted evaluation times and coefficients, as a scheduler of diffusers."""

from hasten.solvers.scheduler import LeapScheduler

__all__ = ["LeapScheduler"]
