"""DVG: plans, demands, coordinates, and Wan and HunyuanVideo pipelines that run in stages."""

from __future__ import annotations

import inspect
import math
import re
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import tiny
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from test_variants import assemble, build, hunyuan_vae, randn, wan_vae
from torch import Tensor

import hasten
from hasten.errors import (
    AlreadyAcceleratedError,
    ConfigError,
    HastenError,
    ScheduleError,
    TargetError,
)
from hasten.pipeline.scheduler import NoiseLevels, shift_levels, skip_step
from hasten.pipeline.view import PipelineView
from hasten.resolution.layouts import block_noise, enlarge, gather, nested_axes, pick, smooth, spread
from hasten.resolution.methods.dvg import DVG
from hasten.resolution.plan import choose, demands, density, feasible, motion, texture
from hasten.resolution.planned import stage_lengths, switch_steps

RATES = (0.28, 0.5, 0.72)
PIXEL = (1, 1, 1)
HUNYUAN_720P = (31, 90, 160)
STEPS = 12
FULL = (7, 12, 16)  # frames, rows and columns of the clip below
PLAIN = ((1.0, 1.0),) * 4


# --- plan


@pytest.mark.parametrize(("steps", "lengths"), [(50, (14, 11, 11, 14)), (12, (3, 3, 2, 4))])
def test_stage_lengths(steps: int, lengths: tuple[int, ...]) -> None:
    assert stage_lengths(steps, RATES) == lengths


def test_a_run_that_is_too_short_is_refused_with_the_least_number_of_steps() -> None:
    with pytest.raises(ScheduleError, match="at least 5 steps"):
        switch_steps(4, RATES)
    assert len(set(switch_steps(5, RATES))) == 3


@pytest.mark.parametrize(
    ("steps", "budget", "first", "count", "least"),
    [(50, 0.5, 12, 22, None), (50, 0.4, 10, 10, 0.391), (12, 0.5, 12, None, 0.446), (12, 0.4, 10, 0, 0.427)],
)
def test_plans_of_hunyuan_720p(steps: int, budget: float, first: int, count: int | None, least: float | None) -> None:
    plans = DVG(budget=budget)._candidates(HUNYUAN_720P, PIXEL, steps)
    assert {plan.grids[0] for plan in plans} == {(first, 45, 80)}
    if least is not None:
        assert min(plan.density for plan in plans) == pytest.approx(least, abs=5e-4)
    if count is not None:
        assert sum(abs(plan.density - budget) <= 0.02 for plan in plans) == count
    if count == 0:
        with pytest.raises(
            ConfigError, match=r"no plan has a density within 0\.02 of budget=0\.4.*end later"
        ) as caught:
            feasible(plans, budget)
        with pytest.raises(ConfigError, match="end earlier"):
            feasible(plans, 0.97)
        assert str(caught.value).count("density 0.4") == 3
        assert "density 0.427" in str(caught.value)
        advised = re.findall(r"budget=(0\.\d+), lead=(0\.\d+)", str(caught.value))
        assert len(advised) == 3
        for found, lead in advised:
            method = DVG(budget=float(found), lead=float(lead))
            assert method.first(HUNYUAN_720P, PIXEL, steps) == (first, 45, 80)


@pytest.mark.parametrize("patch", [PIXEL, (1, 2, 2)])
@pytest.mark.parametrize(
    ("texture", "moved", "choice"),
    [
        (0.05, 0.05, (0.8, 18)),
        (0.05, 0.5, (0.6, 21)),
        (0.05, 0.8, (0.6, 22)),
        (0.3, 0.1, (0.8, 17)),
        (0.6, 0.1, (0.9, 15)),
    ],
)
def test_choices_of_hunyuan_720p(
    texture: float, moved: float, choice: tuple[float, int], patch: tuple[int, int, int]
) -> None:
    plans = DVG()._candidates(HUNYUAN_720P, patch, 50)
    plan = choose(plans, 0.5, *demands(texture, moved))
    assert (plan.spatial, plan.frames) == choice
    assert plan.density == density(plan.grids, (14, 11, 11, 14))
    assert all(size % step == 0 for grid in plan.grids for size, step in zip(grid, patch, strict=True))


@pytest.mark.parametrize("compress", ["space", "time"])
def test_one_sided_plans_meet_the_same_budget(compress: str) -> None:
    method = DVG(compress=compress)  # type: ignore[arg-type]
    plan = method.plan(torch.empty(0), HUNYUAN_720P, (1, 2, 2), 50)
    assert plan.density == pytest.approx(0.5, abs=0.02)
    frames, heights, _ = zip(*plan.grids, strict=True)
    assert (set(frames) == {31}) == (compress == "space")
    assert (set(heights) == {90}) == (compress == "time")


def test_fixed_choices() -> None:
    plans = DVG(spatial=0.7, temporal=19)._candidates(HUNYUAN_720P, (1, 2, 2), 50)
    assert [plan.grids for plan in plans] == [((12, 44, 80), (19, 62, 112), (19, 90, 160), (31, 90, 160))]
    with pytest.raises(ConfigError, match="between the 12 frames of the first stage and all 31"):
        DVG(temporal=40).first(HUNYUAN_720P, (1, 2, 2), 50)


# --- demand


def waves(frames: int, shift: float, size: int = 48) -> Tensor:
    """A smooth image that moves by `shift` latent pixels a frame to the right."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    images = [
        torch.sin(2 * math.pi * (x - shift * t) / 24) + torch.cos(2 * math.pi * (y + (x - shift * t)) / 16)
        for t in range(frames)
    ]
    return torch.stack(images)[None, None].repeat(1, 4, 1, 1, 1)


def test_motion_is_measured_in_pixels() -> None:
    assert motion(waves(2, 1.0)) == pytest.approx(1.0, abs=0.15)
    assert motion(waves(5, 0.5)) == pytest.approx(0.5, abs=0.08)
    assert motion(waves(5, 0.0)) == 0.0
    assert motion(waves(1, 1.0)) == 0.0


def test_texture_is_the_share_of_fine_frequencies() -> None:
    assert texture(randn(2, 4, 3, 64, 64)) == pytest.approx((4 - math.pi * 0.5) / 4, abs=0.02)
    assert texture(waves(3, 1.0)) < 0.02


def test_demands_add_up_and_follow_the_larger_one() -> None:
    assert demands(0.3, 0.3) == (0.5, 0.5)
    space, time = demands(0.6, 0.1)
    assert space == pytest.approx(math.exp(1.56) / (math.exp(1.56) + math.exp(0.26)))
    assert space + time == 1


@pytest.mark.parametrize(("shift", "choice"), [(0.0, (0.8, 18)), (1.0, (0.6, 21)), (2.0, (0.6, 22))])
def test_a_clips_own_motion_and_texture_choose_its_plan(shift: float, choice: tuple[float, int]) -> None:
    """Smooth waves that stand still want pixels, and the faster they move the more frames they want."""
    plan = DVG().plan(waves(12, shift), HUNYUAN_720P, PIXEL, 50)
    assert (plan.spatial, plan.frames) == choice


def test_a_single_frame_demands_as_much_time_as_space() -> None:
    method = DVG()
    expected = choose(method._candidates(HUNYUAN_720P, PIXEL, 50), 0.5, 0.5, 0.5)
    for clean in (waves(1, 0.0), randn(1, 4, 1, 48, 48)):
        assert method.plan(clean, HUNYUAN_720P, PIXEL, 50).grids == expected.grids


# --- coordinates


@pytest.mark.parametrize("first", [False, True])
def test_nested_axes(first: bool) -> None:
    grids = [(12, 44, 80), (18, 62, 112), (18, 90, 160), (31, 90, 160)]
    held = nested_axes([grids[0], grids[-1]])[0] if first else None
    stages = nested_axes(grids, held)
    for grid, axes in zip(grids, stages, strict=True):
        assert tuple(map(len, axes)) == grid
        for axis, size in zip(axes, grids[-1], strict=True):
            assert list(axis) == sorted(set(axis))
            assert (axis[0], axis[-1]) == (0, size - 1)
    for coarse, fine in pairwise(stages):
        assert all(set(a) <= set(b) for a, b in zip(coarse, fine, strict=True))
    assert stages[-1] == tuple(tuple(range(size)) for size in grids[-1])
    if held is not None:
        assert stages[0] == held
    else:  # by the formula
        assert stages[2][0] == tuple(round(i * 30 / 17) for i in range(18))


def test_a_prediction_is_copied_out_and_taken_back_exactly() -> None:
    coarse = randn(2, 3, 3, 6, 10)
    full = spread(coarse, FULL)
    assert full.shape == (2, 3, *FULL)
    assert torch.equal(gather(full, (3, 6, 10)), coarse)
    assert torch.equal(gather(3 * full - 2 * spread(coarse + 1, FULL), (3, 6, 10)), 3 * coarse - 2 * (coarse + 1))


def test_block_noise_is_white_and_the_low_pass_of_the_fine_noise() -> None:
    noise = randn(1, 64, 9, 30, 40)
    axes = nested_axes([(4, 18, 20), (9, 30, 40)])[0]
    read = block_noise(noise, axes)
    assert read.shape == (1, 64, 4, 18, 20)
    assert float(read.std()) == pytest.approx(1, abs=0.01)
    assert abs(float((read[..., 1:] * read[..., :-1]).mean())) < 0.01
    halves = block_noise(noise, nested_axes([(9, 15, 20), (9, 30, 40)])[0])
    sums = noise.unflatten(4, (20, 2)).unflatten(3, (15, 2)).sum(dim=(4, 6))
    assert torch.allclose(halves, sums / 2, atol=1e-6)
    whole = nested_axes([(9, 30, 40)])[0]
    assert torch.equal(block_noise(noise, whole), noise)


def test_enlarging_keeps_the_source_at_its_own_coordinates() -> None:
    old, new = nested_axes([(3, 6, 10), FULL])
    clean = randn(2, 3, 3, 6, 10)
    larger = enlarge(clean, old, new)
    assert larger.shape == (2, 3, *FULL)
    assert torch.allclose(pick(larger, old), clean)
    flat = torch.full_like(clean, 0.3)
    assert torch.allclose(smooth(enlarge(flat, old, new), 0.3), torch.full((2, 3, *FULL), 0.3))
    line = torch.tensor(old[0], dtype=torch.float32)[:, None, None].expand(1, 1, 3, 6, 10)
    between = enlarge(line, old, new)[0, 0, :, 0, 0]
    assert torch.allclose(between, torch.arange(7.0))


# --- pipelines

CLIP = {"height": 96, "width": 128, "num_frames": 25, "num_inference_steps": STEPS, "output_type": "latent"}


def euler(**config: Any) -> Any:
    return FlowMatchEulerDiscreteScheduler(**{"shift": 5.0, **config})


def unipc() -> Any:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)


def wan(scheduler: Any = None, experts: int = 1, **settings: Any) -> Any:
    names = ("transformer", "transformer_2")[:experts]
    models = {name: build("WanTransformer3DModel") for name in names}
    return assemble("WanPipeline", **models, vae=wan_vae(), scheduler=scheduler or euler(), **settings)


def hunyuan(scheduler: Any = None) -> Any:
    transformer = build("HunyuanVideoTransformer3DModel", guidance_embeds=True)
    return assemble(
        "HunyuanVideoPipeline", transformer=transformer, vae=hunyuan_vae(), scheduler=scheduler or euler(shift=7.0)
    )


def film(pipe: Any, batch: int = 1, seed: int = 0, guided: bool = False, **kwargs: Any) -> Tensor:
    """Final latents of one call."""
    text: dict[str, Any] = {"prompt_embeds": randn(batch, tiny.TEXT, 32)}
    negative = {"negative_prompt_embeds": randn(batch, tiny.TEXT, 32, seed=1)}
    if type(pipe).__name__ == "HunyuanVideoPipeline":
        text |= {
            "pooled_prompt_embeds": randn(batch, 32, seed=2),
            "prompt_attention_mask": torch.ones(batch, tiny.TEXT, dtype=torch.long),
        }
        negative |= {
            "negative_pooled_prompt_embeds": randn(batch, 32, seed=3),
            "negative_prompt_attention_mask": torch.ones(batch, tiny.TEXT, dtype=torch.long),
            "true_cfg_scale": 3.0,
        }
    else:
        text["guidance_scale"] = 3.0 if guided else 1.0
    call = CLIP | text | (negative if guided else {}) | kwargs
    call.setdefault("generator", torch.Generator().manual_seed(seed))
    return pipe(**call).frames


class Watch:
    """Shapes and timesteps of the calls of a transformer, from inside."""

    def __init__(self, module: Any) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.times: list[float] = []
        name = type(module).__name__
        patches, times = WATCHED[name]
        getattr(module, patches).register_forward_pre_hook(self.shape)
        getattr(module, times).register_forward_pre_hook(self.time)

    def shape(self, _: Any, args: tuple[Tensor, ...]) -> None:
        self.shapes.append(tuple(args[0].shape))

    def time(self, _: Any, args: tuple[Tensor, ...]) -> None:
        self.times.append(float(args[0].flatten()[0]))


WATCHED = {
    "WanTransformer3DModel": ("patch_embedding", "condition_embedder"),
    "HunyuanVideoTransformer3DModel": ("x_embedder", "time_text_embed"),
}
HOSTS = {"wan": wan, "wan unipc": lambda: wan(unipc()), "hunyuan": hunyuan}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("guided", [False, True])
def test_a_pipeline_runs_in_stages(host: str, guided: bool) -> None:
    pipe = HOSTS[host]()
    watch = Watch(pipe.transformer)
    with DVG().attach(pipe) as run:
        latents = film(pipe, batch=2, guided=guided)
    assert latents.shape == (2, 4, *FULL)
    assert latents.isfinite().all()
    (plan,) = run.plans
    assert abs(plan.density - 0.5) <= 0.02
    # The forward at the step where a stage ends is still the old stage's.
    lengths = (4, 3, 2, 3)
    grids = [grid for grid, length in zip(plan.grids, lengths, strict=True) for _ in range(length)]
    passes = 2 if guided else 1
    assert watch.shapes == [(2, 4, *grid) for grid in grids for _ in range(passes)]
    assert [record.grid for record in run.records] == grids
    assert [record.step for record in run.records if record.switched] == [3, 6, 8]
    assert [record.stage for record in run.records] == [0] * 4 + [1] * 3 + [2] * 2 + [3] * 3
    assert plan.grids[0] == (3, 6, 8)


def shifted(t: float, shift: float) -> float:
    return shift * t / (1 + (shift - 1) * t)


def test_each_stage_has_its_own_noise_levels() -> None:
    pipe = hunyuan()
    watch = Watch(pipe.transformer)
    with DVG().attach(pipe) as run:
        film(pipe)
    ends = [(0, 3, 7.0), (4, 6, 9.0), (7, 8, 11.0), (9, 11, 11.0)]
    for first, last, shift in ends:
        for step in range(first, last + 1):
            level = shifted(1 - step / STEPS, shift)
            assert run.records[step].sigma == pytest.approx(level, abs=1e-5)
            assert watch.times[step] == pytest.approx(1000 * level, abs=1e-2)
    assert [record.next_sigma for record in run.records[:-1]] == [record.sigma for record in run.records[1:]]
    assert run.records[-1].next_sigma == 0


def test_levels_of_a_50_step_run() -> None:
    levels = {}
    for shift in (7.0, 9.0, 11.0):
        scheduler = euler(shift=7.0)
        scheduler.set_timesteps(sigmas=[1 - i / 50 for i in range(50)])
        run = NoiseLevels(scheduler)
        run.write(1, shift_levels(run.sigmas, shift / 7)[1:])
        assert run[1] == float(scheduler.sigmas[1])
        levels[shift] = scheduler.sigmas
    assert float(levels[9.0][15]) == pytest.approx(0.9545, abs=1e-4)
    assert float(levels[11.0][26]) == pytest.approx(0.9103, abs=1e-4)
    assert float(levels[11.0][37]) == pytest.approx(0.7944, abs=1e-4)


@pytest.mark.parametrize("shifts", [None, (5.0, 5.0, 5.0, 5.0)])
@pytest.mark.parametrize("host", HOSTS)
def test_full_size_throughout_is_the_plain_pipeline(host: str, shifts: tuple[float, ...] | None) -> None:
    pipe = HOSTS[host]()
    if host == "hunyuan" and shifts is not None:
        shifts = (7.0,) * 4
    plain = film(pipe, guided=True)
    with DVG(stages=PLAIN, shifts=shifts).attach(pipe) as run:
        assert torch.equal(film(pipe, guided=True), plain)
    assert {record.grid for record in run.records} == {FULL}
    assert not any(record.switched for record in run.records)
    assert len(run.records) == STEPS


@pytest.mark.parametrize("host", HOSTS)
def test_removal_is_exact(host: str) -> None:
    pipe = HOSTS[host]()
    plain = film(pipe)
    before = [set(vars(pipe.scheduler)), set(vars(pipe.transformer))]
    run = DVG().attach(pipe)
    assert not torch.equal(film(pipe), plain)
    run.remove()
    run.remove()
    assert [set(vars(pipe.scheduler)), set(vars(pipe.transformer))] == before
    assert "step" not in vars(pipe.scheduler)
    assert torch.equal(film(pipe), plain)
    assert len(run.records) == STEPS


def test_two_runs_in_turn_are_the_same() -> None:
    pipe = wan()
    with DVG().attach(pipe) as run:
        first = film(pipe)
        assert torch.equal(film(pipe), first)
        assert not torch.equal(film(pipe, seed=1), first)
        assert film(pipe, height=96, width=96).shape == (1, 4, 7, 12, 12)
    assert [record.run for record in run.records] == [number for number in range(4) for _ in range(STEPS)]


class StopError(Exception):
    pass


def fail_at(count: int) -> Any:
    calls = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == count:
            raise StopError

    return hook


@pytest.mark.parametrize("count", [1, 3, 7])
def test_an_exception_leaves_the_pipeline_usable(count: int) -> None:
    pipe = wan()
    plain = film(pipe)
    with DVG().attach(pipe) as run:
        whole = film(pipe)
        handle = pipe.transformer.blocks[1].register_forward_pre_hook(fail_at(count))
        with pytest.raises(StopError):
            film(pipe)
        handle.remove()
        model = pipe.transformer
        arguments = tiny.TINY["WanTransformer3DModel"].arguments(randn(1, 4, *FULL), 0.5)
        direct = model(**arguments, return_dict=False)[0]
        assert torch.equal(film(pipe), whole)
        run.remove()
        assert torch.equal(model(**arguments, return_dict=False)[0], direct)
        assert torch.equal(film(pipe), plain)


def test_a_callback_sees_full_size_latents_and_may_change_them_in_the_last_stage_only() -> None:
    pipe = wan()
    seen = []

    def change(at: int) -> Any:
        def callback(_: Any, step: int, __: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
            seen.append(tuple(state["latents"].shape))
            return {"latents": state["latents"] + 1} if step == at else state

        return callback

    with DVG().attach(pipe):
        whole = film(pipe)
        film(pipe, callback_on_step_end=change(at=-1))
        assert seen == [(1, 4, *FULL)] * STEPS
        assert not torch.equal(film(pipe, callback_on_step_end=change(at=9)), whole)
        with pytest.raises(ConfigError, match="changed between steps 2 and 3"):
            film(pipe, callback_on_step_end=change(at=2))
        assert torch.equal(film(pipe), whole)


@pytest.mark.parametrize("noise", ["field", "anchor", "independent"])
def test_every_kind_of_noise_is_repeatable_and_has_the_right_level(noise: str) -> None:
    pipe = wan()
    with DVG(noise=noise).attach(pipe) as run:  # type: ignore[arg-type]
        first = film(pipe)
        assert torch.equal(film(pipe), first)
        read, levels = run._stage_noise, []

        def watched(*args: Any) -> Tensor:
            levels.append(float(read(*args).std()))
            return read(*args)

        run._stage_noise = watched  # type: ignore[method-assign]
        film(pipe)
    assert len(levels) == 5  # the first stage is read before and after its first forward
    assert levels == pytest.approx([1.0] * 5, abs=0.06)


def test_the_first_stage_begins_with_the_pipelines_own_noise() -> None:
    """At the coordinates of its cells, also where later stages draw noise afresh."""
    seen: dict[str, Tensor] = {}
    for noise in ("anchor", "independent"):
        pipe = wan()

        def first(_: Any, args: tuple[Tensor, ...], name: str = noise) -> None:
            seen.setdefault(name, args[0].clone())

        pipe.transformer.patch_embedding.register_forward_pre_hook(first)
        with DVG(noise=noise).attach(pipe):  # type: ignore[arg-type]
            film(pipe)
    assert torch.equal(seen["anchor"], seen["independent"])


def test_the_estimate_is_smoothed_at_the_end_of_the_first_stage_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []

    def watched(clean: Tensor, share: float) -> Tensor:
        steps.append(run._runs.current.state.step)  # type: ignore[union-attr]
        return smooth(clean, share)

    monkeypatch.setattr("hasten.resolution.planned.smooth", watched)
    with DVG().attach(wan()) as run:
        film(run.pipe)
    assert steps == [record.step for record in run.records if record.switched][:1]


GREY = 100.0


def grey(*_: Any, hidden_states: Tensor, timestep: Tensor, **__: Any) -> tuple[Tensor]:
    """The exact denoiser of clips that are grey everywhere: whatever else is in a state is noise."""
    return ((hidden_states - GREY) / (timestep.flatten()[0] / 1000),)


@pytest.mark.parametrize("noise", ["field", "anchor", "independent"])
def test_after_every_step_a_state_has_the_signal_and_the_noise_of_its_level(noise: str) -> None:
    pipe = wan(euler(shift=3.0))
    pipe.transformer.forward = grey
    found: list[tuple[float, float]] = []

    def measure(_: Any, step: int, __: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        found.append((float(state["latents"].mean()), float(state["latents"].std())))
        return state

    with DVG(noise=noise).attach(pipe) as run:  # type: ignore[arg-type]
        film(pipe, callback_on_step_end=measure)
    assert sum(record.switched for record in run.records) == 3
    for (mean, std), record in zip(found, run.records, strict=True):
        assert mean == pytest.approx((1 - record.next_sigma) * GREY, abs=0.1), record
        assert std == pytest.approx(record.next_sigma, rel=0.08, abs=1e-3), record


def test_stages_draw_noise_of_their_own() -> None:
    """Two stages of one size: what the second one draws is not what the first one drew."""
    pipe = wan(euler(shift=3.0))
    pipe.transformer.forward = grey
    states: list[Tensor] = []

    def keep(_: Any, step: int, __: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        states.append(state["latents"].flatten())
        return state

    with DVG(noise="independent", stages=((0.5, 1.0), *[(1.0, 1.0)] * 3)).attach(pipe) as run:
        film(pipe, callback_on_step_end=keep)
    first, second = [states[record.step] for record in run.records if record.switched]
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.1


def test_a_multistep_solver_begins_again_where_a_step_was_taken_for_it() -> None:
    """What it remembers is of other latents."""
    used, fresh = unipc(), unipc()
    for scheduler in (used, fresh):
        scheduler.set_timesteps(10)
    state = randn(1, 4, 2, 4, 4)
    for step, t in enumerate(used.timesteps[:4]):
        state = used.step(randn(1, 4, 2, 4, 4, seed=step), t, state, return_dict=False)[0]
        skip_step(fresh, t)
    for scheduler in (used, fresh):
        skip_step(scheduler, scheduler.timesteps[4])
    for step, t in enumerate(used.timesteps[5:8]):
        output = randn(1, 4, 2, 4, 4, seed=10 + step)
        one, other = (scheduler.step(output, t, state, return_dict=False)[0] for scheduler in (used, fresh))
        assert torch.equal(one, other)
        state = one


class Denoiser:
    """The exact denoiser of Gaussian images with a falling spectrum, for each frame by itself, at any size."""

    def __init__(self, height: int, width: int) -> None:
        self.power, self.cells = self.spectrum(height, width), height * width
        self.scale = self.power.mean()

    @staticmethod
    def spectrum(height: int, width: int) -> Tensor:
        ky, kx = torch.fft.fftfreq(height) * height, torch.fft.fftfreq(width) * width
        return (1 + (ky[:, None] ** 2 + kx**2) / 4) ** -1.5

    def __call__(self, hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        height, width = hidden_states.shape[-2:]
        # Means over blocks keep the amplitude of coarse waves, which is less in the orthonormal basis of fewer cells.
        power = self.spectrum(height, width) / self.scale * (height * width / self.cells)
        sigma = float(timestep.flatten()[0]) / 1000
        gain = (1 - sigma) * power / ((1 - sigma) ** 2 * power + sigma**2)
        clean = torch.fft.ifft2(torch.fft.fft2(hidden_states) * gain).real
        return ((hidden_states - clean) / sigma,)


def test_the_field_binds_the_clip_to_the_full_run() -> None:
    """With noise of the user's own field in every stage, the clip is near that of the full run of the same noise."""
    pipe = wan(euler(shift=3.0))
    denoiser = Denoiser(32, 32)
    pipe.transformer.forward = lambda *_, **kwargs: denoiser(**kwargs)
    call: dict[str, Any] = {"height": 256, "width": 256, "num_frames": 17, "num_inference_steps": 20}
    full = film(pipe, **call)
    distances = {}
    for noise in ("field", "anchor", "independent"):
        with DVG(compress="space", noise=noise, shifts=None).attach(pipe):  # type: ignore[arg-type]
            distances[noise] = float((film(pipe, **call) - full).norm() / full.norm())
    assert distances["field"] < distances["anchor"] < distances["independent"], distances
    assert distances["field"] < 0.5 * distances["independent"], distances


def test_experts_follow_the_levels_of_the_stage() -> None:
    pipe = wan(experts=2, boundary_ratio=0.875)
    watches = [Watch(pipe.transformer), Watch(pipe.transformer_2)]
    with DVG().attach(pipe) as run:
        latents = film(pipe, guidance_scale_2=1.0)
    assert latents.shape == (1, 4, *FULL)
    high, low = watches
    assert len(high.times) + len(low.times) == STEPS
    assert min(high.times) >= 875 > max(low.times)
    assert len(high.times) == sum(record.sigma >= 0.875 for record in run.records)


@pytest.mark.parametrize("experts", [1, 2])
def test_a_cache_knows_at_which_times_each_expert_is_called(experts: int) -> None:
    """One of the times is the boundary itself, which belongs to the first expert."""
    pipe = wan(euler(shift=1.0), experts=experts, **({"boundary_ratio": 0.667} if experts == 2 else {}))
    models = [pipe.transformer, pipe.transformer_2][:experts]
    watches = [Watch(model) for model in models]
    film(pipe, num_inference_steps=4, **({"guidance_scale_2": 1.0} if experts == 2 else {}))
    assert 667.0 in watches[0].times
    for model, watch in zip(models, watches, strict=True):
        assert PipelineView(pipe).timesteps_of(model) == pytest.approx(watch.times)


def test_tokens_with_their_own_timesteps() -> None:
    pipe = wan(expand_timesteps=True)
    plain = film(pipe)
    with DVG().attach(pipe) as run:
        staged = film(pipe)
        assert staged.shape == plain.shape
        assert len({record.grid for record in run.records}) >= 3
    # All tokens have the same timestep, as in the other form.
    with DVG().attach(wan()) as run:
        assert torch.allclose(film(run.pipe), staged, atol=1e-4)


def test_half_precision_keeps_coarse_latents_in_float32() -> None:
    pipe = hunyuan()
    pipe.transformer.to(torch.bfloat16)
    kept = []

    def look(_: Any, step: int, __: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        assert state["latents"].dtype == torch.bfloat16
        (found,) = run._runs.under_way
        if found.state is not None and found.state.latents is not None:
            kept.append(found.state.latents.dtype)
        return state

    with DVG().attach(pipe) as run:
        assert film(pipe, callback_on_step_end=look).isfinite().all()
    assert kept == [torch.float32] * 8  # the pipeline's own latents are true from the last switch on


def test_caching_inside_the_stages() -> None:
    pipe = wan()
    plain = film(pipe)
    cached = hasten.accelerate(pipe, "taylorseer", interval=2, warmup=1)
    stages = DVG().attach(pipe)
    first = film(pipe, guided=True)
    assert first.shape == plain.shape
    assert torch.equal(film(pipe, guided=True), first)
    full = {record.step for record in cached.records if record.run == 1 and record.computed}
    assert {0, 4, 7, 9} <= full < set(range(STEPS))  # every stage begins with a computed step
    cached.remove()
    assert not torch.equal(film(pipe, guided=True), first)
    stages.remove()
    assert torch.equal(film(pipe), plain)
    assert "forward" not in vars(pipe.transformer)


def test_one_call_switches_both_on_and_off() -> None:
    pipe = wan()
    plain = film(pipe)
    with hasten.accelerate(pipe, hasten.DVG(), hasten.TaylorSeer(interval=2, warmup=1)) as run:
        film(pipe, guided=True)
        assert run.stages is not None
        assert {record.stage for record in run.stages.records} == {0, 1, 2, 3}
        assert run.summary().skipped_steps > 0
        assert "TaylorSeer" in repr(run)
        assert "DVG" in repr(run)
        run.reset()
        assert run.stages.records == run.records == []
    assert torch.equal(film(pipe), plain)
    assert "forward" not in vars(pipe.transformer)
    assert "step" not in vars(pipe.scheduler)
    with hasten.accelerate(pipe, "dvg", budget=0.6) as run:
        film(pipe)
        assert run.stages is not None
        assert run.stages.plans
        with pytest.raises(ConfigError, match=r"in \.stages"):
            _ = run.method
    assert torch.equal(film(pipe), plain)


def test_methods_that_do_not_go_together_are_refused_and_leave_nothing() -> None:
    pipe = wan()
    with pytest.raises(ConfigError, match="one of each"):
        hasten.accelerate(pipe, "reuse", "foca")
    with pytest.raises(ConfigError, match="give each its own parameters"):
        hasten.accelerate(pipe, "dvg", "foca", interval=3)
    with pytest.raises(TargetError):
        hasten.accelerate(pipe.transformer, "reuse", "dvg")
    assert "forward" not in vars(pipe.transformer)
    assert not hasattr(pipe.transformer, "_diffusers_hook")


def test_a_cache_works_inside_the_stages_whichever_came_first() -> None:
    pipe = wan()
    plain = film(pipe)
    with hasten.accelerate(pipe, "taylorseer", interval=2), DVG().attach(pipe):
        right = film(pipe)
    with DVG().attach(pipe), hasten.accelerate(pipe, "taylorseer", interval=2):
        assert torch.equal(film(pipe), right)
    assert torch.equal(film(pipe), plain)


def test_offloading_keeps_working_when_stages_are_taken_away() -> None:
    accelerate_hooks = pytest.importorskip("accelerate.hooks")
    pipe = wan()
    plain = film(pipe)
    run = DVG().attach(pipe)
    accelerate_hooks.add_hook_to_module(pipe.transformer, accelerate_hooks.ModelHook())
    assert not torch.equal(film(pipe), plain)
    run.remove()
    assert torch.equal(film(pipe), plain)
    accelerate_hooks.remove_hook_from_module(pipe.transformer)
    assert torch.equal(film(pipe), plain)


# --- what cannot work


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"rates": (0.5, 0.28, 0.72)}, "rates must increase"),
        ({"rates": (0.3, 0.6), "shifts": None}, "needs 3 rates"),
        ({"shifts": (5.0, 7.0)}, "each of the 4 stages"),
        ({"noise": "feild"}, "DVG: noise must be .* did you mean 'field'"),
        ({"spatial": 0.3}, "spatial must be 'plan' or a share from start=0.5 to 1"),
        ({"compress": "time", "spatial": 0.7}, "determines the stages"),
        ({"stages": ((0.5, 1.0), (1.0, 1.0))}, "4 pairs"),
        ({"stages": ((1, 1), (0.5, 1), (1, 1), (1, 1))}, "do not fall"),
    ],
)
def test_parameters_that_cannot_work(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DVG(**params)


def test_calls_that_cannot_work_name_the_way_out_and_do_no_harm() -> None:
    pipe = wan()
    plain = film(pipe)
    with DVG(budget=0.2).attach(pipe), pytest.raises(ConfigError, match="the nearest are"):
        film(pipe)
    with DVG().attach(pipe) as run:
        with pytest.raises(ConfigError, match=r"cannot be made 0\.5 times as large"):
            film(pipe, height=16, width=16)
        with pytest.raises(ScheduleError, match="at least 5 steps"):
            film(pipe, num_inference_steps=3)
        with pytest.raises(AlreadyAcceleratedError, match=r"call \.remove\(\)"):
            DVG().attach(pipe)
        scheduler, pipe.scheduler = pipe.scheduler, euler()
        with pytest.raises(HastenError, match="another scheduler"):
            film(pipe)
        pipe.scheduler = scheduler
        assert film(pipe).shape == plain.shape
        assert len(run.plans) == 1
    assert torch.equal(film(pipe), plain)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DPMSolverMultistepScheduler(), "DPMSolverMultistepScheduler"),
        (UniPCMultistepScheduler(), "does not sample flows"),
        (euler(stochastic_sampling=True), "stochastic_sampling"),
        (euler(use_dynamic_shifting=True), "use shifts=None"),
    ],
)
def test_schedulers_that_cannot_be_served(scheduler: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DVG().attach(wan(scheduler))


def test_other_pipelines_are_refused() -> None:
    transformer = build("WanTransformer3DModel", in_channels=12)
    still = assemble("WanImageToVideoPipeline", transformer=transformer, vae=wan_vae(), scheduler=euler())
    for target in (still, transformer):
        with pytest.raises(TargetError, match="cannot run DVG"):
            DVG().attach(target)


def test_the_pipelines_are_still_the_ones_that_the_engine_knows() -> None:
    for name in ("WanPipeline", "HunyuanVideoPipeline"):
        assert "num_frames" in inspect.signature(getattr(diffusers, name).__call__).parameters
    assert list(inspect.signature(DVG().attach(wan()).scheduler.step).parameters)[:3] == [
        "model_output",
        "timestep",
        "sample",
    ]
