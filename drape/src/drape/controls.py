"""Textures to compare with: plain dye, random control points, coloured noise, and textures kept on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from drape.errors import AssetError, ConfigError, unknown
from drape.gamut import Gamut
from drape.scene.garments import GARMENTS
from drape.texture import ControlPointTexture, TextureSpec

__all__ = ["CONTROLS", "control", "load_images", "random_textures", "save_images"]

CONTROLS = ("plain", "random", "noise")
PALETTE = ((0.62, 0.58, 0.5), (0.2, 0.22, 0.25), (0.55, 0.24, 0.2), (0.24, 0.36, 0.5))  # cloth-like, sRGB
DYES = {"shirt": PALETTE[2], "trousers": PALETTE[3], "hat": PALETTE[1]}
SPECS = {
    "shirt": TextureSpec(height=48, width=96),
    "trousers": TextureSpec(height=64, width=96),
    "hat": TextureSpec(height=24, width=24, points=20),
}


def random_textures(gamut: Gamut, seed: int = 0) -> dict[str, ControlPointTexture]:
    """A texture for each garment with control points anywhere: the control "random", and where to begin from."""
    generator = torch.Generator().manual_seed(seed)
    palette = torch.tensor(PALETTE)
    return {name: ControlPointTexture(SPECS[name], palette, gamut, generator=generator) for name in GARMENTS}


def control(kind: str, gamut: Gamut, seed: int = 0) -> dict[str, Tensor]:
    """Images `[3, H, W]` of one of `CONTROLS` for each garment, locked to the gamut."""
    if kind not in CONTROLS:
        raise unknown("control", kind, CONTROLS)
    generator = torch.Generator().manual_seed(seed)
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
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.round(image.detach().numpy() * 255).astype(np.uint8) for name, image in images.items()}
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def load_images(path: Path) -> dict[str, Tensor]:
    """Images that `save_images` kept, `[3, H, W]` in [0, 1]."""
    if not path.is_file():
        raise AssetError(f"{path} does not exist; make it with `drape optimise --out FOLDER`.")
    with np.load(path) as stored:
        missing = [name for name in GARMENTS if name not in stored.files]
        if missing:
            raise AssetError(f"{path} has no texture for {', '.join(missing)}; make it anew with `drape optimise`.")
        return {name: torch.from_numpy(stored[name].astype(np.float32) / 255) for name in GARMENTS}
