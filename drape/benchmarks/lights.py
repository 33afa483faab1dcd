"""Walks under every light, from the textures that `drape bench` kept, into its file of figures.

python drape/benchmarks/lights.py WORK [EACH] [TO]     WORK is the folder of `drape bench`

The stage "lights" of the benchmark by itself: nothing is optimised. What was seen of each walk is kept in WORK, so it
goes on where it was stopped. EACH is how many walks outdoors, and as many indoors (12), TO the file of figures
(`bench.json` beside this file), whose other parts stay.
"""

from __future__ import annotations

import sys
from pathlib import Path

from drape.bench import ATTACK, FIGURES, BenchSpec, rounded
from drape.controls import control, load_images
from drape.detectors import load_detector
from drape.gamut import Gamut
from drape.io import load_record, save_record
from drape.lights import light_table, lit_walks
from drape.measure import CLEAN
from drape.walks import Walk

BENCH = Path(__file__).with_name("bench.json")


def main(work: Path, each: int, to: Path) -> None:
    figures = load_record(to, FIGURES, "run `drape bench`")
    spec = figures["about"]["spec"]
    walks = [Walk(**walk) for walk in figures["about"]["walks"]]
    clothes = {CLEAN: control(CLEAN, Gamut.proxy()), ATTACK: load_images(work / f"{ATTACK}.npz")}
    chosen = {number: walks[number] for number in lit_walks(walks, each)}
    rendered = (spec["fps"], spec["size"], spec["cloth"])
    figures["lights"] = light_table(load_detector(spec["detector"]), clothes, chosen, rendered, work)
    spec["lit"] = each
    save_record(to, FIGURES, rounded(figures))
    print(f"wrote {to}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    given = [*sys.argv[1:], *(str(BenchSpec.lit), str(BENCH))[len(sys.argv) - 2 :]]
    main(Path(given[0]), int(given[1]), Path(given[2]))
