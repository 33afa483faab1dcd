"""Less to compute at a step: begin coarse in space and time, refine where it pays."""

from hasten.resolution.ladders import Stages, fit_stages
from hasten.resolution.method import ResolutionEngine, ResolutionMethod
from hasten.resolution.methods import DVG, RALU, Bottleneck, Fresco, SpecEdit, Spectral
from hasten.resolution.methods.specedit import EditRecord
from hasten.resolution.plan import Plan, StagedMethod
from hasten.resolution.regions import Layout, RegionEngine, RegionMethod, RegionRecord
from hasten.resolution.select import EditMap
from hasten.resolution.stages import StageRecord, StagesEngine

__all__ = [
    "DVG",
    "RALU",
    "Bottleneck",
    "EditMap",
    "EditRecord",
    "Fresco",
    "Layout",
    "Plan",
    "RegionEngine",
    "RegionMethod",
    "RegionRecord",
    "ResolutionEngine",
    "ResolutionMethod",
    "SpecEdit",
    "Spectral",
    "StageRecord",
    "StagedMethod",
    "Stages",
    "StagesEngine",
    "fit_stages",
]
