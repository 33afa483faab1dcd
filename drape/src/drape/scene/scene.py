"""One walk as detectors are shown it: geometry, light, and what is behind the person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drape.errors import ConfigError
from drape.scene.light import Light
from drape.scene.render import render_frames
from drape.scene.sequence import Buffers

__all__ = ["Scene"]


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
                f"in scene {self.label!r} the person leaves the image; move the camera away or shorten the walk."
            )

    def render(self, textures: Mapping[str, Tensor], frames: Sequence[int] | None = None) -> Tensor:
        """The frames, `[B, 3, S, S]`."""
        return render_frames(self.buffers, textures, self.light, self.background, frames)
