"""Textures, gamuts and the controls made from them (CL-2)."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageCms

from drape.controls import CONTROLS, SPECS, control, load_images, random_textures, save_images
from drape.errors import AssetError, ConfigError, GamutError, UnknownNameError
from drape.gamut import Gamut, rgb_grid
from drape.texture import ControlPointTexture, TextureSpec, farthest_points, palette_and_labels

SMALL = TextureSpec(height=12, width=16, points=6)
CMYK = Path("/usr/share/color/icc/ghostscript/default_cmyk.icc")
VIVID = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])


@pytest.fixture(scope="module")
def proxy() -> Gamut:
    return Gamut.proxy()


def distinct(image: torch.Tensor) -> torch.Tensor:
    return image.detach().flatten(1).T.unique(dim=0)


def test_hard_texture_has_exactly_its_colours_and_they_are_fixed_points(proxy: Gamut) -> None:
    """CL-2."""
    texture = ControlPointTexture(SMALL, VIVID, proxy, generator=torch.Generator().manual_seed(0))
    colours = distinct(texture(hard=True))
    assert len(colours) == SMALL.colours
    assert torch.equal(colours, texture.palette.unique(dim=0))
    assert proxy.is_fixed(colours)


def test_every_control_but_noise_is_printable(proxy: Gamut) -> None:
    for kind in CONTROLS:
        for image in control(kind, proxy, seed=2).values():
            assert proxy.is_fixed(image.permute(1, 2, 0)), kind
    assert len(distinct(control("plain", proxy)["shirt"])) == 1
    assert len(distinct(control("noise", proxy)["shirt"])) > 1000


def test_gamut_moves_vivid_colours_and_leaves_dull_ones(proxy: Gamut) -> None:
    assert not proxy.is_fixed(VIVID)
    dull = torch.tensor([[0.5, 0.5, 0.5], [0.45, 0.4, 0.42]])
    torch.testing.assert_close(proxy.project(dull), dull, atol=2e-3, rtol=0)
    assert proxy.is_fixed(proxy.lock(VIVID))


def test_table_is_met_at_its_grid_points(proxy: Gamut) -> None:
    grid = torch.from_numpy(rgb_grid()).float().reshape(-1, 3)[::997]
    expected = proxy.table.reshape(-1, 3)[::997]
    torch.testing.assert_close(proxy.project(grid), expected, atol=1e-5, rtol=0)


def matrix_profile(white: float) -> bytes:
    """An ICC profile (version 2) of a printer with three dull inks: sRGB's primaries, mixed with a share of white."""
    primaries = np.array([[0.4360, 0.2225, 0.0139], [0.3851, 0.7169, 0.0971], [0.1431, 0.0606, 0.7139]])
    paper = primaries.sum(axis=0)
    inks = (1 - white) * primaries + white * paper / 3

    def xyz(values: np.ndarray) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))

    name = b"dull inks\0"
    description = b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78)
    tags = {b"desc": description, b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz(paper)}
    tags |= {letter + b"XYZ": xyz(ink) for letter, ink in zip((b"r", b"g", b"b"), inks, strict=True)}
    tags |= {
        letter + b"TRC": b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) for letter in (b"r", b"g", b"b")
    }
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for signature, content in tags.items():
        table += signature + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    illuminant = struct.pack(">3i", *(round(v * 65536) for v in paper))
    head = struct.pack(">I4sI4s4s4s", start + len(body), bytes(4), 0x02400000, b"prtr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(24) + struct.pack(">I", 1) + illuminant
    return head.ljust(128, b"\0") + table + body


def test_real_icc_profile_through_littlecms(tmp_path: Path) -> None:
    """A printer that reaches half of sRGB's chroma: vivid colours move, and come to rest; dull ones stay."""
    path = tmp_path / "device.icc"
    path.write_bytes(matrix_profile(0.5))
    gamut = Gamut.from_profile(path)
    assert gamut.name == "dull inks"
    assert not gamut.is_fixed(VIVID, tolerance=0.1)
    locked = gamut.lock(VIVID)
    assert gamut.is_fixed(locked)
    assert float((locked.amax(dim=1) - locked.amin(dim=1)).max()) < 0.8  # of 1 before
    dull = torch.tensor([[0.5, 0.5, 0.5], [0.45, 0.4, 0.42]])
    assert gamut.is_fixed(dull, tolerance=3 / 255)
    texture = ControlPointTexture(SMALL, VIVID, gamut, generator=torch.Generator().manual_seed(0))
    assert gamut.is_fixed(texture(hard=True).permute(1, 2, 0))


def test_profile_of_the_screen_leaves_every_colour(tmp_path: Path) -> None:
    path = tmp_path / "device.icc"
    path.write_bytes(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    gamut = Gamut.from_profile(path)
    assert gamut.name != "proxy gamut"
    assert gamut.is_fixed(VIVID, tolerance=2 / 255)


@pytest.mark.skipif(not CMYK.is_file(), reason=f"{CMYK} is not installed (Debian: libgs-common)")
def test_profile_of_a_press_with_four_inks() -> None:
    gamut = Gamut.from_profile(CMYK)
    assert not gamut.is_fixed(VIVID, tolerance=0.05)
    assert gamut.is_fixed(gamut.lock(VIVID))
    for kind in CONTROLS:
        assert all(gamut.is_fixed(image.permute(1, 2, 0)) for image in control(kind, gamut).values()), kind


def test_colours_that_never_rest_are_refused() -> None:
    swap = torch.from_numpy(rgb_grid()).float().flip(-1)  # red and blue change places for ever
    with pytest.raises(GamutError, match="still move"):
        Gamut("swap", swap).lock(VIVID, limit=5)


@pytest.mark.parametrize(
    "colours", [torch.tensor([1.2, 0, 0]), torch.tensor([0.1, 0.2]), torch.tensor([float("nan")] * 3)]
)
def test_gamut_refuses_what_is_no_colour(proxy: Gamut, colours: torch.Tensor) -> None:
    with pytest.raises(GamutError):
        proxy.project(colours)


def test_profiles_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.icc").write_text("no profile")
    with pytest.raises(GamutError, match="cannot be read"):
        Gamut.from_profile(tmp_path / "text.icc")
    lab = tmp_path / "lab.icc"
    lab.write_bytes(ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes())
    with pytest.raises(GamutError, match="profile of Lab"):
        Gamut.from_profile(lab)


def test_probability_follows_the_nearest_point(proxy: Gamut) -> None:
    spec = TextureSpec(height=9, width=9, colours=2, points=1, expand=1)
    texture = ControlPointTexture(spec, VIVID[:2], proxy, torch.tensor([[[0.1, 0.5]], [[0.9, 0.5]]]))
    chosen = texture.choice(hard=True).argmax(dim=0)
    assert bool((chosen[:, :4] == 0).all())
    assert bool((chosen[:, 5:] == 1).all())
    torch.testing.assert_close(texture.log_probability().exp().sum(dim=0), torch.ones(9, 9))


def test_soft_choice_sums_to_one_and_has_gradients(proxy: Gamut, generator: torch.Generator) -> None:
    texture = ControlPointTexture(SMALL, VIVID, proxy, generator=generator)
    choice = texture.choice(hard=False, generator=generator)
    torch.testing.assert_close(choice.sum(dim=0), torch.ones(12, 16))
    (gradient,) = torch.autograd.grad((choice[0] * torch.rand(12, 16)).sum(), texture.points)
    assert float(gradient.abs().max()) > 0


def test_evaluation_has_no_noise_and_training_has(proxy: Gamut, generator: torch.Generator) -> None:
    texture = ControlPointTexture(SMALL, VIVID, proxy, generator=generator)
    assert torch.equal(texture(hard=True), texture(hard=True))
    assert not torch.equal(texture(generator=generator), texture(generator=generator))


def test_product_initialisation_looks_like_the_product(proxy: Gamut) -> None:
    image = np.zeros((48, 64, 3), dtype=np.uint8)
    image[:24, :32], image[:24, 32:], image[24:, :32], image[24:, 32:] = (
        (150, 60, 50),
        (60, 80, 130),
        (120, 120, 110),
        (40, 40, 44),
    )
    texture, labels = ControlPointTexture.from_product(TextureSpec(height=12, width=16, points=8), image, proxy)
    chosen = texture.choice(hard=True).argmax(dim=0)
    assert float((chosen == labels).float().mean()) > 0.9
    corners = texture(hard=True)[:, [2, 2, -3, -3], [2, -3, 2, -3]].T
    expected = torch.tensor(image[[2, 2, -3, -3], [2, -3, 2, -3]].astype(np.float32) / 255)
    assert float((corners - expected).abs().max()) < 0.08


def test_farthest_points_lie_in_the_region_and_apart() -> None:
    region = np.zeros((10, 10), dtype=bool)
    region[:5] = True
    points = farthest_points(region, 4, np.random.default_rng(0))
    assert float(points[:, 1].max()) < 0.5
    assert float((torch.cdist(points, points) + torch.eye(4)).min()) > 0.2


def test_clamped_points_stay_in_the_garment(proxy: Gamut) -> None:
    texture = ControlPointTexture(SMALL, VIVID, proxy)
    with torch.no_grad():
        texture.points += 3
    texture.clamp_points()
    assert float(texture.points.detach().max()) == 1.0


def test_images_survive_the_disk(tmp_path: Path, proxy: Gamut) -> None:
    images = control("random", proxy)
    save_images(tmp_path / "t.npz", images)
    for name, image in load_images(tmp_path / "t.npz").items():
        torch.testing.assert_close(image, images[name], atol=0.5 / 255 + 1e-6, rtol=0)
    with pytest.raises(AssetError, match="drape optimise"):
        load_images(tmp_path / "none.npz")


def test_bad_textures_are_refused(proxy: Gamut) -> None:
    with pytest.raises(ConfigError, match="palette"):
        ControlPointTexture(SMALL, VIVID[:3], proxy)
    with pytest.raises(ConfigError, match="points"):
        ControlPointTexture(SMALL, VIVID, proxy, torch.zeros(4, 5, 2))
    for bad in ({"height": 2}, {"colours": 1}, {"points": 0}, {"tau": 0.0}):
        with pytest.raises(ConfigError, match="expected"):
            TextureSpec(**bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="fewer than 4"):
        palette_and_labels(np.zeros((20, 20, 3), dtype=np.uint8), SMALL)
    with pytest.raises(UnknownNameError, match="plain"):
        control("plane", proxy)
    with pytest.raises(ConfigError, match="region"):
        farthest_points(np.zeros((3, 3), dtype=bool), 2, np.random.default_rng(0))


def test_random_textures_are_those_of_their_seed(proxy: Gamut) -> None:
    a, b, c = (random_textures(proxy, seed)["hat"](hard=True) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.shape == (3, SPECS["hat"].height * SPECS["hat"].expand, SPECS["hat"].width * SPECS["hat"].expand)
