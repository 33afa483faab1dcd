"""hasten: faster visual generation on diffusers pipelines, without retraining."""

from hasten.acceleration import Acceleration, Summary, accelerate
from hasten.caching import FoCa, HiCache, Reuse, TaylorSeer
from hasten.errors import HastenError, HastenWarning
from hasten.registry import MethodInfo, methods
from hasten.steps import StepRecord

__version__ = "0.1.0"

__all__ = [
    "Acceleration",
    "FoCa",
    "HastenError",
    "HastenWarning",
    "HiCache",
    "MethodInfo",
    "Reuse",
    "StepRecord",
    "Summary",
    "TaylorSeer",
    "__version__",
    "accelerate",
    "methods",
]
