"""One walk as detectors are shown it: geometry, light, and what is behind the person."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drape.errors import ConfigError
from drape.scene.light import Light
from drape.scene.places import Plate
from drape.scene.render import Relight, chosen_frames, coverage, render_frames
from drape.scene.sequence import Buffers

__all__ = ["Scene"]


@dataclass(frozen=True)
class Scene:
    """One walk.

    Args:
        label: its name in reports.  buffers, light: the geometry, and the light that its shadows were made for.
        plate: what is behind the person.  grain: deviation of the camera's noise, the same for person and plate; of a
            plate that has some already only the rest is added to it.
    """

    label: str
    buffers: Buffers
    light: Light
    plate: Plate
    grain: float = 0.0

    def __post_init__(self) -> None:
        if not bool(torch.isfinite(self.buffers.boxes).all()):
            raise ConfigError(
                f"in scene {self.label!r} the person leaves the image; move the camera away or shorten the walk."
            )

    def render(
        self, textures: Mapping[str, Tensor], frames: Sequence[int] | None = None, relight: Relight | None = None
    ) -> Tensor:
        """The frames, `[B, 3, S, S]`; the noise of a frame is always the same.

        Args:
            relight: another light on the person alone (`drape.transforms`).
        """
        result = render_frames(self.buffers, textures, self.light, self.plate, frames, relight)
        if self.grain == 0:
            return result
        chosen = chosen_frames(self.buffers, frames)
        noise = torch.stack([self.noise(frame) for frame in chosen])
        if self.plate.grain > 0:
            rest = max(self.grain**2 - self.plate.grain**2, 0.0) ** 0.5 / self.grain
            person = coverage(self.buffers, chosen)
            noise = noise * (person + rest * (1 - person))
        return (result + self.grain * noise.to(result)).clamp(0, 1)

    def noise(self, frame: int) -> Tensor:
        """Unit noise of a frame, `[3, S, S]`."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.label} {frame}".encode()))
        return torch.randn(3, self.buffers.size, self.buffers.size, generator=generator)
