"""`emoji-styles`: its split, captions and views, its training loop, and what it exports."""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from hasten.errors import ModelError
from hasten.io import write_atomically
from torch import Tensor, nn

from hasten_zoo.emoji_styles import evaluate, train
from hasten_zoo.emoji_styles.augment import (
    COLOURS,
    WHITE,
    Views,
    caption,
    draw_views,
    nearest_views,
    plain_views,
    render,
)
from hasten_zoo.emoji_styles.data import EmojiStyles, Package, PackedPairs, Pair, fetch, held_out_pairs, packed
from hasten_zoo.emoji_styles.efficientnet import weights_path
from hasten_zoo.emoji_styles.judge import Judge
from hasten_zoo.emoji_styles.latents import Latents, encode_views, load_latents, save_latents
from hasten_zoo.emoji_styles.model import TEXT_TOKENS, build_pipeline, build_tokenizer, load_pipeline, shift
from hasten_zoo.emoji_styles.perceptual import Perceptual
from hasten_zoo.emoji_styles.vae import EmojiVAE
from hasten_zoo.record import Start
from hasten_zoo.training import CHECKPOINT, Loss, Settings, Training, load_half, run

STYLES = ["noto", "flat", "3d"]
CONCEPTS = ["red apple", "left arrow", "cat face"]


@pytest.fixture
def data() -> EmojiStyles:
    """Nine pairs, the last one held out; an image is a coloured rectangle that is not symmetric."""
    pairs = [Pair(style, c, "Food & Drink", "arrow" not in c, False) for style in STYLES for c in CONCEPTS]
    pairs[-1] = Pair(**{**vars(pairs[-1]), "held_out": True})
    random = np.random.default_rng(0)
    images = {}
    for size in (64, 128, 192):
        stored = np.zeros((len(pairs), size, size, 4), np.uint8)
        for i in range(len(pairs)):
            stored[i, size // 4 : size // 2, size // 8 : size // 2] = [*random.integers(0, 255, 3), 255]
        images[size] = stored
    return EmojiStyles(pairs, images)


@pytest.fixture
def vae() -> EmojiVAE:
    torch.manual_seed(0)
    return EmojiVAE(block_out_channels=(12, 48, 8, 8), blocks=(0, 0), decoder_blocks=(0, 0)).eval()


@pytest.fixture
def pipe(vae: EmojiVAE) -> FluxPipeline:
    torch.manual_seed(0)
    return build_pipeline(build_tokenizer(STYLES, CONCEPTS), vae, width=32, double=1, single=1)


@pytest.fixture
def latents(data: EmojiStyles, vae: EmojiVAE) -> dict[int, Latents]:
    return {size: encode_views(vae, data, size, 2, seed=size) for size in (64, 128, 192)}


# --- the split ------------------------------------------------------------------------------------------------------


def test_a_tenth_of_the_pairs_is_held_out_and_every_concept_and_style_stays_known() -> None:
    pairs = [(style, f"thing {i}") for i in range(300) for style in ("noto", "flat", "twemoji", "openmoji")]
    held_out = held_out_pairs(pairs)
    assert len(held_out) == 120
    assert held_out == held_out_pairs(pairs[::-1])  # does not depend on the order
    assert max(Counter(concept for _, concept in held_out).values()) == 1
    shares = Counter(style for style, _ in held_out)
    assert set(shares) == {"noto", "flat", "twemoji", "openmoji"}
    assert max(shares.values()) < 2 * min(shares.values())


def test_a_concept_of_one_style_is_never_held_out() -> None:
    pairs = [("noto", f"thing {i}") for i in range(50)] + [("flat", "thing 0")]
    assert {concept for _, concept in held_out_pairs(pairs, share=0.5)} <= {"thing 0"}


def test_another_archive_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    package = Package("@sets/some", "1.0.0", "sha512-AAAA", "MIT")
    (tmp_path / "sets-some-1.0.0.tgz").write_bytes(b"not what was published")
    with pytest.raises(ValueError, match="expected sha512-AAAA"):
        fetch(package, tmp_path)


# --- views and captions ---------------------------------------------------------------------------------------------


def test_captions() -> None:
    pair = Pair("noto", "red apple", "Food & Drink", True, False)
    assert caption(pair) == "noto, red apple"
    assert caption(pair, "sky blue", style=False) == "red apple on sky blue"
    assert caption(None, "sky blue") == ""


def test_render_mirrors_shifts_and_fills_the_background(data: EmojiStyles) -> None:
    row = torch.tensor([0])
    plain = render(data, row, plain_views(1), 64)
    assert plain.shape == (1, 3, 64, 64)
    mirrored = render(data, row, Views(torch.tensor([True]), torch.zeros(1, 2), torch.tensor([WHITE])), 64)
    assert torch.equal(mirrored, plain.flip(-1))
    assert not torch.equal(mirrored, plain)
    shifted = Views(torch.tensor([False]), torch.tensor([[2 / 64, -3 / 64]]), torch.tensor([WHITE]))
    moved = render(data, row, shifted, 64)
    assert torch.equal(moved[..., 2:, :61], plain[..., :62, 3:])
    navy = list(COLOURS).index("navy")
    dark = render(data, row, Views(torch.tensor([False]), torch.zeros(1, 2), torch.tensor([navy])), 64)
    assert torch.allclose(dark[0, :, 0, 0], torch.tensor(COLOURS["navy"]) / 127.5 - 1, atol=1e-6)
    assert torch.equal(dark[..., 20:30, 10:30], plain[..., 20:30, 10:30])  # opaque parts stay


def test_directed_images_are_never_mirrored(data: EmojiStyles) -> None:
    rows = torch.arange(9).repeat(50)
    mirrored = draw_views(data.pairs, rows, torch.Generator().manual_seed(0)).mirrored
    may = torch.tensor([data.pairs[i].mirror for i in rows.tolist()])
    assert not bool(mirrored[~may].any())
    assert 0.4 < float(mirrored[may].float().mean()) < 0.6


def test_style_and_caption_are_left_out_as_often_as_said(
    pipe: FluxPipeline, data: EmojiStyles, latents: dict[int, Latents], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def spy(net: nn.ModuleDict, noisy: Tensor, t: Tensor, text: Tensor, positions: Tensor) -> Tensor:
        seen.extend(pipe.tokenizer.batch_decode(text, skip_special_tokens=True))
        return noisy

    monkeypatch.setattr(train, "predict", spy)
    captions = train.Captions(data, latents, pipe.tokenizer)
    objective = train.Objective(nn.ModuleDict(train.learning_parts(pipe)), latents, captions, batch=64)
    generator = torch.Generator().manual_seed(0)
    kinds = Counter(objective(generator).kind for _ in range(60))
    assert kinds["128"] > kinds["64"] > 0
    empty = sum(not text for text in seen) / len(seen)
    styled = sum("," in text for text in seen) / len(seen)
    assert empty == pytest.approx(0.1, abs=0.02)
    assert styled == pytest.approx(0.9 * 2 / 3, abs=0.03)
    assert "3d , cat face" not in {text.split(" on ")[0] for text in seen}  # held out
    assert any(text.endswith("on sky blue") for text in seen)


def test_concepts_that_are_not_taught_are_neither_encoded_nor_asked_for(data: EmojiStyles, vae: EmojiVAE) -> None:
    left_out = "red apple"
    pairs = [replace(pair, category="Flags") if pair.concept == left_out else pair for pair in data.pairs]
    fewer = EmojiStyles(pairs, data.images)
    assert len(fewer.rows(held_out=False)) == len(data.rows(held_out=False))  # what the autoencoder learns from
    taught = {fewer.pairs[i].concept for i in fewer.taught(held_out=False).tolist()}
    assert taught == {pair.concept for pair in data.pairs} - {left_out}
    latents = {size: encode_views(vae, fewer, size, 2, seed=size) for size in (64, 128, 192)}
    tokenizer = build_tokenizer(STYLES, CONCEPTS)
    ids = train.Captions(fewer, latents, tokenizer).ids[128]
    said = tokenizer.batch_decode(ids.flatten(0, -2), skip_special_tokens=True)
    assert said
    assert not any(left_out in text for text in said)
    with pytest.raises(ModelError, match=r"of \d+ images, and \d+ are trained on; make them again"):
        train.Captions(data, latents, tokenizer)


def test_captions_that_do_not_fit_are_refused(data: EmojiStyles, latents: dict[int, Latents]) -> None:
    with pytest.raises(ValueError, match="unknown words"):
        train.Captions(data, latents, build_tokenizer(STYLES, ["another thing"]))


# --- the training loop ----------------------------------------------------------------------------------------------


def _regression(settings: Settings) -> Training:
    torch.manual_seed(0)
    net = nn.ModuleDict({"layer": nn.Linear(4, 4)})

    def loss(generator: torch.Generator) -> Loss:
        x = torch.randn(8, 4, generator=generator)
        return Loss((net["layer"](x) - x.flip(-1)).square().mean(), 8, "all")

    return Training(net, loss, settings)


def test_resumed_training_equals_undisturbed_training(tmp_path: Path) -> None:
    settings = Settings(lr=1e-2, warmup_steps=30, cooldown=(240, 160))
    whole, first, second = _regression(settings), _regression(settings), _regression(settings)
    run(whole, tmp_path / "whole", samples=400)
    run(first, tmp_path / "parts", samples=120)  # within the warm-up
    run(second, tmp_path / "parts", samples=400)
    assert second.steps == whole.steps == 50
    for name, value in whole.net.state_dict().items():
        assert torch.equal(value, second.net.state_dict()[name])
        assert torch.equal(whole.average[name], second.average[name])
    assert whole.learning_rate == 0.0  # the cooldown has ended
    assert not torch.equal(whole.average["layer.weight"], whole.net["layer"].weight)


def test_a_budget_of_time_ends_a_part_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    training = _regression(Settings())
    run(training, tmp_path, samples=10**9, minutes=0.01)
    saved = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert saved["position"][1] == training.samples > 0
    assert (tmp_path / "log.jsonl").read_text().count("samples_per_second") >= 1


def test_bare_weights_warm_the_optimizer_up_again() -> None:
    training = _regression(Settings(lr=1e-2, warmup_steps=10))
    weights = {k: torch.full_like(v, 0.5).half() for k, v in training.net.state_dict().items()}
    training.start_from(Start(weights, steps=1000, samples=8000))
    assert training.learning_rate == pytest.approx(1e-3)
    for _ in range(10):
        training.step()
    assert (training.steps, training.samples) == (1010, 8080)
    assert training.learning_rate == pytest.approx(1e-2)


# --- the pipeline ---------------------------------------------------------------------------------------------------


def test_latents_are_sixteen_channels_of_an_eighth(vae: EmojiVAE) -> None:
    z = vae.encode(torch.rand(2, 3, 128, 64) * 2 - 1).latents
    assert z.shape == (2, 16, 16, 8)
    assert vae.decode(z).sample.shape == (2, 3, 128, 64)


def test_latents_on_disk_come_back(latents: dict[int, Latents], data: EmojiStyles, tmp_path: Path) -> None:
    assert latents[192].values.shape == (2, 8, 16, 24, 24)  # the held-out pair is not among them
    for size, found in latents.items():
        save_latents(found, tmp_path, size)
    back = load_latents(tmp_path)
    assert list(back) == [64, 128, 192]
    assert torch.equal(back[128].values, latents[128].values)
    assert torch.equal(back[64].colours, latents[64].colours)


@pytest.mark.parametrize("tokens", [16, 64, 144])
def test_times_of_training_are_shifted_as_the_pipeline_shifts_them(pipe: FluxPipeline, tokens: int) -> None:
    c = pipe.scheduler.config
    mu = calculate_shift(tokens, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    pipe.scheduler.set_timesteps(sigmas=[0.5], mu=mu)
    assert shift(tokens) / (1 + shift(tokens)) == pytest.approx(float(pipe.scheduler.sigmas[0]), abs=1e-6)


def _training(pipe: FluxPipeline, data: EmojiStyles, latents: dict[int, Latents], **settings: Any) -> Training:
    net = nn.ModuleDict(train.learning_parts(pipe))
    objective = train.Objective(net, latents, train.Captions(data, latents, pipe.tokenizer), batch=8)
    return Training(net, objective, Settings(warmup_steps=5, **settings))


@pytest.mark.slow
def test_training_learns_and_its_export_draws_and_trains_on(
    pipe: FluxPipeline, data: EmojiStyles, latents: dict[int, Latents], tmp_path: Path
) -> None:
    training = _training(pipe, data, latents, lr=5e-3, ema=0.9)
    untrained = copy.deepcopy(training.net.state_dict())
    losses = [float(training.step().value.detach()) for _ in range(40)]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    assert all(not torch.equal(v, untrained[k]) for k, v in training.net.state_dict().items() if "shared" in k)

    train.export(training.state(), pipe, tmp_path)
    loaded = load_pipeline(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.vae_scale_factor == 8
    for size in (64, 128, 192):
        call = {"height": size, "width": size, "num_inference_steps": 2, "output_type": "pt"}
        images = loaded("noto, red apple", negative_prompt="", true_cfg_scale=3.0, **call).images
        assert images.shape == (1, 3, size, size)
        assert bool(torch.isfinite(images).all())

    parts = train.learning_parts(loaded)
    start = load_half(parts, tmp_path)
    assert (start.steps, start.samples) == (training.steps, training.samples)
    again = _training(loaded, data, latents)
    again.start_from(start)
    for name, value in training.average.items():
        assert torch.equal(again.net.state_dict()[name], value.half().float())
    run(again, tmp_path / "again", start.samples + 1, fallback=lambda: load_half(parts, tmp_path))
    assert (again.steps, again.warm_from) == (41, 40)


def test_a_cooldown_leaves_the_trunk_alone(tmp_path: Path) -> None:
    trunk = _regression(Settings())
    run(trunk, tmp_path, samples=80)
    before = (tmp_path / CHECKPOINT).read_bytes()
    end, cooldown = train.start_cooldown(tmp_path, 80)
    assert (end, cooldown) == (160, (80, 80))
    copied = _regression(Settings(cooldown=cooldown))
    run(copied, tmp_path / "cooldown", samples=end)
    assert copied.samples == 160
    assert copied.learning_rate == 0.0
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert train.start_cooldown(tmp_path, 80) == (160, (80, 80))  # over: there is nothing to go on to


def test_a_cooldown_goes_on_and_another_begins_once_the_trunk_is_further(tmp_path: Path) -> None:
    run(_regression(Settings()), tmp_path, samples=80)
    end, cooldown = train.start_cooldown(tmp_path, 80)
    run(_regression(Settings(cooldown=cooldown)), tmp_path / "cooldown", samples=120)  # cut short
    run(_regression(Settings()), tmp_path, samples=400)
    assert train.start_cooldown(tmp_path, 80) == (end, cooldown)
    with pytest.raises(ModelError, match="a cooldown of 80 samples is under way"):
        train.start_cooldown(tmp_path, 160)
    run(_regression(Settings(cooldown=cooldown)), tmp_path / "cooldown", samples=end)
    assert train.start_cooldown(tmp_path, 160) == (560, (400, 160))
    again = _regression(Settings(cooldown=(400, 160)))
    run(again, tmp_path / "cooldown", samples=560)
    assert (again.samples, again.learning_rate) == (560, 0.0)


def test_a_cooldown_that_is_over_is_not_made_longer_without_a_word(tmp_path: Path) -> None:
    run(_regression(Settings()), tmp_path, samples=80)
    end, cooldown = train.start_cooldown(tmp_path, 80)
    run(_regression(Settings(cooldown=cooldown)), tmp_path / "cooldown", samples=end)
    with pytest.raises(
        ModelError, match=r"the cooldown of 80 samples in .* is over, .* for a cooldown of 160 from there"
    ):
        train.start_cooldown(tmp_path, 160)
    with pytest.raises(ModelError, match="no checkpoint in"):
        train.start_cooldown(tmp_path / "nowhere", 80)


def test_a_cooldown_that_was_cut_short_while_it_was_copied_starts_where_the_trunk_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(_regression(Settings()), tmp_path, samples=80)
    end, cooldown = train.start_cooldown(tmp_path, 400)
    run(_regression(Settings(cooldown=cooldown)), tmp_path / "cooldown", samples=end)
    run(_regression(Settings()), tmp_path, samples=240)

    def killed(path: Path, content: Any) -> Path:
        if path.name == "plan.json":
            raise KeyboardInterrupt
        return write_atomically(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(train, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            train.start_cooldown(tmp_path, 400)
    assert train.start_cooldown(tmp_path, 400) == (640, (240, 400))


def test_every_caption_of_the_sets_fits() -> None:
    longest = caption(Pair("openmoji", "face with open eyes and hand over mouth", "", True, False), "dark green")
    words = longest.replace(",", " ,").split()
    assert len(words) + 2 <= TEXT_TOKENS


def test_the_nearest_view_is_found_among_those_that_a_caption_leaves_open() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.ones(3, 3, 32, 32)
    truth[:, :, 8:24, 8:24] = torch.rand(3, 3, 16, 16, generator=generator)
    seen = torch.stack([truth[0].roll((2, -1), (1, 2)), truth[1].flip(-1).roll(3, 2), truth[2].flip(-1)])
    found = nearest_views(seen, truth, [True, True, False])
    assert torch.equal(found[:2], seen[:2])
    assert not torch.equal(found[2], seen[2])  # it has letters, say: mirrored it is another image
    assert torch.equal(nearest_views(truth, truth, [True] * 3), truth)


# --- evaluation -----------------------------------------------------------------------------------------------------


class Eyes:
    """A judge that finds red apples of the first set in everything, or cats if it has not seen what was held out."""

    def __call__(self, images: Tensor) -> tuple[list[str], list[str]]:
        return ["noto"] * len(images), ["red apple"] * len(images)

    def from_training_pairs(self, images: Tensor) -> list[str]:
        return ["cat face"] * len(images)


def test_the_curve_gets_a_row_for_each_moment(
    pipe: FluxPipeline, data: EmojiStyles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "Perceptual", lambda: lambda a, b: (a - b).abs().mean((1, 2, 3)))
    monkeypatch.setattr(evaluate, "SIZE", 64)
    write_atomically(tmp_path / "evaluation.json", '{"images": 7, "curve": [{"samples": 40, "both": 0.5}]}')
    for samples in (90, 20, 90):
        average = nn.ModuleDict(train.learning_parts(pipe)).float().state_dict()
        train.export({"average": average, "position": [1, samples, 0]}, pipe, tmp_path / "weights")
        pipe.vae.float()
        row = evaluate.moment(tmp_path / "weights", data, Eyes(), images=3, steps=2, guidance=1.5)  # type: ignore[arg-type]
        evaluate.add_to_curve(tmp_path, row)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["images"] == 7
    assert [known["samples"] for known in written["curve"]] == [20, 40, 90]
    assert written["curve"][2] == row
    evaluate.add_to_curve(tmp_path, other := row | {"steps": 3})  # another measurement, beside it
    assert json.loads((tmp_path / "evaluation.json").read_text())["curve"][2:] == [row, other]
    held_out = [pair for pair in data.pairs if pair.held_out]
    assert row["concept_top1"] == sum(pair.concept == "red apple" for pair in held_out) / len(held_out)
    assert row["concept_top1_blind"] == sum(pair.concept == "cat face" for pair in held_out) / len(held_out)
    assert row["diversity"] > 0
    assert row["euler_9_against_50_steps_db"] > 0


def test_pairs_come_back_packed(data: EmojiStyles) -> None:
    pairs = packed(data.pairs)
    assert set(pairs.unpacked()) == set(data.pairs)
    with pytest.raises(ValueError, match="none of the"):
        PackedPairs(pairs.concepts[:1], pairs.styles)


def test_a_sheet_has_one_row_per_batch() -> None:
    first, second = torch.full((3, 3, 8, 8), -1.0), torch.zeros(2, 3, 8, 8)
    first[1, 0] = 1  # red
    drawn = np.asarray(evaluate.sheet([first, second], columns=3))
    assert drawn.shape == (16, 24, 3)
    assert drawn[3, 12].tolist() == [255, 0, 0]
    assert drawn[3, 4].tolist() == [0, 0, 0]
    assert drawn[12, 20].tolist() == [255, 255, 255]  # nothing there


def test_psnr_is_that_of_images_from_zero_to_one() -> None:
    black, grey = torch.full((1, 3, 4, 4), -1.0), torch.full((1, 3, 4, 4), -0.8)
    assert evaluate.psnr(black, grey) == [pytest.approx(20.0, abs=1e-4)]


def test_a_mirrored_training_image_is_a_near_copy_and_a_held_out_one_is_not(data: EmojiStyles) -> None:
    lpips = pytest.importorskip("stlpips_pytorch") and Perceptual()
    data.images[128][8, :, :] = 0
    data.images[128][8, 60:120, 60:120] = [10, 120, 40, 255]
    images = render(data, torch.tensor([0, 8]), plain_views(2), 128)
    distances, nearest = evaluate.near_copies(data, lpips, images.flip(-1))
    assert distances[0] < 1e-4 < evaluate.NEAR_COPY < distances[1]
    assert torch.equal(nearest[0], images[0].flip(-1))


def test_the_perceptual_distance_can_be_descended() -> None:
    lpips = pytest.importorskip("stlpips_pytorch") and Perceptual()
    torch.manual_seed(0)
    first, second = torch.rand(2, 1, 3, 64, 64) * 2 - 1
    first.requires_grad_()
    lpips(first, second).sum().backward()
    closer = (first - first.grad / first.grad.norm()).detach() if first.grad is not None else first
    assert float(lpips(closer, second)) < float(lpips(first.detach(), second))
    assert float(lpips(second, second)) == 0.0


@pytest.mark.skipif(weights_path() is None, reason="the judge's network is not installed")
def test_the_judge_knows_published_images_and_held_out_ones_can_be_kept_from_it(
    data: EmojiStyles, vae: EmojiVAE, tmp_path: Path
) -> None:
    random = np.random.default_rng(1)
    for i, pair in enumerate(data.pairs):  # a concept is a shape, a style a colour
        shape = CONCEPTS.index(pair.concept)
        data.images[128][i] = 0
        area = data.images[128][i, 20 : 60 + 20 * shape, 10 + 30 * shape : 70 + 20 * shape]
        area[..., :3], area[..., 3] = 40 + 80 * STYLES.index(pair.style) + random.integers(0, 20, 3), 255
    assert not Judge.available(tmp_path)
    Judge.fit(data, vae).save(tmp_path)
    assert Judge.available(tmp_path)
    judge = Judge.load(tmp_path)
    images = render(data, torch.arange(9), plain_views(9), 128)
    styles, concepts = judge(images)
    assert concepts == [pair.concept for pair in data.pairs]
    assert styles[:8] == [pair.style for pair in data.pairs[:8]]
    assert judge.from_training_pairs(images)[:8] == concepts[:8]


def test_folders_without_weights_end_an_evaluation_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate", "--data", str(tmp_path / "none"), "--curve", str(tmp_path / "absent")])
    with pytest.raises(SystemExit):
        evaluate.main()
    assert f"no weights in {tmp_path / 'absent'}: name a folder" in capsys.readouterr().err
