"""Worst-case textures: optimisation over whole sequences, and its control, frame by frame with equal compute.

The loss of "sequence", `drape.objective.walks_loss`, is differentiated to the confidences of all frames of all walks,
g_t = dL/dd_t; then B frames, drawn with probabilities p_t that follow |g_t|, are followed backwards. mean_i g_i d_i /
p_i has the gradient of the loss as its expectation, whatever L is: windows, variance, or a defence that aggregates over
time. What d_t is comes from a pass over all frames without gradients, taken at every `refresh`-th step, and from the
frames followed since; g_t is taken again with what the drawn frames show before they are followed.

Two baselines see no sequences: "frames" draws single frames from all walks evenly, each with changes of its own
(`drape.transforms`), and takes their mean; "static" does so with one pose per walk, the frame in its middle, which is
what optimising on still images is. All modes take as many passes backwards at each step; those that "sequence" takes
beside that to look are counted (`Run.forward`).

A person fills a small part of a frame, so a pass takes several: cut-outs around them, in the frames' scale, are put
together to a mosaic (as in the training of YOLOv4, arXiv:2004.10934), four to a frame. That is four times the signal
for one pass of the detector. Whole frames are what is judged.

A defence that is a detector (`drape.defences.Purified`, `drape.harden`) is attacked by giving it as the detector, and
aggregation over time by `OptimiseSpec.aggregation`.

The result measures a detector; it is to be reported with a defence beside it (`drape.defences`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from drape.defences import SURE
from drape.detectors.base import Detector
from drape.errors import ConfigError, unknown
from drape.objective import (
    Temporal,
    aggregated,
    ensemble_confidence,
    naturalness,
    smooth_step,
    spread,
    walks_loss,
)
from drape.progress import steps
from drape.scene.scene import Scene
from drape.texture import ControlPointTexture
from drape.transforms import STATES, Transforms, drawn_for, drift, mosaics, shown

__all__ = ["MODES", "OptimiseSpec", "Run", "frame_gradient", "optimise"]

MODES = ("sequence", "frames", "static")
MEMORY = 0.9  # of the running mean of d_t
LAST_RATE = 0.1  # share of the learning rate that is left at the last step
EVEN = 0.3  # share of the draws that goes evenly to all frames: what is known of them may be old


@dataclass(frozen=True, kw_only=True)
class OptimiseSpec:
    """How textures are optimised.

    Args:
        mode: one of `MODES`.
        steps: of Adam.  batch: frames per step that detectors see with a gradient.
        mosaic: cut-outs across such a frame; 1 for the walks' whole frames.
        learning_rate: on points in [0, 1], falling to a tenth.
        refresh: steps from one pass over all frames of all walks to the next; 1 is a pass at every step.
        aggregation: frames before that the defence is reckoned to aggregate over; 0 for none.
        spread: weight of the spread regulariser, 50 in AdvCaT.
        naturalness: weight of staying like a product, for textures that have label maps.
        temporal, transforms: weighting of the frames, and what they are changed by.  seed: of all randomness.
    """

    mode: str = "sequence"
    steps: int = 60
    batch: int = 4
    mosaic: int = 2
    learning_rate: float = 0.02
    refresh: int = 25
    aggregation: int = 0
    spread: float = 1.0
    naturalness: float = 0.1
    temporal: Temporal = field(default_factory=Temporal)
    transforms: Transforms = field(default_factory=Transforms)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown("mode of optimisation", self.mode, MODES)
        if min(self.steps, self.batch, self.refresh) < 1 or not 0 < self.learning_rate < 1e3:
            raise ConfigError(
                f"steps={self.steps}, batch={self.batch}, refresh={self.refresh}, learning_rate={self.learning_rate}; "
                "expected at least 1 of the first three, and a rate above 0."
            )
        if not 1 <= self.mosaic <= 4:
            raise ConfigError(f"mosaic={self.mosaic}; expected 1 to 4 cut-outs across a frame.")
        if min(self.spread, self.naturalness, self.aggregation) < 0:
            raise ConfigError(
                f"spread={self.spread}, naturalness={self.naturalness}, aggregation={self.aggregation}; "
                "expected none below 0."
            )
        if self.mode != "sequence" and self.aggregation:
            raise ConfigError(
                f'mode "{self.mode}" sees single frames, so it cannot know of aggregation over time; take "sequence".'
            )
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"seed={self.seed}; expected 0 up to 2^63.")

    @property
    def views(self) -> int:
        """Frames of walks that one step takes."""
        return self.batch * self.mosaic**2

    def passes(self, views: int) -> int:
        """Frames that a detector sees for so many frames of walks."""
        return -(-views // self.mosaic**2)


@dataclass(frozen=True)
class Run:
    """What an optimisation did.

    Attributes:
        confidence: the mean over the frames that it knew at each step.  highest: the largest of all.
        backward: frames that detectors saw with a gradient.  forward: and without.
    """

    confidence: list[float]
    highest: float
    backward: int
    forward: int

    @property
    def saw_nobody(self) -> bool:
        """Whether the person was found in no frame, so that there was little to optimise."""
        return self.highest < SURE


@dataclass
class Known:
    """What is known of all frames of all walks: the last confidence of each, and its running mean, `[T]` per walk."""

    last: list[Tensor]
    running: list[Tensor]


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
    total = sum(scene.buffers.frames for scene in scenes)
    known: Known | None = None
    seen: list[float] = []
    highest, backward, forward = 0.0, 0, 0
    count = min(spec.views, total)
    for step in steps(range(spec.steps), f"textures, {spec.mode}"):
        progress = step / max(spec.steps - 1, 1)
        adam.param_groups[0]["lr"] = spec.learning_rate * (1 - (1 - LAST_RATE) * progress)
        images = {name: texture(generator=generator) for name, texture in textures.items()}
        if spec.mode == "sequence":
            if step % spec.refresh == 0:
                known = look(images, detectors, scenes, spec, generator, known)
                forward += sum(spec.passes(len(d)) for d in known.last) * len(detectors)
            assert known is not None  # the first step looks
            loss, d = sequence_step(images, detectors, scenes, spec, generator, known, progress)
        else:
            loss, d = frames_step(images, detectors, scenes, count, spec, generator)
        backward += spec.passes(count) * len(detectors)
        adam.zero_grad()
        (loss + regularisers(textures, spec, labels or {})).backward()
        adam.step()
        for texture in textures.values():
            texture.clamp_points()
        seen.append(float(d.mean()))
        highest = max(highest, float(d.max()))
    return Run(seen, highest, backward, forward)


def regularisers(
    textures: Mapping[str, ControlPointTexture], spec: OptimiseSpec, labels: Mapping[str, Tensor]
) -> Tensor:
    """Spread of the points, and likeness to the products where there are any."""
    total = spec.spread * torch.stack([spread(t) for t in textures.values()]).mean()
    if labels and spec.naturalness:
        total = total + spec.naturalness * torch.stack([naturalness(textures[n], m) for n, m in labels.items()]).mean()
    return total


def frame_gradient(
    walks: Sequence[Tensor], running: Sequence[Tensor], spec: OptimiseSpec, progress: float = 1.0
) -> Tensor:
    """g_t = dL/dd_t of the walks' loss, behind the aggregation that is reckoned with, one row for all walks."""
    with torch.enable_grad():
        leaves = [d.detach().clone().requires_grad_() for d in walks]
        through = [aggregated(d, spec.aggregation) for d in leaves]
        weighted_by = [aggregated(d.detach(), spec.aggregation) for d in running]
        gradients = torch.autograd.grad(walks_loss(spec.temporal, through, weighted_by, progress), leaves)
    return torch.cat(gradients)


def draw_frames(gradient: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Frames to follow backwards, int64 `[B]`, and how often each is expected among them, `[B]`.

    Systematic draws from probabilities that follow |g_t|: evenly spaced, so that no frame comes more than once more
    often than it should.
    """
    total = len(gradient)
    if count >= total:
        return torch.arange(total), torch.ones(total)
    size = gradient.abs()
    share = EVEN / total + (1 - EVEN) * size / size.sum().clamp_min(1e-12)
    share = share / share.sum()
    places = (torch.arange(count) + torch.rand(1, generator=generator)) / count
    chosen = torch.searchsorted(share.cumsum(dim=0), places).clamp_max(total - 1)
    return chosen, share[chosen] * count


def look(
    images: Mapping[str, Tensor],
    detectors: Sequence[Detector],
    scenes: Sequence[Scene],
    spec: OptimiseSpec,
    generator: torch.Generator,
    known: Known | None,
) -> Known:
    """A pass without gradients over all frames of all walks."""
    last = []
    with torch.no_grad():
        for number, scene in enumerate(scenes):
            every = torch.arange(scene.buffers.frames)
            states = drift(len(every), STATES, spec.transforms.coefficient, generator)
            drawn = drawn_for(scenes, number, spec.transforms, generator, states)
            parts = []
            for part in every.split(spec.views):
                tiles, boxes = shown(drawn, images, part, spec.transforms, generator, tile_of(scene, spec))
                parts.append(seen_together(detectors, tiles, boxes, spec))
            last.append(torch.cat(parts))
    before = last if known is None else known.running
    return Known(last, [MEMORY * old + (1 - MEMORY) * new for old, new in zip(before, last, strict=True)])


def sequence_step(
    images: Mapping[str, Tensor],
    detectors: Sequence[Detector],
    scenes: Sequence[Scene],
    spec: OptimiseSpec,
    generator: torch.Generator,
    known: Known,
    progress: float,
) -> tuple[Tensor, Tensor]:
    """A number with the gradient of the walks' loss, and what is known of all frames, which it brings up to date.

    The frames of one walk share a drifting light; each walk has its own.
    """
    counts = [len(d) for d in known.last]
    chosen, share = draw_frames(frame_gradient(known.last, known.running, spec, progress), spec.views, generator)
    places = chosen.split(torch.bincount(owner(chosen, counts), minlength=len(scenes)).tolist())
    picked, states, start = [], [], 0
    for place, count in zip(places, counts, strict=True):
        picked.append(place - start)
        states.append(drift(count, STATES, spec.transforms.coefficient, generator))
        start += count
    d = seen_frames(images, detectors, scenes, picked, states, spec, generator)
    for number, part in enumerate(d.detach().split([len(place) for place in picked])):
        here = picked[number]
        old = known.running[number][here]
        known.last[number] = known.last[number].index_put((here,), part)
        known.running[number] = known.running[number].index_put((here,), MEMORY * old + (1 - MEMORY) * part)
    gradient = frame_gradient(known.last, known.running, spec, progress)[chosen]  # with what the frames show now
    return (gradient / share * d).sum(), torch.cat(known.last)


def frames_step(
    images: Mapping[str, Tensor],
    detectors: Sequence[Detector],
    scenes: Sequence[Scene],
    count: int,
    spec: OptimiseSpec,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Mean loss of `count` single frames, from all frames of all walks or one of each, and their confidences."""
    counts = [scene.buffers.frames for scene in scenes]
    if spec.mode == "static":
        numbers = torch.randint(len(scenes), (count,), generator=generator).sort().values
        places = torch.tensor(counts)[numbers] // 2
    else:
        chosen = torch.randint(sum(counts), (count,), generator=generator).sort().values
        numbers = owner(chosen, counts)
        places = chosen - torch.tensor([0, *counts[:-1]]).cumsum(dim=0)[numbers]
    picked = [places[numbers == number] for number in range(len(scenes))]
    states = [torch.randn(frames, STATES, generator=generator) for frames in counts]
    d = seen_frames(images, detectors, scenes, picked, states, spec, generator)
    return smooth_step(spec.temporal, d).mean(), d.detach()


def owner(places: Tensor, counts: Sequence[int]) -> Tensor:
    """The walk that each place in the row of all frames belongs to."""
    return torch.searchsorted(torch.tensor(counts).cumsum(dim=0), places, right=True)


def seen_frames(
    images: Mapping[str, Tensor],
    detectors: Sequence[Detector],
    scenes: Sequence[Scene],
    picked: Sequence[Tensor],
    states: Sequence[Tensor],
    spec: OptimiseSpec,
    generator: torch.Generator,
) -> Tensor:
    """Confidences of some frames of each walk, `picked`, with changes by `states` of all its frames; with gradients."""
    frames, boxes = [], []
    for number, (place, state) in enumerate(zip(picked, states, strict=True)):
        if len(place):
            drawn = drawn_for(scenes, number, spec.transforms, generator, state)
            seen, true = shown(drawn, images, place, spec.transforms, generator, tile_of(scenes[number], spec))
            frames.append(seen)
            boxes.append(true)
    return seen_together(detectors, torch.cat(frames), torch.cat(boxes), spec)


def tile_of(scene: Scene, spec: OptimiseSpec) -> int:
    """The side of a walk's cut-outs."""
    return scene.buffers.size // spec.mosaic


def seen_together(detectors: Sequence[Detector], tiles: Tensor, boxes: Tensor, spec: OptimiseSpec) -> Tensor:
    """Confidences for the persons of tiles `[N, 3, s, s]` in mosaics, `[N]`; `boxes` are theirs, `[N, 4]`."""
    frames, places = mosaics(tiles, boxes, spec.mosaic)
    return ensemble_confidence(detectors, frames, places, persons=spec.mosaic**2)
