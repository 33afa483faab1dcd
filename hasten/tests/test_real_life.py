"""What people do with pipelines: offloading, LoRA, half precision, image-to-image, two experts, guidance of all kinds,
callbacks, threads. Each of them has to give what it gives without hasten, or what a fresh accelerated run gives."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    StableDiffusion3Pipeline,
    WanPipeline,
)
from diffusers.hooks import apply_group_offloading
from pipelines import draw, make_pipe
from tiny import TINY, build, first
from torch import nn

import hasten
from hasten import registry
from hasten.caching import Uniform, computed_steps
from hasten.errors import HastenError, HastenWarning, ScheduleError, TargetError

SITES = ("hidden", "output", "module")
METHODS = ["reuse", "taylorseer", "hicache", "foca"]
# One method shows the plumbing; the others show that it is theirs as well.
each_method = pytest.mark.parametrize(
    "method", ["taylorseer", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m != "taylorseer")]
)
CPU = torch.device("cpu")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rebuilt(kind, pipe, **changes):
    """A pipeline of another class, or with other components, made of those of `pipe`."""
    other = kind(**{**pipe.components, **changes})
    other.set_progress_bar_config(disable=True)
    return other


def footprint(model):
    """What each module of a tree carries, and the hooks on it."""
    return {
        name: (
            id(module),
            sorted(k for k in module.__dict__ if k != "_diffusers_hook"),
            list(getattr(getattr(module, "_diffusers_hook", None), "hooks", ())),
        )
        for name, module in model.named_modules()
    }


def messages(caught):
    return [str(w.message) for w in caught if issubclass(w.category, HastenWarning)]


# --- offloading


class Loads(Counter):
    """Counts how often the weights of each block are brought to the device."""

    def count(self, module, name, load):
        original = getattr(module, load)

        def counting(*args, **kwargs):
            self[name] += 1
            return original(*args, **kwargs)

        setattr(module, load, counting)

    def watch(self, model):
        for name, module in model.named_modules():
            if name.startswith(("transformer_blocks.", "single_transformer_blocks.")):
                if hasattr(module, "_hf_hook") and isinstance(module, nn.Linear):
                    self.count(module._hf_hook, name, "pre_forward")
                group = getattr(module, "_diffusers_hook", None)
                group = group and group.get_hook("group_offloading")
                if group is not None and group.group.offload_leader is module:
                    self.count(group.group, name, "onload_")


def offload(model, how, folder):
    """Weights leave memory between uses, so that one that is used without being loaded shows (`meta` or files)."""
    accelerate = pytest.importorskip("accelerate")
    if how == "model":
        accelerate.cpu_offload_with_hook(model, execution_device=CPU)
    elif how == "dispatched":
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    elif how == "sequential":
        accelerate.cpu_offload(model, CPU, offload_buffers=True)
    else:
        blocks = {"num_blocks_per_group": 1} if how == "block_level" else {}
        apply_group_offloading(model, CPU, CPU, how, offload_to_disk_path=str(folder), **blocks)


def same(image, expected):
    """Weights that come from files lie at other addresses, where kernels may round otherwise."""
    return torch.allclose(image, expected, rtol=0, atol=5e-6)


OFFLOADS = ["model", "dispatched", "sequential", "block_level", "leaf_level"]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", OFFLOADS)
@each_method
def test_offloading_changes_no_image_and_outlives_removal(pipe, tmp_path, method, how, when, site):
    plain = draw(pipe, 8)
    with hasten.accelerate(pipe, method, interval=3, site=site):
        fast = draw(pipe, 8)
    assert not same(fast, plain)
    if when == "before":
        offload(pipe.transformer, how, tmp_path)
    before = footprint(pipe.transformer)
    run = hasten.accelerate(pipe, method, interval=3, site=site)
    if when == "after":
        offload(pipe.transformer, how, tmp_path)
    assert same(draw(pipe, 8), fast)
    assert run.summary().computed_steps == len(computed_steps(Uniform(3, 3), 8))
    run.remove()
    after = footprint(pipe.transformer)
    assert not any("hasten" in hooks for _, _, hooks in after.values())
    assert after == before or when == "after"
    assert same(draw(pipe, 8), plain)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("how", ["sequential", "block_level", "leaf_level"])
def test_a_skipped_block_is_not_loaded(tmp_path, how, site):
    pipe = make_pipe()
    offload(pipe.transformer, how, tmp_path)
    draw(pipe, 1)  # group offloading finds out who loads what
    loads = Loads()
    loads.watch(pipe.transformer)
    draw(pipe, 1)
    once = dict(loads)
    assert once
    loads.clear()
    with hasten.accelerate(pipe, "taylorseer", interval=3, site=site) as run:
        draw(pipe)
        full, steps = run.summary().computed_steps, run.summary().steps
    for name, times in once.items():
        # At the module site blocks run, and their norms; attention and feed-forward do not.
        part_runs = site == "module" and (how == "block_level" or name.split(".")[2].startswith("norm"))
        assert loads[name] == (steps if part_runs else full) * times, name


# --- LoRA


class LoRALinear(nn.Module):
    """What an adapter does to a layer."""

    def __init__(self, base, seed):
        super().__init__()
        self.base, self.scale = base, 1.0
        self.down = nn.Parameter(randn(2, base.in_features, seed=seed))
        self.up = nn.Parameter(randn(base.out_features, 2, seed=seed + 1))

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.down.T) @ self.up.T


class HandMade:
    """Adapters put in by hand, as PEFT does it."""

    def parts(self, model):
        return [block.attn for block in (*model.transformer_blocks, *model.single_transformer_blocks)]

    def load(self, model):
        for seed, part in enumerate(self.parts(model)):
            part.to_q = LoRALinear(part.to_q, seed)

    def rescale(self, model):
        for part in self.parts(model):
            part.to_q.scale = 0.3

    def unload(self, model):
        for part in self.parts(model):
            part.to_q = part.to_q.base


class Peft:
    """The same through diffusers."""

    def __init__(self):
        self.config = pytest.importorskip("peft").LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)

    def load(self, model):
        torch.manual_seed(0)
        model.add_adapter(self.config, "style")

    def rescale(self, model):
        model.set_adapters("style", 0.3)

    def unload(self, model):
        model.delete_adapters("style")
        model.unload_lora()


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("kind", [HandMade, Peft])
@each_method
def test_lora_comes_and_goes_between_calls(pipe, method, kind, interval):
    """At interval 1 as without hasten, else as in a pipeline that is accelerated only now."""
    twin, lora, images = make_pipe(), kind(), [draw(pipe, 8)]
    with hasten.accelerate(pipe, method, interval=interval):
        draw(pipe, 8)
        for change in (lora.load, lora.rescale, lora.unload):
            for model in (pipe.transformer, twin.transformer):
                change(model)
            images.append(draw(pipe, 8))
            assert not torch.allclose(images[-1], images[-2], atol=1e-4)
            with hasten.accelerate(twin, method, interval=3) if interval == 3 else nullcontext():
                assert torch.equal(draw(twin, 8), images[-1])


def test_a_lora_scale_that_changes_in_mid_run_acts_at_once(pipe):
    lora = HandMade()

    def drawn(interval=None):
        def change(pipe, step, _timestep, kwargs):
            if step == 4:
                lora.rescale(pipe.transformer)
            return kwargs

        lora.load(pipe.transformer)
        run = hasten.accelerate(pipe, "hicache", interval=interval) if interval else nullcontext()
        with run:
            image = draw(pipe, callback_on_step_end=change)
        lora.unload(pipe.transformer)
        return image

    plain = drawn()
    assert torch.equal(drawn(interval=1), plain)
    assert (drawn(interval=3) - plain).norm() < 0.2 * plain.norm()


# --- half precision


@each_method
@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_forecasts_in_half_precision_lose_only_the_last_rounding(dtype, digits, method):
    """Features of neighbouring steps differ in their last bits, and weights of both signs would amplify their sum's."""
    model = build("FluxTransformer2DModel").to(dtype)
    x, seen = randn(1, 16, 4).to(dtype), []
    arguments = {
        k: v.to(dtype) if isinstance(v, torch.Tensor) else v
        for k, v in TINY["FluxTransformer2DModel"].arguments(x, 1.0).items()
    }
    with torch.no_grad(), hasten.accelerate(model, method, interval=3, site="output") as run:
        for i in range(12):
            step = {"hidden_states": x * (1 - 0.02 * i), "timestep": torch.full((1,), 1 - i / 12).to(dtype)}
            seen.append(first(model(**{**arguments, **step})))
        full = [record.step for record in run.records if record.computed]
    predictor = registry.build(method, interval=3).predictors()["whole"]
    for target in set(range(12)) - set(full):
        anchors = tuple(reversed([a for a in full if a < target]))[: predictor.memory]
        terms = [w * seen[a].double() for w, a in zip(predictor.weights(target, anchors), anchors, strict=True)]
        exact = sum(terms)
        bound = 2.0**-digits * exact.abs() + 1e-6 * sum(term.abs() for term in terms) + 1e-7
        assert seen[target].dtype == dtype
        assert ((seen[target].double() - exact).abs() <= bound).all()


@each_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_costs_no_more_with_forecasts_than_without(pipe, dtype, method):
    def images(pipe):
        with hasten.accelerate(pipe, method, interval=3):
            fast = draw(pipe)
        assert fast.dtype == pipe.transformer.dtype
        return draw(pipe).float(), fast.float()

    plain, fast = images(pipe)
    half_plain, half_fast = images(make_pipe().to(dtype))
    assert (half_fast - fast).norm() < 2 * (half_plain - plain).norm()
    assert (half_fast - half_plain).norm() < (fast - plain).norm() + 2 * (half_plain - plain).norm()


# --- image-to-image and few steps


def redraw(pipe, steps, strength, **kwargs):
    return draw(pipe, steps, image=randn(1, 12, 16, 16), strength=strength, **kwargs)


@pytest.mark.parametrize("site", SITES)
def test_image_to_image_counts_from_its_first_step(pipe, site):
    pipe = rebuilt(FluxImg2ImgPipeline, pipe)
    plain = redraw(pipe, 20, 0.6)
    with hasten.accelerate(pipe, "taylorseer", interval=4, site=site) as run:
        fast = redraw(pipe, 20, 0.6)
        assert [r.step for r in run.records] == list(range(12))
        assert [r.step for r in run.records if r.computed] == computed_steps(Uniform(4, 3), 12)
        assert run.summary().steps == 12
        redraw(pipe, 20, 0.25, true_cfg_scale=2.0, negative_prompt="banana")  # no cache context in this pipeline
        assert run.summary().steps == 5
        assert run.summary().computed_steps == len(computed_steps(Uniform(4, 3), 5))
        assert torch.equal(redraw(pipe, 20, 0.6), fast)
    assert 0 < (fast - plain).norm() < 0.2 * plain.norm()


@pytest.mark.parametrize(("strength", "warned"), [(0.15, True), (0.6, False)])
def test_a_strength_that_leaves_nothing_to_skip_is_told(pipe, strength, warned):
    pipe = rebuilt(FluxImg2ImgPipeline, pipe)
    with hasten.accelerate(pipe, "hicache", interval=4), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        redraw(pipe, 20, strength)
    said = messages(caught)
    assert len(said) == warned
    assert all("run of 3 steps" in message for message in said)


def test_a_run_of_one_step_is_told_as_one(pipe):
    """Turbo models are called with one step."""
    with (
        hasten.accelerate(pipe, "reuse", warmup=1),
        pytest.warns(HastenWarning, match=r"skips nothing in a run of 1 step: all"),
    ):
        draw(pipe, 1)
    with hasten.accelerate(pipe, "reuse"), pytest.raises(ScheduleError, match=r"longer than the run of 1 step; use"):
        draw(pipe, 1)


@each_method
def test_few_step_models(pipe, method):
    with hasten.accelerate(pipe, method, warmup=1, interval=2) as run:
        fast = draw(pipe, 4)
        assert (run.summary().computed_steps, run.summary().steps) == (2, 4)
        assert torch.isfinite(fast).all()
    with hasten.accelerate(pipe, method) as run:
        draw(pipe, 4)
        assert run.summary().computed_steps == 3
        with pytest.warns(HastenWarning, match="skips nothing in a run of 3 steps.*warmup"):
            draw(pipe, 3)
        with pytest.raises(ScheduleError, match="longer than the run of 2 steps; use warmup=1"):
            draw(pipe, 2)


# --- two experts


def make_wan():
    high, low = build("WanTransformer3DModel"), build("WanTransformer3DModel")
    with torch.no_grad():
        for parameter in low.parameters():
            parameter.mul_(0.9)
    pipe = WanPipeline(
        None, None, None, FlowMatchEulerDiscreteScheduler(shift=3.0), high, transformer_2=low, boundary_ratio=0.7
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def film(pipe, steps=16):
    text = {"prompt_embeds": randn(1, 5, 32), "negative_prompt_embeds": randn(1, 5, 32, seed=1)}
    size = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": steps, "guidance_scale": 2.0}
    return pipe(**text, **size, output_type="latent", generator=torch.Generator().manual_seed(0)).frames


def per_expert(run):
    """Steps and computed steps of each transformer, in order."""
    parts, previous = [], None
    for record in run.records:
        if previous is None or record.step < previous:
            parts.append({})
        parts[-1][record.step] = parts[-1].get(record.step, True) and record.computed
        previous = record.step
    return [[step for step, _ in part.items()] for part in parts], [[s for s, f in p.items() if f] for p in parts]


@pytest.mark.parametrize(
    ("method", "steps", "computed"),
    [
        ("foca:computed_steps=4", 12, ([0, 1, 2], [0])),  # of 0, 1, 2, 11 in the whole run
        ("foca:schedule=even:computed_steps=5", 16, ([0, 4, 8], [0, 6])),  # 0, 4, 8, 11, 15; the fourth moves to 9
        ("foca:schedule=even:computed_steps=2", 16, ([0], [0])),
        ("taylorseer:steps=0/1/2/6/12", 16, ([0, 1, 2, 6], [0])),
        ("hicache:interval=4:schedule=auto", 16, ([0, 2, 5, 8], [0, 5])),  # 0, 2, 5, 8, 11, 14; the fifth moves to 9
        ("hicache:interval=4:schedule=auto", 4, ([0, 1], [0])),  # three of four: 0, 1, 3
        ("hicache:interval=4:schedule=even", 4, ([0], [0, 1])),  # 0, 2, 3
    ],
)
def test_a_budget_is_for_the_whole_run_of_two_experts(method, steps, computed):
    pipe = make_wan()
    with hasten.accelerate(pipe, *registry.parse(method)) as run:
        film(pipe, steps)
    parts, full = per_expert(run)
    assert sum(map(len, parts)) == steps
    assert full == list(computed)


def test_a_budget_that_no_run_has_is_refused_before_the_first_forward():
    pipe = make_wan()
    called = []
    pipe.transformer.register_forward_pre_hook(lambda *_: called.append(1))
    hasten.accelerate(pipe, "foca", schedule="even", computed_steps=9)
    with pytest.raises(ScheduleError, match="more than the 8 steps"):
        film(pipe, 8)
    assert not called


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_default_serves_runs_that_are_shorter_than_its_warm_up(steps):
    pipe = make_wan()
    plain = film(pipe, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HastenWarning)  # that nothing is skipped
        with hasten.accelerate(pipe):
            assert torch.equal(film(pipe, steps), plain)


@pytest.mark.parametrize("site", SITES)
@each_method
def test_two_experts_have_their_own_warm_up_and_one_summary(method, site):
    pipe = make_wan()
    plain = film(pipe)
    before = footprint(pipe.transformer), footprint(pipe.transformer_2)
    run = hasten.accelerate(pipe, method, interval=4, site=site)
    fast = film(pipe)
    steps, full = per_expert(run)
    assert steps == [list(range(9)), list(range(7))]
    assert full == [computed_steps(Uniform(4, 3), 9), computed_steps(Uniform(4, 3), 7)]
    summary = run.summary()
    assert (summary.steps, summary.computed_steps, summary.skipped_steps) == (16, 8, 8)
    assert summary.passes == ("cond", "uncond")
    assert torch.equal(film(pipe), fast)
    assert 0 < (fast - plain).norm() < 0.2 * plain.norm()
    run.remove()
    assert (footprint(pipe.transformer), footprint(pipe.transformer_2)) == before
    assert torch.equal(film(pipe), plain)


def test_each_expert_computes_its_own_last_step():
    pipe = make_wan()
    with hasten.accelerate(pipe, "taylorseer", interval=4, schedule="last") as run:
        film(pipe)
    steps, full = per_expert(run)
    assert [part[-1] for part in full] == [part[-1] for part in steps]


# --- guidance

FLUX = "FluxTransformer2DModel"
TEXTS = {name: 3 * randn(1, 5, 32, seed=seed) for seed, name in enumerate(["cond", "uncond", "other"])}


@torch.no_grad()
def guided(model, passes, named, steps=12):
    """A pipeline's loop with true guidance: `passes(i)` says which forwards step `i` makes, in order."""
    x = randn(*TINY[FLUX].latent, seed=1)
    for i in range(steps):
        given = TINY[FLUX].arguments(x, 1 - i / steps)
        velocity = {}
        for name in passes(i):
            with model.cache_context(name) if named else nullcontext():
                velocity[name] = first(model(**{**given, "encoder_hidden_states": TEXTS[name]}))
        guide = sum(velocity["cond"] - v for v in velocity.values())
        x = x - 0.03 * (velocity["cond"] + 2 * guide)
    return x


PASSES = {
    "in part of the steps": lambda i: ["cond", "uncond"] if 3 <= i < 8 else ["cond"],
    "three": lambda i: ["cond", "uncond", "other"],
    "the third in part of the steps": lambda i: ["cond", "uncond", "other"] if i in (4, 5) else ["cond", "uncond"],
    "off in the end": lambda i: ["cond", "uncond"] if i < 6 else ["cond"],
}
SWAPPED = {
    "swapped in mid-run": lambda i: ["cond", "uncond"] if i < 6 else ["uncond", "cond"],
    "unconditional first in part of the steps": lambda i: ["uncond", "cond"] if 3 <= i < 8 else ["cond"],
}


@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
@each_method
def test_guidance_without_names_is_guidance_with_names(method, passes):
    model = build(FLUX)
    plain = guided(model, passes, named=False)
    with hasten.accelerate(model, method, interval=4) as run:
        named = guided(model, passes, named=True)
        assert run.summary().computed_steps == len(computed_steps(Uniform(4, 3), 12))
        run.reset()
        assert torch.equal(guided(model, passes, named=False), named)
        assert run.summary().computed_steps == len(computed_steps(Uniform(4, 3), 12))
    assert 0 < (named - plain).norm() < 0.1 * plain.norm()


@pytest.mark.parametrize("passes", SWAPPED.values(), ids=SWAPPED)
def test_named_passes_may_come_in_any_order(passes):
    model = build(FLUX)
    with hasten.accelerate(model, "taylorseer", interval=4):
        swapped = guided(model, passes, named=True)
        ordered = guided(model, lambda i: sorted(passes(i)), named=True)
    assert torch.equal(swapped, ordered)


@pytest.mark.xfail(strict=True, reason="without a cache context passes are told apart by their order alone")
@pytest.mark.parametrize("passes", SWAPPED.values(), ids=SWAPPED)
def test_unnamed_passes_may_come_in_any_order(passes):
    model = build(FLUX)
    with hasten.accelerate(model, "taylorseer", interval=4):
        named = guided(model, passes, named=True)
        assert torch.allclose(guided(model, passes, named=False), named, atol=1e-5)


def test_a_pass_without_a_name_that_is_left_out_is_told():
    model = build(FLUX)

    def passes(step):
        return ["uncond", "cond"] if step < 6 else ["cond"]

    with hasten.accelerate(model, "taylorseer", interval=4):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            guided(model, passes, named=True)
            guided(model, lambda _: ["cond", "uncond"], named=False)
        with pytest.warns(HastenWarning, match=r"fewer passes.*Name the passes"):
            guided(model, passes, named=False)


def make_sd3():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = StableDiffusion3Pipeline(build("SD3Transformer2DModel"), scheduler, *[None] * 7)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(pipe, **kwargs):
    text = {"prompt_embeds": randn(1, 5, 32), "pooled_prompt_embeds": randn(1, 32, seed=2)}
    text |= {f"negative_{name}": -value for name, value in text.items()}
    size = {"height": 64, "width": 64, "num_inference_steps": 12, "guidance_scale": 3.0, "output_type": "latent"}
    return pipe(**{**text, **size, "generator": torch.Generator().manual_seed(0), **kwargs}).images


def test_guided_sigma_serves_guidance_that_a_transformer_gets_in_one_batch():
    pipe = make_sd3()

    def one(sigma, guided_sigma, **call):
        with hasten.accelerate(pipe, "hicache", sigma=sigma, guided_sigma=guided_sigma, order=1, interval=3):
            return paint(pipe, **call)

    between = hasten.HiCache(sigma=0.7, guided_sigma=0.3).guided(2.0).sigma
    for scale, sigma in ((7.5, 0.3), (2.0, between), (1.0, 0.7)):
        assert torch.equal(one(0.7, 0.3, guidance_scale=scale), one(sigma, None, guidance_scale=scale))
    assert not torch.equal(one(0.3, None), one(0.7, None))


@pytest.mark.parametrize("site", SITES)
@each_method
def test_fused_guidance_is_one_pass(method, site):
    pipe = make_sd3()
    plain = paint(pipe)
    with hasten.accelerate(pipe, method, interval=4, site=site) as run:
        fast = paint(pipe)
        assert run.summary().passes == ("pass0",)
        assert run.summary().computed_steps == len(computed_steps(Uniform(4, 3), 12))
    assert 0 < (fast - plain).norm() < 0.2 * plain.norm()
    assert torch.equal(paint(pipe), plain)


def test_fused_guidance_may_end_in_mid_run():
    def end_guidance(pipe, step, _timestep, kwargs):
        if step != 3:
            return kwargs
        pipe._guidance_scale = 0.0
        return {k: v if k == "latents" else v[1:] for k, v in kwargs.items()}

    inputs = ["latents", "prompt_embeds", "pooled_prompt_embeds"]
    ends = {"callback_on_step_end": end_guidance, "callback_on_step_end_tensor_inputs": inputs}
    pipe = make_sd3()
    plain = paint(pipe, **ends)
    with hasten.accelerate(pipe, "taylorseer", interval=4) as run:
        fast = paint(pipe, **ends)
    # Step 4 has a batch of one for the first time.
    assert [r.step for r in run.records if r.computed] == sorted({*computed_steps(Uniform(4, 3), 12), 4})
    assert {r.run for r in run.records} == {0}
    assert 0 < (fast - plain).norm() < 0.2 * plain.norm()


@pytest.mark.parametrize(("start", "stop"), [(0.0, 1.0), (0.2, 0.6)])
def test_skip_layer_guidance_saves_as_much_as_none(start, stop):
    """SD3.5 makes a second call of one image beside the fused one of two."""
    guidance = {"skip_guidance_layers": [1], "skip_layer_guidance_start": start, "skip_layer_guidance_stop": stop}
    pipe = make_sd3()
    plain = paint(pipe, **guidance)
    with hasten.accelerate(pipe, "taylorseer", interval=4) as run:
        fast = paint(pipe, **guidance)
        by_pass = {
            name: [r.step for r in run.records if r.pass_name == name and r.computed] for name in ("pass0", "pass1")
        }
    assert by_pass["pass0"] == computed_steps(Uniform(4, 3), 12)
    assert len(by_pass["pass1"]) < 6
    assert 0 < (fast - plain).norm() < 0.2 * plain.norm()


# --- callbacks and threads


@pytest.mark.filterwarnings("ignore:.*skipped nothing in a run of 2 steps")
@pytest.mark.parametrize("at", [1, 4])
@each_method
def test_an_interrupted_run_leaves_nothing_to_the_next(pipe, method, at):
    def interrupt(pipe, step, _timestep, kwargs):
        pipe._interrupt = step == at
        return kwargs

    with hasten.accelerate(pipe, method, interval=3) as run:
        right = draw(pipe)
        draw(pipe, callback_on_step_end=interrupt)
        assert run.summary().steps == at + 1
        assert torch.equal(draw(pipe), right)
        assert run.summary().steps == 12


def test_callbacks_that_change_the_latents_act_as_ever(pipe):
    def blend(_pipe, step, _timestep, kwargs):  # as inpainting does it
        return {"latents": torch.cat([kwargs["latents"][:, :32], randn(1, 32, 48) * (1 - step / 12)], 1)}

    plain = draw(pipe, callback_on_step_end=blend)
    assert not torch.allclose(plain, draw(pipe))
    with hasten.accelerate(pipe, "taylorseer", interval=1):
        assert torch.equal(draw(pipe, callback_on_step_end=blend), plain)
    with hasten.accelerate(pipe, "taylorseer", interval=3):
        fast = draw(pipe, callback_on_step_end=blend)
    assert torch.equal(fast[:, 32:], plain[:, 32:])
    assert 0 < (fast - plain).norm() < 0.2 * plain.norm()


def test_two_pipelines_in_two_threads():
    pipes = [make_pipe(0), make_pipe(1)]
    runs = [
        hasten.accelerate(pipe, method, interval=3) for pipe, method in zip(pipes, ["hicache", "foca"], strict=True)
    ]
    alone = [draw(pipe, 24) for pipe in pipes]
    together, start = [[], []], threading.Barrier(2)

    def work(i):
        start.wait()
        together[i].extend(draw(pipes[i], 24) for _ in range(3))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, run in enumerate(runs):
        assert len(together[i]) == 3
        assert all(torch.equal(image, alone[i]) for image in together[i])
        assert len(run.records) == 4 * 24
        run.remove()


# --- use that was not meant


def test_another_transformer_put_into_the_pipeline_runs_as_it_is(pipe):
    other = make_pipe(1).transformer
    plain, expected = draw(pipe), draw(rebuilt(type(pipe), pipe, transformer=other))
    before = footprint(pipe.transformer)
    run = hasten.accelerate(pipe, "hicache", interval=3)
    draw(pipe)
    accelerated, pipe.transformer = pipe.transformer, other
    assert torch.equal(draw(pipe), expected)
    assert len(run.records) == 12  # the records are those of the transformer that was accelerated
    run.remove()
    assert footprint(accelerated) == before
    pipe.transformer = accelerated
    assert torch.equal(draw(pipe), plain)


def replica(model):
    """What `nn.DataParallel` makes of each module of a model, for each device."""
    return model._replicate_for_data_parallel()


@pytest.mark.parametrize("make_copy", [copy.deepcopy, pickle.dumps, replica], ids=["deepcopy", "pickle", "replica"])
def test_an_accelerated_transformer_refuses_to_be_copied(pipe, make_copy):
    with hasten.accelerate(pipe, "reuse", interval=3), pytest.raises(HastenError, match=r"remove\(\)"):
        make_copy(pipe.transformer)


def test_what_spreads_a_transformer_over_devices_is_named(pipe):
    around = nn.DataParallel(pipe.transformer)
    pipe.transformer = around
    for target in (pipe, around):
        with pytest.raises(TargetError, match=r"inside of a DataParallel, .* a pipeline of its own"):
            hasten.accelerate(target, "reuse", interval=3)


def test_a_copy_made_before_or_after_is_a_model_of_its_own(pipe):
    plain = draw(pipe)
    before = copy.deepcopy(pipe.transformer)
    with hasten.accelerate(pipe, "reuse", interval=3):
        fast = draw(pipe)
        assert torch.equal(draw(rebuilt(type(pipe), pipe, transformer=before)), plain)
    after = rebuilt(type(pipe), pipe, transformer=copy.deepcopy(pipe.transformer))
    with hasten.accelerate(after, "reuse", interval=3):
        assert torch.equal(draw(after), fast)
        assert torch.equal(draw(pipe), plain)
