"""Numbers: the range of a dtype, autocast, gradients, and guidance that leaves out the layers that a gate looks at."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from pipelines import draw, make_pipe
from tiny import TINY, build, first
from torch import nn

import hasten
from hasten.caching.sums import finite
from hasten.errors import HastenWarning

FORECASTS = ["reuse", "taylorseer", "hicache", "foca", "ab-cache", "spectrum", "dmd"]
GATED = ["fbcache", "teacache", "speca", "easycache"]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def messages(caught):
    return [str(w.message) for w in caught if issubclass(w.category, HastenWarning)]


# --- range


class Growing(nn.Module):
    """A block whose output grows to the end of float16's range, where diffusers' blocks clip it."""

    level = 0.5

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        encoder, hidden = self.block(*args, **kwargs)
        scaled = hidden.float() / hidden.float().abs().amax() * 60000 * Growing.level
        return encoder, scaled.clamp(-65504, 65504).to(hidden.dtype)


def grow(_pipe, step, _timestep, kwargs):
    Growing.level = 0.5 + 0.55 * min(1, (step + 1) / 8)
    return kwargs


@pytest.mark.parametrize("method", [*FORECASTS, "fbcache", "speca"])
def test_forecasts_stay_in_float16s_range(method):
    pipe = make_pipe().to(torch.float16)
    blocks = pipe.transformer.single_transformer_blocks
    blocks[-1] = Growing(blocks[-1])
    params = {"threshold": 10.0, "order": 2} if method in GATED else {}
    latents = []
    for accelerated in (False, True):
        Growing.level = 0.5
        if accelerated:
            with hasten.accelerate(pipe, method, interval=4, **params) as run:
                latents.append(draw(pipe, callback_on_step_end=grow))
                assert run.summary().skipped_steps
        else:
            latents.append(draw(pipe, callback_on_step_end=grow))
    assert torch.isfinite(latents[0]).all()
    assert torch.isfinite(latents[1]).all()


def test_finite_clips_float16_alone_in_place():
    over = torch.tensor([float("inf"), -float("inf"), 3.0], dtype=torch.float16)
    assert finite(over) is over
    assert over.tolist() == [65504.0, -65504.0, 3.0]
    for dtype in (torch.bfloat16, torch.float32):
        kept = torch.tensor([float("inf")], dtype=dtype)
        assert finite(kept) is kept


# --- autocast


@pytest.mark.parametrize(("method", "site"), [*((m, "hidden") for m in FORECASTS), ("taylorseer", "output"),
                                              ("taylorseer", "module"), ("fbcache", "hidden"), ("teacache", "hidden"),
                                              ("speca", "hidden"), ("easycache", "output")])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_costs_no_more_with_forecasts_than_without(method, site, dtype):
    pipe = make_pipe()
    params = {"threshold": 0.4} if method in GATED else {}
    plain = draw(pipe)
    with torch.autocast("cpu", dtype):
        mixed = draw(pipe)
        with hasten.accelerate(pipe, method, interval=1, site=site, **params):
            assert torch.equal(draw(pipe), mixed)
        with hasten.accelerate(pipe, method, interval=4, site=site, **params) as run:
            mixed_fast = draw(pipe)
            computed = [r.step for r in run.records if r.computed]
    with hasten.accelerate(pipe, method, interval=4, site=site, **params) as run:
        fast = draw(pipe)
        same = computed == [r.step for r in run.records if r.computed]
    assert len(computed) < 12
    assert mixed_fast.dtype == mixed.dtype
    assert torch.isfinite(mixed_fast).all()
    if same:  # a gate may decide otherwise
        assert (mixed_fast - fast).norm() < 3 * (mixed - plain).norm() + 0.02 * plain.norm()


@pytest.mark.parametrize("method", ["freqca", "svdcache", "hyca", "l2p"])
def test_autocast_with_components_and_calibrations(method):
    pipe = make_pipe()
    params = {"interval": 4}
    if method != "freqca":
        calls = [{"prompt": p, "num_inference_steps": 12, "height": 32, "width": 32, "max_sequence_length": 8,
                  "generator": torch.Generator().manual_seed(0)} for p in ("red apple", "blue car")]  # fmt: skip
        params["calibration"] = hasten.fit(hasten.record(pipe, calls), method)
    with hasten.accelerate(pipe, method, **params):
        fast = draw(pipe)
    plain = draw(pipe)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = draw(pipe)
        with hasten.accelerate(pipe, method, **params) as run:
            mixed_fast = draw(pipe)
            assert run.summary().skipped_steps
    assert (mixed_fast - fast).norm() < 3 * (mixed - plain).norm() + 0.02 * plain.norm()


def test_autocast_that_is_switched_on_in_mid_run_starts_the_features_again(pipe):
    context = torch.autocast("cpu", torch.bfloat16)

    def switch(_pipe, step, _timestep, kwargs):
        if step == 5:
            context.__enter__()
        return kwargs

    with hasten.accelerate(pipe, "taylorseer", steps=(0, 1, 2, 9)) as run:
        try:
            draw(pipe, callback_on_step_end=switch)
        finally:
            context.__exit__(None, None, None)
    # The latents follow a step later in the dtype of the mixed precision.
    assert [r.step for r in run.records if r.reason == "nothing to forecast from"] == [6, 7]


# --- gradients


def optimise(method, checkpointing, training=True, site="hidden"):
    """Loss and a gradient of a few optimisation steps at random times."""
    torch.manual_seed(0)
    model = build("FluxTransformer2DModel").train(training)
    if checkpointing:
        model.enable_gradient_checkpointing()
    if method is not None:
        hasten.accelerate(model, method, interval=4, site=site)
    generator, out = torch.Generator().manual_seed(0), []
    for _ in range(6):
        time, x = float(torch.rand((), generator=generator)), torch.randn(1, 16, 4, generator=generator)
        model.zero_grad()
        loss = first(model(**TINY["FluxTransformer2DModel"].arguments(x, time))).square().mean()
        loss.backward()
        out.append((float(loss), float(model.transformer_blocks[0].attn.to_q.weight.grad.norm())))
    return out


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("method", "site"), [("taylorseer", "hidden"), ("reuse", "output"), ("fbcache", "hidden")])
def test_calls_with_gradients_are_computed_with_one_warning(method, site, checkpointing, training):
    plain = optimise(None, checkpointing, training)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert optimise(method, checkpointing, training, site) == plain
    (message,) = messages(caught)
    assert "gradients" in message
    assert "no_grad" in message


def test_an_optimisation_step_in_mid_run_disturbs_no_run(pipe):
    model, arguments = pipe.transformer, {}
    model.register_forward_pre_hook(lambda _m, _a, kwargs: arguments.update(kwargs), with_kwargs=True)

    def train(_pipe, step, _timestep, kwargs):
        if step == 5:
            with torch.enable_grad():
                model(**{**arguments, "timestep": torch.rand(1)})[0].mean().backward()
        return kwargs

    with hasten.accelerate(pipe, "taylorseer", interval=4) as run, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        right = draw(pipe)
        assert torch.equal(draw(pipe, callback_on_step_end=train), right)
    assert len(run.records) == 24


def test_sampling_in_training_mode_without_gradients_is_accelerated(pipe):
    pipe.transformer.train()
    with hasten.accelerate(pipe, "taylorseer", interval=4) as run:
        draw(pipe)
        assert run.summary().skipped_steps


# --- guidance that leaves out layers


def stable_diffusion():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = StableDiffusion3Pipeline(build("SD3Transformer2DModel"), scheduler, *[None] * 7)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def skip_layers(pipe, layers, steps=12, **kwargs):
    text = {"prompt_embeds": randn(1, 5, 32), "pooled_prompt_embeds": randn(1, 32, seed=2)}
    text |= {f"negative_{name}": -value for name, value in text.items()}
    guidance = {"guidance_scale": 3.0, "skip_guidance_layers": layers, "skip_layer_guidance_start": 0.0}
    size = {"height": 64, "width": 64, "num_inference_steps": steps, "output_type": "latent"}
    return pipe(
        **text, **guidance, **size, skip_layer_guidance_stop=0.8, generator=torch.Generator().manual_seed(0), **kwargs
    ).images


LAYERS = [[0], [1], [3], [0, 1], [0, 1, 2, 3]]
SKIPPING = [
    ("taylorseer", {}),
    ("taylorseer", {"site": "module"}),
    ("taylorseer", {"site": "output"}),
    ("fbcache", {"threshold": 0.5}),
    ("fbcache", {"threshold": 0.5, "front": 2}),
    ("teacache", {"threshold": 0.5}),
    ("speca", {}),
    ("easycache", {"threshold": 0.3}),
]


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize(("method", "params"), SKIPPING)
def test_skip_layer_guidance_is_served_by_every_method(method, params, layers):
    pipe = stable_diffusion()
    plain = skip_layers(pipe, layers)
    with hasten.accelerate(pipe, method, interval=1, **params):
        assert torch.equal(skip_layers(pipe, layers), plain)
    with hasten.accelerate(pipe, method, interval=4, **params) as run:
        fast = skip_layers(pipe, layers)
        assert torch.equal(skip_layers(pipe, layers), fast)
        assert run.summary().skipped_steps
    assert (fast - plain).norm() < 0.4 * plain.norm()
    assert torch.equal(skip_layers(pipe, layers), plain)


@pytest.mark.parametrize("method", ["taylorseer", "fbcache", "speca"])
def test_a_forecast_that_the_forward_has_no_place_for_is_computed(method):
    """The layers that are left out may change from step to step, under one name of the pass."""
    model, name = build("SD3Transformer2DModel"), "SD3Transformer2DModel"
    last = len(model.transformer_blocks) - 1

    def run():
        out = []
        for i in range(8):
            arguments = TINY[name].arguments(randn(*TINY[name].latent, seed=1) * (1 - 0.05 * i), 1 - i / 8)
            skip = [last] if i in (5, 6) else None
            out.append(first(model(**arguments, skip_layers=skip)))
        return out

    with torch.no_grad():
        plain = run()
        params = {"threshold": 10.0} if method in GATED else {"warmup": 1}
        with hasten.accelerate(model, method, interval=8, **params) as handle:
            fast = run()
    assert [r.step for r in handle.records if r.reason == "the forward has no place for a forecast"] == [5, 6]
    for step in (5, 6):
        assert torch.equal(fast[step], plain[step])
