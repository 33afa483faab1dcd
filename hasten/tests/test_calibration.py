"""Recording, fitting, saving and refusing calibrations; L2P, HyCa and SVD-Cache."""

import json
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import draw, make_pipe

import hasten
from hasten import registry
from hasten.bench import subject
from hasten.caching import computed_steps
from hasten.caching.calibrated import forecast_error, gram_of
from hasten.caching.components import FeatureKey
from hasten.caching.methods.hyca import CANDIDATES, candidate
from hasten.caching.methods.l2p import (
    PUBLISHED,
    FullHistory,
    MaskedHistory,
    closed_rows,
    gradient_rows,
)
from hasten.caching.methods.svdcache import MovingAverage, Subspace
from hasten.caching.predictors import Hermite, Reuse, Taylor
from hasten.caching.schedule import Explicit, Uniform
from hasten.calibration import Calibration, Fingerprint, Trace
from hasten.errors import CalibrationError, ConfigError, HastenWarning, ScheduleError, UnknownNameError
from hasten.pipeline.hooks import hooks_on
from hasten.weights import same_weights, weights_digest

STEPS = 12
FITTED = ("l2p", "hyca", "svdcache", "magcache", "teacache")


def call(seed=0, **more):
    return {
        "prompt": "red apple",
        "height": 32,
        "width": 32,
        "output_type": "latent",
        "max_sequence_length": 8,
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(seed),
        **more,
    }


@pytest.fixture(scope="module")
def recorded():
    pipe = make_pipe()
    return pipe, hasten.record(pipe, [call(0), call(1)])


@pytest.fixture(scope="module")
def calibrations(recorded):
    _, trace = recorded
    return {name: hasten.fit(trace, name) for name in FITTED}


LINEAR = Fingerprint("FluxTransformer2DModel", "", "", "", tuple(range(STEPS)), ("cond",), None, "hidden")


def accelerated(pipe):
    return bool(hooks_on(pipe.transformer))


def smooth(seed, steps=STEPS, size=200, waves=3):
    """Features that move along a few sine waves, `[1, T, N]`."""
    rng = np.random.default_rng(seed)
    t = np.arange(steps)[:, None]
    total = sum(
        rng.normal(size=size) * np.sin(rng.uniform(0.05, 0.4) * t + rng.uniform(0, 6, size=size)) for _ in range(waves)
    )
    return torch.from_numpy(total)[None]


# --- recording


def test_a_trace_holds_every_step_of_every_call(recorded):
    _, trace = recorded
    slots = trace.features["cond"]
    assert {name: tuple(t.shape) for name, t in slots.items()} == {
        "modulated": (2, STEPS, 64, 32),
        "entry": (2, STEPS, 64, 32),
        "hidden": (2, STEPS, 64, 32),
        "normed": (2, STEPS, 64, 32),
        "output": (2, STEPS, 64 * 48),
    }
    assert trace.fingerprint.steps == STEPS
    assert trace.fingerprint.scheduler == "FlowMatchEulerDiscreteScheduler"
    assert not torch.equal(slots["hidden"][0], slots["hidden"][1])


def test_recording_leaves_images_and_pipeline_as_they_are(recorded):
    pipe, _ = recorded
    plain = draw(pipe, STEPS)
    seen = []
    trace = hasten.record(pipe, [lambda: seen.append(draw(pipe, STEPS))])
    assert torch.equal(seen[0], plain)
    assert torch.equal(draw(pipe, STEPS), plain)
    assert not accelerated(pipe)
    assert len(trace.features["cond"]["hidden"]) == 1


def test_recorded_features_are_those_of_the_model(recorded):
    pipe, trace = recorded
    seen = {"entry": [], "hidden": []}
    first = pipe.transformer.x_embedder.register_forward_hook(lambda _m, _a, out: seen["entry"].append(out[0].clone()))
    last = pipe.transformer.norm_out.register_forward_hook(
        lambda _m, args, _o: seen["hidden"].append(args[0][0].clone())
    )
    pipe(**call(1))
    first.remove()
    last.remove()
    for name, tensors in seen.items():
        assert torch.equal(torch.stack(tensors), trace.features["cond"][name][1])


def test_few_tokens_are_sampled_evenly(recorded):
    pipe, trace = recorded
    few = hasten.record(pipe, [call(0)], tokens=16)
    assert torch.equal(few.features["cond"]["hidden"][0], trace.features["cond"]["hidden"][0][:, ::4])


def test_every_pass_has_its_own_features(recorded):
    pipe, _ = recorded
    trace = hasten.record(pipe, [call(0, true_cfg_scale=3.0, negative_prompt="banana")])
    assert trace.passes == ("cond", "uncond")
    assert not torch.equal(trace.features["cond"]["hidden"], trace.features["uncond"]["hidden"])


def test_calls_that_differ_and_no_calls_are_refused(recorded):
    pipe, _ = recorded
    with pytest.raises(CalibrationError, match="nothing to record"):
        hasten.record(pipe, [])
    with pytest.raises(CalibrationError, match="differ in steps"):
        hasten.record(pipe, [call(0), call(0, num_inference_steps=6)])
    with pytest.raises(CalibrationError, match="never ran"):
        hasten.record(pipe, [lambda: None])
    draw(pipe, 2)


def test_a_pipeline_with_two_transformers_is_refused(recorded):
    pipe, _ = recorded

    class Pair:
        transformer, transformer_2, scheduler = pipe.transformer, make_pipe(1).transformer, pipe.scheduler

    with pytest.raises(CalibrationError, match="2 transformers"):
        hasten.record(Pair(), [lambda: None])
    assert not accelerated(pipe)


def test_unknown_methods_and_options_are_refused(recorded):
    _, trace = recorded
    with pytest.raises(UnknownNameError, match="Did you mean 'l2p'"):
        hasten.fit(trace, "lp2")
    with pytest.raises(UnknownNameError, match="Did you mean 'clusters'"):
        hasten.fit(trace, "hyca", cluster=3)
    with pytest.raises(ConfigError, match="nothing to calibrate; the methods that have are"):
        hasten.fit(trace, "taylorseer")
    with pytest.raises(CalibrationError, match="nothing of site 'module'"):
        hasten.fit(trace, "hyca", site="module")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named_with_call_pass_and_step(recorded, bad):
    pipe, trace = recorded
    spoiled = {p: {name: runs.clone() for name, runs in slots.items()} for p, slots in trace.features.items()}
    spoiled["cond"]["hidden"][1, 4, 0, 0] = bad
    with pytest.raises(CalibrationError, match=r"call 1: 'hidden' of pass 'cond' .* not finite at step 4"):
        hasten.fit(Trace(spoiled, trace.fingerprint), "l2p")
    final = pipe.transformer.norm_out
    handle = final.register_forward_hook(lambda module, inputs, output: output * bad)
    try:
        with pytest.raises(CalibrationError, match=r"call 0: 'output' of pass 'cond' .* not finite at step 0"):
            hasten.record(pipe, [call(0)])
        with pytest.raises(CalibrationError, match="call 0: the state after 1 steps is not finite"):
            hasten.fit_leap(pipe, [call(0)], [3])
    finally:
        handle.remove()
    assert not accelerated(pipe)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("name", [*FITTED, "leapcache"])
def test_runs_in_which_nothing_changes_are_fitted_or_refused(tmp_path, name, value):
    shapes = {
        "hidden": (2, STEPS, 4, 6),
        "entry": (2, STEPS, 4, 6),
        "modulated": (2, STEPS, 4, 6),
        "output": (2, STEPS, 9),
    }
    trace = Trace({"cond": {key: torch.full(shape, value) for key, shape in shapes.items()}}, LINEAR)
    if name in ("magcache", "svdcache"):
        with pytest.raises(CalibrationError, match=r"no ratios|no subspace"):
            hasten.fit(trace, name)
    else:
        fitted = hasten.fit(trace, name)
        again = Calibration.of(name, fitted.save(tmp_path / "file.safetensors"))
        assert again.tensors.keys() == fitted.tensors.keys()


def test_more_clusters_than_channels_are_refused(recorded):
    _, trace = recorded
    assert hasten.fit(trace, "hyca", clusters=32)
    with pytest.raises(ConfigError, match="'hidden' has 32 channels, which make no 33 clusters"):
        hasten.fit(trace, "hyca", clusters=33)


# --- files


@pytest.mark.parametrize("name", FITTED)
def test_a_saved_calibration_gives_the_same_image(recorded, calibrations, name, tmp_path):
    pipe, _ = recorded
    path = calibrations[name].save(tmp_path / "deep" / f"{name}.safetensors")
    loaded = Calibration.load(path)
    assert loaded.fingerprint == calibrations[name].fingerprint
    assert loaded.report == json.loads(json.dumps(calibrations[name].report))
    params = {"threshold": 0.3} if name in ("magcache", "teacache") else {"interval": 3}
    images = []
    for given_ in (calibrations[name], loaded, path, str(path)):
        with hasten.accelerate(pipe, name, calibration=given_, **params) as run:
            images.append(draw(pipe, STEPS))
            assert run.summary().skipped_steps > 0
    assert all(torch.equal(images[0], image) for image in images)
    assert not list(path.parent.glob("*.tmp"))


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_broken_file_is_named(calibrations, tmp_path, cut):
    path = calibrations["l2p"].save(tmp_path / "l2p.safetensors")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CalibrationError, match=r"l2p\.safetensors.*hasten calibrate"):
        hasten.L2P(calibration=path)


def test_other_files_are_no_calibrations(calibrations, tmp_path):
    from safetensors.torch import save_file

    missing = tmp_path / "none.safetensors"
    with pytest.raises(CalibrationError, match="no such file"):
        Calibration.load(missing)
    other = tmp_path / "weights.safetensors"
    save_file({"w": torch.ones(2)}, other)
    with pytest.raises(CalibrationError, match=r"weights\.safetensors: no usable calibration .*not written by hasten"):
        Calibration.load(other)
    save_file({"w": torch.ones(2)}, other, metadata={"hasten": json.dumps({"format": 1, "method": "l2p"})})
    with pytest.raises(CalibrationError, match=r"a version before 0\.2"):
        Calibration.load(other)
    with pytest.raises(CalibrationError, match="of 'hyca', not of 'l2p'"):
        hasten.L2P(calibration=calibrations["hyca"])
    with pytest.raises(CalibrationError, match="has to be fitted"):
        hasten.accelerate(make_pipe(), "l2p")


def test_what_cannot_be_fitted_is_refused_before_the_first_call(recorded):
    def never():
        pytest.fail("a call was made")

    pipe, _ = recorded
    for method, options, error, says in (
        ("taylorseer", {}, ConfigError, "nothing to calibrate"),
        ("l2q", {}, UnknownNameError, "Did you mean 'l2p'"),
        ("hyca", {"clusers": 3}, UnknownNameError, "Did you mean 'clusters'"),
        ("hyca", {"clusters": "many"}, ConfigError, "clusters must be"),
    ):
        with pytest.raises(error, match=says):
            hasten.calibrate(pipe, method, [never], **options)
    short = call(num_inference_steps=3, callback_on_step_end=lambda *_: never())
    with pytest.raises(CalibrationError, match="takes runs of 4 steps or more, got 3; record longer ones"):
        hasten.calibrate(pipe, "hyca", [short])


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_short_runs_are_fitted_or_refused(recorded, steps):
    pipe, _ = recorded
    trace = hasten.record(pipe, [call(num_inference_steps=steps)])
    for method, fewest in {"hyca": 4, "magcache": 2, "teacache": 2, "svdcache": 1, "l2p": 1}.items():
        if steps >= fewest:
            assert all(tensor.isfinite().all() for tensor in hasten.fit(trace, method).tensors.values())
            continue
        with pytest.raises(CalibrationError, match=f"{method} is fitted .* of {fewest} steps or more, got {steps}; "):
            hasten.fit(trace, method)


def test_a_domain_that_no_fit_has_is_not_advised(recorded):
    _, trace = recorded
    calibration = hasten.fit(trace, "l2p", site="hidden")
    with pytest.raises(ConfigError, match=r"of the plain domain, got domain='normed'; leave it out$"):
        hasten.L2P(calibration=calibration, site="hidden", domain="normed")
    with pytest.raises(ConfigError, match=r"leave it out, or calibrate again with domain=plain$"):
        hasten.SVDCache(calibration=hasten.fit(trace, "svdcache"), domain="plain")


def test_two_experts_are_refused_by_name_before_the_first_call(recorded):
    pipe, _ = recorded
    second = make_pipe(1).transformer
    two = SimpleNamespace(transformer=pipe.transformer, transformer_2=second, scheduler=pipe.scheduler)
    with pytest.raises(CalibrationError, match=r"2 transformers \(transformer, transformer_2\)"):
        hasten.calibrate(two, "l2p", [lambda: pytest.fail("a call was made")])
    assert not hooks_on(two.transformer)
    assert not hooks_on(two.transformer_2)


def test_runs_of_two_steps_can_be_recorded(recorded):
    """Recording computes every step, whatever the warm-up of a schedule."""
    pipe, _ = recorded
    for site in ("hidden", "module"):
        assert hasten.record(pipe, [call(num_inference_steps=2)], site=site).fingerprint.steps == 2


# --- mismatches


def refused(pipe, calibration, says, run=None, **params):
    before = set(pipe.transformer.__dict__) | {"_diffusers_hook"}  # which naming a pass makes
    with (
        pytest.raises(CalibrationError, match=says),
        hasten.accelerate(pipe, calibration.method, calibration=calibration, **params),
    ):
        (run or (lambda: draw(pipe, STEPS)))()
    assert set(pipe.transformer.__dict__) | {"_diffusers_hook"} == before
    draw(pipe, 2)


def test_another_model_is_refused(calibrations):
    other = make_pipe(5)
    refused(other, calibrations["l2p"], "other weights of the same architecture")
    with pytest.warns(HastenWarning, match="other weights"):
        hasten.accelerate(other, "hyca", calibration=calibrations["hyca"]).remove()
    wide = subject.load("emoji-flux").pipe
    refused(wide, calibrations["hyca"], "another configuration")


def in_8_bits(how, model):
    """The same weights as others keep them: cast by layer, in a tensor that knows its scale, or as bitsandbytes."""
    if how.startswith("float8"):
        model.enable_layerwise_casting(storage_dtype=getattr(torch, how), compute_dtype=torch.float32)
        return
    for module in model.modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        weight = module.weight.detach()
        rows = weight.abs().amax(1).clamp(min=1e-6)
        kept = (weight / rows[:, None] * 127).round().to(torch.int8)
        if how == "subclass":
            wide = kept.float() * rows[:, None] / 127
            kind = type("Int8", (torch.Tensor,), {"dequantize": lambda _, wide=wide: wide})
            kept = torch.Tensor._make_subclass(kind, kept)
        module.weight = torch.nn.Parameter(kept, requires_grad=False)
        if how == "int8":
            module.weight.SCB = rows


@pytest.mark.parametrize("how", ["float8_e4m3fn", "float8_e5m2", "subclass", "int8", "bfloat16", "float16"])
def test_the_same_weights_in_fewer_bits_are_the_same_model(calibrations, how):
    own = calibrations["l2p"]
    for seed in (0, 5):
        model = make_pipe(seed).transformer
        if "float16" in how:
            model.to(getattr(torch, how))
        else:
            in_8_bits(how, model)
        differences = own.check_model(model)
        assert differences == ([] if seed == 0 else ["calibrated for other weights of the same architecture"])
        # Fitted to few bits, used with many.
        narrow = replace(own, fingerprint=replace(own.fingerprint, weights=weights_digest(model)))
        assert (narrow.check_model(make_pipe().transformer) == []) == (seed == 0)


def test_a_calibration_serves_a_model_cast_by_layer(calibrations):
    pipe = make_pipe()
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    plain = draw(pipe, STEPS)
    for name in FITTED:
        with hasten.accelerate(pipe, name, calibration=calibrations[name]):
            assert (draw(pipe, STEPS) - plain).norm() < 0.3 * plain.norm()


def test_weights_that_were_trained_further_are_other_weights(calibrations):
    model, own = make_pipe().transformer, calibrations["l2p"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * parameter.abs().mean() * torch.randn(parameter.shape))
    assert own.check_model(model) == ["calibrated for other weights of the same architecture"]


@pytest.mark.parametrize(
    "text",
    [
        "619eea0fe6d06e54",
        "wide:",
        "wide:zz",
        "wide:0000",
        "wide:" + "c07f" * 128,
        "matrices:00",
        "matrices:" + "c07f" * 512,
        ":",
    ],
)
def test_a_text_that_is_no_digest_of_weights_is_no_model(text):
    assert not same_weights(text, make_pipe().transformer)


def test_weights_that_are_elsewhere_cannot_be_told_apart(calibrations):
    own, model = calibrations["l2p"], make_pipe(5).transformer
    assert replace(own, fingerprint=replace(own.fingerprint, weights="")).check_model(model) == []
    assert own.check_model(model.to("meta")) == []


def test_another_sampling_is_refused_with_the_difference(calibrations):
    pipe, l2p = make_pipe(), calibrations["l2p"]
    refused(pipe, l2p, "calibrated for 12 steps, this run has 10", lambda: draw(pipe, 10))
    refused(pipe, l2p, "another resolution, shift or scheduler", lambda: draw(pipe, STEPS, height=64, width=64))
    refused(pipe, l2p, "calibrated with guidance 3.5, this run has 2", lambda: draw(pipe, STEPS, guidance_scale=2.0))
    refused(
        pipe,
        l2p,
        "passes cond, this run has cond, uncond",
        lambda: draw(pipe, STEPS, true_cfg_scale=3.0, negative_prompt="banana"),
    )


def test_not_strict_is_a_warning(calibrations):
    pipe = make_pipe()
    with hasten.accelerate(pipe, "l2p", calibration=calibrations["l2p"], strict=False, interval=3):
        with pytest.warns(HastenWarning, match="this run has 20"):
            assert torch.isfinite(draw(pipe, 20)).all()
        with pytest.warns(HastenWarning, match="uncond"):
            draw(pipe, STEPS, true_cfg_scale=3.0, negative_prompt="banana")


def test_another_site_is_refused(calibrations):
    refused(make_pipe(), calibrations["l2p"], "calibrated at site 'output', used at 'hidden'", site="hidden")


def test_another_site_is_refused_where_the_weights_differ_too(calibrations):
    refused(make_pipe(3), calibrations["svdcache"], "calibrated at site 'hidden', used at 'module'", site="module")


def test_methods_that_do_not_depend_on_the_sampler_go_anywhere(calibrations):
    pipe = make_pipe()
    for name in ("hyca", "svdcache"):
        with hasten.accelerate(pipe, name, calibration=calibrations[name], interval=3) as run:
            draw(pipe, 8, height=64, width=64)
            assert run.summary().skipped_steps > 0


# --- l2p


def test_gram_gives_the_error_of_any_forecast():
    features = smooth(0)
    gram = gram_of(features)
    weights = [1.3, -0.5, 0.1]
    forecast = sum(w * features[0, s] for w, s in zip(weights, (7, 4, 1), strict=True))
    assert forecast_error(gram, 9, (7, 4, 1), weights) == pytest.approx(
        float((forecast - features[0, 9]).square().mean()),
        rel=1e-3,  # a small difference of large float32 products
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.floats(0.01, 2.0))
def test_the_closed_form_is_never_worse_than_a_fixed_predictor(seed, interval, noise):
    """On the data that it was fitted to, at every skipped step of a schedule."""
    features = smooth(seed) + noise * torch.randn(1, STEPS, 200, generator=torch.Generator().manual_seed(seed))
    gram = gram_of(features)
    computed = computed_steps(Uniform(interval, 2), STEPS)
    learned = MaskedHistory(gram, ridge=0.0)
    fixed = [Reuse(), Taylor(1), Taylor(2), Hermite(2, sigma=0.5), *map(candidate, CANDIDATES)]
    for step in set(range(STEPS)) - set(computed):
        stored = [full for full in reversed(computed) if full < step]
        best = min(forecast_error(gram, step, stored, p.weights(step, stored)) for p in fixed)
        own = forecast_error(gram, step, stored, learned.weights(step, stored))
        assert own <= best * (1 + 1e-6) + 1e-9


def test_a_large_ridge_is_reuse():
    learned = MaskedHistory(gram_of(smooth(1)), ridge=1e6)
    assert np.allclose(learned.weights(9, (7, 4, 1)), [1, 0, 0], atol=1e-4)


def test_steps_beyond_the_calibrated_ones_are_reused():
    gram = gram_of(smooth(1))
    assert MaskedHistory(gram, 0.0).weights(STEPS + 3, (7, 4)) == [1.0, 0.0]
    assert FullHistory(closed_rows(gram, 1e-3)).weights(STEPS + 3, (7, 4)) == [1.0, 0.0]


def test_full_history_is_the_recursion_on_forecasts():
    """As published: the forecast of a skipped step goes into the history of the later ones."""
    features = smooth(3)[0]
    rows = closed_rows(gram_of(features[None]), 1e-3)
    computed = [0, 1, 2, 5, 9]
    history = []
    for step in range(STEPS):
        known = step in computed
        history.append(features[step] if known else sum(rows[step, j] * history[j] for j in range(step)))
    learned = FullHistory(rows)
    for step in range(STEPS):
        if step not in computed:
            stored = [full for full in reversed(computed) if full < step]
            ours = sum(w * features[a] for w, a in zip(learned.weights(step, stored), stored, strict=True))
            assert torch.allclose(ours, history[step], atol=1e-6)


def test_training_starts_at_reuse_and_approaches_the_closed_form():
    gram = gram_of(smooth(4))

    def loss(rows):
        return sum(forecast_error(gram, t, list(range(t)), rows[t, :t]) for t in range(1, STEPS))

    start, early, late = (gradient_rows(gram, epochs) for epochs in (0, 20, 201))
    assert np.allclose(start[1:], np.eye(STEPS)[:-1])
    assert loss(start) > loss(early) > loss(late) >= loss(closed_rows(gram, 0.0)) - 1e-9


def test_training_agrees_with_torch():
    gram = gram_of(smooth(5))
    unit = torch.from_numpy(gram / np.mean(np.diag(gram)))
    size = STEPS - 1
    lower = torch.ones(size, size, dtype=torch.float64).tril()
    weights = torch.eye(size, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([weights], lr=0.01)
    for _ in range(30):
        optimiser.zero_grad()
        rows = weights * lower
        (((rows @ unit[:size, :size]) * rows).sum() - 2 * (rows * unit[1:, :size]).sum()).backward()
        optimiser.step()
    assert np.allclose((weights * lower).detach().numpy(), gradient_rows(gram, 30)[1:, :size], atol=1e-6)


@pytest.mark.parametrize("params", [{}, {"history": "full", "ridge": 0.1}])
def test_each_pass_is_forecast_by_its_own_weights(params):
    """The two passes of guidance move differently; each has to be forecast best by its own calibration."""
    features = {"cond": smooth(3), "uncond": smooth(11)}
    grams = {f"gram/{name}": torch.from_numpy(gram_of(steps)) for name, steps in features.items()}
    fingerprint = replace(LINEAR, site="output", passes=("cond", "uncond"))
    method = hasten.L2P(calibration=Calibration("l2p", grams, fingerprint), interval=4, **params)
    stored, target = (7, 3, 2, 1, 0), 9
    weights = {
        name: np.asarray(method.components(FeatureKey(name)).predictors["whole"].weights(target, stored))
        for name in features
    }
    assert not np.allclose(weights["cond"], weights["uncond"])
    for name, steps in features.items():
        known, truth = steps[0, list(stored)].numpy(), steps[0, target].numpy()
        errors = {other: np.linalg.norm(weights[other] @ known - truth) for other in features}
        assert min(errors, key=errors.get) == name


def test_a_recursion_that_runs_away_is_refused():
    """Features that are nearly determined by their past give large weights of either sign."""
    calibration = Calibration(
        "l2p", {"gram/cond": torch.from_numpy(gram_of(smooth(6, waves=6)))}, replace(LINEAR, site="output")
    )
    method = hasten.L2P(calibration=calibration, history="full", ridge=1e-12, interval=4, strict=False)
    with pytest.raises(ConfigError, match="amplify errors up to"):
        method.components(FeatureKey("cond"))
    hasten.L2P(calibration=calibration, history="full", ridge=0.1, interval=4).components(FeatureKey("cond"))


def test_published_lists(calibrations):
    assert {count: len(steps) for count, steps in PUBLISHED.items()} == {count: count for count in PUBLISHED}
    long = replace(calibrations["l2p"].fingerprint, timesteps=tuple(range(50)))
    calibration = Calibration("l2p", {"gram/cond": torch.eye(50, dtype=torch.float64)}, long)
    for count, steps in PUBLISHED.items():
        method = hasten.L2P(calibration=calibration, published=True).with_computed_steps(count, 50)
        assert method.plan() == Explicit(steps)
    with pytest.raises(ScheduleError, match="50 steps"):
        hasten.L2P(calibration=calibrations["l2p"], published=True)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"fit_by": "gradient"}, "fit_by='gradient' does nothing with history='masked'; .* or use history='full'"),
        ({"history": "full", "window": 3}, "window=3 does nothing with history='full'; .* or use history='masked'"),
        ({"published": True, "steps": (0, 5)}, r"steps=\(0, 5\) does nothing with published=True"),
    ],
)
def test_parameters_of_l2p_that_exclude_each_other(calibrations, params, says):
    with pytest.raises(ConfigError, match=says):
        hasten.L2P(calibration=calibrations["l2p"], **params)


# --- hyca


def hyca_of(features, labels, **params):
    grams = torch.from_numpy(np.stack([gram_of(features[..., labels == c]) for c in range(int(labels.max()) + 1)]))
    times = tuple(range(features.shape[1], 0, -1))
    fingerprint = Fingerprint("M", "", "", "", times, ("cond",), None, "hidden")
    tensors = {"clusters/hidden": labels.to(torch.int32), "grams/hidden": grams}
    return hasten.HyCa(calibration=Calibration("hyca", tensors, fingerprint), **params)


def test_each_cluster_gets_the_solver_that_suits_it():
    """Straight lines want a line, noise around a level wants to be held."""
    t = torch.arange(30.0)[None, :, None, None]
    lines = t * torch.randn(1, 1, 50, 3, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1, 30, 50, 3, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    for criterion in ("rollout", "one-step"):  # noise is no reason to hold for the sum of errors
        method = hyca_of(torch.cat([lines, noise], -1), labels, criterion=criterion, interval=4)
        straight, held = method.chosen["hidden"]
        assert straight not in ("hold", "hermite", "bdf2-damped")
        assert held in ("hold", "bdf2-damped", "hermite")


def test_the_chosen_mixture_is_no_worse_than_any_single_solver(recorded):
    _, trace = recorded
    calibration = hasten.fit(trace, "hyca", clusters=3)
    mixed = hasten.HyCa(calibration=calibration, interval=4)
    grams = [np.asarray(gram) for gram in calibration.tensors["grams/hidden"]]
    sizes = calibration.report["hidden"]["channels"]

    def error(names):
        return sum(
            size * mixed.drift(gram, mixed.solver(name).weights)
            for gram, name, size in zip(grams, names, sizes, strict=True)
        )

    own = error(mixed.chosen["hidden"])
    assert all(own <= error([name] * len(grams)) + 1e-9 for name in CANDIDATES)


def test_errors_that_cancel_from_step_to_step_do_not_count():
    """On lines under a larger noise, a held feature has the smaller errors, and a line the smaller sum of them."""
    t = torch.arange(40.0)[None, :, None, None]
    slope = torch.randn(1, 1, 200, 4, generator=torch.Generator().manual_seed(0))
    features = 0.4 * t * slope + torch.randn(1, 40, 200, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.zeros(4, dtype=torch.long)

    def measured(criterion):
        method = hyca_of(features, labels, criterion=criterion, solvers=("hold", "taylor1"), interval=6)
        computed = method.calibrated_steps()
        errors = []
        for step in sorted(set(range(40)) - set(computed)):
            stored = [earlier for earlier in reversed(computed) if earlier < step]
            weights = method.solver(method.chosen["hidden"][0]).weights(step, stored)
            forecast = sum(w * features[0, i] for i, w in zip(stored, weights, strict=False))
            errors.append(forecast - features[0, step])
        stacked = torch.stack(errors)
        total = float(stacked.mean(0).square().mean()) * (len(errors) / 40) ** 2
        gram = np.asarray(method.fitted.tensors["grams/hidden"][0])
        assert method.drift(gram, method.solver(method.chosen["hidden"][0]).weights) == pytest.approx(total, rel=1e-3)
        return method.chosen["hidden"][0], float(stacked.square().mean()), total

    held, squares, total = measured("rollout")
    line, more_squares, less_total = measured("drift")
    assert (held, line) == ("hold", "taylor1")
    assert squares < more_squares
    assert less_total < 0.7 * total


def test_steps_count_by_their_length():
    """What a solver does over short steps matters less to the image than what it does over long ones."""
    random = torch.Generator().manual_seed(0)
    turns = torch.randn(2, 200, 4, generator=random)
    flat, bent = torch.zeros(20, 200, 4), torch.arange(20.0)[:, None, None] * turns[0]
    features = torch.cat([flat, bent])[None] + 0.3 * torch.arange(40.0)[None, :, None, None] * turns[1]
    labels = torch.zeros(4, dtype=torch.long)
    method = hyca_of(features, labels, interval=6)
    gram = np.asarray(method.fitted.tensors["grams/hidden"][0])

    def drifts(timesteps):
        own = replace(method.fitted, fingerprint=replace(method.fitted.fingerprint, timesteps=timesteps))
        return replace(method, calibration=own).drift(gram, Reuse().weights)

    early_long = (*np.linspace(1000, 50, 20), *np.linspace(48, 2, 20))
    late_long = (*np.linspace(1000, 952, 20), *np.linspace(950, 50, 20))
    assert drifts(tuple(early_long)) < 0.5 * drifts(tuple(late_long))  # the second half moves more


def test_steps_count_alike_where_their_lengths_are_not_known(recorded):
    """Times that do not fall to zero: two evaluations at one time, logarithms of noise levels, a list that rises."""
    _, trace = recorded
    fitted = hasten.fit(trace, "hyca", clusters=1)
    (gram,) = (np.asarray(gram) for gram in fitted.tensors["grams/hidden"])

    def drift(times):
        own = replace(fitted, fingerprint=replace(fitted.fingerprint, timesteps=tuple(times)))
        return hasten.HyCa(calibration=own, interval=3).drift(gram, Reuse().weights)

    alike = drift(np.arange(STEPS, 0, -1))
    twice, logarithms, rising = (
        np.repeat(np.arange(STEPS // 2, 0, -1), 2),
        np.linspace(1.1, -1.5, STEPS),
        np.arange(STEPS),
    )
    assert drift(twice) == drift(logarithms) == drift(rising) == pytest.approx(alike)
    assert drift(np.linspace(1000, 1, STEPS) ** 2) != pytest.approx(alike, rel=0.05)


def test_with_guidance_solvers_are_chosen_by_the_mean_square(recorded):
    _, trace = recorded
    twice = Trace(
        {**trace.features, "uncond": trace.features["cond"]}, replace(trace.fingerprint, passes=("cond", "uncond"))
    )
    for runs, criterion, other in ((trace, "drift", "rollout"), (twice, "rollout", "drift")):
        fitted = hasten.fit(runs, "hyca", clusters=4)
        chosen, asked, unlike = (
            hasten.HyCa(calibration=fitted, interval=4, criterion=name).chosen for name in (None, criterion, other)
        )
        assert chosen == asked != unlike


@pytest.mark.parametrize("name", ["hyca", "svdcache"])
def test_guidance_that_was_not_calibrated_is_warned_of(recorded, calibrations, name):
    pipe, _ = recorded
    method = registry.info(name).config(calibration=calibrations[name], interval=4)
    guided = {"true_cfg_scale": 3.0, "negative_prompt": "banana"}
    with hasten.accelerate(pipe, method):
        with warnings.catch_warnings():
            warnings.simplefilter("error", HastenWarning)
            draw(pipe, STEPS)
        with pytest.warns(HastenWarning, match=f"{name}: calibrated on the passes cond, this run has uncond too"):
            draw(pipe, STEPS, **guided)


def test_clusters_are_found_again():
    t = torch.linspace(0, 1, 24)[None, :, None, None]
    smooth_part = t * torch.randn(1, 1, 40, 5, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1, 24, 40, 3, generator=torch.Generator().manual_seed(1))
    fingerprint = Fingerprint("M", "", "", "", tuple(range(24)), ("cond",), None, "hidden")
    trace = Trace({"cond": {"hidden": torch.cat([smooth_part, noise], -1)}}, fingerprint)
    labels = hasten.fit(trace, "hyca", clusters=2).tensors["clusters/hidden"].tolist()
    assert len(set(labels[:5])) == len(set(labels[5:])) == 1
    assert labels[0] != labels[5]


def test_one_solver_for_all_is_that_method(recorded, calibrations):
    pipe, _ = recorded
    with hasten.accelerate(pipe, "hyca", calibration=calibrations["hyca"], solvers=("taylor1",), interval=3):
        mixed = draw(pipe, STEPS)
    with hasten.accelerate(pipe, "taylorseer", order=1, interval=3, domain="normed"):
        assert torch.allclose(draw(pipe, STEPS), mixed, atol=1e-4)


@pytest.mark.parametrize("name", CANDIDATES)
def test_the_first_interval_of_a_uniform_schedule_is_a_straight_line(calibrations, name):
    """A second difference of the adjacent warm-up steps, taken over a whole interval, is mostly noise."""
    method = hasten.HyCa(calibration=calibrations["hyca"], interval=4)
    line = Taylor(1).weights(5, (2, 1, 0))
    free, gated = candidate(name).weights(5, (2, 1, 0)), method.solver(name).weights(5, (2, 1, 0))
    assert free[2] == 0 or free != gated
    assert gated[2] == 0
    if name not in ("hold", "hermite", "bdf2-damped"):
        assert gated == pytest.approx(line)
    even = hasten.HyCa(calibration=calibrations["hyca"], interval=4, schedule="even")
    assert even.solver(name).weights(5, (2, 1, 0)) == free
    assert method.solver(name).weights(9, (6, 2, 1)) == candidate(name).weights(9, (6, 2, 1))


def test_assigned_solvers_are_used(recorded, calibrations):
    pipe, _ = recorded
    calibration = calibrations["hyca"]
    count = len(calibration.tensors["grams/hidden"])
    with hasten.accelerate(pipe, "hyca", calibration=calibration, assigned=("bdf2",) * count, interval=3):
        same = draw(pipe, STEPS)
    with hasten.accelerate(pipe, "hyca", calibration=calibration, solvers=("bdf2",), interval=3):
        assert torch.equal(draw(pipe, STEPS), same)
    mixed = hasten.HyCa(calibration=calibration, assigned=("hold", *("newton",) * (count - 1)))
    assert mixed.chosen["hidden"] == ("hold", *("newton",) * (count - 1))
    with pytest.raises(ConfigError, match=f"assigned names {count + 1} solvers, but 'hidden' has {count} clusters"):
        hasten.HyCa(calibration=calibration, assigned=("hold",) * (count + 1))
    with pytest.raises(ConfigError, match="assigned has 'hold', which is none of solvers="):
        hasten.HyCa(calibration=calibration, assigned=("hold",) * count, solvers=("newton",))


# --- the domain of a fit


@pytest.mark.parametrize("name", ["hyca", "svdcache"])
def test_a_calibration_decides_on_the_domain(recorded, name):
    pipe, trace = recorded
    normed, plain = hasten.fit(trace, name), hasten.fit(trace, name, domain="plain")
    assert (normed.fingerprint.domain, plain.fingerprint.domain) == ("normed", "plain")
    results = []
    for calibration in (normed, plain):
        with hasten.accelerate(pipe, name, calibration=calibration, interval=3) as run:
            (engine,) = run._engines.values()
            seen = []
            engine.listener = lambda _pass, _step, key, tensor, seen=seen: (
                key == "hidden" and seen.append(tensor.clone())
            )
            results.append(draw(pipe, STEPS))
        is_normed = all(torch.allclose(tokens.mean(-1), torch.zeros(()), atol=1e-5) for tokens in seen)
        assert is_normed == (calibration is normed)
    assert not torch.equal(*results)
    with pytest.raises(ConfigError, match="the calibration is of the normed domain, got domain='plain'"):
        hasten.accelerate(pipe, name, calibration=normed, domain="plain")


def test_a_trace_without_a_known_norm_is_fitted_as_it_is(recorded):
    _, trace = recorded
    bare = Trace({name: {"hidden": slots["hidden"]} for name, slots in trace.features.items()}, trace.fingerprint)
    assert hasten.fit(bare, "svdcache").fingerprint.domain == "plain"
    with pytest.raises(CalibrationError, match="domain='normed' needs the image tokens behind a final norm"):
        hasten.fit(bare, "svdcache", domain="normed")


# --- svd-cache


def test_the_whole_space_is_the_forecast_and_an_empty_one_is_reuse(recorded):
    pipe, trace = recorded
    whole = hasten.fit(trace, "svdcache", energy=1.0)
    assert whole.report["cond/hidden"]["k"] in (31, 32)  # tokens behind a layer norm have no mean
    with hasten.accelerate(pipe, "svdcache", calibration=whole, mode="taylor", interval=3):
        principal = draw(pipe, STEPS)
    with hasten.accelerate(pipe, "taylorseer", order=2, interval=3, domain="normed"):
        assert torch.allclose(draw(pipe, STEPS), principal, atol=1e-4)
    features = list(torch.randn(3, 2, 5, 32))
    weights = {"principal": [2.0, -1.5, 0.5], "residual": [1.0, 0.0, 0.0]}
    assert torch.equal(Subspace(torch.zeros(32, 0)).combine(features, weights), features[0])


@pytest.mark.parametrize("of", ["features", "changes"])
def test_more_energy_takes_more_directions(recorded, of):
    _, trace = recorded
    sizes = [hasten.fit(trace, "svdcache", energy=e, of=of).report["cond/hidden"]["k"] for e in (0.5, 0.85, 0.99)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    basis = hasten.fit(trace, "svdcache", energy=0.85, of=of).tensors["basis/cond/hidden"]
    assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5)


def test_the_basis_holds_the_energy_that_was_asked_for(recorded):
    _, trace = recorded
    features = trace.features["cond"]["hidden"].flatten(0, 2)
    shares = {}
    for centred in (True, False):
        fitted = hasten.fit(trace, "svdcache", energy=0.9, centred=centred, domain="plain")
        basis, about = fitted.tensors["basis/cond/hidden"], features - centred * features.mean(0)
        shares[centred] = float((about @ basis).square().sum() / about.square().sum())
        assert 0.9 <= shares[centred] < 1
    assert shares[True] != shares[False]


def test_each_pass_has_a_basis_of_its_own(recorded):
    _, trace = recorded
    ours = trace.features["cond"]
    other = {key: steps.flip(-1) if key in ("hidden", "normed") else steps for key, steps in ours.items()}
    both = Trace({"cond": ours, "uncond": other}, replace(trace.fingerprint, passes=("cond", "uncond")))
    method = hasten.SVDCache(calibration=hasten.fit(both, "svdcache", energy=0.6))
    features = [ours["normed"][0, t] for t in (8, 5)]
    weights = {"principal": [2.0, -1.0], "residual": [1.0, 0.0]}

    def forecast(pass_name, stored):
        return method.components(FeatureKey(pass_name, "hidden")).projector.combine(stored, weights)

    mirrored = forecast("uncond", [tokens.flip(-1).contiguous() for tokens in features]).flip(-1)
    assert torch.allclose(forecast("cond", features), mirrored, atol=1e-4)
    assert not torch.allclose(forecast("uncond", features), forecast("cond", features), atol=1e-4)


def test_moving_averages_by_hand():
    velocity = MovingAverage("velocity", beta=0.5, window=4)
    # slopes 2 and 1, newest first, shares 2/3 and 1/3, each for as long as it lasted: 5 and 2 steps
    values = {10: 20.0, 5: 10.0, 3: 8.0}
    weights = velocity.weights(13, (10, 5, 3))
    assert sum(w * v for w, v in zip(weights, values.values(), strict=True)) == pytest.approx(20 + 3 * (2 * 5 + 1) / 6)
    assert velocity.weights(13, (10,)) == [1.0]
    assert MovingAverage("new-heavy", 0.9, 3).weights(9, (8, 4, 2)) == pytest.approx(
        np.array([0.9, 0.09, 0.009]) / 0.999
    )
    assert MovingAverage("literal", 0.9, 3).weights(9, (8, 4, 2)) == pytest.approx(np.array([0.1, 0.09, 0.081]) / 0.271)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("svdcache", {"energy": 0.0}, "svdcache: energy must be a number above 0 to 1, got 0.0"),
        ("svdcache", {"of": "change"}, "svdcache: of must be .* did you mean 'changes'"),
        ("hyca", {"clusters": 0}, "hyca: clusters must be a whole number of 1 or more, got 0"),
        ("hyca", {"clusters": "2"}, "hyca: clusters must be a whole number of 1 or more, got '2'"),
        ("teacache", {"degree": 0}, "teacache: degree must be a whole number of 1 or more"),
        ("l2p", {"site": "module"}, "l2p: site must be 'output' or 'hidden'"),
    ],
)
def test_bad_fit_options_are_refused(recorded, name, options, says):
    with pytest.raises(ConfigError, match=says):
        hasten.fit(recorded[1], name, **options)


# --- at the module site


@pytest.mark.parametrize("name", ["hyca", "svdcache"])
def test_calibrated_methods_at_the_module_site(name):
    pipe = make_pipe()
    plain = draw(pipe, STEPS)
    calibration = hasten.calibrate(pipe, name, [call(0)], site="module", tokens=32)
    slots = {key.split("/", 1)[1] for key in calibration.tensors}
    assert (
        len(slots) == 2 * 4 + 4
    )  # attention for two streams and two networks a double block, one output a single block
    with hasten.accelerate(pipe, name, calibration=calibration, site="module", interval=3) as run:
        fast = draw(pipe, STEPS)
        assert run.summary().skipped_steps == 6
    assert 0 < (fast - plain).norm() / plain.norm() < 0.2
    assert torch.equal(draw(pipe, STEPS), plain)
