"""Textures to compare with: plain dye, a product, random control points, coloured noise; and textures kept on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drape.errors import AssetError, unknown
from drape.gamut import Gamut
from drape.io import check_output, load_arrays, save_arrays
from drape.product import laid_out
from drape.scene.garments import GARMENTS
from drape.texture import ControlPointTexture, TextureSpec

__all__ = [
    "CONTROLS",
    "PALETTES",
    "control",
    "load_images",
    "plaid",
    "product_textures",
    "random_textures",
    "save_images",
]

KIND, REMEDY = "drape's textures", "make it with `drape optimise --out FOLDER`"
CONTROLS = ("plain", "product", "random", "noise")
FINE = 4  # pixels of a laid out image per cell
FIT = 60  # steps that a texture is fitted to a product in
# cloth-like, sRGB, from light to dark. How much contrast a texture can have is most of how bad it can get: with black
# and white among the colours, control points anywhere hide a person nearly as well as optimised ones.
PALETTES = (
    ((0.62, 0.58, 0.5), (0.36, 0.36, 0.38), (0.5, 0.3, 0.27), (0.3, 0.4, 0.5)),
    ((0.64, 0.6, 0.48), (0.4, 0.42, 0.3), (0.55, 0.38, 0.28), (0.3, 0.35, 0.44)),
    ((0.6, 0.52, 0.36), (0.5, 0.5, 0.5), (0.44, 0.27, 0.32), (0.26, 0.42, 0.42)),
)
DYES = {"shirt": (0.62, 0.2, 0.16), "trousers": (0.16, 0.34, 0.52), "hat": (0.1, 0.1, 0.12)}
SPECS = {
    "shirt": TextureSpec(height=24, width=48, points=40, expand=8, noise=0.1),
    "trousers": TextureSpec(height=32, width=48, points=40, expand=8, noise=0.1),
    "hat": TextureSpec(height=12, width=12, points=10, expand=8, noise=0.1),
}


def random_textures(gamut: Gamut, seed: int = 0) -> dict[str, ControlPointTexture]:
    """A texture for each garment with control points anywhere: the control "random", and where to begin from.

    Seeds take turns in `PALETTES`.
    """
    generator = torch.Generator().manual_seed(seed)
    palette = torch.tensor(PALETTES[seed % len(PALETTES)])
    return {name: ControlPointTexture(SPECS[name], palette, gamut, generator=generator) for name in GARMENTS}


def plaid(height: int, width: int) -> NDArray[np.float64]:
    """A checked cloth in the first of `PALETTES`, RGB `[height, width, 3]`: the product if no image is given."""
    ground, dark, warm, cool = np.array(PALETTES[0])
    rows, columns = np.mgrid[:height, :width] % max(height // 3, 6)
    band = max(height // 8, 2)
    image = np.tile(ground, (height, width, 1))
    image[columns < band] = warm
    image[rows < band] = cool
    image[(columns == 0) | (rows == 0)] = dark
    return np.asarray(image)


def product_textures(
    gamut: Gamut, images: Mapping[str, NDArray[Any]] | None = None, seed: int = 0
) -> tuple[dict[str, ControlPointTexture], dict[str, Tensor]]:
    """Textures that look like products, and the label maps that `optimise` keeps them like.

    Args:
        images: RGB `[height, width, 3]`, uint8 or in [0, 1], by garment: photographs of garments, or of cloth
            (`drape.product`); garments without one have control points anywhere and no map. A plaid for all if not
            given.
    """
    textures, labels = random_textures(gamut, seed), {}
    for name in GARMENTS if images is None else images:
        spec = SPECS[name]
        if images is None:
            cloth = plaid(spec.height, spec.width)
        else:
            cloth = laid_out(name, images[name], FINE * spec.height, FINE * spec.width)
        textures[name], labels[name] = ControlPointTexture.from_product(spec, cloth, gamut, seed=seed, fit_steps=FIT)
    return textures, labels


def control(kind: str, gamut: Gamut, seed: int = 0) -> dict[str, Tensor]:
    """Images `[3, H, W]` of one of `CONTROLS` for each garment, locked to the gamut."""
    if kind not in CONTROLS:
        raise unknown("control", kind, CONTROLS)
    generator = torch.Generator().manual_seed(seed)
    if kind == "product":
        textures, _ = product_textures(gamut, seed=seed)
        return {name: texture(hard=True).detach() for name, texture in textures.items()}
    if kind == "random":
        return {name: texture(hard=True).detach() for name, texture in random_textures(gamut, seed).items()}
    images = {}
    for name in GARMENTS:
        size = (SPECS[name].height, SPECS[name].width)
        rgb = torch.tensor(DYES[name]).expand(*size, 3)
        if kind == "noise":
            rgb = (0.5 + 0.2 * torch.randn(*size, 3, generator=generator)).clamp(0, 1)
        images[name] = gamut.lock(rgb).permute(2, 0, 1).contiguous()
    return images


def save_images(path: Path, images: Mapping[str, Tensor]) -> None:
    """Keep images of garments in one `.npz` file, 8 bits per channel."""
    check_output(path, ".npz")
    save_arrays(path, KIND, {n: np.round(i.detach().numpy() * 255).astype(np.uint8) for n, i in images.items()})


def load_images(path: Path) -> dict[str, Tensor]:
    """Images that `save_images` kept, `[3, H, W]` in [0, 1]."""
    arrays, _ = load_arrays(path, KIND, REMEDY)
    for name in GARMENTS:
        if name not in arrays:
            raise AssetError(f"{path} has no texture for {name}; {REMEDY}.")
        if arrays[name].dtype != np.uint8 or arrays[name].ndim != 3 or arrays[name].shape[0] != 3:
            raise AssetError(f"{path}: {name} is no image (3, height, width) of 8 bits; {REMEDY}.")
    return {name: torch.from_numpy(arrays[name].astype(np.float32) / 255) for name in GARMENTS}
