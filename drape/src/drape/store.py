"""What a long measurement has made so far, in a folder, so that one that was stopped goes on where it was.

Textures, weights and thresholds have a file each, detections one for each detector, texture and walk. All are written
atomically.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drape.calibrate import scores_of_false_boxes, threshold_keeping
from drape.controls import load_images, random_textures, save_images
from drape.detectors.base import Detection, Detector
from drape.errors import AssetError, ConfigError
from drape.evaluate import Judge
from drape.gamut import Gamut
from drape.harden import HardenSpec, harden, load_hardened, save_hardened
from drape.io import load_arrays, load_record, save_arrays, save_record, write_text
from drape.optimise import OptimiseSpec, optimise
from drape.parallel import mapped
from drape.progress import note
from drape.scene.scene import Scene

__all__ = ["KeptJudge", "Store"]

KIND, RUN, THRESHOLD = (f"drape's {what}" for what in ("detections", "optimisation", "threshold"))
AGAIN = "delete it and the file of its seconds beside it, and it will be made again"
Order = tuple[str, Sequence[Detector], OptimiseSpec]  # a name, what is attacked, and how


class Store:
    """What a run has made so far, in a folder.

    Args:
        folder: made if missing.  settings: plain values; a folder of another run is refused.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        text = json.dumps(settings, indent=1)
        known = folder / "spec.json"
        if known.exists() and known.read_text(encoding="utf-8", errors="replace") != text:
            raise ConfigError(f"{folder} holds a run with other settings; delete it or name another folder.")
        write_text(known, text)

    def missing(self, name: str) -> bool:
        """Whether a step has not been run to its end."""
        return not (self.folder / f"{name}.seconds").exists()

    def finished(self, name: str, seconds: float) -> None:
        """Note that a step was run, and the processor's seconds."""
        write_text(self.folder / f"{name}.seconds", f"{seconds:.1f}")

    def timed(self, name: str, make: Callable[[], None]) -> None:
        """Run a step unless it was run before."""
        if self.missing(name):
            note(name)
            start = time.process_time()
            make()
            self.finished(name, time.process_time() - start)

    def seconds(self) -> dict[str, float]:
        """Processor seconds of every step; of one that was stopped and went on, those of its last part."""
        return {path.stem: _seconds(path) for path in sorted(self.folder.glob("*.seconds"))}

    def textures(self, orders: Sequence[Order], walks: Sequence[Scene], jobs: int = 1) -> dict[str, dict[str, Tensor]]:
        """Optimised textures by name; those that are not there are made, in several processes if asked."""
        wanted = [order for order in orders if self.missing(order[0])]
        made = mapped(made_textures, ((order, walks) for order in wanted), jobs)
        for (name, _, _), (images, record, seconds) in zip(wanted, made, strict=True):
            save_images(self.folder / f"{name}.npz", images)
            save_record(self.folder / f"{name}.run.json", RUN, record)
            self.finished(name, seconds)
            note(name)
        return {name: load_images(self.folder / f"{name}.npz") for name, _, _ in orders}

    def passes(self) -> dict[str, dict[str, int]]:
        """Frames that the detectors saw in each optimisation, with and without a gradient."""
        found = sorted(self.folder.glob("*.run.json"))
        return {p.name.removesuffix(".run.json"): load_record(p, RUN, AGAIN)["passes"] for p in found}

    def hardened(
        self, detector: Detector, base: str, walks: Sequence[Scene], spec: HardenSpec, attack: OptimiseSpec
    ) -> Detector:
        """The fine-tuned detector, made if it is not there; `base` is the name that it is loaded by."""
        path = self.folder / "hardened.weights.npz"

        def make() -> None:
            done = harden(detector, walks, Gamut.proxy(), spec, attack)
            save_hardened(path, done.detector, base, spec)
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


def made_textures(item: tuple[Order, Sequence[Scene]]) -> tuple[dict[str, Tensor], dict[str, Any], float]:
    """Images of one order, what its optimisation did, and the processor's seconds."""
    (_, detectors, spec), walks = item
    start = time.process_time()
    textures = random_textures(Gamut.proxy(), spec.seed)
    run = optimise(textures, detectors, walks, spec)
    images = {garment: texture(hard=True).detach() for garment, texture in textures.items()}
    record = {"passes": {"backward": run.backward, "forward": run.forward}, "confidence": run.confidence}
    return images, record, time.process_time() - start


def _seconds(path: Path) -> float:
    try:
        return float(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AssetError(f"{path} holds no number of seconds; delete it, and its step will run again.") from error


class KeptJudge(Judge):
    """A judge that keeps what it sees in a folder, one file for each detector, texture and walk.

    Args:
        scenes, jobs: as of a `Judge`.  folder: of the walks; `part` says which of several sets they are.
    """

    def __init__(self, scenes: Sequence[Scene], folder: Path, jobs: int = 1, part: str = "seen") -> None:
        super().__init__(scenes, jobs)
        self.folder, self.part = folder / part, part

    def path(self, detector: Detector, name: str, number: int) -> Path:
        """The file of one walk."""
        told = re.sub(r"[^a-z0-9+-]+", "_", f"{detector.name} {name}".lower())
        return self.folder / told / f"{number}.npz"

    def kept(self, detector: Detector, name: str, number: int) -> list[Detection] | None:
        path = self.path(detector, name, number)
        return read_walk(path) if path.exists() else None

    def keep(self, detector: Detector, name: str, number: int, walk: list[Detection]) -> None:
        keep_walk(self.path(detector, name, number), walk)


def keep_walk(path: Path, walk: Sequence[Detection]) -> None:
    """The detections of one walk as one file."""
    arrays = {
        "boxes": torch.cat([d.boxes for d in walk]).numpy(),
        "scores": torch.cat([d.scores for d in walk]).numpy(),
        "counts": np.array([len(d.scores) for d in walk]),
    }
    save_arrays(path, KIND, arrays)


def read_walk(path: Path) -> list[Detection]:
    """Detections that `keep_walk` kept."""
    stored, _ = load_arrays(path, KIND, "delete it, and the walk will be judged again")
    counts = stored["counts"].tolist()
    boxes, scores = (torch.from_numpy(stored[name]).split(counts) for name in ("boxes", "scores"))
    return list(itertools.starmap(Detection, zip(boxes, scores, strict=True)))
