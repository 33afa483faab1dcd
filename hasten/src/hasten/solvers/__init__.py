"""LEAP in use: a multistep solver with fitted evaluation times and coefficients, as a scheduler of diffusers."""

from hasten.solvers.hub import from_hub
from hasten.solvers.method import Leap
from hasten.solvers.scheduler import LeapScheduler

__all__ = ["Leap", "LeapScheduler", "from_hub"]
