"""How much a call guides, as pipelines tell it, and what that does to a forecast of mixed passes."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from pipelines import draw, make_pipe
from test_dvg import euler, film, wan
from test_modular import assembled
from test_modular import draw as draw_modular
from test_unets import sdxl  # noqa: F401 - a fixture

import hasten
from hasten.caching.predictors import hermite_coefficient
from hasten.pipeline.guidance import FROM_ZERO, mixing_scale

METHOD = hasten.HiCache(sigma=0.7, guided_sigma=0.3, order=1, interval=3)


class Embedded(DiffusionPipeline):
    """With a scale that the model is told, beside true guidance."""

    def __call__(self, true_cfg_scale: Any = 1.0, guidance_scale: Any = 3.5, negative_prompt: Any = None) -> Any:
        return mixing_scale()


class Other(DiffusionPipeline):
    """With passes besides."""

    def __call__(self, guidance_scale: Any = 5.0, pag_scale: Any = None, stg_scale: Any = None) -> Any:
        return mixing_scale()


class ZImagePipeline(Other):
    """Of the name of one that counts from 0."""


@pytest.mark.parametrize(
    ("pipe", "call", "scale"),
    [
        (ZImagePipeline, {"guidance_scale": 4.0}, 5.0),
        (ZImagePipeline, {"guidance_scale": 0.5}, 1.5),
        (ZImagePipeline, {"guidance_scale": 0.0}, None),
        (Embedded, {"true_cfg_scale": 4, "negative_prompt": "cat"}, 4.0),
        (Embedded, {"true_cfg_scale": np.float32(2.5), "negative_prompt": "cat"}, 2.5),
        (Embedded, {"true_cfg_scale": torch.tensor([2.5])}, 2.5),
        (Embedded, {}, None),  # several passes, and not by true guidance: nobody knows what mixes them
        (Embedded, {"true_cfg_scale": None}, 3.5),
        (Other, {}, 5.0),
        (Other, {"guidance_scale": 1.0}, None),
        (Other, {"guidance_scale": 0.0}, None),
        (Other, {"guidance_scale": [5.0, 2.0]}, None),
        (Other, {"guidance_scale": math.nan}, None),
        (Other, {"guidance_scale": math.inf}, None),
        (Other, {"guidance_scale": "5"}, None),
        (Other, {"pag_scale": 3.0}, None),
        (Other, {"stg_scale": 1.0}, None),
        (Other, {"pag_scale": 0.0, "stg_scale": 0.0}, 5.0),
    ],
)
def test_the_scale_that_mixes_passes_is_that_of_the_call(pipe: Any, call: dict[str, Any], scale: float | None) -> None:
    assert pipe()(**call) == scale
    assert mixing_scale() is None


@pytest.mark.parametrize("name", [name for name in dir(diffusers) if re.search("(?<!Modular)Pipeline$", name)])
def test_pipelines_that_count_from_zero_are_those_of_the_list(name: str) -> None:
    """By what they compute: a prediction away from the one that is denied, added to the one that is asked for."""
    try:
        source = inspect.getsource(getattr(diffusers, name).__call__)
    except (TypeError, RuntimeError, ImportError):
        pytest.skip("cannot be imported here")
    scale = r"(?:self\.|current_)?guidance_scale"
    adds = re.search(rf"= (\w+) \+ {scale} \* \(\s*\1 - |\({scale} \+ 1\.?0?\) \* \w+ - {scale} \*", source)
    assert bool(adds) == name.startswith(FROM_ZERO)


def logged(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """The scales that the method is asked for."""
    scales: list[float | None] = []
    own = hasten.HiCache.guided
    monkeypatch.setattr(hasten.HiCache, "guided", lambda self, scale: scales.append(scale) or own(self, scale))
    return scales


def test_each_of_two_experts_has_its_own_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    scales = logged(monkeypatch)
    pipe = wan(euler(shift=1.0), experts=2, boundary_ratio=0.5)
    with hasten.accelerate(pipe, METHOD):
        film(pipe, guided=True, num_inference_steps=8, guidance_scale=5.0, guidance_scale_2=1.5)
    assert scales == [5.0, 1.5]


def test_a_guider_tells_its_scale(sdxl: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    scales = logged(monkeypatch)
    pipe = assembled(diffusers.StableDiffusionXLAutoBlocks(), sdxl.components)
    for from_zero in (False, True):
        guider = diffusers.ClassifierFreeGuidance(guidance_scale=2.0, use_original_formulation=from_zero)
        pipe.update_components(guider=guider)
        with hasten.accelerate(pipe, METHOD):
            draw_modular(pipe, height=16, width=16)
    assert scales == [2.0, 3.0]


def test_every_run_goes_by_its_own_scale() -> None:
    calls = [{"true_cfg_scale": scale, "negative_prompt": "banana"} for scale in (2.0, 6.0, 2.0)]
    calls.insert(1, {})
    pipe = make_pipe()
    with hasten.accelerate(pipe, METHOD):
        together = [draw(pipe, 9, **call) for call in calls]
    for call, latents in zip(calls, together, strict=True):
        with hasten.accelerate(pipe, METHOD):
            assert torch.equal(draw(pipe, 9, **call), latents)
    assert not torch.equal(together[0], together[2])


def test_the_part_of_the_slope_goes_with_the_square_of_the_guidance_above_1() -> None:
    def part(scale: float | None) -> float:
        return hermite_coefficient(1, 1.0, METHOD.guided(scale).sigma)

    ends = [hermite_coefficient(1, 1.0, sigma) for sigma in (0.7, 0.3)]
    assert part(3.0) == pytest.approx((3 * ends[0] + ends[1]) / 4)
    assert part(2.0) == pytest.approx((15 * ends[0] + ends[1]) / 16)
    assert part(1.0) == pytest.approx(ends[0])
    assert part(5.0) == part(7.5) == part(None) == ends[1]


def test_a_server_of_many_scales_keeps_a_bounded_number_of_methods() -> None:
    method = hasten.HiCache(sigma=0.7, guided_sigma=0.3)
    made = [method.guided(scale) for scale in np.linspace(1.0, 9.0, 3000).tolist()]
    assert len({id(one) for one in made}) <= 101
    assert method.guided(2.345) is method.guided(2.345)
