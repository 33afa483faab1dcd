"""Fresco and what it is compared with: pipelines that begin coarse and refine region by region."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from pipelines import draw, make_pipe
from test_variants import VARIANTS, run_once
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import hasten
from hasten import RALU, Bottleneck, Fresco, Spectral
from hasten.errors import AdapterError, AlreadyAcceleratedError, ConfigError, HastenError, ScheduleError, TargetError
from hasten.resolution import RegionMethod, fit_stages
from hasten.resolution.layouts import PixelLayout
from hasten.resolution.methods.fresco import relative_change
from hasten.resolution.packed import _of_images
from hasten.resolution.regions import PromotionInput

pipeline_qwenimage_edit_plus = pytest.importorskip(  # not in diffusers 0.35
    "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus"
)

METHODS = {
    "fresco": Fresco(stages=(3, 3, 3), jump="r1"),
    "fresco r2": Fresco(stages=(3, 3, 3), jump="r2"),
    "fresco, two promotions": Fresco(stages=(2, 2, 2, 3), shares=(0.25, 0.5), units="hr_units"),
    "bottleneck": Bottleneck(stages=(4, 5)),
    "ralu": RALU(stages=fit_stages((3, 3, 3), (0.7, 0.55, 0.0)), share=0.25),
    "spectral": Spectral(stages=(4, 5)),
}
STEPS = 9
GUIDED = {"true_cfg_scale": 3.0, "negative_prompt": "green leaf"}


@pytest.fixture
def pipe() -> Any:
    return make_pipe()


def generate(pipe: Any, steps: int = STEPS, **kwargs: Any) -> Tensor:
    return draw(pipe, steps, **{"height": 64, "width": 64, **kwargs})


# --- identity and removal


@pytest.mark.parametrize("guided", [{}, GUIDED], ids=["plain", "guided"])
def test_everything_fine_from_the_start_is_the_plain_pipeline(pipe: Any, guided: dict[str, Any]) -> None:
    plain = generate(pipe, **guided)
    with hasten.accelerate(pipe, Fresco(stages=(0, 4, 5), shares=(0.3,))) as run:
        assert torch.equal(generate(pipe, **guided), plain)
    assert [(record.coarse, record.fine) for record in run.stages.records] == [(0, 256)] * STEPS


@pytest.mark.parametrize("name", METHODS)
def test_stages_layouts_and_removal(pipe: Any, name: str) -> None:
    method, plain = METHODS[name], generate(pipe, **GUIDED)
    signature = inspect.signature(pipe.scheduler.step)
    run = hasten.accelerate(pipe, method)
    assert inspect.signature(pipe.scheduler.step) == signature
    first = generate(pipe, **GUIDED)
    assert first.shape == plain.shape
    assert first.isfinite().all()
    assert not torch.equal(first, plain)
    assert torch.equal(generate(pipe, **GUIDED), first)
    records = [record for record in run.stages.records if record.run == 1]
    assert [record.step for record in records] == list(range(STEPS))
    assert records[0].coarse == 64
    assert records[0].fine == 0
    assert records[-1].coarse == 0
    assert records[-1].fine == 256
    for before, after in pairwise(records):
        assert before.next_sigma == after.sigma
        assert before.switched == (after.coarse < before.coarse)
        assert after.fine - before.fine == 4 * (before.coarse - after.coarse)
        assert before.switched or before.next_sigma < before.sigma
    layouts = [layout.fine for layout in run.stages.plans if layout.run == 1]
    assert len(layouts) == sum(record.switched for record in records)
    assert layouts[-1].all()
    run.remove()
    assert torch.equal(generate(pipe, **GUIDED), plain)
    assert "step" not in vars(pipe.scheduler)
    assert "forward" not in vars(pipe.transformer)
    assert not getattr(getattr(pipe.transformer, "_diffusers_hook", None), "hooks", {})


def test_a_share_that_rises_promotes_more_of_the_same_tokens(pipe: Any) -> None:
    with hasten.accelerate(pipe, METHODS["fresco, two promotions"]) as run:
        generate(pipe)
    first, second, last = (layout.fine for layout in run.stages.plans)
    assert (int(first.sum()), int(second.sum()), int(last.sum())) == (16, 32, 64)
    assert not (first & ~second).any()


def test_the_coarse_stage_is_the_plain_pipeline_at_half_size(pipe: Any) -> None:
    """Nothing is promoted before the last step: the coarse latents are those of a run at half size."""
    seen: list[Tensor] = []
    noise = torch.randn(1, 256, 48, generator=torch.Generator().manual_seed(5))
    pixels = PixelLayout.of(pipe.vae)
    assert pixels.factor == 2
    low = 2 * pixels.shrink(noise, (16, 16))
    small: list[Tensor] = []
    pipe.scheduler.register_to_config(use_dynamic_shifting=False, shift=3.0)
    pipe.scheduler.set_shift(3.0)

    def keep(into: list[Tensor]) -> Any:
        def callback(_: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            into.append(tensors["latents"].clone())
            return {}

        return callback

    draw(pipe, STEPS, latents=low, callback_on_step_end=keep(small))
    with hasten.accelerate(pipe, Bottleneck(stages=(8, 1))):
        generate(pipe, latents=noise, callback_on_step_end=keep(seen))
    shown, own = pixels.to_pixels(seen[6], (16, 16)), pixels.to_pixels(small[6], (8, 8))
    assert torch.allclose(shown[..., ::2, ::2], own, atol=1e-5)
    assert torch.equal(shown[..., ::2, ::2], shown[..., 1::2, 1::2])
    assert {tuple(latents.shape) for latents in seen} == {(1, 256, 48)}


@pytest.mark.parametrize("name", METHODS)
def test_after_every_step_a_state_has_the_signal_and_the_noise_of_its_level(pipe: Any, name: str) -> None:
    """The model says that the image is grey everywhere: whatever else is in a state is noise."""
    grey = 100.0
    pipe.transformer.forward = lambda *_, hidden_states, timestep, **__: (
        (hidden_states - grey) / timestep.view(-1, 1, 1),
    )
    found: list[tuple[float, float]] = []

    def measure(_: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found.append((float(tensors["latents"].mean()), float(tensors["latents"].std())))
        return {}

    with hasten.accelerate(pipe, METHODS[name]) as run:
        generate(pipe, callback_on_step_end=measure)
    assert any(record.switched for record in run.stages.records)
    for (mean, std), record in zip(found, run.stages.records, strict=True):
        assert mean == pytest.approx((1 - record.next_sigma) * grey, abs=0.1), record
        assert std == pytest.approx(record.next_sigma, rel=0.08, abs=1e-3), record


# --- what a promotion does


@pytest.mark.parametrize("score", ["temporal_low", "temporal_high", "channel_low", "channel_high", "edges", "random"])
def test_scores(pipe: Any, score: Any) -> None:
    with hasten.accelerate(pipe, Fresco(stages=(3, 3, 3), score=score)) as run:
        generate(pipe)
    assert int(run.stages.plans[0].fine.sum()) == 19


def test_opposite_scores_choose_other_tokens(pipe: Any) -> None:
    chosen = []
    for score in ("temporal_low", "temporal_high"):
        with hasten.accelerate(pipe, Fresco(stages=(3, 3, 3), score=score)) as run:
            generate(pipe)
        chosen.append(run.stages.plans[0].fine)
    assert not (chosen[0] & chosen[1]).any()


NOISY = {
    "fresco, fresh noise": Fresco(stages=(3, 3, 3), jump="r1", noise="independent"),
    "fresco, by chance": Fresco(stages=(3, 3, 3), score="random"),
    "fresco, edges": Fresco(stages=(3, 3, 3), score="edges"),
}


@pytest.mark.parametrize("guided", [{}, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("name", [*METHODS, *NOISY])
def test_images_of_a_batch_are_as_when_generated_alone(pipe: Any, name: str, guided: dict[str, Any]) -> None:
    prompts = ["red apple", "blue car", "red apple"]

    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    with hasten.accelerate(pipe, (METHODS | NOISY)[name]) as run:
        alone = torch.cat([generate(pipe, prompt=prompts[i], generator=generators(i), **guided) for i in range(3)])
        together = generate(pipe, prompt=prompts, generator=generators(0, 1, 2), **guided)
        turned = generate(pipe, prompt=prompts[::-1], generator=generators(2, 1, 0), **guided)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(turned, alone.flip(0), atol=1e-4, rtol=1e-4)
    layouts = [layout for layout in run.stages.plans if layout.run == 3 and layout.step == run.stages.plans[0].step]
    assert [layout.image for layout in layouts] == [0, 1, 2]
    if not layouts[0].fine.all():
        assert not torch.equal(layouts[0].fine, layouts[1].fine)


def test_images_of_a_batch_with_the_same_tokens_share_a_forward(pipe: Any) -> None:
    batches: list[int] = []
    pipe.transformer.x_embedder.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    with hasten.accelerate(pipe, METHODS["fresco"]):
        generate(pipe, prompt=["red apple"] * 3, generator=[torch.Generator().manual_seed(seed) for seed in (0, 1, 0)])
    assert batches == [3] * 3 + [2, 1] * 3 + [3] * 3


def test_arguments_that_cannot_be_told_apart_by_image_are_refused() -> None:
    given = {"hidden_states": torch.zeros(2, 4, 8), "img_ids": torch.zeros(4, 3), "timestep": torch.zeros(2)}
    rest = _of_images(given, (1,), 2)
    assert {name: len(value) for name, value in rest.items()} == {"hidden_states": 1, "img_ids": 4, "timestep": 1}
    adapter = {"ip_adapter_image_embeds": [torch.arange(2.0)[:, None]], "scale": 0.5}
    rest = _of_images({**given, "joint_attention_kwargs": adapter}, (1,), 2)
    assert rest["joint_attention_kwargs"] == {"ip_adapter_image_embeds": [torch.tensor([[1.0]])], "scale": 0.5}
    with pytest.raises(AdapterError, match="called with residuals"):
        _of_images({**given, "residuals": torch.zeros(2, 4)}, (1,), 2)


def still_and_moving(steps: int, early: int = 0) -> PromotionInput:
    """Token 0 moves in all steps, token 1 in the first `early` ones, token 2 in none, token 3 a little in all."""
    snapshots = [torch.zeros(1, 4, 8) for _ in range(steps)]
    for step, tokens in enumerate(snapshots):
        tokens[:, 0] = step
        tokens[:, 1] = 5 * max(early - step, 0)
        tokens[:, 3] = 0.1 * step
    return PromotionInput(None, (2, 2), snapshots[-1], snapshots, 0.5, lambda: torch.empty(0))


def test_what_has_converged_is_promoted_first() -> None:
    low, high = (
        Fresco(score=score).scores(still_and_moving(6, early=2))[0] for score in ("temporal_low", "temporal_high")
    )
    assert low.argsort(descending=True, stable=True).tolist() == [1, 2, 3, 0]  # what moved long ago does not count
    assert high.argmax() == 0
    whole = Fresco(window=6).scores(still_and_moving(6, early=2))[0]
    assert whole.argmax() == 2


def test_flat_tokens_have_little_variance_over_their_channels() -> None:
    clean = torch.ones(1, 4, 8)
    clean[:, 2, ::2] = -1
    promotion = PromotionInput(None, (2, 2), clean, [], 0.5, lambda: torch.empty(0))
    assert Fresco(score="channel_high").scores(promotion).argmax() == 2
    assert Fresco(score="channel_low").scores(promotion).argmin() == 2


def test_what_the_variance_is_taken_of_decides(pipe: Any) -> None:
    coarse, velocity, clean = (torch.randn(1, 4, 8) for _ in range(3))
    chosen = {}
    for name, wanted in (("x0", clean), ("z", coarse), ("v", velocity)):
        method = Fresco(stages=(3, 3, 3), snapshot_of=name)  # type: ignore[arg-type]
        assert method.snapshot(coarse, velocity, clean) is wanted
        with hasten.accelerate(pipe, method) as run:
            generate(pipe)
        chosen[name] = run.stages.plans[0].fine
    assert not torch.equal(chosen["x0"], chosen["z"])
    assert not torch.equal(chosen["x0"], chosen["v"])


@pytest.mark.parametrize(("units", "mixed"), [("lr_units", 7.5), ("hr_units", 15.0)])
def test_positions_are_in_the_methods_frame_from_the_first_mixed_step_on(pipe: Any, units: Any, mixed: float) -> None:
    """On 16x16 tokens: the farthest position that the transformer is given at each step."""
    farthest: list[float] = []
    pipe.transformer.pos_embed.register_forward_pre_hook(lambda _, args: farthest.append(float(args[0].max())))
    with hasten.accelerate(pipe, Fresco(stages=(2, 2, 2), shares=(0.9,), units=units)):
        generate(pipe, 6)
    assert farthest == [7.0, 7.0, mixed, mixed, 15.0, 15.0]


def test_the_rewind_goes_back_as_far_as_it_must(pipe: Any) -> None:
    with hasten.accelerate(pipe, METHODS["fresco r2"]) as run:
        generate(pipe)
    with hasten.accelerate(pipe, METHODS["fresco"]) as other:
        generate(pipe)
    target, raised = other.stages.records[2].next_sigma, run.stages.records[2].next_sigma
    assert raised == pytest.approx(2 * target / (1 + target), abs=1e-5)
    assert run.stages.records[-1].next_sigma == 0


# --- what has settled


CHANCES = (3, 2, 2, 2)


def settling(threshold: float, **parameters: Any) -> Fresco:
    return Fresco(stages=CHANCES, jump="r1", threshold=threshold, **parameters)


def fine_after(run: Any, image: int = 0) -> list[int]:
    """Of the 64 coarse tokens how many are fine, after each stage but the last."""
    return [int(layout.fine.sum()) for layout in run.stages.plans if layout.image == image]


@pytest.mark.parametrize(("threshold", "expected"), [(1e6, [64]), (0.0, [0, 0, 64])], ids=["all at once", "none"])
def test_limits_of_the_threshold(pipe: Any, threshold: float, expected: list[int]) -> None:
    with hasten.accelerate(pipe, settling(threshold)) as run:
        latents = generate(pipe)
    assert fine_after(run) == expected
    switch = {1: 3, 3: 7}[len(expected)]
    with hasten.accelerate(pipe, Fresco(stages=(switch, STEPS - switch), jump="r1")):
        assert torch.equal(generate(pipe), latents)


def test_tokens_are_promoted_once_they_change_less_than_the_threshold(pipe: Any) -> None:
    """The model's estimate changes ever less from step to step, and in the lower rows more than in the upper ones."""
    changes: list[Tensor] = []
    signs = 3.0 * torch.tensor([1.0, -1.0]).repeat(24)

    def forward(*_: Any, hidden_states: Tensor, timestep: Tensor, img_ids: Tensor, **__: Any) -> tuple[Tensor]:
        sigma = timestep.view(-1, 1, 1)
        return ((hidden_states - signs - (img_ids[:, 1:2] + 4) * sigma**4) / sigma,)

    pipe.transformer.forward = forward

    class Looked(Fresco):
        def settled(self, promotion: PromotionInput, coarse: Tensor) -> Tensor:
            changes.append(relative_change(promotion.snapshots[-self.window :], coarse).reshape(coarse.shape))
            return super().settled(promotion, coarse)

    with hasten.accelerate(pipe, Looked(stages=CHANCES, jump="r1", threshold=0.0, window=2)):
        generate(pipe)
    threshold = float(changes[0].quantile(0.3))
    changes.clear()
    with hasten.accelerate(pipe, Looked(stages=CHANCES, jump="r1", threshold=threshold, window=2)) as run:
        generate(pipe)
    first, second, last = (layout.fine for layout in run.stages.plans)
    assert 0 < first.sum() < second.sum() < 64
    assert last.all()
    assert (changes[0][first] < threshold).all()
    assert (changes[0][~first] >= threshold).all()
    assert torch.equal(second, first | (changes[1] < threshold))
    tokens = [64 + 3 * int(fine.sum()) for fine in (first, second)]
    assert [record.tokens for record in run.stages.records] == [64] * 3 + tokens[:1] * 2 + tokens[1:] * 2 + [256] * 2
    assert [record.switched for record in run.stages.records] == [step in (2, 4, 6) for step in range(STEPS)]
    costs = [record.cost for record in run.stages.records]
    assert costs[0] < costs[3] < costs[5] < costs[7] == 1


def test_images_of_a_batch_settle_one_by_one(pipe: Any) -> None:
    with hasten.accelerate(pipe, settling(0.0)) as run:
        generate(pipe)
    seen: list[int] = []
    for threshold in (0.02, 0.05, 0.1, 0.2, 0.4, 0.8):  # one at which the two images differ
        with hasten.accelerate(pipe, settling(threshold, units="hr_units")) as run:
            alone = torch.cat([generate(pipe, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)])
            seen = [int(layout.fine.sum()) for layout in run.stages.plans if layout.step == 2]
            if len(seen) < 2 or seen[0] == seen[1]:
                continue
            generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
            together = generate(pipe, prompt=["red apple"] * 2, generator=generators)
            break
    assert seen[0] != seen[1]
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_a_change_is_relative_to_the_coarse_tokens_of_the_image() -> None:
    snapshots = list(still_and_moving(4).snapshots)
    every = torch.ones(2, 2, dtype=torch.bool)
    change = relative_change(snapshots, every)
    torch.testing.assert_close(relative_change([10 * tokens + 7 for tokens in snapshots], every), change)
    assert change[0].argsort(descending=True, stable=True).tolist() == [0, 3, 1, 2]
    assert change[0, 1:3].tolist() == [0, 0]
    others = torch.tensor([[False, True], [True, True]])  # the first is fine already: it is no part of the measure
    assert relative_change(snapshots, others)[0, 3] > 5 * change[0, 3]
    snapshots[-1] = snapshots[-1].clone()
    snapshots[-1][:, 0] = 1e6
    torch.testing.assert_close(
        relative_change(snapshots, others)[0, 3], relative_change(list(still_and_moving(4).snapshots), others)[0, 3]
    )


def test_a_preset_with_a_threshold_has_three_mixed_stages() -> None:
    for name, done in {"30": [11, 14, 17, 20], "18": [6, 8, 10, 12], "11": [3, 5, 6, 7], "9": [3, 4, 5, 6]}.items():
        method = Fresco(preset=name, jump="r1", threshold=0.1)  # type: ignore[arg-type]
        promotions = method.promotions(torch.empty(0), (16, 16))
        assert [promotion.after for promotion in promotions] == done
        assert [promotion.share for promotion in promotions] == [None] * 3 + [1.0]
        assert method.num_inference_steps == int(name)


# --- the weight of coarse tokens in attention


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_a_coarse_token_with_a_weight_of_four_draws_as_much_attention_as_four(pipe: Any, weight: float) -> None:
    """Each coarse token is put into the sequence four times: a forward without weights then says the same of it."""
    seen: list[tuple[dict[str, Any], Tensor]] = []
    handle = pipe.transformer.register_forward_hook(
        lambda _, __, kwargs, output: seen.append((kwargs, output[0])), with_kwargs=True
    )
    with hasten.accelerate(pipe, Fresco(stages=(2, 2, 2), shares=0.3, coarse_weight=weight)) as run:
        generate(pipe, 6)
    handle.remove()
    for (given, answer), record in zip(seen, run.stages.records, strict=True):
        mixed = record.coarse > 0 and record.fine > 0
        assert bool(given.get("joint_attention_kwargs")) == (mixed and weight != 1)
        if not mixed:
            continue
        order = torch.cat([torch.arange(record.coarse).repeat(4), torch.arange(record.coarse, record.tokens)])
        copied = {"hidden_states": given["hidden_states"][:, order], "img_ids": given["img_ids"][order]}
        with torch.no_grad():
            other = pipe.transformer(**{**given, **copied, "joint_attention_kwargs": None})[0]
        same = torch.allclose(other, answer[:, order], atol=1e-5, rtol=1e-4)
        assert same == (weight == 4)


def test_weights_do_not_change_what_is_counted(pipe: Any) -> None:
    counted = []
    for weight in (1.0, 4.0):
        counter = FlopCounterMode(display=False)
        with hasten.accelerate(pipe, Fresco(stages=(2, 2, 2), shares=0.3, coarse_weight=weight)) as run:
            with counter, sdpa_kernel(SDPBackend.MATH):
                generate(pipe, 6)
            counted.append((counter.get_total_flops(), run.stages.report().flops_ratio))
    assert counted[0] == counted[1]
    assert counted[0][0] > 0


def test_weights_keep_what_a_pipeline_says_of_its_attention_and_refuse_another_mask(pipe: Any) -> None:
    with hasten.accelerate(pipe, Fresco(stages=(2, 2, 2), shares=0.3, coarse_weight=4.0)):
        seen: list[Any] = []
        handle = pipe.transformer.register_forward_pre_hook(
            lambda _, __, kwargs: seen.append(kwargs["joint_attention_kwargs"]), with_kwargs=True
        )
        generate(pipe, 6, joint_attention_kwargs={"scale": 1.0})
        handle.remove()
        assert [sorted(each) for each in seen] == [["scale"]] * 2 + [["attention_mask", "scale"]] * 2 + [["scale"]] * 2
        with pytest.raises(AdapterError, match="attention_mask in joint_attention_kwargs"):
            generate(pipe, 6, joint_attention_kwargs={"attention_mask": torch.zeros(1, 1, 1, 1)})


def test_attention_that_takes_no_weights_is_refused(pipe: Any) -> None:
    method = Fresco(stages=(3, 3, 3), coarse_weight=4.0)
    qwen = VARIANTS["qwen edit"].make()
    with pytest.raises(TargetError, match="as FLUX's does, and not that of QwenImageTransformer2DModel"):
        hasten.accelerate(qwen, method)
    layer = pipe.transformer.single_transformer_blocks[0].attn
    own = layer.processor

    class Other(type(own)):  # type: ignore[misc]
        pass

    layer.processor = Other()
    with pytest.raises(TargetError, match="the transformer has Other"):
        hasten.accelerate(pipe, method)
    layer.processor = own
    with hasten.accelerate(pipe, method):
        own._attention_backend = "_native_flash"  # meanwhile
        with pytest.raises(TargetError, match=r"not '_native_flash'.*set_attention_backend\('native'\)"):
            generate(pipe)
        own._attention_backend, own._parallel_config = None, object()
        with pytest.raises(TargetError, match="over several devices"):
            generate(pipe)
        own._parallel_config = None
        assert generate(pipe).isfinite().all()


# --- life


def test_an_exception_leaves_the_pipeline_usable(pipe: Any) -> None:
    plain = generate(pipe)
    run = hasten.accelerate(pipe, METHODS["fresco"])
    first = generate(pipe)

    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError("callback")

    with pytest.raises(RuntimeError, match="callback"):
        generate(pipe, callback_on_step_end=fail)
    assert torch.equal(generate(pipe), first)
    run.remove()
    assert torch.equal(generate(pipe), plain)


def test_latents_that_a_callback_changed_are_refused_while_tokens_are_coarse(pipe: Any) -> None:
    def change(_: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": tensors["latents"] + 1}

    with (
        hasten.accelerate(pipe, METHODS["fresco"]),
        pytest.raises(ConfigError, match="the latents were changed between steps 0 and 1"),
    ):
        generate(pipe, callback_on_step_end=change)


def test_caches_start_afresh_in_each_stage(pipe: Any) -> None:
    plain = generate(pipe, 18)
    with hasten.accelerate(pipe, Fresco(preset="18"), hasten.TaylorSeer(interval=3, warmup=1, order=1)) as run:
        first = generate(pipe, 18)
        assert torch.equal(generate(pipe, 18), first)
    full = {record.step for record in run.records if record.run == 0 and record.computed}
    assert {0, 6, 12} <= full < set(range(18))
    with hasten.accelerate(pipe, Fresco(preset="18")) as alone:
        uncached = generate(pipe, 18)
    assert not torch.equal(first, uncached)
    with hasten.accelerate(pipe, Fresco(preset="18"), hasten.TaylorSeer(interval=1)):
        assert torch.equal(generate(pipe, 18), uncached)
    assert len(alone.stages.records) == 18
    assert torch.equal(generate(pipe, 18), plain)


@pytest.mark.parametrize("name", ["flux kontext", "qwen edit", "qwen edit plus"])
def test_editing_pipelines(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # These pipelines scale what they are given to a megapixel.
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (64, 32, None))
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "calculate_dimensions", lambda area, ratio: (64, 32))
    variant = VARIANTS[name]
    pipe, call = variant.make(), {**variant.call, "num_inference_steps": STEPS}
    plain = run_once(pipe, call)
    with hasten.accelerate(pipe, Fresco(stages=(0, 4, 5), shares=(0.3,))):
        assert torch.equal(run_once(pipe, call), plain)
    with hasten.accelerate(pipe, METHODS["fresco"]) as run:
        first = run_once(pipe, call)
        assert torch.equal(run_once(pipe, call), first)
    assert first.shape == plain.shape
    assert not torch.equal(first, plain)
    coarse = [record.coarse for record in run.stages.records if record.run == 0]
    assert coarse[0] == coarse[2] > coarse[3] == coarse[5] > coarse[6] == 0
    assert torch.equal(run_once(pipe, call), plain)


# --- bad input


def test_presets() -> None:
    assert [Fresco(preset=name).num_inference_steps for name in ("30", "18", "11", "9")] == [30, 18, 11, 9]
    assert [RALU(preset=name).num_inference_steps for name in ("18", "10")] == [18, 10]
    assert Bottleneck().num_inference_steps == 18
    assert Spectral(stages=(6, 12)).num_inference_steps == 18
    assert Spectral().num_inference_steps is None


def test_the_spectral_switch_takes_any_number_of_steps(pipe: Any) -> None:
    for steps in (9, 12):
        with hasten.accelerate(pipe, Spectral(delta=0.3, power=(20.0, 2.0))) as run:
            generate(pipe, steps)
        assert sum(record.switched for record in run.stages.records) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fresco(stages=(3, 3, 3, 3)), "shares"),
        (lambda: Fresco(stages=(3, 0, 3)), "stages"),
        (lambda: Fresco(stages=(3, 3, 3, 3), shares=(0.4, 0.2)), "shares must rise"),
        (lambda: Fresco(stages=(1, 3, 3)), "2 coarse steps"),
        (lambda: Fresco(noise="independent", jump="r2"), "independent"),
        (lambda: Fresco(threshold=0.1), "with r2 every promotion"),
        (lambda: Fresco(threshold=0.1, jump="r1", shares=0.3), "leave shares out"),
        (lambda: Fresco(threshold=0.1, jump="r1", score="edges"), "score='edges'"),
        (lambda: Fresco(threshold=0.1, jump="r1", stages=(1, 2, 3)), "the first has 2 steps"),
        (lambda: Fresco(threshold=0.1, jump="r1", stages=(4, 5)), "three stages or more"),
        (lambda: Fresco(threshold=0.1, jump="r1", stages=(3, 0, 3)), "all but the first from 1"),
        (lambda: Fresco(coarse_weight=8.0), "coarse_weight"),
        (lambda: RALU(stages=fit_stages((3, 4), (0.7, 0.0))), "three stages"),
    ],
)
def test_bad_parameters(make: Any, message: str) -> None:
    with pytest.raises(HastenError, match=message):
        make()


def test_a_run_of_another_length_is_refused(pipe: Any) -> None:
    with (
        hasten.accelerate(pipe, Fresco(preset="18")),
        pytest.raises(ScheduleError, match="num_inference_steps=18"),
    ):
        generate(pipe, 12)
    with (
        hasten.accelerate(pipe, Spectral(delta=1e-3)),
        pytest.raises(ScheduleError, match="leaves no coarse step"),
    ):
        generate(pipe)


def test_sizes_that_do_not_divide_are_refused(pipe: Any) -> None:
    with (
        hasten.accelerate(pipe, METHODS["fresco"]),
        pytest.raises(ConfigError, match="7x8 tokens"),
    ):
        generate(pipe, height=28, width=32)


def test_a_share_that_promotes_nothing_is_refused(pipe: Any) -> None:
    with (
        hasten.accelerate(pipe, Fresco(stages=(3, 3, 3), shares=(0.01,))),
        pytest.raises(ConfigError, match="which is none"),
    ):
        generate(pipe, height=32, width=32)


def test_other_schedulers_pipelines_and_starts_are_refused(pipe: Any) -> None:
    own = pipe.scheduler
    pipe.scheduler = FlowMatchHeunDiscreteScheduler.from_config(own.config)
    with pytest.raises(ConfigError, match=r"FlowMatchEulerDiscreteScheduler\.from_config"):
        hasten.accelerate(pipe, METHODS["fresco"])
    pipe.scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(ConfigError, match=r"Fresco cannot be run with UniPC(?!.*or a UniPC)"):
        hasten.accelerate(pipe, METHODS["fresco"])
    pipe.scheduler = own
    other = FluxImg2ImgPipeline(**pipe.components)
    with pytest.raises(TargetError, match="cannot run Fresco"):
        hasten.accelerate(other, METHODS["fresco"])
    with hasten.accelerate(pipe, METHODS["fresco"]):
        with pytest.raises(AlreadyAcceleratedError):
            METHODS["bottleneck"].attach(pipe)
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(own.config)
        with pytest.raises(ConfigError, match="another scheduler"):
            generate(pipe)
        pipe.scheduler = own
        with pytest.raises(ConfigError, match="begins with pure noise"):
            generate(pipe, sigmas=[0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05])


def test_every_method_is_known_by_name() -> None:
    names = {info.name: info.config for info in hasten.methods()}
    for name in ("fresco", "bottleneck", "ralu", "spectral"):
        assert issubclass(names[name], RegionMethod)
