"""Photographs behind the person: pictures without people that scikit-image brings along, and the user's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data
from torch import Tensor

from drape.errors import AssetError, ConfigError, unknown

__all__ = ["BACKGROUNDS", "background", "photo", "plate_from_picture"]

BACKGROUNDS = ("brick", "grass", "gravel", "coffee", "motorcycle", "rocket")


def photo(name: str) -> np.ndarray:
    """One of scikit-image's photographs as uint8 RGB; grey ones get three channels."""
    if name not in BACKGROUNDS:
        raise unknown("background", name, BACKGROUNDS)
    picture = np.asarray(data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)())
    return np.repeat(picture[..., None], 3, axis=2) if picture.ndim == 2 else picture[..., :3]


def plate_from_picture(picture: np.ndarray, size: int) -> Tensor:
    """The middle square of a uint8 RGB picture, `[3, size, size]` in [0, 1]."""
    if picture.ndim != 3 or picture.shape[2] != 3:
        raise ConfigError(f"the background has shape {picture.shape}; expected [height, width, 3] RGB.")
    side = min(picture.shape[:2])
    top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
    square = Image.fromarray(picture[top : top + side, left : left + side])
    pixels = np.asarray(square.resize((size, size), Image.Resampling.LANCZOS), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def background(source: str | Path, size: int) -> Tensor:
    """A plate `[3, size, size]` in [0, 1]: a name of `BACKGROUNDS`, or the path of a picture."""
    if str(source) in BACKGROUNDS:
        return plate_from_picture(photo(str(source)), size)
    if not Path(source).is_file():
        raise AssetError(f"{source} is neither a file nor one of {', '.join(BACKGROUNDS)}; give one of them.")
    with Image.open(source) as picture:
        return plate_from_picture(np.asarray(picture.convert("RGB")), size)
