"""What a streaming method saves and what it costs: time, work, bytes, likeness to the full history, drift.

`measure` rolls the same worlds out with each method in turn, seed after seed, so that a drifting machine hits all
methods alike, and compares every video with that of the full history from the same noise.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from hasten.bench.arms import one_line
from hasten.bench.row import StreamRow
from hasten.errors import ConfigError, ModelError
from hasten.streaming.method import StreamingMethod
from hasten.streaming.methods.full import FullHistory
from hasten.streaming.stats import StreamStats

__all__ = ["REFERENCE", "RollOut", "Rolled", "Watch", "amdahl", "fidelity", "mean_curves", "measure"]

REFERENCE = "full history"
BEST = 100.0  # dB, for equal images

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Rolled:
    """One rollout.

    Attributes:
        video: `[B, F, 3, H, W]` in [0, 1].
        chunk_seconds: for each chunk.
        stats: of the rollout's stream.
        grades: curves by name for each video of the batch, such as identity over time; NaN where nothing can be said.
    """

    video: Tensor
    chunk_seconds: Sequence[float]
    stats: StreamStats
    grades: Sequence[Mapping[str, Sequence[float]]] = ()


RollOut = Callable[[StreamingMethod, int], Rolled]
"""Rolls out with a method and a seed; the seed alone decides the noise and what is drawn."""

Watch = Callable[[str, int, Rolled], None]
"""Is told of every rollout: its method's name, the seed, what came of it."""


def fidelity(video: Tensor, reference: Tensor) -> Tensor:
    """PSNR of each frame against a reference, dB, `[B, F]`; 100 for equal frames.

    Args:
        video, reference: `[B, F, 3, H, W]` in [0, 1].

    Raises:
        ConfigError: for different shapes.
    """
    if video.shape != reference.shape or video.ndim != 5:
        raise ConfigError(f"expected two videos [B, F, 3, H, W], got {list(video.shape)} and {list(reference.shape)}")
    error = (video.double() - reference.double()).square().mean((2, 3, 4))
    return (-10 * error.clamp(min=10 ** (-BEST / 10)).log10()).float()


def mean_curves(curves: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float | None]]:
    """Curves by name, averaged point by point over those that have a value there; None where none has."""
    if not curves:
        return {}
    means = {
        name: torch.tensor([list(curve[name]) for curve in curves], dtype=torch.float64).nanmean(0).tolist()
        for name in curves[0]
    }
    return {name: [None if math.isnan(value) else value for value in mean] for name, mean in means.items()}


def measure(
    roll_out: RollOut,
    methods: Mapping[str, StreamingMethod],
    seeds: Sequence[int],
    watch: Watch | None = None,
    failures: dict[str, str] | None = None,
) -> list[StreamRow]:
    """A row for the full history and for each method.

    Args:
        roll_out: see `RollOut`; it is called once for each method and seed, and once before as a warm-up.
        methods: by the names that the table gives them.
        seeds: at least one.
        watch: see `Watch`.
        failures: gets why a method could not be rolled out, by its name; it has no row then. Without it the error is
            raised.

    Raises:
        ConfigError: without seeds, or for a method named like the reference.
        ModelError: if a video has numbers that are not finite.
    """
    if not seeds or REFERENCE in methods:
        raise ConfigError(
            f"expected at least one seed and no method named {REFERENCE!r}, which is measured in any case"
        )
    arms: dict[str, StreamingMethod] = {REFERENCE: FullHistory(), **methods}
    roll_out(arms[REFERENCE], seeds[0])
    rolled: dict[str, list[Rolled]] = {name: [] for name in arms}
    likeness: dict[str, list[Tensor]] = {name: [] for name in arms}
    for seed in seeds:
        for name, method in list(arms.items()):
            try:
                result = roll_out(method, seed)
                if not bool(result.video.isfinite().all()):
                    raise ModelError(f"the video of {name} with seed {seed} has values that are not finite")
            except Exception as error:  # the other methods can be measured
                if name == REFERENCE or failures is None:
                    raise
                log.warning("%s cannot be measured", name, exc_info=error)
                failures[name] = one_line(error)
                del arms[name]
                continue
            reference = rolled[REFERENCE][-1].video if name != REFERENCE else result.video
            likeness[name].append(fidelity(result.video, reference))
            rolled[name].append(result)
            if watch is not None:
                watch(name, seed, result)
    return [_row(name, rolled[name], torch.cat(likeness[name]), rolled[REFERENCE]) for name in arms]


def amdahl(share: float, ratio: float) -> float:
    """Times faster that a whole can be at most, of which a `share` in [0, 1] becomes `ratio` times faster."""
    return 1 / (1 - share + share / ratio)


def _attention(rolled: Rolled) -> float:
    return rolled.stats.seconds


def _row(name: str, rolled: Sequence[Rolled], likeness: Tensor, reference: Sequence[Rolled]) -> StreamRow:
    frames = rolled[0].video.shape[1]
    seconds, attention = (median(map(f, rolled)) for f in (lambda r: sum(r.chunk_seconds), _attention))
    full_seconds, full_attention = (median(map(f, reference)) for f in (lambda r: sum(r.chunk_seconds), _attention))
    stats = [r.stats for r in rolled]
    share, work = full_attention / full_seconds, sum(s.full_pairs for s in stats) / sum(s.pairs for s in stats)
    return StreamRow(
        method=name,
        seconds_per_frame=seconds / frames,
        attention_seconds=attention,
        latency_ratio=full_seconds / seconds,
        attention_ratio=full_attention / attention,
        work_ratio=work,
        kv_ratio=sum(s.full_kv_bytes for s in stats) / sum(s.kv_bytes for s in stats),
        attention_share=share,
        most_ratio=amdahl(share, work),
        overhead=median(s.overhead for s in stats),
        cache_bytes=max(s.cache_bytes for s in stats),
        cache_ratio=max(s.cache_bytes / s.full_cache_bytes for s in stats),
        peak_bytes=max(s.peak_bytes for s in stats),
        psnr=None if name == REFERENCE else float(likeness.mean()),
        psnr_curve=likeness.mean(0).tolist(),
        seconds_curve=[median(times) for times in zip(*(r.chunk_seconds for r in rolled), strict=True)],
        drift=mean_curves([grades for r in rolled for grades in r.grades]),
    )
