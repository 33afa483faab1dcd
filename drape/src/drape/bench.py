"""The benchmark: the claims about sequences, transfer and defences, measured on held-out walks, to one JSON file.

For each seed textures are optimised over sequences and, with equal compute, frame by frame, from the same beginning.
The detector is hardened on the training walks only. Attacks that know of a defence get the same compute as the others.
All textures are judged on the walks of `drape.walks.TEST`. What was made is kept in a folder, so that a run that was
stopped goes on where it was.
"""

from __future__ import annotations

import copy
import itertools
import json
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage import data
from torch import Tensor

from drape import __version__
from drape.calibrate import scores_of_false_boxes, threshold_keeping
from drape.controls import CONTROLS, control, load_images, random_textures, save_images
from drape.detectors import load_detector
from drape.detectors.base import Detection, Detector
from drape.errors import ConfigError
from drape.evaluate import DEFENCES, Judge, Subject, Walks, defended, evaluate
from drape.gamut import Gamut
from drape.harden import HardenSpec, harden, load_hardened, save_hardened
from drape.io import load_arrays, save_arrays, write_text
from drape.measure import Attacks, measure
from drape.objective import Temporal
from drape.optimise import MODES, OptimiseSpec, optimise
from drape.progress import note
from drape.scene.backgrounds import plate_from_image
from drape.scene.scene import Scene
from drape.walks import TEST, TRAIN, scenes

__all__ = ["BenchSpec", "compare", "run_bench"]

KIND = "drape's detections"
REACH = 2  # frames that `drape.defences.aggregate` looks before and after
SEEDED = tuple(name for name in DEFENCES if name != "median")  # defences that are judged for every seed
HIGHER_IS_STRONGER = {"sequence_success_10": 1, "sequence_success_50": 1, "recall": -1, "longest_run": -1}


@dataclass(frozen=True, kw_only=True)
class BenchSpec:
    """The benchmark's size.

    Args:
        detector: attacked and defended.  others: for transfer and consensus, in no optimisation.
        seeds: of the comparison.  steps, batch, learning_rate, weighting, window: of each optimisation.
        frames, size: of a walk.  walks: how many held-out ones.
        rounds, harden_steps: of fine-tuning, with half of `steps` for each round's textures.
    """

    detector: str = "nanodet"
    others: tuple[str, ...] = ("yolov3-tiny", "centernet")
    seeds: int = 6
    steps: int = 60
    batch: int = 6
    learning_rate: float = 0.02
    weighting: str = "window"
    window: int = 5
    frames: int = 16
    size: int = 416
    walks: int = len(TEST)
    rounds: int = 3
    harden_steps: int = 40

    def __post_init__(self) -> None:
        if self.seeds < 1 or not 1 <= self.walks <= len(TEST) or self.detector in self.others:
            raise ConfigError(
                f"seeds={self.seeds}, walks={self.walks}, detector={self.detector}, others={self.others}; expected at "
                f"least one seed, 1 to {len(TEST)} walks, and others that are not the detector."
            )
        self.hardening()  # refuse what cannot run before anything has run
        self.optimisation("sequence", 0)

    def optimisation(self, mode: str, seed: int, aggregation: int = 0, detectors: int = 1) -> OptimiseSpec:
        """How one texture is optimised; against several detectors with fewer steps, so that the passes are as many."""
        return OptimiseSpec(
            mode=mode,
            steps=max(self.steps // detectors, 1),
            batch=self.batch,
            learning_rate=self.learning_rate,
            aggregation=aggregation,
            temporal=Temporal(mode=self.weighting, window=self.window),
            seed=seed,
        )

    def hardening(self) -> HardenSpec:
        """How the detector is fine-tuned."""
        return HardenSpec(rounds=self.rounds, attack_steps=max(self.steps // 2, 1), steps=self.harden_steps)


class Store:
    """What a run has made so far, in a folder; another spec needs another folder."""

    def __init__(self, folder: Path, spec: BenchSpec) -> None:
        self.folder = folder
        text = json.dumps(asdict(spec), indent=1)
        known = folder / "spec.json"
        if known.exists() and known.read_text() != text:
            raise ConfigError(f"{folder} holds a run with other settings; delete it or name another folder.")
        write_text(known, text)

    def timed(self, name: str, make: Callable[[], None]) -> None:
        """Run a step unless it was run before, and note the processor's seconds."""
        done = self.folder / f"{name}.seconds"
        if not done.exists():
            note(name)
            start = time.process_time()
            make()
            write_text(done, f"{time.process_time() - start:.1f}")

    def seconds(self) -> dict[str, float]:
        """Processor seconds of every step; of one that was stopped and went on, those of its last part."""
        return {path.stem: float(path.read_text()) for path in sorted(self.folder.glob("*.seconds"))}

    def textures(
        self, name: str, detectors: Sequence[Detector], walks: Sequence[Scene], spec: OptimiseSpec
    ) -> dict[str, Tensor]:
        """Optimised textures, made if they are not there."""
        path = self.folder / f"{name}.npz"

        def make() -> None:
            textures = random_textures(Gamut.proxy(), spec.seed)
            run = optimise(textures, detectors, walks, spec)
            save_images(path, {garment: texture(hard=True).detach() for garment, texture in textures.items()})
            record = json.dumps({"passes": run.passes, "confidence": run.confidence})
            write_text(self.folder / f"{name}.run.json", record)

        self.timed(name, make)
        return load_images(path)

    def passes(self) -> dict[str, int]:
        """Passes through the detectors that each optimisation took."""
        found = sorted(self.folder.glob("*.run.json"))
        return {p.name.removesuffix(".run.json"): json.loads(p.read_text())["passes"] for p in found}

    def hardened(self, detector: Detector, walks: Sequence[Scene], spec: BenchSpec) -> Detector:
        """The fine-tuned detector, made if it is not there."""
        path = self.folder / "hardened.weights.npz"

        def make() -> None:
            done = harden(detector, walks, Gamut.proxy(), spec.hardening(), spec.optimisation("sequence", 0))
            save_hardened(path, done.detector, spec.detector, spec.hardening())
            write_text(self.folder / "hardened.loss.json", json.dumps(done.loss))

        self.timed("harden", make)
        return load_hardened(path)

    def recalibrated(
        self, detector: Detector, walks: Sequence[Scene], clothes: Sequence[Mapping[str, Tensor]]
    ) -> Detector:
        """The detector with the threshold that fine-tuning would give it if it left the weights as they are."""
        path = self.folder / "threshold.json"

        def make() -> None:
            scores = scores_of_false_boxes(detector, walks, clothes)
            write_text(path, json.dumps(threshold_keeping(scores, scores, detector.threshold)))

        self.timed("threshold", make)
        result = copy.deepcopy(detector)
        result.name, result.threshold = f"{detector.name}+threshold", float(json.loads(path.read_text()))
        return result


class KeptJudge(Judge):
    """A judge that keeps what it sees in a folder, one file for each detector and texture."""

    def __init__(self, judged: Sequence[Scene], folder: Path) -> None:
        super().__init__(judged)
        self.folder = folder

    def walks(self, detector: Detector, name: str, textures: Mapping[str, Tensor]) -> Walks:
        """Detections on all walks, from the folder if they are there."""
        key = (detector.name, name)
        path = self.folder / (re.sub(r"[^a-z0-9+-]+", "_", f"seen {detector.name} {name}".lower()) + ".npz")
        if key not in self.seen and path.exists():
            self.seen[key] = read_walks(path)
        if not path.exists():
            note(f"judge: {detector.name}, {name}")
            keep_walks(path, super().walks(detector, name, textures))
        return self.seen[key]


def keep_walks(path: Path, walks: Walks) -> None:
    """Detections as one file."""
    arrays = {
        "boxes": torch.cat([d.boxes for walk in walks for d in walk]).numpy(),
        "scores": torch.cat([d.scores for walk in walks for d in walk]).numpy(),
        "counts": np.array([len(d.scores) for walk in walks for d in walk]),
        "frames": np.array([len(walk) for walk in walks]),
    }
    save_arrays(path, KIND, arrays)


def read_walks(path: Path) -> Walks:
    """Detections that `keep_walks` kept."""
    stored, _ = load_arrays(path, KIND, "delete it, and the walks will be judged again")
    counts, frames = stored["counts"].tolist(), stored["frames"].tolist()
    boxes, scores = (torch.from_numpy(stored[name]).split(counts) for name in ("boxes", "scores"))
    found = iter(Detection(b, s) for b, s in zip(boxes, scores, strict=True))
    return [list(itertools.islice(found, count)) for count in frames]


def compare(results: Mapping[str, Mapping[str, Any]], seeds: int) -> dict[str, Any]:
    """Sequence-level against frame-by-frame optimisation: each seed, means, and whether sequences are stronger.

    Args:
        results: metrics by "sequence-SEED" and "frames-SEED".
    """
    table: dict[str, Any] = {}
    for metric, sign in HIGHER_IS_STRONGER.items():
        rows = {mode: [float(results[f"{mode}-{seed}"][metric]) for seed in range(seeds)] for mode in MODES}
        gain = sign * (np.array(rows["sequence"]) - np.array(rows["frames"]))
        table[metric] = {
            **rows,
            "mean": {mode: float(np.mean(values)) for mode, values in rows.items()},
            "gain_of_sequence": float(gain.mean()),
            "seeds_won": int((gain > 0).sum()),
            "seeds_lost": int((gain < 0).sum()),
        }
    return table


def rounded(value: Any, digits: int = 4) -> Any:
    """The same value with its numbers cut to what means something."""
    if isinstance(value, Mapping):
        return {key: rounded(inner, digits) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(inner, digits) for inner in value]
    return round(value, digits) if isinstance(value, float) else value


def person_photo(detectors: Mapping[str, Detector], size: int) -> dict[str, float]:
    """Each detector's best score on scikit-image's portrait of an astronaut, which no step has seen."""
    plate = plate_from_image(data.astronaut(), size)[None]
    with torch.no_grad():
        return {name: float(detector(plate).scores.max()) for name, detector in detectors.items()}


def run_bench(spec: BenchSpec, work: Path, to: Path) -> dict[str, Any]:
    """Run what is missing of the benchmark, and write its figures to a JSON file."""
    store = Store(work, spec)
    detector, others = load_detector(spec.detector), [load_detector(name) for name in spec.others]
    walks = scenes(TRAIN, spec.frames, spec.size)
    attacks = {
        f"{mode}-{seed}": store.textures(f"{mode}-{seed}", [detector], walks, spec.optimisation(mode, seed))
        for seed in range(spec.seeds)
        for mode in MODES
    }
    hardened = store.hardened(detector, walks, spec)
    tracked = {  # an attack that knows of aggregation needs sequences; "frames" can know of none
        f"tracked-{seed}": store.textures(
            f"tracked-{seed}", [detector], walks, spec.optimisation("sequence", seed, REACH)
        )
        for seed in range(spec.seeds)
    }
    together = [detector, *others]
    adaptive = {"aggregate": tracked["tracked-0"]} | {
        defence: store.textures(
            f"adaptive-{defence}", models, walks, spec.optimisation("sequence", 0, reach, len(models))
        )
        for defence, models, reach in (
            ("hardened", [hardened], 0),
            ("hardened+aggregate", [hardened], REACH),
            ("consensus", together, 0),
        )
    }
    attacks = {"sequence-0": attacks["sequence-0"], **attacks}  # the first one is what defences are measured against
    controls = {kind: control(kind, Gamut.proxy()) for kind in CONTROLS}
    recalibrated = store.recalibrated(detector, walks, list(controls.values()))
    judged = store.folder / "measured.json"

    def judge() -> None:
        given = Attacks(controls, attacks, adaptive)
        judge = KeptJudge(scenes(TEST[: spec.walks], spec.frames, spec.size), store.folder)
        subject = Subject(detector, others, hardened, recalibrated)
        strong = {name: textures for name, textures in attacks.items() if name.startswith("sequence-")}
        measured = measure(subject, judge, given, {*strong, "frames-0"})
        by_seed = {
            defence: [defended(judge, subject, defence, name, strong[name])["recall"] for name in sorted(strong)]
            for defence in SEEDED
        }
        behind = {}
        for seed in range(spec.seeds):
            for mode, name, images in (
                ("frames", f"frames-{seed}", attacks[f"frames-{seed}"]),
                ("sequence", f"tracked-{seed}", tracked[f"tracked-{seed}"]),
            ):
                behind[f"{mode}-{seed}"] = defended(judge, subject, "aggregate", name, images)
        seen = {name: evaluate(detector, walks, textures)["recall"] for name, textures in attacks.items()}
        photo = person_photo({"before": detector, "hardened": hardened}, spec.size)
        record = {
            **measured,
            "sequence_against_frames_behind_aggregation": compare(behind, spec.seeds),
            "defended_by_seed": by_seed,
            "training_recall": seen,
            "photograph_score": photo,
            "thresholds": {d.name: d.threshold for d in (detector, recalibrated, hardened)},
        }
        write_text(judged, json.dumps(rounded(record)))

    store.timed("judge", judge)
    measured = json.loads(judged.read_text())
    figures = {
        "about": {
            "what": "drape bench: rendered walks, public detectors, proxy gamut",
            "drape": __version__,
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} thread",
            "spec": asdict(spec),
            "processor_seconds": store.seconds(),
            "passes": store.passes(),
        },
        "sequence_against_frames": compare(measured["results"], spec.seeds),
        **measured,
    }
    write_text(to, json.dumps(rounded(figures), indent=1) + "\n")
    return figures
