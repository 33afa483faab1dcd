"""Walks and places: cameras that hold a walk, plates that show a ground, shadows that touch the feet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from drape.errors import AssetError, ConfigError
from drape.scene.backgrounds import (
    STATURE,
    camera_from_people,
    matched,
    noise_of,
    plate_from_file,
    plate_from_image,
    read_image,
    square,
)
from drape.scene.body import load_rig
from drape.scene.camera import Camera, holding
from drape.scene.cloth import Cloth
from drape.scene.gait import gait
from drape.scene.gait import walk as walk_of
from drape.scene.light import LIGHTS, light
from drape.scene.materials import MATERIALS, albedo, levels
from drape.scene.places import PLACES, Plate, draw, in_view, nearest, place, plate_of
from drape.scene.plausible import contact_shadow, flat
from drape.scene.render import coverage, shadowed
from drape.scene.scene import Scene
from drape.scene.sequence import Buffers, SequenceSpec, build_sequence
from drape.scene.shade import ground_points, hollows, shadows
from drape.scene.solids import Ball, Box, Heap
from drape.walks import CANDIDATES, INDOORS, TEST, TEST_WALKS, TRAIN, TRAIN_CANDIDATES, Walk, scenes, under_lights

CAMERA = Camera(distance=7.0, elevation=8.0, fov=40.0)


def test_nothing_of_the_judging_walks_was_trained_on() -> None:
    for part in ("gait", "light", "body", "skin", "cloth", "elevation", "seed"):
        trained, judged = ({getattr(walk, part) for walk in walks} for walks in (TRAIN_CANDIDATES, CANDIDATES))
        assert not trained & judged, part
    labels = [walk.label() for walk in (*TRAIN_CANDIDATES, *CANDIDATES)]
    assert len(set(labels)) == len(labels)


def test_there_are_forty_judging_walks_of_every_kind() -> None:
    assert len(TEST) == TEST_WALKS == 40
    assert len(TRAIN) >= 16
    for part, least in (("gait", 4), ("path", 8), ("light", 4), ("body", 4), ("skin", 3), ("cloth", 2), ("place", 5)):
        assert len({getattr(walk, part) for walk in TEST}) >= least, part
    assert {walk.seconds for walk in TEST} >= {4.0, 5.0, 6.0}
    assert all(4 <= walk.seconds <= 8 for walk in TEST)
    assert all((walk.light in ("indoor", "white lamps")) == (walk.place in INDOORS) for walk in (*TRAIN, *CANDIDATES))


@pytest.mark.parametrize("walk", [TRAIN[0], TRAIN[5], *CANDIDATES[:4]], ids=lambda walk: walk.label())
def test_nobody_leaves_the_image(walk: Walk) -> None:
    (made,) = scenes([walk], 1.0, 64, "skinned")
    assert float(made.buffers.boxes.min()) > 0
    assert float(made.buffers.boxes.max()) < 64
    assert made.buffers.frames == walk.seconds


@pytest.mark.slow
@pytest.mark.parametrize("walk", [*TRAIN, *TEST], ids=lambda walk: walk.label())
def test_nobody_leaves_the_image_on_any_walk(walk: Walk) -> None:
    (made,) = scenes([walk], 3.0, 64, "skinned")
    assert float(made.buffers.boxes.min()) > 0
    assert float(made.buffers.boxes.max()) < 64


def test_a_camera_moves_back_until_it_holds_the_walk() -> None:
    near, far = (holding(CAMERA, np.array([[-x, 0.0], [x, 0.0]])) for x in (1.0, 3.0))
    assert near.distance < far.distance
    assert holding(CAMERA, np.zeros((1, 2)), zoom=1.5).distance > holding(CAMERA, np.zeros((1, 2))).distance
    with pytest.raises(ConfigError, match="holds the whole walk"):
        holding(CAMERA, np.array([[-60.0, 0.0], [60.0, 0.0]]))


def test_rays_and_projection_are_each_others_inverse() -> None:
    points = CAMERA.position() + 5.0 * CAMERA.rays(16)
    pixels = CAMERA.project(points, 16)[:, :2]
    x, y = np.meshgrid(np.arange(16) + 0.5, np.arange(16) + 0.5)
    np.testing.assert_allclose(pixels, np.stack([x.ravel(), y.ravel()], axis=1), atol=1e-9)
    ground = ground_points(CAMERA, 16)
    seen = np.isfinite(ground[:, 0])
    assert 0.3 < seen.mean() < 0.9
    back = CAMERA.project(np.pad(ground[seen], ((0, 0), (0, 1))), 16)[:, :2]
    np.testing.assert_allclose(back, np.stack([x.ravel(), y.ravel()], axis=1)[seen], atol=1e-6)


def test_rays_meet_turned_boxes_and_balls_where_they_stand() -> None:
    rays = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    box = Box((0.0, 5.0, -1.0), (2.0, 2.0, 2.0), "metal", turn=45.0)
    far = box.meet(np.zeros(3), rays)
    assert far[0] == pytest.approx(5 - np.sqrt(2))
    assert np.isinf(far[1])
    normals, _ = Box((0.0, 5.0, -1.0), (2.0, 2.0, 2.0), "metal").surface(np.array([[0.2, 4.0, 0.1]]))
    assert normals[0].tolist() == [0, -1, 0]
    ball = Ball((0.0, 5.0, 0.0), 1.0, "leaves")
    assert ball.meet(np.zeros(3), rays).tolist() == [4.0, np.inf]
    np.testing.assert_allclose(ball.surface(np.array([[0.0, 4.0, 0.0]]))[0], [[0, -1, 0]])


def test_heaps_are_met_where_their_nearest_ball_is_and_outlines_leave_no_ray_out() -> None:
    rng = np.random.default_rng(2)
    balls = tuple(Ball((x, y, z), 0.6, "leaves") for x, y, z in rng.uniform((-2, 2, 0), (2, 6, 3), (9, 3)))
    box = Box((1.0, 7.0, 0.0), (3.0, 1.0, 2.0), "metal", turn=30.0)
    beside = Box((4.0, -5.0, 0.0), (0.5, 20.0, 5.0), "brick")  # reaches behind the camera
    rays, origin, heap = CAMERA.rays(40), CAMERA.position(), Heap(balls)
    view = in_view(CAMERA)
    far, which = nearest((heap, box, beside), origin, rays, view, view(origin + rays))
    each = np.stack([heap.meet(origin, rays), box.meet(origin, rays), beside.meet(origin, rays)])
    np.testing.assert_array_equal(far, each.min(axis=0))
    assert set(np.unique(which)) == {-1, 0, 1, 2}
    points = origin + far[which == 0][:, None] * rays[which == 0]
    normals, _ = heap.surface(points)
    away = [np.linalg.norm(points - 0.6 * normals - np.array(ball.middle), axis=1) for ball in balls]
    np.testing.assert_allclose(np.min(away, axis=0), 0, atol=1e-9)


@pytest.mark.parametrize("name", MATERIALS)
def test_materials_keep_their_mean_when_they_are_far_away(name: str) -> None:
    fine, coarse = levels(name)[0], levels(name)[-1]
    assert coarse.shape == (1, 1)
    assert coarse.item() == pytest.approx(float(fine.mean()))
    uv = np.random.default_rng(0).uniform(-9, 9, (500, 2))
    near, far = (albedo(name, uv, np.full(500, pixel)) for pixel in (0.001, 100.0))
    assert np.ptp(far, axis=0).max() < 1e-9
    assert near.std() >= far.std(axis=0).max()
    assert near.min() >= 0
    assert near.max() <= 1


@pytest.mark.parametrize("name", PLACES)
def test_places_show_a_ground_where_the_walk_is_and_things_behind(name: str) -> None:
    plate = plate_of(name, 3, CAMERA, "noon" if name not in INDOORS else "indoor", 48, behind=2.0)
    assert plate.image.shape == (3, 48, 48)
    assert len(plate.lit) == len(light("noon" if name not in INDOORS else "indoor").lamps)
    places = np.array([[x, y, 0.0] for x in (-1.0, 0, 1.0) for y in (-2.0, 0.0, 2.0)])
    at = np.clip(CAMERA.project(places, 48)[:, :2].astype(int), 0, 47)
    assert float(plate.ground[at[:, 1], at[:, 0]].min()) > 0.9
    assert float(plate.lit[:, at[:, 1], at[:, 0]].min()) > 0.9  # nothing shades the walk
    assert float(plate.ground[:8].max()) == 0
    assert float(plate.image.std()) > 0.03
    other = plate_of(name, 4, CAMERA, "noon" if name not in INDOORS else "indoor", 48, behind=2.0)
    assert float((plate.image - other.image).abs().mean()) > 0.01


def test_light_of_a_place_is_that_of_the_walk() -> None:
    yard = place("yard", 1, 1.0)
    bright, dim = (draw(yard, CAMERA, light(name), 32, 1)[0].mean() for name in ("overcast", "dusk"))
    assert bright > 1.2 * dim


def spec(lamp: str, gait: str = "normal", **changes: object) -> SequenceSpec:
    own = SequenceSpec(gait=gait, path="past", light=lamp, frames=5, fps=5, size=96, cloth=Cloth(engine="skinned"))
    return replace(own, camera=CAMERA, **changes)  # type: ignore[arg-type]


def darkest(buffers: Buffers, frame: int) -> tuple[torch.Tensor, float]:
    """The pixel (x, y) in the deepest shadow of a frame from the sky, and how much of it is hidden."""
    part = slice(buffers.shaded_starts[frame], buffers.shaded_starts[frame + 1])
    hidden, where = buffers.hidden[0, part].max(dim=0)
    pixel = int(buffers.shaded[part][where])
    return torch.tensor([pixel % buffers.size, pixel // buffers.size]), float(hidden)


def test_shadows_touch_the_feet_of_who_stands_and_fade_under_who_flies() -> None:
    walking = build_sequence(spec("overcast"))
    deepest = []
    for t in range(walking.frames):
        at, hidden = darkest(walking, t)
        box = walking.boxes[t]
        assert box[0] - 2 <= at[0] <= box[2] + 2
        assert abs(float(at[1] - box[3])) < 8  # pixels of a person of about forty
        deepest.append(hidden)
    assert min(deepest) > 0.5
    jogging = build_sequence(spec("overcast", "jog", fps=12, frames=12))
    depth = [darkest(jogging, t)[1] for t in range(12)]
    assert min(depth) < max(depth) - 0.1


def test_a_contact_shadow_tells_who_stands_from_who_floats_and_from_who_flies() -> None:
    rig, lamp, times = load_rig(), light("overcast"), np.arange(30) / 30
    for name in ("normal", "jog"):
        own = gait(name)
        walked = walk_of(rig, own, "bend", 4.0, times)
        stands = flat(rig, own, "bend", 4.0, times)
        assert stands.any()
        darkness = []
        for t in np.flatnonzero(stands)[::3]:
            hidden, gap = contact_shadow(walked.vertices[t], lamp, walked.place[t])
            assert hidden > 0.6
            assert gap < 0.03
            floats = contact_shadow(walked.vertices[t] + [0, 0, 0.1], lamp, walked.place[t])
            assert floats[0] < hidden - 0.2
            assert floats[1] == np.inf
            darkness.append(hidden)
        lowest = walked.vertices[..., 2].min(axis=1)
        assert lowest[stands].max() < 0.001
        if own.duty < 0.5:
            highest = int(lowest.argmax())
            assert not stands[highest]
            flown = contact_shadow(walked.vertices[highest], lamp, walked.place[highest])
            assert flown[0] < min(darkness) - 0.2
    far = walked.vertices[0] + [50.0, 0, 0]
    assert contact_shadow(far, lamp, walked.place[0]) == (0.0, np.inf)


def test_a_lamp_throws_a_shadow_away_from_itself() -> None:
    buffers, lamp = build_sequence(spec("low_sun")), light("low_sun")
    part = slice(buffers.shaded_starts[2], buffers.shaded_starts[3])
    dark = buffers.hidden[1, part] > 0.6
    columns = buffers.shaded[part][dark] % buffers.size
    feet = (buffers.boxes[2, 0] + buffers.boxes[2, 2]) / 2
    assert lamp.lamps[0][0][0] > 0  # from the right, so the shadow falls to the left
    assert int(dark.sum()) > 20
    assert float(columns.float().mean()) < float(feet) - 4


def test_the_shadow_darkens_the_ground_and_nothing_else() -> None:
    buffers = build_sequence(spec("noon"))
    lamps = len(light("noon").lamps)
    white = Plate(torch.ones(3, 96, 96), torch.ones(96, 96), torch.ones(lamps, 96, 96))
    under = shadowed(buffers, light("noon"), white, [0, 3])
    assert under.shape == (2, 3, 96, 96)
    assert float(under.min()) < 0.7
    assert float((under < 0.995).any(dim=1).float().mean()) < 0.35
    none = Plate(white.image, torch.zeros(96, 96), white.lit)
    assert torch.equal(shadowed(buffers, light("noon"), none, [0]), white.image[None])
    shaded_already = Plate(white.image, white.ground, torch.zeros(lamps, 96, 96))
    assert float(shadowed(buffers, light("noon"), shaded_already, [0]).min()) > float(under.min())


def test_shadows_of_a_pillar_lie_at_its_foot() -> None:
    ground = ground_points(CAMERA, 64)
    pillar = np.stack(np.meshgrid([-0.05, 0.0, 0.05], [-0.05, 0.05], np.arange(0, 1.8, 0.02)), axis=-1).reshape(-1, 3)
    pixels, hidden = shadows(pillar, light("noon"), ground, np.zeros(2))
    assert hidden.shape == (2, len(pixels))
    away = np.linalg.norm(ground[pixels], axis=1)
    assert hidden[0][away < 0.1].min() > hidden[0][away > 0.8].max()


def test_hollows_are_darker_than_the_open() -> None:
    rows, columns = np.indices((20, 20)).reshape(2, -1)
    depth = np.where((rows > 8) & (rows < 12), 5.06, 5.0)
    left = hollows(rows, columns, depth, 400.0)
    assert left[(rows == 10)].mean() < left[(rows == 2)].mean() - 0.1
    assert left.max() <= 1
    assert len(hollows(rows[:0], columns[:0], depth[:0], 400.0)) == 0


def test_grain_is_the_same_for_a_frame_and_differs_between_frames(walk: Buffers, plate: Plate) -> None:
    textures = {name: torch.full((3, 8, 8), 0.5) for name in ("shirt", "trousers", "hat")}
    still, grainy = (Scene("x", walk, light("overcast"), plate, grain) for grain in (0.0, 0.02))
    clean, first = still.render(textures), grainy.render(textures)
    assert torch.equal(first, grainy.render(textures))
    assert torch.equal(first[2:3], grainy.render(textures, [2]))
    noise = first - clean
    assert float(noise.std()) == pytest.approx(0.02, rel=0.1)
    assert float((noise[0] - noise[1]).abs().mean()) > 0.01


def test_lights_of_a_walk_are_those_of_its_place() -> None:
    lit = under_lights(CANDIDATES[0], 0.25, 32, "skinned")
    inside = CANDIDATES[0].place in INDOORS
    assert len(lit) == sum((name in ("indoor", "white lamps")) == inside for name in LIGHTS)
    assert len({scene.label for scene in lit}) == len(lit)


# plates of a user's own


def test_photographs_and_clips_are_plates(tmp_path: Path, walk: Buffers) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    plate = plate_from_file(tmp_path / "a.png", 32, CAMERA, light("sun"))
    assert torch.equal(plate.image, square(pixels, 32))
    assert plate.lit.shape == (1, 32, 32)
    assert float(plate.ground[0].max()) == 0
    assert float(plate.ground[-1].min()) == 1
    clip = [Image.fromarray(np.full((32, 32, 3), 90, dtype=np.uint8)) for _ in range(5)]
    clip[2] = Image.fromarray(np.full((32, 32, 3), 250, dtype=np.uint8))  # somebody passes
    clip[0].save(tmp_path / "a.gif", save_all=True, append_images=clip[1:])
    assert int(np.abs(read_image(tmp_path / "a.gif").astype(int) - 90).max()) <= 2
    per_frame = plate_from_image(np.stack([pixels] * 4), 64, CAMERA, light("overcast"))
    textures = {name: torch.full((3, 8, 8), 0.5) for name in ("shirt", "trousers", "hat")}
    moving = replace(per_frame, image=torch.stack([i * per_frame.image[0] / 4 for i in range(4)]))
    scene = Scene("x", walk, light("overcast"), moving)
    frames = scene.render(textures)
    assert frames.shape == (4, 3, 64, 64)
    assert torch.equal(scene.render(textures, [3]), frames[3:])
    assert float(frames[3, :, :4].mean()) > float(frames[1, :, :4].mean()) > float(frames[0, :, :4].mean())
    assert torch.equal(moving.still(), moving.image[0])
    with pytest.raises(ConfigError, match="plate has shape"):
        Scene("x", walk, light("overcast"), replace(moving, image=moving.image[:3])).render(textures)


@pytest.mark.parametrize("own", [Camera(fov=50, height=1.5, elevation=3.0), Camera(fov=40, height=6.0, elevation=18.0)])
def test_the_camera_of_a_clip_follows_from_its_people(own: Camera) -> None:
    """Also where one of the boxes is no person."""
    camera, rng = replace(own, distance=14.0), np.random.default_rng(0)
    feet = rng.uniform((-3.0, -4.0), (3.0, 12.0), (12, 2))
    stature = STATURE + rng.normal(0, 0.04, 12)
    low, top = (camera.project(np.column_stack([feet, z]), 416)[:, 1] for z in (np.zeros(12), stature))
    boxes = torch.from_numpy(np.stack([low * 0 + 100, top, low * 0 + 140, low], axis=1))
    boxes[3, 1] += 90  # a bag
    found = camera_from_people(boxes, 416, own.fov)
    assert found.height == pytest.approx(own.height, rel=0.1)
    assert found.elevation == pytest.approx(own.elevation, abs=1.5)
    with pytest.raises(ConfigError, match="four people"):
        camera_from_people(boxes[:3], 416, own.fov)


def test_a_camera_of_given_height_keeps_it_and_looks_down_as_told() -> None:
    own = Camera(distance=9.0, elevation=5.0, fov=50.0, height=3.0)
    assert own.position().tolist() == [0.0, -9.0, 3.0]
    horizon = np.array([[0.0, 1e7, 3.0]])
    below = 0.5 - own.project(horizon, 1)[0, 1]
    assert below == pytest.approx(np.tan(np.radians(5)) / (2 * np.tan(np.radians(25))), rel=1e-3)
    moved = holding(own, np.array([[-2.0, 0.0], [2.0, 0.0]]))
    assert (moved.height, moved.elevation) == (3.0, 5.0)
    with pytest.raises(ConfigError, match="height=99"):
        Camera(height=99.0)
    spec, _ = Walk(gait="stroll", path="past", light="sun", place="street", height=2.0).spec(1.0, 64)
    assert spec.camera.height == 2.0


def test_noise_of_an_image_is_told_from_its_content() -> None:
    rows = torch.linspace(0.2, 0.7, 96)[None, :, None].expand(3, 96, 96).clone()
    rows[:, 30:60, 30:60] = 0.9
    noise = torch.randn(3, 96, 96, generator=torch.Generator().manual_seed(0))
    assert noise_of(rows) < 1e-4
    for sigma in (0.01, 0.03):
        assert noise_of(rows + sigma * noise) == pytest.approx(sigma, rel=0.15)


def test_a_person_before_a_photograph_gets_its_exposure_tint_and_noise(walk: Buffers, plate: Plate) -> None:
    textures = {name: torch.full((3, 8, 8), 0.5) for name in ("shirt", "trousers", "hat")}
    scene = Scene("x", walk, light("overcast"), plate)
    person = coverage(walk, [0])[0, 0] > 0.99
    assert 0 < float(person.float().mean()) < 0.5

    def shirt(level: float, red: float) -> torch.Tensor:
        photo = torch.full((3, 64, 64), level)
        photo[0] *= red
        made = matched(scene, replace(plate, image=photo))
        return made.render(textures, [0])[0][:, person].mean(dim=1)

    dim, bright, warm = shirt(0.2, 1.0), shirt(0.5, 1.0), shirt(0.4, 1.15)
    assert float(bright.mean()) > 1.5 * float(dim.mean())
    assert float(warm[0] / warm[2]) > 1.1 * float(bright[0] / bright[2])
    grainy = plate_from_image(
        np.random.default_rng(0).normal(120, 8, (64, 64, 3)).astype(np.uint8), 64, CAMERA, scene.light
    )
    made = matched(scene, grainy)
    assert made.grain == grainy.grain == pytest.approx(8 / 255, rel=0.2)
    first, second = made.render(textures, [0])[0], replace(made, label="y").render(textures, [0])[0]
    moved = (first - second).abs().amax(dim=0)
    assert float(moved[person].mean()) > 0.01  # noise on the person
    assert float(moved[coverage(walk, [0])[0, 0] == 0].max()) == 0  # none on the photograph, which has its own


def test_plates_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"nothing")
    for name in ("a.png", "none.png"):
        with pytest.raises(AssetError, match="cannot be read as an image"):
            read_image(tmp_path / name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(AssetError, match="cannot be read as an image"):
        read_image(tmp_path / "folder")
    with pytest.raises(ConfigError, match="shape"):
        square(np.zeros((4, 4), dtype=np.uint8), 8)
