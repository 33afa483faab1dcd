"""Detectors by name."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

from drape.detectors.base import Detector, check_scale
from drape.detectors.centernet import CenterNet
from drape.detectors.darknet import Darknet
from drape.detectors.fetch import fetch
from drape.detectors.nanodet import NanoDet
from drape.errors import ConfigError, DetectorError, unknown

__all__ = ["detectors", "load_detector"]


def yolov3_tiny(input_size: int | None = None) -> Detector:
    """The darknet network from its two files."""
    cfg, weights = fetch("yolov3-tiny")
    return Darknet(cfg, weights, input_size=input_size)


LOADERS: dict[str, Callable[..., Detector]] = {
    "yolov3-tiny": yolov3_tiny,
    "nanodet": lambda **size: NanoDet(fetch("nanodet")[0], **size),
    "centernet": lambda **size: CenterNet(fetch("centernet")[0], **size),
}
STRIDE, SMALLEST, LARGEST = 32, 128, 1024  # pixels of an input: in steps of the coarsest map's


def detectors() -> tuple[str, ...]:
    """The names that `load_detector` knows."""
    return tuple(LOADERS)


def load_detector(name: str) -> Detector:
    """A detector, frozen: a pretrained one by its name, whose weights are downloaded on first use, or a user's own.

    Args:
        name: one of `detectors()`, also with the side of its input as in "nanodet@320" (smaller is faster and sees
            less), or "module:factory", a function without arguments that gives a `Detector`; the module is looked for
            where Python does, the current folder among them.

    Raises:
        UnknownNameError: no detector has that name.
        ConfigError: the input's side cannot be.
        DetectorError: the module or its function cannot be used, or gives something else.
    """
    if ":" in name:
        return own_detector(*name.split(":", 1))
    base, at, text = name.partition("@")
    if base not in LOADERS:
        raise unknown("detector", base, LOADERS)
    if not at:
        return LOADERS[base]()
    side = int(text) if text.isdecimal() and len(text) < 6 else 0
    if side % STRIDE or not SMALLEST <= side <= LARGEST:
        raise ConfigError(f"{name!r}; expected NAME@SIDE with a multiple of {STRIDE} from {SMALLEST} to {LARGEST}.")
    detector = LOADERS[base](input_size=side)
    detector.name = name
    return detector


def own_detector(module: str, factory: str) -> Detector:
    """What a function of a user's module gives."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        made = getattr(importlib.import_module(module), factory)()
    except (Exception, SystemExit) as error:  # whatever a user's module raises, or ends with: no fault of drape
        reason = f"{type(error).__name__}: {error}"
        raise DetectorError(f"{module}:{factory} cannot be used ({reason}); expected MODULE:FUNCTION.") from error
    if not isinstance(made, Detector):
        kind = type(made).__name__
        raise DetectorError(
            f"{module}:{factory} gave a {kind}; expected a drape.detectors.Detector, or one of its adapters."
        )
    check_scale(made)
    return made.freeze()
