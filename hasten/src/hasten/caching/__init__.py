"""Compute few denoising steps and forecast the features of the others: schedule x site x predictor x projector."""

from hasten.caching.components import Components, FeatureKey
from hasten.caching.gates import Gate
from hasten.caching.method import CachingMethod, ScheduledMethod
from hasten.caching.methods import (
    DMD,
    L2P,
    ABCache,
    EasyCache,
    FBCache,
    FoCa,
    FreqCa,
    HiCache,
    HyCa,
    LeapCache,
    MagCache,
    Reuse,
    SpeCa,
    Spectrum,
    SVDCache,
    TaylorSeer,
    TeaCache,
)
from hasten.caching.predictors import Predictor
from hasten.caching.projectors import Projector
from hasten.caching.schedule import Explicit, Schedule, Spread, Uniform, UniformCount, computed_steps
from hasten.calibration import Calibration, Fit, Trace

__all__ = [
    "DMD",
    "L2P",
    "ABCache",
    "CachingMethod",
    "Calibration",
    "Components",
    "EasyCache",
    "Explicit",
    "FBCache",
    "FeatureKey",
    "Fit",
    "FoCa",
    "FreqCa",
    "Gate",
    "HiCache",
    "HyCa",
    "LeapCache",
    "MagCache",
    "Predictor",
    "Projector",
    "Reuse",
    "SVDCache",
    "Schedule",
    "ScheduledMethod",
    "SpeCa",
    "Spectrum",
    "Spread",
    "TaylorSeer",
    "TeaCache",
    "Trace",
    "Uniform",
    "UniformCount",
    "computed_steps",
]
