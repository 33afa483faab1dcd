"""A certified setting from the tolerance to the call: made, found, refused outside its range, audited; single calls."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import logging
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig
from pipelines import draw, make_pipe

import hasten
from hasten.bench.certify import run_certify
from hasten.bench.certify_settings import CertifySettings
from hasten.bench.subject import Subject
from hasten.cli import main
from hasten.errors import CertificateError, ConfigError, HastenError, ModelError, UnknownNameError
from hasten.io import write_record
from hasten.pipeline.hooks import hooks_on
from hasten.quality.certificate import KIND, Certificate, certificates
from hasten.quality.configuration import Configuration, schema
from hasten.quality.tolerance import TIERS, Tolerance

STEPS = 12
CALL = {"height": 32, "width": 32, "max_sequence_length": 8}
PROMPTS = [f"{colour} {thing}" for colour in ("red", "blue", "green") for thing in ("apple", "car", "house", "cat")]
LOOSE = Tolerance(min_psnr=15, share=0.6, confidence=0.6)


def subject_of(pipe):
    return Subject("tiny", pipe, PROMPTS, dict(CALL))


def settings(**changes):
    given = {
        "quality": "high", "tolerance": LOOSE, "methods": ("taylorseer:schedule=even",), "computed_steps": (9, 6, 4),
        "prompts": 8, "screen": 2, "steps": STEPS,
    } | changes  # fmt: skip
    return CertifySettings(**given)


@pytest.fixture
def own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("HASTEN_CERTIFICATES", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture(scope="module")
def certified(tmp_path_factory):
    """A certificate's file."""
    folder = tmp_path_factory.mktemp("certified")
    return run_certify(subject_of(make_pipe()), settings(), folder / "high.json")[1]


# --- making one


def test_the_cheapest_setting_that_passes_is_kept_with_its_evidence(certified):
    made = Certificate.load(certified)
    tried = made.evidence.tried
    assert [one.flops_ratio for one in tried] == sorted(one.flops_ratio for one in tried)
    passed = [one for one in tried if one.passed]
    assert made.flops_ratio == max(one.flops_ratio for one in passed)
    assert made.computed_steps == passed[-1].computed_steps
    assert made.evidence.requests == 8
    assert made.evidence.kept >= 6
    assert made.evidence.bound["share"] >= LOOSE.share
    assert made.conditions.steps == len(made.conditions.timesteps) == STEPS
    assert (made.conditions.height, made.conditions.width) == (32, 32)
    assert made.conditions.guidance["true_cfg_scale"] == (1.0, 1.0)
    assert made.environment["hasten"] == hasten.__version__
    assert "of 12 steps computed" in str(made)
    assert not list(certified.parent.glob(".certify*"))


def test_no_setting_that_fails_is_certified(tmp_path):
    strict = replace(LOOSE, min_psnr=90.0)
    with pytest.raises(CertificateError, match=r"no setting keeps PSNR >= 90.*nearest.*computed steps"):
        run_certify(subject_of(make_pipe()), settings(tolerance=strict), tmp_path / "high.json")
    assert not (tmp_path / "high.json").exists()


def test_a_run_that_was_cut_short_goes_on_with_what_was_drawn(tmp_path, certified):
    pipe = make_pipe()
    calls = []
    plain = type(pipe).__call__

    class Counted(type(pipe)):
        @functools.wraps(plain)
        def __call__(self, *args, **kwargs):
            calls.append(1)
            return plain(self, *args, **kwargs)

    pipe.__class__ = Counted

    def stop(label, done, total):
        if label.startswith("testing") and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        run_certify(subject_of(pipe), settings(), tmp_path / "high.json", stop)
    before = len(calls)
    again, _ = run_certify(subject_of(pipe), settings(), tmp_path / "high.json")
    whole = Certificate.load(certified)
    assert again.evidence == whole.evidence
    # Observed once in each half; every image, and every cost, once: 2 requests screen 3 settings, 8 test some of them.
    drawn = sum(one.requests for one in again.evidence.tried) + 8 + 2 * (3 + 1) + (3 + 1)
    assert before < len(calls) == 2 + drawn


@pytest.mark.parametrize(("changes", "message"), [
    ({"prompts": 1}, "give --prompts 2 or more"),
    ({"prompts": 11}, "more than the 12 different prompts"),
    ({"computed_steps": (13,)}, "between 1 and the 12 steps"),
    ({"methods": ("dvg",)}, "caching methods and leap"),
    ({"procedure": "all"}, "--procedure must be sequence or holm"),
    ({"guidance": (5.0, 2.0)}, "--guidance must be"),
    ({"quality": "../x"}, "--quality '../x': a certificate's name has"),
    ({"quality": "exact"}, "--quality exact is another thing"),
])  # fmt: skip
def test_what_cannot_be_shown_is_refused_before_anything_is_drawn(changes, message, tmp_path):
    pipe = make_pipe()
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("something was drawn"))
    with pytest.raises(ConfigError, match=message):
        run_certify(subject_of(pipe), settings(**changes), tmp_path / "high.json")


def test_prompts_that_are_too_few_for_holm_are_said_before_they_are_drawn(tmp_path):
    """Two show the share of one setting; the first of three to pass has to pass at a third of the level."""
    drawn = []
    with pytest.raises(
        ConfigError, match=r"of any of \d settings by --procedure holm.*give --prompts \d or more"
    ) as said:
        run_certify(
            subject_of(make_pipe()),
            settings(procedure="holm", prompts=2),
            tmp_path / "high.json",
            lambda label, done, total: drawn.append(label),
        )
    assert not [label for label in drawn if label.startswith("testing")]
    fewest = int(re.search(r"--prompts (\d)", str(said.value)).group(1))
    run_certify(subject_of(make_pipe()), settings(procedure="holm", prompts=fewest), tmp_path / "high.json")


def test_a_range_of_guidance_is_drawn_from_and_kept(tmp_path):
    scales = []
    pipe = make_pipe()
    plain = type(pipe).__call__

    class Seen(type(pipe)):
        @functools.wraps(plain)
        def __call__(self, *args, **kwargs):
            scales.append(kwargs.get("true_cfg_scale"))
            return plain(self, *args, **kwargs)

    pipe.__class__ = Seen
    made, _ = run_certify(subject_of(pipe), settings(guidance=(2.0, 4.0), computed_steps=(6,)), tmp_path / "high.json")
    assert made.conditions.guidance["true_cfg_scale"] == (2.0, 4.0)
    assert len(set(scales)) > 8
    assert all(2 <= scale <= 4 for scale in scales if scale is not None)


# --- using it


def test_a_tier_is_found_by_the_model_and_computes_what_is_certified(own_store):
    pipe = make_pipe()
    made, path = run_certify(subject_of(pipe), settings())
    assert path.is_relative_to(own_store)
    assert [one.quality for one in certificates()] == ["high"]
    with hasten.accelerate(pipe, quality="high") as run:
        draw(pipe, steps=STEPS)
        assert run.summary().computed_steps == made.computed_steps
    with pytest.raises(CertificateError, match=r"'draft' is not certified.*hasten certify --model .* --quality draft"):
        hasten.accelerate(pipe, quality="draft")
    with pytest.raises(UnknownNameError, match="unknown quality 'hihg'"):
        hasten.accelerate(pipe, quality="hihg")
    assert not hooks_on(pipe.transformer)


OUTSIDE = {
    "steps": ({"steps": 10}, r"certified for 12 steps, this call has 10.*--steps 10"),
    "height": ({"height": 64}, r"certified for height 32, this call has 64.*--height 64"),
    "width": ({"width": 64}, r"certified for width 32, this call has 64.*--width 64"),
    "true guidance": (
        {"true_cfg_scale": 3.0, "negative_prompt": "cat"},
        r"certified for true_cfg_scale 1, this call has 3.*--guidance 3",
    ),
    "guidance": (
        {"guidance_scale": 1.5},
        r"certified for guidance_scale 3\.5, this call has 1\.5.*guidance_scale=1\.5",
    ),
}
MANNERS = {
    "spacing": ({"sigmas": [1 - (i / STEPS) ** 2 for i in range(STEPS)]}, "certified at other timesteps; leave sigmas"),
    "strength of adapters": (
        {"joint_attention_kwargs": {"scale": 0.5}},
        r"strength 1, this call has 0\.5; leave scale out",
    ),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_a_call_outside_of_the_range_is_refused_and_the_next_one_is_not(case, certified):
    arguments, message = OUTSIDE[case]
    pipe = make_pipe()
    with hasten.accelerate(pipe, quality=str(certified)):
        inside = draw(pipe, steps=STEPS)
        with pytest.raises(CertificateError, match=message):
            draw(pipe, **{"steps": STEPS, **arguments})
        assert torch.equal(draw(pipe, steps=STEPS), inside)


def printed(error, monkeypatch, folder, pipe):
    """What the command that a refusal prints would certify, as the command line reads it."""
    found, command = [], re.search(r"hasten certify [^()]*", str(error)).group().split()
    (folder / "prompts.txt").write_text("".join(f"{prompt} {i}\n" for i in range(9) for prompt in PROMPTS))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr("hasten.cli.certify.opened", lambda name, device, dtype: found.append((name, dtype)))
    monkeypatch.setattr("hasten.cli.certify.certified", lambda model, settings, out: found.append(settings))
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 0
    assert found[0] == ("tiny", str(pipe.transformer.dtype).removeprefix("torch."))
    return found[1]


@pytest.mark.parametrize("case", OUTSIDE)
def test_the_command_that_a_refusal_prints_certifies_that_call(case, certified, monkeypatch, tmp_path):
    arguments, _ = OUTSIDE[case]
    pipe = subject_of(make_pipe()).pipe
    call = {"steps": STEPS, **arguments}
    with hasten.accelerate(pipe, quality=str(certified)), pytest.raises(CertificateError) as refused:
        draw(pipe, **call)
    asked = printed(refused.value, monkeypatch, tmp_path, pipe)
    assert (asked.quality, asked.steps) == ("high", call["steps"])
    assert asked.tolerance == replace(TIERS["high"], share=LOOSE.share, confidence=LOOSE.confidence)
    quick = replace(
        asked, tolerance=LOOSE, methods=("taylorseer:schedule=even",), computed_steps=(6,), prompts=2, screen=1,
        prompt_list=(), call=asked.call | {"max_sequence_length": 8},
    )  # fmt: skip
    _, file = run_certify(subject_of(pipe), quick, tmp_path / "high.json")
    with hasten.accelerate(pipe, quality=str(file)) as run:
        draw(pipe, **call)
        assert run.summary().computed_steps == 6


@pytest.mark.parametrize("case", MANNERS)
def test_what_cannot_be_certified_says_what_to_leave(case, certified):
    arguments, message = MANNERS[case]
    pipe = make_pipe()
    with (
        hasten.accelerate(pipe, quality=str(certified)),
        pytest.raises(CertificateError, match=message) as refused,
    ):
        draw(pipe, steps=STEPS, **arguments)
    assert "hasten certify --model" not in str(refused.value)


@pytest.mark.parametrize("kind", ["cpu", "xpu", "mps"])
def test_autocast_is_refused(certified, kind):
    pipe, before = make_pipe(), torch.is_autocast_enabled(kind)
    torch.set_autocast_enabled(kind, True)  # torch.autocast does so only where there is such a device
    try:
        with (
            hasten.accelerate(pipe, quality=str(certified)),
            pytest.raises(CertificateError, match=r"this call computes in b?float16; leave torch\.autocast"),
        ):
            draw(pipe, steps=STEPS)
    finally:
        torch.set_autocast_enabled(kind, before)


def test_the_command_for_bounds_of_ones_own_has_them(own_store, certified, monkeypatch, tmp_path):
    mine = Tolerance(max_lpips=0.2, min_psnr=15, share=None, confidence=0.8)
    made = Certificate.load(certified)
    figures = replace(made.evidence, metrics={"lpips": {"median": 0.1}, "psnr": {"median": 20.0}})
    file = replace(made, quality="portraits", tolerance=mine, evidence=figures).save(tmp_path / "mine.json")
    pipe = subject_of(make_pipe()).pipe
    with hasten.accelerate(pipe, quality=str(file)), pytest.raises(CertificateError) as refused:
        draw(pipe, steps=4)
    asked = printed(refused.value, monkeypatch, tmp_path, pipe)
    assert (asked.quality, asked.tolerance, asked.counts) == ("portraits", mine, (3,))


def test_bounds_that_nothing_was_measured_of_are_no_certificate(certified, tmp_path):
    made = Certificate.load(certified)
    content = {**made.content, "tolerance": {**made.content["tolerance"], "min_ssim": 0.9}}
    file = write_record(tmp_path / "forged.json", KIND, content)
    with pytest.raises(CertificateError, match=r"it bounds ssim, of which its evidence has no figures.*hasten certify"):
        Certificate.load(file)


@pytest.mark.parametrize("arguments", [
    {"guidance_scale": np.float32(1.5)},
    {"guidance_scale": torch.tensor(1.5)},
    {"height": np.int64(64)},
    {"steps": np.int64(10)},
    {"true_cfg_scale": np.float32(3), "negative_prompt": "cat"},
])  # fmt: skip
def test_a_number_counts_whatever_its_type(arguments, certified):
    pipe = make_pipe()
    with (
        hasten.accelerate(pipe, quality=str(certified)),
        pytest.raises(CertificateError, match=f"certified for ({next(iter(arguments))}|12 steps).*, this call has"),
    ):
        draw(pipe, **{"steps": STEPS, **arguments})


def test_guidance_without_a_negative_prompt_is_none(certified):
    pipe = make_pipe()
    with hasten.accelerate(pipe, quality=str(certified)):
        draw(pipe, steps=STEPS, true_cfg_scale=3.0)


def with_other_scheduler(pipe):
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()


def with_other_shift(pipe):
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, base_shift=0.3)


def with_other_weights(pipe):
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.mul_(1.5)


def with_other_depth(pipe):
    del pipe.transformer.single_transformer_blocks[-1]


def with_other_precision(pipe):
    pipe.transformer.to(torch.bfloat16)


def with_another_matrix(pipe):
    with torch.no_grad():
        pipe.transformer.transformer_blocks[1].ff.net[2].weight.mul_(1.01)


def with_fused_weights(pipe):
    pipe.transformer.single_transformer_blocks[0].attn.to_q.weight.data += 1e-3  # as LoRA is fused


def with_adapters(pipe):
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))


def with_other_class(pipe):
    pipe.transformer.__class__ = type("OtherTransformer", (type(pipe.transformer),), {})


OTHERS = {
    with_other_scheduler: "certified with FlowMatchEulerDiscreteScheduler, this pipeline has FlowMatchHeun",
    with_other_shift: "certified with base_shift=.* here it is 0.3",
    with_other_weights: "certified for other weights",
    with_other_depth: "of another configuration",
    with_other_precision: "certified for weights in float32, these are in bfloat16",
    with_another_matrix: "certified for other weights",
    with_fused_weights: "certified for other weights",
    with_adapters: "adapters such as LoRA",
    with_other_class: "certified for FluxTransformer2DModel, this is OtherTransformer",
}


@pytest.mark.parametrize("change", OTHERS)
def test_another_model_or_scheduler_is_refused(change, certified):
    pipe = make_pipe()
    change(pipe)
    with pytest.raises(CertificateError, match=OTHERS[change]):
        hasten.accelerate(pipe, quality=str(certified))
    assert not hooks_on(pipe.transformer)


def inpaints(pipe):
    """A pipeline that shares all its parts, and keeps what a mask leaves at every step."""
    other = diffusers.FluxInpaintPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    return other


def test_another_kind_of_pipeline_is_refused_whatever_it_shares(certified):
    pipe = make_pipe()
    other = inpaints(pipe)
    message = r"certified for FluxPipeline, this is FluxInpaintPipeline.*draws from prompts alone"
    with pytest.raises(CertificateError, match=message):
        hasten.accelerate(other, quality=str(certified))
    call = {"strength": 1.0, "guidance_scale": 3.5, "num_inference_steps": STEPS, "max_sequence_length": 8}
    image, mask = torch.zeros(1, 3, 32, 32), torch.ones(1, 1, 32, 32)
    with hasten.accelerate(pipe, quality=str(certified)):
        draw(pipe, steps=STEPS)
        with pytest.raises(CertificateError, match=message):
            other("cat", image=image, mask_image=mask, height=32, width=32, **call)


def test_a_pipeline_of_ones_own_is_that_which_it_is_derived_from(certified):
    pipe = make_pipe()
    pipe.__class__ = type("Own", (type(pipe),), {})
    with hasten.accelerate(pipe, quality=str(certified)):
        draw(pipe, steps=STEPS)


LATER = [with_other_shift, with_other_precision, with_another_matrix, with_fused_weights, with_adapters]


@pytest.mark.parametrize("change", LATER)
def test_what_changes_after_the_first_call_is_refused_in_the_next(change, certified):
    pipe = make_pipe()
    with hasten.accelerate(pipe, quality=str(certified)) as run:
        draw(pipe, steps=STEPS)
        change(pipe)
        with pytest.raises(CertificateError, match=rf"{OTHERS[change]}.*pipe.save_pretrained\('my-model'\)"):
            draw(pipe, steps=STEPS)
        with pytest.raises(CertificateError, match=OTHERS[change]), run.using(quality=str(certified)) as own:
            draw(own, steps=STEPS)
        if change is not with_other_precision:  # with whose text encoders this one cannot be called
            with run.using(quality="exact") as own:
                draw(own, steps=2)


def test_weights_in_another_precision_are_certified_under_the_same_name(certified):
    pipe = make_pipe()
    Subject(Certificate.load(certified).model, pipe, PROMPTS)
    with_other_precision(pipe)
    with pytest.raises(CertificateError, match=r"Certify it: hasten certify --model tiny --dtype bfloat16 --quality"):
        hasten.accelerate(pipe, quality=str(certified))


def test_quality_decides_alone_and_for_pipelines_alone(certified):
    pipe = make_pipe()
    with pytest.raises(ConfigError, match="leave foca, interval out"):
        hasten.accelerate(pipe, "foca", interval=3, quality=str(certified))
    with pytest.raises(ConfigError, match="accelerate the pipeline itself"):
        hasten.accelerate(pipe.transformer, quality=str(certified))
    with pytest.raises(ConfigError, match="audit checks the tolerance of a quality"):
        hasten.accelerate(pipe, "foca", audit=0.1)
    with pytest.raises(ConfigError, match="quality exact has none"):
        hasten.accelerate(pipe, quality="exact", audit=0.1)


def test_two_certificates_for_one_model_are_named(own_store, certified):
    pipe, made = make_pipe(), Certificate.load(certified)
    made.save(own_store / "a.json")
    replace(made, conditions=replace(made.conditions, steps=11)).save(own_store / "b.json")
    with pytest.raises(CertificateError, match=r"2 certificates.*--steps 11.*give the path of one"):
        hasten.accelerate(pipe, quality="high")


def test_what_a_distribution_brings_is_found_and_this_machines_own_takes_precedence(
    own_store, certified, tmp_path, monkeypatch
):
    pipe, made, brought = make_pipe(), Certificate.load(certified), tmp_path / "brought"
    made.save(brought / "high.json")
    entry = SimpleNamespace(load=lambda: lambda: brought)
    monkeypatch.setattr(
        "hasten.quality.certificate.entry_points", lambda group: [entry] if group == "hasten.certificates" else []
    )
    with hasten.accelerate(pipe, quality="high") as run:
        assert run.describe()["method"] == made.setting
    replace(made, setting=made.setting.replace("taylorseer", "foca")).save(own_store / "high.json")
    with hasten.accelerate(pipe, quality="high") as run:
        assert run.describe()["method"].startswith("foca")
    replace(made, conditions=replace(made.conditions, scheduler="DDIMScheduler")).save(own_store / "high.json")
    with hasten.accelerate(pipe, quality="high") as run:  # that one is for another pipeline
        assert run.describe()["method"] == made.setting


def test_what_a_certification_leaves_behind_is_no_certificate_and_goes_with_the_next(own_store, caplog):
    pipe = make_pipe()

    def stop(label, done, total):
        if label.startswith("testing") and done == 1:
            raise KeyboardInterrupt

    for changes in ({}, {"seed": 7}, {"quality": "draft"}):
        with pytest.raises(KeyboardInterrupt):
            run_certify(subject_of(pipe), settings(**changes), progress=stop)
    left = {path.name[:14] for path in own_store.rglob(".certify-*")}
    assert left == {".certify-high-", ".certify-draft"}
    assert len(list(own_store.rglob(".certify-*"))) == 2  # of one certificate only the latest
    assert certificates() == []
    with pytest.raises(CertificateError, match="'high' is not certified"):
        hasten.accelerate(pipe, quality="high")
    assert "certify" not in caplog.text
    run_certify(subject_of(pipe), settings(seed=7, computed_steps=(6,)))
    assert [path.name[:14] for path in own_store.rglob(".certify-*")] == [".certify-draft"]


@pytest.mark.parametrize("damage", ["digest", "text", "gone"])
def test_a_damaged_certificate_is_refused_by_name_and_left_out_of_the_store(damage, certified, own_store, caplog):
    own_store.mkdir()
    file = own_store / "high.json"
    content = json.loads(certified.read_text())
    content["content"]["computed_steps"] = 3
    if damage != "gone":
        file.write_text(json.dumps(content) if damage == "digest" else "{")
    with pytest.raises(CertificateError, match=r"high\.json.*hasten certify"):
        hasten.accelerate(make_pipe(), quality=str(file))
    assert certificates() == []
    assert (damage == "gone") or "high.json" in caplog.text


# --- LEAP as the setting


@pytest.fixture(scope="module")
def solved(tmp_path_factory, emoji):
    """A certificate whose setting is a scheduler, of the trained model."""
    folder = tmp_path_factory.mktemp("solved")
    loose = Tolerance(min_psnr=20, share=0.5, confidence=0.6)
    given = settings(
        tolerance=loose, methods=("leap",), computed_steps=(5,), prompts=2, screen=1, steps=50, call={"height": 64}
    )
    return run_certify(emoji, given, folder / "high.json")[1]


def test_certificates_of_one_fit_share_a_folder(emoji, solved):
    loose = Tolerance(min_psnr=10, share=0.5, confidence=0.6)
    given = settings(
        quality="draft", tolerance=loose, methods=("leap",), computed_steps=(5,), prompts=2, screen=1, steps=50
    )
    made, _ = run_certify(emoji, given, solved.with_name("draft.json"))
    assert Certificate.load(solved).files.keys().isdisjoint(made.files)


def drawn(model, pipe, **changes):
    arguments = {**model.call, "output_type": "pt", "generator": torch.Generator().manual_seed(3), **changes}
    return pipe(model.prompts[0], **arguments).images


def test_a_certified_scheduler_is_in_place_for_the_same_calls_and_goes_again(emoji, solved):
    pipe, own = emoji.pipe, emoji.pipe.scheduler
    right = hasten.LeapScheduler.load(emoji.fitted["leap"])
    (file,) = Certificate.load(solved).files
    assert hasten.Calibration.load(solved.parent / file).options["certificate"]["tolerance"]["min_psnr"] == 20
    with hasten.accelerate(pipe, quality=str(solved)) as run:
        fast = drawn(emoji, pipe)
        assert (run.summary().steps, run.summary().computed_steps, run.summary().flops_ratio) == (50, 5, 10)
        assert str(run.summary()).startswith("Leap: 5 of 50 steps computed (10.00x fewer), 45 left out;")
        assert repr(run).startswith("Acceleration(quality 'high': Leap(")
        with run.using(computed_steps=7) as seven:
            drawn(emoji, seven)
        assert (run.summary().steps, run.summary().computed_steps) == (50, 7)
        for count, message in (
            (11, "fitted for 4, 5, .*, 16 evaluations, not for 11"),
            ("9", "computed_steps must be"),
        ):
            with pytest.raises(ConfigError, match=message), run.using(computed_steps=count):
                pass
        with pytest.raises(CertificateError, match=r"leave torch\.autocast"), torch.autocast("cpu", torch.bfloat16):
            drawn(emoji, pipe)
        with pytest.raises(CertificateError, match=r"certified for 50 steps, this call has 20.*--steps 20"):
            drawn(emoji, pipe, num_inference_steps=20)
        with pytest.raises(CertificateError, match=r"certified for height 64, this call has 32|certified at shift"):
            drawn(emoji, pipe, height=32, width=32)
        for other in ({"sigmas": np.linspace(1, 0.5, 50)}, {"sigmas": [1 - i / 50 for i in range(50)]}):
            with pytest.raises(CertificateError, match="certified at other timesteps; leave sigmas out"):
                drawn(emoji, pipe, **other)
        own_transformer, pipe.transformer = pipe.transformer, copy.deepcopy(make_pipe().transformer)
        with pytest.raises(CertificateError, match="of another configuration"):
            drawn(emoji, pipe)
        pipe.transformer = own_transformer
        with run.using(quality="exact") as plain:
            full = drawn(emoji, plain)
            assert run.summary().method == "full run"
    assert pipe.scheduler is own
    assert torch.equal(full, drawn(emoji, pipe))
    pipe.scheduler = right
    try:
        assert torch.equal(fast, drawn(emoji, pipe, num_inference_steps=5))
    finally:
        pipe.scheduler = own


def test_a_setting_with_a_scheduler_is_for_the_pipeline_that_using_gives(emoji, solved):
    with hasten.accelerate(emoji.pipe, "reuse", schedule="even", computed_steps=7) as run:
        with run.using(quality=str(solved)) as pipe:
            drawn(emoji, pipe)
            with pytest.raises(ConfigError, match="call the pipeline that `using` gives"):
                drawn(emoji, emoji.pipe)
        drawn(emoji, emoji.pipe)
        assert run.summary().computed_steps == 7


def test_a_scheduler_takes_no_other_settings_place(emoji, solved):
    """The accelerated pipeline has a scheduler of the setting of all calls, which `using` was told to leave."""
    with hasten.accelerate(emoji.pipe, quality=str(solved)) as run:
        with run.using(computed_steps=9) as pipe:
            drawn(emoji, pipe)
            assert run.summary().computed_steps == 9
            with pytest.raises(ConfigError, match="call the pipeline that `using` gives"):
                drawn(emoji, emoji.pipe)
        drawn(emoji, emoji.pipe)
        assert run.summary().computed_steps == 5


# --- audits


def audited(pipe, run, calls=1, **arguments):
    return [draw(pipe, steps=STEPS, output_type="pt", seed=seed, **arguments) for seed in range(calls)]


def test_an_audited_call_gives_what_it_gives_and_is_compared_with_the_full_run(certified, caplog):
    pipe = make_pipe()
    kind = type(pipe)
    full = audited(pipe, None)[0]
    with hasten.accelerate(pipe, quality=str(certified)):
        fast = audited(pipe, None)[0]
    with hasten.accelerate(pipe, quality=str(certified), audit=1.0) as run:
        generator = torch.Generator().manual_seed(0)
        assert torch.equal(draw(pipe, steps=STEPS, output_type="pt", generator=generator), fast)
        assert run.summary().computed_steps < STEPS  # the full run leaves no record
        (found,) = run.audit.checked
        assert found["psnr"] == pytest.approx(hasten.quality.metrics.psnr(fast[0], full[0]), abs=1e-4)
        draw(pipe, steps=STEPS)
        assert "are not checked" in caplog.text
        assert len(run.audit.checked) == 1
        with run.using(quality="exact") as plain:
            draw(plain, steps=STEPS)
    assert type(pipe) is kind
    expected = torch.Generator().manual_seed(0)
    draw(pipe, steps=STEPS, generator=expected)
    assert torch.equal(generator.get_state(), expected.get_state())


def test_a_full_run_that_fails_leaves_the_call_as_it_is(certified, caplog):
    pipe, steps = make_pipe(), []

    def full_run_fails(pipe, step, timestep, kwargs):
        steps.append(step)
        if len(steps) > STEPS:
            raise RuntimeError("out of memory")
        return kwargs

    with hasten.accelerate(pipe, quality=str(certified)):
        alone = audited(pipe, None)[0]
    with hasten.accelerate(pipe, quality=str(certified), audit=1.0) as run:
        assert torch.equal(audited(pipe, run, callback_on_step_end=full_run_fails)[0], alone)
        assert run.audit.checked == []
        assert "since its full run failed (RuntimeError: out of memory)" in caplog.text
        assert torch.equal(audited(pipe, run)[0], alone)
        assert len(run.audit.checked) == 1


def test_an_audit_that_could_measure_nothing_is_refused_before_any_call(certified, tmp_path, monkeypatch):
    made = Certificate.load(certified)
    evidence = replace(made.evidence, metrics={**made.evidence.metrics, "lpips": {"median": 0.01}})
    made = replace(made, tolerance=replace(made.tolerance, max_lpips=0.1), evidence=evidence)
    file = made.save(tmp_path / "high.json")
    monkeypatch.setattr(hasten.quality.metrics.Lpips, "_weights_path", staticmethod(lambda: None))
    hasten.quality.metrics.lpips.cache_clear()
    pipe = make_pipe()
    with pytest.raises(ModelError, match=r"(?i)lpips"):
        hasten.accelerate(pipe, quality=str(file), audit=0.01)
    assert not hooks_on(pipe.transformer)
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("something was drawn"))
    with pytest.raises(ModelError, match=r"(?i)lpips"):
        run_certify(subject_of(pipe), settings(tolerance=replace(LOOSE, max_lpips=0.1)), tmp_path / "other.json")


def test_generators_given_by_position_make_the_same_noise_again(certified):
    pipe = make_pipe()
    names = list(inspect.signature(type(pipe).__call__).parameters)[1:]
    given = {**CALL, "prompt": "cat", "num_inference_steps": STEPS, "output_type": "pt"}
    given |= {"generator": torch.Generator().manual_seed(0)}
    defaults = {name: p.default for name, p in inspect.signature(type(pipe).__call__).parameters.items()}
    last = max(names.index(name) for name in given)
    with hasten.accelerate(pipe, quality=str(certified), audit=1.0) as run:
        pipe(*(given.get(name, defaults[name]) for name in names[: last + 1]))
        assert run.audit.checked[0]["psnr"] > 15


def test_noise_of_the_global_generator_is_that_of_the_call_alone(certified):
    pipe = make_pipe()
    torch.manual_seed(5)
    with hasten.accelerate(pipe, quality=str(certified)):
        draw(pipe, steps=STEPS, output_type="pt", generator=None)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    with hasten.accelerate(pipe, quality=str(certified), audit=1.0) as run:
        draw(pipe, steps=STEPS, output_type="pt", generator=None)
        assert len(run.audit.checked) == 1
        assert run.audit.checked[0]["psnr"] > 15
    assert torch.equal(torch.get_rng_state(), after)


def test_a_share_of_the_calls_is_audited(certified):
    pipe = make_pipe()
    with hasten.accelerate(pipe, quality=str(certified), audit=0.3) as run:
        run.audit._random.seed(0)
        audited(pipe, run, 20)
        assert 2 <= len(run.audit.checked) <= 11


def test_calls_of_using_are_audited_where_they_have_the_certified_setting(certified):
    pipe = make_pipe()
    with hasten.accelerate(pipe, quality=str(certified), audit=1.0) as run:
        for asked, checked in (({}, 1), ({"quality": str(certified)}, 2), ({"computed_steps": 4}, 2)):
            with run.using(**asked) as own:
                audited(own, run)
            assert len(run.audit.checked) == checked


def test_calls_outside_of_the_tolerance_are_warned_of_and_too_many_raise_an_alarm(certified, tmp_path, caplog):
    made = Certificate.load(certified)
    broken = replace(made, tolerance=Tolerance(min_psnr=90, share=0.95, confidence=0.9), folder=None)
    file = broken.save(tmp_path / "broken.json")
    pipe = make_pipe()
    with hasten.accelerate(pipe, quality=str(file), audit=1.0), caplog.at_level(logging.WARNING, "hasten"):
        audited(pipe, None, 1)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "outside of quality 'high'" in caplog.text
        audited(pipe, None, 8)
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert "does not hold any more" in errors[0].message
    assert "hasten certify" in errors[0].message


# --- single calls


def fresh(arguments, **call):
    """What a call gives on a fresh pipeline with the same setting."""
    pipe = make_pipe()
    if not arguments:
        return draw(pipe, **call)
    with (
        hasten.accelerate(pipe, **arguments) if "quality" in arguments else hasten.accelerate(pipe, "foca", **arguments)
    ):
        return draw(pipe, **call)


def in_a_thread(pipe):
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(draw, pipe).result()


def test_a_call_has_its_own_setting_and_the_hook_stays(certified):
    pipe = make_pipe()
    even = {"schedule": "even"}
    with hasten.accelerate(pipe, "foca", schedule="even", computed_steps=6) as run:
        hooks = hooks_on(pipe.transformer)
        with run.using(computed_steps=4) as own:
            assert torch.equal(draw(own), fresh({**even, "computed_steps": 4}))
            assert run.summary().computed_steps == 4
            assert torch.equal(draw(pipe), fresh({**even, "computed_steps": 4}))  # of this thread, whatever is called
            with run.using(quality="exact") as inner:
                assert torch.equal(draw(inner), fresh({}))
                assert run.summary().method == "full run"
            assert run.summary(0).method == "FoCa"
            assert hooks_on(pipe.transformer) == hooks
        with run.using(quality=str(certified)) as own:
            assert run.describe(quality=str(certified))["method"].startswith("taylorseer:")
            assert torch.equal(draw(own), fresh({"quality": str(certified)}))
            with pytest.raises(CertificateError, match="this call has 9"):
                draw(own, steps=9)
        assert torch.equal(draw(pipe), fresh({**even, "computed_steps": 6}))
        for call in (draw, in_a_thread):  # it is over
            with pytest.raises(ConfigError, match="call it within that `with`"):
                call(own)
        with (
            run.using(computed_steps=4) as own,
            hasten.accelerate(pipe, "foca", computed_steps=6, replace=True),
            pytest.raises(ConfigError, match="of an acceleration that was removed or replaced since"),
        ):
            draw(own)
        run = hasten.accelerate(pipe, "foca", schedule="even", computed_steps=6)
        with run.using(computed_steps=4) as own:
            assert torch.equal(in_a_thread(own), fresh({**even, "computed_steps": 4}))
        with pytest.raises(ConfigError, match="quality must be text that is not empty"), run.using(quality=3):
            pass
        with run.using() as own:
            assert torch.equal(in_a_thread(own), fresh({**even, "computed_steps": 6}))
            assert torch.equal(draw(own), fresh({**even, "computed_steps": 6}))
            assert own.scheduler is not pipe.scheduler
            assert own.transformer is pipe.transformer


@pytest.mark.parametrize(("asked", "message"), [
    ({"quality": "exact", "computed_steps": 4}, "leave out one of it"),
    ({"computed_steps": 0}, "computed_steps must be"),
    ({"computed_steps": True}, "computed_steps must be"),
    ({"computed_steps": "4"}, "computed_steps must be a whole number from 1 to 10000 or None, got '4'"),
    ({"quality": 5}, "quality must be text that is not empty or None, got 5"),
    ({"quality": ""}, "quality must be text that is not empty"),
    ({"quality": "draft"}, "not certified"),
    ({"quality": "best"}, "unknown quality"),
])  # fmt: skip
def test_bad_settings_of_single_calls_are_refused_and_change_nothing(asked, message, own_store):
    pipe = make_pipe()
    with hasten.accelerate(pipe, "foca", schedule="even", computed_steps=6) as run:
        with pytest.raises(HastenError, match=message), run.using(**asked):
            pytest.fail("it was taken")
        draw(pipe)
        assert run.summary().computed_steps == 6
    with pytest.raises(ConfigError, match="was removed"), run.using(computed_steps=4):
        pass


def test_settings_of_single_calls_do_not_pile_up():
    pipe = make_pipe()
    with hasten.accelerate(pipe, "foca", schedule="even", computed_steps=6) as run:
        for count in range(1, 200):
            with run.using(computed_steps=count):
                pass
        assert len(run._requests._instead) < 100
        with run.using(computed_steps=4) as own:
            assert torch.equal(draw(own), fresh({"schedule": "even", "computed_steps": 4}))


def test_a_transformer_alone_has_single_calls_too():
    pipe = make_pipe()
    with hasten.accelerate(pipe.transformer, "reuse", interval=3) as run:
        with run.using(quality="exact") as module:
            assert module is pipe.transformer
            assert torch.equal(draw(pipe), fresh({}))
        with pytest.raises(ConfigError, match="accelerate the pipeline itself"), run.using(quality="high"):
            pass


def test_methods_that_decide_by_a_threshold_take_no_number():
    pipe = make_pipe()
    with (
        hasten.accelerate(pipe, "fbcache", threshold=0.3) as run,
        pytest.raises(ConfigError, match="decides by a threshold"),
        run.using(computed_steps=4),
    ):
        pass


def mixed(count, certified):
    """Requests of all kinds: settings, sizes, prompts, seeds, guidance."""
    kinds = [
        ({"computed_steps": 4}, {}),
        ({"computed_steps": 7}, {"height": 64}),
        ({"quality": str(certified)}, {}),
        ({"quality": "exact"}, {"true_cfg_scale": 3.0, "negative_prompt": "cat"}),
        ({}, {"true_cfg_scale": 2.0, "negative_prompt": "car"}),
        ({}, {"steps": 9}),
    ]
    return [(*kinds[i % len(kinds)], PROMPTS[i % 5], i % 3) for i in range(count)]


@pytest.mark.parametrize("count", [24, pytest.param(200, marks=pytest.mark.slow)])
def test_mixed_requests_on_four_threads_over_one_pipeline_are_as_if_alone(count, certified):
    requests = mixed(count, certified)
    expected = {}
    for setting, call, prompt, seed in requests:
        key = (str(setting), str(call), prompt, seed)
        if key not in expected:
            base = (
                {"schedule": "even", "computed_steps": 6} if "computed_steps" not in setting else {"schedule": "even"}
            )
            given = (
                {} if setting.get("quality") == "exact" else setting if "quality" in setting else {**base, **setting}
            )
            expected[key] = fresh(given, prompt=prompt, seed=seed, **call)
    pipe = make_pipe()
    rest, failed, got = list(enumerate(requests)), [], {}
    lock = threading.Lock()

    def work(run):
        while True:
            with lock:
                if not rest:
                    return
                number, (setting, call, prompt, seed) = rest.pop(0)
            try:
                with run.using(**setting) as own:
                    got[number] = draw(own, prompt=prompt, seed=seed, **call)
            except Exception as error:
                failed.append(error)

    with hasten.accelerate(pipe, "foca", schedule="even", computed_steps=6) as run:
        threads = [threading.Thread(target=work, args=(run,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not run.engines["transformer"].runs.under_way or not failed
    assert not failed
    for number, (setting, call, prompt, seed) in enumerate(requests):
        assert torch.equal(got[number], expected[str(setting), str(call), prompt, seed]), (setting, call)


# --- configurations


def test_a_setting_is_saved_and_loaded(tmp_path, certified):
    pipe = make_pipe()
    with hasten.accelerate(pipe, "foca", schedule="even", computed_steps=6) as run:
        right = draw(pipe)
        for name in ("hasten.yaml", "hasten.json"):
            run.save(tmp_path / name)
    for name in ("hasten.yaml", "hasten.json"):
        with hasten.accelerate(pipe, hasten.load(tmp_path / name)) as run:
            assert torch.equal(draw(pipe), right)
            with run.using(computed_steps=4):
                draw(pipe)
                assert run.summary().computed_steps == 4
    certified.with_name("here.yaml").write_text("quality: high.json\naudit: 1.0\n")
    with hasten.accelerate(pipe, hasten.load(certified.with_name("here.yaml"))) as run:
        draw(pipe, output_type="pt")
        assert len(run.audit.checked) == 1
        saved = run.save(tmp_path / "again.yaml")
    assert hasten.load(saved).quality == str(certified)


@pytest.mark.parametrize("folder", ["calibrations", "calibrations/of:mine"])
def test_files_of_a_setting_are_found_from_wherever_it_is_loaded(folder, tmp_path, certified, emoji, monkeypatch):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    (here / folder).mkdir(parents=True)
    elsewhere.mkdir()
    shutil.copy(emoji.fitted["leap"], here / folder / "leap.safetensors")
    shutil.copytree(certified.parent, here / "certified")
    monkeypatch.chdir(here)
    for name, pipe, given in (
        ("leap", emoji.pipe, {"method": f"leap:calibration={folder}/leap.safetensors"}),
        ("quality", make_pipe(), {"quality": "certified/high.json"}),
    ):
        for place in (here / f"{name}.yaml", elsewhere / f"{name}.json"):
            monkeypatch.chdir(here)
            with hasten.accelerate(pipe, Configuration(**given)) as run:
                run.save(place)
            monkeypatch.chdir(tmp_path)
            with hasten.accelerate(pipe, hasten.load(place)) as run:
                run.save(place)  # of what was loaded
            hasten.accelerate(pipe, hasten.load(place)).remove()
    assert (here / "leap.yaml").read_text() == f"method: leap:calibration={folder}/leap.safetensors\n"
    here.rename(tmp_path / "moved")  # with the files below it
    hasten.accelerate(emoji.pipe, hasten.load(tmp_path / "moved" / "leap.yaml")).remove()


def test_every_entry_comes_back_and_json_may_have_tabs(tmp_path):
    whole = Configuration(method="foca", computed_steps=3, model="m", steps=6, height=32, width=64, guidance=0.0)
    for name in ("hasten.yaml", "hasten.json"):
        assert hasten.load(whole.save(tmp_path / name)) == whole
    (tmp_path / "tabs.json").write_bytes(b'\xef\xbb\xbf{\n\t"quality": "exact",\n\t"steps": 8\n}\n')
    assert hasten.load(tmp_path / "tabs.json") == Configuration(quality="exact", steps=8)
    (tmp_path / "twice.json").write_text('{"steps": 8, "steps": 9}')
    with pytest.raises(ConfigError, match="'steps' is there twice"):
        hasten.load(tmp_path / "twice.json")


def test_computed_steps_of_a_full_run_are_those_of_the_default_method():
    pipe = make_pipe()
    with hasten.accelerate(pipe, computed_steps=4) as run:
        right, method = draw(pipe, steps=STEPS), run.describe()
    with hasten.accelerate(pipe, quality="exact") as run, run.using(computed_steps=4) as own:
        assert torch.equal(draw(own, steps=STEPS), right)
        assert run.describe(computed_steps=4) == method


@pytest.mark.parametrize(("text", "message"), [
    ("qualty: high", "Did you mean 'quality'"),
    ("quality: high\nmethod: foca", "leave them or it out"),
    ("audit: 0.1", "give one"),
    ("method: fcoa", "Did you mean 'foca'"),
    ("method: foca:intervall=3", "Did you mean 'interval'"),
    ("method: foca:interval=x", "interval must be"),
    ("model: 7", "model must be text that is not empty or None, got 7"),
    ("method: foca\ncomputed_steps: 9\nsteps: 8", "9 of 8 steps cannot be computed"),
    ("computed_steps: nine", "computed_steps must be"),
    ("- high", "expected entries"),
    ("a: [", "no usable configuration"),
    ("method: foca\nmethod: hicache", "'method' is there twice"),
    ("method: foca:interval=2:interval=3", "'interval' is there twice"),
    ("\n".join(f"a{i}: 1" for i in range(20_000)), "unknown entry"),
    ("? [a]\n: 1", "no usable configuration"),
    ("quality: 3", "quality must be text that is not empty or None"),
    ("!!python/object/apply:os.system [echo]", "no usable configuration"),
])  # fmt: skip
def test_bad_configurations_are_one_clear_error(text, message, tmp_path):
    (tmp_path / "hasten.yaml").write_text(text)
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        hasten.load(tmp_path / "hasten.yaml")
    with pytest.raises(ConfigError, match="no such file"):
        hasten.load(tmp_path / "nothing.yaml")


def test_the_schema_has_every_entry_and_its_limits():
    found = schema()["properties"]
    assert set(found) == set(Configuration.__dataclass_fields__)
    assert (found["audit"]["minimum"], found["audit"]["maximum"]) == (0, 1)
    assert "checked against the full run" in found["audit"]["description"]
    assert found["computed_steps"]["type"] == "integer"
