"""Worst-case textures: optimisation over whole sequences, and its control, frame by frame with equal compute.

One step of "sequence" takes one scene, judges all its T frames without gradients for the weights w_t, and follows a
random subset of B frames backwards; (T / B) sum_{t in subset} w_t softplus(k (d_t - d0)) / k is an unbiased estimate of
the weighted loss. One step of "frames", the control, draws single frames from all scenes, each with a change of light
of its own, and takes their mean. A pass forwards counts 1 and one with its way back 3; "frames" gets (T + 3 B) / 3
frames a step, so equal steps are equal compute.

The result measures a detector; it is to be reported with a defence beside it (`drape.defences`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from drape.detectors.base import Detector
from drape.errors import ConfigError, unknown
from drape.objective import (
    Drift,
    Temporal,
    drift,
    ensemble_confidence,
    frame_weights,
    photometric,
    smooth_step,
    spread,
)
from drape.scene.light import Light
from drape.scene.render import render_frames
from drape.scene.sequence import Buffers
from drape.texture import ControlPointTexture

__all__ = ["MODES", "OptimiseSpec", "Run", "Scene", "optimise"]

MODES = ("sequence", "frames")
MEMORY = 0.9  # of the running mean of d_t
BACKWARD = 3  # passes that one frame costs when its gradient is taken


@dataclass(frozen=True)
class Scene:
    """One walk: buffers, light and background `[3, S, S]`; `label` names it in reports."""

    label: str
    buffers: Buffers
    light: Light
    background: Tensor

    def __post_init__(self) -> None:
        if not bool(torch.isfinite(self.buffers.boxes).all()):
            raise ConfigError(
                f"in scene {self.label!r} the person leaves the picture; move the camera away or shorten the walk."
            )

    def render(self, textures: Mapping[str, Tensor], frames: Sequence[int] | None = None) -> Tensor:
        """The frames, `[B, 3, S, S]`."""
        return render_frames(self.buffers, textures, self.light, self.background, frames)


@dataclass(frozen=True, kw_only=True)
class OptimiseSpec:
    """How textures are optimised.

    Args:
        mode: "sequence", or the control "frames".
        steps: of Adam.  batch: B, frames a step that gradients are taken of.  learning_rate: on points in [0, 1].
        spread: weight of the spread regulariser, 50 in AdvCaT.
        temporal, drift: weighting of the frames and photometric changes.  seed: of all randomness.
    """

    mode: str = "sequence"
    steps: int = 60
    batch: int = 8
    learning_rate: float = 0.01
    spread: float = 1.0
    temporal: Temporal = field(default_factory=Temporal)
    drift: Drift = field(default_factory=Drift)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown("mode of optimisation", self.mode, MODES)
        if self.steps < 1 or self.batch < 1 or self.learning_rate <= 0 or self.spread < 0:
            raise ConfigError(
                f"steps={self.steps}, batch={self.batch}, learning_rate={self.learning_rate}, spread={self.spread}; "
                "expected at least 1, at least 1, above 0, and not below 0."
            )


@dataclass(frozen=True)
class Run:
    """What an optimisation did: mean confidence of the frames it saw at each step, and passes through the detectors."""

    confidence: list[float]
    passes: int


def optimise(
    textures: Mapping[str, ControlPointTexture],
    detectors: Sequence[Detector],
    scenes: Sequence[Scene],
    spec: OptimiseSpec,
) -> Run:
    """Move the control points of `textures`, in place, so that `detectors` miss the person in `scenes`."""
    if not textures or not detectors or not scenes:
        raise ConfigError("nothing to optimise: give at least one texture, one detector and one scene.")
    generator = torch.Generator().manual_seed(spec.seed)
    adam = torch.optim.Adam([texture.points for texture in textures.values()], lr=spec.learning_rate)
    running: dict[int, Tensor] = {}
    seen: list[float] = []
    passes = 0
    for step in range(spec.steps):
        images = {name: texture(generator=generator) for name, texture in textures.items()}
        number = step % len(scenes)
        if spec.mode == "sequence":
            progress = step / max(spec.steps - 1, 1)
            loss, d, cost = sequence_step(images, detectors, scenes[number], spec, generator, running, number, progress)
        else:
            loss, d, cost = frames_step(images, detectors, scenes, number, spec, generator)
        adam.zero_grad()
        (loss + spec.spread * torch.stack([spread(t) for t in textures.values()]).mean()).backward()
        adam.step()
        for texture in textures.values():
            texture.clamp_points()
        seen.append(float(d.mean()))
        passes += cost * len(detectors)
    return Run(seen, passes)


def sequence_step(
    images: Mapping[str, Tensor],
    detectors: Sequence[Detector],
    scene: Scene,
    spec: OptimiseSpec,
    generator: torch.Generator,
    running: dict[int, Tensor],
    number: int,
    progress: float,
) -> tuple[Tensor, Tensor, int]:
    """Loss of a random subset of a scene's frames, confidences of all of them, and the passes that it took."""
    total = scene.buffers.frames
    states = drift(total, 2, spec.drift.coefficient, generator)
    with torch.no_grad():
        changed = photometric(scene.render(images), spec.drift, generator, states)
        d = batched(detectors, changed, scene.buffers.boxes, spec.batch)
    running[number] = MEMORY * running.get(number, d) + (1 - MEMORY) * d
    # windowed weights are a gradient to the frames' losses; "hard" ones follow the confidences themselves
    values = d if spec.temporal.mode == "hard" else smooth_step(spec.temporal, d)
    weights = frame_weights(spec.temporal, values, running[number], progress)
    count = min(spec.batch, total)
    chosen = torch.randperm(total, generator=generator)[:count]
    changed = photometric(scene.render(images, chosen.tolist()), spec.drift, generator, states[chosen])
    part = ensemble_confidence(detectors, changed, scene.buffers.boxes[chosen])
    loss = total / count * (weights[chosen] * smooth_step(spec.temporal, part)).sum()
    return loss + spec.temporal.variance * part.var(unbiased=False), d, total + BACKWARD * count


def frames_step(
    images: Mapping[str, Tensor],
    detectors: Sequence[Detector],
    scenes: Sequence[Scene],
    number: int,
    spec: OptimiseSpec,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, int]:
    """Mean loss of single frames from all scenes, their confidences, and the passes; see the module for the number."""
    total = scenes[number].buffers.frames
    count = max(round((total + BACKWARD * min(spec.batch, total)) / BACKWARD), 1)
    which = torch.randint(len(scenes), (count,), generator=generator)
    parts = []
    for index in which.unique().tolist():
        scene = scenes[index]
        chosen = torch.randint(scene.buffers.frames, (int((which == index).sum()),), generator=generator)
        states = torch.randn(len(chosen), 2, generator=generator)
        changed = photometric(scene.render(images, chosen.tolist()), spec.drift, generator, states)
        parts.append(ensemble_confidence(detectors, changed, scene.buffers.boxes[chosen]))
    d = torch.cat(parts)
    return smooth_step(spec.temporal, d).mean(), d.detach(), BACKWARD * count


def batched(detectors: Sequence[Detector], frames: Tensor, boxes: Tensor, batch: int) -> Tensor:
    """Confidences of many frames, a few at a time, `[T]`."""
    pairs = zip(frames.split(batch), boxes.split(batch), strict=True)
    return torch.cat([ensemble_confidence(detectors, f, b) for f, b in pairs])
