"""What an optimisation's expectation is over: framing keeps the person whole, other lights keep the exposure."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from drape.controls import control
from drape.gamut import Gamut
from drape.scene.scene import Scene
from drape.scene.sequence import Buffers
from drape.transforms import LIGHT_KINDS, NOTHING, STATES, Drawn, Lamp, Transforms, drawn_for, framed, mosaics, shown

STILL = replace(NOTHING, zoom=(-0.28, 0.47), shift=0.8)


def marked(box: list[float], side: int = 64) -> torch.Tensor:
    """A frame that is white inside a box and black outside."""
    frame = torch.zeros(1, 3, side, side)
    x0, y0, x1, y1 = (int(v) for v in box)
    frame[..., y0:y1, x0:x1] = 1
    return frame


@pytest.mark.parametrize("state", [(-3.0, -3, -3), (3.0, 3, 3), (0.0, 0, 0), (3.0, -3, 3), (-3.0, 3, 0)])
def test_boxes_follow_zoom_and_shift_and_stay_inside(state: tuple[float, ...]) -> None:
    box = [20.0, 16, 30, 44]
    moved, boxes = framed(marked(box), torch.tensor([box]), STILL, torch.tensor([state]))
    x0, y0, x1, y1 = boxes[0].tolist()
    assert min(x0, y0) > -0.01
    assert max(x1, y1) < 64.01
    inside = moved[0, 0, round(y0) + 1 : round(y1) - 1, round(x0) + 1 : round(x1) - 1]
    assert float(inside.min()) > 0.9
    area = float(moved[0, 0].sum())
    if x1 - x0 >= 10:  # else the edge mirrors a part
        assert area == pytest.approx((x1 - x0) * (y1 - y0), rel=0.06)


def test_zoom_goes_from_the_least_to_the_largest_scale_that_fits() -> None:
    box = torch.tensor([[28.0, 24, 36, 40], [4.0, 2, 20, 62]])
    states = torch.tensor([[9.0, 0, 0], [9.0, 0, 0]])
    _, large = framed(torch.rand(2, 3, 64, 64), box, STILL, states)
    _, small = framed(torch.rand(2, 3, 64, 64), box, STILL, -states)
    height = (large[:, 3] - large[:, 1]).tolist()
    assert height[0] == pytest.approx(16 * 1.6, rel=1e-3)
    assert height[1] == pytest.approx(0.96 * 64, rel=1e-3)  # the second fills the frame already
    assert float(small[0, 3] - small[0, 1]) == pytest.approx(16 * 0.756, rel=1e-3)


def test_nothing_drawn_changes_nothing(scene: Scene) -> None:
    images = control("random", Gamut.proxy())
    drawn = Drawn(scene, torch.randn(4, STATES))
    frames, boxes = shown(drawn, images, torch.tensor([1, 3]), NOTHING)
    torch.testing.assert_close(frames, scene.render(images, [1, 3]))
    assert torch.equal(boxes, scene.buffers.boxes[[1, 3]])


@pytest.mark.parametrize("kind", LIGHT_KINDS)
def test_another_light_keeps_the_exposure_and_changes_the_shading(kind: str, walk: Buffers, scene: Scene) -> None:
    seen_scene = replace(scene, buffers=walk)
    white = {name: torch.full((3, 8, 8), 0.5) for name in ("shirt", "trousers", "hat")}
    lamp = Lamp(kind, (1.5, -1.0, 1.8))
    own, other = seen_scene.render(white, [0]), seen_scene.render(white, [0], lamp)
    person = (own - seen_scene.plate.image).abs().amax(dim=1) > 0.2
    assert float((own - other).abs().max()) > 0.03
    means = [float(image.permute(0, 2, 3, 1)[person].mean()) for image in (own, other)]
    assert means[1] == pytest.approx(means[0], rel=0.12)


def test_a_lamp_lights_what_faces_it_and_a_near_one_what_is_near() -> None:
    towards, away = torch.tensor([[1.0, 0, 0]]), torch.tensor([[-1.0, 0, 0]])
    low, high = torch.tensor([[0.0, 0, 0.2]]), torch.tensor([[0.0, 0, 1.6]])
    for kind in ("directional", "point"):
        lamp = Lamp(kind, (2.0, 0.0, 1.6))
        assert float(lamp.irradiance(towards, high)) > float(lamp.irradiance(away, high)) + 0.3
    assert float(Lamp("point", (1.0, 0, 1.6)).irradiance(towards, high)) > float(
        Lamp("point", (1.0, 0, 1.6)).irradiance(towards, low)
    )
    even = Lamp("directional", (1.0, 0, 1.6))
    assert torch.equal(even.irradiance(towards, high), even.irradiance(towards, low))


def test_places_and_lights_are_drawn_as_often_as_asked(scene: Scene, generator: torch.Generator) -> None:
    other = replace(scene, label="other", plate=replace(scene.plate, image=1 - scene.plate.image))
    two_lamps = replace(scene, label="third", plate=replace(scene.plate, image=torch.zeros(3, 32, 32)))
    transforms = Transforms(lights=0.5, places=0.5)
    drawn = [drawn_for([scene, other, two_lamps], 0, transforms, generator, torch.zeros(4, STATES)) for _ in range(200)]
    lit = sum(d.lamp is not None for d in drawn) / 200
    swapped = sum(d.scene.plate is other.plate for d in drawn) / 200
    assert 0.35 < lit < 0.65
    assert 0.12 < swapped < 0.4  # half of the draws, of two that fit
    assert not any(d.scene.plate is two_lamps.plate for d in drawn)
    assert {d.lamp.kind for d in drawn if d.lamp} == set(LIGHT_KINDS)
    assert all(d.lamp.place[1] <= 0 for d in drawn if d.lamp)


def test_a_mosaic_holds_its_tiles_and_says_where(generator: torch.Generator) -> None:
    tiles, box = torch.rand(5, 3, 8, 8, generator=generator), torch.tensor([1.0, 2, 5, 7])
    frames, boxes = mosaics(tiles, box.expand(5, 4), 2)
    assert frames.shape == (2, 3, 16, 16)
    assert boxes[:4].tolist() == [[1, 2, 5, 7], [9, 2, 13, 7], [1, 10, 5, 15], [9, 10, 13, 15]]
    assert boxes[4].tolist() == box.tolist()
    for number, frame in enumerate((0, 0, 0, 0, 1)):
        x0, y0, x1, y1 = (int(v) for v in boxes[number])
        assert torch.equal(frames[frame, :, y0:y1, x0:x1], tiles[number, :, 2:7, 1:5])
    assert torch.equal(frames[1, :, :, 8:], torch.full((3, 16, 8), 0.5))


def test_cut_outs_keep_the_scale_and_the_whole_person() -> None:
    box = torch.tensor([[40.0, 10, 52, 30]])
    frame = marked([40, 10, 52, 30])
    cut, boxes = framed(frame, box, NOTHING, torch.zeros(1, 3), 32)
    x0, y0, x1, y1 = (round(v) for v in boxes[0].tolist())
    assert cut.shape == (1, 3, 32, 32)
    assert (x1 - x0, y1 - y0) == (12, 20)
    assert float(cut[0, 0, y0 + 1 : y1 - 1, x0 + 1 : x1 - 1].min()) > 0.9
    assert float(cut[0, 0].sum()) == pytest.approx(240, rel=0.02)
    _, shrunk = framed(frame, box, NOTHING, torch.zeros(1, 3), 16)
    assert float(shrunk[0, 3] - shrunk[0, 1]) == pytest.approx(0.96 * 16)  # made smaller where it does not fit
