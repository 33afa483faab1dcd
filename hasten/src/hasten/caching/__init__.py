"""Compute few denoising steps and forecast the features of the others: schedule x site x predictor x projector.

The methods themselves are in `hasten.caching.methods`, one file each.
"""

from hasten.caching.components import Components, FeatureKey
from hasten.caching.gates import Gate
from hasten.caching.method import CachingMethod, ScheduledMethod
from hasten.caching.predictors import Predictor
from hasten.caching.projectors import Projector
from hasten.caching.schedule import Explicit, Schedule, Spread, Uniform, UniformCount, computed_steps
from hasten.calibration import Calibration, Fit, Trace

__all__ = [
    "CachingMethod",
    "Calibration",
    "Components",
    "Explicit",
    "FeatureKey",
    "Fit",
    "Gate",
    "Predictor",
    "Projector",
    "Schedule",
    "ScheduledMethod",
    "Spread",
    "Trace",
    "Uniform",
    "UniformCount",
    "computed_steps",
]
