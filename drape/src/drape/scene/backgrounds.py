"""Plates from a user's own images and clips: what is behind the person is then a photograph, or one per frame.

The ground is taken to be everything below the horizon of the walk's camera, lit from everywhere. Where that camera
stood, its height, how far it looks down and how wide it sees, is given (`Walk`), or estimated from people that a
detector found in the clip (`camera_from_people`); `matched` gives the person the photograph's exposure, tint and noise.
A clip's plate without people is the median over its frames.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence
from scipy.optimize import least_squares
from torch import Tensor

from drape.errors import AssetError, ConfigError
from drape.scene.camera import HIGHEST, LOWEST, Camera
from drape.scene.light import Light
from drape.scene.places import Plate
from drape.scene.scene import Scene
from drape.scene.shade import ground_points

__all__ = ["camera_from_people", "matched", "noise_of", "plate_from_file", "plate_from_image", "read_image", "square"]

FEWEST = 3  # frames that a median is taken of
STATURE = 1.72  # metres with shoes, of people in the mean
GREY = 0.42  # what surfaces of a place reflect in the mean (Buchsbaum 1980, "A spatial processor model": grey world)
DIMMEST, BRIGHTEST = 0.25, 1.6  # irradiance that a photograph may be taken to have
TINT = 1.25  # that a channel may be stronger or weaker by than the mean of all


def read_image(path: Path) -> np.ndarray:
    """An image file as uint8 RGB `[height, width, 3]`; of an animated one the median over its frames.

    Raises:
        AssetError: there is no such file, or it cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise AssetError(f"{path} cannot be read as an image ({error}); give a PNG, JPEG or GIF file.") from error
    return frames[0] if len(frames) < FEWEST else np.median(np.stack(frames), axis=0).astype(np.uint8)


def square(image: np.ndarray, size: int) -> Tensor:
    """The middle square of a uint8 RGB image, `[3, size, size]` in [0, 1]."""
    if image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 1:
        raise ConfigError(f"the image has shape {image.shape}; expected [height, width, 3] RGB.")
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    middle = Image.fromarray(image[top : top + side, left : left + side])
    pixels = np.asarray(middle.resize((size, size), Image.Resampling.LANCZOS), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def plate_from_image(image: np.ndarray, size: int, camera: Camera, light: Light) -> Plate:
    """A plate of a photograph `[height, width, 3]`, or of one per frame `[T, height, width, 3]`, uint8 RGB."""
    frames = [square(frame, size) for frame in (image if image.ndim == 4 else image[None])]
    pixels = torch.stack(frames) if image.ndim == 4 else frames[0]
    below = torch.from_numpy(np.isfinite(ground_points(camera, size)[:, 0]).reshape(size, size)).float()
    return Plate(pixels, below, torch.ones(len(light.lamps), size, size), noise_of(frames[0]))


def noise_of(image: Tensor) -> float:
    """Deviation of the noise of an image `[3, S, S]`, by the median answer of a filter that no plane excites.

    The filter is that of Immerkaer 1996, "Fast Noise Variance Estimation"; the median leaves edges out.
    """
    if image.ndim != 3 or min(image.shape[1:]) < 3:
        raise ConfigError(f"the image has shape {tuple(image.shape)}; expected [3, S, S], 3 pixels or more.")
    rough = torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]])
    answer = torch.nn.functional.conv2d(image[:, None].float(), rough[None, None])
    return float(answer.abs().median()) / 0.6745 / float(rough.square().sum().sqrt())


def matched(scene: Scene, plate: Plate) -> Scene:
    """A scene before another plate, with light and noise that fit it.

    The photograph's mean is taken for that of a grey world under the scene's light, whose strength and tint follow from
    it; its direction stays. The person gets as much noise as the photograph has.
    """
    still = plate.still()
    mean = still.flatten(1).mean(dim=1) / GREY
    level = float(mean.mean().clamp(DIMMEST, BRIGHTEST))
    tint = (mean / mean.mean().clamp_min(1e-6)).clamp(1 / TINT, TINT)
    sides = torch.cat([torch.eye(3), -torch.eye(3)])
    now = scene.light.irradiance(sides).mean(dim=0)
    red, green, blue = (float(gain) for gain in level * tint / now)
    return replace(scene, plate=plate, light=scene.light.scaled((red, green, blue)), grain=plate.grain)


def camera_from_people(boxes: Tensor, size: int, fov: float) -> Camera:
    """The height of a clip's camera and how far it looks down, from the boxes of people who stand on the ground.

    Boxes that reach the same row are as tall as each other, and the further down the taller: height and tilt are those
    at which people of the usual stature would fill the boxes best, by robust least squares (Hoiem et al. 2008, "Putting
    Objects in Perspective").

    Args:
        boxes: `[N, 4]` (x0, y0, x1, y1), in the square plate's pixels, of people seen whole, in several distances.
        size: side of the plate.  fov: degrees that it spans.

    Raises:
        ConfigError: fewer than four boxes, or none that give a camera.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4 or len(boxes) < 4:
        raise ConfigError(f"boxes have shape {tuple(boxes.shape)}; expected [N, 4], four people at least.")
    feet, tops = boxes[:, 3].double().numpy(), boxes[:, 1].double().numpy()
    focal = Camera(fov=fov).focal(size)

    def wrong(parameters: np.ndarray) -> np.ndarray:
        height, down = parameters
        below = np.arctan((feet - size / 2) / focal) + down
        away = height / np.tan(np.maximum(below, 1e-2))
        above = np.arctan2(height - STATURE, away) - down
        return np.asarray(size / 2 + focal * np.tan(above) - tops)

    low, high = (LOWEST, np.radians(-5)), (HIGHEST, np.radians(60))
    starts = [(height, np.radians(degrees)) for height in (1.5, 4.0, 9.0) for degrees in (2.0, 12.0, 30.0)]
    fits = [least_squares(wrong, start, bounds=(low, high), loss="soft_l1") for start in starts]
    best = min(fits, key=lambda fit: fit.cost)
    if not np.isfinite(best.x).all():
        raise ConfigError("no camera fits these boxes; give its height and elevation.")
    return Camera(fov=fov, height=round(float(best.x[0]), 2), elevation=round(float(np.degrees(best.x[1])), 2))


def plate_from_file(path: Path, size: int, camera: Camera, light: Light) -> Plate:
    """`plate_from_image` of a file."""
    return plate_from_image(read_image(path), size, camera, light)
