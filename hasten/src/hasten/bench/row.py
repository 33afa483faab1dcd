"""The one place that knows what a row of a result is: its fields, and the columns that every output makes of them.

A field that is a column says so in its annotation. JSON holds all fields; the terminal, HTML, Markdown and CSV show the
columns, with the headings, units and digits that are declared here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_type_hints

from hasten.bench.labels import sampler_label, short_label

__all__ = ["Baseline", "Column", "Row", "StreamRow", "byte_size", "columns", "late"]

MISSING = "-"  # of a figure that was not measured


@dataclass(frozen=True)
class Column:
    """How a field is shown.

    Attributes:
        heading: above the column.
        tooltip: what the figure is, in a few words.
        unit: `"dB"`, `"s"`; `"B"` (shown as KiB, MiB, ...) and `"%"` (of a share) change how a value is written.
        digits: after the point; None for a number that is usually whole.
        better: whether more or less of it is better, if either.
        wide: shown only where there is room (HTML, CSV).
    """

    heading: str
    tooltip: str
    unit: str = ""
    digits: int | None = 2
    better: Literal["", "more", "less"] = ""
    wide: bool = False

    @property
    def title(self) -> str:
        """Heading and unit."""
        return f"{self.heading} {self.unit}" if self.unit not in ("", "B", "%") else self.heading

    def text(self, value: float | None) -> str:
        """A value as it is shown."""
        if value is None:
            return MISSING
        if self.unit == "B":
            return byte_size(value)
        if self.unit == "%":
            return f"{100 * value:.{self.digits}f} %"
        return f"{value:.4g}" if self.digits is None else f"{value:.{self.digits}f}"

    def best(self, values: Sequence[float | None]) -> float | None:
        """The best of several values; None where there is no better and worse, or nothing to compare."""
        known = [value for value in values if value is not None]
        if not self.better or len(known) < 2:
            return None
        return max(known) if self.better == "more" else min(known)


def byte_size(value: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"


Figure = float | None


@dataclass(kw_only=True)
class Row:
    """One way of sampling, medians over the prompts; one that could not run has no figures but says why in `failed`.

    Attributes:
        id: unique in a result, such as `"hicache-9"`.
        method: as it was asked for, such as `"hicache:order=1"`; `"euler"` for the pipeline's own sampler.
        library: `"hasten"`, `"plain"` or a peer's name.
        params: parameters as they were used.
        budget: number of computed steps that the row was asked to have.
        groups: numbers of computed steps that a table shows it under.
        staged: whether steps run on fewer tokens, so that only counted operations tell what it saves.
        spread: mean, percentiles and counts of the figures over the prompts, by field.
        error_per_step: relative error of the latents after each step, median over the prompts.
        per_prompt: the figures of every prompt.
        images: paths relative to the result.
        note: what a reader has to know about the figures.
        failed: why it could not run.
    """

    id: str
    method: str
    library: str
    params: dict[str, Any] = field(default_factory=dict)
    steps: Annotated[int | None, Column("steps", "steps of the sampler", digits=None, wide=True)] = None
    budget: int | None = None
    groups: list[int] = field(default_factory=list)
    staged: bool = False
    computed_steps: Annotated[
        Figure, Column("computed", "steps whose blocks ran, mean over the prompts", digits=None)
    ] = None
    nfe: Annotated[
        Figure, Column("NFE", "computed forwards of the model, mean over the prompts", digits=None, wide=True)
    ] = None
    flops: int | None = None
    flops_ratio: Annotated[Figure, Column("FLOPs ratio", "counted operations, times fewer than plain")] = None
    steps_ratio: Annotated[Figure, Column("steps ratio", "computed steps, times fewer than plain", wide=True)] = None
    seconds: Annotated[Figure, Column("time", "of one call", unit="s", digits=3, better="less")] = None
    latency_ratio: Annotated[Figure, Column("speed-up", "time, times less than plain", better="more")] = None
    latency_share: Annotated[Figure, Column("share", "speed-up over FLOPs ratio")] = None
    psnr: Annotated[Figure, Column("PSNR", "to the plain sampler's image", unit="dB", better="more")] = None
    ssim: Annotated[Figure, Column("SSIM", "to the same; 1 is identical", digits=4, better="more")] = None
    lpips: Annotated[Figure, Column("LPIPS", "perceptual distance; 0 is identical", digits=4, better="less")] = None
    flip: Annotated[Figure, Column("FLIP", "visible difference; 0 is identical", digits=4, better="less")] = None
    psnr_unedited: Annotated[
        Figure, Column("unedited", "PSNR to the source outside the edit mask", unit="dB", better="more")
    ] = None
    psnr_edited: Annotated[
        Figure, Column("edited", "PSNR to the known target under the mask", unit="dB", better="more")
    ] = None
    temporal_error: Annotated[
        Figure, Column("temporal", "relative error of the differences between frames", digits=4, better="less")
    ] = None
    top1: Annotated[Figure, Column("top-1", "share of images that show what the prompt names")] = None
    cache_bytes: Annotated[int | None, Column("cache", "most bytes of features held at once", unit="B")] = None
    spread: dict[str, dict[str, float | int | None]] = field(default_factory=dict)
    error_per_step: list[float | None] | None = None
    per_prompt: list[dict[str, Any]] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    note: str = ""
    failed: str = ""

    @property
    def name(self) -> str:
        """The method as tables name it."""
        if self.library == "plain":
            return f"plain {sampler_label(self.method)}"
        name = short_label(self.method)
        return name if self.library == "hasten" else f"{name} ({self.library})"

    @property
    def sections(self) -> list[int]:
        """Numbers of computed steps that a table shows the row under."""
        return self.groups or ([] if self.budget is None else [self.budget])


@dataclass(kw_only=True)
class Baseline(Row):
    """The plain sampler with all its steps: the reference of every figure.

    Attributes:
        psnr_unedited_vae: `psnr_unedited` after the way through the VAE and back alone, dB; no edit can do better.
    """

    id: str = "baseline"
    method: str = "euler"
    library: str = "plain"
    psnr_unedited_vae: Figure = None

    @property
    def name(self) -> str:
        return "plain"


@dataclass(kw_only=True)
class StreamRow:
    """One method on a streaming model; medians over the worlds for times, means for the rest.

    Attributes:
        method: its name in the table; the first row of a result is the whole history.
        params: parameters as they were used.
        psnr_curve: dB, by frame.
        seconds_curve: seconds per chunk.
        drift: curves of the grades by name; None where nothing can be said.
        video: path relative to the result.
    """

    method: str
    params: dict[str, Any] = field(default_factory=dict)
    seconds_per_frame: Annotated[float, Column("s/frame", "time per frame", digits=3, better="less")]
    latency_ratio: Annotated[float, Column("speed-up", "time, times less than with the whole history", better="more")]
    attention_seconds: Annotated[
        float, Column("attention s", "attention, choosing and copying, of a rollout", digits=3, wide=True)
    ]
    attention_ratio: Annotated[float, Column("attention", "time for attention, times less", better="more")]
    work_ratio: Annotated[float, Column("work", "pairs of queries and keys, times fewer")]
    kv_ratio: Annotated[float, Column("KV read", "bytes of keys and values, times fewer")]
    overhead: Annotated[float, Column("choosing", "share of the time for attention", unit="%", digits=1)]
    cache_bytes: Annotated[int, Column("held", "keys, values and what they are chosen by, at the end", unit="B")]
    attention_share: Annotated[
        Figure, Column("attention share", "of the time with the whole history", unit="%", digits=0, wide=True)
    ] = None
    most_ratio: Annotated[
        Figure, Column("at most", "speed-up by Amdahl's law, if attention's time falls with its work", wide=True)
    ] = None
    cache_ratio: Annotated[
        Figure, Column("held share", "of keys and values of the whole history", unit="%", digits=0, wide=True)
    ] = None
    peak_bytes: Annotated[int | None, Column("peak", "most held at once, all copies included", unit="B", wide=True)] = (
        None
    )
    psnr: Annotated[
        Figure, Column("PSNR", "to the video with the whole history", unit="dB", digits=1, better="more")
    ] = None
    psnr_curve: list[float] = field(default_factory=list)
    seconds_curve: list[float] = field(default_factory=list)
    drift: dict[str, list[float | None]] = field(default_factory=dict)
    video: str = ""

    @property
    def name(self) -> str:
        """The method as tables name it."""
        return short_label(self.method)


@cache
def columns(kind: type) -> Mapping[str, Column]:
    """The columns of a kind of row, by the name of their field and in the order in which they are shown."""
    found = {name: get_args(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}
    return {name: note for name, notes in found.items() for note in notes if isinstance(note, Column)}


def late(curve: Sequence[float | None]) -> float | None:
    """The mean over the last third of a curve; None if nothing can be said there."""
    known = [value for value in curve[-max(len(curve) // 3, 1) :] if value is not None]
    return sum(known) / len(known) if known else None
