"""Adversarial fine-tuning of a detector: the defence that is trained, and files of the weights it changed.

In rounds, worst-case textures are optimised against the detector as it is by then and join a pool; then the last layers
learn to see the person in them. What they should see comes from the detector itself before any change, the teacher:

    attacked frame: what the teacher gives for the same frame in plain clothes
    clean frame, photograph: what the teacher gives for just that, so that clean detections stay as they are

so no labels are needed, and every detector with candidates can be hardened. At the end its threshold is set again, so
that clean walks give no more false boxes than they gave before (`drape.calibrate`).

With scores s, q and boxes b, b' of student and teacher, the loss of a frame is
(sum KL(q, s) + box sum q (1 - IoU(b, b'))) / (1 + sum q). Adversarial training is that of Madry et al.
(arXiv:1706.06083), with clothing in place of pixel noise as in patch-based adversarial training.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from drape.calibrate import scores_of_false_boxes, threshold_keeping
from drape.controls import CONTROLS, control, random_textures
from drape.detectors.base import Candidates, Detector, box_iou
from drape.detectors.registry import load_detector
from drape.errors import AssetError, ConfigError, DetectorError
from drape.gamut import Gamut
from drape.io import check_output, load_arrays, save_arrays
from drape.optimise import OptimiseSpec, optimise
from drape.progress import steps
from drape.scene.scene import Scene
from drape.transforms import Transforms, photometric

__all__ = ["HardenSpec", "Hardened", "distillation_loss", "harden", "load_hardened", "save_hardened"]

Textures = Mapping[str, Tensor]
KIND = "drape's fine-tuned weights"
BOX = 2.0  # weight of the boxes against the scores
LARGEST_STEP = 1.0  # norm that gradients are clipped to


@dataclass(frozen=True, kw_only=True)
class HardenSpec:
    """How a detector is fine-tuned.

    Args:
        rounds: of attack and fine-tuning.  attack_steps: of the texture's optimisation in each round.
        steps: of Adam on the weights in each round.  batch: attacked frames per step, and as many clean ones.
        learning_rate: of the weights, falling to a tenth.  tuned: share of the weight tensors, from the last one on.
        seed: of all randomness.
    """

    rounds: int = 3
    attack_steps: int = 24
    steps: int = 30
    batch: int = 3
    learning_rate: float = 3e-4
    tuned: float = 0.6
    seed: int = 100

    def __post_init__(self) -> None:
        if min(self.rounds, self.attack_steps, self.steps, self.batch) < 1:
            raise ConfigError(
                f"rounds={self.rounds}, attack_steps={self.attack_steps}, steps={self.steps}, batch={self.batch}; "
                "expected at least 1 each."
            )
        if self.learning_rate <= 0 or not 0 < self.tuned <= 1:
            raise ConfigError(f"learning_rate={self.learning_rate}, tuned={self.tuned}; expected above 0, and (0, 1].")


@dataclass(frozen=True)
class Hardened:
    """A fine-tuned detector, frozen, with a threshold of its own, and the loss of each step."""

    detector: Detector
    loss: list[float]


def distillation_loss(found: Candidates, target: Candidates) -> Tensor:
    """How far candidates `[B, A]` are from the teacher's; see the module's head."""
    if found.scores.shape != target.scores.shape:
        raise ConfigError(
            f"scores {tuple(found.scores.shape)} and {tuple(target.scores.shape)} differ in shape; the teacher must be "
            "the same kind of detector, and give the same candidates for every frame."
        )
    q = target.scores.clamp(0, 1)
    scores = F.binary_cross_entropy(found.scores.clamp(1e-6, 1 - 1e-6), q, reduction="none")
    scores = scores - F.binary_cross_entropy(q.clamp(1e-6, 1 - 1e-6), q, reduction="none")  # 0 where they agree
    overlap = box_iou(found.boxes[:, :, None], target.boxes[:, :, None])[..., 0, 0]
    return ((scores + BOX * q * (1 - overlap)).sum(dim=1) / (1 + q.sum(dim=1))).mean()


class Teacher:
    """What the detector gives before any change, for all frames of the scenes in clean clothes and for photographs."""

    def __init__(self, detector: Detector, scenes: Sequence[Scene], clothes: Mapping[str, Textures]) -> None:
        self.detector, self.scenes, self.clothes = detector, scenes, clothes
        self.photos = torch.stack([scene.plate.still() for scene in scenes])  # no other places: those judge
        self.of_photos = self.see(self.photos)
        self.seen: dict[tuple[int, str], Candidates] = {}

    def see(self, frames: Tensor) -> Candidates:
        """Candidates without gradients, one frame at a time."""
        with torch.no_grad():
            found = [self.detector(frame[None]) for frame in frames]
        return Candidates(torch.cat([f.boxes for f in found]), torch.cat([f.scores for f in found]))

    def of_walk(self, number: int, kind: str, chosen: Tensor) -> Candidates:
        """Candidates of some frames of a scene in clean clothes; all frames are looked at once."""
        if (number, kind) not in self.seen:
            with torch.no_grad():
                frames = self.scenes[number].render(self.clothes[kind])
            self.seen[number, kind] = self.see(frames)
        known = self.seen[number, kind]
        return Candidates(known.boxes[chosen], known.scores[chosen])


def check_trainable(detector: Detector) -> None:
    """Refuse a detector without weights before any work.

    Raises:
        DetectorError: it has none, such as one that onnxruntime runs.
    """
    if not detector.weights():
        raise DetectorError(
            f"{detector.name} has no weights that fine-tuning could change; give a torch module (an ONNX file becomes "
            "one with onnx2torch)."
        )


def harden(
    detector: Detector, scenes: Sequence[Scene], gamut: Gamut, spec: HardenSpec, attack: OptimiseSpec
) -> Hardened:
    """A fine-tuned copy of a detector; the one given stays as it is.

    Args:
        scenes: walks to attack and learn on; evaluate on others.
        attack: how textures are optimised in each round; steps and seed are the spec's.
    """
    if not scenes:
        raise ConfigError("nothing to learn from: give at least one scene.")
    check_trainable(detector)
    student = copy.deepcopy(detector)
    student.name = f"{detector.name}+hardened"
    generator = torch.Generator().manual_seed(spec.seed)
    teacher = Teacher(detector, scenes, {kind: control(kind, gamut) for kind in CONTROLS})
    weights = student.weights()
    tuned = weights[len(weights) - max(round(spec.tuned * len(weights)), 1) :]
    adam = torch.optim.Adam(tuned, lr=spec.learning_rate)
    falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.1, total_iters=spec.rounds * spec.steps)
    pool: list[Textures] = []
    losses: list[float] = []
    for number in range(spec.rounds):
        pool.append(attack_once(student, scenes, gamut, spec, attack, spec.seed + number))
        for parameter in tuned:
            parameter.requires_grad_(True)
        for step in steps(range(spec.steps), f"fine-tuning, round {number + 1} of {spec.rounds}"):
            # every other step takes the newest textures, so that the round learns what it was made for
            worst = pool[-1] if step % 2 == 0 else pool[int(torch.randint(len(pool), (1,), generator=generator))]
            loss = learning_loss(student, teacher, worst, step, spec.batch, generator)
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(tuned, LARGEST_STEP)
            adam.step()
            falling.step()
            losses.append(float(loss.detach()))
        student.freeze()
    clean = list(teacher.clothes.values())
    before, after = (scores_of_false_boxes(model, scenes, clean) for model in (detector, student))
    student.threshold = threshold_keeping(before, after, detector.threshold)
    return Hardened(student, losses)


def attack_once(
    student: Detector, scenes: Sequence[Scene], gamut: Gamut, spec: HardenSpec, attack: OptimiseSpec, seed: int
) -> dict[str, Tensor]:
    """Textures that are the worst ones for the detector as it is now."""
    textures = random_textures(gamut, seed)
    optimise(textures, [student], scenes, replace(attack, steps=spec.attack_steps, seed=seed))
    return {name: texture(hard=True).detach() for name, texture in textures.items()}


def learning_loss(
    student: Detector, teacher: Teacher, worst: Textures, step: int, batch: int, generator: torch.Generator
) -> Tensor:
    """The loss of one step: attacked frames, clean frames, and a photograph without people."""
    number = step % len(teacher.scenes)
    scene = teacher.scenes[number]
    kinds = list(teacher.clothes)
    kind = kinds[step // len(teacher.scenes) % len(kinds)]
    attacked, clean = (torch.randint(scene.buffers.frames, (batch,), generator=generator) for _ in range(2))
    photo = torch.randint(len(teacher.photos), (1,), generator=generator)
    with torch.no_grad():
        frames = torch.cat(
            [
                photometric(scene.render(worst, attacked.tolist()), Transforms(), generator),
                scene.render(teacher.clothes[kind], clean.tolist()),
                teacher.photos[photo],
            ]
        )
    targets = [
        teacher.of_walk(number, "plain", attacked),
        teacher.of_walk(number, kind, clean),
        Candidates(teacher.of_photos.boxes[photo], teacher.of_photos.scores[photo]),
    ]
    target = Candidates(torch.cat([t.boxes for t in targets]), torch.cat([t.scores for t in targets]))
    return distillation_loss(student(frames), target)


def save_hardened(path: Path, hardened: Detector, base: str, spec: HardenSpec) -> None:
    """Keep the threshold, and the weights that differ from those of the detector named `base`, in one `.npz` file."""
    check_output(path, ".npz")
    before = load_detector(base).state_dict()
    after = hardened.state_dict()
    if before.keys() != after.keys():
        raise ConfigError(f"{hardened.name} does not come from {base}; name the detector that was fine-tuned.")
    arrays = {name: value.numpy() for name, value in after.items() if not torch.equal(value, before[name])}
    about = {"base": base, "name": hardened.name, "threshold": hardened.threshold, "spec": asdict(spec)}
    save_arrays(path, KIND, arrays, about)


def load_hardened(path: Path, base: str | None = None) -> Detector:
    """A fine-tuned detector: the pretrained one with the weights that `save_hardened` kept.

    Args:
        base: the detector that it must be a fine-tuned copy of; any if not given.

    Raises:
        AssetError: the file is missing, is of another kind, or has weights that do not fit.
        ConfigError: it belongs to another detector.
    """
    arrays, about = load_arrays(path, KIND, f"make it with `drape harden --to {path}`")
    found = str(about["base"])
    if base is not None and found != base:
        raise ConfigError(f"{path} is a fine-tuned {found}, not {base}; give --detector {found}, or harden {base}.")
    detector = load_detector(found)
    state = detector.state_dict()
    for name, value in arrays.items():
        if name not in state or state[name].shape != value.shape:
            raise AssetError(f"{path}: {name} does not fit {found}; make the file again with `drape harden`.")
        if not np.isfinite(value).all():
            raise AssetError(f"{path}: {name} has values that are not finite; make the file again with `drape harden`.")
    detector.load_state_dict({**state, **{name: torch.from_numpy(value) for name, value in arrays.items()}})
    detector.name, detector.threshold = str(about["name"]), float(about["threshold"])
    detector.freeze()
    return detector
