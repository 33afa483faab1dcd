"""Colours a printer can make: a gamut projection `G(rgb)` as a 33^3 table, and palettes locked to its fixed points.

`Gamut.from_profile` sends an RGB grid through an ICC profile and back (relative colorimetric) with LittleCMS, the
engine
of Pillow. `Gamut.proxy` needs no profile: it limits the chroma in CIELAB to a fixed convex body; results made with it
carry the name "proxy gamut". The paper (arXiv:2511.16020) only names "ICC locking"; this reading of it is ours.

A round trip through measured tables is not exactly a projection: G(G(c)) may differ from G(c) by a level or two. `lock`
therefore repeats G until nothing moves, and refuses colours that never come to rest.

Colours are sRGB in [0, 1], float32, with the three channels in the last axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms
from skimage.color import lab2rgb, rgb2lab
from torch import Tensor

from drape.errors import GamutError

__all__ = ["GRID", "Gamut"]

GRID = 33
LEVEL = 1 / 255
MAX_CHROMA = 62.0  # of the proxy, at mid lightness: about what dyed polyester prints reach on their weakest hues
LIGHTNESS = (16.0, 93.0)  # black and white of a print on cloth


def rgb_grid() -> np.ndarray:
    """All colours of the table, float64 `[33, 33, 33, 3]`, red slowest."""
    axis = np.linspace(0.0, 1.0, GRID)
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)


def proxy_limit(rgb: np.ndarray) -> np.ndarray:
    """Clip the lightness and shrink the chroma towards the grey axis, into a double cone around it."""
    lab = rgb2lab(rgb)
    low, high = LIGHTNESS
    lightness = np.clip(lab[..., 0], low, high)
    middle, half = (low + high) / 2, (high - low) / 2
    allowed = 10.0 + (MAX_CHROMA - 10.0) * (1 - np.abs(lightness - middle) / half)
    chroma = np.linalg.norm(lab[..., 1:], axis=-1)
    shrink = np.minimum(1.0, allowed / np.maximum(chroma, 1e-9))
    limited = np.concatenate([lightness[..., None], lab[..., 1:] * shrink[..., None]], axis=-1)
    return np.clip(lab2rgb(limited), 0.0, 1.0)


def round_trip(rgb: np.ndarray, profile: ImageCms.ImageCmsProfile, mode: str) -> np.ndarray:
    """sRGB to the device and back with 8 bits per channel, relative colorimetric."""
    srgb = ImageCms.createProfile("sRGB")
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    there = ImageCms.buildTransform(srgb, profile, "RGB", mode, renderingIntent=intent)
    back = ImageCms.buildTransform(profile, srgb, mode, "RGB", renderingIntent=intent)
    pixels = np.round(rgb.reshape(1, -1, 3) * 255).astype(np.uint8)
    device = ImageCms.applyTransform(Image.fromarray(pixels), there)
    returned = ImageCms.applyTransform(device, back) if device is not None else None
    if returned is None:
        raise GamutError(
            "LittleCMS returned no image for the round trip; the profile cannot be used in both directions."
        )
    return np.asarray(returned, dtype=np.float64).reshape(rgb.shape) / 255


@dataclass(frozen=True)
class Gamut:
    """A gamut projection.

    Attributes:
        name: what results made with it must be labelled with: the profile's description, or "proxy gamut".
        table: float32 `[33, 33, 33, 3]`, G at the grid of `rgb_grid`.
    """

    name: str
    table: Tensor

    @classmethod
    def proxy(cls) -> Gamut:
        """The gamut without a profile: limited lightness and chroma in CIELAB."""
        return cls("proxy gamut", torch.from_numpy(proxy_limit(rgb_grid())).float())

    @classmethod
    def from_profile(cls, path: str | Path) -> Gamut:
        """The gamut of an ICC profile of a CMYK or RGB device.

        Raises:
            GamutError: the file is missing, is no ICC profile, or is of another colour space.
        """
        try:
            profile = ImageCms.getOpenProfile(str(path))
        except (OSError, ImageCms.PyCMSError) as error:
            raise GamutError(
                f"{path} cannot be read as an ICC profile ({error}). Give the .icc file of a printer."
            ) from error
        space = profile.profile.xcolor_space.strip()
        if space not in ("CMYK", "RGB"):
            raise GamutError(
                f"{path} is a profile of {space}; expected a CMYK or RGB device. Give the profile of a printer."
            )
        try:
            table = round_trip(rgb_grid(), profile, space)
        except ImageCms.PyCMSError as error:
            raise GamutError(
                f"{path} does not convert in both directions ({error}). Give an output profile."
            ) from error
        description = ImageCms.getProfileDescription(profile).strip()
        return cls(description or Path(path).stem, torch.from_numpy(table).float())

    def project(self, rgb: Tensor) -> Tensor:
        """G by trilinear interpolation of the table.

        Args:
            rgb: `[..., 3]` in [0, 1].
        """
        check_colours(rgb)
        position = rgb.double() * (GRID - 1)
        low = position.floor().clamp(max=GRID - 2).long()
        part = position - low
        table = self.table.to(rgb.device).double()
        result = torch.zeros_like(position)
        for corner in range(8):
            bits = torch.tensor([corner >> 2 & 1, corner >> 1 & 1, corner & 1], device=rgb.device)
            weight = torch.where(bits.bool(), part, 1 - part).prod(dim=-1, keepdim=True)
            index = low + bits
            result = result + weight * table[index[..., 0], index[..., 1], index[..., 2]]
        return result.to(rgb.dtype)

    def lock(self, rgb: Tensor, tolerance: float = LEVEL / 4, limit: int = 400) -> Tensor:
        """The fixed points of G that repeated projection of `rgb` leads to; they move by at most `tolerance` under G.

        With tables of 8 bits some colours go to and fro between neighbours for ever; under a level they are let pass.

        Raises:
            GamutError: some colour still moves by more than a level after `limit` projections.
        """
        for _ in range(limit):
            projected = self.project(rgb)
            if float((projected - rgb).abs().max()) <= tolerance:
                return projected
            rgb = projected
        moved = float((self.project(rgb) - rgb).abs().max())
        if moved > LEVEL:
            raise GamutError(
                f"colours still move by {moved:.4f} after {limit} projections into {self.name!r}; expected at most "
                f"{LEVEL:.4f}. The profile's two directions disagree: use another one."
            )
        return rgb

    def is_fixed(self, rgb: Tensor, tolerance: float = LEVEL) -> bool:
        """Whether G leaves every colour where it is, within one level of 255."""
        return float((self.project(rgb) - rgb).abs().max()) <= tolerance


def check_colours(rgb: Tensor) -> None:
    """Refuse what is no array of RGB colours in [0, 1]."""
    if rgb.shape[-1:] != (3,) or rgb.numel() == 0:
        raise GamutError(f"colours have shape {tuple(rgb.shape)}; expected [..., 3]. Put the channels last.")
    if not bool(torch.isfinite(rgb).all()) or float(rgb.min()) < 0 or float(rgb.max()) > 1:
        raise GamutError("colours must be finite and in [0, 1]; divide 8-bit values by 255.")
