"""Textures to compare with: plain dye, a product, random control points, coloured noise; and textures kept on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from torch import Tensor

from drape.cache import write_atomically
from drape.errors import AssetError, ConfigError, unknown
from drape.gamut import Gamut
from drape.scene.garments import GARMENTS
from drape.texture import ControlPointTexture, TextureSpec

__all__ = [
    "CONTROLS",
    "control",
    "load_images",
    "open_arrays",
    "plaid",
    "product_textures",
    "random_textures",
    "save_images",
]

CONTROLS = ("plain", "product", "random", "noise")
FIT = 60  # steps that a texture is fitted to a product in
# cloth-like, sRGB, from light to dark. How much contrast a texture can have is most of how bad it can get: with black
# and white among the colours, control points anywhere hide a person nearly as well as optimised ones.
PALETTE = ((0.62, 0.58, 0.5), (0.36, 0.36, 0.38), (0.5, 0.3, 0.27), (0.3, 0.4, 0.5))
DYES = {"shirt": (0.62, 0.2, 0.16), "trousers": (0.16, 0.34, 0.52), "hat": (0.1, 0.1, 0.12)}
SPECS = {
    "shirt": TextureSpec(height=24, width=48, points=40, expand=8, noise=0.1),
    "trousers": TextureSpec(height=32, width=48, points=40, expand=8, noise=0.1),
    "hat": TextureSpec(height=12, width=12, points=10, expand=8, noise=0.1),
}


def random_textures(gamut: Gamut, seed: int = 0) -> dict[str, ControlPointTexture]:
    """A texture for each garment with control points anywhere: the control "random", and where to begin from."""
    generator = torch.Generator().manual_seed(seed)
    palette = torch.tensor(PALETTE)
    return {name: ControlPointTexture(SPECS[name], palette, gamut, generator=generator) for name in GARMENTS}


def plaid(height: int, width: int) -> NDArray[np.float64]:
    """A checked cloth in the colours of `PALETTE`, RGB `[height, width, 3]`: the product if no picture is given."""
    ground, dark, warm, cool = np.array(PALETTE)
    rows, columns = np.mgrid[:height, :width] % max(height // 3, 6)
    band = max(height // 8, 2)
    picture = np.tile(ground, (height, width, 1))
    picture[columns < band] = warm
    picture[rows < band] = cool
    picture[(columns == 0) | (rows == 0)] = dark
    return np.asarray(picture)


def product_textures(
    gamut: Gamut, picture: NDArray[Any] | None = None, seed: int = 0
) -> tuple[dict[str, ControlPointTexture], dict[str, Tensor]]:
    """Textures that look like a product, and the label maps that `optimise` keeps them like.

    Args:
        picture: RGB `[height, width, 3]`, uint8 or in [0, 1], of cloth laid flat; `plaid` if not given.
    """
    textures, labels = {}, {}
    for name in GARMENTS:
        spec = SPECS[name]
        image = plaid(spec.height, spec.width) if picture is None else picture
        textures[name], labels[name] = ControlPointTexture.from_product(spec, image, gamut, seed=seed, fit_steps=FIT)
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
    """Keep images of garments in one `.npz` file, 8 bits a channel."""
    if path.suffix != ".npz":
        raise ConfigError(f"{path} must end in .npz; rename it.")
    arrays = {name: np.round(image.detach().numpy() * 255).astype(np.uint8) for name, image in images.items()}
    write_atomically(path, lambda target: np.savez_compressed(target, **arrays))  # type: ignore[arg-type]


def open_arrays(path: Path) -> NpzFile:
    """Named arrays of a file, or an `AssetError` that names it."""
    try:
        stored = np.load(path, allow_pickle=False)
    except (BadZipFile, ValueError, EOFError, OSError) as error:
        raise AssetError(f"{path} cannot be read ({error}); make it anew.") from error
    if not isinstance(stored, NpzFile):
        raise AssetError(f"{path} holds one array; expected an .npz file with named ones.")
    return stored


def load_images(path: Path) -> dict[str, Tensor]:
    """Images that `save_images` kept, `[3, H, W]` in [0, 1]."""
    if not path.is_file():
        raise AssetError(f"{path} does not exist; make it with `drape optimise --out FOLDER`.")
    with open_arrays(path) as stored:
        missing = [name for name in GARMENTS if name not in stored.files]
        if missing:
            raise AssetError(f"{path} has no texture for {', '.join(missing)}; make it anew with `drape optimise`.")
        return {name: torch.from_numpy(stored[name].astype(np.float32) / 255) for name in GARMENTS}
