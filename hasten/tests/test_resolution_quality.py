"""What resolution methods do to the images of a trained model: quality by margins, seams by numbers."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import torch
from hasten_zoo.emoji_flux.data import load_emoji_set
from torch import Tensor

import hasten
from hasten.bench import subject
from hasten.quality.metrics import psnr
from hasten.resolution.seams import seam_steps

PROMPTS = 3


@cache
def model() -> subject.Subject:
    loaded = subject.load("emoji-flux")
    loaded.pipe.set_progress_bar_config(disable=True)
    return loaded


def images(steps: int, method: object | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Images `[3, H, W]` of the first prompts, and the layouts after each run's first promotion."""
    drawn, layouts = [], []
    for seed, prompt in enumerate(model().prompts[:PROMPTS]):
        call = model().call | {"num_inference_steps": steps, "output_type": "pt"}
        call["generator"] = torch.Generator().manual_seed(seed)
        if method is None:
            drawn.append(model().pipe(prompt, **call).images[0])
            continue
        with hasten.accelerate(model().pipe, method) as run:
            drawn.append(model().pipe(prompt, **call).images[0])
            assert run.stages is not None
            layouts.append(run.stages.plans[0].fine)
    return drawn, layouts


@cache
def reference() -> list[Tensor]:
    return images(50)[0]


@cache
def fresco() -> tuple[list[Tensor], list[Tensor]]:
    return images(18, hasten.Fresco(preset="18"))


def quality(drawn: list[Tensor]) -> float:
    """Mean PSNR to the plain sampler's 50 steps, dB."""
    return sum(psnr(a, b) for a, b in zip(drawn, reference(), strict=True)) / PROMPTS


def test_bound_noise_and_the_exact_jump_stay_nearer_to_the_full_run() -> None:
    best = quality(fresco()[0])
    assert best > 24
    assert best > quality(images(18, hasten.Fresco(preset="18", jump="r1"))[0]) + 1
    assert best > quality(images(18, hasten.Bottleneck(stages=(9, 9)))[0]) + 3
    assert best > quality(images(18, hasten.RALU(preset="18"))[0]) + 3


def test_a_short_mixed_stage_is_better_and_the_plain_sampler_best() -> None:
    """The negative result is part of what is claimed: on this model nothing coarse is as near as plain steps."""
    short = quality(images(18, hasten.Fresco(stages=(6, 2, 10), shares=(0.3,)))[0])
    assert quality(fresco()[0]) + 2 < short < quality(images(12)[0])


def test_images_that_began_coarse_are_nearer_to_what_the_caption_had_in_training() -> None:
    """Far from the full run is not bad: the model knows its captions better at half size, and by copied pixels."""
    known = load_emoji_set()
    own = [known.at(64)[known.captions.index(prompt)] for prompt in model().prompts[:PROMPTS]]

    def truth(drawn: list[Tensor]) -> float:
        return sum(psnr(a, b) for a, b in zip(drawn, own, strict=True)) / PROMPTS

    two_stages = truth(images(18, hasten.Bottleneck(stages=(9, 9)))[0])
    assert two_stages > truth(reference()) + 2
    assert two_stages > truth(images(11)[0]) + 2  # as many operations
    assert truth(images(18, hasten.Spectral(stages=(6, 12)))[0]) > truth(reference()) + 0.5


def test_no_seam_is_left_where_tokens_were_promoted_at_different_times() -> None:
    """The step across the borders of what was promoted first is no larger than elsewhere."""
    for drawn, fine in zip(*fresco(), strict=True):
        seam, rest = seam_steps(drawn, fine)
        assert seam < rest
        cells = drawn.shape[1] // fine.shape[0], drawn.shape[2] // fine.shape[1]
        inside = fine.repeat_interleave(cells[0], 0).repeat_interleave(cells[1], 1)
        broken, rest = seam_steps(drawn + 0.1 * inside, fine)
        assert broken > 2 * rest  # the statistic would see one


def test_an_edit_leaves_nearly_all_of_the_rest_exactly_as_it_was() -> None:
    """The VAE of the editing model loses nothing: what differs lies in fine tokens of the selection and their blend."""
    editor = subject.load("emoji-kontext")
    editor.pipe.set_progress_bar_config(disable=True)
    for seed, edit in enumerate(editor.edits[2:4]):
        call = editor.call | {"num_inference_steps": 10, "output_type": "pt", "image": edit.source[None]}
        method = hasten.SpecEdit(discrepancy="latent", draft=6, mixed=4, final=0, coverage=3)
        drawn = []
        for used in (None, method):
            generator = torch.Generator().manual_seed(seed)
            with nullcontext() if used is None else hasten.accelerate(editor.pipe, used):
                image = editor.pipe(prompt=edit.prompt, generator=generator, **call).images[0]
            drawn.append((image - edit.source).abs().amax(0)[~edit.mask])
        plain, kept = drawn
        assert (kept < 1e-5).float().mean() > 0.85
        assert (plain < 1e-5).float().mean() < 0.5
        assert kept.square().mean() < plain.square().mean()
