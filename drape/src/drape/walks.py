"""The walks that textures are optimised on, and those, of other gaits, cameras, lights and places, that judge them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from drape.scene.backgrounds import background
from drape.scene.camera import Camera
from drape.scene.cloth import Cloth
from drape.scene.light import light
from drape.scene.scene import Scene
from drape.scene.sequence import SequenceSpec, build_sequence

__all__ = ["TEST", "TRAIN", "Walk", "scenes"]

FPS = 8.0


@dataclass(frozen=True, kw_only=True)
class Walk:
    """One walk by names: see `drape.scene.body.GAITS`, `camera.PATHS`, `light.LIGHTS`, `backgrounds.BACKGROUNDS`."""

    gait: str
    path: str
    light: str
    background: str
    camera: Camera = field(default_factory=Camera)

    def label(self) -> str:
        """What reports call it."""
        return f"{self.gait} {self.path} {self.light} {self.background}"


TRAIN = (
    Walk(gait="normal", path="circle", light="overcast", background="brick"),
    Walk(gait="brisk", path="circle", light="indoor", background="rocket"),
    Walk(gait="brisk", path="towards", light="overcast", background="rocket", camera=Camera(distance=6.5)),
    Walk(gait="normal", path="past", light="indoor", background="brick", camera=Camera(distance=5.4)),
    Walk(gait="normal", path="diagonal", light="overcast", background="rocket", camera=Camera(distance=5.2)),
    Walk(gait="brisk", path="away", light="indoor", background="brick", camera=Camera(distance=6.5)),
)
HIGH, LOW, FAR = Camera(elevation=16.0), Camera(elevation=2.0, distance=4.9), Camera(distance=5.6, elevation=11.0)
BEHIND = Camera(elevation=4.0, distance=7.0)
TEST = (  # gaits, cameras, lights and backgrounds that no optimisation and no fine-tuning saw
    Walk(gait="stroll", path="circle", light="sun", background="grass", camera=FAR),
    Walk(gait="jog", path="circle", light="low_sun", background="gravel", camera=HIGH),
    Walk(gait="heavy", path="circle", light="dusk", background="motorcycle", camera=LOW),
    Walk(gait="stroll", path="towards", light="low_sun", background="motorcycle", camera=HIGH),
    Walk(gait="heavy", path="past", light="sun", background="gravel", camera=FAR),
    Walk(gait="jog", path="away", light="dusk", background="grass", camera=BEHIND),
    Walk(gait="heavy", path="circle", light="low_sun", background="grass", camera=HIGH),
    Walk(gait="stroll", path="circle", light="dusk", background="gravel", camera=LOW),
    Walk(gait="jog", path="circle", light="sun", background="motorcycle", camera=FAR),
    Walk(gait="heavy", path="towards", light="dusk", background="gravel", camera=BEHIND),
    Walk(gait="stroll", path="diagonal", light="sun", background="motorcycle", camera=FAR),
    Walk(gait="jog", path="towards", light="low_sun", background="grass", camera=BEHIND),
)


def scenes(walks: Sequence[Walk], frames: int, size: int, engine: str = "drape") -> list[Scene]:
    """The walks, rendered to buffers (from the cache if they are there); `engine` moves the cloth."""
    cloth = Cloth(engine=engine)
    return [
        Scene(
            walk.label(),
            build_sequence(
                SequenceSpec(
                    gait=walk.gait, path=walk.path, frames=frames, fps=FPS, size=size, camera=walk.camera, cloth=cloth
                )
            ),
            light(walk.light),
            background(walk.background, size),
        )
        for walk in walks
    ]
