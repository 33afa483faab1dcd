"""SpecEdit: distances, selectors, seams, and editing pipelines that draft in small."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import tiny
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hasten_zoo.emoji_flux.model import PixelVAE
from test_variants import VARIANTS, autoencoder, flux, image, image_vae, qwen_vae, randn
from torch import Tensor

import hasten
from hasten.errors import (
    AdapterError,
    AlreadyAcceleratedError,
    ConfigError,
    HastenError,
    HastenWarning,
    ScheduleError,
    TargetError,
    UnknownNameError,
)
from hasten.resolution.discrepancy import (
    above_floor,
    cosine_distance,
    global_shift,
    latent_distance,
    median_change,
    perceptual_distance,
    resized,
)
from hasten.resolution.layouts import LATENT_PIXELS, PixelLayout
from hasten.resolution.methods.specedit import SpecEdit
from hasten.resolution.packed import MixedState
from hasten.resolution.positions import TokenSet, children, pack, unpack
from hasten.resolution.seams import blend, locked_velocity, ring_weights, seam_steps
from hasten.resolution.select import above, changed_tokens, coverage, dilate, select, top, two_means

# --- distances


def square(size: int = 16, rows: slice = slice(4, 8), columns: slice = slice(8, 12)) -> Tensor:
    """A map of tokens, `[size, size]` bool, with a rectangle."""
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[rows, columns] = True
    return mask


def edited(source: Tensor, mask: Tensor, seed: int = 5) -> Tensor:
    """Latents that differ from the source in the tokens of the mask, and a little everywhere."""
    pixels = mask.repeat_interleave(2, 0).repeat_interleave(2, 1)
    return source + 0.02 * randn(*source.shape, seed=seed) + pixels * randn(*source.shape, seed=seed + 1)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "latent": latent_distance,
    "cosine": cosine_distance,
    "perceptual": lambda draft, source: perceptual_distance(image_vae(), draft, source),
    "perceptual with frames": lambda draft, source: perceptual_distance(qwen_vae(), draft, source),
}


def overlap(a: Tensor, b: Tensor) -> float:
    """Intersection over union."""
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("kind", DISTANCES)
def test_a_square_edit_is_found(kind: str) -> None:
    source, mask = randn(2, 4, 32, 32), square()
    distance = DISTANCES[kind](edited(source, mask), source)
    assert distance.shape == (2, 16, 16)
    assert distance.dtype == torch.float32
    for scores in above_floor(distance):
        chosen = select(scores).chosen
        assert chosen[mask].float().mean() > 0.8
        assert not (chosen & ~dilate(mask)).any()
        assert kind.startswith("perceptual") or overlap(chosen, mask) > 0.8
        assert not (mask & ~dilate(chosen)).any()


@pytest.mark.parametrize("kind", DISTANCES)
def test_equal_images_are_at_no_distance_and_fall_to_the_guard_set(kind: str) -> None:
    source = randn(1, 4, 32, 32)
    distance = above_floor(DISTANCES[kind](source.clone(), source))
    assert distance.abs().max() < 1e-5
    selection = select(torch.zeros(16, 16))
    assert int(selection.chosen.sum()) == math.ceil(0.05 * 256)
    assert not selection.everywhere


def test_the_latent_distance_is_relative_to_the_median() -> None:
    source = torch.zeros(1, 4, 8, 8)
    draft = torch.ones(1, 4, 8, 8)
    draft[..., :2, :2] = 3
    distance = latent_distance(draft, source)[0]
    assert distance[0, 0] == pytest.approx(3)
    assert distance[1:].eq(1).all()
    assert above_floor(distance[None])[0].flatten().tolist() == pytest.approx([2.0, *[0.0] * 15])
    source[..., :2, :2] = 3  # all tokens are equal but the ones that were 1
    assert latent_distance(torch.zeros(1, 4, 8, 8), source)[0, 0, 0] == pytest.approx(16)


def test_the_cosine_distance_does_not_mind_length() -> None:
    source = randn(1, 4, 8, 8)
    assert cosine_distance(3 * source, source).max() < 1e-6
    assert cosine_distance(-source, source).min() == pytest.approx(2)
    assert cosine_distance(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8)).max() == 0


def test_the_perceptual_distance_undoes_the_scaling() -> None:
    """A VAE that says how its latents were scaled sees the same images as one that needs no scaling."""
    plain, scaled = image_vae(), image_vae()
    scaled.register_to_config(scaling_factor=0.5, shift_factor=0.1)
    draft, source = randn(1, 4, 8, 8), randn(1, 4, 8, 8, seed=1)
    expected = perceptual_distance(plain, draft, source)
    torch.testing.assert_close(perceptual_distance(scaled, (draft - 0.1) * 0.5, (source - 0.1) * 0.5), expected)
    video, shifted = qwen_vae(), qwen_vae()
    shifted.register_to_config(latents_mean=[0.1] * 4, latents_std=[2.0] * 4)
    expected = perceptual_distance(video, draft, source)
    torch.testing.assert_close(perceptual_distance(shifted, (draft - 0.1) / 2, (source - 0.1) / 2), expected)


@pytest.mark.parametrize("shift", [(0, 0), (3, -5), (-2, 7), (8, 0)])
def test_a_image_that_was_moved(shift: tuple[int, int]) -> None:
    source = randn(2, 4, 16, 24)
    draft = source.roll(shift, (2, 3)) + 0.3 * randn(2, 4, 16, 24, seed=1)
    assert global_shift(draft, source) == [shift] * 2


def test_bad_images() -> None:
    with pytest.raises(ConfigError, match="one shape and even sides"):
        latent_distance(randn(1, 4, 8, 8), randn(1, 4, 8, 6))
    with pytest.raises(ConfigError, match="one shape and even sides"):
        cosine_distance(randn(1, 4, 7, 8), randn(1, 4, 7, 8))
    with pytest.raises(AdapterError, match="PixelVAE has no learned decoder"):
        perceptual_distance(PixelVAE(), randn(1, 12, 8, 8), randn(1, 12, 8, 8))
    odd = autoencoder("AutoencoderTiny")
    odd.register_to_config(scaling_factor=None)
    odd.decoder.conv_in = odd.decoder.mid_block = odd.decoder.up_blocks = torch.nn.Identity()
    with pytest.raises(AdapterError, match="neither scaling_factor nor latents_mean"):
        perceptual_distance(odd, randn(1, 4, 8, 8), randn(1, 4, 8, 8))


# --- selectors


def test_two_means_parts_two_heaps() -> None:
    scores = torch.tensor([[0.0, 0.1, 0.2, 5.0], [0.1, 4.0, 0.0, 6.0]])
    assert two_means(scores).tolist() == [[False, False, False, True], [False, True, False, True]]
    assert not two_means(torch.full((2, 2), 0.7)).any()
    near = torch.tensor([[1.0, 1.1, 0.9], [1.7, 1.8, 1.6]])  # far from zero, and near to each other
    assert two_means(near).tolist() == [[False] * 3, [True] * 3]


def test_top_takes_the_share_and_settles_ties_by_order() -> None:
    assert top(torch.tensor([[1.0, 3.0], [2.0, 3.0]]), 0.5).tolist() == [[False, True], [False, True]]
    assert top(torch.zeros(2, 5), 0.3).flatten().tolist() == [True] * 3 + [False] * 7
    for count in (1, 3, 7, 10):
        assert int(top(torch.rand(2, 5), count / 10).sum()) == count
    assert above(torch.tensor([[0.1, 0.3]]), 0.2).tolist() == [[False, True]]


def test_bounds_of_the_selection() -> None:
    ramp = torch.arange(100.0).reshape(10, 10)
    few = (ramp >= 99).float()
    assert int(select(few, bounds=(0.1, 0.6)).chosen.sum()) == 10
    assert int(select(few, bounds=(0.0, 0.6)).chosen.sum()) == 1
    many = select((ramp >= 20).float())
    assert many.everywhere
    assert many.chosen.all()
    assert select((ramp >= 20).float(), bounds=(0.05, 0.9)).chosen.sum() == 80
    for share in range(10, 100, 10):  # as many as the bound are not more
        exact = select((ramp >= 100 - share).float(), bounds=(0.05, share / 100))
        assert (int(exact.chosen.sum()), exact.everywhere) == (share, False)
    assert int(select(ramp, "threshold", threshold=94.5).chosen.sum()) == 5
    assert int(select(ramp, "threshold", threshold=1e3).chosen.sum()) == 5
    assert select(ramp, "top", share=0.9).chosen.sum() == 90
    assert select(ramp, "top", share=0.9).cut == 10
    with pytest.raises(ConfigError, match="finite map"):
        select(torch.tensor([[float("nan")]]))
    with pytest.raises(UnknownNameError, match="two-means"):
        select(ramp, "two_means")  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(8, 8), (9, 14), (32, 32), (5, 3)])
@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_coverage_count(size: tuple[int, int], stride: int) -> None:
    expected = math.prod(math.ceil((side - stride // 2) / stride) for side in size)
    assert int(coverage(size, stride).sum()) == max(expected, 0)
    assert not coverage(size, None).any()
    with pytest.raises(ConfigError, match="positive"):
        coverage(size, 0)


def test_dilation_takes_diagonals() -> None:
    dot = torch.zeros(5, 5, dtype=torch.bool)
    dot[2, 2] = True
    assert torch.equal(dilate(dot), square(5, slice(1, 4), slice(1, 4)))
    assert dilate(dot, 2).all()


# --- tokens and seams


def test_tokens_of_two_resolutions_find_their_places() -> None:
    fine_map = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) > 0.6
    tokens = TokenSet(fine_map)
    assert tokens.count == 24 + 3 * int(fine_map.sum())
    size = tokens.size
    places = torch.arange(size[0] * size[1]).float()
    full = torch.stack([places // size[1], places % size[1]], 1)[None]
    coarse = torch.stack([torch.arange(24.0) // 6 * 2, torch.arange(24.0) % 6 * 2], 1)[None]
    sequence = tokens.gather(coarse, full)
    assert torch.equal(sequence[0].long(), tokens.image_tokens("hr_units").corners)
    spread = tokens.spread(sequence)
    assert torch.equal(tokens.collect(spread), sequence)
    under = children(fine_map)[:, 0]
    assert torch.equal(spread[0, under], full[0, under])
    assert torch.equal(spread[0, ~under], (full[0, ~under] // 2) * 2)
    back_coarse, back_fine = tokens.scatter(sequence)
    assert torch.equal(tokens.gather(back_coarse, back_fine), sequence)


def test_enlargement_is_of_latent_pixels() -> None:
    latents = randn(2, 3, 4, 6)
    larger = unpack(LATENT_PIXELS.enlarge(pack(latents), (2, 3)), (4, 6))
    assert torch.equal(larger, torch.nn.functional.interpolate(latents, scale_factor=2))
    assert torch.equal(unpack(pack(latents), (2, 3)), latents)


def test_a_state_begins_with_unit_noise_and_is_promoted_onto_the_straight_path() -> None:
    noise = randn(1, 64 * 64, 16)
    state = MixedState.begin(noise, (64, 64))
    assert state.coarse.std() == pytest.approx(1, abs=0.03)
    new = square(32)
    clean = randn(1, 64 * 64, 16, seed=1)
    state.promote(new, clean, 0.6)
    under = children(new)[:, 0]
    torch.testing.assert_close(state.fine[:, under], 0.4 * clean[:, under] + 0.6 * noise[:, under])
    assert not state.complete
    assert torch.equal(state.preview()[:, under], state.fine[:, under])
    state.promote(~new, clean, 0.6)
    assert state.complete


def test_locked_tokens_stay_on_the_way_to_the_source() -> None:
    source, noise = randn(1, 9, 8), randn(1, 9, 8, seed=1)
    levels = [1.0, 0.8, 0.55, 0.2, 0.0]
    state = noise
    for sigma, after in pairwise(levels):
        state = state + (after - sigma) * locked_velocity(state, source, sigma)
        torch.testing.assert_close(state, (1 - after) * source + after * noise, atol=1e-6, rtol=0)


def test_weights_of_a_ring() -> None:
    line = torch.zeros(1, 7, dtype=torch.bool)
    line[0, 3] = True
    expected = [0, math.cos(math.pi / 3) ** 2, math.cos(math.pi / 6) ** 2, 1]
    assert ring_weights(line, 2)[0].tolist() == pytest.approx([*expected, *expected[2::-1]])
    assert torch.equal(ring_weights(line, 0), line.float())


def test_a_blend_leaves_both_sides_alone_and_lowers_the_seam() -> None:
    inner, outer, mask = torch.ones(3, 64, 64), torch.zeros(3, 64, 64), square()
    hard, soft = blend(inner, outer, mask, 0), blend(inner, outer, mask, 1)
    pixels = mask.repeat_interleave(4, 0).repeat_interleave(4, 1)
    beyond = ~dilate(mask).repeat_interleave(4, 0).repeat_interleave(4, 1)
    for mixed in (hard, soft):
        assert mixed[:, pixels].eq(1).all()
        assert mixed[:, beyond].eq(0).all()
    seam, rest = seam_steps(hard, mask)
    assert (seam, rest) == (1, 0)
    assert seam_steps(soft, mask)[0] < 0.15


def test_the_seam_statistic_sees_a_seam_and_none_where_there_is_none() -> None:
    image, mask = randn(3, 64, 64), square()
    seam, rest = seam_steps(image, mask)
    assert seam == pytest.approx(rest, rel=0.2)
    pixels = mask.repeat_interleave(4, 0).repeat_interleave(4, 1)
    seam, rest = seam_steps(image + 3 * pixels, mask)
    assert seam > 2 * rest
    for wrong in (torch.zeros(16, 16, dtype=torch.bool), torch.ones(16, 16, dtype=torch.bool)):
        with pytest.raises(ConfigError, match="no seam to measure"):
            seam_steps(image, wrong)
    with pytest.raises(ConfigError, match=r"cannot be divided into the cells of a map \[15, 16\]"):
        seam_steps(image, mask[1:])
    with pytest.raises(ConfigError, match=r"image \[C, H, W\]"):
        seam_steps(image[None], mask)
    with pytest.raises(ConfigError, match="bool map"):
        ring_weights(mask.float(), 1)


# --- pipelines

STEPS = 6
SPLIT = {"draft": 2, "mixed": 3, "final": 1}
# Random weights change everything, and the share of the edit has to be said.
LOCAL: dict[str, Any] = {**SPLIT, "selector": "top", "share": 0.1, "coverage": None, "global_change": None}
GUIDED = {"negative_prompt_embeds": randn(1, tiny.TEXT, 32, seed=4), "true_cfg_scale": 4.0}
NEGATIVE_MASK = {"negative_prompt_embeds_mask": torch.ones(1, tiny.TEXT, dtype=torch.long)}
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "kontext": ("flux kontext", {"height": 16, "width": 24, "max_area": 384, "image": image(16, 24)}),
    "kontext guided": (
        "flux kontext",
        {
            **{"height": 16, "width": 24, "max_area": 384, "image": image(16, 24), **GUIDED},
            "negative_pooled_prompt_embeds": randn(1, 32, seed=5),
        },
    ),
    "kontext, source of another size": (
        "flux kontext",
        {"height": 16, "width": 24, "max_area": 384, "image": image(24, 16)},
    ),
    "qwen edit": ("qwen edit", {"height": 64, "width": 96}),
    "qwen edit guided": ("qwen edit", {"height": 64, "width": 96, **GUIDED, **NEGATIVE_MASK}),
    "qwen edit plus": ("qwen edit plus", {"height": 64, "width": 96}),
}
HOSTS = list(CALLS)


@pytest.fixture(autouse=True)
def small_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen's editing pipelines bring their sources to a megapixel; here to 64x64 pixels."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda *_: (96, 64, None))
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 64 * 64)


def make(host: str) -> Any:
    return VARIANTS[CALLS[host][0]].make()


def draw(pipe: Any, host: str, steps: int = STEPS, seed: int = 1, **kwargs: Any) -> Tensor:
    """Latents of one call, and without gradients."""
    variant, changes = CALLS[host]
    call = {**VARIANTS[variant].call, **changes, "output_type": "latent", **kwargs}
    call.setdefault("generator", torch.Generator().manual_seed(seed))
    latents: Tensor = pipe(num_inference_steps=steps, **call).images
    return latents


def test_the_calls_are_what_they_say() -> None:
    pipe = make("qwen edit plus")
    shapes = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["img_shapes"][0]), with_kwargs=True
    )
    draw(pipe, "qwen edit plus")
    assert shapes[0][0] == (1, 8, 12)
    assert len(shapes[0]) == 3
    assert shapes[0][1] != shapes[0][2]


@pytest.mark.parametrize("host", HOSTS)
def test_everything_fine_from_the_start_is_the_plain_pipeline(host: str) -> None:
    pipe = make(host)
    plain = draw(pipe, host)
    with SpecEdit(draft=0, mixed=0, final=STEPS).attach(pipe) as engine:
        assert torch.equal(draw(pipe, host), plain)
        assert {(record.part, record.coarse) for record in engine.records} == {("final", 0)}
    assert torch.equal(draw(pipe, host), plain)


@pytest.mark.parametrize(
    ("host", "reference"),
    [
        *((host, "mix") for host in HOSTS),
        *((host, reference) for host in ("kontext", "qwen edit plus") for reference in ("lr", "hr")),
    ],
)
def test_parts_of_a_run(host: str, reference: Any) -> None:
    pipe = make(host)
    plain = draw(pipe, host)
    seen: list[int] = []
    method = SpecEdit(**LOCAL, reference=reference)
    with method.attach(pipe) as engine:
        pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args or tuple(kwargs.values()))[0].shape[1]), with_kwargs=True
        )
        latents = draw(pipe, host, method.num_inference_steps)
    assert latents.shape == plain.shape
    assert torch.isfinite(latents).all()
    assert not torch.equal(latents, plain)
    fine = int(engine.plans[0].fine.sum())
    total = engine.plans[0].fine.numel()
    assert 0 < fine < total
    assert [record.part for record in engine.records] == ["draft"] * 2 + ["mixed"] * 3 + ["final"]
    assert [(record.coarse, record.fine, record.locked) for record in engine.records] == [
        *[(total, 0, 0)] * 2,
        *[(total - fine, 4 * fine, total - fine)] * 3,
        (0, 4 * total, 0),
    ]
    assert [record.switched for record in engine.records] == [False, True, False, False, True, False]
    mixed = total + 3 * fine
    others = seen[0] - 2 * total  # further references, coarse
    expected = {"mix": mixed + others, "lr": total + others, "hr": 4 * (total + others)}[reference]
    passes = 2 if "guided" in host else 1
    assert seen[: 2 * passes] == [2 * total + others] * 2 * passes
    assert seen[2 * passes : 5 * passes] == [mixed + expected] * 3 * passes


def test_a_draft_alone_is_the_small_image() -> None:
    """Drafting with coarse tokens is what the pipeline does at half size, with the low-pass noise."""
    pipe = make("kontext")
    method = SpecEdit(draft=4, mixed=0, final=0)
    with method.attach(pipe):
        tokens: list[Tensor] = []
        handle = pipe.transformer.x_embedder.register_forward_pre_hook(lambda _, args: tokens.append(args[0]))
        large = draw(pipe, "kontext", 4)
        handle.remove()
    target, source = tokens[0].split(24, 1)
    half = {"height": 8, "width": 12, "max_area": 96, "latents": target, "image": unpack(source, (4, 6))}
    small = pipe(
        **{**VARIANTS["flux kontext"].call, **half}, num_inference_steps=4, output_type="latent", generator=None
    ).images
    torch.testing.assert_close(PixelLayout.of(pipe.vae).enlarge(small, (4, 6)), large, atol=1e-4, rtol=1e-4)


def test_the_floor_hides_a_global_edit_and_the_median_change_shows_it() -> None:
    source = randn(2, 4, 32, 32)
    local = edited(source, square())
    changed = torch.cat([local[:1], -source[1:] + 0.02 * randn(1, 4, 32, 32, seed=8)])
    assert select(above_floor(latent_distance(changed, source))[1]).share < 0.6
    change = median_change(changed, source)
    assert change[0] < 0.05
    assert change[1] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("found", [{"selector": "two-means", "bounds": (0.0, 0.001)}, {"global_change": 0.01}])
def test_a_global_edit_is_promoted_as_a_whole_with_a_warning(found: dict[str, Any]) -> None:
    pipe = make("kontext")
    said = pytest.warns(HastenWarning, match="at full size everywhere")
    with SpecEdit(**{**LOCAL, **found}).attach(pipe) as engine, said:
        draw(pipe, "kontext")
    assert engine.plans[0].everywhere
    assert [record.part for record in engine.records] == ["draft"] * 2 + ["final"] * 4
    assert {record.locked for record in engine.records} == {0}


def test_where_nothing_was_selected_the_source_is_kept() -> None:
    """With the composite as the end, tokens beyond the dilated selection are the source's own."""
    pipe = make("kontext")
    base = {**LOCAL, "final": 0, "mixed": 4, "reverify": False, "coverage": 2, "restore": False}
    method = SpecEdit(**base)
    source = pack(pipe._encode_vae_image(2 * image(16, 24) - 1, None))
    with method.attach(pipe) as engine:
        latents = draw(pipe, "kontext")
        kept = ~children(engine.plans[0].edited)[:, 0]
        assert kept.any()
        assert not kept.all()
        torch.testing.assert_close(latents[:, kept], source[:, kept])
        assert not torch.isclose(latents[:, ~kept], source[:, ~kept]).all(-1).any()
    with SpecEdit(**{**base, "keep_cover": True}).attach(pipe) as engine:
        latents = draw(pipe, "kontext")
        cover = children(engine.plans[0].fine & ~engine.plans[0].edited)[:, 0]
        assert cover.any()
        assert not torch.isclose(latents[:, cover], source[:, cover]).all(-1).any()
    with SpecEdit(**{**LOCAL, "final": 0, "mixed": 4, "lock": False}).attach(pipe) as engine:
        latents = draw(pipe, "kontext")
        rest = ~children(engine.plans[0].fine)[:, 0]
        assert not torch.isclose(latents[:, rest], source[:, rest]).all(-1).any()
        assert {record.locked for record in engine.records} == {0}


def test_what_stands_out_of_the_region_is_changed_tokens_by_the_unedited_tokens() -> None:
    source, edited, cover = randn(2, 64, 8), torch.zeros(4, 4, dtype=torch.bool), torch.zeros(4, 4, dtype=torch.bool)
    edited[:2, :2], cover[3, 1], cover[1, 3] = True, True, True
    clean = source + 0.1 * randn(2, 64, 8, seed=1)
    clean[1].unflatten(0, (8, 8))[1:3, 1:3] += 1  # in one image of the batch
    found = changed_tokens(clean, source, edited, edited | cover)
    wanted = torch.zeros(8, 8, dtype=torch.bool)
    wanted[1:3, 1:3] = True
    assert torch.equal(found, wanted)
    region = torch.zeros(8, 8, dtype=torch.bool)
    region[:4, :4] = True
    assert torch.equal(changed_tokens(clean, source, edited, edited), region)  # nobody to compare with
    assert torch.equal(changed_tokens(source, source, edited, edited | cover), region)  # an edit that nothing shows


@pytest.mark.parametrize("final", [0, 2])
def test_at_the_end_all_that_was_not_changed_tokens_is_the_source(final: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = make("kontext")
    source = pack(pipe._encode_vae_image(2 * image(16, 24) - 1, None))
    method = SpecEdit(**{**LOCAL, "mixed": 4, "final": final, "coverage": 2})
    apart: list[Tensor] = []

    def one(clean: Tensor, source: Tensor, edited: Tensor, fine: Tensor) -> Tensor:
        apart.append(torch.zeros(2 * fine.shape[0], 2 * fine.shape[1], dtype=torch.bool))
        row, column = edited.nonzero()[0]
        apart[0][2 * row, 2 * column] = True
        return apart[0]

    monkeypatch.setattr("hasten.resolution.methods.specedit.changed_tokens", one)
    with method.attach(pipe):
        latents = draw(pipe, "kontext", method.num_inference_steps)
    changed = ~torch.isclose(latents, source).all(-1)[0].view(apart[0].shape)
    assert changed[apart[0]].all()
    assert (changed & ~apart[0]).any()  # the token is blended with what is around it
    assert not (changed & ~dilate(apart[0])).any()  # nothing but the token and the blend around it


def test_locked_tokens_are_looked_at_again() -> None:
    pipe = make("kontext")
    method = SpecEdit(**{**LOCAL, "share": 0.04, "mixed": 4})
    with method.attach(pipe) as engine:

        def lower(_: Any, step: int, *__: Any) -> dict[str, Tensor]:
            if step == 1:  # as if the least of the selected tokens had hardly differed
                engine.plans[-1] = replace(engine.plans[-1], cut=0.2)
            return {}

        draw(pipe, "kontext", 7)
        draw(pipe, "kontext", 7, callback_on_step_end=lower)
    once, again = engine.plans
    assert not once.reverified.any()
    assert again.reverified.any()
    assert not (again.reverified & dilate(again.chosen)).any()
    assert torch.equal(again.fine, again.edited)
    for found, run in ((once, 0), (again, 1)):
        mixed = [record for record in engine.records if record.run == run and record.part == "mixed"]
        at_first, later = int((~dilate(found.chosen)).sum()), int((~found.fine).sum())
        assert [record.coarse for record in mixed] == [at_first] * 2 + [later] * 2
        assert [record.switched for record in mixed] == [False, run == 1, False, True]


def test_locked_tokens_stay_on_one_straight_path_to_the_source() -> None:
    """From the first mixed step on: what is left of the way, over the noise level, does not change."""
    pipe = make("kontext")
    left: dict[int, Tensor] = {}
    with SpecEdit(**{**LOCAL, "reverify": False}).attach(pipe) as engine:

        def look(_: Any, step: int, *__: Any) -> dict[str, Tensor]:
            (found,) = engine._runs.under_way
            run = found.state
            if run is not None and run.states:
                source = run.sources[engine.method.source].of(0)
                locked = ~engine.plans[-1].fine.flatten() if engine.plans else slice(None)
                left[step] = ((run.states[0].coarse - source.coarse) / run.levels[step + 1])[:, locked]
            return {}

        draw(pipe, "kontext", callback_on_step_end=look)
    assert list(left) == [0, 1, 2, 3]  # two steps of the draft, and the mixed ones before the composite
    for step in (2, 3):
        torch.testing.assert_close(left[step], left[1], atol=1e-4, rtol=1e-4)


def test_nothing_is_held_to_the_source_before_the_draft_was_verified() -> None:
    """Up to the end of the draft the lock changes nothing; from then on it does."""
    pipe = make("kontext")
    seen: dict[bool, list[Tensor]] = {True: [], False: []}
    for lock, states in seen.items():

        def keep(_: Any, __: int, ___: Any, tensors: dict[str, Tensor], into: list[Tensor] = states) -> dict[str, Any]:
            into.append(tensors["latents"].clone())
            return {}

        with SpecEdit(**LOCAL, lock=lock).attach(pipe):
            draw(pipe, "kontext", callback_on_step_end=keep)
    for step, (locked, free) in enumerate(zip(seen[True], seen[False], strict=True)):
        assert torch.equal(locked, free) == (step < SPLIT["draft"]), step


def test_the_draft_is_in_the_frame_of_coarse_tokens_until_it_was_verified() -> None:
    """On 8x12 tokens: the farthest position that the transformer is given at each step."""
    pipe = make("kontext")
    farthest: list[float] = []
    pipe.transformer.pos_embed.register_forward_pre_hook(lambda _, args: farthest.append(float(args[0].max())))
    with SpecEdit(**LOCAL).attach(pipe):
        draw(pipe, "kontext")
    assert farthest[:2] == [5.0, 5.0]
    assert min(farthest[2:]) >= 10.0


@pytest.mark.parametrize("begin", ["source", "draft"])
def test_the_coverage_set_begins_with_the_source(begin: Any) -> None:
    pipe = make("kontext")
    source = pack(pipe._encode_vae_image(2 * image(16, 24) - 1, None))
    held: list[bool] = []
    with SpecEdit(**{**LOCAL, "share": 0.04, "coverage": 2, "cover_init": begin}).attach(pipe) as engine:

        def look(_: Any, step: int, *__: Any) -> dict[str, Tensor]:
            if step == 1:
                run = engine._runs.current.state
                found, state, sigma = engine.plans[0], run.states[0], run.levels[2]
                cover = children(found.fine & ~found.edited)[:, 0]
                clean = (state.fine - sigma * state.noise) / (1 - sigma)
                held.append(torch.allclose(clean[:, cover], source[:, cover], atol=1e-4))
            return {}

        draw(pipe, "kontext", callback_on_step_end=look)
    assert held == [begin == "source"]


def test_settings_change_what_comes_out() -> None:
    pipe = make("kontext")
    base = {**LOCAL, "share": 0.04, "coverage": 2, "restore": False}
    results = {}
    for name, change in {
        "base": {},
        "cover_init": {"cover_init": "draft"},
        "reference": {"reference": "lr"},
        "units": {"units": "lr_units"},
        "restore": {"restore": True},
        "enlarge": {"enlarge": "pixels"},
        "shrink": {"shrink": "latents"},
        "ring": {"ring": 0},
        "lock": {"lock": False},
        "keep_cover": {"keep_cover": True},
    }.items():
        with SpecEdit(**{**base, **change}).attach(pipe):
            results[name] = draw(pipe, "kontext")
    for name, latents in results.items():
        assert name == "base" or not torch.equal(latents, results["base"]), name


@pytest.mark.parametrize("host", ["kontext", "qwen edit plus"])
def test_half_precision_stays_what_it_is(host: str) -> None:
    pipe = make(host).to(torch.bfloat16)
    call = VARIANTS[CALLS[host][0]].call
    half = {name: value.bfloat16() for name, value in call.items() if name.endswith("prompt_embeds")}
    types = set()
    pipe.transformer.register_forward_hook(lambda _, __, output: types.add(output[0].dtype))
    with SpecEdit(**LOCAL).attach(pipe) as engine:
        latents = draw(pipe, host, **half)
        assert torch.equal(draw(pipe, host, **half), latents)
    assert types == {torch.bfloat16}
    assert latents.dtype == torch.bfloat16
    assert torch.isfinite(latents).all()
    assert engine.plans[0].distance.dtype == torch.float32


@pytest.mark.parametrize("change", [{}, {"reference": "hr"}, {"share": 0.04, "mixed": 4, "coverage": 2, "final": 2}])
def test_images_of_a_batch_are_as_when_edited_alone(change: dict[str, Any]) -> None:
    pipe = make("kontext")
    call: dict[str, Any] = {
        "image": torch.cat([image(16, 24), image(16, 24, seed=9)]),
        "prompt_embeds": randn(2, tiny.TEXT, 32),
        "pooled_prompt_embeds": randn(2, 32, seed=6),
    }
    method = SpecEdit(**{**LOCAL, **change})
    steps = method.num_inference_steps
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    with method.attach(pipe) as engine:
        both = draw(pipe, "kontext", steps, generator=generators, **call)
        alone = [
            draw(pipe, "kontext", steps, seed=i + 1, **{name: value[i : i + 1] for name, value in call.items()})
            for i in (0, 1)
        ]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-4, rtol=1e-4)
    together, apart = engine.plans[:2], engine.plans[2:]
    assert [(found.run, found.image) for found in engine.plans] == [(0, 0), (0, 1), (1, 0), (2, 0)]
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one.fine, other.fine)
        torch.testing.assert_close(one.distance, other.distance, atol=1e-4, rtol=1e-4)
    assert not torch.equal(together[0].fine, together[1].fine)


def test_a_global_edit_beside_a_local_one() -> None:
    """The one is at full size after the draft, the other when the mixed part ends; each is as when edited alone."""
    pipe = make("kontext")
    call: dict[str, Any] = {
        "image": torch.cat([image(16, 24), image(16, 24, seed=9)]),
        "prompt_embeds": randn(2, tiny.TEXT, 32),
        "pooled_prompt_embeds": randn(2, 32, seed=6),
    }
    changes: list[float] = []

    def one_of_two(draft: Tensor, source: Tensor) -> Tensor:
        changes.append(float(len(changes) % 2))
        return torch.tensor([changes[-1]])

    method = SpecEdit(**{**LOCAL, "global_change": 0.5})
    with pytest.MonkeyPatch.context() as patch, method.attach(pipe) as engine:
        patch.setattr("hasten.resolution.methods.specedit.median_change", one_of_two)
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        with pytest.warns(HastenWarning, match="at full size everywhere"):
            both = draw(pipe, "kontext", generator=generators, **call)
        warnings.simplefilter("ignore", HastenWarning)
        alone = [
            draw(pipe, "kontext", seed=i + 1, **{name: value[i : i + 1] for name, value in call.items()})
            for i in (0, 1)
        ]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-4, rtol=1e-4)
    assert [found.everywhere for found in engine.plans] == [False, True, False, True]


def test_guided_images_of_a_batch_on_the_other_family_are_as_when_edited_alone() -> None:
    pipe = make("qwen edit guided")
    with SpecEdit(**LOCAL).attach(pipe) as engine:
        two = {"num_images_per_prompt": 2, "generator": [torch.Generator().manual_seed(seed) for seed in (1, 2)]}
        both = draw(pipe, "qwen edit guided", **two)
        alone = [draw(pipe, "qwen edit guided", seed=seed) for seed in (1, 2)]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-4, rtol=1e-4)
    assert not torch.equal(engine.plans[0].fine, engine.plans[1].fine)


def test_callbacks_see_full_size_latents_and_may_not_change_mixed_ones() -> None:
    pipe = make("kontext")
    shapes: list[tuple[int, ...]] = []

    def look(_: Any, step: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        shapes.append(tuple(tensors["latents"].shape))
        return {}

    def change(_: Any, step: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": tensors["latents"] + 1} if step == at else {}

    with SpecEdit(**LOCAL).attach(pipe):
        plain = draw(pipe, "kontext", callback_on_step_end=look)
        assert shapes == [(1, 96, 16)] * STEPS
        at = 3
        with pytest.raises(ConfigError, match="changed between steps 3 and 4"):
            draw(pipe, "kontext", callback_on_step_end=change)
        at = 4  # the last mixed step: the true latents are the pipeline's from here on
        assert not torch.equal(draw(pipe, "kontext", callback_on_step_end=change), plain)
        assert torch.equal(draw(pipe, "kontext"), plain)


@pytest.mark.parametrize("host", ["kontext", "qwen edit"])
def test_removal_is_exact(host: str) -> None:
    pipe = make(host)
    plain = draw(pipe, host)
    module, scheduler = pipe.transformer, pipe.scheduler
    before, step_before = set(vars(module)), set(vars(scheduler))
    own = getattr(module, "pos_embed", None)
    engine = SpecEdit(**LOCAL).attach(pipe)
    assert inspect.signature(scheduler.step) == inspect.signature(type(scheduler)().step)
    with pytest.raises(AlreadyAcceleratedError, match="accelerated already"):
        SpecEdit(**LOCAL).attach(pipe)
    draw(pipe, host)
    engine.remove()
    engine.remove()
    assert (set(vars(module)), set(vars(scheduler))) == (before, step_before)
    assert module.pos_embed is own
    assert len(engine.records) == STEPS
    assert torch.equal(draw(pipe, host), plain)


@pytest.mark.parametrize("host", ["kontext", "qwen edit"])
def test_an_exception_in_mid_run_leaves_the_pipeline_usable(host: str) -> None:
    pipe = make(host)
    plain, own = draw(pipe, host), pipe.transformer.pos_embed

    class BrokenError(Exception):
        pass

    def broken(_: Any, step: int, *__: Any) -> dict[str, Tensor]:
        if step == 2:
            raise BrokenError
        return {}

    def fail(*_: Any) -> None:
        raise BrokenError

    with SpecEdit(**LOCAL).attach(pipe) as engine:
        expected = draw(pipe, host)
        with pytest.raises(BrokenError):
            draw(pipe, host, callback_on_step_end=broken)
        assert torch.equal(draw(pipe, host), expected)
        handle = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(fail)
        with pytest.raises(BrokenError):
            draw(pipe, host)
        handle.remove()
        assert torch.equal(draw(pipe, host), expected)
        handle = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(fail)
        with pytest.raises(BrokenError):
            draw(pipe, host)
        handle.remove()
        engine.remove()
    assert pipe.transformer.pos_embed is own
    assert torch.equal(draw(pipe, host), plain)


@pytest.mark.parametrize("host", ["kontext", "qwen edit guided"])
def test_a_cache_inside_starts_afresh_where_the_tokens_change(host: str) -> None:
    pipe = make(host)
    method = SpecEdit(**{**LOCAL, "draft": 4, "mixed": 4, "final": 3, "reverify": False})
    with method.attach(pipe):
        alone = draw(pipe, host, 11)
    with hasten.accelerate(pipe, hasten.Reuse(interval=1), method) as run:
        assert torch.equal(draw(pipe, host, 11), alone)
        assert run.stages is not None
        assert [record.part for record in run.stages.records] == ["draft"] * 4 + ["mixed"] * 4 + ["final"] * 3
    with hasten.accelerate(pipe, hasten.TaylorSeer(interval=3, warmup=1), method) as cached:
        latents = draw(pipe, host, 11)
    computed = {record.step for record in cached.records if record.computed}
    assert {0, 4, 8} <= computed
    assert len(computed) < 11
    assert torch.isfinite(latents).all()
    with method.attach(pipe), hasten.accelerate(pipe, hasten.TaylorSeer(interval=3, warmup=1)):
        assert torch.equal(draw(pipe, host, 11), latents)  # whichever came first


def test_without_a_learned_decoder_latents_are_compared_and_that_is_said() -> None:
    pipe = flux("FluxKontextPipeline")()
    pipe.register_modules(vae=PixelVAE(block_out_channels=(3,), latent_channels=4))
    with pytest.warns(HastenWarning, match="PixelVAE has no learned decoder"):
        SpecEdit().attach(pipe).remove()


def test_resizing_goes_by_way_of_pixels() -> None:
    """With a VAE that keeps every pixel, halving is the mean of 2x2 pixels."""
    pipe = make("kontext")
    pipe.register_modules(vae=PixelVAE(scaling_factor=2.0, shift_factor=0.1))
    pixels = 2 * image(16, 24) - 1
    small = resized(pipe, pipe._encode_vae_image(pixels, None), (4, 6))
    expected = pipe._encode_vae_image(torch.nn.functional.avg_pool2d(pixels, 2), None)
    torch.testing.assert_close(small, expected)


# --- what cannot work


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draft": 0}, "nothing to verify"),
        ({"draft": 0, "mixed": 0, "final": 0}, "a run needs steps"),
        ({"discrepancy": "lpips"}, "SpecEdit: discrepancy must be 'perceptual', 'latent' or 'cosine', got 'lpips'"),
        ({"bounds": (0.6, 0.05)}, "bounds must not fall"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(HastenError, match=message):
        SpecEdit(**settings)


def test_bad_pipelines_and_schedulers() -> None:
    with pytest.raises(TargetError, match="FluxPipeline cannot run SpecEdit"):
        SpecEdit().attach(flux("FluxPipeline")())
    pipe = make("kontext")
    for scheduler in (UniPCMultistepScheduler(), DPMSolverMultistepScheduler()):
        pipe.scheduler = scheduler
        with pytest.raises(ConfigError, match=r"FlowMatchEulerDiscreteScheduler\.from_config"):
            SpecEdit().attach(pipe)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(ConfigError, match="stochastic_sampling"):
        SpecEdit().attach(pipe)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    pipe.transformer._compiled_call_impl = pipe.transformer.forward  # as .compile() leaves it
    with pytest.raises(TargetError, match="compile_repeated_blocks"):
        SpecEdit().attach(pipe)


def test_bad_calls_name_the_remedy_and_leave_the_pipeline_usable() -> None:
    pipe = make("kontext")
    with SpecEdit(**LOCAL).attach(pipe):
        expected = draw(pipe, "kontext")
        with pytest.raises(ScheduleError, match=r"2 \+ 3 \+ 1 = 6 steps.*num_inference_steps=6"):
            draw(pipe, "kontext", 8)
        with pytest.raises(ConfigError, match="half size with images of 7x12 and 7x12 tokens"):
            draw(pipe, "kontext", height=14, max_area=14 * 24, image=image(14, 24))
        with pytest.raises(ConfigError, match="give image="):
            draw(pipe, "kontext", image=None)
        with pytest.raises(ConfigError, match="begins with pure noise"):
            draw(pipe, "kontext", sigmas=[0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
        assert torch.equal(draw(pipe, "kontext"), expected)
        pipe.scheduler = FlowMatchEulerDiscreteScheduler()
        with pytest.raises(ConfigError, match="another scheduler"):
            draw(pipe, "kontext")
    pipe = make("kontext")
    missing = pytest.raises(ConfigError, match="edits reference image 1, but the call has 1")
    with SpecEdit(**LOCAL, source=1).attach(pipe), missing:
        draw(pipe, "kontext")


def test_another_source_of_several() -> None:
    pipe = make("qwen edit plus")
    results = []
    for source in (0, 1):
        with SpecEdit(**LOCAL, source=source).attach(pipe) as engine:
            results.append(draw(pipe, "qwen edit plus"))
            assert len(engine.plans) == 1
    assert not torch.equal(*results)
