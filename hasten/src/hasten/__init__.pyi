from .acceleration import accelerate, methods, remove, summary
from .caching.methods import (
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
from .calibration import Calibration
from .errors import HastenError, HastenWarning
from .fitting.calibrate import calibrate, fit, record
from .fitting.closed_loop import tune_method
from .fitting.leap import fit_leap
from .fitting.leapcache import fit_leapcache
from .fitting.schedules import tune_steps
from .pipeline.handle import Acceleration
from .pipeline.records import StepRecord
from .pipeline.summary import Summary
from .quality.configuration import Configuration, load
from .registry import MethodInfo
from .resolution.methods import DVG, RALU, Bottleneck, Fresco, SpecEdit, Spectral
from .solvers.hub import from_hub
from .solvers.method import Leap
from .solvers.scheduler import LeapScheduler
from .streaming.methods import FocusedForcing
from .streaming.policy import KVStream

__version__: str

__all__ = [
    "DMD",
    "DVG",
    "L2P",
    "RALU",
    "ABCache",
    "Acceleration",
    "Bottleneck",
    "Calibration",
    "Configuration",
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
    "Leap",
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
    "accelerate",
    "calibrate",
    "fit",
    "fit_leap",
    "fit_leapcache",
    "from_hub",
    "load",
    "methods",
    "record",
    "remove",
    "summary",
    "tune_method",
    "tune_steps",
]
