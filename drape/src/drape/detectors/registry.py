"""Detectors by name."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

from drape.detectors.base import Detector
from drape.detectors.centernet import CenterNet
from drape.detectors.darknet import Darknet
from drape.detectors.fetch import fetch
from drape.detectors.nanodet import NanoDet
from drape.errors import DetectorError, unknown

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
    """A detector, frozen: a pretrained one by its name, whose weights are downloaded on first use, or a user's own.

    Args:
        name: one of `detectors()`, or "module:factory", a function without arguments that gives a `Detector`; the
        module
            is looked for where Python does, the current folder among them.

    Raises:
        UnknownNameError: no detector has that name.
        DetectorError: the module or its function cannot be used, or gives something else.
    """
    if ":" in name:
        return own_detector(*name.split(":", 1))
    if name not in LOADERS:
        raise unknown("detector", name, LOADERS)
    return LOADERS[name]()


def own_detector(module: str, factory: str) -> Detector:
    """What a function of a user's module gives."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        made = getattr(importlib.import_module(module), factory)()
    except Exception as error:  # whatever a user's module raises, it is not a fault of drape
        reason = f"{type(error).__name__}: {error}"
        raise DetectorError(f"{module}:{factory} cannot be used ({reason}); expected MODULE:FUNCTION.") from error
    if not isinstance(made, Detector):
        kind = type(made).__name__
        raise DetectorError(
            f"{module}:{factory} gave a {kind}; expected a drape.detectors.Detector, or one of its adapters."
        )
    return made.freeze()
