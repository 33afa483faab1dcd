"""Plates from a user's own images and clips: what is behind the person is then a photograph, or one per frame.

The ground is taken to be everything below the horizon of the walk's camera, lit from everywhere; so a photograph
should be taken from about where that camera stands. A clip's plate without people is the median over its frames.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from drape.errors import AssetError, ConfigError
from drape.scene.camera import Camera
from drape.scene.light import Light
from drape.scene.places import Plate
from drape.scene.shade import ground_points

__all__ = ["plate_from_file", "plate_from_image", "read_image", "square"]

FEWEST = 3  # frames that a median is taken of


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
    return Plate(pixels, below, torch.ones(len(light.lamps), size, size))


def plate_from_file(path: Path, size: int, camera: Camera, light: Light) -> Plate:
    """`plate_from_image` of a file."""
    return plate_from_image(read_image(path), size, camera, light)
