"""What is measured: a *subject* is a pipeline with its prompts and, where there is a ground truth, a grader.

Subjects come from other distributions, through entry points: `hasten.subjects` (pipelines) and
`hasten.streaming_subjects` (causal video models). `hasten-zoo` brings the small trained reference models; anybody can
add one:

    [project.entry-points."hasten.subjects"]
    my-model = "my_package:load_my_model"       # a function without arguments that returns a Subject
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from hasten.bench.rollout import RollOut
from hasten.errors import ModelError, unknown

__all__ = ["Edit", "StreamingSubject", "Subject", "load", "load_streaming", "names", "streaming_names"]

PIPELINES, STREAMING = "hasten.subjects", "hasten.streaming_subjects"
ZOO = "the small trained reference models come with the distribution hasten-zoo: pip install ./zoo (or make setup)"


@dataclass(frozen=True, eq=False)
class Edit:
    """An instruction with the image that it is for and the image that it asks for.

    Attributes:
        prompt: the instruction.
        source: `[3, H, W]` float32 in [0, 1].
        target: what a perfect model returns, of the same shape.
        mask: `[H, W]` bool, True where the edit may change something; True everywhere for a global edit.
        kind: whether the edit concerns one object or the whole image.
    """

    prompt: str
    source: Tensor
    target: Tensor
    mask: Tensor
    kind: Literal["local", "global"]


@dataclass(frozen=True)
class Subject:
    """A pipeline and what is needed to measure on it.

    Attributes:
        name: as in `load`.
        pipe: an unmodified diffusers pipeline.
        prompts: prompts that the model knows, in an order fit for taking the first few.
        call: arguments for calls, such as height, width and the number of steps.
        grade: for images `[B, 3, H, W]` (videos `[B, F, 3, H, W]`) in [0, 1] and their prompts, whether each is what
            its prompt asks for; None if the model has no ground truth.
        edits: for an editing model, one per prompt and in the same order: the sources, targets and masks; else empty.
        fitted: files that were fitted to the model and come with it, by name of the method (`"leap"`).
    """

    name: str
    pipe: Any
    prompts: list[str]
    call: dict[str, Any] = field(default_factory=dict)
    grade: Callable[[Tensor, list[str]], list[bool]] | None = None
    edits: list[Edit] = field(default_factory=list)
    fitted: dict[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class StreamingSubject:
    """A causal video model, which has no diffusers pipeline.

    Attributes:
        name: as in `load_streaming`.
        rollout: from frames and steps of the sampler to a way to roll out; see `hasten.bench.rollout`.
    """

    name: str
    rollout: Callable[[int, int], RollOut]


def _known(group: str) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=group)}


def _load(group: str, kind: str, name: str) -> Any:
    known = _known(group)
    if not known:
        raise ModelError(f"no {kind} is installed; {ZOO}")
    if name not in known:
        raise unknown(kind, name, known)
    return known[name].load()()


def names() -> list[str]:
    """Names that `load` knows."""
    return sorted(_known(PIPELINES))


def load(name: str) -> Subject:
    """Load an installed subject (nothing is downloaded).

    Raises:
        UnknownNameError: for another name.
        ModelError: if no subject is installed, or its files are missing or damaged.
    """
    subject: Subject = _load(PIPELINES, "reference model", name)
    return subject


def streaming_names() -> list[str]:
    """Names that `load_streaming` knows."""
    return sorted(_known(STREAMING))


def load_streaming(name: str) -> StreamingSubject:
    """Load an installed streaming subject (nothing is downloaded).

    Raises:
        UnknownNameError: for another name.
        ModelError: if no subject is installed, or its files are missing or damaged.
    """
    subject: StreamingSubject = _load(STREAMING, "streaming model", name)
    return subject
