"""Compute few denoising steps and forecast the features of the others: schedule x site x predictor x projector."""

from hasten.caching.method import CachingMethod
from hasten.caching.methods import FoCa, HiCache, Reuse, TaylorSeer
from hasten.caching.predictors import Predictor
from hasten.caching.projectors import Projector
from hasten.caching.schedule import Explicit, Schedule, Uniform, full_steps

__all__ = [
    "CachingMethod",
    "Explicit",
    "FoCa",
    "HiCache",
    "Predictor",
    "Projector",
    "Reuse",
    "Schedule",
    "TaylorSeer",
    "Uniform",
    "full_steps",
]
