"""The objective over a sequence: confidences, temporal weights, regularisers, ensembles.

    L = E_theta [ sum_t w_t softplus(k (d_t - d0)) / k  +  lam_v Var_t(d_t) ]  +  lam_c spread  +  lam_n naturalness

with `d_t` the detector's confidence for the walking person in frame t. Minimising L gives the worst-case texture whose
effect is measured, and against which defences are trained; a number from an attack is reported with a defence beside
it.
The form is our reading of "expectation over transformations with temporal weighting" (arXiv:2511.16020 names it only).

Shapes: `T` frames, `B` frames in a batch, `A` candidates per frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from drape.detectors.base import Candidates, Detector, box_iou
from drape.errors import ConfigError, unknown
from drape.texture import ControlPointTexture

__all__ = [
    "WEIGHTINGS",
    "Temporal",
    "aggregated",
    "confidence",
    "ensemble_confidence",
    "frame_weights",
    "naturalness",
    "sequence_loss",
    "smooth_step",
    "spread",
    "temporal_loss",
    "walks_loss",
]

WEIGHTINGS = ("uniform", "hard", "window", "curriculum", "run")
VARIANTS = {"best": 0.01, "max": 0.1, "smooth": 0.1}  # to the least overlap with the true box that counts
SHARPNESS = 20.0  # of the smooth maximum
SPREAD_CELLS = 40.0


def confidence(found: Candidates, truth: Tensor, variant: str = "max") -> Tensor:
    """d_t, the confidence that the walking person is there, `[B]`, with gradients to the scores.

    Args:
        found: boxes and scores of B frames.  truth: `[B, 4]`, the person's true boxes, in the same pixels.
        variant: "best", the score of the box that overlaps most (if by .01); "max", the largest score among those that
            overlap by .1; "smooth", its log-sum-exp, a little above "max".

    Returns:
        0 where no box overlaps enough.
    """
    if variant not in VARIANTS:
        raise unknown("variant of the confidence", variant, VARIANTS)
    if truth.shape != (len(found.scores), 4):
        raise ConfigError(f"the true boxes have shape {tuple(truth.shape)}; expected {(len(found.scores), 4)}.")
    overlap = box_iou(found.boxes.detach(), truth[:, None]).squeeze(-1)
    counts = overlap >= VARIANTS[variant]
    if variant == "best":
        return (found.scores.gather(1, overlap.argmax(dim=1, keepdim=True)) * counts.any(dim=1, keepdim=True)).squeeze(
            1
        )
    scores = found.scores.masked_fill(~counts, 0.0)
    if variant == "max":
        return scores.amax(dim=1)
    return (SHARPNESS * scores).masked_fill(~counts, -torch.inf).logsumexp(dim=1).clamp_min(0.0) / SHARPNESS


def ensemble_confidence(
    detectors: Sequence[Detector], frames: Tensor, truth: Tensor, variant: str = "smooth", persons: int = 1
) -> Tensor:
    """The mean of d_t over several detectors, `[N]`, each scaled so that .5 is its own threshold.

    Args:
        frames: `[B, 3, S, S]`.  truth: `[N, 4]`, persons' boxes.  persons: in each frame; that of box n is
            n // persons.
    """
    if not detectors:
        raise ConfigError("an ensemble needs at least one detector.")
    owner = torch.arange(len(truth)) // persons
    each = []
    for detector in detectors:
        found = detector(frames)
        mine = found if persons == 1 else Candidates(found.boxes[owner], found.scores[owner])
        each.append(detector.scaled(confidence(mine, truth, variant)))
    return torch.stack(each).mean(dim=0)


@dataclass(frozen=True, kw_only=True)
class Temporal:
    """How the frames of a sequence count.

    Args:
        mode: "uniform"; "hard", weights that are the softmax of kappa times the running mean of d_t; "window", a smooth
            maximum over windows of the mean loss in each; "run", one over windows of the soft minimum in each, which
            is large only where a whole window is seen, and so bounds the longest run; "curriculum", "window" with
            windows that grow from one frame to the whole sequence in the course of the optimisation.
        kappa: sharpness of "hard", "window" and "run", and of `mining`.
        window: frames per window.
        slope, threshold: k and d0 of the smooth step.
        variance: weight of Var_t(d_t).
        mining: share of the weight that goes to walks by the softmax of kappa times their loss; the rest goes evenly.

    Raises:
        UnknownNameError: the mode is none of `WEIGHTINGS`.
        ConfigError: a value is out of range.
    """

    mode: str = "window"
    kappa: float = 10.0
    window: int = 8
    slope: float = 10.0
    threshold: float = 0.3
    variance: float = 0.1
    mining: float = 0.3

    def __post_init__(self) -> None:
        if self.mode not in WEIGHTINGS:
            raise unknown("temporal weighting", self.mode, WEIGHTINGS)
        if not (self.kappa > 0 and self.slope > 0) or self.window < 1 or self.variance < 0:
            raise ConfigError(
                f"kappa={self.kappa}, slope={self.slope}, window={self.window}, variance={self.variance}; "
                "expected kappa and slope above 0, window 1 or more, variance 0 or more."
            )
        if not 0 <= self.mining <= 1:
            raise ConfigError(f"mining={self.mining}; expected a share from 0 to 1.")

    def window_at(self, progress: float, frames: int) -> int:
        """The window's length at a share `progress` of the training, never more than the sequence."""
        if not 0 <= progress <= 1:
            raise ConfigError(f"progress={progress}; expected 0 to 1.")
        grown = 1 + round(progress * (frames - 1)) if self.mode == "curriculum" else self.window
        return min(grown, frames)


def frame_weights(temporal: Temporal, d: Tensor, running: Tensor | None = None, progress: float = 1.0) -> Tensor:
    """Weights w_t that sum to 1, `[T]`, without gradient.

    For the windowed modes they are the gradient of the windowed loss to the losses of the frames, so that a random
    subset of frames can be followed backwards with weights from a pass over all of them.

    Args:
        d: `[T]`, what the frames are weighted by.  running: its running mean, for "hard"; d itself if not given.
    """
    values = d.detach()
    if temporal.mode == "uniform":
        return torch.full_like(values, 1 / len(values))
    if temporal.mode == "hard":
        return (temporal.kappa * (values if running is None else running.detach())).softmax(dim=0)
    length = temporal.window_at(progress, len(values))
    parts = windows(values, length)
    share = (temporal.kappa * window_values(temporal, parts)).softmax(dim=0)
    within = (-temporal.kappa * parts).softmax(dim=1) if temporal.mode == "run" else torch.full_like(parts, 1 / length)
    order = windows(torch.arange(len(values), device=values.device), length)
    return torch.zeros_like(values).index_add(0, order.reshape(-1), (share[:, None] * within).reshape(-1))


def windows(values: Tensor, length: int) -> Tensor:
    """All circular windows of `[T]`, `[T, length]`; circular, so that every frame counts in as many."""
    return torch.cat([values, values[: length - 1]]).unfold(0, length, 1)


def window_values(temporal: Temporal, parts: Tensor) -> Tensor:
    """One value for each window `[N, length]`: its mean, or in mode "run" its soft minimum, which is below the mean."""
    if temporal.mode != "run":
        return parts.mean(dim=1)
    length = torch.tensor(float(parts.shape[1]), dtype=parts.dtype, device=parts.device)
    return (length.log() - (-temporal.kappa * parts).logsumexp(dim=1)) / temporal.kappa


def temporal_loss(temporal: Temporal, values: Tensor, running: Tensor | None = None, progress: float = 1.0) -> Tensor:
    """One number from the losses of all frames `[T]`.

    "window" and "curriculum": (1 / kappa) log mean_windows exp(kappa * mean of the window), at least the mean over
    frames. "run": the same of the windows' soft minima, -(1 / kappa) log mean_t exp(-kappa * loss).
    """
    if values.ndim != 1 or len(values) == 0:
        raise ConfigError(f"the frames' losses have shape {tuple(values.shape)}; expected [T] with at least one frame.")
    if temporal.mode in ("uniform", "hard"):
        return (frame_weights(temporal, values, running) * values).sum()
    means = window_values(temporal, windows(values, temporal.window_at(progress, len(values))))
    count = torch.tensor(float(len(means)), dtype=values.dtype, device=values.device)
    return ((temporal.kappa * means).logsumexp(dim=0) - count.log()) / temporal.kappa


def smooth_step(temporal: Temporal, d: Tensor) -> Tensor:
    """softplus(k (d - d0)) / k: confidences far below the threshold no longer count."""
    return F.softplus(temporal.slope * (d - temporal.threshold)) / temporal.slope


def sequence_loss(temporal: Temporal, d: Tensor, running: Tensor | None = None, progress: float = 1.0) -> Tensor:
    """The loss of one sequence from its confidences `[T]`: weighted smooth steps and the variance."""
    variance = d.var(unbiased=False)
    return temporal_loss(temporal, smooth_step(temporal, d), running, progress) + temporal.variance * variance


def walks_loss(temporal: Temporal, walks: Sequence[Tensor], running: Sequence[Tensor], progress: float = 1.0) -> Tensor:
    """The loss of several sequences: their mean, with a share of the weight (`Temporal.mining`) on those seen most.

    A smooth maximum over the windows of all walks together was tried: it spends the texture on the walk that is seen
    most, and in a trial on one seed fewer walks were missed.

    Args:
        walks, running: the confidences of each sequence `[T]`, and their running means, which the weights follow.
    """
    if not walks or len(walks) != len(running):
        raise ConfigError(f"{len(walks)} sequences, {len(running)} running means; expected one each, and at least one.")
    each = torch.stack([sequence_loss(temporal, d, r, progress) for d, r in zip(walks, running, strict=True)])
    with torch.no_grad():
        known = torch.stack([sequence_loss(temporal, r, r, progress) for r in running])
        weights = (1 - temporal.mining) / len(known) + temporal.mining * (temporal.kappa * known).softmax(dim=0)
    return (weights * each).sum()


def aggregated(d: Tensor, reach: int) -> Tensor:
    """What aggregation over the `reach` frames before makes of confidences `[T]`: a smooth maximum, `[T]`.

    sum_s d_s softmax_s(k d_s) over the frame and those before it, which begin with the sequence; between mean and
    maximum. An attack that knows of `drape.defences.aggregate` is optimised through it.
    """
    if d.ndim != 1 or reach < 0:
        raise ConfigError(f"confidences {tuple(d.shape)}, reach={reach}; expected [T], and 0 or more.")
    if reach == 0:
        return d
    place = torch.arange(len(d), device=d.device)
    age = place[:, None] - place
    away = (age < 0) | (age > reach)
    share = (SHARPNESS * d).expand(len(d), -1).masked_fill(away, -torch.inf).softmax(dim=1)
    return share @ d


def spread(texture: ControlPointTexture, sigma: float = SPREAD_CELLS) -> Tensor:
    """mean_ij exp(-||b_i - b_j||^2 / sigma^2) - 1/n of one colour's points, mean over colours; 0 when far apart.

    `sigma` is in pixels of the expanded texture, 40 as in AdvCaT, whose weight for it is 50.
    """
    points = texture.points_in_cells() * texture.spec.expand
    squared = (points[:, :, None] - points[:, None]).square().sum(dim=-1)
    return (-squared / sigma**2).exp().mean(dim=(1, 2)).mean() - 1 / texture.spec.points


def naturalness(texture: ControlPointTexture, labels: Tensor) -> Tensor:
    """Cross-entropy of the colours' probabilities with a product's label map `[h, w]`; small when they look similar."""
    if labels.shape != (texture.spec.height, texture.spec.width):
        expected = (texture.spec.height, texture.spec.width)
        raise ConfigError(f"the label map has shape {tuple(labels.shape)}; expected {expected}.")
    return F.nll_loss(texture.log_probability()[None], labels[None])
