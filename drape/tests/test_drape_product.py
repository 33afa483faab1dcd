"""Products as garments: a photograph's parts come to the islands that they belong to, cloth keeps its proportions."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from drape.controls import product_textures
from drape.errors import ConfigError, UnknownNameError
from drape.gamut import Gamut
from drape.product import laid_out, outline

RED, BLUE, GREEN, GREY, WHITE = (0.7, 0.1, 0.1), (0.1, 0.2, 0.7), (0.1, 0.6, 0.2), (0.4, 0.4, 0.4), (0.97, 0.97, 0.97)
Image = NDArray[np.float64]


def shirt() -> Image:
    """A red trunk with a grey stripe across its chest, the wearer's left sleeve blue, the right one green."""
    image = np.tile(np.array(WHITE), (100, 120, 1))
    image[10:90, 40:80] = RED
    image[30:40, 40:80] = GREY
    for row in range(10, 50):
        start = (row - 10) // 2
        image[row, 80 + start // 2 : 92 + start] = BLUE
        image[row, 28 - start : 40 - start // 2] = GREEN
    return image


def share(part: Image, colour: tuple[float, float, float]) -> float:
    """How much of a part has a colour."""
    return float((np.abs(part - np.array(colour)).max(axis=-1) < 0.1).mean())


def test_parts_of_a_shirt_come_to_their_islands() -> None:
    square = laid_out("shirt", shirt(), 48, 100)
    trunk, left, right = square[:, 29:71], square[:, 75:99], square[:, 1:25]
    assert share(trunk, RED) + share(trunk, GREY) > 0.97
    assert share(left, BLUE) > 0.9
    assert share(right, GREEN) > 0.9
    stripe = np.flatnonzero((np.abs(trunk - np.array(GREY)).max(axis=-1) < 0.1).mean(axis=1) > 0.9)
    assert stripe.min() / 48 == pytest.approx(0.25, abs=0.04)  # it runs around the trunk, as high as on the photograph
    assert stripe.max() / 48 == pytest.approx(0.37, abs=0.04)
    assert share(square, WHITE) == 0  # nothing of the ground


def test_the_middle_of_a_part_is_the_front_and_the_back_mirrors_it() -> None:
    image = shirt()
    image[60:80, 66:74] = GREY  # a pocket on the wearer's left
    trunk = laid_out("shirt", image, 80, 100)[:, 28:72]
    pocket = np.flatnonzero(np.abs(trunk[58] - np.array(GREY)).max(axis=-1) < 0.1)
    middle = (trunk.shape[1] - 1) / 2
    assert pocket.min() > middle
    turned = np.sin(((pocket + 0.5) / trunk.shape[1] - 0.5) * 2 * np.pi)
    assert 0.2 < turned.min() < turned.max() < 0.75
    assert len(pocket) >= 8  # on the front and on the back


def test_legs_of_trousers_are_told_apart() -> None:
    image = np.tile(np.array(WHITE), (120, 80, 1))
    image[10:40, 15:65] = RED
    image[40:110, 15:36] = GREEN
    image[40:110, 44:65] = BLUE
    square = laid_out("trousers", image, 60, 100)
    assert share(square[:, 29:71], RED) > 0.95
    assert share(square[:, 75:99], BLUE) > 0.95
    assert share(square[:, 1:25], GREEN) > 0.95


def test_cloth_keeps_its_proportions() -> None:
    rows, columns = np.mgrid[:64, :64]
    checks = np.where(((rows // 8 + columns // 8) % 2)[..., None], RED, BLUE)
    assert outline(checks) is None
    square = laid_out("shirt", checks, 24, 48)
    assert (square[:, :24] == square[:, 24:]).all()  # twice as wide as high: repeated, not stretched
    changes = [np.flatnonzero(np.abs(np.diff(line[:, 0])) > 0.1) for line in (square[0, :24], square[:, 0])]
    assert changes[0].tolist() == changes[1].tolist()


def test_a_product_begins_the_garments_that_it_is_of() -> None:
    textures, labels = product_textures(Gamut.proxy(), {"shirt": shirt()})
    assert set(textures) == {"shirt", "trousers", "hat"}
    assert set(labels) == {"shirt"}
    image = textures["shirt"](hard=True).detach().permute(1, 2, 0).numpy()
    width = image.shape[1]
    left, right = image[:, int(0.78 * width) :], image[:, : int(0.22 * width)]
    assert (left[..., 2] > left[..., 1]).mean() > 0.8
    assert (right[..., 1] > right[..., 2]).mean() > 0.8


def test_what_is_no_image_or_garment_is_refused() -> None:
    with pytest.raises(ConfigError, match="RGB"):
        laid_out("shirt", np.zeros((8, 8)), 8, 8)
    with pytest.raises(UnknownNameError, match="shirt"):
        laid_out("shrit", np.zeros((8, 8, 3)), 8, 8)
    assert outline(np.tile(np.array(WHITE), (20, 20, 1))) is None
