"""Walks again under every light of their kind of place: area under each, and what an attack takes there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from drape.compare import HIGHER_IS_STRONGER
from drape.detectors.base import Detector
from drape.progress import note
from drape.scene.light import light_name
from drape.statistics import interval, paired
from drape.store import KeptJudge
from drape.walks import INDOORS, Walk, under_lights

__all__ = ["light_table", "lit_walks"]

METRIC = "area"


def lit_walks(walks: Sequence[Walk], each: int) -> list[int]:
    """The places of the first so many walks outdoors and of the first so many indoors."""
    inside = [number for number, walk in enumerate(walks) if walk.place in INDOORS]
    outside = [number for number in range(len(walks)) if number not in inside]
    return sorted([*outside[:each], *inside[:each]])


def light_table(
    detector: Detector,
    clothes: Mapping[str, Mapping[str, Tensor]],
    walks: Mapping[int, Walk],
    rendered: tuple[float, int, str],
    work: Path,
    jobs: int = 1,
) -> dict[str, Any]:
    """What textures come to under each light, with intervals over walks; what was seen is kept in `work`.

    Args:
        clothes: textures by name; the first is what the others are compared with.
        walks: by the number that their folder in `work` has.
        rendered: frames per second, side of a frame in pixels, engine of the cloth.

    Returns:
        metric.  walks: how many each light has.  rows: for each texture the interval under each light.
        taken: for each texture but the first, how much less there is of the metric than for the first, paired by walk.
    """
    found: dict[str, dict[str, list[float]]] = {name: {} for name in clothes}
    for number, walk in walks.items():
        note(f"lights: {walk.label()}")
        lit = under_lights(walk, *rendered)
        judge = KeptJudge(lit, work, jobs, f"lights {number}")
        for name, images in clothes.items():
            values = judge.result(detector, name, images)["by_walk"][METRIC]
            for scene, value in zip(lit, values, strict=True):
                found[name].setdefault(light_name(scene.light), []).append(value)
    plain, *others = found
    sign = HIGHER_IS_STRONGER[METRIC]
    return {
        "metric": METRIC,
        "walks": {lamp: len(values) for lamp, values in found[plain].items()},
        "rows": {name: {lamp: interval([v]).plain() for lamp, v in row.items()} for name, row in found.items()},
        "taken": {
            name: {
                lamp: paired([[sign * v for v in values]], [[sign * v for v in found[plain][lamp]]]).plain()
                for lamp, values in found[name].items()
            }
            for name in others
        },
    }
