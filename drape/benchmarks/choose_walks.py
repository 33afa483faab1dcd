"""Which of the candidate walks are taken: those that the controls do not decide already (`drape.screening`).

python drape/benchmarks/choose_walks.py [FPS] [SIZE]

Writes `drape/data/walks.json`, which `drape.walks` reads, after every walk, and goes on there when it is started again.
Candidates are looked at in order until there are enough, and by each control until the rule is decided.
Three frames per second are looked at, and cloth that only follows the body is enough for that.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from drape.controls import control
from drape.detectors import load_detector
from drape.gamut import Gamut
from drape.io import write_text
from drape.screening import decided, screen
from drape.walks import CANDIDATES, SCREENED, TEST_WALKS, TRAIN_CANDIDATES, TRAIN_WALKS, Walk, scenes

DETECTOR, ENGINE = "nanodet", "skinned"
ORDER = ("plain", "noise", "random", "product")
SETS = {"test": (CANDIDATES, TEST_WALKS), "train": (TRAIN_CANDIDATES, TRAIN_WALKS)}


def looked_at(walk: Walk, number: int, fps: float, size: int, tools: tuple[Any, Any]) -> dict[str, Any]:
    """What the controls do on one walk, as plain values."""
    detector, clothes = tools
    (scene,) = scenes([walk], fps, size, ENGINE)
    recalls = screen(detector, scene, clothes)
    boxes = scene.buffers.boxes
    return {
        "number": number,
        "walk": walk.label(),
        "pixels": round(float((boxes[:, 3] - boxes[:, 1]).mean()), 1),
        "metres": round(float(scene.buffers.distance.mean()), 2),
        "recall": {name: round(value, 3) for name, value in recalls.items()},
        "left_out": decided(recalls),
    }


def main(fps: float, size: int) -> None:
    about = {"detector": DETECTOR, "fps": fps, "size": size, "cloth": ENGINE}
    found: dict[str, Any] = {"about": about, "test": [], "train": []}
    if SCREENED.exists():
        kept = json.loads(SCREENED.read_text(encoding="utf-8"))
        found = kept if kept["about"] == about else found
    gamut = Gamut.proxy()
    tools = load_detector(DETECTOR), {kind: control(kind, gamut) for kind in ORDER}
    for name, (candidates, wanted) in SETS.items():
        rows = found[name]
        while sum(not row["left_out"] for row in rows) < wanted and len(rows) < len(candidates):
            rows.append(looked_at(candidates[len(rows)], len(rows), fps, size, tools))
            print(name, json.dumps(rows[-1]), flush=True)
            write_text(SCREENED, json.dumps(found, indent=1) + "\n")
        print(name, sum(not row["left_out"] for row in rows), "of", len(rows), "taken")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 3.0, int(sys.argv[2]) if len(sys.argv) > 2 else 416)
