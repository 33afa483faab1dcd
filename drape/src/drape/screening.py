"""Which walks can tell textures apart: those that the controls, textures nobody optimised, do not decide already.

A walk in which nobody is seen in plain clothes, in which every other control hides the person, or in which none takes
anything, gives the same verdict for every texture. Such walks are left out before any attack has been seen, by this
rule, so that no attack has a part in the choice.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from drape.detectors.base import Detector
from drape.errors import ConfigError
from drape.evaluate import detect_walk
from drape.metrics import confidences, frame_success
from drape.scene.scene import Scene

__all__ = ["SEEN", "SPARED", "TAKEN", "decided", "screen"]

SEEN = 0.6  # recall in plain clothes at least
SPARED = 0.5  # recall that one of the other controls leaves at least
TAKEN = 0.05  # of the recall in plain clothes that one of them takes at least, in shares of the frames
PLAIN = "plain"


def decided(recalls: Mapping[str, float]) -> str:
    """Why the controls alone decide a walk; empty if they do not.

    Args:
        recalls: of the controls on the walk, as `screen` gives them.
    """
    others = [value for name, value in recalls.items() if name != PLAIN]
    if PLAIN not in recalls:
        raise ConfigError(f'recalls of {sorted(recalls)}; expected "{PLAIN}" among them.')
    if recalls[PLAIN] < SEEN:
        return "not seen in plain clothes"
    if not others:
        raise ConfigError(f'recalls of "{PLAIN}" alone; expected at least one other control.')
    if max(others) < SPARED:
        return "hidden by every other control"
    return "touched by no control" if min(others) > recalls[PLAIN] - TAKEN else ""


def screen(detector: Detector, scene: Scene, clothes: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """The recall of each of the clothes on a walk, at the detector's threshold.

    "plain" comes first, the others in their order, and no more are looked at than `decided` needs.
    """
    if PLAIN not in clothes or len(clothes) < 2:
        raise ConfigError(f'clothes {sorted(clothes)}; expected "{PLAIN}" and at least one other control.')
    found: dict[str, float] = {}
    for name in sorted(clothes, key=lambda n: n != PLAIN):
        hits = confidences(detect_walk(detector, scene, clothes[name]), scene.buffers.boxes)
        found[name] = 1 - frame_success(hits)
        if found[PLAIN] < SEEN or (len(found) > 1 and not decided(found)):
            break
    return found
