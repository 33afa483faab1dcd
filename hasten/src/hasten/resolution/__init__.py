"""Less to compute at a step: begin coarse in space and time, refine where it pays."""

from hasten.resolution.methods import DVG
from hasten.resolution.plan import Plan, StagedMethod
from hasten.resolution.stages import StageRecord, StagesEngine

__all__ = ["DVG", "Plan", "StageRecord", "StagedMethod", "StagesEngine"]
