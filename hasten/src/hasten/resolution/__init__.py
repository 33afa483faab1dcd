"""Less to compute per step: begin coarse in space and time, refine where it pays."""

from hasten.resolution.engine import ResolutionEngine, ResolutionMethod
from hasten.resolution.methods import DVG, RALU, Bottleneck, Fresco, SpecEdit, Spectral
from hasten.resolution.methods.ralu import Stages, fit_stages
from hasten.resolution.methods.specedit import EditRecord
from hasten.resolution.plan import Plan
from hasten.resolution.planned import PlannedEngine, PlannedMethod, PlannedRecord
from hasten.resolution.regions import Layout, RegionEngine, RegionMethod, RegionRecord
from hasten.resolution.report import ResolutionReport, StageReport
from hasten.resolution.select import EditMap

__all__ = [
    "DVG",
    "RALU",
    "Bottleneck",
    "EditMap",
    "EditRecord",
    "Fresco",
    "Layout",
    "Plan",
    "PlannedEngine",
    "PlannedMethod",
    "PlannedRecord",
    "RegionEngine",
    "RegionMethod",
    "RegionRecord",
    "ResolutionEngine",
    "ResolutionMethod",
    "ResolutionReport",
    "SpecEdit",
    "Spectral",
    "StageReport",
    "Stages",
    "fit_stages",
]
