"""The bench on editing and video models, with resolution methods and combinations; tiny models, random weights."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hasten_zoo.emoji_kontext import call_arguments as kontext_call
from hasten_zoo.emoji_kontext import model as kontext
from hasten_zoo.emoji_kontext.data import held_out_plans, painter
from hasten_zoo.sprites_wan import model as wan
from hasten_zoo.sprites_wan.data import all_clips
from hasten_zoo.sprites_wan.vae import SpriteVAE
from PIL import Image
from subjects import install
from test_bench import command
from torch import Tensor

from hasten import registry
from hasten.bench import measurements, subject
from hasten.bench.arms import Arm, merged
from hasten.bench.edits import at_size, edit_figures, edit_of, source_arguments, vae_unedited, with_image
from hasten.bench.labels import short_label
from hasten.bench.report import render_report
from hasten.bench.requests import caching_method, parse_request, reported
from hasten.bench.resolution_arms import PlainCost, staged_arms
from hasten.bench.result import Result, read_result
from hasten.bench.runner import BenchSettings, run_bench
from hasten.bench.sampling import call_arguments, draw_sample, plain
from hasten.bench.sheet import bench_sheet, film_strip
from hasten.bench.subject import Edit, Subject
from hasten.bench.thresholds import Trials
from hasten.bench.tune import tuning_calls
from hasten.caching.methods import FoCa
from hasten.cli import measure
from hasten.cli.common import show_result
from hasten.errors import ConfigError, UnknownNameError
from hasten.quality.metrics import over_frames, psnr, temporal_error
from hasten.resolution import DVG

STEPS = 8
# Every latent frame is kept, so that the clip can be as short as possible.
SPACE = "dvg:compress=space:budget=0.6"
DUET = f"{SPACE}+foca:interval=3:warmup=1"


def video_model() -> Subject:
    torch.manual_seed(0)
    pipe = wan.build_pipeline(SpriteVAE(encoder_width=8, decoder_width=8, head_width=8), 32, 2)
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=0.1)  # a fresh model predicts nothing
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 64, "num_frames": 5, "guidance_scale": 1.0, "max_sequence_length": wan.TEXT_TOKENS}
    return Subject("tiny-wan", pipe, [clip.caption for clip in all_clips()[:3]], call)


def edit_model() -> Subject:
    torch.manual_seed(0)
    pipe = kontext.build_pipeline(width=32)
    pipe.set_progress_bar_config(disable=True)
    plans = held_out_plans(3)
    edits = [painter().edit(plan) for plan in plans]
    call = kontext_call(32)
    return Subject("tiny-kontext", pipe, [plan.prompt for plan in plans], call, edits=edits)


@pytest.fixture(scope="module")
def video() -> Subject:
    return video_model()


@pytest.fixture(scope="module")
def editor() -> Subject:
    return edit_model()


@pytest.fixture(scope="module", autouse=True)
def without_lpips() -> Any:
    """A network for each of the frames would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurements, "_lpips", lambda: None)
        yield


def flat(value: float, *shape: int) -> Tensor:
    return torch.full(shape, value)


# --- measures


def test_psnr_under_a_mask_looks_at_nothing_else() -> None:
    image, mask = flat(0.5, 3, 8, 8), torch.zeros(8, 8, dtype=torch.bool)
    mask[:2, :4] = True
    image[:, mask] = 0.6
    assert psnr(image, flat(0.5, 3, 8, 8), mask) == pytest.approx(20, abs=1e-4)
    assert psnr(image, flat(0.5, 3, 8, 8), ~mask) == math.inf
    for bad in (mask[:4], mask.float(), torch.zeros_like(mask)):
        with pytest.raises(ValueError, match="mask"):
            psnr(image, image, bad)


def test_figures_of_a_clip_are_means_over_its_frames() -> None:
    reference = flat(0.5, 3, 3, 8, 8)
    clip = reference.clone()
    assert over_frames(psnr, clip, reference) == math.inf
    clip[0] += 0.1
    clip[1] += 0.01
    assert over_frames(psnr, clip, reference) == pytest.approx((20 + 40 + 100) / 3, abs=1e-3)
    assert over_frames(psnr, clip[0], reference[0]) == pytest.approx(20, abs=1e-4)


def test_temporal_error_sees_motion_and_not_colour() -> None:
    moving = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)) / 2
    assert temporal_error(moving, moving) == 0
    assert temporal_error(moving + 0.2, moving) == pytest.approx(0, abs=1e-6)
    assert temporal_error(moving[:1].expand_as(moving), moving) == pytest.approx(1)
    assert temporal_error(moving, moving[:1].expand_as(moving)) == math.inf


# --- reading methods


def test_labels_leave_paths_out_and_keep_what_tells_apart() -> None:
    assert short_label("dvg:budget=0.5+l2p:calibration=runs/l2p.safetensors") == "dvg, budget=0.5 + l2p"
    assert short_label("foca:searched=runs/steps.safetensors") == "foca, searched steps"
    assert short_label("foca:schedule=even") == "foca, even steps"


def test_combinations_are_read() -> None:
    found = parse_request("dvg:budget=0.4:rates=0.2/0.5/0.75:shifts=none+foca:interval=4")
    assert found.resolution == DVG(budget=0.4, rates=(0.2, 0.5, 0.75), shifts=None)
    assert found.caching == FoCa(interval=4)
    assert found.params["dvg"]["shifts"] is None  # none is a choice where it is not the default
    assert found.params["foca"]["interval"] == 4
    alone = parse_request("dvg:budget=0.4")
    assert (alone.caching, alone.params["budget"], alone.steps(50)) == (None, 0.4, 50)


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("foca+hicache", ConfigError, "one resolution method and one cache"),
        ("dvg+dvg:budget=0.4", ConfigError, "one resolution method and one cache"),
        ("dvg+foca+hicache", ConfigError, "one resolution method and one cache"),
        ("dvg+leap", ConfigError, "leap is a scheduler"),
        ("dvg+foac", UnknownNameError, "Did you mean 'foca'"),
        ("dvg:bugdet=0.5", UnknownNameError, "Did you mean 'budget'"),
    ],
)
def test_combinations_that_cannot_be_are_refused(text: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        parse_request(text)


def test_a_resolution_method_is_no_cache() -> None:
    with pytest.raises(ConfigError, match="dvg is no caching method"):
        caching_method("dvg")


def test_equal_arms_are_measured_once_and_shown_in_every_section() -> None:
    arm = Arm("euler-6", "euler", "plain", {}, 6, 6)
    beside = Arm("euler-6", "euler", "plain", {}, 6, 6, note="as many FLOPs as x", groups=(12,))
    (one,) = merged([arm, beside, beside])
    assert (one.groups, one.note) == ((6, 12), "as many FLOPs as x")


# --- resolution methods


@pytest.fixture
def short() -> Any:
    """A resolution method with a preset that has a number of evaluations of its own, known for the length of a test."""

    @registry.method("short", kind="resolution", paper="none")
    @dataclass(frozen=True, kw_only=True)
    class Short(DVG):
        """Six steps."""

        preset: Literal["6", "7"] = "6"
        compress: Any = "space"

        @property
        def num_inference_steps(self) -> int:
            return int(self.preset)

    # The class is local, and so are the names of its annotations.
    Short.__annotations__ = {"preset": Literal["6", "7"], "compress": Any}
    yield Short
    del registry._METHODS["short"]


def test_a_methods_own_number_of_evaluations_is_used(video: Subject, short: type) -> None:
    trials = Trials(video, video.prompts[:1], 0, STEPS, {})
    *_, arm = staged_arms([parse_request("short:preset=7:budget=0.545")], trials)
    assert (arm.error, arm.steps, arm.computed_steps, arm.staged) == ("", 7, 7, True)


def test_plain_samplers_stand_beside_at_equal_evaluations_and_at_equal_operations(video: Subject) -> None:
    trials = Trials(video, video.prompts[:1], 0, STEPS, {})
    arms = staged_arms([parse_request(text) for text in (DUET, "dvg:budget=0.01")], trials)
    duet = next(arm for arm in arms if arm.method == DUET)
    assert duet.computed_steps < STEPS  # the cache skips some
    equal = next(arm for arm in arms if arm.note)
    assert (equal.method, equal.groups, equal.note) == ("euler", (duet.computed_steps,), f"as many FLOPs as {DUET}")
    assert equal.steps < duet.computed_steps  # the steps themselves are cheaper, too
    assert {arm.method for arm in arms if arm.steps == duet.computed_steps} == {"euler", "unipc"}
    (failed,) = [arm for arm in arms if arm.error]
    assert "budget=0.01" in failed.error
    assert "\n" not in failed.error


def test_plain_cost_is_linear_in_the_steps(video: Subject) -> None:
    trials = Trials(video, video.prompts[:1], 0, STEPS, {})
    cost = PlainCost(trials)
    for steps in (1, 5):
        flops, layer_calls = trials.cost(plain, steps, "x")
        assert cost.steps_for(flops) == steps
        assert cost.computed(layer_calls) == steps
    assert cost.steps_for(1) == 1


@pytest.fixture(scope="module")
def clips(video: Subject, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    out = tmp_path_factory.mktemp("clips") / "out.json"
    settings = BenchSettings(
        methods=("foca", SPACE, DUET, "dvg:budget=0.01"), computed_steps=(5,), prompts=1, steps=STEPS
    )
    content = run_bench(video, settings, out)
    written = json.loads(out.read_text())
    assert written.pop("digest")
    assert written == json.loads(json.dumps(asdict(content)))
    assert read_result(out).rows[0] == content.rows[0]
    return content, out


def test_a_clip_has_rows_with_temporal_errors(clips: tuple[Result, Path]) -> None:
    content, _ = clips
    assert content.settings.frames == 5
    for row in content.rows:
        if not row.failed:
            assert row.temporal_error > 0
            assert row.psnr_unedited is None
            assert row.per_prompt[0]["temporal_error"] == row.temporal_error
            assert row.latency_share == pytest.approx(row.latency_ratio / row.flops_ratio, abs=1e-3)
    assert content.baseline.temporal_error == 0


def test_staged_rows_say_what_they_save_and_failures_are_rows(clips: tuple[Result, Path]) -> None:
    content, _ = clips
    found = {row.method: row for row in content.rows if row.library == "hasten"}
    alone, duet = found[SPACE], found[DUET]
    assert (alone.steps, alone.computed_steps, alone.staged) == (STEPS, STEPS, True)
    assert alone.flops_ratio > 1.2
    assert duet.flops_ratio > alone.flops_ratio
    assert (duet.budget, duet.cache_bytes > 0) == (round(duet.computed_steps), True)
    assert alone.error_per_step is None  # its noise levels are not the plain sampler's
    assert "density" in alone.per_prompt[0]["plan"]
    assert [figures["flops"] for figures in alone.per_prompt] == [alone.flops]
    assert "flops" not in found["foca"].per_prompt[0]
    assert set(duet.params) == {"dvg", "foca"}
    assert "no plan" in found["dvg:budget=0.01"].failed
    assert found["dvg:budget=0.01"].latency_share is None
    assert not found["foca"].staged
    assert found["foca"].steps_ratio == pytest.approx(STEPS / 5, abs=1e-3)


def test_an_equal_cost_row_costs_as_much(clips: tuple[Result, Path]) -> None:
    content, _ = clips
    plain_rows = [row for row in content.rows if row.library == "plain"]
    for method in (SPACE, DUET):
        (row,) = [row for row in content.rows if row.method == method]
        (equal,) = [p for p in plain_rows if f"as many FLOPs as {method}" in p.note.split("; ")]
        assert set(row.groups) <= set(equal.groups)
        per_step = content.baseline.flops / STEPS
        assert abs(equal.flops - row.flops) < 0.6 * per_step


def test_clips_are_shown_as_a_few_frames_in_a_row(clips: tuple[Result, Path]) -> None:
    content, out = clips
    with Image.open(out.parent / content.baseline.images[0]) as strip:
        assert strip.size == (5 * 64, 64)
    assert film_strip(torch.rand(17, 3, 4, 4)).size == (20, 4)
    assert film_strip(torch.rand(2, 3, 4, 4)).size == (8, 4)
    shown = [row for row in content.rows if STEPS in row.groups and not row.failed]
    sheet = bench_sheet(content, out.parent, STEPS)
    assert sheet.width > (1 + len(shown)) * 5 * 64


def test_the_report_and_the_table_show_them(clips: tuple[Result, Path], capsys: Any) -> None:
    content, out = clips
    page = render_report(out, out.with_suffix(".html")).read_text()
    for words in ("5 frames", "temporal", "share", "as many FLOPs as", "Quality against cost", "no plan"):
        assert words in page
    measures, fields = (
        ("PSNR, dB (more is better)", "FLIP (less is better)"),
        ("number of computed steps", "FLOPs ratio"),
    )
    errors = [f"error of the latents over the steps, {count} computed steps" for count in (STEPS, 5)]
    charts = [f"{measure} against {field}" for field in fields for measure in measures] + errors
    assert re.findall('<svg role="img" aria-label="([^"]*)"', page) == charts
    assert "unedited dB" not in page
    show_result(content)
    text = capsys.readouterr().out
    assert "temporal" in text
    assert "share" in text
    assert "Not measured: dvg" in text


# --- editing


def test_an_edit_is_averaged_to_the_size_of_the_call() -> None:
    source, mask = torch.rand(3, 64, 64), torch.zeros(64, 64, dtype=torch.bool)
    mask[3, 5] = True
    edit = Edit("x", source, 1 - source, mask, "local")
    assert at_size(edit, 64, 64) is edit
    small = at_size(edit, 32, 32)
    assert torch.allclose(small.source[:, 0, 0], source[:, :2, :2].mean((1, 2)))
    assert torch.allclose(small.target, 1 - small.source, atol=1e-6)
    assert small.mask.nonzero().tolist() == [[1, 2]]


def test_sources_go_with_their_prompts(editor: Subject) -> None:
    arguments = source_arguments(editor, editor.prompts[:2], {"height": 32, "width": 32})
    assert arguments["image"].shape == (2, 3, 32, 32)
    assert torch.equal(arguments["image"][1], at_size(editor.edits[1], 32, 32).source)
    assert source_arguments(editor, editor.prompts[:1], {})["image"].shape == (1, 3, 64, 64)
    calls = tuning_calls(editor, editor.prompts, 0, STEPS, {}, batch=2)
    assert [call["image"].shape[0] for call in calls] == [2, 1]
    with pytest.raises(ConfigError, match="there is none for the prompt 'eat the apple'"):
        edit_of(editor, "eat the apple")


def test_a_call_says_the_size_and_the_guidance_in_the_pipelines_words(editor: Subject, video: Subject) -> None:
    arguments = call_arguments(editor, editor.prompts[:1], {"height": 64, "width": 48})
    assert arguments["max_area"] == 64 * 48
    sample = draw_sample(editor, plain, 1, editor.prompts[0], 0, {"height": 64, "width": 64})
    assert sample.image.shape == (3, 64, 64)
    guided = call_arguments(video, video.prompts[:1], {"true_cfg_scale": 3.0, "negative_prompt": ""})
    assert guided["guidance_scale"] == 3.0
    assert "true_cfg_scale" not in guided


def test_edit_figures_are_exact_for_a_perfect_and_for_an_idle_editor(editor: Subject) -> None:
    local = next(edit for edit in editor.edits if edit.kind == "local")
    perfect = edit_figures(editor, local.prompt, local.target)
    assert perfect == {"psnr_unedited": math.inf, "psnr_edited": math.inf}
    idle = edit_figures(editor, local.prompt, local.source)
    assert idle["psnr_unedited"] == math.inf
    assert idle["psnr_edited"] < 30
    everywhere = Edit("all", local.source, local.target, torch.ones(64, 64, dtype=torch.bool), "global")
    whole = Subject("x", editor.pipe, ["all"], edits=[everywhere])
    assert edit_figures(whole, "all", local.target) == {"psnr_unedited": None, "psnr_edited": math.inf}
    assert edit_figures(Subject("x", None, []), "all", local.target) == {}


def test_the_vaes_own_loss_is_measured(editor: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    local = [edit.prompt for edit in editor.edits if edit.kind == "local"][:1]
    assert vae_unedited(editor, local, (32, 32)) == [100.0]  # these latents are pixels
    decode = editor.pipe.vae.decode
    monkeypatch.setattr(editor.pipe.vae, "decode", lambda z, **kw: tuple(x + 0.02 for x in decode(z, **kw)))
    (lossy,) = vae_unedited(editor, local, (32, 32))
    assert 39.9 < lossy < 45  # 0.01 of the range, less where values are cut at 1


def test_an_editing_bench_reports_what_was_kept_and_what_was_done(editor: Subject, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    settings = BenchSettings(methods=("foca", "dvg"), computed_steps=(5,), prompts=2, steps=STEPS)
    content = run_bench(editor, settings, out)
    assert content.baseline.psnr_unedited_vae == 100.0
    foca = next(row for row in content.rows if row.method == "foca")
    for figures in (content.baseline, foca):
        assert 0 < figures.psnr_unedited < 40
        assert 0 < figures.psnr_edited < 40
    assert (foca.temporal_error, foca.per_prompt[1]["prompt"]) == (None, editor.prompts[1])
    (dvg,) = [row for row in content.rows if row.method == "dvg"]
    assert "FluxKontextPipeline cannot run DVG" in dvg.failed  # and the rest was measured
    page = render_report(out, tmp_path / "out.html").read_text()
    for words in ("unedited dB", "edited dB", "after the way through the VAE alone: 100.0 dB"):
        assert words in page


def test_an_own_image_takes_the_place_of_the_models(editor: Subject, tmp_path: Path) -> None:
    file = tmp_path / "own.png"
    Image.new("RGB", (32, 32), "orange").save(file)
    own = with_image(editor, file)
    image = call_arguments(own, ["make it blue"], {})["image"]
    assert image.size == (32, 32)
    settings = BenchSettings(
        methods=("foca",), computed_steps=(4,), prompts=1, prompt_list=("make it blue",), steps=5, image=file
    )
    content = run_bench(editor, settings, tmp_path / "out.json")
    assert content.settings.image == "own.png"
    assert content.baseline.psnr_unedited is None
    assert content.rows[0].psnr > 0
    (tmp_path / "no.png").write_text("no image")
    with pytest.raises(ConfigError, match="cannot be read as an image"):
        with_image(editor, tmp_path / "no.png")
    (tmp_path / "no.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")  # a few kilobytes
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    for name in ("no.eps", "bomb.png", "large.png"):
        with pytest.raises(ConfigError, match="cannot be read as an image"):
            with_image(editor, tmp_path / name)
    Image.new("RGB", (2000, 1)).save(tmp_path / "thin.png")
    with pytest.raises(ConfigError, match="has 2000x1 pixels; give one of at least"):
        with_image(editor, tmp_path / "thin.png")


# --- the command


@pytest.mark.slow
def test_the_command_takes_combinations_for_video_models(
    video: Subject, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    install(monkeypatch, subject.PIPELINES, "tiny-wan", lambda: video)
    out = tmp_path / "out.json"
    arguments = ("--methods", DUET, "--prompts", 1, "--steps", STEPS, "--guidance", 2, "--json", out)
    code, text, _ = command(monkeypatch, capsys, "bench", "--model", "tiny-wan", *arguments)
    assert code == 0
    assert "foca, interval=3" in " ".join(text.split())
    content = json.loads(out.read_text())
    (row,) = [row for row in content["rows"] if row["library"] == "hasten"]
    assert (row["failed"], content["settings"]["guidance"]) == ("", 2)


@pytest.mark.slow
def test_the_demo_runs_on_another_model(
    video: Subject, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    small = Subject("sprites-wan", video.pipe, video.prompts, video.call)
    install(monkeypatch, subject.PIPELINES, "sprites-wan", lambda: small)
    monkeypatch.setitem(measure.DEMOS, "sprites-wan", ("foca", "dvg"))
    arguments = ("--prompts", 1, "--computed-steps", 5, "--steps", STEPS, "--out", tmp_path)
    code, text, _ = command(monkeypatch, capsys, "demo", "--model", "sprites-wan", *arguments)
    assert code == 0
    assert {path.name for path in tmp_path.rglob("contact*.png")} >= {"contact_sheet_5.png"}
    assert "report" in text


def test_a_image_for_a_text_model_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    file = tmp_path / "own.png"
    Image.new("RGB", (8, 8)).save(file)
    code, out, error = command(monkeypatch, capsys, "bench", "--image", file, "--json", tmp_path / "out.json")
    assert code == 2
    assert "takes no source image" in " ".join((out + error).split())
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("info", [i for i in registry.methods() if not i.needs_calibration], ids=lambda info: info.name)
def test_reported_parameters_are_plain_data(info: registry.MethodInfo) -> None:
    """They are written when everything has been measured, which is too late to find out."""
    assert isinstance(json.loads(json.dumps(reported(registry.build(info.name)))), dict)
