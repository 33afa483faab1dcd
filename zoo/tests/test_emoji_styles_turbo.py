"""`emoji-styles-turbo`: the teacher's ways, the student's windows, and that distilling shortens the way."""

from __future__ import annotations

import json
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from hasten.errors import ConfigError, ModelError
from torch import Tensor, nn

from hasten_zoo.emoji_styles import HERE as STYLES_HERE
from hasten_zoo.emoji_styles.data import Pair
from hasten_zoo.emoji_styles.judge import Judge
from hasten_zoo.emoji_styles.model import build_pipeline, build_tokenizer, load_pipeline
from hasten_zoo.emoji_styles.train import export as export_styles
from hasten_zoo.emoji_styles.train import image_positions, learning_parts, predict
from hasten_zoo.emoji_styles.vae import EmojiVAE
from hasten_zoo.emoji_styles_turbo import evaluate, load_emoji_styles_turbo, train
from hasten_zoo.emoji_styles_turbo.model import load_pipeline as load_turbo
from hasten_zoo.low_rank import DIFFERENCES, LowRankLinear
from hasten_zoo.training import Settings, Training, read_checkpoint

STYLES, CONCEPTS = ["noto", "flat"], ["red apple", "left arrow", "cat face"]
SIZE, TOKENS, RANK = 64, 16, 4
PAIRS = [Pair(style, c, "Food & Drink", True, (style, c) == ("flat", "cat face")) for style in STYLES for c in CONCEPTS]


@pytest.fixture
def pipe() -> FluxPipeline:
    """A tiny one whose velocities bend: no output or gate is zero."""
    torch.manual_seed(0)
    vae = EmojiVAE(block_out_channels=(12, 48, 8, 8), blocks=(0, 0), decoder_blocks=(0, 0)).eval()
    pipe = build_pipeline(build_tokenizer(STYLES, CONCEPTS), vae, width=32, double=1, single=1)
    for name, module in pipe.transformer.named_modules():
        if isinstance(module, nn.Linear) and (name.endswith("norm.linear") or ".norm1" in name or name == "proj_out"):
            nn.init.normal_(module.weight, std=0.3)
    return pipe


def _training(
    pipe: FluxPipeline, batch: int = 16, lr: float = 1e-2, rank: int = RANK
) -> tuple[Training, train.Teacher]:
    settings = Settings(lr=lr, warmup_steps=10, ema=0.95)
    training, objective = train.make_training(pipe, PAIRS, batch, settings, sizes=[SIZE], rank=rank)
    return training, objective.teacher


def _start(pipe: FluxPipeline, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    text = train.Captions(PAIRS, pipe.tokenizer).draw(n, generator)
    return torch.randn(n, TOKENS, 64, generator=generator), text


def _export_styles(pipe: FluxPipeline, folder: Path) -> None:
    average = nn.ModuleDict(learning_parts(pipe)).state_dict()
    export_styles({"average": average, "position": [3, 6, 0]}, pipe, folder)


@pytest.fixture
def teacher(pipe: FluxPipeline, tmp_path: Path) -> Path:
    """Weights of the tiny one, as they are read: in half precision."""
    _export_styles(pipe, tmp_path / "teacher")
    return tmp_path / "teacher"


def _run(monkeypatch: pytest.MonkeyPatch, teacher: Path, out: Path, *arguments: str) -> None:
    monkeypatch.setattr(train, "read_judge", lambda folder: (PAIRS, {}))
    common = ["--teacher", str(teacher), "--out", str(out), "--batch", "2"]
    train.main([*common, *(["--committed", "none"] if "--committed" not in arguments else []), *arguments])


@torch.no_grad()
def _sampled(net: nn.ModuleDict, noise: Tensor, text: Tensor, steps: int) -> Tensor:
    """Plain Euler steps without guidance."""
    x = noise
    for high, low in pairwise(train.sigmas(steps)):
        x = x + (low - high) * predict(net, x, high.expand(len(x)), text.long(), image_positions(SIZE))
    return x


@pytest.mark.parametrize("steps", [4, 8, 16])
def test_windows_are_the_steps_of_the_students_sampler_and_at_128_pixels_of_the_teachers(
    pipe: FluxPipeline, steps: int
) -> None:
    c = pipe.scheduler.config
    mu = calculate_shift(64, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    for scheduler in (pipe.scheduler, train.student_scheduler()):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        assert torch.allclose(train.sigmas(steps), scheduler.sigmas, atol=1e-6)


def test_the_teacher_with_one_substep_draws_what_its_pipeline_draws(pipe: FluxPipeline) -> None:
    pipe.set_progress_bar_config(disable=True)
    _, teacher = _training(pipe)
    pipe.scheduler = train.student_scheduler()
    noise, _ = _start(pipe, 2)
    prompts = ["noto, red apple", "left arrow on navy"]
    call = {"height": SIZE, "width": SIZE, "output_type": "latent", "max_sequence_length": 16}
    guided = {"negative_prompt": ["", ""], "true_cfg_scale": train.GUIDANCE}
    text = pipe.tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    for steps in (4, 8):
        drawn = pipe(prompts, latents=noise, num_inference_steps=steps, **guided, **call).images
        way = teacher.way(noise, text, SIZE, windows=steps, substeps=1)
        assert torch.allclose(way[-1], drawn, atol=1e-4)
        assert torch.equal(way[0], noise)


def test_second_order_substeps_are_worth_more_than_as_many_euler_steps(pipe: FluxPipeline) -> None:
    _, teacher = _training(pipe)
    noise, text = _start(pipe, 8)
    exact = teacher.way(noise, text, SIZE, windows=4, substeps=64)[-1]
    few = teacher.way(noise, text, SIZE)[-1]
    euler = teacher.way(noise, text, SIZE, windows=train.WINDOWS * train.SUBSTEPS, substeps=1)[-1]
    assert (few - exact).norm() < 0.5 * (euler - exact).norm()


def test_held_out_captions_are_not_learned_from(pipe: FluxPipeline) -> None:
    captions = train.Captions(PAIRS, pipe.tokenizer)
    drawn = captions.draw(2000, torch.Generator().manual_seed(0))
    texts = pipe.tokenizer.batch_decode(drawn.long(), skip_special_tokens=True)
    known = {text.split(" on ")[0] for text in texts}
    assert "noto , cat face" in known
    assert "cat face" in known
    assert "flat , cat face" not in known
    assert np.mean(["," in text for text in texts]) == pytest.approx(2 / 3, abs=0.05)
    assert np.mean([" on " in text for text in texts]) == pytest.approx(0.3 * 14 / 15, abs=0.05)


def test_the_loss_is_nothing_for_the_straight_velocity_of_each_window(
    pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever knows the ways predicts the velocity from state and time alone, at the start of windows and within."""
    training, _ = _training(pipe)
    objective, seen = training.loss, []

    def knowing(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        borders, levels = objective.pools[SIZE].borders, train.sigmas(4)
        window = (t[:, None] <= levels[None, :-1] + 1e-6).sum(1) - 1
        high, low = levels[window], levels[window + 1]
        share = ((high - t) / (high - low))[:, None, None, None]
        states = torch.lerp(borders[window], borders[window + 1], share)  # of all ways of the pool, at these times
        distance = (states - x[:, None]).abs().amax((2, 3))
        assert float(distance.amin(1).max()) < 1e-4
        way, rows = distance.argmin(1), torch.arange(len(x))
        assert torch.equal(text, objective.pools[SIZE].text[way].long())
        seen.extend((high - t).tolist())
        return (borders[window + 1, way] - borders[window, way]) / (low - high)[rows, None, None]

    monkeypatch.setitem(objective.velocities, SIZE, knowing)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        assert float(objective(generator).value) < 1e-8
    assert np.mean([abs(distance) < 1e-6 for distance in seen]) == pytest.approx(train.AT_START, abs=0.1)


def test_the_oldest_ways_of_the_pool_are_replaced(pipe: FluxPipeline) -> None:
    training, _ = _training(pipe, batch=2)
    states = []
    for _ in range(2 * train.STEPS_PER_WAY + 1):
        training.step()
        states.append(training.loss.pools[SIZE].borders.clone())
    assert states[0].shape == (5, 2 * train.POOL, TOKENS, 64)
    assert torch.equal(states[0], states[train.STEPS_PER_WAY - 1])
    changed = (states[0] != states[-1]).any(-1).any(-1)
    assert changed[:, :4].all()  # two batches
    assert not changed[:, 4:].any()


def test_a_student_without_windows_is_refused() -> None:
    with pytest.raises(ConfigError, match="--windows must be at least 1, got 0"):
        train.main(["--windows", "0"])


def test_a_student_of_eight_windows_has_eight_steps_to_learn(pipe: FluxPipeline) -> None:
    _, objective = train.make_training(pipe, PAIRS, 2, Settings(), sizes=[SIZE], windows=8)
    objective(torch.Generator().manual_seed(0))
    assert len(objective.pools[SIZE].borders) == len(objective.levels) == 9


def test_times_are_exact_under_bfloat16(pipe: FluxPipeline) -> None:
    """Of 0.8633 and 0.864 bfloat16 makes one."""
    settings = Settings(bfloat16=True)
    _, objective = train.make_training(pipe, PAIRS, 2, settings, sizes=[SIZE])
    teacher, student = objective.teacher, nn.ModuleDict(learning_parts(pipe))
    noise, text = _start(pipe, 2)

    def velocity(t: float) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return predict(student, noise, torch.full((2,), t), text.long(), image_positions(SIZE))

    assert not torch.equal(velocity(0.8633), velocity(0.864))
    assert teacher.net["transformer"].dtype == torch.bfloat16
    exact = train.Teacher(student, teacher.empty).way(noise, text, SIZE)
    rounded = teacher.way(noise, text, SIZE)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.02 * exact.norm()


def test_norms_are_given_what_their_kernel_takes(pipe: FluxPipeline) -> None:
    training, _ = train.make_training(pipe, PAIRS, 2, Settings(bfloat16=True), sizes=[SIZE])
    seen: dict[str, torch.dtype] = {}
    for name, module in training.net.named_modules():
        if isinstance(module, nn.RMSNorm):
            module.register_forward_hook(lambda m, inputs, output, name=name: seen.update({name: inputs[0].dtype}))
    training.step()
    assert set(seen.values()) == {torch.float32}


def test_the_teacher_stays_as_it_was(pipe: FluxPipeline) -> None:
    training, teacher = _training(pipe)
    before = {name: value.clone() for name, value in teacher.net.state_dict().items()}
    noise, text = _start(pipe, 2)
    student = nn.ModuleDict(learning_parts(pipe))
    first = _sampled(student, noise, text, 4)
    assert torch.equal(first, _sampled(teacher.net, noise, text, 4))
    for _ in range(3):
        training.step()
    assert not torch.equal(first, _sampled(student, noise, text, 4))
    for name, value in teacher.net.state_dict().items():
        assert torch.equal(value, before[name])
    now = student.state_dict()
    still = {name for name in before if torch.equal(now[name], before[name])}
    low = {name for name, module in student.named_modules() if isinstance(module, LowRankLinear)}
    assert low
    assert {name for name in still if name.startswith("transformer.")} == {f"{name}.weight" for name in low}
    assert {name for name in before if name.startswith("text_encoder")} <= still


@pytest.mark.slow
def test_distilling_makes_four_steps_nearer_to_the_teachers_many(pipe: FluxPipeline, tmp_path: Path) -> None:
    training, teacher = _training(pipe, batch=32, rank=12)
    student = nn.ModuleDict(learning_parts(pipe))
    noise, text = _start(pipe, 32)

    def error(states: Tensor) -> float:
        return float((states - many).square().mean())

    many = teacher.way(noise, text, SIZE, substeps=16)[-1]
    own = {steps: error(teacher.way(noise, text, SIZE, windows=steps, substeps=1)[-1]) for steps in (4, 8)}
    untrained = error(_sampled(student, noise, text, 4))
    while training.steps < 300:
        training.step()
    training.net.load_state_dict(training.average)
    learned = {steps: error(_sampled(student, noise, text, steps)) for steps in (4, 8)}
    assert learned[4] < 0.6 * own[4] < own[4] < untrained
    assert learned[8] < 1.2 * learned[4]  # the windows are straight


def test_the_command_goes_on_from_its_checkpoint_and_exports(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = partial(_run, monkeypatch, teacher, tmp_path)
    run("--samples", "4", "--rank", "4")
    run("--samples", "8", "--rank", "4", "--minutes", "1", "--fall", "0.5")
    run("--export", str(tmp_path / "weights"))
    record = json.loads((tmp_path / "weights" / "training.json").read_text())
    assert (record["samples"], record["windows"]) == (8, 4)
    assert record["hours"] >= 0
    student, old = load_turbo(tmp_path / "weights", teacher), load_pipeline(teacher)
    for part in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        new, before = (getattr(one, part).state_dict() for one in (student, old))
        assert new.keys() == before.keys()
        assert all(torch.equal(new[name], before[name]) for name in before) == (part != "transformer")
    assert not [module for module in student.transformer.modules() if isinstance(module, LowRankLinear)]
    average = read_checkpoint(tmp_path)["average"]
    factors = [average[f"transformer.transformer_blocks.0.attn.to_q.{name}"].half().float() for name in ("up", "down")]
    to_q = [one.transformer.transformer_blocks[0].attn.to_q.weight for one in (student, old)]
    torch.testing.assert_close(to_q[0] - to_q[1], factors[0] @ factors[1], atol=1e-6, rtol=1e-3)
    student.scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.25, 4), mu=0.1)
    assert torch.allclose(student.scheduler.sigmas, train.sigmas(4), atol=1e-6)  # whatever the size


def test_a_run_goes_on_only_on_its_own_terms(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = partial(_run, monkeypatch, teacher, tmp_path / "run")
    run("--samples", "4", "--rank", "4", "--minutes", "9", "--fall", "0.5")
    same = ("--samples", "8", "--rank", "4", "--minutes", "9")
    with pytest.raises(ModelError, match=r"a run with --fall 0\.5, now it is not given"):
        run(*same)
    with pytest.raises(ModelError, match=r"a run with --fall 0\.5, now it is 0\.25"):
        run(*same, "--fall", "0.25")
    with pytest.raises(ModelError, match=r"a run with --windows 4, now it is 8"):
        run(*same, "--fall", "0.5", "--windows", "8")
    other = load_pipeline(teacher)
    other.text_encoder.get_input_embeddings().weight.data += 1
    _export_styles(other, tmp_path / "other")
    with pytest.raises(ModelError, match=r"a run with weights of the teacher [0-9a-f]+, now"):
        _run(monkeypatch, tmp_path / "other", tmp_path / "run", *same, "--fall", "0.5")
    with pytest.raises(ModelError, match="had a teacher of other weights"):
        _run(monkeypatch, tmp_path / "other", tmp_path / "run", "--export", str(tmp_path / "weights"))
    run(*same, "--fall", "0.5")
    assert read_checkpoint(tmp_path / "run")["position"][1] == 8


def test_without_a_checkpoint_it_goes_on_from_exported_differences(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(monkeypatch, teacher, tmp_path / "run", "--samples", "4", "--rank", "4")
    _run(monkeypatch, teacher, tmp_path / "run", "--export", str(tmp_path / "weights"))
    committed = ("--committed", str(tmp_path / "weights"))
    _run(monkeypatch, teacher, tmp_path / "on", "--samples", "4", "--rank", "4", *committed)
    before, after = (read_checkpoint(tmp_path / name) for name in ("run", "on"))
    assert after["position"] == [2, 4, 2]
    for name, value in before["average"].items():
        assert torch.equal(after["net"][name], value.half().float())
    with pytest.raises(ModelError, match="of rank 4, not 5: go on with --rank 4"):
        _run(monkeypatch, teacher, tmp_path / "another", "--samples", "4", "--rank", "5", *committed)


def test_an_exported_student_is_a_subject(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "weights"
    with pytest.raises(ModelError, match="no emoji-styles-turbo weights"):
        load_emoji_styles_turbo(weights, teacher)
    _run(monkeypatch, teacher, tmp_path, "--samples", "2", "--rank", "4")
    _run(monkeypatch, teacher, tmp_path, "--export", str(weights))
    model = load_emoji_styles_turbo(weights, teacher)
    assert model.name == "emoji-styles-turbo"
    assert type(model.pipe) is FluxPipeline
    assert model.call["num_inference_steps"] == train.WINDOWS
    assert "true_cfg_scale" not in model.call
    assert "noto, red apple" in model.prompts or "flat, red apple" in model.prompts
    with pytest.raises(ModelError, match=f"{DIFFERENCES} holds differences from other weights of emoji-styles"):
        load_emoji_styles_turbo(weights)


@pytest.mark.slow
def test_evaluation_is_of_the_student_beside_its_teacher(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("stlpips_pytorch")
    if not Judge.available(STYLES_HERE):
        pytest.skip("the judge's network is not installed")
    judge = Judge.load(STYLES_HERE)
    known = [p for p in judge.pairs if p.concept in CONCEPTS and p.style in STYLES]
    _run(monkeypatch, teacher, tmp_path, "--samples", "2", "--rank", "4")
    _run(monkeypatch, teacher, tmp_path, "--export", str(tmp_path / "weights"))
    monkeypatch.setattr(evaluate, "ARMS", (("teacher", 3), ("turbo", 3), ("turbo", 2)))
    monkeypatch.setattr(evaluate, "spread", lambda rows, count: torch.tensor([judge.pairs.index(p) for p in known[:2]]))
    result = evaluate.evaluate(tmp_path / "weights", teacher, tmp_path, 200)
    arms = result["known"]
    assert result["images"] == {"held_out": 2, "known": 2}
    assert "psnr_to_full_db" not in arms["teacher, 3 steps"]
    assert arms["turbo, 3 steps"]["psnr_to_full_db"] < 60  # nearly the same weights, without guidance
    assert arms["teacher, 3 steps"]["forwards"] == 2 * arms["turbo, 3 steps"]["forwards"] == 6
    assert json.loads((tmp_path / "evaluation.json").read_text()) == result
    assert (tmp_path / "contact_sheet.webp").stat().st_size > 1000
