"""Person detectors as differentiable torch modules: real pretrained ones from packages, and those a user has."""

from drape.detectors.base import Candidates, Detection, Detector, non_maximum_suppression
from drape.detectors.registry import detectors, load_detector

__all__ = ["Candidates", "Detection", "Detector", "detectors", "load_detector", "non_maximum_suppression"]
