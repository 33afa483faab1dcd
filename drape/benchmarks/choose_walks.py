"""Which of the candidate walks judge: those that the controls, textures that nobody optimised, do not decide already.

python drape/benchmarks/choose_walks.py [FPS] [SIZE]     prints the numbers for `CHOSEN` in drape.walks

A walk is decided when a person in plain clothes is hardly seen, when every other control hides the person already, or
when none of them takes anything (cloth that only follows the body is enough for that). Candidates are taken in order
until there are forty.
"""

from __future__ import annotations

import sys

from drape.controls import CONTROLS, control
from drape.detectors import load_detector
from drape.evaluate import Judge
from drape.gamut import Gamut
from drape.walks import CANDIDATES, scenes

WANTED, DETECTOR = 40, "nanodet"
SEEN, HALF, ALL = 0.6, 0.5, 0.9  # recall in plain clothes at least; of the other controls the highest, and the lowest


def decided(recalls: dict[str, float]) -> bool:
    """Whether the controls alone decide a walk."""
    others = [value for name, value in recalls.items() if name != "plain"]
    return recalls["plain"] < SEEN or max(others) < HALF or min(others) > ALL


def main(fps: float, size: int) -> None:
    detector, gamut = load_detector(DETECTOR), Gamut.proxy()
    clothes = {kind: control(kind, gamut) for kind in CONTROLS}
    chosen: list[int] = []
    for number, walk in enumerate(CANDIDATES):
        judge = Judge(scenes([walk], fps, size, "skinned"))
        recalls = {kind: judge.result(detector, kind, images)["recall"] for kind, images in clothes.items()}
        left_out = decided(recalls)
        told = " ".join(f"{kind} {value:.2f}" for kind, value in recalls.items())
        height = float((judge.scenes[0].buffers.boxes[:, 3] - judge.scenes[0].buffers.boxes[:, 1]).mean())
        print(f"{number:2d} {'left out' if left_out else 'chosen  '} {told} {height:.0f} px {walk.label()}", flush=True)
        chosen += [] if left_out else [number]
        if len(chosen) == WANTED:
            break
    print(f"CHOSEN = {tuple(chosen)}")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 6.0, int(sys.argv[2]) if len(sys.argv) > 2 else 416)
