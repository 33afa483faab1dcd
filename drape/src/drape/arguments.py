"""What options of the command line say that are pairs: limits, products and textures by name."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from drape.controls import load_images
from drape.errors import ConfigError, unknown
from drape.product import outline
from drape.scene.backgrounds import read_image
from drape.scene.garments import GARMENTS

__all__ = ["TEXTURES", "limits_of", "named_products", "named_textures"]

TEXTURES = "textures.npz"  # in a folder of `drape optimise`
MEASURES = ("area", "recall", "track_recall", "ap50")  # that `--fail-under` takes


def check_once(option: str, name: str, known: Container[str]) -> None:
    """Refuse a name that an option was given already."""
    if name in known:
        raise ConfigError(f"{option} {name}: that name is taken already; give each name once.")


def limits_of(pairs: Sequence[str]) -> dict[str, float]:
    """The least values of measures, from MEASURE=VALUE."""
    result: dict[str, float] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in MEASURES:
            raise unknown("measure", name, MEASURES)
        check_once("--fail-under", name, result)
        try:
            result[name] = float(text)
        except ValueError:
            result[name] = math.nan
        if not 0 <= result[name] <= 1:
            raise ConfigError(f"{pair!r}; expected MEASURE=VALUE with a value from 0 to 1, such as recall=0.6.")
    return result


def named_products(pairs: Sequence[str]) -> dict[str, NDArray[np.uint8]]:
    """Images of products by garment, from FILE, which is for all, and GARMENT=FILE."""
    result: dict[str, NDArray[np.uint8]] = {}
    for pair in pairs:
        name, sign, file = pair.partition("=")
        if sign and name not in GARMENTS:
            raise unknown("garment", name, GARMENTS)
        image = read_image(Path(file if sign else pair))
        if not sign and outline(image) is not None:
            raise ConfigError(f"{pair} shows a garment on a plain ground; say which, such as shirt={pair}.")
        result |= {name: image} if sign else dict.fromkeys(GARMENTS, image)
    return result


def named_textures(option: str, pairs: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Textures of folders by name, from NAME=FOLDER."""
    result: dict[str, dict[str, Tensor]] = {}
    for pair in pairs:
        name, sign, folder = pair.partition("=")
        if not name or not sign or not folder:
            raise ConfigError(f"{pair!r}; expected NAME=FOLDER, such as frames=out/b.")
        check_once(option, name, result)
        result[name] = load_images(Path(folder) / TEXTURES)
    return result
