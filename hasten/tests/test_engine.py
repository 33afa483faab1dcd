"""The engine on an unmodified `FluxPipeline`: exactness, removal, isolation, memory, bad input."""

import warnings
from dataclasses import replace

import pytest
import torch
from pipelines import draw, make_pipe

import hasten
from hasten.caching import Uniform, computed_steps
from hasten.caching.default import default_method
from hasten.caching.method import ScheduledMethod
from hasten.caching.methods import HiCache, Reuse, TaylorSeer
from hasten.caching.projectors import Whole
from hasten.errors import (
    AlreadyAcceleratedError,
    ConfigError,
    HastenError,
    HastenWarning,
    ScheduleError,
    TargetError,
    UnknownNameError,
)

SITES = ("hidden", "output", "module")
METHODS = ["reuse", "taylorseer", "hicache"]


def leftovers(model):
    """What a module tree carries beside what its class puts there."""
    tree = {name: (type(module), sorted(module.__dict__)) for name, module in model.named_modules()}
    registry = getattr(model, "_diffusers_hook", None)
    return tree, None if registry is None else sorted(registry.hooks)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("method", METHODS)
def test_interval_one_is_bit_identical(pipe, method, site):
    plain = {steps: draw(pipe, steps) for steps in (1, 6)}  # the first one is shorter than any warm-up
    with hasten.accelerate(pipe, method, interval=1, site=site) as run:
        for steps, right in plain.items():
            assert torch.equal(draw(pipe, steps), right)
            assert run.summary().skipped_steps == 0


@pytest.mark.parametrize("site", SITES)
def test_a_cached_step_runs_no_block_and_changes_the_image(pipe, site):
    plain = draw(pipe)
    calls = []
    for stack in (pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks):
        for block in stack:
            block.attn.register_forward_hook(lambda *_: calls.append(1))
    blocks = len(pipe.transformer.transformer_blocks) + len(pipe.transformer.single_transformer_blocks)
    with hasten.accelerate(pipe, "taylorseer", interval=3, site=site) as run:
        fast = draw(pipe)
    computed = computed_steps(Uniform(3, 3), 12)
    assert len(calls) == blocks * len(computed)
    assert [r.step for r in run.records if r.computed] == computed
    error = (fast - plain).norm() / plain.norm()
    assert 0 < error < 0.2


@pytest.mark.parametrize("site", SITES)
def test_removal_leaves_no_trace(pipe, site):
    plain = draw(pipe)
    before = leftovers(pipe.transformer)
    run = hasten.accelerate(pipe, "hicache", interval=4, site=site)
    draw(pipe)
    run.remove()
    run.remove()  # twice is once
    assert leftovers(pipe.transformer) == before
    assert torch.equal(draw(pipe), plain)


def test_removal_before_any_call_leaves_no_trace():
    pipe = make_pipe()
    before = leftovers(pipe.transformer)
    hasten.accelerate(pipe, "reuse").remove()
    assert leftovers(pipe.transformer) == before
    assert not hasattr(pipe.transformer, "_diffusers_hook")
    assert "forward" not in pipe.transformer.__dict__


def test_runs_do_not_see_each_other(pipe):
    with hasten.accelerate(pipe, "hicache", interval=4):
        first = draw(pipe)
        draw(pipe, prompt="banana", seed=3)
        assert torch.equal(draw(pipe), first)
        draw(pipe, height=64, width=64)
        assert torch.equal(draw(pipe), first)


def test_two_pipelines_of_one_class_do_not_see_each_other():
    one, other = make_pipe(0), make_pipe(1)
    plain = draw(other)
    with hasten.accelerate(one, "hicache", interval=4):
        fast = draw(one)
        assert torch.equal(draw(other), plain)
        with hasten.accelerate(other, "reuse", interval=2):
            draw(other)
            assert torch.equal(draw(one), fast)
        assert torch.equal(draw(other), plain)
        assert torch.equal(draw(one), fast)


@pytest.mark.parametrize("at", [0, 1, 4])
def test_an_exception_in_mid_run_leaves_the_next_run_correct(pipe, at):
    def fail(_pipe, step, _timestep, kwargs):
        if step == at:
            raise KeyboardInterrupt
        return kwargs

    with hasten.accelerate(pipe, "taylorseer", interval=3):
        right = draw(pipe)
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, height=64, width=64, callback_on_step_end=fail)
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, callback_on_step_end=fail)
        assert torch.equal(draw(pipe), right)


def test_an_exception_inside_the_transformer_restores_its_modules(pipe):
    before = leftovers(pipe.transformer)
    run = hasten.accelerate(pipe, "taylorseer", interval=3)
    right = draw(pipe)

    def explode(*_):
        raise RuntimeError("out of memory")

    handle = pipe.transformer.single_transformer_blocks[0].register_forward_hook(explode)
    with pytest.raises(RuntimeError, match="out of memory"):
        draw(pipe)
    handle.remove()
    assert torch.equal(draw(pipe), right)
    run.remove()
    tree, _ = leftovers(pipe.transformer)
    assert tree.keys() == before[0].keys()


def test_guidance_does_not_change_the_schedule_and_keeps_passes_apart(pipe):
    with hasten.accelerate(pipe, "taylorseer", interval=3) as run:
        draw(pipe)
        alone = [r.step for r in run.records if r.computed]
        run.reset()
        draw(pipe, true_cfg_scale=3.0, negative_prompt="banana")
        by_pass = {
            name: [r.step for r in run.records if r.computed and r.pass_name == name] for name in ("cond", "uncond")
        }
        assert by_pass == {"cond": alone, "uncond": alone}
        assert run.summary().passes == ("cond", "uncond")


def test_guided_forecasts_equal_those_of_separate_models(pipe):
    """Order of the passes cannot matter if their memories are apart: cond alone is cond beside uncond."""
    seen = {}

    def watch(store):
        def hook(_module, _args, kwargs, output):
            store.setdefault(kwargs["pooled_projections"].sum().item(), []).append(output[0].clone())

        return hook

    for scale in (None, 1.0000001):
        store = seen[scale] = {}
        with hasten.accelerate(pipe, "taylorseer", interval=4):
            handle = pipe.transformer.register_forward_hook(watch(store), with_kwargs=True)
            guided = {} if scale is None else {"true_cfg_scale": scale, "negative_prompt": "banana"}
            draw(pipe, 8, **guided)
            handle.remove()
    (key,) = seen[None]
    for alone, beside in zip(seen[None][key], seen[1.0000001][key], strict=True):
        assert torch.allclose(alone, beside, atol=1e-4)


@pytest.mark.parametrize("site", SITES)
def test_guided_sigma_serves_the_steps_that_have_two_passes_from_the_first_forecast_on(pipe, site):
    settings = {"interval": 3, "order": 1, "site": site}
    guided = {"true_cfg_scale": 5.0, "negative_prompt": "banana"}

    def one(sigma, guided_sigma, **call):
        with hasten.accelerate(pipe, "hicache", sigma=sigma, guided_sigma=guided_sigma, **settings):
            return draw(pipe, 9, **call)

    assert torch.equal(one(0.7, 0.3), one(0.7, None))
    assert torch.equal(one(0.7, 0.3, **guided), one(0.3, None, **guided))
    assert not torch.equal(one(0.3, None, **guided), one(0.7, None, **guided))


@pytest.mark.parametrize(
    ("call", "scale"),
    [
        ({"true_cfg_scale": 2.0, "negative_prompt": "banana"}, 2.0),
        ({"true_cfg_scale": torch.tensor(3.5), "negative_prompt": "banana", "guidance_scale": 9.0}, 3.5),
        ({"true_cfg_scale": 8.0, "negative_prompt": "banana"}, 5.0),
    ],
    ids=["weak", "beside the one that the model is told", "strong"],
)
def test_the_stronger_guidance_is_the_nearer_the_scale_comes_to_guided_sigma(pipe, call, scale):
    method = hasten.HiCache(sigma=0.7, guided_sigma=0.3, order=1, interval=3)
    with hasten.accelerate(pipe, method):
        mixed = draw(pipe, 9, **call)
    with hasten.accelerate(pipe, replace(method, sigma=method.guided(scale).sigma, guided_sigma=None)):
        assert torch.equal(draw(pipe, 9, **call), mixed)


def test_a_scale_that_follows_the_features_has_no_guided_sigma(pipe):
    with pytest.raises(ConfigError, match=r"guided_sigma=0\.4 does nothing"):
        hasten.HiCache(scale="adaptive", guided_sigma=0.4)
    with hasten.accelerate(pipe, scale="adaptive", alpha=0.2) as handle:  # the default's scales are left out
        assert (handle.method.scale, handle.method.alpha) == ("adaptive", 0.2)
        assert (handle.method.sigma, handle.method.guided_sigma) == (hasten.HiCache().sigma, None)
    with hasten.accelerate(pipe, scale="fixed") as handle:
        assert handle.method == default_method()
    with hasten.accelerate(pipe, sigma=0.7) as handle:
        assert (handle.method.sigma, handle.method.guided_sigma) == (0.7, None)
    with pytest.raises(ConfigError, match=r"alpha=0\.2 does nothing with scale='fixed'; leave it out, or use scale="):
        hasten.accelerate(pipe, alpha=0.2)


@pytest.mark.parametrize(
    ("passes", "alone"),
    [
        ([[1, 1, 1]] * 12, []),
        ([[1, 1]] * 5 + [[1, 2]] * 7, []),  # the second pass has another batch from then on: it begins anew
        ([[1]] * 5 + [[1, 1]] * 7, range(6)),  # that a second pass comes is known when it is there
        ([[1, 1]] * 5 + [[1]] * 7, range(6, 12)),
    ],
    ids=["three", "anew", "late", "ends"],
)
def test_guided_sigma_follows_the_passes_that_a_step_has(pipe, passes, alone):
    """Batch sizes of the passes, step by step; the inputs of a step are the same whatever was forecast before."""

    def one(sigma, guided_sigma):
        answers = {}
        settings = {"sigma": sigma, "guided_sigma": guided_sigma, "order": 1, "interval": 3}
        ids = type(pipe)._prepare_latent_image_ids(1, 8, 8, torch.device("cpu"), torch.float32)
        with torch.no_grad(), hasten.accelerate(pipe.transformer, "hicache", **settings):
            for step, batches in enumerate(passes):
                for number, batch in enumerate(batches):
                    with pipe.transformer.cache_context("abc"[number]):
                        (answers[step, number],) = pipe.transformer(
                            hidden_states=torch.full((batch, 64, 48), 1 - 0.05 * step),
                            timestep=torch.full((batch,), 1 - step / 12),
                            pooled_projections=torch.full((batch, 64), 1.0 + number),
                            encoder_hidden_states=torch.full((batch, 8, 128), 1.0 + number),
                            txt_ids=torch.zeros(8, 3),
                            img_ids=ids,
                            return_dict=False,
                        )
        return answers

    mixed, larger, smaller = one(0.7, 0.3), one(0.7, None), one(0.3, None)
    for number in range(len(passes[-1])):
        assert any(not torch.equal(larger[at], smaller[at]) for at in mixed if at[1] == number)
    for (step, number), answer in mixed.items():
        assert torch.equal(answer, (larger if step in alone else smaller)[step, number]), (step, number)


@pytest.mark.parametrize("method", ["foca", "freqca"])
def test_auto_on_a_bare_transformer_forecasts_as_uniform_does(pipe, method):
    """Its differences begin with the last warm-up step there, as nobody could know when the method was made."""
    ids = type(pipe)._prepare_latent_image_ids(1, 8, 8, torch.device("cpu"), torch.float32)

    def answers(schedule):
        with torch.no_grad(), hasten.accelerate(pipe.transformer, method, schedule=schedule, interval=4) as run:
            found = [
                pipe.transformer(
                    hidden_states=torch.linspace(-1, 1, 64 * 48).view(1, 64, 48) * (1 + 0.01 * step**2),
                    timestep=torch.tensor([1 - step / 16]),
                    pooled_projections=torch.ones(1, 64),
                    encoder_hidden_states=torch.ones(1, 8, 128),
                    txt_ids=torch.zeros(8, 3),
                    img_ids=ids,
                    return_dict=False,
                )[0]
                for step in range(16)
            ]
            return found, [record.step for record in run.records if record.computed]

    (auto, computed), (uniform, expected) = answers("auto"), answers("uniform")
    assert computed == expected
    assert all(torch.equal(one, other) for one, other in zip(auto, uniform, strict=True))


def test_without_a_cache_context_the_same_steps_are_full(pipe):
    """Image-to-image pipelines and many others set no context: call the transformer as they do."""
    torch.manual_seed(0)
    tokens = torch.randn(1, 64, 48)
    ids = type(pipe)._prepare_latent_image_ids(1, 8, 8, torch.device("cpu"), torch.float32)

    def run_bare(guided):
        for i in range(10):
            for scale in (1.0, 0.5) if guided else (1.0,):
                pipe.transformer(
                    hidden_states=tokens * (1 - 0.05 * i),
                    timestep=torch.full((1,), 1 - i / 10),
                    pooled_projections=torch.ones(1, 64) * scale,
                    encoder_hidden_states=torch.ones(1, 8, 128) * scale,
                    txt_ids=torch.zeros(8, 3),
                    img_ids=ids,
                )

    with torch.no_grad(), hasten.accelerate(pipe.transformer, "taylorseer", interval=4) as run:
        run_bare(False)
        run_bare(True)
        run_bare(False)
    per_run = {}
    for record in run.records:
        per_run.setdefault((record.run, record.pass_name), []).append(record.computed)
    expected = [step in computed_steps(Uniform(4, 3), 10) for step in range(10)]
    assert set(per_run) == {(0, "pass0"), (1, "pass0"), (1, "pass1"), (2, "pass0")}
    assert all(computed == expected for computed in per_run.values())


def test_a_pass_that_comes_late_runs_in_full_first(pipe):
    with torch.no_grad(), hasten.accelerate(pipe.transformer, "reuse", interval=4) as run:
        ids = type(pipe)._prepare_latent_image_ids(1, 8, 8, torch.device("cpu"), torch.float32)
        for i in range(8):
            for name in ("cond", "uncond") if i >= 4 else ("cond",):
                with pipe.transformer.cache_context(name):
                    pipe.transformer(
                        hidden_states=torch.ones(1, 64, 48),
                        timestep=torch.full((1,), 1 - i / 10),
                        pooled_projections=torch.ones(1, 64),
                        encoder_hidden_states=torch.ones(1, 8, 128),
                        txt_ids=torch.zeros(8, 3),
                        img_ids=ids,
                    )
    late = [r for r in run.records if r.pass_name == "uncond"]
    assert [r.computed for r in late] == [True, False, True, False]
    assert late[0].reason == "nothing to forecast from"


@pytest.mark.parametrize(("site", "order"), [("hidden", 0), ("hidden", 2), ("output", 1), ("module", 1)])
def test_memory_is_what_was_estimated(pipe, site, order):
    with hasten.accelerate(pipe, "hicache", interval=3, order=order, site=site) as run:
        draw(pipe, true_cfg_scale=2.0, negative_prompt="banana")
        held = run.summary().cache_bytes
        assert held == run.estimate_bytes(64, text_tokens=8, passes=2, dtype=torch.float32)
    if site == "hidden":
        assert held == 2 * (order + 1) * 64 * 32 * 4


def test_features_are_freed_at_the_end_of_a_run(pipe):
    run = hasten.accelerate(pipe, "hicache", interval=3)
    draw(pipe)
    (engine,) = run._engines.values()
    assert not engine.runs.under_way
    run.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_keeps_its_dtype(dtype):
    pipe = make_pipe().to(dtype)
    with hasten.accelerate(pipe, "hicache", interval=3):
        assert draw(pipe, 6).dtype == dtype


def test_a_batch_is_as_good_as_its_parts(pipe):
    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    with hasten.accelerate(pipe, "taylorseer", interval=3) as run:
        together = draw(pipe, prompt=["red apple", "banana"], generator=seeded(5, 6))
        assert run.summary().computed_steps == len(computed_steps(Uniform(3, 3), 12))
        for i, prompt in enumerate(["red apple", "banana"]):
            alone = draw(pipe, prompt=[prompt], generator=seeded(5 + i))
            assert torch.allclose(together[i], alone[0], atol=1e-4)


def test_another_diffusers_hook_survives(pipe):
    from diffusers.hooks import HookRegistry, ModelHook

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    run = hasten.accelerate(pipe, "reuse", interval=3)
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    count = Count()
    registry.register_hook(count, "count")
    draw(pipe, 6)
    run.remove()
    draw(pipe, 6)
    assert count.calls == 12
    assert list(registry.hooks) == ["count"]


def test_an_accelerate_hook_put_on_later_survives_removal(pipe):
    hooks = pytest.importorskip("accelerate.hooks")
    plain = draw(pipe, 6)
    run = hasten.accelerate(pipe, "reuse", interval=3)
    hooks.add_hook_to_module(pipe.transformer, hooks.ModelHook())
    draw(pipe, 6)
    run.remove()
    assert torch.equal(draw(pipe, 6), plain)
    hooks.remove_hook_from_module(pipe.transformer)
    assert torch.equal(draw(pipe, 6), plain)
    assert len(run.records) == 6


def test_a_projector_from_outside_composes(pipe):
    class Halves(Whole):
        components = ("left", "right")

        def combine(self, features, weights):
            half = features[0].shape[-1] // 2
            left = sum(w * f[..., :half] for w, f in zip(weights["left"], features, strict=True))
            right = sum(w * f[..., half:] for w, f in zip(weights["right"], features, strict=True))
            return torch.cat([left, right], -1)

    class Split(ScheduledMethod):
        def projector(self):
            return Halves()

        def predictors(self):
            return {"left": TaylorSeer().predictors()["whole"], "right": TaylorSeer().predictors()["whole"]}

    with hasten.accelerate(pipe, TaylorSeer(interval=4)):
        whole = draw(pipe)
    with hasten.accelerate(pipe, Split(interval=4)):
        split = draw(pipe)
    assert torch.allclose(whole, split, atol=1e-4)


def test_explicit_steps(pipe):
    with hasten.accelerate(pipe, "taylorseer", steps=[0, 1, 4, 7]) as run:
        draw(pipe, 10)
    assert [r.step for r in run.records if r.computed] == [0, 1, 4, 7]


# --- loud, never silent


def test_a_schedule_with_nothing_to_skip_warns_once(pipe):
    with hasten.accelerate(pipe, "taylorseer", interval=5), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draw(pipe, 3)
        draw(pipe, 3)
    messages = [str(w.message) for w in caught if issubclass(w.category, HastenWarning)]
    assert len(messages) == 1
    assert "skips nothing" in messages[0]
    assert "warmup" in messages[0]


def test_a_warmup_longer_than_the_run_is_refused_and_the_pipeline_stays_usable(pipe):
    plain = draw(pipe, 4)
    run = hasten.accelerate(pipe, "taylorseer", warmup=10)
    with pytest.raises(ScheduleError, match="longer than the run of 4 steps"):
        draw(pipe, 4)
    run.remove()
    assert torch.equal(draw(pipe, 4), plain)


@pytest.mark.parametrize(
    ("method", "params", "error", "says"),
    [
        ("hicahce", {}, UnknownNameError, "Did you mean 'hicache'"),
        ("hicache", {"sgima": 0.5}, UnknownNameError, "Did you mean 'sigma'"),
        ("hicache", {"interval": 0}, ConfigError, "HiCache: interval must be a whole number of 1 or more"),
        ("hicache", {"order": -1}, ConfigError, "HiCache: order must be a whole number from 0 to 6"),
        ("hicache", {"sigma": 2.0}, ConfigError, "HiCache: sigma must be a number above 0 to 1"),
        ("taylorseer", {"warmup": 0}, ConfigError, "TaylorSeer: warmup must be"),
        ("reuse", {"site": "hiden"}, ConfigError, "did you mean 'hidden'"),
        (Reuse(), {"sigma": 1}, UnknownNameError, "parameter of Reuse"),
        (42, {}, ConfigError, "name or a method object"),
    ],
)
def test_bad_input_is_refused_and_nothing_stays_attached(pipe, method, params, error, says):
    before = leftovers(pipe.transformer)
    with pytest.raises(error, match=says) as caught:
        hasten.accelerate(pipe, method, **params)
    assert isinstance(caught.value, HastenError)
    assert isinstance(caught.value, (ValueError, TypeError))
    assert leftovers(pipe.transformer) == before


def test_accelerating_twice_is_refused_and_the_first_stays(pipe):
    run = hasten.accelerate(pipe, "reuse", interval=3)
    fast = draw(pipe)
    with pytest.raises(AlreadyAcceleratedError, match="remove"):
        hasten.accelerate(pipe, "hicache")
    assert torch.equal(draw(pipe), fast)
    run.remove()


def test_a_diffusers_cache_is_not_overlaid(pipe):
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(AlreadyAcceleratedError, match="disable_cache"):
        hasten.accelerate(pipe, "hicache")
    pipe.transformer.disable_cache()


def test_what_has_no_transformer_is_refused(pipe):
    class UNetPipeline:
        unet = torch.nn.Linear(1, 1)

    for target in (UNetPipeline(), object(), None, "pipe"):
        with pytest.raises(TargetError, match="transformer"):
            hasten.accelerate(target, "hicache")
    with pytest.raises(ConfigError, match="give one caching method"):
        hasten.accelerate(pipe, "hicache", "foca")


def test_a_second_transformer_that_cannot_be_wired_releases_the_first(pipe):
    class Pair:
        transformer = pipe.transformer
        transformer_2 = torch.nn.Linear(1, 1)
        scheduler = pipe.scheduler

    before = leftovers(pipe.transformer)
    with pytest.raises(HastenError):
        hasten.accelerate(Pair(), "hicache")
    assert leftovers(pipe.transformer) == before


def test_methods_know_their_papers():
    infos = {info.name: info for info in hasten.methods()}
    assert set(METHODS) <= set(infos)
    for name in METHODS:
        assert "arXiv" in infos[name].paper
        assert infos[name].parameters["site"].default == "hidden"
        assert infos[name].summary
        assert not infos[name].needs_calibration


def test_configurations_are_values():
    assert HiCache(interval=7) == HiCache(interval=7)
    with pytest.raises(AttributeError):
        HiCache().order = 3


def test_the_module_sites_cost_is_stated_before_it_is_paid(pipe, monkeypatch):
    """Once, with the number of bytes that the run then holds."""
    from hasten.caching import engine

    monkeypatch.setattr(engine, "LARGE", 1)
    with hasten.accelerate(pipe, "taylorseer", interval=3, site="module") as run:
        stated = []

        def blocked(*_):
            stated.extend(str(w.message) for w in caught)

        handle = pipe.transformer.transformer_blocks[0].register_forward_hook(blocked)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            draw(pipe)
            draw(pipe)
        handle.remove()
        expected = run.estimate_bytes(64, text_tokens=8, dtype=torch.float32)
        assert run.summary().cache_bytes == expected
    messages = [str(w.message) for w in caught if issubclass(w.category, HastenWarning)]
    assert len(messages) == 1
    assert f"{expected / 2**30:.1f} GiB" in messages[0]
    assert "64 image tokens" in messages[0]
    assert stated, "the first block ran before anything was said"
