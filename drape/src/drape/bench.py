"""The benchmark: the claims about sequences, transfer and defences, measured on held-out walks, to one JSON file.

For each seed textures are optimised over sequences and, with as many backward passes, on single frames of the walks and
on static poses, from the same beginning.
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
from drape.errors import AssetError, ConfigError
from drape.evaluate import DEFENCES, Judge, Subject, Walks, defended, evaluate
from drape.gamut import Gamut
from drape.harden import HardenSpec, harden, load_hardened, save_hardened
from drape.io import load_arrays, load_record, save_arrays, save_record, write_text
from drape.measure import Attacks, measure
from drape.objective import Temporal
from drape.optimise import MODES, OptimiseSpec, optimise
from drape.progress import note
from drape.scene.backgrounds import square
from drape.scene.scene import Scene
from drape.statistics import interval, paired
from drape.walks import TEST, TRAIN, scenes, under_lights

__all__ = ["BenchSpec", "compare", "run_bench"]

KIND, RUN, THRESHOLD, MEASURED, FIGURES = (
    f"drape's {what}" for what in ("detections", "optimisation", "threshold", "measurements", "benchmark")
)
AGAIN = "delete it and the file of its seconds beside it, and it will be made again"
REACH = 2  # frames that `drape.defences.aggregate` looks before and after
SEEDED = tuple(name for name in DEFENCES if name != "median")  # defences that are judged for every seed
HIGHER_IS_STRONGER = {
    "area": -1,
    "recall": -1,
    "sequence_success_50": 1,
    "sequence_success_10": 1,
    "longest_run": -1,
    "track_recall": -1,
}
BASELINES = ("frames", "static")


@dataclass(frozen=True, kw_only=True)
class BenchSpec:
    """The benchmark's size.

    Args:
        detector: attacked and defended.  others: for transfer and consensus, in no optimisation.
        seeds: of the comparison.  steps, batch, learning_rate, weighting, window: of each optimisation.
        fps, size, cloth: of the walks and of the engine that moves the cloth.
        train, walks: how many of the training walks and of the held-out ones.
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
    fps: float = 6.0
    size: int = 416
    cloth: str = "drape"
    train: int = len(TRAIN)
    walks: int = len(TEST)
    rounds: int = 3
    harden_steps: int = 40

    def __post_init__(self) -> None:
        few = 1 <= self.train <= len(TRAIN) and 1 <= self.walks <= len(TEST)
        if self.seeds < 1 or self.steps < 1 or not few or self.detector in self.others:
            raise ConfigError(
                f"seeds={self.seeds}, steps={self.steps}, train={self.train}, walks={self.walks}, "
                f"detector={self.detector}, others={self.others}; expected at least one seed and one step, 1 to "
                f"{len(TRAIN)} training walks, 1 to {len(TEST)} held-out ones, and others that are not the detector."
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
        if known.exists() and known.read_text(encoding="utf-8", errors="replace") != text:
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
        return {path.stem: _seconds(path) for path in sorted(self.folder.glob("*.seconds"))}

    def textures(
        self, name: str, detectors: Sequence[Detector], walks: Sequence[Scene], spec: OptimiseSpec
    ) -> dict[str, Tensor]:
        """Optimised textures, made if they are not there."""
        path = self.folder / f"{name}.npz"

        def make() -> None:
            textures = random_textures(Gamut.proxy(), spec.seed)
            run = optimise(textures, detectors, walks, spec)
            save_images(path, {garment: texture(hard=True).detach() for garment, texture in textures.items()})
            record = {"passes": {"backward": run.backward, "forward": run.forward}, "confidence": run.confidence}
            save_record(self.folder / f"{name}.run.json", RUN, record)

        self.timed(name, make)
        return load_images(path)

    def passes(self) -> dict[str, dict[str, int]]:
        """Frames that the detectors saw in each optimisation, with and without a gradient."""
        found = sorted(self.folder.glob("*.run.json"))
        return {p.name.removesuffix(".run.json"): load_record(p, RUN, AGAIN)["passes"] for p in found}

    def hardened(self, detector: Detector, walks: Sequence[Scene], spec: BenchSpec) -> Detector:
        """The fine-tuned detector, made if it is not there."""
        path = self.folder / "hardened.weights.npz"

        def make() -> None:
            done = harden(detector, walks, Gamut.proxy(), spec.hardening(), spec.optimisation("sequence", 0))
            save_hardened(path, done.detector, spec.detector, spec.hardening())
            save_record(self.folder / "hardened.loss.json", RUN, {"loss": done.loss})

        self.timed("harden", make)
        return load_hardened(path)

    def recalibrated(
        self, detector: Detector, walks: Sequence[Scene], clothes: Sequence[Mapping[str, Tensor]]
    ) -> Detector:
        """The detector with the threshold that fine-tuning would give it if it left the weights as they are."""
        path = self.folder / "threshold.json"

        def make() -> None:
            scores = scores_of_false_boxes(detector, walks, clothes)
            save_record(path, THRESHOLD, {"threshold": threshold_keeping(scores, scores, detector.threshold)})

        self.timed("threshold", make)
        result = copy.deepcopy(detector)
        kept = load_record(path, THRESHOLD, AGAIN)["threshold"]
        result.name, result.threshold = f"{detector.name}+threshold", float(kept)
        return result


def _seconds(path: Path) -> float:
    try:
        return float(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AssetError(f"{path} holds no number of seconds; delete it, and its step will run again.") from error


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


def compare(results: Mapping[str, Mapping[str, Any]], seeds: int, baseline: str) -> dict[str, Any]:
    """Optimisation over sequences against a baseline: each seed, means, and the gain with its interval.

    Args:
        results: metrics by "sequence-SEED" and "BASELINE-SEED".  baseline: another one of the modes.

    Returns:
        for each of `HIGHER_IS_STRONGER`; a gain above 0 means that sequences are the stronger attack.
    """
    rows: dict[str, Any] = {}
    for metric, sign in HIGHER_IS_STRONGER.items():
        each = {
            mode: np.array([results[f"{mode}-{seed}"]["by_walk"][metric] for seed in range(seeds)])
            for mode in ("sequence", baseline)
        }
        by_seed = sign * (each["sequence"].mean(axis=1) - each[baseline].mean(axis=1))
        rows[metric] = {
            **{mode: values.mean(axis=1).tolist() for mode, values in each.items()},
            "mean": {mode: interval(values).plain() for mode, values in each.items()},
            "gain_of_sequence": paired(sign * each["sequence"], sign * each[baseline]).plain(),
            "seeds_won": int((by_seed > 0).sum()),
            "seeds_lost": int((by_seed < 0).sum()),
        }
    return rows


def intervals(results: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Each metric of each group of textures (one for a control, one per seed for a mode), with its interval."""
    return {
        group: {
            metric: interval([results[name]["by_walk"][metric] for name in names]).plain()
            for metric in HIGHER_IS_STRONGER
        }
        for group, names in groups.items()
    }


def undecided(results: Mapping[str, Mapping[str, Any]]) -> float:
    """Share of the walks on which not all textures have the same verdict, missed or seen in half of the frames."""
    verdicts = np.array([row["by_walk"]["sequence_success_50"] for row in results.values()])
    return float((verdicts.min(axis=0) != verdicts.max(axis=0)).mean())


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


def run_bench(spec: BenchSpec, work: Path, to: Path) -> dict[str, Any]:
    """Run what is missing of the benchmark, and write its figures to a JSON file."""
    store = Store(work, spec)
    detector, others = load_detector(spec.detector), [load_detector(name) for name in spec.others]
    walks = scenes(TRAIN[: spec.train], spec.fps, spec.size, spec.cloth)
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
        judge = KeptJudge(scenes(TEST[: spec.walks], spec.fps, spec.size, spec.cloth), store.folder)
        subject = Subject(detector, others, hardened, recalibrated)
        strong = {name: textures for name, textures in attacks.items() if name.startswith("sequence-")}
        measured = measure(
            subject, judge, given, {*strong, "frames-0"}, under_lights(TEST[0], spec.fps, spec.size, spec.cloth)
        )
        by_seed = {
            defence: [defended(judge, subject, defence, name, strong[name])["recall"] for name in sorted(strong)]
            for defence in SEEDED
        }
        behind = {}
        for seed in range(spec.seeds):
            for mode, name, images in (
                *((mode, f"{mode}-{seed}", attacks[f"{mode}-{seed}"]) for mode in BASELINES),
                ("sequence", f"tracked-{seed}", tracked[f"tracked-{seed}"]),
            ):
                behind[f"{mode}-{seed}"] = defended(judge, subject, "aggregate", name, images)
        trained = {**controls, **attacks}
        seen = {name: evaluate(detector, walks, textures)["recall"] for name, textures in trained.items()}
        photo = person_photo({"before": detector, "hardened": hardened}, spec.size)
        record = {
            **measured,
            "behind_aggregation": {mode: compare(behind, spec.seeds, mode) for mode in BASELINES},
            "defended_by_seed": by_seed,
            "training_recall": seen,
            "photograph_score": photo,
            "thresholds": {d.name: d.threshold for d in (detector, recalibrated, hardened)},
        }
        save_record(judged, MEASURED, rounded(record))

    store.timed("judge", judge)
    measured = load_record(judged, MEASURED, AGAIN)
    groups = {kind: [kind] for kind in CONTROLS} | {m: [f"{m}-{seed}" for seed in range(spec.seeds)] for m in MODES}
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
        "sequence_against": {mode: compare(measured["results"], spec.seeds, mode) for mode in BASELINES},
        "intervals": intervals(measured["results"], groups),
        "undecided_walks": undecided(measured["results"]),
        **measured,
    }
    save_record(to, FIGURES, rounded(figures))
    return figures
