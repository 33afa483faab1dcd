"""The two reference models `emoji-kontext` and `sprites-wan`: data, pipelines, training scripts and grades."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import torch
from hasten.bench import subject
from hasten.errors import ConfigError, ModelError
from hasten.io import write_sealed
from hasten.quality.metrics import psnr
from hasten.solvers import LeapScheduler
from torch import Tensor, nn

from hasten_zoo import emoji_kontext, sprites_wan
from hasten_zoo import fit as fits
from hasten_zoo.emoji_flux import WEIGHTS as EMOJI_FLUX
from hasten_zoo.emoji_flux.model import load_pipeline as load_emoji_flux
from hasten_zoo.emoji_kontext import data as edits_data
from hasten_zoo.emoji_kontext import evaluate as edits_evaluate
from hasten_zoo.emoji_kontext import model as edits_model
from hasten_zoo.emoji_kontext import train as edits_train
from hasten_zoo.sprites_wan import data as clips_data
from hasten_zoo.sprites_wan import evaluate as clips_evaluate
from hasten_zoo.sprites_wan import model as clips_model
from hasten_zoo.sprites_wan import train as clips_train
from hasten_zoo.sprites_wan.vae import SpriteVAE

EDIT_RUN = ["--coarse", "4", "--fine", "4", "--batch", "2", "--width", "32", "--checkpoint-minutes", "0"]
CLIP_RUN = ["--samples", "3", "--batch", "1", "--width", "32", "--layers", "1"]


@pytest.fixture(scope="module")
def kontext(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps and its export."""
    out = tmp_path_factory.mktemp("kontext")
    edits_train.main(["--out", str(out), *EDIT_RUN])
    edits_train.main(["--out", str(out), *EDIT_RUN, "--export", str(out / "weights")])
    return out


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps and its export."""
    out = tmp_path_factory.mktemp("wan")
    write_sealed(out / "vae", SpriteVAE(encoder_width=8, decoder_width=8, head_width=8).save_pretrained)
    run = ["--out", str(out), "--vae", str(out / "vae"), "--committed", "none", *CLIP_RUN]
    clips_train.main(run)
    clips_train.main([*run, "--export", str(out / "weights")])
    return out


# Data


def test_local_edits_change_their_mask_and_nothing_else() -> None:
    rng, brush = Random(1), edits_data.painter()
    plans = [edits_data.draw_plan(rng, brush.mains) for _ in range(60)]
    local = [plan for plan in plans if plan.kind == "local"]
    assert {plan.prompt.split()[0] for plan in local} == {"add", "remove", "replace", "make"}
    for plan in local:
        edit = brush.edit(plan)
        changed = (edit.source - edit.target).abs().amax(0) > 1e-6
        assert changed.any()
        assert not (changed & ~edit.mask).any()
        assert 0.01 < edit.mask.float().mean() < 0.12  # one corner, of a tenth of the image


def test_global_edits_do_what_they_say() -> None:
    rng, brush = Random(2), edits_data.painter()
    plans = {}
    while len(plans) < 6:
        plan = edits_data.draw_plan(rng, brush.mains)
        if plan.kind == "global":
            plans[plan.prompt] = brush.edit(plan)
    assert all(edit.mask.all() for edit in plans.values())
    grey = plans["make the image grey"]
    assert torch.allclose(grey.target[0], grey.target[2])
    assert not torch.allclose(grey.source[0], grey.source[2])
    inverted = plans["invert the image"]
    assert torch.allclose(inverted.source + inverted.target, torch.ones(()))
    blue = plans["make the background blue"].target[:, 32, 2]  # the left edge is always free
    assert torch.allclose(blue, torch.tensor(edits_data.BACKGROUNDS["blue"]))


def test_held_out_edits_are_distinct_repeatable_and_never_trained_on() -> None:
    plans = edits_data.held_out_plans(40)
    assert plans == edits_data.held_out_plans(40)
    assert len({plan.prompt for plan in plans}) == 40
    assert all(plan.held_out for plan in plans)
    assert {plan.kind for plan in plans} == {"local", "global"}
    rng, mains = Random(0), edits_data.painter().mains
    assert not any(edits_train._training_plan(rng, mains).held_out for _ in range(100))


def test_instructions_fit_the_tokenizer() -> None:
    tokenizer = edits_model.build_pipeline(width=32).tokenizer
    rng, mains = Random(0), edits_data.painter().mains
    rows = tokenizer([edits_data.draw_plan(rng, mains).prompt for _ in range(300)]).input_ids
    assert max(len(row) for row in rows) <= edits_model.TEXT_TOKENS
    assert tokenizer.unk_token_id not in {token for row in rows for token in row}


def test_captions_fit_the_tokenizer() -> None:
    tokenizer = clips_model.build_pipeline(width=32, layers=1).tokenizer
    rows = tokenizer([clip.caption for clip in clips_data.all_clips()]).input_ids
    assert max(len(row) for row in rows) <= clips_model.TEXT_TOKENS
    assert tokenizer.unk_token_id not in {token for row in rows for token in row}


def test_every_word_of_a_held_out_caption_is_trained_on() -> None:
    clips = clips_data.all_clips()
    trained = [clip for clip in clips if not clip.held_out]
    assert 0.1 < 1 - len(trained) / len(clips) < 0.13
    for part, count in (("item", 16), ("motion", 12), ("background", 4)):
        assert {getattr(clip, part) for clip in trained} == set(range(count))


@pytest.mark.parametrize("frames", [5, 9])
def test_clips_move_as_their_captions_say(frames: int) -> None:
    def way(motion: str) -> Tensor:
        centres, _ = clips_data.path(clips_data.Clip(0, clips_data.MOTIONS.index(motion), 0), frames)
        return centres - centres[0]

    assert way("still").abs().max() == 0
    assert way("moving right fast")[-1].tolist() == [0, 28]
    assert way("moving up slowly")[-1].tolist() == [-11, 0]
    circle = way("circling")
    assert torch.allclose(circle[-1], torch.zeros(2), atol=1e-4)
    assert torch.allclose(circle[frames // 2], torch.tensor([24.0, 0.0]), atol=1e-4)
    _, sizes = clips_data.path(clips_data.Clip(0, clips_data.MOTIONS.index("zooming in"), 0), frames)
    assert sizes[0] == 16
    assert sizes[-1] == 46
    fall = way("falling and bouncing")[:, 0]
    assert (fall.diff() > 0).any()
    assert (fall.diff() < 0).any()


def test_fewer_frames_show_the_same_motion() -> None:
    clip = clips_data.Clip(3, clips_data.MOTIONS.index("circling"), 1, (1.5, -2.0))
    assert torch.equal(clips_data.draw(clip, 5), clips_data.draw(clip, 9)[::2])


def test_objects_stay_in_the_image() -> None:
    canvas = clips_data.CANVAS
    for motion in range(len(clips_data.MOTIONS)):
        for corner in (-canvas.jitter, canvas.jitter):
            centres, sizes = clips_data.path(clips_data.Clip(0, motion, 0, (corner, corner)), 9)
            assert (centres + sizes[:, None] / 2).max() <= canvas.side + 1
            assert (centres - sizes[:, None] / 2).min() >= -1


# Grades


def test_the_grade_of_edits_accepts_the_target_and_nothing_else() -> None:
    brush = edits_data.painter()
    plans = edits_data.held_out_plans(24)
    for plan in plans:
        edit = brush.edit(plan)
        noise = 0.02 * torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
        assert emoji_kontext.is_done(plan, (edit.target + noise).clamp(0, 1)), plan.prompt
        assert emoji_kontext.is_done(plan, nn.functional.avg_pool2d(edit.target, 2)), plan.prompt
        assert not emoji_kontext.is_done(plan, edit.source), plan.prompt
        if plan.kind == "local":
            elsewhere = torch.where(edit.mask, edit.target, 1 - edit.target)
            assert not emoji_kontext.is_done(plan, elsewhere), plan.prompt


def test_the_grade_of_edits_tells_objects_apart() -> None:
    brush = edits_data.painter()
    plan = next(plan for plan in edits_data.held_out_plans(24) if plan.prompt.startswith("add"))
    assert plan.changed is not None
    other = edits_data.Placed((plan.changed.item + 1) % len(edits_data.ITEMS), plan.changed.corner)
    rest = tuple(placed for placed in plan.after.items if placed != plan.changed)
    wrong = edits_data.Scene(plan.after.main, plan.after.shift, (other, *rest), plan.after.background)
    assert not emoji_kontext.is_done(plan, brush.draw(wrong))


@pytest.mark.parametrize("motion", ["moving left fast", "circling", "zooming in"])
def test_the_grade_of_clips_asks_for_object_and_motion(motion: str) -> None:
    canvas = clips_data.CANVAS
    index, frames = clips_data.MOTIONS.index(motion), canvas.frames
    clip = clips_data.Clip(2, index, 1)
    video = clips_data.draw(clips_data.jittered(clip, Random(0)), frames)
    assert sprites_wan.is_right(clip, video)
    assert not sprites_wan.is_right(clips_data.Clip(5, index, 1), video)
    assert not sprites_wan.is_right(clip, clips_data.draw(clips_data.Clip(2, 0, 1), frames))  # still


def test_the_grade_of_clips_refuses_other_sizes() -> None:
    with pytest.raises(ConfigError, match=r"expected a video \[F, 3, 64, 64\].*got \[3, 64, 64\]"):
        sprites_wan.is_right(clips_data.Clip(0, 0, 0), torch.zeros(3, 64, 64))


# Models


def test_kontext_starts_from_the_emoji_flux_weights() -> None:
    old, new = load_emoji_flux(EMOJI_FLUX), edits_model.build_pipeline(EMOJI_FLUX)
    for name, value in old.transformer.state_dict().items():
        assert torch.equal(new.transformer.state_dict()[name], value)
    words, old_words = new.tokenizer.get_vocab(), old.tokenizer.get_vocab()
    table = new.text_encoder_2.get_input_embeddings().weight
    old_table = old.text_encoder_2.get_input_embeddings().weight
    assert torch.equal(table[words["lemon"]], old_table[old_words["lemon"]])
    assert "replace" not in old_words
    assert "replace" in words


def test_the_training_loss_of_edits_asks_for_what_the_pipeline_does() -> None:
    """One step from pure noise: the pipeline's answer is the noise minus the velocity that training predicts."""
    torch.manual_seed(0)
    pipe = edits_model.build_pipeline(width=32)
    pipe.set_progress_bar_config(disable=True)
    loss = edits_train.EditLoss(pipe, nn.ModuleDict({name: getattr(pipe, name) for name in edits_model.LEARNED}))
    edit = edits_data.painter().edit(edits_data.held_out_plans(1)[0])
    noise = torch.randn(1, 256, 48)
    call = emoji_kontext.call_arguments() | {"num_inference_steps": 1, "output_type": "latent"}
    with torch.no_grad():
        answer = pipe(edit.source[None], [edit.prompt], latents=noise, **call).images
        velocity = loss.predict(noise, loss.pack(edit.source[None], 64), torch.ones(1), [edit.prompt], 64)
    assert torch.allclose(answer, noise - velocity, atol=1e-4)


# Training


def test_a_run_learns_logs_and_stops(kontext: Path) -> None:
    state = torch.load(kontext / "checkpoint.pt", weights_only=True)
    assert set(state["seen"]) == {"32", "64"}
    assert state["steps"] > 0
    assert not (kontext / "checkpoint.tmp").exists()


def _fit() -> fits.Fit:
    torch.manual_seed(0)
    net = nn.ModuleDict({"layer": nn.Linear(3, 3)})

    def loss(level: str, batch: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(batch, 3, generator=generator)
        error: Tensor = (net["layer"](x) - x.flip(-1)).square().mean()
        return error

    return fits.Fit(net, [fits.Level("a", 4, 2, 1.0), fits.Level("b", 8, 2, 3.0)], loss)


def test_a_run_that_was_cut_off_ends_like_one_that_was_not(tmp_path: Path) -> None:
    whole = _fit()
    while not whole.done:
        whole.step()

    first = _fit()
    first.step()
    torch.save(first.state(), tmp_path / "checkpoint.pt")
    second = _fit()
    fits.run(second, tmp_path, log_every=1)
    assert second.steps == whole.steps
    assert second.done
    for name, value in whole.average.items():
        assert torch.equal(second.average[name], value), name
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(2, whole.steps + 1))


def test_later_levels_rehearse_earlier_ones() -> None:
    seen: list[str] = []

    def loss(name: str, batch: int, generator: torch.Generator) -> Tensor:
        seen.append(name)
        return (weight.weight**2).sum() + torch.rand((), generator=generator)

    weight = nn.Linear(1, 1)
    fit = fits.Fit(nn.ModuleDict({"weight": weight}), [fits.Level("a", 4, 1, 1.0), fits.Level("b", 9, 1, 2.0)], loss)
    assert fit.progress == 0
    while not fit.done:
        fit.step()
    assert seen == ["a"] * 4 + ["b", "b", "b", "a"] * 2 + ["b"] * 3
    assert fit.progress == 1


def test_levels_are_validated() -> None:
    with pytest.raises(ConfigError, match="must be positive, got Level"):
        fits.Level("a", 0, 1, 1.0)


def test_an_export_without_a_run_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no checkpoint in .*; run the training script with --out"):
        edits_train.main(["--out", str(tmp_path), "--export", str(tmp_path / "weights")])


# Loading and evaluating


def test_exported_kontext_loads_and_edits(kontext: Path) -> None:
    model = emoji_kontext.load_emoji_kontext(kontext / "weights")
    model.pipe.set_progress_bar_config(disable=True)
    assert next(model.pipe.transformer.parameters()).dtype == torch.float32
    assert [edit.prompt for edit in model.edits] == model.prompts
    images = edits_evaluate.apply_edits(model, model.edits[:2], 32, 2, 0)
    assert images.shape == (2, 3, 32, 32)
    assert model.grade is not None
    assert model.grade(torch.stack([edit.target for edit in model.edits]), model.prompts) == [True] * len(model.edits)
    with pytest.raises(ConfigError, match="no held-out edit has the prompt 'fly'"):
        model.grade(images[:1], ["fly"])


def test_exported_wan_loads_and_draws(wan: Path) -> None:
    model = sprites_wan.load_sprites_wan(wan / "weights")
    model.pipe.set_progress_bar_config(disable=True)
    videos = clips_evaluate.draw_clips(model, model.prompts[:2], 0, num_inference_steps=2, guidance_scale=2.0)
    assert videos.shape == (2, 33, 3, 64, 64)
    clips = {clip.caption: clip for clip in clips_data.all_clips()}
    assert clips[model.prompts[0]].held_out
    assert not clips[model.prompts[-1]].held_out
    assert model.grade is not None
    truth = clips_data.draw(clips[model.prompts[0]], 33)
    assert model.grade(truth[None], model.prompts[:1]) == [True]
    with pytest.raises(ConfigError, match="no clip has the caption 'fly'"):
        model.grade(videos[:1], ["fly"])


def test_evaluations_write_figures_and_a_sheet(kontext: Path, wan: Path, tmp_path: Path) -> None:
    edits = edits_evaluate.evaluate(kontext / "weights", 3, 1, 0, tmp_path / "edits", (32,))
    assert edits["edits"] == 3
    assert set(edits["32x32"]["done"]) <= {"local", "global"}
    clips = clips_evaluate.evaluate(wan / "weights", 2, 1, 0, tmp_path / "clips", 1.0)
    assert clips["right"] == 0.0
    assert len(clips["wrong"]) == 2
    for folder, result in ((tmp_path / "edits", edits), (tmp_path / "clips", clips)):
        assert json.loads((folder / "evaluation.json").read_text()) == result
        assert (folder / "contact_sheet.png").stat().st_size > 0


@pytest.mark.parametrize("load", [emoji_kontext.load_emoji_kontext, sprites_wan.load_sprites_wan])
def test_missing_and_damaged_weights_are_named(load: object, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no .* weights in .*train --export"):
        load(tmp_path)  # type: ignore[operator]
    (tmp_path / "transformer").mkdir()
    with pytest.raises(ModelError, match=r"digests\.json: no such file"):
        load(tmp_path)  # type: ignore[operator]


def test_the_zoo_names_the_models() -> None:
    styles = ["emoji-styles", "emoji-styles-edit", "emoji-styles-turbo"]
    assert subject.names() == ["emoji-flux", "emoji-kontext", *styles, "sprites-wan"]


def test_the_shipped_editing_model_does_held_out_edits() -> None:
    model = subject.load("emoji-kontext")
    model.pipe.set_progress_bar_config(disable=True)
    assert len(model.edits) == 64
    prompts, images = [], []
    for seed, edit in enumerate(model.edits[:4]):
        call = model.call | {"num_inference_steps": 8, "generator": torch.Generator().manual_seed(seed)}
        images.append(model.pipe(edit.source[None], edit.prompt, output_type="pt", **call).images[0])
        prompts.append(edit.prompt)
        assert psnr(images[-1], edit.target) > 20
    assert model.grade is not None
    assert sum(model.grade(torch.stack(images), prompts)) >= 3
    assert not any(model.grade(torch.stack([edit.source for edit in model.edits[:4]]), prompts))


def test_the_shipped_video_model_shows_held_out_captions() -> None:
    model = subject.load("sprites-wan")
    model.pipe.set_progress_bar_config(disable=True)
    prompts = ["pig face moving up slowly on sky", "carrot moving up slowly on checks"]
    prompts += ["butterfly moving left slowly on meadow"]
    seeds = [model.prompts.index(prompt) for prompt in prompts]
    call = model.call | {"num_inference_steps": 16, "generator": [torch.Generator().manual_seed(s) for s in seeds]}
    clips = model.pipe(prompts, output_type="pt", **call).frames
    assert clips.shape == (len(prompts), 33, 3, 64, 64)
    assert model.grade is not None
    assert sum(model.grade(clips, prompts)) >= 2
    assert not any(model.grade(clips.flip(1), prompts))  # backwards it is another motion


def test_the_video_model_comes_with_a_fit_that_is_far_nearer_than_the_plain_sampler() -> None:
    """A held-out caption, not one of the four that were learned from."""
    model = subject.load("sprites-wan")
    model.pipe.set_progress_bar_config(disable=True)

    def clip(steps: int) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        call = {**model.call, "num_inference_steps": steps, "generator": generator, "output_type": "pt"}
        drawn: Tensor = model.pipe(model.prompts[1], **call).frames[0]
        return drawn.transpose(0, 1).flatten(1, 2)  # frames on top of each other: [3, F H, W]

    full, plain = clip(50), clip(9)
    model.pipe.scheduler = LeapScheduler.load(model.fitted["leap"], model.pipe)
    assert psnr(clip(9), full) > psnr(plain, full) + 10
