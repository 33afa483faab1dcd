"""hasten: faster visual generation on diffusers pipelines, without retraining."""

from hasten.acceleration import Acceleration, Summary, accelerate
from hasten.caching import (
    DMD,
    L2P,
    ABCache,
    Calibration,
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
from hasten.errors import HastenError, HastenWarning
from hasten.recording import calibrate, fit, record
from hasten.registry import MethodInfo, methods
from hasten.resolution import DVG, RALU, Bottleneck, Fresco, SpecEdit, Spectral
from hasten.solvers import LeapScheduler, fit_leap, fit_leapcache
from hasten.steps import StepRecord
from hasten.streaming import FocusedForcing, KVStream
from hasten.tuning import tune_steps

__version__ = "0.1.0"

__all__ = [
    "DMD",
    "DVG",
    "L2P",
    "RALU",
    "ABCache",
    "Acceleration",
    "Bottleneck",
    "Calibration",
    "EasyCache",
    "FBCache",
    "FoCa",
    "FocusedForcing",
    "FreqCa",
    "Fresco",
    "HastenError",
    "HastenWarning",
    "HiCache",
    "HyCa",
    "KVStream",
    "LeapCache",
    "LeapScheduler",
    "MagCache",
    "MethodInfo",
    "Reuse",
    "SVDCache",
    "SpeCa",
    "SpecEdit",
    "Spectral",
    "Spectrum",
    "StepRecord",
    "Summary",
    "TaylorSeer",
    "TeaCache",
    "__version__",
    "accelerate",
    "calibrate",
    "fit",
    "fit_leap",
    "fit_leapcache",
    "methods",
    "record",
    "tune_steps",
]
