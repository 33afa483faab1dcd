"""LEAP with all steps and plain coefficients on pipelines of diffusers: the plain run, or refused by name."""

from __future__ import annotations

import pytest
from leap_pipelines import EXACT, PIPELINES, check

REFUSED = {  # and the word that says why
    "ddpm": "DDPMScheduler",
    "ddim that clips": "clip_sample=True",
    "stable diffusion, dpmpp of the sde": "DPMSolverMultistepScheduler",
    "stable diffusion, plms": "PNDMScheduler",
    "stable diffusion, ancestral": "EulerAncestralDiscreteScheduler",
    "stable diffusion, heun": "HeunDiscreteScheduler",
    "stable diffusion, lcm": "LCMScheduler",
    "flux image to image": "starts later",
    "flux inpaint": "starts later",
    "qwen image to image": "starts later",
    "sd3 image to image": "starts later",
    "sd3 inpaint": "starts later",
    "sana image to image": "SCMScheduler",
    "framepack": "several runs",
    "ltx condition": "FlowMatchEulerDiscreteScheduler",  # each token has a time of its own
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.filterwarnings("ignore")
def test_all_steps_are_the_plain_run_or_refused_by_name(name):
    outcome = check(name)
    if name in REFUSED:
        assert REFUSED[name] in (outcome.refused or "")
    else:
        assert outcome.refused is None
        assert outcome.formula < EXACT
        assert outcome.error < EXACT


def test_there_are_thirty_of_them():
    assert len(PIPELINES) >= 30
