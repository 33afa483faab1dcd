"""UNets through their own pipelines: at the output, and with the inner levels forecast as DeepCache does."""

from __future__ import annotations

import json
import string
from typing import Any

import diffusers
import pytest
import tiny
import torch
from denoisers.unets import CONDITION, SDXL, TYPES_2D
from device import Waits
from test_bench import command
from test_engine import leftovers
from tiny import randn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import hasten
from hasten.errors import AdapterError, CalibrationError, ScheduleError, TargetError
from hasten.models import deep_part
from hasten.pipeline.runs import Runs

STEPS = 9
WORDS = 16  # tokens of a prompt


def built(name: str, **config: Any) -> Any:
    return tiny.build(name, tiny.Tiny(config, (), dict))


def vae() -> Any:
    return built("AutoencoderKL", block_out_channels=(4, 4), norm_num_groups=1, layers_per_block=1, **BLOCKS)


BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def text_encoder(kind: type, width: int) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "projection_dim": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config = CLIPTextConfig(**sizes, num_attention_heads=2, vocab_size=600, max_position_embeddings=WORDS)
    return kind(config).eval()


def tokenizer(folder: Any) -> Any:
    """Letters, at the start and within a word."""
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=WORDS)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_sdxl(tmp_path_factory.mktemp("tokenizer"))


def tiny_sdxl(folder: Any) -> Any:
    """Stable Diffusion XL, tiny and with random weights."""
    letters = tokenizer(folder)
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=text_encoder(CLIPTextModel, 8),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, 16),
        tokenizer=letters,
        tokenizer_2=letters,
        unet=built("UNet2DConditionModel", **SDXL),
        scheduler=diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, **call: Any) -> torch.Tensor:
    call = {"prompt": "a fish", "height": 16, "width": 16, "num_inference_steps": STEPS, "output_type": "latent"} | call
    return pipe(**call, generator=torch.Generator().manual_seed(0)).images


def levels(unet: Any) -> tuple[list[str], list[Any]]:
    """Names of the levels in the order in which they run, and hooks that note it."""
    ran: list[str] = []
    named = [(name, module) for name, module in unet.named_modules() if name.count(".") == 1 and "blocks" in name]
    named.append(("mid_block", unet.mid_block))
    return ran, [m.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, m in named]


def test_a_pipeline_with_a_unet_is_accelerated_at_the_output(sdxl):
    plain, before = draw(sdxl), leftovers(sdxl.unet)
    with hasten.accelerate(sdxl, "reuse", interval=1):
        assert torch.equal(draw(sdxl), plain)
    with hasten.accelerate(sdxl) as run:
        assert list(run.engines) == ["unet"]
        ran, handles = levels(sdxl.unet)
        fast = draw(sdxl)
        summary = run.summary()
        assert len(ran) == 7 * summary.computed_steps
        assert summary.skipped_steps > 0
        assert torch.equal(draw(sdxl), fast)
        assert run.estimate_bytes(8 * 8, batch=2, dtype=torch.float32) == summary.cache_bytes
    for handle in handles:
        handle.remove()
    assert 0 < (fast - plain).norm() / plain.norm() < 0.5
    assert leftovers(sdxl.unet) == before
    assert torch.equal(draw(sdxl), plain)


def test_guided_sigma_serves_guidance_that_is_joined_in_one_batch(sdxl):
    def one(sigma, guided_sigma, **call):
        settings = {"sigma": sigma, "guided_sigma": guided_sigma, "order": 1, "interval": 3}
        with hasten.accelerate(sdxl, "hicache", **settings):
            return draw(sdxl, **call)

    for images in (1, 2):
        guided = {"guidance_scale": 5.0, "num_images_per_prompt": images}
        plain = {"guidance_scale": 1.0, "num_images_per_prompt": images}
        assert torch.equal(one(0.7, 0.3, **plain), one(0.7, None, **plain))
        assert torch.equal(one(0.7, 0.3, **guided), one(0.3, None, **guided))
        assert not torch.equal(one(0.3, None, **guided), one(0.7, None, **guided))


def test_the_deep_site_forecasts_the_inner_levels_and_computes_the_outermost_one(sdxl):
    plain, before = draw(sdxl), leftovers(sdxl.unet)
    with hasten.accelerate(sdxl, "reuse", interval=1, site="deep"):
        assert torch.equal(draw(sdxl), plain)
    with hasten.accelerate(sdxl, "taylorseer", interval=3, warmup=2, order=1, site="deep") as run:
        ran, handles = levels(sdxl.unet)
        fast = draw(sdxl)
        summary = run.summary()
        assert run.estimate_bytes(8 * 8, batch=2, dtype=torch.float32) == summary.cache_bytes
    for handle in handles:
        handle.remove()
    part = deep_part(sdxl.unet)
    assert part.last == "up_blocks.1"
    assert all(ran.count(name) == summary.computed_steps for name in part.modules)
    assert ran.count("down_blocks.0") == ran.count("up_blocks.2") == STEPS
    assert leftovers(sdxl.unet) == before
    assert torch.equal(draw(sdxl), plain)
    # The outermost level reacts to the step: nearer than the whole prediction of an earlier one.
    with hasten.accelerate(sdxl, "reuse", interval=3, warmup=2, site="deep"):
        deep = draw(sdxl)
    with hasten.accelerate(sdxl, "reuse", interval=3, warmup=2, site="output"):
        whole = draw(sdxl)
    assert 0 < (deep - plain).norm() < (whole - plain).norm()
    assert (fast - plain).norm() < (whole - plain).norm()


def test_methods_and_sites_that_do_not_fit_are_refused_by_name(sdxl):
    with pytest.raises(
        AdapterError, match=r"FBCache stands between the blocks.*UNet2DConditionModel is a UNet.*easycache"
    ):
        hasten.accelerate(sdxl, "fbcache")
    with pytest.raises(AdapterError, match="site 'module' needs a registered family"):
        hasten.accelerate(sdxl, "reuse", site="module")
    transformer = tiny.build("SD3Transformer2DModel")
    with pytest.raises(AdapterError, match=r"inner levels of a UNet, and SD3Transformer2DModel has none"):
        hasten.accelerate(transformer, "reuse", site="deep")
    with pytest.raises(TargetError, match=r"one of transformer, .*unet, prior, decoder"):
        hasten.accelerate(object(), "reuse")
    with hasten.accelerate(sdxl, "easycache", threshold=2.0) as run:
        draw(sdxl)
        assert run.summary().skipped_steps > 0


@pytest.mark.parametrize("site", ["output", "deep"])
def test_inpainting_and_image_to_image(sdxl, site):
    for kind, call in (
        (diffusers.StableDiffusionXLImg2ImgPipeline, {}),
        (
            diffusers.StableDiffusionXLInpaintPipeline,
            {"mask_image": (randn(1, 1, 16, 16) > 0).float(), "padding_mask_crop": None},
        ),
    ):
        pipe = kind(**sdxl.components)
        pipe.set_progress_bar_config(disable=True)
        call = {"image": randn(1, 3, 16, 16).sigmoid(), "strength": 0.9, **call}
        if kind is diffusers.StableDiffusionXLImg2ImgPipeline:
            call |= {"height": None, "width": None}
            call = {key: value for key, value in call.items() if value is not None}

        def run_it(pipe=pipe, call=call):
            given = {"prompt": "a fish", "num_inference_steps": STEPS + 1, "output_type": "latent", **call}
            return pipe(**given, generator=torch.Generator().manual_seed(0)).images

        plain = run_it()
        with hasten.accelerate(pipe, "reuse", interval=1, site=site):
            assert torch.equal(run_it(), plain)
        with hasten.accelerate(pipe, "taylorseer", interval=3, site=site) as run:
            assert 0 < (run_it() - plain).norm() < plain.norm()
            assert run.summary().computed_steps + run.summary().skipped_steps == STEPS
        assert torch.equal(run_it(), plain)


@pytest.fixture(scope="module")
def sd15(sdxl) -> Any:
    return tiny_sd15(sdxl)


def tiny_sd15(sdxl: Any) -> Any:
    """Stable Diffusion 1.5 with a ControlNet."""
    config = {**CONDITION, **TYPES_2D, "cross_attention_dim": 8}
    control = {key: config[key] for key in ("block_out_channels", "layers_per_block", "norm_num_groups")}
    control |= {"down_block_types": TYPES_2D["down_block_types"], "cross_attention_dim": 8, "attention_head_dim": 2}
    pipe = diffusers.StableDiffusionControlNetPipeline(
        vae=sdxl.vae,
        text_encoder=sdxl.text_encoder,
        tokenizer=sdxl.tokenizer,
        unet=built("UNet2DConditionModel", **config),
        controlnet=built("ControlNetModel", **control, conditioning_embedding_out_channels=(4, 8)),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("site", ["output", "deep"])
def test_a_controlnet_goes_on_working(sd15, site):
    hint, other = randn(1, 3, 16, 16).sigmoid(), randn(1, 3, 16, 16, seed=3).sigmoid()
    call: dict[str, Any] = {}
    plain = draw(sd15, image=hint, **call)
    with hasten.accelerate(sd15, "reuse", interval=1, site=site):
        assert torch.equal(draw(sd15, image=hint, **call), plain)
    with hasten.accelerate(sd15, "taylorseer", interval=3, site=site) as run:
        fast = draw(sd15, image=hint, **call)
        assert run.summary().skipped_steps > 0
        assert not torch.equal(draw(sd15, image=other, **call), fast)
        assert torch.equal(draw(sd15, image=hint, **call), fast)
    assert 0 < (fast - plain).norm() < plain.norm()
    assert torch.equal(draw(sd15, image=hint, **call), plain)


def part_of(sdxl: Any, part: str) -> tuple[Any, dict[str, Any]]:
    """Pipelines that go through a part of their scheduler's list, or through one with a timestep that comes twice."""
    if part == "first part":
        return sdxl, {"num_inference_steps": 16, "denoising_end": 0.6}
    fitting = built("UNet2DConditionModel", **{**CONDITION, **TYPES_2D, "cross_attention_dim": 8})
    names = ("vae", "text_encoder", "tokenizer")
    kind = diffusers.StableDiffusionPipeline if part == "pndm" else diffusers.StableDiffusionImg2ImgPipeline
    pndm = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    pipe = kind(
        **{name: getattr(sdxl, name) for name in names},
        unet=fitting,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1) if part == "ddim img2img" else pndm,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    image = {"image": randn(1, 3, 16, 16).sigmoid(), "strength": 0.6, "num_inference_steps": 16}
    return pipe, {} if part == "pndm" else image


@pytest.mark.parametrize(
    ("part", "steps"), [("first part", 9), ("pndm", 10), ("ddim img2img", 9), ("pndm img2img", 10)]
)
def test_as_many_steps_are_computed_as_were_asked_for(sdxl, part, steps):
    pipe, call = part_of(sdxl, part)
    sizes = {"height": None, "width": None} if "image" in call else {"height": 16, "width": 16}
    call = {"prompt": "a fish", "num_inference_steps": STEPS, "output_type": "latent", **sizes, **call}
    call = {name: value for name, value in call.items() if value is not None}
    ran = []
    handle = pipe.unet.mid_block.register_forward_hook(lambda *_: ran.append(1))
    with hasten.accelerate(pipe, "taylorseer", schedule="even", computed_steps=4) as run:
        pipe(**call, generator=torch.Generator().manual_seed(0))
        summary = run.summary()
        assert (len(ran), summary.computed_steps, summary.skipped_steps) == (4, 4, steps - 4)
        assert run.records[-1].computed  # even: from the first step to the last
        # A UNet has none of the methods that tell a transformer of the end of a call; its features go all the same.
        assert not run.engines["unet"].runs.under_way
    handle.remove()


def test_a_loop_of_one_step_is_a_run_of_one_step(sdxl):
    """Image to image that starts at the very end, under a scheduler that does not say where it begins."""
    pipe, call = part_of(sdxl, "ddim img2img")
    call = {"prompt": "a fish", "output_type": "latent", **call, "strength": 0.07}
    fails = pytest.raises(ScheduleError, match=r"\b1 step\b|1 steps of the run")
    with hasten.accelerate(pipe, "taylorseer", schedule="even", computed_steps=3), fails:
        pipe(**call, generator=torch.Generator().manual_seed(0))


def test_leap_on_a_unet_is_nearer_than_as_many_plain_steps(sdxl, tmp_path):
    plain, own, before = draw(sdxl), sdxl.scheduler, leftovers(sdxl.unet)
    few = draw(sdxl, num_inference_steps=4)
    call = {"prompt": "a fish", "height": 16, "width": 16, "num_inference_steps": STEPS, "output_type": "latent"}
    calls = [{**call, "generator": torch.Generator().manual_seed(seed)} for seed in (1, 2)]
    file = hasten.fit_leap(sdxl, calls, [4], trials=10, rounds=1).save(tmp_path / "leap.safetensors")
    with hasten.accelerate(sdxl, hasten.Leap(file)) as run:
        learned = draw(sdxl, num_inference_steps=4)
        assert str(run.summary()).startswith("Leap: 4 of 4 steps")
    assert (learned - plain).norm() < (few - plain).norm() / 2
    assert sdxl.scheduler is own
    assert leftovers(sdxl.unet) == before
    assert torch.equal(draw(sdxl), plain)


def test_a_tiny_sdxl_through_the_command_line(sdxl, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "sdxl"
    sdxl.save_pretrained(folder)
    (tmp_path / "prompts.txt").write_text("a fish\na bird\n")
    common = [
        "--model",
        str(folder),
        "--prompts-file",
        str(tmp_path / "prompts.txt"),
        "--height",
        "16",
        "--width",
        "16",
    ]
    common += ["--steps", "8"]
    for method in ("hicache:interval=3", "taylorseer:interval=3:site=deep"):
        out = tmp_path / method.partition(":")[0]
        code, _, errors = command(monkeypatch, capsys, "generate", *common, "--method", method, "--out", out)
        assert code == 0, errors
        assert len(list(out.glob("*.png"))) == 2
    methods = (
        "--prompts",
        "2",
        "--methods",
        "reuse,taylorseer:site=deep",
        "--computed-steps",
        "4",
        "--json",
        tmp_path / "b.json",
    )
    code, _, errors = command(monkeypatch, capsys, "bench", *common, *methods)
    assert code == 0, errors
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    found = {row["method"]: row for row in rows}
    assert found["reuse"]["computed_steps"] == 4
    assert not any(row.get("failed") for row in rows)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_no_step_reads_the_timestep_whether_or_not_the_scheduler_counts(sdxl, monkeypatch, scheduler):
    monkeypatch.setattr(sdxl, "scheduler", getattr(diffusers, scheduler)())
    plain, reads, label = draw(sdxl), Waits(), Runs.label

    def counted(*args: Any) -> Any:
        with reads:
            return label(*args)

    monkeypatch.setattr(Runs, "label", counted)
    few, many = [], []
    for steps, found in ((4, few), (12, many)):
        with hasten.accelerate(sdxl, "taylorseer", interval=3) as run:
            reads.counts.clear()
            draw(sdxl, num_inference_steps=steps)
            found += [reads.counts.total(), len({record.step for record in run.records})]
    assert many[1] > few[1] >= 4
    assert many[0] == few[0] <= 2
    with hasten.accelerate(sdxl, "taylorseer", interval=1):
        assert torch.equal(draw(sdxl), plain)


@pytest.mark.parametrize("method", ["svdcache", "hyca", "magcache"])
def test_a_fit_to_blocks_is_refused_before_the_first_call(sdxl: Any, method: str) -> None:
    with pytest.raises(CalibrationError, match=rf"{method} is fitted .* is a UNet, which has none; take .*site='deep'"):
        hasten.calibrate(sdxl, method, [lambda: pytest.fail("a call was made")])
