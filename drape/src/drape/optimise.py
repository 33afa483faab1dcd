"""Worst-case textures: optimisation over whole sequences, and its control, frame by frame with equal compute.

One step of "sequence" takes one scene. The loss L(d_1, ..., d_T) of the whole walk is differentiated to the confidences
of all its frames, g_t = dL/dd_t, with d_t from a pass without gradients; then B frames, drawn with probabilities p_t
that follow |g_t|, are followed backwards. mean_i g_i d_i / p_i has the gradient of L as its expectation, whatever L is:
windows, variance, or a defence that aggregates over time. The pass over all frames is taken at every `refresh`-th visit
of a scene; in between what earlier visits saw stands in.

One step of "frames", the control, draws single frames from all scenes, each with a change of light of its own, and
takes their mean. A pass forwards counts 1 and one with its way back 3; "frames" gets as many frames as that pays for,
so equal steps are equal compute.

A defence that is a detector (`drape.defences.Purified`, `drape.harden`) is attacked by giving it as the detector, and
aggregation over time by `OptimiseSpec.aggregation`.

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
    aggregated,
    drift,
    ensemble_confidence,
    naturalness,
    photometric,
    sequence_loss,
    smooth_step,
    spread,
)
from drape.progress import steps
from drape.scene.light import Light
from drape.scene.render import render_frames
from drape.scene.sequence import Buffers
from drape.texture import ControlPointTexture

__all__ = ["MODES", "OptimiseSpec", "Run", "Scene", "frame_gradient", "optimise"]

MODES = ("sequence", "frames")
MEMORY = 0.9  # of the running mean of d_t
BACKWARD = 3  # passes that one frame costs when its gradient is taken
LAST_RATE = 0.1  # share of the learning rate that is left at the last step
EVEN = 0.3  # share of the draws that goes evenly to all frames: what is known of them may be old


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
        steps: of Adam.  batch: B, frames a step that gradients are taken of.
        learning_rate: on points in [0, 1], falling to a tenth.
        refresh: visits of a scene from one pass over all its frames to the next; 1 is a pass at every visit.
        aggregation: frames before and after that the defence is reckoned to aggregate over; 0 for none.
        spread: weight of the spread regulariser, 50 in AdvCaT.
        naturalness: weight of staying like a product, for textures that have label maps.
        temporal, drift: weighting of the frames and photometric changes.  seed: of all randomness.
    """

    mode: str = "sequence"
    steps: int = 60
    batch: int = 4
    learning_rate: float = 0.02
    refresh: int = 4
    aggregation: int = 0
    spread: float = 1.0
    naturalness: float = 0.1
    temporal: Temporal = field(default_factory=Temporal)
    drift: Drift = field(default_factory=Drift)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown("mode of optimisation", self.mode, MODES)
        if min(self.steps, self.batch, self.refresh) < 1 or self.learning_rate <= 0:
            raise ConfigError(
                f"steps={self.steps}, batch={self.batch}, refresh={self.refresh}, learning_rate={self.learning_rate}; "
                "expected at least 1 of the first three, and a rate above 0."
            )
        if min(self.spread, self.naturalness, self.aggregation) < 0:
            raise ConfigError(
                f"spread={self.spread}, naturalness={self.naturalness}, aggregation={self.aggregation}; "
                "expected none below 0."
            )
        if self.mode == "frames" and self.aggregation:
            raise ConfigError('mode "frames" knows no neighbouring frames; leave aggregation at 0.')


@dataclass(frozen=True)
class Run:
    """What an optimisation did: mean confidence of the frames it knew at each step, and passes through detectors."""

    confidence: list[float]
    passes: int


@dataclass
class Known:
    """What is known of a scene's frames: the last confidence of each `[T]`, its running mean, and the visits so far."""

    last: Tensor
    running: Tensor
    visits: int = 0


def optimise(
    textures: Mapping[str, ControlPointTexture],
    detectors: Sequence[Detector],
    scenes: Sequence[Scene],
    spec: OptimiseSpec,
    labels: Mapping[str, Tensor] | None = None,
) -> Run:
    """Move the control points of `textures`, in place, so that `detectors` miss the person in `scenes`.

    Args:
        labels: a product's label map for some of the textures; they are kept like it by the weight of naturalness.
    """
    if not textures or not detectors or not scenes:
        raise ConfigError("nothing to optimise: give at least one texture, one detector and one scene.")
    generator = torch.Generator().manual_seed(spec.seed)
    adam = torch.optim.Adam([texture.points for texture in textures.values()], lr=spec.learning_rate)
    known: dict[int, Known] = {}
    seen: list[float] = []
    passes, due = 0, 0.0
    for step in steps(range(spec.steps), f"textures, {spec.mode}"):
        progress = step / max(spec.steps - 1, 1)
        adam.param_groups[0]["lr"] = spec.learning_rate * (1 - (1 - LAST_RATE) * progress)
        images = {name: texture(generator=generator) for name, texture in textures.items()}
        number = step % len(scenes)
        if spec.mode == "sequence":
            loss, d, cost = sequence_step(images, detectors, scenes[number], spec, generator, known, number, progress)
        else:
            total = scenes[number].buffers.frames
            look = total if step // len(scenes) % spec.refresh == 0 else 0  # what "sequence" would take here
            due += (look + BACKWARD * min(spec.batch, total)) / BACKWARD
            count = max(int(due), 1)
            due -= count
            loss, d, cost = frames_step(images, detectors, scenes, count, spec, generator)
        adam.zero_grad()
        (loss + regularisers(textures, spec, labels or {})).backward()
        adam.step()
        for texture in textures.values():
            texture.clamp_points()
        seen.append(float(d.mean()))
        passes += cost * len(detectors)
    return Run(seen, passes)


def regularisers(
    textures: Mapping[str, ControlPointTexture], spec: OptimiseSpec, labels: Mapping[str, Tensor]
) -> Tensor:
    """Spread of the points, and likeness to the products where there are any."""
    total = spec.spread * torch.stack([spread(t) for t in textures.values()]).mean()
    if labels and spec.naturalness:
        total = total + spec.naturalness * torch.stack([naturalness(textures[n], m) for n, m in labels.items()]).mean()
    return total


def frame_gradient(d: Tensor, running: Tensor, spec: OptimiseSpec, progress: float = 1.0) -> Tensor:
    """g_t = dL/dd_t of the walk's loss, behind the aggregation that is reckoned with, `[T]`."""
    with torch.enable_grad():
        leaf = d.detach().clone().requires_grad_()
        weighted_by = aggregated(running.detach(), spec.aggregation)
        loss = sequence_loss(spec.temporal, aggregated(leaf, spec.aggregation), weighted_by, progress)
        (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient


def draw_frames(gradient: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Frames to follow backwards, int64 `[B]`, and what their confidences are multiplied by, `[B]`.

    Systematic draws from probabilities that follow |g_t|: evenly spaced, so that no frame comes more than once more
    often than it should.
    """
    total = len(gradient)
    if count >= total:
        return torch.arange(total), gradient
    size = gradient.abs()
    share = EVEN / total + (1 - EVEN) * size / size.sum().clamp_min(1e-12)
    share = share / share.sum()
    places = (torch.arange(count) + torch.rand(1, generator=generator)) / count
    chosen = torch.searchsorted(share.cumsum(dim=0), places).clamp_max(total - 1)
    return chosen, gradient[chosen] / (share[chosen] * count)


def sequence_step(
    images: Mapping[str, Tensor],
    detectors: Sequence[Detector],
    scene: Scene,
    spec: OptimiseSpec,
    generator: torch.Generator,
    known: dict[int, Known],
    number: int,
    progress: float,
) -> tuple[Tensor, Tensor, int]:
    """A number with the loss's gradient, the confidences that are known of all frames, and the passes that it took."""
    total, cost = scene.buffers.frames, 0
    states = drift(total, 2, spec.drift.coefficient, generator)
    memory = known.get(number)
    if memory is None or memory.visits % spec.refresh == 0:
        with torch.no_grad():
            changed = photometric(scene.render(images), spec.drift, generator, states)
            d = batched(detectors, changed, scene.buffers.boxes, spec.batch)
        running = d if memory is None else MEMORY * memory.running + (1 - MEMORY) * d
        memory = Known(d, running, 0 if memory is None else memory.visits)
        known[number], cost = memory, total
    memory.visits += 1
    chosen, factors = draw_frames(frame_gradient(memory.last, memory.running, spec, progress), spec.batch, generator)
    changed = photometric(scene.render(images, chosen.tolist()), spec.drift, generator, states[chosen])
    part = ensemble_confidence(detectors, changed, scene.buffers.boxes[chosen])
    memory.last = memory.last.index_put((chosen,), part.detach())
    return (factors * part).sum(), memory.last, cost + BACKWARD * len(chosen)


def frames_step(
    images: Mapping[str, Tensor],
    detectors: Sequence[Detector],
    scenes: Sequence[Scene],
    count: int,
    spec: OptimiseSpec,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, int]:
    """Mean loss of `count` single frames from all scenes, their confidences, and the passes that it took."""
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
