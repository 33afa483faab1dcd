"""The default of `accelerate(pipe)` does on a trained model what it was chosen for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hasten
from hasten.bench.plain import plain_samplers
from hasten.bench.subject import open_model
from hasten.quality.metrics import psnr

PROMPTS, COUNT = 6, 9


@pytest.fixture(scope="module")
def model():
    opened = open_model("emoji-flux")
    opened.pipe.set_progress_bar_config(disable=True)
    return opened


def drawn(model, scale, steps=50):
    call = {"true_cfg_scale": scale, "negative_prompt": ""} if scale else {}
    prompts = model.prompts[:PROMPTS]
    seeds = [torch.Generator().manual_seed(i) for i in range(PROMPTS)]
    size = {"height": 64, "width": 64}
    return model.pipe(prompts, num_inference_steps=steps, generator=seeds, output_type="pt", **call, **size).images


@pytest.mark.parametrize("scale", [None, 3.0])
def test_the_default_is_nearer_to_the_full_run_than_its_rivals(model, scale):
    full = drawn(model, scale)

    def quality(images):
        return float(np.mean([psnr(a, b) for a, b in zip(images, full, strict=True)]))

    def cached(**given):
        with hasten.accelerate(model.pipe, **given) as run:
            images = drawn(model, scale)
        assert run.summary().computed_steps == COUNT
        return quality(images)

    default = cached(computed_steps=COUNT)
    assert default > cached(computed_steps=COUNT, schedule="uniform") + 2
    # With guidance the steps are worth decibels; without it they have to be level with even ones.
    assert default > cached(computed_steps=COUNT, schedule="even") + (1 if scale else -0.5)
    if scale:
        assert default > cached(computed_steps=COUNT, sigma=0.7) + 0.2  # nearly all of the slope
    for sampler in ("unipc:spacing=beta", "dpmpp:spacing=beta"):
        with plain_samplers()[sampler](model.pipe):
            assert default > quality(drawn(model, scale, COUNT)) + 1
