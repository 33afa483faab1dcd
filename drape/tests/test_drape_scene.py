"""The scene: geometry, cloth, light, the rasteriser, and the gradient of a texture through a render (CL-1)."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from drape.cache import cached_arrays
from drape.errors import AssetError, ConfigError, UnknownNameError
from drape.io import check_sha256
from drape.scene.backgrounds import BACKGROUNDS, background
from drape.scene.body import GAITS, Gait, gait, load_rig, pose_walk, rotation
from drape.scene.camera import Camera, azimuth_of, place_on_path
from drape.scene.cloth import Cloth, edges_of
from drape.scene.cloth_engines import simulate
from drape.scene.garments import GARMENTS, make_garment, vertex_normals
from drape.scene.light import LIGHTS, Light, light
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
    plate = torch.zeros(3, 64, 64)

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


@pytest.mark.parametrize("name", ["overcast", "sun", "indoor"])
def test_uniform_texture_gives_the_untouched_render(walk: Buffers, name: str) -> None:
    plate = background("gravel", 64)
    textured = render_frames(walk, uniform(PLAIN), light(name), plate)
    torch.testing.assert_close(textured, render_plain(walk, PLAIN, light(name), plate), atol=1e-5, rtol=0)


def test_texture_changes_its_garment_and_nothing_else(walk: Buffers) -> None:
    plate = background("brick", 64)
    before = render_frames(walk, uniform(PLAIN), light("overcast"), plate)
    after = render_frames(walk, uniform({**PLAIN, "shirt": (0.0, 0.9, 0.9)}), light("overcast"), plate)
    changed = (before - after).abs().amax(dim=1) > 1e-6
    shirt = torch.nn.functional.max_pool2d((walk.garment_map() == 1).float()[:, None], 2)[:, 0] > 0
    assert bool((changed == shirt).all())
    assert int(changed.sum()) > 100


def test_every_garment_and_the_body_are_seen_in_every_frame(walk: Buffers) -> None:
    for frame in walk.garment_map():
        assert set(np.unique(frame.numpy())) == {0, 1, 2, 3, 255}


def test_box_is_the_tightest_one_around_the_person(walk: Buffers) -> None:
    rows, columns = torch.where(walk.garment_map()[0] > 0)
    expected = [columns.min() / 2, rows.min() / 2, (columns.max() + 1) / 2, (rows.max() + 1) / 2]
    assert walk.boxes[0].tolist() == [float(e) for e in expected]


def test_circle_shows_every_side(walk: Buffers) -> None:
    """Four frames of one turn: the last one is the first again, the others lie between."""
    assert {int(a // 90) for a in walk.azimuth.tolist()} == {1, 2, 3}
    assert walk.azimuth[0] == pytest.approx(float(walk.azimuth[-1]), abs=0.01)


def test_azimuth_of_a_person_who_comes_goes_and_passes() -> None:
    still = np.zeros((1, 3))
    seen = [float(azimuth_of(Camera(), still, np.array([h]))[0]) for h in (0.0, 180.0, 90.0, -90.0)]
    assert seen == [0.0, 180.0, 270.0, 90.0]


def test_path_moves_the_way_the_person_faces() -> None:
    for path in ("past", "towards", "away", "diagonal", "circle"):
        place, heading = place_on_path(path, np.linspace(0, 3, 200))
        step = np.diff(place, axis=0)[100]
        facing = rotation("z", heading[100]) @ np.array([0.0, -1.0, 0.0])
        assert step @ facing / np.linalg.norm(step) == pytest.approx(1.0, abs=1e-2), path


def test_walk_keeps_the_lowest_point_on_the_ground_and_is_periodic() -> None:
    rig = load_rig()
    g = gait("normal")
    posed, walked = pose_walk(rig, g, 2, fps=g.cadence)
    np.testing.assert_allclose(posed[0], posed[1], atol=1e-9)
    np.testing.assert_allclose(posed[..., 2].min(axis=1), 0.0, atol=1e-12)
    assert 0.9 < walked[1] < 2.0  # metres per cycle


def test_half_a_cycle_later_the_pose_is_mirrored() -> None:
    rig = load_rig()
    g = gait("brisk")
    posed, _ = pose_walk(rig, g, 2, fps=2 * g.cadence)
    left = [rig.weights[:, rig.bone(f"{b}.L")].argmax() for b in ("lowerleg02", "lowerarm02")]
    right = [rig.weights[:, rig.bone(f"{b}.R")].argmax() for b in ("lowerleg02", "lowerarm02")]
    np.testing.assert_allclose(posed[0, left, 1], posed[1, right, 1], atol=0.02)
    assert abs(posed[0, left[0], 1] - posed[0, right[0], 1]) > 0.2


@pytest.mark.parametrize("name", GARMENTS)
def test_garment_has_uv_in_its_square_and_no_triangle_runs_around_the_seam(name: str) -> None:
    garment = make_garment(name, load_rig())
    assert garment.uv.min() >= 0
    assert garment.uv.max() <= 1
    assert np.ptp(garment.uv[..., 0], axis=1).max() < 0.3
    assert len(garment.faces) > 100


@pytest.mark.parametrize("name", ["shirt", "trousers"])
def test_cloth_stays_near_its_shell_and_out_of_the_body(name: str) -> None:
    rig = load_rig()
    garment = make_garment(name, rig)
    posed, _ = pose_walk(rig, gait("brisk"), 5, fps=12)
    normals = np.stack([vertex_normals(v, rig.faces) for v in posed])[:, garment.source]
    shells = garment.shell(posed[:, garment.source], normals)
    moved = simulate(garment, shells, normals, shells[0], Cloth(), 12)
    reach = np.linalg.norm(moved - shells, axis=-1)
    assert bool((reach <= garment.loose + 1e-9).all())
    assert reach[-1].max() > 0.004
    assert np.all(reach[:, garment.loose == 0] < 1e-12)
    depth = ((moved - posed[:, garment.source]) * normals).sum(axis=-1)
    assert np.quantile(depth, 0.001) > 0.002  # metres off the skin


def test_stiffer_cloth_keeps_its_edges_better() -> None:
    rig = load_rig()
    garment = make_garment("shirt", rig)
    posed, _ = pose_walk(rig, gait("brisk"), 4, fps=12)
    normals = np.stack([vertex_normals(v, rig.faces) for v in posed])[:, garment.source]
    shells = garment.shell(posed[:, garment.source], normals)
    edges = edges_of(garment.faces)
    rest = np.linalg.norm(shells[0][edges[:, 0]] - shells[0][edges[:, 1]], axis=1)

    def stretch(stiffness: float) -> float:
        x = simulate(garment, shells, normals, shells[0], Cloth(stiffness=stiffness), 12)[-1]
        return float(np.abs(np.linalg.norm(x[edges[:, 0]] - x[edges[:, 1]], axis=1) / rest - 1).mean())

    assert stretch(0.9) < stretch(0.05)


def test_the_engine_newton_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "newton", None)
    garment = make_garment("hat", load_rig())
    shells = np.zeros((1, len(garment.source), 3))
    with pytest.raises(AssetError, match=r"drape\[cloth\]"):
        simulate(garment, shells, shells, shells[0], Cloth(engine="newton"), 6)


@pytest.mark.slow
def test_newton_keeps_cloth_together_and_off_the_skin() -> None:
    pytest.importorskip("newton")
    rig, frames = load_rig(), 4
    posed, _ = pose_walk(rig, gait("brisk"), frames, fps=12)
    garment = make_garment("trousers", rig)
    normals = np.stack([vertex_normals(v, rig.faces) for v in posed])[:, garment.source]
    shells = garment.shell(posed[:, garment.source], normals)
    rest_normals = vertex_normals(rig.vertices, rig.faces)[garment.source]
    rest = garment.shell(rig.vertices[garment.source], rest_normals)
    found = simulate(garment, shells, normals, rest, Cloth(engine="newton"), 12)
    assert np.isfinite(found).all()
    away = found - shells
    assert float((np.linalg.norm(away, axis=2) - garment.loose).max()) < 1e-6
    moved = np.linalg.norm(away[-1], axis=1)[garment.loose > 0.02]
    assert float(moved.mean()) > 0.003  # it is simulated, not only skinned
    edges = edges_of(garment.faces)

    def stretch(x: np.ndarray) -> float:
        length, before = (np.linalg.norm(v[edges[:, 0]] - v[edges[:, 1]], axis=1) for v in (x, rest))
        return float(np.median(np.abs(length / before - 1)))

    assert stretch(found[-1]) < 0.15


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


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_backgrounds_are_photographs_of_the_asked_size(name: str) -> None:
    try:
        plate = background(name, 48)
    except (OSError, ModuleNotFoundError, ConnectionError) as error:  # scikit-image may have to fetch some of them
        pytest.skip(str(error))
    assert plate.shape == (3, 48, 48)
    assert 0 <= float(plate.min()) < float(plate.max()) <= 1


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
        lambda: Gait(hip=-3),
        lambda: Camera(distance=0.5),
        lambda: Camera(elevation=80),
        lambda: Cloth(stiffness=0),
        lambda: Cloth(substeps=0),
        lambda: SequenceSpec(frames=0),
        lambda: SequenceSpec(supersample=9),
        lambda: Light(sky=(-1, 0, 0), ground=(0, 0, 0)),
        lambda: load_rig(weight=2),
    ],
)
def test_bad_values_are_refused(make: object) -> None:
    with pytest.raises(ConfigError, match=r"expected|cannot"):
        make()  # type: ignore[operator]


def test_render_refuses_what_does_not_fit(walk: Buffers) -> None:
    plate = background("grass", 64)
    with pytest.raises(ConfigError, match="no texture for hat"):
        render_frames(walk, {k: v for k, v in uniform(PLAIN).items() if k != "hat"}, light("sun"), plate)
    with pytest.raises(ConfigError, match="background has shape"):
        render_frames(walk, uniform(PLAIN), light("sun"), plate[:, :32])
    with pytest.raises(ConfigError, match="frames"):
        render_frames(walk, uniform(PLAIN), light("sun"), plate, frames=[7])


def test_named_gaits_and_lights_differ() -> None:
    assert len(set(GAITS.values())) == len(GAITS) >= 4
    assert len(set(LIGHTS.values())) == len(LIGHTS) >= 3
