"""Small trained reference models of the same classes as the large ones, shipped with the package.

`load("emoji-flux")` gives an unmodified diffusers pipeline, prompts, and a way to grade its pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from hasten.errors import unknown

if TYPE_CHECKING:
    from hasten.streaming.measure import RollOut

__all__ = ["Edit", "ReferenceModel", "StreamingModel", "load", "load_streaming", "names", "streaming_names"]


@dataclass(frozen=True, eq=False)
class Edit:
    """An instruction with the picture that it is for and the picture that it asks for.

    Attributes:
        prompt: the instruction.
        source: `[3, H, W]` float32 in [0, 1].
        target: what a perfect model returns, of the same shape.
        mask: `[H, W]` bool, True where the edit may change something; True everywhere for a global edit.
        kind: whether the edit concerns one object or the whole picture.
    """

    prompt: str
    source: Tensor
    target: Tensor
    mask: Tensor
    kind: Literal["local", "global"]


@dataclass(frozen=True)
class ReferenceModel:
    """A pipeline and what is needed to measure on it.

    Attributes:
        name: as in `load`.
        pipe: an unmodified diffusers pipeline.
        prompts: prompts that the model knows, in an order fit for taking the first few.
        call: arguments for calls, such as height, width and the number of steps.
        grade: for pictures `[B, 3, H, W]` (videos `[B, F, 3, H, W]`) in [0, 1] and their prompts, whether each is what
            its prompt asks for; None if the model has no ground truth.
        edits: for an editing model, one per prompt and in the same order: the sources, targets and masks; else empty.
        learned: files that were fitted to the model and come with it, by name of the method (`"leap"`).
    """

    name: str
    pipe: Any
    prompts: list[str]
    call: dict[str, Any] = field(default_factory=dict)
    grade: Callable[[Tensor, list[str]], list[bool]] | None = None
    edits: list[Edit] = field(default_factory=list)
    learned: dict[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class StreamingModel:
    """A causal video model, which has no diffusers pipeline.

    Attributes:
        name: as in `load_streaming`.
        roller: from frames and steps of the sampler to a way to roll out; see `hasten.streaming.measure`.
    """

    name: str
    roller: Callable[[int, int], RollOut]


def _emoji_flux() -> ReferenceModel:
    from hasten.zoo.emoji_flux import load_emoji_flux

    return load_emoji_flux()


def _emoji_kontext() -> ReferenceModel:
    from hasten.zoo.emoji_kontext import load_emoji_kontext

    return load_emoji_kontext()


def _sprites_wan() -> ReferenceModel:
    from hasten.zoo.sprites_wan import load_sprites_wan

    return load_sprites_wan()


def _sprites_stream() -> StreamingModel:
    from hasten.zoo.sprites_stream.reference import load_sprites_stream

    return load_sprites_stream()


_MODELS: dict[str, Callable[[], ReferenceModel]] = {
    "emoji-flux": _emoji_flux,
    "emoji-kontext": _emoji_kontext,
    "sprites-wan": _sprites_wan,
}
_STREAMING: dict[str, Callable[[], StreamingModel]] = {"sprites-stream": _sprites_stream}


def names() -> list[str]:
    """Names that `load` knows."""
    return list(_MODELS)


def load(name: str) -> ReferenceModel:
    """Load a reference model from the files that the package ships (nothing is downloaded).

    Raises:
        UnknownNameError: for another name.
        ModelError: if the files are missing or damaged.
    """
    if name not in _MODELS:
        raise unknown("reference model", name, _MODELS)
    return _MODELS[name]()


def streaming_names() -> list[str]:
    """Names that `load_streaming` knows."""
    return list(_STREAMING)


def load_streaming(name: str) -> StreamingModel:
    """Load a streaming reference model from the files that the package ships (nothing is downloaded).

    Raises:
        UnknownNameError: for another name.
        ModelError: if the files are missing or damaged.
    """
    if name not in _STREAMING:
        raise unknown("streaming model", name, _STREAMING)
    return _STREAMING[name]()
