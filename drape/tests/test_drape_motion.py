"""How the person moves: ways, feet that stand still, flights, legs that reach, and cloth that swings."""

from __future__ import annotations

import sys
from functools import cache

import numpy as np
import pytest

from drape.errors import AssetError, ConfigError
from drape.scene.arrays import Floats
from drape.scene.body import BODIES, load_rig
from drape.scene.cloth import CLOTHS, Cloth, edges_of, folds_of
from drape.scene.cloth_engines import simulate
from drape.scene.footfall import FLAT, foot_at
from drape.scene.gait import GAITS, Walked, foot_of, gait, leg_length, plan, walk
from drape.scene.garments import Garment, make_garment, vertex_normals
from drape.scene.paths import BEYOND, PATHS, TIGHTEST, curve
from drape.scene.plausible import hem_of, standing, swing
from drape.walks import TEST, TRAIN, Walk

FPS = 30.0


@pytest.mark.parametrize("name", PATHS)
def test_ways_turn_no_tighter_than_a_metre_and_a_half_and_face_forwards(name: str) -> None:
    for length in (3.0, 6.0, 10.0):
        way = curve(name, length)
        step = np.diff(way.xy, axis=0)
        facing = np.radians(way.heading[1:])
        forward = np.stack([np.sin(facing), -np.cos(facing)], axis=1)
        np.testing.assert_allclose((step * forward).sum(axis=1), np.linalg.norm(step, axis=1), rtol=1e-3)
        turning = np.abs(np.diff(np.radians(way.heading))) / np.diff(way.way)
        assert turning.max() <= 1 / TIGHTEST + 1e-6
        walked = way.xy[(way.way >= 0) & (way.way <= length)]
        np.testing.assert_allclose(walked.min(axis=0) + walked.max(axis=0), 0, atol=1e-9)
    with pytest.raises(ConfigError, match="beyond"):
        way.at(np.array([length + BEYOND + 1]))


def test_a_circle_is_closed_and_a_bend_turns_a_quarter() -> None:
    way = curve("circle", 12.0)
    ends, heading = way.at(np.array([0.0, 12.0]))
    np.testing.assert_allclose(ends[0], ends[1], atol=0.05)
    assert heading[1] - heading[0] == pytest.approx(360, abs=1)
    _, heading = curve("bend", 8.0).at(np.array([0.0, 8.0]))
    assert heading[1] - heading[0] == pytest.approx(90, abs=1)


@cache
def strolled(name: str, path: str, body: str = "middle") -> tuple[Floats, Walked]:
    times = 0.3 + np.arange(45) / FPS
    return times, walk(load_rig(body), gait(name), path, 5.0, times)


@pytest.mark.parametrize("path", ["past", "circle"])
@pytest.mark.parametrize("name", GAITS)
def test_feet_do_not_slide_while_they_stand(name: str, path: str) -> None:
    """In stance the sole moves by less than 5 cm/s, whatever the gait and the way."""
    times, walked = strolled(name, path)
    found = standing(load_rig(), gait(name), path, 5.0, times, walked)
    assert len(found.sliding) > 20
    assert found.sliding.max() < 0.05


CHOSEN = {(own.gait, own.body): own for own in (*TRAIN, *TEST)}  # one walk of each gait and body, with its own way


@pytest.mark.parametrize("own", CHOSEN.values(), ids=lambda own: own.label())
def test_feet_of_the_walks_do_not_slide(own: Walk) -> None:
    rig, g, times = load_rig(own.body), gait(own.gait), 0.3 + np.arange(45) / FPS
    walked = walk(rig, g, own.path, own.seconds, times, own.phase)
    found = standing(rig, g, own.path, own.seconds, times, walked, own.phase)
    assert len(found.sliding) > 20
    assert found.sliding.max() < 0.035
    assert found.lowest > -0.001


def test_a_foot_rolls_off_over_toes_that_stay_where_they_are() -> None:
    """Toes whose joints lie beside and before the ball stand while the heel rises, also in a turn."""
    rig, g = load_rig("tall"), gait("jog")
    landing, foot = plan(rig, g, "bend", 4.0), foot_of(rig, g)
    times = np.arange(0.0, 1.5, 1 / 60)
    share = foot_at(landing, foot, 1, g.cadence * times)[3]
    posed = walk(rig, g, "bend", 4.0, times).vertices
    for number in range(1, 6):
        bones = [bone.startswith(f"toe{number}-") and bone.endswith(".L") for bone in rig.bones]
        owned = rig.weights[:, bones].sum(axis=1) > 0.999
        toes = posed[:, owned]
        assert toes.shape[1] > 3
        rolls = share > FLAT[1]
        together = rolls[1:] & rolls[:-1] & (share[1:] > share[:-1])
        assert together.sum() > 10
        np.testing.assert_allclose(toes[1:][together], toes[:-1][together], atol=1e-4)


@pytest.mark.parametrize("name", GAITS)
def test_nobody_sinks_or_floats_and_only_runners_fly(name: str) -> None:
    times, walked = strolled(name, "past")
    found = standing(load_rig(), gait(name), "past", 5.0, times, walked)
    assert found.lowest > -0.005
    highest = walked.vertices[..., 2].min(axis=1).max()
    if gait(name).duty < 0.5:
        assert highest > 0.02
        assert 0.08 < found.flying < 0.45
    else:
        assert highest < 0.005
        assert found.flying == 0


def test_a_walk_whose_feet_are_dragged_is_seen_to_slide() -> None:
    times, walked = strolled("normal", "past")
    dragged = walked.vertices.copy()
    dragged[..., 0] += 0.2 * times[:, None]  # metres per second
    found = standing(load_rig(), gait("normal"), "past", 5.0, times, Walked(dragged, walked.place, walked.heading))
    assert np.median(found.sliding) == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("body", BODIES)
def test_bodies_differ_and_walk_alike(body: str) -> None:
    rig = load_rig(body)
    assert 1.55 < float(np.ptp(rig.vertices[:, 2])) < 1.95
    _, walked = strolled("normal", "past", body)
    assert walked.vertices[..., 2].min() > -0.005
    speed = np.linalg.norm(np.diff(walked.place, axis=0), axis=1).mean() * FPS
    assert speed == pytest.approx(gait("normal").stride * gait("normal").cadence * leg_length(rig), rel=0.02)


def test_bodies_have_different_statures() -> None:
    assert len({round(float(np.ptp(load_rig(body).vertices[:, 2])), 2) for body in BODIES}) >= 5


def test_a_step_later_the_pose_is_mirrored() -> None:
    rig, g = load_rig(), gait("brisk")
    posed = walk(rig, g, "towards", 5.0, np.array([1.0, 1.0 + 0.5 / g.cadence]))
    local = posed.vertices - np.pad(posed.place, ((0, 0), (0, 1)))[:, None]
    left, right = ([rig.weights[:, rig.bone(f"{b}.{s}")].argmax() for b in ("lowerleg02", "lowerarm02")] for s in "LR")
    np.testing.assert_allclose(local[0, left, 1], local[1, right, 1], atol=0.03)
    assert abs(local[0, left[0], 1] - local[0, right[0], 1]) > 0.15


def test_the_phase_at_the_start_shifts_the_gait_and_not_the_way() -> None:
    rig, g, times = load_rig(), gait("normal"), np.array([0.5])
    first, second = (walk(rig, g, "past", 4.0, times, phase) for phase in (0.0, 0.5))
    np.testing.assert_allclose(first.place, second.place, atol=1e-6)
    assert np.abs(first.vertices - second.vertices).max() > 0.2


RATE = 24.0


@cache
def worn(name: str, own: str) -> tuple[Garment, Floats, Floats, Walked, Floats]:
    """A garment, its shells and normals over a walk, the walk, and its rest shell."""
    rig = load_rig()
    walked = walk(rig, gait(own), "past", 4.0, np.arange(-12, 36) / RATE)
    garment = make_garment(name, rig)
    normals = np.stack([vertex_normals(v, rig.faces) for v in walked.vertices])
    shells, facing = garment.worn(walked.vertices, normals)
    rest, _ = garment.worn(rig.vertices, vertex_normals(rig.vertices, rig.faces))
    return garment, shells, facing, walked, rest


@pytest.mark.parametrize("name", ["shirt", "trousers"])
def test_cloth_swings_and_stays_off_the_skin_and_on_the_body(name: str) -> None:
    """Hems swing by a centimetre and more (root mean square), where cloth of 0.1.0 moved by one millimetre."""
    garment, shells, normals, walked, rest = worn(name, "normal")
    moved = simulate(garment, shells, normals, rest, Cloth(), RATE)
    assert np.isfinite(moved).all()
    hem = hem_of(garment)
    swung = swing(moved, shells, walked.heading, RATE)
    assert float(np.sqrt((swung[:, hem] ** 2).mean())) > 0.01
    held = garment.loose == 0
    np.testing.assert_allclose(moved[:, held], shells[:, held], atol=1e-9)
    assert float((np.linalg.norm(moved - shells, axis=2) - garment.loose).max()) < 1e-6
    depth = ((moved - shells) * normals).sum(axis=2) + garment.offset
    assert float((depth - garment.least).min()) > -0.03  # kept on the body comes last and may take a little back
    edges = edges_of(garment.faces)
    length, before = (np.linalg.norm(v[edges[:, 0]] - v[edges[:, 1]], axis=1) for v in (moved[-1], rest))
    assert float(np.median(np.abs(length / before - 1))) < 0.12


def test_a_jog_swings_a_shirt_more_than_skinning_does() -> None:
    garment, shells, normals, walked, rest = worn("shirt", "jog")
    skinned = simulate(garment, shells, normals, rest, Cloth(engine="skinned"), RATE)
    assert float(swing(skinned, shells, walked.heading, RATE).max()) == 0
    moved = simulate(garment, shells, normals, rest, CLOTHS["light"], RATE)
    hem = hem_of(garment)
    assert float(np.sqrt((swing(moved, shells, walked.heading, RATE)[:, hem] ** 2).mean())) > 0.015


def test_garments_end_in_straight_cuts() -> None:
    """Hem, collar, waist and legs lie in planes, to within the twentieth of an edge that a cut keeps off a vertex."""
    rig = load_rig()
    for name in ("shirt", "trousers"):
        garment = make_garment(name, rig)
        count = np.zeros((len(garment.height),) * 2, dtype=int)
        for i, j in ((0, 1), (1, 2), (2, 0)):
            np.add.at(count, (garment.faces[:, i], garment.faces[:, j]), 1)
        border = np.unique(np.argwhere((count + count.T == 1) & (count > 0)))
        limbs = np.abs(garment.on_body(rig.vertices)[:, 0]) > 0.3  # sleeves end across the arm
        border = border[~limbs[border]]
        levels = np.sort(garment.height[border])
        gaps = np.flatnonzero(np.diff(levels) > 0.1)
        assert len(gaps) == 1
        for part in np.split(levels, gaps + 1):
            assert np.ptp(part) < 0.012, name


def test_stiffer_cloth_keeps_its_edges_better() -> None:
    garment, shells, normals, _, rest = worn("shirt", "normal")
    edges = edges_of(garment.faces)
    before = np.linalg.norm(rest[edges[:, 0]] - rest[edges[:, 1]], axis=1)

    def stretch(stiffness: float) -> float:
        moved = simulate(garment, shells, normals, rest, Cloth(stiffness=stiffness, slack=0.0), RATE)[30]
        length = np.linalg.norm(moved[edges[:, 0]] - moved[edges[:, 1]], axis=1)
        return float(np.abs(length / before - 1).mean())

    assert stretch(0.9) < stretch(0.05)


def test_folds_are_the_corners_across_shared_edges() -> None:
    square = np.array([[0, 1, 2], [0, 2, 3]])
    assert {tuple(sorted(pair)) for pair in folds_of(square).tolist()} == {(1, 3)}


def test_the_engine_newton_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "newton", None)
    garment, shells, normals, _, rest = worn("shirt", "jog")
    with pytest.raises(AssetError, match=r"pip install newton"):
        simulate(garment, shells, normals, rest, Cloth(engine="newton"), 6)


@pytest.mark.slow
def test_newton_swings_cloth_too() -> None:
    pytest.importorskip("newton")
    garment, shells, normals, walked, rest = worn("trousers", "normal")
    moved = simulate(garment, shells, normals, rest, Cloth(engine="newton"), RATE)
    assert np.isfinite(moved).all()
    assert float((np.linalg.norm(moved - shells, axis=2) - garment.loose).max()) < 1e-6
    hem = hem_of(garment)
    assert float(np.sqrt((swing(moved, shells, walked.heading, RATE)[:, hem] ** 2).mean())) > 0.003
