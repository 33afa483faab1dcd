"""Detectors by name."""

from __future__ import annotations

from collections.abc import Callable

from drape.detectors.base import Detector
from drape.detectors.centernet import CenterNet
from drape.detectors.darknet import Darknet
from drape.detectors.fetch import fetch
from drape.detectors.nanodet import NanoDet
from drape.errors import unknown

__all__ = ["detectors", "load_detector"]


def yolov3_tiny() -> Detector:
    """The darknet network from its two files."""
    cfg, weights = fetch("yolov3-tiny")
    return Darknet(cfg, weights)


LOADERS: dict[str, Callable[[], Detector]] = {
    "yolov3-tiny": yolov3_tiny,
    "nanodet": lambda: NanoDet(fetch("nanodet")[0]),
    "centernet": lambda: CenterNet(fetch("centernet")[0]),
}


def detectors() -> tuple[str, ...]:
    """The names that `load_detector` knows."""
    return tuple(LOADERS)


def load_detector(name: str) -> Detector:
    """A pretrained detector, frozen; its weights are downloaded on first use."""
    if name not in LOADERS:
        raise unknown("detector", name, LOADERS)
    return LOADERS[name]()
