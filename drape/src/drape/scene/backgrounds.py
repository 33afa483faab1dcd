"""Photographs behind the person: images without people that scikit-image brings along, and the user's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data
from torch import Tensor

from drape.errors import AssetError, ConfigError, unknown

__all__ = ["BACKGROUNDS", "background", "photo", "plate_from_image", "read_image"]

BACKGROUNDS = ("brick", "grass", "gravel", "coffee", "motorcycle", "rocket")


def photo(name: str) -> np.ndarray:
    """One of scikit-image's photographs as uint8 RGB; grey ones get three channels."""
    if name not in BACKGROUNDS:
        raise unknown("background", name, BACKGROUNDS)
    image = np.asarray(data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)())
    return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image[..., :3]


def plate_from_image(image: np.ndarray, size: int) -> Tensor:
    """The middle square of a uint8 RGB image, `[3, size, size]` in [0, 1]."""
    if image.ndim != 3 or image.shape[2] != 3:
        raise ConfigError(f"the background has shape {image.shape}; expected [height, width, 3] RGB.")
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    square = Image.fromarray(image[top : top + side, left : left + side])
    pixels = np.asarray(square.resize((size, size), Image.Resampling.LANCZOS), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_image(path: Path) -> np.ndarray:
    """An image file as uint8 RGB `[height, width, 3]`.

    Raises:
        AssetError: there is no such file, or it cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise AssetError(f"{path} cannot be read as an image ({error}); give a PNG or JPEG file.") from error


def background(source: str | Path, size: int) -> Tensor:
    """A plate `[3, size, size]` in [0, 1]: a name of `BACKGROUNDS`, or the path of an image."""
    if str(source) in BACKGROUNDS:
        return plate_from_image(photo(str(source)), size)
    if not Path(source).is_file():
        raise AssetError(f"{source} is neither a file nor one of {', '.join(BACKGROUNDS)}; give one of them.")
    return plate_from_image(read_image(Path(source)), size)
