"""LEAP: evaluation times and coefficients learned in closed form, on the states that the fast sampler itself visits."""

from hasten.solvers.leap import fit_leap
from hasten.solvers.leapcache import fit_leapcache
from hasten.solvers.scheduler import LeapScheduler

__all__ = ["LeapScheduler", "fit_leap", "fit_leapcache"]
