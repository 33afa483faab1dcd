"""Plain samplers with all solvers and spacings, on a Gaussian whose trajectories are known to any accuracy."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from hasten.bench.plain import OWN, best_plain_arms, plain_arms, plain_samplers
from hasten.bench.runner import BenchSettings, run_bench
from hasten.bench.subject import Subject
from hasten.bench.tables import table_of
from hasten.bench.thresholds import Trials
from hasten.errors import ConfigError
from hasten.solvers.plain import SPACINGS, Sampler

MEAN, SPREAD = torch.tensor([0.7, -1.0, 0.2]), torch.tensor([0.3, 0.5, 1.5])
CALL = {"height": 32, "width": 32, "max_sequence_length": 8}


def test_samplers_that_stand_in_every_table_are_tried_as_they_stand_there():
    samplers = plain_samplers()
    assert {arm.method: arm.attach for arm in plain_arms([9])} == {name: samplers[name] for name in OWN}
    assert samplers["unipc:spacing=beta"] == Sampler("unipc", "beta")


@pytest.mark.parametrize("solver", ["unipc", "dpmpp"])
def test_solvers_of_a_flow_stand_at_the_levels_of_the_pipelines_own_scheduler(pipe, solver):
    """FLUX's pipelines keep their levels to themselves where a scheduler says that its own are those of a flow."""
    pipe("red apple", num_inference_steps=5, output_type="latent", **CALL)
    own = pipe.scheduler.sigmas
    with Sampler(solver)(pipe):
        pipe("red apple", num_inference_steps=5, output_type="latent", **CALL)
        assert pipe.scheduler.sigmas == pytest.approx(own, abs=2e-6)


def clean_and_noise(x, signal, noise):
    """Posterior means of the sample and of the noise in `x = signal sample + noise noise`."""
    variance = (signal * SPREAD) ** 2 + noise**2
    rest = x - signal * MEAN
    return MEAN + signal * SPREAD**2 / variance * rest, noise / variance * rest


def flow(scheduler, steps, **levels):
    """A run of a flow-matching model, by default with levels that its pipeline asks for."""
    scheduler.set_timesteps(steps, **(levels or {"sigmas": np.linspace(1, 1 / steps, steps)}))
    scheduler.set_begin_index(0)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        level = float(timestep) / 1000
        sample, noise = clean_and_noise(x, 1 - level, level)
        x = scheduler.step(noise - sample, timestep, x, return_dict=False)[0]
    return x


def variance_preserving(scheduler, steps):
    """A run of a model that predicts the noise."""
    scheduler.set_timesteps(steps)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        kept = scheduler.alphas_cumprod[int(timestep)]
        _, noise = clean_and_noise(x, kept**0.5, (1 - kept) ** 0.5)
        x = scheduler.step(noise, timestep, scheduler.scale_model_input(x, timestep), return_dict=False)[0]
    return x


@pytest.mark.parametrize(("solver", "share"), [("euler", 0.95), ("unipc", 0.8), ("dpmpp", 0.8)])
def test_few_steps_of_linear_spacing_do_not_lose_the_last_of_them(solver, share):
    """As they do at the levels of a scheduler's own, where a pipeline, as Wan's, asks it for none."""
    own = FlowMatchEulerDiscreteScheduler(shift=3.0)
    exact = flow(own, 2000)
    errors, last = {}, {}
    for spacing in ("", "linear"):
        with Sampler(solver, spacing)(pipe := SimpleNamespace(scheduler=own)):
            errors[spacing] = float((flow(pipe.scheduler, 9, sigmas=None) - exact).norm())
            last[spacing] = float(pipe.scheduler.sigmas[-2])
    assert last["linear"] == pytest.approx(3 / 11)  # 1 / 9, shifted
    assert last[""] < 0.01
    assert errors["linear"] < share * errors[""]


def test_linear_spacing_is_refused_where_a_pipeline_asks_for_levels_of_its_own(pipe):
    with Sampler("unipc", "linear")(pipe), pytest.raises(ConfigError, match="ask for no levels of their own"):
        pipe("red apple", num_inference_steps=5, output_type="latent", **CALL)
    with pytest.raises(ConfigError, match="ask for no levels of their own"):  # asked for beside their number
        flow(Sampler("unipc", "linear").scheduler(pipe.scheduler), 9)


@pytest.mark.parametrize("spacing", ["", "karras", "exponential", "beta"])
@pytest.mark.parametrize(("solver", "gain"), [("euler", 1.4), ("unipc", 2.2), ("dpmpp", 2.2)])
def test_solvers_of_a_flow_have_their_order_at_every_spacing(solver, gain, spacing):
    pipe = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    own = pipe.scheduler
    exact = flow(own, 2000)
    errors = []
    for steps in (16, 32):
        with Sampler(solver, spacing)(pipe):
            assert pipe.scheduler is not own
            errors.append(float((flow(pipe.scheduler, steps) - exact).norm() / exact.norm()))
        assert pipe.scheduler is own
    assert errors[0] < 0.2
    # Spacings that end at a fixed level leave an error of their own, which does not fall so fast.
    assert errors[0] / errors[1] > (gain if spacing in ("", "beta") else 1.05)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("solver", ["unipc", "dpmpp"])
def test_solvers_of_a_variance_preserving_model_come_to_the_same_sample(solver, spacing):
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    own = DDIMScheduler(**config, clip_sample=False, set_alpha_to_one=False, timestep_spacing="leading")
    pipe = SimpleNamespace(scheduler=own)
    exact = variance_preserving(own, 1000)
    if (solver, spacing) == ("unipc", "lambda") or spacing == "linear":
        with (
            pytest.raises(ConfigError, match=f"MultistepScheduler has no {spacing} spacing"),
            Sampler(solver, spacing)(pipe),
        ):
            pass
        return
    with Sampler(solver, spacing)(pipe):
        found = variance_preserving(pipe.scheduler, 30)
    assert pipe.scheduler is own
    assert (found - exact).norm() / exact.norm() < 0.1


def test_the_best_plain_sampler_is_measured_and_named(pipe, tmp_path):
    model = Subject("tiny", pipe, ["red apple", "blue fish"], CALL)
    settings = BenchSettings(methods=("reuse",), computed_steps=(5,), prompts=2, steps=12, best_plain=True)
    result = run_bench(model, settings, tmp_path / "out.json")
    tried = result.plain["5"]
    assert set(tried) == {f"{s}:spacing={p}" if p else s for s in ("euler", "unipc", "dpmpp") for p in SPACINGS}
    assert tried["dpmpp:spacing=lambda"] is None  # a flow-matching scheduler has none
    assert sum(value is not None for value in tried.values()) == 12
    best = max((label for label in tried if tried[label] is not None), key=lambda label: tried[label])
    plain = {row.method: row for row in result.measured if row.library == "plain"}
    assert set(plain) == {"euler", "unipc", best}
    (row,) = result.best_plain()
    assert row.psnr == max(row.psnr for row in plain.values())
    assert f"Best of 12 plain samplers with 5 steps: {row.name}" in table_of(result).notes
    # The trials are the prompts of the bench here, so that their means are known to the rows too.
    for label in ("euler", "unipc"):
        assert tried[label] == pytest.approx(plain[label].spread["psnr"]["mean"], abs=1e-3)


def test_a_best_sampler_of_another_kind_gets_an_arm(pipe):
    trials = Trials(Subject("tiny", pipe, ["red apple"], CALL), ["red apple"], 0, 12, {})
    figures = {"plain dpmpp:spacing=beta at 5": (60.0,)}
    trials.recall = lambda key, compute: figures.get(key, (30.0,))
    arms, found = best_plain_arms([5], trials)
    (arm,) = arms
    assert (arm.id, arm.attach) == ("dpmpp:spacing=beta-5", Sampler("dpmpp", "beta"))
    assert (arm.params, arm.steps, arm.library) == ({"spacing": "beta"}, 5, "plain")
    assert found["5"]["dpmpp:spacing=beta"] == 60
