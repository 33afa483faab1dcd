"""The benchmark: strengths, sequences, transfer and defences, measured on held-out walks, to one JSON file.

For each seed textures are optimised over sequences and, with as many backward passes, on single frames of the walks
and on static poses, from the same beginning. The detector is hardened on the training walks only. Attacks that know of
a defence, and those on other detectors and on all of them together, get the same compute as the others. All textures
are judged on the walks of `drape.walks.TEST`; what needs several detectors, on the first of them.

The work is done in stages. After each the figures of what there is so far are written, and all that was made is kept
in a folder (`drape.store`), so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage import data
from torch import Tensor

from drape import __version__
from drape.compare import compare, curve, distances, gaps, intervals, same_verdict, separation, sides
from drape.controls import CONTROLS, control
from drape.detectors import load_detector
from drape.detectors.base import Detector
from drape.errors import ConfigError
from drape.evaluate import Subject, check_names, defended
from drape.gamut import Gamut
from drape.harden import HardenSpec, check_trainable
from drape.io import save_record
from drape.lights import light_table, lit_walks
from drape.measure import CLEAN, Attacks, defence_table, track
from drape.objective import Temporal
from drape.optimise import MODES, OptimiseSpec
from drape.progress import note
from drape.scene.backgrounds import square
from drape.statistics import interval
from drape.store import KeptJudge, Order, Store
from drape.walks import TEST, TRAIN, scenes

__all__ = ["ATTACK", "BASELINES", "FIGURES", "REACH", "BenchSpec", "rounded", "run_bench", "versions"]

FIGURES = "drape's benchmark"
REACH = 2  # frames that `drape.defences.aggregate` looks back
BASELINES = ("frames", "static")
METRES = (0.0, 6.0, 8.0, 10.0, 13.0, 17.0, 40.0)  # from the camera: bins of the curve over distance
SIDES = tuple(np.arange(-22.5, 338, 45).tolist())  # eight sides, the front first
ENSEMBLE = "all together"  # the texture of all detectors
ATTACK = "sequence-0"  # the one that defences are measured against
ONLY_HOW_MANY = ("lit",)  # settings that nothing kept depends on: a run with another value goes on


@dataclass(frozen=True, kw_only=True)
class BenchSpec:
    """The benchmark's size.

    Args:
        detector: attacked and defended.  others: for transfer and consensus.
        steps, batch, mosaic, learning_rate, weighting, window: of each optimisation; `window` in frames.
        refresh: steps from one look at all frames to the next.  strengths: fewer steps, for the textures between.
        seeds_of_strengths, seeds_of_gaps: how many of the seeds are used for those.
        fps, size, cloth: of the walks and of the engine that moves the cloth.
        train, walks: how many of the training walks and of the held-out ones.
        shared: how many of the held-out ones several detectors look at.
        lit: walks outdoors, and as many indoors, that are seen under every light of their kind of place.
        rounds, harden_steps: of fine-tuning, with half of `steps` for each round's textures.
    """

    detector: str = "nanodet"
    others: tuple[str, ...] = ("yolov3-tiny", "centernet")
    steps: int = 100
    batch: int = 4
    mosaic: int = 2
    learning_rate: float = 0.02
    weighting: str = "run"
    window: int = 4
    refresh: int = 34
    strengths: tuple[int, ...] = (10, 30)
    seeds_of_strengths: int = 2
    seeds_of_gaps: int = 2
    fps: float = 3.0
    size: int = 416
    cloth: str = "drape"
    train: int = len(TRAIN)
    walks: int = len(TEST)
    shared: int = 20
    lit: int = 12
    rounds: int = 3
    harden_steps: int = 40

    def __post_init__(self) -> None:
        few = 1 <= self.train <= len(TRAIN) and 1 <= self.walks <= len(TEST)
        if self.steps < 1 or not few or self.detector in self.others or self.shared < 1 or self.lit < 0:
            raise ConfigError(
                f"steps={self.steps}, train={self.train}, walks={self.walks}, shared={self.shared}, lit={self.lit}, "
                f"detector={self.detector}, others={self.others}; expected at least one step, 1 to {len(TRAIN)} "
                f"training walks, 1 to {len(TEST)} held-out ones, at least one shared, and others that are not the "
                "detector."
            )
        if list(self.strengths) != sorted(set(self.strengths)) or any(not 0 < n < self.steps for n in self.strengths):
            raise ConfigError(f"strengths={self.strengths}; expected fewer than {self.steps} steps each, ascending.")
        if min(self.seeds_of_strengths, self.seeds_of_gaps) < 1:
            raise ConfigError("seeds_of_strengths and seeds_of_gaps; expected 1 or more.")
        self.hardening()  # refuse what cannot run before anything has run
        self.optimisation("sequence", 0)

    def optimisation(
        self, mode: str, seed: int, aggregation: int = 0, detectors: int = 1, steps: int | None = None
    ) -> OptimiseSpec:
        """How one texture is optimised; against several detectors with fewer steps, so that the passes are as many."""
        return OptimiseSpec(
            mode=mode,
            steps=max((self.steps if steps is None else steps) // detectors, 1),
            batch=self.batch,
            mosaic=self.mosaic,
            learning_rate=self.learning_rate,
            refresh=self.refresh,
            aggregation=aggregation,
            temporal=Temporal(mode=self.weighting, window=self.window),
            seed=seed,
        )

    def hardening(self) -> HardenSpec:
        """How the detector is fine-tuned."""
        return HardenSpec(rounds=self.rounds, attack_steps=max(self.steps // 2, 1), steps=self.harden_steps)


class Bench:
    """A run of the benchmark: stages, and the figures of those that were run.

    Args:
        spec: the size.  work: folder for what is made.  jobs: processes side by side.
    """

    def __init__(self, spec: BenchSpec, work: Path, jobs: int = 1) -> None:
        self.spec, self.jobs = spec, jobs
        walks, training = ([asdict(walk) for walk in each] for each in (TEST[: spec.walks], TRAIN[: spec.train]))
        self.walks = {"walks": walks, "training_walks": training}
        kept = {name: value for name, value in asdict(spec).items() if name not in ONLY_HOW_MANY}
        self.store = Store(work, {**kept, **self.walks})  # what was seen of other walks is of no use
        self.detector, self.others = load_detector(spec.detector), [load_detector(name) for name in spec.others]
        check_trainable(self.detector)
        check_names([self.detector, *self.others])
        self.train = scenes(TRAIN[: spec.train], spec.fps, spec.size, spec.cloth, jobs)
        self.test = scenes(TEST[: spec.walks], spec.fps, spec.size, spec.cloth, jobs)
        self.judge = KeptJudge(self.test, work, jobs)
        self.shared = KeptJudge(self.test[: spec.shared], work, jobs)
        self.trained = KeptJudge(self.train, work, jobs, "training")
        self.controls = {kind: control(kind, Gamut.proxy()) for kind in CONTROLS}
        self.seeds: list[int] = []
        self.images: dict[str, Mapping[str, Tensor]] = dict(self.controls)
        self.results: dict[str, dict[str, Any]] = {}
        self.training: dict[str, dict[str, Any]] = {}
        self.aggregated: dict[str, dict[str, Any]] = {}
        self.parts: dict[str, Any] = {}

    def stages(self, seeds: int) -> list[tuple[str, Callable[[], None]]]:
        """All of them in order; what says most comes first."""
        each = [(f"seed {seed}", lambda seed=seed: self.look_at_seed(seed)) for seed in range(seeds)]
        few = min(seeds, self.spec.seeds_of_strengths)
        return [
            ("controls", self.look_at_controls),
            *each[:few],
            ("strengths", lambda: self.look_at_strengths(few)),
            ("defences", self.look_at_defences),
            ("transfer", self.look_at_transfer),
            ("lights", self.look_at_lights),
            *each[few:],
        ]

    def make(self, orders: Sequence[Order]) -> None:
        """Optimise what is missing."""
        self.images |= self.store.textures(orders, self.train, self.jobs)

    def see(self, name: str) -> None:
        """Judge a texture on the held-out walks."""
        self.results[name] = self.judge.result(self.detector, name, self.images[name])

    def see_training(self, name: str) -> None:
        """Judge it on the walks of the optimisation."""
        self.training[name] = self.trained.result(self.detector, name, self.images[name])

    def look_at_controls(self) -> None:
        for name in CONTROLS:
            self.see(name)
            self.see_training(name)

    def look_at_seed(self, seed: int) -> None:
        """Sequences and their baselines from one beginning."""
        names = {f"{mode}-{seed}": self.spec.optimisation(mode, seed) for mode in MODES}
        self.make([(name, [self.detector], spec) for name, spec in names.items()])
        subject = Subject(self.detector)
        for name in names:
            self.see(name)
            self.aggregated[name] = defended(self.judge, subject, "aggregate", name, self.images[name])
            if seed < self.spec.seeds_of_gaps:
                self.see_training(name)
        self.seeds.append(seed)

    def look_at_strengths(self, seeds: int) -> None:
        """Textures of fewer steps."""
        orders: list[Order] = [
            (f"{steps} steps-{seed}", [self.detector], self.spec.optimisation("sequence", seed, steps=steps))
            for seed in range(seeds)
            for steps in self.spec.strengths
        ]
        self.make(orders)
        begun = {f"random-{seed}": control("random", Gamut.proxy(), seed) for seed in range(1, seeds)}
        self.images |= begun
        for name in (*begun, *(name for name, _, _ in orders)):
            self.see(name)
        groups = {CLEAN: [CLEAN], "random": ["random", *begun]}  # what the optimisations began from
        groups |= {f"{n} steps": [f"{n} steps-{seed}" for seed in range(seeds)] for n in self.spec.strengths}
        groups[f"{self.spec.steps} steps"] = [f"sequence-{seed}" for seed in range(seeds)]
        told = [name for names in groups.values() for name in names]
        self.parts["separation"] = separation(self.results, groups)
        self.parts["same_verdict"] = {"walks": same_verdict(self.results, told), "textures": told}

    def look_at_defences(self) -> None:
        """Defences against the first seed, attacks that know of them, and what they cost on clean walks."""
        hardened = self.store.hardened(
            self.detector, self.spec.detector, self.train, self.spec.hardening(), self.spec.optimisation("sequence", 0)
        )
        recalibrated = self.store.recalibrated(self.detector, self.train, list(self.controls.values()))
        knows = {
            "aggregate": ([self.detector], REACH),
            "hardened": ([hardened], 0),
            "hardened+aggregate": ([hardened], REACH),
            "consensus": ([self.detector, *self.others], 0),
        }
        self.make(
            [
                (f"adaptive-{name}", models, self.spec.optimisation("sequence", 0, reach, len(models)))
                for name, (models, reach) in knows.items()
            ]
        )
        subject = Subject(self.detector, self.others, hardened, recalibrated)
        given = Attacks(
            self.controls, {ATTACK: self.images[ATTACK]}, {name: self.images[f"adaptive-{name}"] for name in knows}
        )
        bare = {name: self.shared.result(self.detector, name, self.images[name]) for name in (CLEAN, ATTACK)}
        table = defence_table(self.shared, subject, given)
        self.parts["defences"] = {"attack": ATTACK, "walks": len(self.shared.scenes), "bare": bare, "table": table}
        models = {"before": self.detector, "hardened": hardened}
        self.parts["photograph_score"] = person_photo(models, self.spec.size)
        self.parts["thresholds"] = {d.name: d.threshold for d in (self.detector, recalibrated, hardened)}

    def behind_aggregation(self) -> dict[str, Any]:
        """All modes behind aggregation over time, on all walks; no texture of these knows of it."""
        return {mode: compare(self.aggregated, self.seeds, mode) for mode in BASELINES if self.seeds}

    def look_at_transfer(self) -> None:
        """Textures optimised against each detector, and against all at once with as many passes, on every detector."""
        models = [self.detector, *self.others]
        whole: Order = (ENSEMBLE, models, self.spec.optimisation("sequence", 0, detectors=len(models)))
        self.make([*((d.name, [d], self.spec.optimisation("sequence", 0)) for d in self.others), whole])
        rows = {kind: kind for kind in CONTROLS if kind in (CLEAN, "random")}
        rows |= {f"against {self.detector.name}": ATTACK}
        rows |= {f"against {d.name}": d.name for d in self.others} | {f"against {ENSEMBLE}": ENSEMBLE}
        found = {
            row: {d.name: self.shared.result(d, name, self.images[name])["by_walk"] for d in models}
            for row, name in rows.items()
        }
        self.parts["transfer"] = {
            "rows": list(rows),
            "columns": [d.name for d in models],
            "walks": len(self.shared.scenes),
            **{
                metric: [[interval([walks[metric]]).plain() for walks in row.values()] for row in found.values()]
                for metric in ("area", "recall")
            },
        }

    def look_at_lights(self) -> None:
        """Some walks again under every light of their kind of place."""
        chosen = {n: TEST[n] for n in lit_walks(TEST[: self.spec.walks], self.spec.lit)}
        if chosen:
            clothes = {name: self.images[name] for name in (CLEAN, ATTACK)}
            rendered = (self.spec.fps, self.spec.size, self.spec.cloth)
            self.parts["lights"] = light_table(self.detector, clothes, chosen, rendered, self.store.folder, self.jobs)

    def groups(self) -> dict[str, list[str]]:
        """Textures by what they are: controls, modes with all seeds, fewer steps."""
        found = {kind: [kind] for kind in CONTROLS if kind in self.results}
        found |= {mode: [f"{mode}-{seed}" for seed in self.seeds] for mode in MODES if self.seeds}
        for steps in self.spec.strengths:
            names = [name for name in self.results if name.startswith(f"{steps} steps-")]
            found |= {f"{steps} steps": names} if names else {}
        return found

    def figures(self) -> dict[str, Any]:
        """All figures so far."""
        groups = self.groups()
        shown = [name for name in (CLEAN, "random", ATTACK) if name in self.results]
        curves = {name: self.results[name]["curves"] for name in shown}
        return {
            "about": {
                "what": "drape bench: rendered walks, public detectors, proxy gamut",
                **versions(),
                "spec": asdict(self.spec),
                "seeds": list(self.seeds),
                **self.walks,
                "processor_seconds": self.store.seconds(),
                "passes": self.store.passes(),
            },
            "results": self.results,
            "intervals": intervals(self.results, groups),
            "sequence_against": {mode: compare(self.results, self.seeds, mode) for mode in BASELINES if self.seeds},
            "behind_aggregation": self.behind_aggregation(),
            "gaps": gaps(self.results, self.training, groups, CLEAN),
            "distance": {name: curve(c, distances(self.test), METRES) for name, c in curves.items()},
            "azimuth": {name: curve(c, sides(self.test), SIDES) for name, c in curves.items()},
            "video": {
                name: track(self.judge.walks(self.detector, name, self.images[name])[0])
                for name in shown
                if name != "random"
            },
            **self.parts,
        }


def versions() -> dict[str, str]:
    """What a figure depends on besides its settings."""
    return {
        "drape": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread",
    }


def rounded(value: Any, digits: int = 4) -> Any:
    """The same value with its numbers cut to what means something."""
    if isinstance(value, Mapping):
        return {key: rounded(inner, digits) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(inner, digits) for inner in value]
    return round(value, digits) if isinstance(value, float) else value


def person_photo(detectors: Mapping[str, Detector], size: int) -> dict[str, float]:
    """Each detector's best score on scikit-image's portrait of an astronaut, which no step has seen."""
    plate = square(data.astronaut(), size)[None]
    with torch.no_grad():
        return {name: float(detector(plate).scores.max()) for name, detector in detectors.items()}


def run_bench(spec: BenchSpec, work: Path, to: Path, seeds: int = 6, jobs: int = 1) -> dict[str, Any]:
    """Run what is missing of the benchmark; its figures are written after every stage, and given at the end.

    Args:
        seeds: how many beginnings; another run with more of them goes on.
    """
    if seeds < 1:
        raise ConfigError(f"seeds={seeds}; expected at least one seed.")
    bench = Bench(spec, work, jobs)
    figures: dict[str, Any] = {}
    for name, stage in bench.stages(seeds):
        note(name)
        stage()
        figures = bench.figures()
        save_record(to, FIGURES, rounded(figures))
    return figures
