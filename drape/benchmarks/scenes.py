"""How believable the walks are, as numbers: sliding feet, flights, cloth that swings, shadows at the feet, turns.

python drape/benchmarks/scenes.py [WALKS]       into scenes.json beside it; all walks, or the first so many of each set

Written after every walk; when it is started again it goes on with those that it has not measured yet, and with those
that it measured in another way. No detector has a part in it. Feet are measured at 30 poses per second, cloth at those
of the solver, shadows at four moments of each walk at which a foot lies flat on the ground.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from drape.io import write_text
from drape.scene.body import load_rig
from drape.scene.cloth import CLOTHS
from drape.scene.cloth_engines import simulate
from drape.scene.gait import gait, plan, walk
from drape.scene.garments import GARMENTS, make_garment, vertex_normals
from drape.scene.light import light
from drape.scene.plausible import FLYING, contact_shadow, flat, hem_of, standing, swing
from drape.scene.sequence import POSES, WARM_UP
from drape.walks import TEST, TRAIN, Walk

FILE = Path(__file__).with_name("scenes.json")
RATE, SHADOWS = 30.0, 4
MEASURE = 2  # raise it when what is measured changes
SWINGING = ("shirt", "trousers")


def feet_of(own: Walk) -> dict[str, float]:
    """Sliding and flight of a walk, cm/s and shares."""
    rig, g = load_rig(own.body), gait(own.gait)
    times = np.arange(0, own.seconds, 1 / RATE)
    walked = walk(rig, g, own.path, own.seconds, times, own.phase)
    found = standing(rig, g, own.path, own.seconds, times, walked, own.phase)
    return {
        "sliding_mean": 100 * float(found.sliding.mean()),
        "sliding_p95": 100 * float(np.percentile(found.sliding, 95)),
        "sliding_worst": 100 * float(found.sliding.max()),
        "flying": found.flying,
        "lowest": 100 * found.lowest,
    }


def cloth_of(own: Walk) -> dict[str, float]:
    """Root mean square of the hems' swing, and the furthest, cm."""
    rig = load_rig(own.body)
    times = np.arange(-WARM_UP, own.seconds, 1 / POSES)
    walked = walk(rig, gait(own.gait), own.path, own.seconds, times, own.phase)
    normals = np.stack([vertex_normals(v, rig.faces) for v in walked.vertices])
    rest_normals = vertex_normals(rig.vertices, rig.faces)
    result = {}
    for name in SWINGING:
        garment = make_garment(name, rig)
        shells, facing = garment.worn(walked.vertices, normals)
        rest, _ = garment.worn(rig.vertices, rest_normals)
        moved = simulate(garment, shells, facing, rest, CLOTHS[own.cloth], POSES)
        hem = swing(moved, shells, walked.heading, POSES)[:, hem_of(garment)]
        result[f"{name}_rms"] = 100 * float(np.sqrt((hem**2).mean()))
        result[f"{name}_most"] = 100 * float(hem.max())
    return result


def shadow_of(own: Walk) -> dict[str, float]:
    """The contact shadow while a foot lies flat: share of the sky that is hidden, and cm from the soles to where that
    is darkest; of who flies, the darkest that it is at the heights of the flights.
    """
    rig, g, lamp = load_rig(own.body), gait(own.gait), light(own.light)
    rest = [make_garment(name, rig) for name in GARMENTS]
    times = np.arange(0, own.seconds, 1 / RATE)
    lies = np.flatnonzero(flat(rig, g, own.path, own.seconds, times, own.phase))
    walked = walk(rig, g, own.path, own.seconds, times, own.phase)
    lowest = walked.vertices[..., 2].min(axis=1)
    flies = np.argsort(lowest)[-SHADOWS:]
    flies = flies[lowest[flies] > FLYING]

    def seen(t: int) -> tuple[float, float]:
        body = walked.vertices[t : t + 1]
        shells = [garment.worn(body, vertex_normals(body[0], rig.faces)[None])[0][0] for garment in rest]
        return contact_shadow(np.concatenate([body[0], *shells]), lamp, walked.place[t])

    stood = [seen(t) for t in lies[np.linspace(0, len(lies) - 1, SHADOWS).round().astype(int)]]
    flown = [seen(t)[0] for t in flies]
    return {
        "shadow_least": min(hidden for hidden, _ in stood),
        "shadow_gap_worst": 100 * max(gap for _, gap in stood),
        **({"shadow_flying_most": max(flown)} if flown else {}),
    }


def turn_of(own: Walk) -> float:
    """The least radius of a turn, metres; 1000 where it goes straight on."""
    way = plan(load_rig(own.body), gait(own.gait), own.path, own.seconds).curve
    bent = np.abs(np.diff(np.radians(way.heading)) / np.diff(way.way)).max()
    return float(1 / max(bent, 1e-3))


def measured(own: Walk) -> dict[str, Any]:
    """All numbers of a walk."""
    numbers = {**feet_of(own), **cloth_of(own), **shadow_of(own), "turn": turn_of(own)}
    return {
        "walk": own.label(),
        "gait": own.gait,
        "seconds": own.seconds,
        "measure": MEASURE,
        **{k: round(v, 3) for k, v in numbers.items()},
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What all walks keep to; of runs and of walks only where there are some."""
    runs = [row for row in rows if gait(row["gait"]).duty < 0.5]
    others = [row for row in rows if row not in runs]
    return {
        "walks": len(rows),
        "seconds": sum(row["seconds"] for row in rows),
        "sliding_mean_cm_s": float(np.mean([row["sliding_mean"] for row in rows])),
        "sliding_worst_cm_s": max(row["sliding_worst"] for row in rows),
        **({"flying_of_runs_least": min(row["flying"] for row in runs)} if runs else {}),
        **({"flying_of_walks_most": max(row["flying"] for row in others)} if others else {}),
        "sunk_most_cm": -min(row["lowest"] for row in rows),
        **{f"{name}_rms_{which.__name__}_cm": float(which([row[f"{name}_rms"] for row in rows]))
           for name in SWINGING for which in (np.min, np.median, np.max)},
        "shadow_least": min(row["shadow_least"] for row in rows),
        "shadow_gap_worst_cm": max(row["shadow_gap_worst"] for row in rows),
        **({"shadow_flying_most": max(row["shadow_flying_most"] for row in runs)} if runs else {}),
        "turn_least_m": min(row["turn"] for row in rows),
    }  # fmt: skip


def main(few: int | None) -> None:
    kept = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    known = {row["walk"]: row for part in kept.values() for row in part["walks"] if row.get("measure") == MEASURE}
    sets = {"test": TEST, "train": TRAIN}
    order = sorted(((n, name) for name, walks in sets.items() for n in range(len(walks[:few]))))
    for number, name in order:  # the sets in turn
        own = sets[name][number]
        if own.label() not in known:
            known[own.label()] = measured(own)
            print(name, json.dumps(known[own.label()]), flush=True)
        found = {}
        for part, walks in sets.items():
            rows = [known[walk.label()] for walk in walks if walk.label() in known]
            found[part] = {"summary": {k: round(v, 3) for k, v in summary(rows).items()} if rows else {}, "walks": rows}
        write_text(FILE, json.dumps(found, indent=1) + "\n")
    print(json.dumps({part: found[part]["summary"] for part in found}, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else None)
