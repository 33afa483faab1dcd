"""`sprites-wan` in latents: its autoencoder, its objective, its training and what it exports."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch
from diffusers import AutoencoderTiny
from hasten.errors import ConfigError, ModelError
from hasten.io import write_sealed
from torch import Tensor

from hasten_zoo.sprites_wan import data, evaluate, load_sprites_wan, ordered_clips, train, train_vae
from hasten_zoo.sprites_wan.data import CANVAS, Clip, all_clips, draw, draw_batch, jittered
from hasten_zoo.sprites_wan.grade import judge, locate
from hasten_zoo.sprites_wan.model import TEXT_TOKENS, build_pipeline
from hasten_zoo.sprites_wan.vae import SpriteVAE, load_vae
from hasten_zoo.training import CHECKPOINT, Settings, Training

TINY: train.Mix = ({32: 0.5, 64: 0.5}, {5: 0.5, 9: 0.5})


def tiny_vae() -> SpriteVAE:
    torch.manual_seed(0)
    return SpriteVAE(encoder_width=8, decoder_width=8, head_width=8)


def write_vae(folder: Path, vae: SpriteVAE | None = None) -> None:
    """As an export does, without measuring anything."""
    write_sealed(folder, lambda scratch: (vae or tiny_vae()).save_pretrained(scratch))


def objective(batch: int = 1, mix: train.Mix = TINY) -> train.Objective:
    pipe = build_pipeline(tiny_vae(), 32, 1)
    return train.Objective(pipe, batch, mix)


# --- data


def test_a_batch_of_clips_is_the_clips() -> None:
    clips = [jittered(clip, Random(i)) for i, clip in enumerate(all_clips()[::100])]
    expected, times = torch.stack([draw(clip, 5) for clip in clips]), torch.linspace(0, 1, 5)
    assert torch.allclose(draw_batch(clips, times), expected, atol=1e-5)
    assert torch.allclose(draw_batch(clips, times.expand(len(clips), -1)), expected, atol=1e-5)


def test_the_large_canvas_tells_every_motion_from_every_other() -> None:
    """What the grader calls right for one motion it calls wrong for all others, whatever the start."""
    for asked in range(len(data.MOTIONS)):
        for shown in range(len(data.MOTIONS)):
            centres, sizes = data.path(Clip(0, shown, 0), 5)
            wanted, wanted_sizes = data.path(Clip(0, asked, 0), 5)
            moved = centres - wanted
            near = bool(((moved - moved[0]).abs() <= CANVAS.side / 12).all())
            alike = near and torch.allclose(sizes, wanted_sizes)
            assert alike == (asked == shown), (data.MOTIONS[asked], data.MOTIONS[shown])


def test_a_verdict_names_what_is_wrong() -> None:
    clip = Clip(2, data.MOTIONS.index("moving left fast"), 1)
    other = Clip(6, clip.motion, clip.background)
    still = Clip(clip.item, 0, clip.background)
    good, wrong, held = (judge(clip, draw(shown, CANVAS.frames)) for shown in (clip, other, still))
    assert (good.object, good.motion) == (True, True)
    assert (wrong.object, wrong.motion) == (False, True)
    assert not held.motion
    blurred = draw(clip, CANVAS.frames)
    blurred = torch.nn.functional.avg_pool2d(blurred, 7, 1, 3, count_include_pad=False)
    assert judge(clip, blurred).psnr < good.psnr - 5


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_clip_that_is_not_a_picture_is_wrong(value: float) -> None:
    lemon = next(clip for clip in ordered_clips() if clip.caption.startswith("lemon"))
    verdict = judge(lemon, torch.full((33, 3, 64, 64), value))
    assert (verdict.object, verdict.motion) == (False, False)
    assert math.isfinite(verdict.psnr)
    once = draw(lemon, CANVAS.frames)
    once[3, 0, 5, 7] = value  # in a frame that is not looked at
    assert judge(lemon, once).object == math.isfinite(value)


def test_true_clips_are_right_and_empty_ones_are_wrong() -> None:
    """All held-out captions, from any start; noise changes neither."""
    generator, rng = torch.Generator().manual_seed(0), Random(0)
    for clip in [clip for clip in ordered_clips() if clip.held_out]:
        empty = data.background(clip.background).expand(CANVAS.frames, -1, -1, -1)
        noise = 0.08 * torch.randn(empty.shape, generator=generator)
        shown = draw(jittered(clip, rng), CANVAS.frames)
        for true in (draw(clip, CANVAS.frames), shown + noise):
            verdict = judge(clip, true)
            assert (verdict.object, verdict.motion) == (True, True), clip.caption
        for bare in (empty, empty + noise):
            verdict = judge(clip, bare)
            assert (verdict.object, verdict.motion) == (False, False), clip.caption


def test_the_nearest_sprite_is_the_one_with_the_least_error() -> None:
    """Against drawing every sprite at every place."""
    clip = Clip(9, data.MOTIONS.index("zooming in"), 2, (2.3, -1.7))
    noise = torch.randn(3, CANVAS.side, CANVAS.side, generator=torch.Generator().manual_seed(0))
    for u, around, reach in ((0, (20.25, 30.5), 5.0), (4, (CANVAS.side - 9.0, 8.0), 12.5)):  # the second over the edge
        frame = draw(clip, 5)[u] + 0.1 * noise
        size = float(data.path(clip, 5)[1][u])
        steps = torch.arange(-reach, reach + 1, 2)
        places = torch.cartesian_prod(steps, steps) + torch.tensor(around)
        errors = []
        for item in range(len(data.OBJECTS)):
            layer = data.place(torch.full((len(places),), item), places, torch.full((len(places),), size))
            shown = layer[:, :3] + (1 - layer[:, 3:]) * data.background(2)
            errors.append((shown - frame).square().mean((1, 2, 3)))
        least = torch.stack(errors)
        best = divmod(int(least.argmin()), len(places))
        item, centre, error = locate(frame, 2, size, around, reach)
        assert item == best[0]
        assert torch.equal(centre, places[best[1]])
        assert error == pytest.approx(float(least.min()), rel=1e-3)


# --- autoencoder


def test_a_fresh_autoencoder_has_the_shapes_of_the_pipeline() -> None:
    vae = tiny_vae()
    video = torch.rand(2, 3, 5, 32, 24) * 2 - 1
    (latents,) = vae.encode(video, return_dict=False)
    assert latents.shape == (2, 8, 3, 8, 6)
    assert vae.decode(latents, return_dict=False)[0].shape == video.shape


def test_the_latent_between_two_frames_is_at_first_their_mean() -> None:
    vae = tiny_vae()
    before, after = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    assert torch.equal(vae.middle(before, after), (before + after) / 2)


def test_every_latent_frame_is_encoded_by_itself() -> None:
    """A shorter clip, or a frame alone, has the latents that it has within a longer one."""
    vae = tiny_vae().eval()
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    (whole,) = vae.encode(video, return_dict=False)
    for i in range(3):
        (alone,) = vae.encode(video[:, :, 2 * i : 2 * i + 1], return_dict=False)
        assert torch.allclose(alone, whole[:, :, i : i + 1], atol=1e-5)


def test_the_autoencoder_learns_and_its_export_says_how_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_vae, "SpriteVAE", tiny_vae)
    before = train_vae.round_trip(tiny_vae(), clips=2)
    train_vae.main(["--out", str(tmp_path), "--samples", "720", "--batch", "4", "--lr", "1e-2"])
    measured = json.loads((tmp_path / "weights" / "round_trip.json").read_text())
    assert measured["psnr_encoded"] > before["psnr_encoded"] + 3
    vae = load_vae(tmp_path / "weights")
    video = torch.stack([draw(clip, 5) for clip in all_clips()[::37]]).transpose(1, 2) * 2 - 1
    with torch.no_grad():
        latents = vae.eval().encode(video, return_dict=False)[0].transpose(0, 1).flatten(1)
    scaled = (latents - torch.tensor(vae.config.latents_mean)[:, None]) / torch.tensor(vae.config.latents_std)[:, None]
    assert scaled.mean(1).abs().max() < 0.2
    assert (scaled.std(1) - 1).abs().max() < 0.2


def test_a_decoder_learns_on_without_touching_the_latents(tmp_path: Path) -> None:
    write_vae(tmp_path / "weights")
    train_vae.main(["--out", str(tmp_path), "--samples", "720", "--batch", "4", "--lr", "1e-2", "--decoder"])
    first, second = load_vae(tmp_path / "weights").eval(), load_vae(tmp_path / "decoder" / "weights").eval()
    video = draw(all_clips()[5], 5).transpose(0, 1)[None] * 2 - 1
    with torch.no_grad():
        latents = first.encode(video, return_dict=False)[0]
        assert torch.allclose(second.encode(video, return_dict=False)[0], latents, atol=5e-3)  # half precision
    before, after = train_vae.round_trip(first, clips=2), train_vae.round_trip(second, clips=2)
    assert after["psnr_encoded"] > before["psnr_encoded"] + 3
    assert second.config.latents_mean == first.config.latents_mean


def test_a_missing_autoencoder_is_named_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no autoencoder in .*; train one with python -m .*train_vae"):
        load_vae(tmp_path)


def test_only_the_autoencoder_that_was_written_is_loaded(tmp_path: Path) -> None:
    other = AutoencoderTiny()
    write_sealed(tmp_path / "other", lambda scratch: other.save_pretrained(scratch))
    with pytest.raises(ModelError, match="is of class AutoencoderTiny, expected SpriteVAE; train one"):
        load_vae(tmp_path / "other")
    tiny_vae().save_pretrained(tmp_path / "unsealed")
    with pytest.raises(ModelError, match=r"digests\.json.*Export it again"):
        load_vae(tmp_path / "unsealed")
    write_vae(tmp_path / "cut")
    weights = next((tmp_path / "cut").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="Export it again") as caught:
        load_vae(tmp_path / "cut")
    assert "\n" not in str(caught.value)
    write_sealed(tmp_path / "resealed", lambda scratch: shutil.copytree(tmp_path / "cut", scratch, dirs_exist_ok=True))
    with pytest.raises(ModelError, match="Export it again") as caught:
        load_vae(tmp_path / "resealed")
    assert "\n" not in str(caught.value)


def test_the_autoencoder_of_an_exported_pipeline_is_loaded(tmp_path: Path) -> None:
    write_sealed(tmp_path, lambda scratch: tiny_vae().save_pretrained(scratch / "vae"))
    assert torch.equal(load_vae(tmp_path / "vae").decoder[0].weight, tiny_vae().decoder[0].weight)


def test_a_decoder_of_another_encoder_is_not_gone_on_from(tmp_path: Path) -> None:
    write_vae(tmp_path / "weights")
    options = ["--out", str(tmp_path), "--batch", "1", "--decoder"]
    train_vae.main([*options, "--samples", "1"])
    train_vae.main([*options, "--samples", "4"])  # the same encoder
    other = tiny_vae()
    torch.nn.init.normal_(other.encoder[1].weight)
    write_vae(tmp_path / "weights", other)
    for more in (["--samples", "7"], ["--export"]):
        with pytest.raises(ModelError, match=r"of another encoder than the exported one.*delete the folder"):
            train_vae.main([*options, *more])


def test_an_autoencoder_is_not_exported_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no checkpoint in .*; run the training script"):
        train_vae.main(["--out", str(tmp_path), "--export"])
    with pytest.raises(ConfigError, match="--samples must be at least 1, got 0"):
        train_vae.main(["--out", str(tmp_path), "--samples", "0"])
    assert not list(tmp_path.iterdir())


# --- objective


@pytest.mark.parametrize("width", [0, -64, 16, 33, 48, 96, 100])
def test_a_width_without_whole_heads_is_refused(width: int) -> None:
    with pytest.raises(ConfigError, match=f"the width {width} .*choose 32 or a multiple of 64"):
        build_pipeline(tiny_vae(), width, 1)


@pytest.mark.parametrize("width", [32, 64, 128])
def test_the_transformer_is_as_wide_as_asked(width: int) -> None:
    config = build_pipeline(tiny_vae(), width, 1).transformer.config
    assert config.num_attention_heads * config.attention_head_dim == width


@pytest.mark.parametrize("prompts", [0, -1])
def test_an_evaluation_of_nothing_is_refused_before_loading(
    tmp_path: Path, prompts: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["--prompts", str(prompts), "--weights", str(tmp_path / "none")])
    assert f"--prompts: must be at least 1, got {prompts}" in capsys.readouterr().err


def test_every_batch_has_about_as_many_tokens() -> None:
    assert train.clips_of(6, 64, 17) == 6
    for sides, frames in train.MIXES.values():
        assert sum(sides.values()) == pytest.approx(1)
        assert sum(frames.values()) == pytest.approx(1)
        for side in sides:
            for count in frames:
                tokens = train.clips_of(6, side, count) * count * (side // 8) ** 2
                assert 0.85 * 6 * 1088 < tokens <= 6 * 1088


def test_the_loss_asks_for_what_the_pipeline_does() -> None:
    """One step from pure noise: the pipeline's answer is the noise minus the velocity that training predicts."""
    torch.manual_seed(0)
    pipe = build_pipeline(tiny_vae(), 32, 1)
    torch.nn.init.normal_(pipe.transformer.proj_out.weight)
    pipe.set_progress_bar_config(disable=True)
    loss = train.Objective(pipe, 1, TINY)
    noise, row = torch.randn(1, 8, 5, 16, 16), 5
    with torch.no_grad():
        answer = pipe(
            [loss.clips[row].caption], height=64, width=64, num_frames=9, num_inference_steps=1, guidance_scale=1.0,
            max_sequence_length=TEXT_TOKENS, latents=noise, output_type="latent",
        ).frames  # fmt: skip
        velocity = loss.predict(noise, torch.ones(1), torch.tensor([row]))
    assert torch.allclose(answer, noise - velocity, atol=1e-4)


def test_clean_latents_are_those_of_the_clip_at_each_size() -> None:
    loss = objective()
    for side, frames in ((64, 5), (32, 9)):
        latents = loss.latents([7], side, frames, Random(3))
        clip = jittered(loss.clips[7], Random(3))
        small = torch.nn.functional.interpolate(draw(clip, frames), (side, side), mode="area")
        expected = loss.vae.encode_frames(small * 2 - 1)
        assert latents.shape == (1, 8, frames, side // 4, side // 4)
        assert torch.allclose(latents[0].transpose(0, 1), expected, atol=1e-4)


def test_sizes_and_empty_captions_come_as_often_as_said(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, seen, shapes = objective(2), list[int](), Counter[tuple[int, int]]()

    def spy(noisy: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        seen.extend(rows.tolist())
        shapes[noisy.shape[3] * 4, noisy.shape[2]] += 1
        return noisy

    monkeypatch.setattr(loss, "predict", spy)
    monkeypatch.setattr(
        loss, "latents", lambda rows, side, frames, rng: torch.zeros(len(rows), 8, frames, side // 4, 1)
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        loss(generator)
    assert seen.count(len(loss.clips)) / len(seen) == pytest.approx(0.1, abs=0.02)
    assert set(shapes) == {(side, frames) for side in TINY[0] for frames in TINY[1]}
    assert min(shapes.values()) > 30
    assert not any(clip.held_out for clip in loss.clips)
    drawn = Counter(data.MOTIONS[loss.clips[row].motion] for row in seen if row < len(loss.clips))
    of = Counter(data.MOTIONS[clip.motion] for clip in loss.clips)
    often = {motion: drawn[motion] / of[motion] for motion in data.MOTIONS}
    for words, share in train.OFTEN.items():
        for motion in (motion for motion in data.MOTIONS if words in motion):
            assert often[motion] / often["still"] == pytest.approx(share, rel=0.35)
    assert often["moving up slowly"] / often["still"] == pytest.approx(1, rel=0.35)


# --- training


def test_training_learns_and_repeats() -> None:
    def losses(steps: int) -> list[float]:
        torch.manual_seed(0)
        made = objective(1, ({32: 1.0}, {5: 1.0}))
        training = Training(made.net, made, Settings(lr=5e-3, warmup_steps=5))
        return [float(training.step().value.detach()) for _ in range(steps)]

    first = losses(40)
    assert losses(4) == first[:4]
    assert sum(first[-8:]) < 0.8 * sum(first[:8])


def test_training_goes_on_from_its_export(tmp_path: Path) -> None:
    write_vae(tmp_path / "vae")
    exported = tmp_path / "weights"
    common = ["--vae", str(tmp_path / "vae"), "--batch", "1", "--width", "32", "--layers", "1"]
    train.main([*common, "--committed", "none", "--out", str(tmp_path / "a"), "--samples", "2"])
    train.main([*common, "--out", str(tmp_path / "a"), "--export", str(exported)])
    state = torch.load(tmp_path / "a" / CHECKPOINT, weights_only=True)
    train.main([*common, "--committed", str(exported), "--out", str(tmp_path / "b"), "--samples", "1"])
    again = torch.load(tmp_path / "b" / CHECKPOINT, weights_only=True)
    assert again["position"][:2] == state["position"][:2]  # it had seen enough
    for name, value in state["average"].items():
        assert torch.equal(again["net"][name], value.half().float()), name


def test_weights_that_do_not_say_what_they_have_seen_are_not_gone_on_from(tmp_path: Path) -> None:
    """As those of a pipeline that this script did not write; its shapes are others, too."""
    other = build_pipeline(tiny_vae(), 64, 1)
    other.transformer.save_pretrained(tmp_path / "weights" / "transformer")
    write_vae(tmp_path / "vae")
    options = ["--vae", str(tmp_path / "vae"), "--batch", "1", "--width", "32", "--layers", "1", "--samples", "1"]
    with pytest.raises(ModelError, match=r"no weights of a training in .*weights; give another --committed, or none"):
        train.main([*options, "--committed", str(tmp_path / "weights"), "--out", str(tmp_path / "out")])
    train.main([*options, "--committed", "none", "--out", str(tmp_path / "out")])
    assert torch.load(tmp_path / "out" / CHECKPOINT, weights_only=True)["position"][0] == 1


def test_a_folder_of_weights_is_a_model(tmp_path: Path) -> None:
    """Exchanging the folder is all it takes; what was fitted to the shipped weights is left out."""
    pipe = build_pipeline(tiny_vae(), 32, 1)
    made = train.Objective(pipe, 1, TINY)
    training = Training(made.net, made, Settings())
    train.export(copy.deepcopy(training.state()), pipe, tmp_path)
    large, shipped = load_sprites_wan(tmp_path), load_sprites_wan()
    assert (large.call["height"], large.call["num_frames"], large.sizes) == (64, 33, ((64, 64),))
    assert large.call["guidance_scale"] == 3.0
    assert large.fitted == {}
    assert large.prompts == shipped.prompts
    assert next(large.pipe.vae.parameters()).dtype == torch.float32
