"""Modular pipelines of diffusers are accelerated like any other."""

import diffusers
import pytest
import torch
from pipelines import make_pipe
from test_engine import leftovers
from test_unets import sdxl  # noqa: F401 - a fixture

import hasten
from hasten.errors import TargetError

STEPS = 9


def assembled(blocks, components):
    pipe = blocks.init_pipeline()
    pipe.update_components(**{k: v for k, v in components.items() if v is not None and k in pipe.component_names})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **call):
    call = {"prompt": "red apple", "num_inference_steps": STEPS, "output_type": "latent", "output": "images"} | call
    return pipe(**call, generator=torch.Generator().manual_seed(0))


def check(pipe, name, passes, **call):
    module = getattr(pipe, name)
    plain, before = draw(pipe, **call), leftovers(module)
    with hasten.accelerate(pipe, "taylorseer", interval=1):
        assert torch.equal(draw(pipe, **call), plain)
    with hasten.accelerate(pipe, "taylorseer", schedule="even", computed_steps=4) as run:
        assert list(run.engines) == [name]
        fast = draw(pipe, **call)
        assert run.summary().computed_steps == 4
        assert {record.pass_name for record in run.records} == passes
        # All passes of a step are computed or skipped together.
        assert len({(record.step, record.computed) for record in run.records}) == STEPS
        assert torch.equal(draw(pipe, **call), fast)
    assert 0 < (fast - plain).norm() / plain.norm() < 0.5
    assert leftovers(module) == before
    assert torch.equal(draw(pipe, **call), plain)


def test_flux_in_modules():
    pipe = assembled(diffusers.FluxAutoBlocks(), make_pipe().components)
    check(pipe, "transformer", {"pass0"}, height=32, width=32, max_sequence_length=8)


def test_sdxl_in_modules_with_a_guider(sdxl):  # noqa: F811
    pipe = assembled(diffusers.StableDiffusionXLAutoBlocks(), sdxl.components)
    pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0))
    check(pipe, "unet", {"pass0", "pass1"}, height=16, width=16)


def test_components_have_to_be_there_first():
    with pytest.raises(TargetError, match=r"has no denoiser yet.*load_components"):
        hasten.accelerate(diffusers.FluxAutoBlocks().init_pipeline(), "reuse")
