"""The walks that textures are optimised on, and those that judge them.

Both sets are drawn once, by a fixed seed, so that gaits, ways, cameras, lights, places, bodies, skins and cloths are
mixed evenly. No gait, light, place, camera, body, skin or cloth of the judging walks is in the training walks.

More of both were drawn than are taken: left out are those that the controls decide already (`drape.screening`). What
the controls did on each is in `data/walks.json`, which `drape/benchmarks/choose_walks.py` makes; candidates that it has
not looked at yet are taken as they come. No attack has any part in that choice.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from drape.errors import ConfigError
from drape.parallel import mapped
from drape.scene.body import load_rig
from drape.scene.camera import Camera, holding
from drape.scene.cloth import CLOTHS
from drape.scene.gait import gait, plan
from drape.scene.light import LIGHTS, light
from drape.scene.places import plate_of
from drape.scene.scene import Scene
from drape.scene.sequence import SequenceSpec, build_sequence

__all__ = [
    "CANDIDATES",
    "SCREENED",
    "TEST",
    "TEST_WALKS",
    "TRAIN",
    "TRAIN_CANDIDATES",
    "TRAIN_WALKS",
    "Walk",
    "scenes",
    "under_lights",
]

GRAIN = 0.012  # deviation of the camera's noise
CYCLES, FURTHEST = 1000, 20  # of a walk's phase and of its camera's zoom
TURNED = ("circle", "circle back", "bend", "bend away", "towards", "away", "diagonal")
ALL = (*TURNED, "diagonal away", "past", "back past", "sway", "sway past")
INDOORS = ("hall", "room")
OUTDOORS = ("street", "park", "yard")
SCREENED = Path(__file__).parent / "data" / "walks.json"


@dataclass(frozen=True, kw_only=True)
class Walk:
    """One walk by names: see `drape.scene` (`gait`, `paths`, `light`, `places`, `body`, `sequence.SKINS`, `cloth`).

    Args:
        seconds: 1 to 60.  seed: of the place.  phase: of the gait at the start, in cycles.
        elevation, fov: of the camera, degrees.  zoom: how much further off it stands than it has to.
        height: of the camera, metres, where a photograph behind the walk says it; else it follows from the elevation.
    """

    gait: str
    path: str
    light: str
    place: str
    body: str = "middle"
    skin: str = "middle"
    cloth: str = "cotton"
    seconds: float = 4.0
    seed: int = 0
    phase: float = 0.0
    elevation: float = 6.0
    fov: float = 42.0
    zoom: float = 1.0
    height: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.seconds <= 60:
            raise ConfigError(f"seconds={self.seconds}; expected 1 to 60.")
        if not abs(self.phase) <= CYCLES or not 0 < self.zoom <= FURTHEST or self.seed < 0:
            raise ConfigError(
                f"phase={self.phase}, zoom={self.zoom}, seed={self.seed}; expected a phase up to {CYCLES} cycles, a "
                f"zoom above 0 up to {FURTHEST}, and a seed of 0 or more."
            )

    def label(self) -> str:
        """What reports call it."""
        return f"{self.gait}, {self.path}, {self.light}, {self.place} {self.seed}"

    def spec(self, fps: float, size: int, engine: str = "drape") -> tuple[SequenceSpec, float]:
        """What its geometry depends on, and how many metres behind the origin it reaches."""
        own = gait(self.gait)
        landing = plan(load_rig(self.body), own, self.path, self.seconds)
        places, _ = landing.curve.at(np.linspace(0.0, landing.stride * own.cadence * self.seconds, 60))
        camera = holding(Camera(elevation=self.elevation, fov=self.fov, height=self.height), places, self.zoom)
        spec = SequenceSpec(
            gait=self.gait,
            path=self.path,
            light=self.light,
            frames=max(round(self.seconds * fps), 1),
            fps=fps,
            size=size,
            camera=camera,
            cloth=replace(CLOTHS[self.cloth], engine=engine),
            body=self.body,
            skin=self.skin,
            phase=self.phase,
        )
        return spec, round(float(places[:, 1].max()), 2)


def mixed(items: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """So many items in random order, all of them as often, but for one."""
    return [str(item) for _ in range(-(-count // len(items))) for item in rng.permutation(np.array(items))][:count]


def drawn(
    count: int,
    seed: int,
    *,
    gaits: Sequence[str],
    outside: Sequence[str],
    inside: Sequence[str],
    bodies: Sequence[str],
    skins: Sequence[str],
    cloths: Sequence[str],
    elevations: Sequence[float],
    longest: float,
) -> list[Walk]:
    """So many walks of 4 to `longest` seconds; the fast ones keep to ways that turn or lead along the line of sight."""
    rng = np.random.default_rng(seed)
    columns = [mixed(names, count, rng) for names in (gaits, bodies, skins, cloths, (*OUTDOORS, *INDOORS))]
    turned, straight, day, lamps = (iter(mixed(names, count, rng)) for names in (TURNED, ALL, outside, inside))
    walks = []
    for number, (own, body, skin, cloth, where) in enumerate(zip(*columns, strict=True)):
        fast = gait(own).stride * gait(own).cadence > 1.7
        walks.append(
            Walk(
                gait=own,
                path=next(turned) if fast else next(straight),
                light=next(lamps) if where in INDOORS else next(day),
                place=where,
                body=body,
                skin=skin,
                cloth=cloth,
                seconds=4.0 if fast else float(rng.integers(4, int(longest) + 1)),
                seed=1000 * seed + number,
                phase=round(float(rng.random()), 2),
                elevation=float(elevations[number % len(elevations)]),
                fov=round(float(rng.uniform(36, 52)), 1),
                zoom=round(float(rng.uniform(1.0, 1.4)), 2),
            )
        )
    return walks


TRAIN_WALKS, TEST_WALKS = 20, 40  # how many are taken
TRAIN_CANDIDATES = tuple(
    drawn(
        40,
        1,
        gaits=("normal", "amble", "brisk", "march", "run slowly"),
        outside=("overcast", "noon", "hazy"),
        inside=("indoor",),
        bodies=("middle", "woman", "man"),
        skins=("light", "middle", "brown"),
        cloths=("cotton", "light"),
        elevations=(2.0, 5.0, 8.0, 11.0, 16.0),
        longest=5,
    )
)
CANDIDATES = tuple(
    drawn(
        120,
        2,
        gaits=("stroll", "jog", "heavy", "hurry", "hands in pockets"),
        outside=("sun", "low_sun", "dusk"),
        inside=("white lamps",),
        bodies=("tall", "stout", "elder", "slight"),
        skins=("tan", "dark", "grey hair"),
        cloths=("heavy", "stretchy"),
        elevations=(0.0, 4.0, 7.0, 10.0, 13.0, 20.0),
        longest=8,
    )
)


def undecided(name: str, candidates: Sequence[Walk], wanted: int) -> tuple[Walk, ...]:
    """The first so many candidates that the controls do not decide, as far as they were looked at.

    Args:
        name: of the list in `SCREENED`.
    """
    rows = json.loads(SCREENED.read_text(encoding="utf-8"))[name]
    out = {row["number"] for row in rows if row["left_out"]}
    return tuple(walk for number, walk in enumerate(candidates) if number not in out)[:wanted]


TRAIN = undecided("train", TRAIN_CANDIDATES, TRAIN_WALKS)
TEST = undecided("test", CANDIDATES, TEST_WALKS)


def under_lights(walk: Walk, fps: float, size: int, engine: str = "drape") -> list[Scene]:
    """A walk under each light of its own kind of place, everything else the same."""
    names = [n for n in LIGHTS if (n in ("indoor", "white lamps")) == (walk.place in INDOORS)]
    return scenes([replace(walk, light=name) for name in names], fps, size, engine)


def scenes(walks: Sequence[Walk], fps: float, size: int, engine: str = "drape", jobs: int = 1) -> list[Scene]:
    """The walks at so many frames per second, rendered to buffers (from the cache if they are there).

    Args:
        engine: moves the cloth.  jobs: processes that render walks side by side.
    """
    return list(mapped(scene_of, [(walk, fps, size, engine) for walk in walks], min(jobs, max(len(walks), 1))))


def scene_of(item: tuple[Walk, float, int, str]) -> Scene:
    """One walk of `scenes`."""
    walk, fps, size, engine = item
    spec, behind = walk.spec(fps, size, engine)
    plate = plate_of(walk.place, walk.seed, spec.camera, walk.light, size, behind)
    return Scene(walk.label(), build_sequence(spec), light(walk.light), plate, GRAIN)
