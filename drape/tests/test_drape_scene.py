"""The scene: geometry, cloth, light, the rasteriser, and the gradient of a texture through a render (CL-1)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from drape.cache import cached_arrays
from drape.errors import AssetError, ConfigError, UnknownNameError
from drape.io import check_sha256
from drape.scene.body import load_rig
from drape.scene.camera import Camera, azimuth_of
from drape.scene.cloth import Cloth
from drape.scene.gait import GAITS, Gait, gait
from drape.scene.garments import GARMENTS, make_garment
from drape.scene.light import LIGHTS, Light, light
from drape.scene.paths import curve
from drape.scene.places import Plate, place
from drape.scene.raster import rasterise
from drape.scene.render import mip_levels, render_frames, render_plain, sample_texture
from drape.scene.sequence import Buffers, SequenceSpec

PLAIN = {"shirt": (0.7, 0.2, 0.2), "trousers": (0.2, 0.25, 0.5), "hat": (0.1, 0.5, 0.2)}


def uniform(colours: dict[str, tuple[float, float, float]], side: int = 32) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(c)[:, None, None].expand(3, side, side).clone() for name, c in colours.items()}


def test_gradient_of_the_texture_equals_finite_differences(walk: Buffers) -> None:
    """CL-1, through mip-mapped lookup, light, mask and pooling, in float64."""
    generator = torch.Generator().manual_seed(1)
    textures = {n: torch.rand(3, 24, 40, generator=generator, dtype=torch.float64) * 0.5 + 0.2 for n in GARMENTS}
    weights = torch.rand(2, 3, 64, 64, generator=generator, dtype=torch.float64)
    plate = Plate(torch.zeros(3, 64, 64), torch.ones(64, 64), torch.ones(0, 64, 64))

    def value(shirt: torch.Tensor) -> torch.Tensor:
        frames = render_frames(walk, {**textures, "shirt": shirt}, light("dusk"), plate, frames=[0, 1])
        return (frames * frames * weights).sum()

    shirt = textures["shirt"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(shirt), shirt)
    largest = gradient.abs().flatten().topk(6).indices
    for flat in largest.tolist():
        step = torch.zeros_like(shirt).flatten()
        step[flat] = 1e-5
        step = step.view_as(shirt)
        with torch.no_grad():
            difference = (value(shirt + step) - value(shirt - step)) / 2e-5
        assert difference.item() == pytest.approx(gradient.flatten()[flat].item(), rel=1e-5)
    assert float(gradient.abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["overcast", "dusk"])
def test_uniform_texture_gives_the_untouched_render(walk: Buffers, plate: Plate, name: str) -> None:
    textured = render_frames(walk, uniform(PLAIN), light(name), plate)
    torch.testing.assert_close(textured, render_plain(walk, PLAIN, light(name), plate), atol=1e-5, rtol=0)


def test_texture_changes_its_garment_and_nothing_else(walk: Buffers, plate: Plate) -> None:
    before = render_frames(walk, uniform(PLAIN), light("overcast"), plate)
    after = render_frames(walk, uniform({**PLAIN, "shirt": (0.0, 0.9, 0.9)}), light("overcast"), plate)
    changed = (before - after).abs().amax(dim=1) > 1e-6
    shirt = torch.nn.functional.max_pool2d((walk.garment_map() == 1).float()[:, None], 2)[:, 0] > 0
    assert bool((changed == shirt).all())
    assert int(changed.sum()) > 40


def test_every_garment_and_the_body_are_seen_in_every_frame(walk: Buffers) -> None:
    for frame in walk.garment_map():
        assert {0, 1, 2, 255} <= set(np.unique(frame.numpy()))
    assert 3 in walk.garment_map()


def test_box_is_the_tightest_one_around_the_person(walk: Buffers) -> None:
    rows, columns = torch.where(walk.garment_map()[0] > 0)
    expected = [columns.min() / 2, rows.min() / 2, (columns.max() + 1) / 2, (rows.max() + 1) / 2]
    assert walk.boxes[0].tolist() == [float(e) for e in expected]


def test_azimuth_of_a_person_who_comes_goes_and_passes() -> None:
    still = np.zeros((1, 2))
    seen = [float(azimuth_of(Camera(), still, np.array([h]))[0]) for h in (0.0, 180.0, 90.0, -90.0)]
    assert seen == [0.0, 180.0, 270.0, 90.0]


@pytest.mark.parametrize("name", GARMENTS)
def test_garment_has_uv_in_its_square_and_no_triangle_runs_around_the_seam(name: str) -> None:
    garment = make_garment(name, load_rig())
    assert garment.uv.min() >= 0
    assert garment.uv.max() <= 1
    assert np.ptp(garment.uv[..., 0], axis=1).max() < 0.3
    assert len(garment.faces) > 100


def test_rasteriser_shows_the_nearer_triangle_and_interpolates_with_perspective() -> None:
    screen = np.array([[0, 0, 1], [8, 0, 3], [0, 8, 1], [0, 0, 2], [8, 0, 2], [0, 8, 2]], dtype=float)
    hits = rasterise(screen, np.array([[0, 1, 2], [3, 4, 5]]), 8)
    seen = dict(zip(zip(hits.column, hits.row, strict=True), range(len(hits.row)), strict=True))
    assert hits.face[seen[0, 0]] == 0
    assert hits.face[seen[6, 0]] == 1
    at = seen[2, 3]
    assert hits.weights[at].sum() == pytest.approx(1)
    flat = 2.5 / 8
    assert hits.weights[at, 1] == pytest.approx(flat / 3 / (flat / 3 + (1 - flat)))
    assert hits.area.tolist() == [32, 32]


def test_rasteriser_ignores_what_is_outside() -> None:
    hits = rasterise(np.array([[-9.0, -9, 1], [-5, -9, 1], [-9, -5, 1]]), np.array([[0, 1, 2]]), 8)
    assert len(hits.face) == 0


def test_minified_texture_is_averaged() -> None:
    fine = (torch.arange(64) % 2).float().expand(3, 64, 64).clone()
    uv = torch.rand(50, 2, generator=torch.Generator().manual_seed(0))
    sharp = sample_texture(fine, uv, torch.full((50,), 1 / 64))
    blurred = sample_texture(fine, uv, torch.full((50,), 4 / 64))
    assert float(sharp.std()) > 0.2
    torch.testing.assert_close(blurred, torch.full((50, 3), 0.5))
    assert [tuple(level.shape[1:]) for level in mip_levels(fine)] == [(64, 64), (32, 32), (16, 16), (8, 8)]


def test_light_from_above_and_from_a_lamp() -> None:
    lamp = Light(sky=(1, 1, 1), ground=(0, 0, 0), lamps=(((0, 0, 2.0), (0.5, 0.5, 0.5)),))
    found = lamp.irradiance(torch.tensor([[0.0, 0, 1], [0, 0, -1], [1, 0, 0]]))
    assert found[:, 0].tolist() == [1.5, 0.0, 0.5]


def test_cache_makes_once_and_names_a_damaged_file(empty_cache: Path) -> None:
    calls = []

    def make() -> dict[str, np.ndarray]:
        calls.append(1)
        return {"x": np.arange(3)}

    for _ in range(2):
        assert cached_arrays("thing", {"a": 1}, make)["x"].tolist() == [0, 1, 2]
    assert len(calls) == 1
    (path,) = empty_cache.glob("thing-*.npz")
    path.write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(AssetError, match="delete it"):
        cached_arrays("thing", {"a": 1}, make)


def test_checksum_of_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    with pytest.raises(AssetError, match="SHA-256"):
        check_sha256(tmp_path / "f", "0" * 64)


@pytest.mark.parametrize(
    "make",
    [
        lambda: gait("brsk"),
        lambda: light("dawn"),
        lambda: SequenceSpec(path="pst"),
        lambda: SequenceSpec(gait="x"),
        lambda: SequenceSpec(light="x"),
        lambda: SequenceSpec(body="x"),
        lambda: SequenceSpec(skin="x"),
        lambda: load_rig("x"),
        lambda: place("x", 0, 1.0),
        lambda: curve("x", 1.0),
        lambda: Cloth(engine="newtn"),
        lambda: make_garment("scarf", load_rig()),
    ],
)
def test_unknown_names_are_refused(make: object) -> None:
    with pytest.raises(UnknownNameError, match="Known"):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gait(cadence=9),
        lambda: Gait(stride=-3),
        lambda: Camera(distance=0.5),
        lambda: Camera(elevation=80),
        lambda: Cloth(stiffness=0),
        lambda: Cloth(substeps=0),
        lambda: SequenceSpec(frames=0),
        lambda: SequenceSpec(supersample=9),
        lambda: Light(sky=(-1, 0, 0), ground=(0, 0, 0)),
        lambda: Gait(duty=1.5),
        lambda: Cloth(slack=1),
        lambda: SequenceSpec(fps=0),
        lambda: SequenceSpec(size=100000),
    ],
)
def test_bad_values_are_refused(make: object) -> None:
    with pytest.raises(ConfigError, match=r"expected|cannot"):
        make()  # type: ignore[operator]


def test_render_refuses_what_does_not_fit(walk: Buffers, plate: Plate) -> None:
    own = light("overcast")
    with pytest.raises(ConfigError, match="no texture for hat"):
        render_frames(walk, {k: v for k, v in uniform(PLAIN).items() if k != "hat"}, own, plate)
    with pytest.raises(ConfigError, match="plate has shape"):
        render_frames(walk, uniform(PLAIN), own, Plate(plate.image[:, :32], plate.ground, plate.lit))
    with pytest.raises(ConfigError, match="0 lamps"):
        render_frames(walk, uniform(PLAIN), light("sun"), plate)
    with pytest.raises(ConfigError, match="frames"):
        render_frames(walk, uniform(PLAIN), own, plate, frames=[7])


def test_named_gaits_and_lights_differ() -> None:
    assert len(set(GAITS.values())) == len(GAITS) >= 4
    assert len(set(LIGHTS.values())) == len(LIGHTS) >= 3
