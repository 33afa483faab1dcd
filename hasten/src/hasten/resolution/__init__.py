"""Less to compute at a step: begin coarse in space and time, refine where it pays."""

from hasten.resolution.ladders import Stages, fit_stages
from hasten.resolution.method import ResolutionEngine, ResolutionMethod
from hasten.resolution.methods import DVG, RALU, Bottleneck, Fresco, Spectral
from hasten.resolution.plan import Plan, StagedMethod
from hasten.resolution.regions import Layout, RegionEngine, RegionMethod, RegionRecord
from hasten.resolution.stages import StageRecord, StagesEngine

__all__ = [
    "DVG",
    "RALU",
    "Bottleneck",
    "Fresco",
    "Layout",
    "Plan",
    "RegionEngine",
    "RegionMethod",
    "RegionRecord",
    "ResolutionEngine",
    "ResolutionMethod",
    "Spectral",
    "StageRecord",
    "StagedMethod",
    "Stages",
    "StagesEngine",
    "fit_stages",
]
