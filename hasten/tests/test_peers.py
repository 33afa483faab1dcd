"""Other libraries beside ours: equal budgets, no traces, and a row instead of a crash."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from pipelines import draw

import hasten
from hasten.bench import runner
from hasten.bench.arms import Accelerated, method_arms
from hasten.bench.peers import PEERS, OnACopy, Peer, _hook, chosen_peers, peer_arms, shared_copy
from hasten.bench.report import render_report
from hasten.bench.requests import caching_method, parse_request
from hasten.bench.runner import BenchSettings, run_bench
from hasten.bench.sampling import counted_layer, draw_sample, plain
from hasten.bench.subject import Subject
from hasten.bench.thresholds import Trial, Trials, match_computed_steps
from hasten.cli.common import show_result
from hasten.errors import AdapterError, ConfigError, ModelError, UnknownNameError

STEPS = 12
CALL = {"height": 32, "width": 32, "max_sequence_length": 8}
PROMPTS = ["red apple", "blue fish"]


@pytest.fixture
def model(pipe):
    return Subject("tiny", pipe, PROMPTS, CALL)


@pytest.fixture
def trials(model):
    return Trials(model, PROMPTS, 0, STEPS, {})


def state_of(pipe):
    """Everything that a library could leave behind."""
    modules = {name: sorted(vars(module)) for name, module in pipe.transformer.named_modules()}
    return modules, type(pipe).__call__, sorted(vars(type(pipe))), sorted(vars(pipe)), dict(pipe.config)


def nothing(model, params):
    """Switches nothing on."""


def raises(model, params):
    raise RuntimeError("no kernel\nfor this device")


# --- budgets


@pytest.mark.parametrize("wanted", [1, 7, 9, 30])
def test_a_threshold_is_found_within_the_trials(wanted):
    tried = []

    def run(threshold):
        tried.append(threshold)
        return Trial(max(1, round(30 - 4.3 * torch.tensor(threshold / 1e-4).log().item())), 30.0)

    found = match_computed_steps(run, wanted)
    assert len(tried) <= 10
    assert wanted - 1 < found.trial.computed <= wanted
    assert run(found.threshold) == found.trial


def test_among_equal_counts_the_better_image_is_kept():
    def run(threshold):
        return Trial(4.5 if threshold > 0.01 else 20.0, 100 - threshold)

    found = match_computed_steps(run, 5)
    assert found.trial.computed == 4.5
    assert found.threshold < 0.02


def test_a_number_that_no_threshold_comes_near_is_refused():
    with pytest.raises(ConfigError, match="no threshold computes 5 steps: the nearest computes 4"):
        match_computed_steps(lambda threshold: Trial(4.0 if threshold > 0.01 else 20.0, 30.0), 5)


def test_a_budget_out_of_reach_says_what_to_do():
    with pytest.raises(ConfigError, match=r"loosest threshold 16 steps.*more than 9.*skipped steps in a row"):
        match_computed_steps(lambda threshold: Trial(16.0, 30.0), 9)
    with pytest.raises(ConfigError, match="0 < low < high"):
        match_computed_steps(lambda threshold: Trial(1.0, 30.0), 9, low=0.0)


@pytest.mark.parametrize("method", ["taylorseer", "taylorseer:site=module", "fbcache:threshold=0.3", "speca"])
def test_computed_steps_are_counted_as_the_records_have_them(model, method):
    """SpeCa runs the last block at every step and FBCache the first: neither may count."""
    chosen = caching_method(method)
    reference = draw_sample(model, plain, STEPS, PROMPTS[0], 0, {})
    assert reference.layer_calls == reference.forwards == STEPS
    full = []

    def attach(pipe):
        full.append(hasten.accelerate(pipe, chosen))
        return full[0]

    sample = draw_sample(model, attach, STEPS, PROMPTS[0], 0, {})
    assert sample.layer_calls == full[0].summary().computed_steps
    assert 0 < sample.layer_calls < STEPS


def test_the_counted_layer_belongs_to_the_last_block_but_one(pipe):
    blocks = len(pipe.transformer.single_transformer_blocks)
    assert counted_layer(pipe.transformer) == f"single_transformer_blocks.{blocks - 2}.attn.to_q"


@pytest.mark.parametrize("method", ["fbcache", "easycache"])
def test_methods_with_a_threshold_are_matched(trials, method):
    (arm,) = method_arms([parse_request(method)], [6], STEPS, trials)
    assert not arm.error
    assert arm.computed_steps == 6
    assert arm.params["threshold"] == arm.attach.method.threshold
    assert 4 <= trials.run(arm.attach, "x").computed <= 6


def test_a_threshold_needs_trials_and_reach(trials):
    assert method_arms([parse_request("fbcache")], [6], STEPS, None) == []  # there is nothing to see without a model
    (arm,) = method_arms([parse_request("fbcache:interval=2")], [3], STEPS, trials)
    assert "loosest threshold" in arm.error
    assert "interval=" in arm.error


def test_two_passes_count_as_one_step(pipe):
    call = {"true_cfg_scale": 2.0, "negative_prompt": ""}
    trials = Trials(Subject("tiny", pipe, PROMPTS, CALL), PROMPTS[:1], 0, STEPS, call)
    assert trials.passes == 2
    peers = tuple(peer for peer in PEERS if peer.name in ("hermite", "dbcache", "first-block"))
    for peer in peers:
        if peer.library != "diffusers":
            pytest.importorskip(peer.module)
    for arm in peer_arms([6], trials, peers):
        assert not arm.error, arm.error
        assert 3 <= trials.run(arm.attach, "x").computed <= 6


# --- peers


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: f"{peer.library}-{peer.name}")
def test_a_peer_keeps_the_budget_and_leaves_no_trace(peer, trials):
    pytest.importorskip(peer.module)
    pipe = trials.model.pipe
    image, transformer = draw(pipe), pipe.transformer
    before = state_of(pipe)  # after a call, which leaves diffusers' own registry behind
    (arm,) = peer_arms([6], trials, (peer,))
    assert not arm.error, arm.error
    assert arm.params
    again = pickle.loads(pickle.dumps(arm))  # as it travels to other processes
    trial = trials.run(again.attach, "x")
    assert 3 <= trial.computed <= 6
    assert trial.psnr < 100  # it did something
    assert pipe.transformer is transformer
    assert state_of(pipe) == before
    assert torch.equal(draw(pipe), image)


def test_a_copy_shares_weights_and_nothing_else(pipe):
    copy = shared_copy(pipe.transformer)
    assert all(a is b for a, b in zip(copy.parameters(), pipe.transformer.parameters(), strict=True))
    assert not {id(m) for m in copy.modules()} & {id(m) for m in pipe.transformer.modules()}
    assert torch.equal(copy.proj_out.weight, pipe.transformer.proj_out.weight)


def test_a_hooked_transformer_is_refused(pipe):
    pipe.transformer.forward = pipe.transformer.forward
    with pytest.raises(AdapterError, match="hooked already"):
        shared_copy(pipe.transformer)


def test_an_error_within_the_call_brings_the_transformer_back(pipe):
    transformer = pipe.transformer
    with pytest.raises(TypeError), OnACopy(nothing, {})(pipe):
        pipe(no_such_argument=1)
    with OnACopy(nothing, {})(pipe):
        assert pipe.transformer is not transformer
    assert pipe.transformer is transformer
    with pytest.raises(RuntimeError, match="kernel"), OnACopy(raises, {})(pipe):
        pass
    assert pipe.transformer is transformer


def test_hermite_of_hicache_pp_is_our_hicache_at_the_output(model, trials):
    """Two implementations of one formula on the same schedule."""
    pytest.importorskip("hicache_pp")
    (peer,) = [peer for peer in PEERS if peer.name == "hermite"]
    params = {"num_steps": STEPS, "interval": 4, "first_enhance": 3, "max_order": 1, "sigma": 0.5, "passes": 1}
    theirs = draw_sample(model, OnACopy(peer.switch, params), STEPS, PROMPTS[0], 0, {})
    own = hasten.HiCache(order=1, sigma=0.5, interval=4, warmup=3, site="output")
    ours = draw_sample(model, Accelerated(own), STEPS, PROMPTS[0], 0, {})
    assert theirs.layer_calls == ours.layer_calls
    assert torch.allclose(theirs.latents[-1], ours.latents[-1], atol=1e-4)


def test_peers_that_cannot_run_say_why(trials):
    peers = (
        Peer("absent", "no-such", "no_such_package", nothing, lambda search, wanted: [{}]),
        Peer("broken", "torch", "torch", raises, lambda search, wanted: [{}]),
        Peer("idle", "torch", "torch", nothing, lambda search, wanted: [{}]),
        Peer("picky", "torch", "torch", nothing, lambda search, wanted: []),
    )
    absent, broken, idle, picky = (arm.error for arm in peer_arms([6], trials, peers))
    assert "pip install no-such" in absent
    assert broken == "RuntimeError: no kernel for this device"
    assert idle == "12 steps are computed, not the 6 asked for"
    assert "only 6 steps" in picky


def test_a_cache_that_hooks_nothing_is_an_error(pipe, monkeypatch):
    monkeypatch.setattr("diffusers.hooks.apply_first_block_cache", lambda model, config: None)
    with pytest.raises(ModelError, match="FirstBlockCacheConfig hooks no module of FluxTransformer2DModel"):
        _hook(shared_copy(pipe.transformer), "apply_first_block_cache", "FirstBlockCacheConfig")


def test_older_diffusers_have_fewer_caches_and_registries_that_forget_nothing(pipe, monkeypatch):
    """0.35 has no TaylorSeer; registries remember those of their children from 0.41 on."""
    monkeypatch.delattr("diffusers.hooks.apply_taylorseer_cache", raising=False)
    with pytest.raises(ModelError, match="has no TaylorSeerCacheConfig; it takes a newer one"):
        _hook(shared_copy(pipe.transformer), "apply_taylorseer_cache", "TaylorSeerCacheConfig")
    monkeypatch.delattr("diffusers.hooks.HookRegistry.invalidate_child_registries_cache", raising=False)
    model = shared_copy(pipe.transformer)
    _hook(model, "apply_first_block_cache", "FirstBlockCacheConfig", threshold=0.5)
    assert model.transformer_blocks[0]._diffusers_hook.hooks


# --- the bench


class LateFailure:
    """Works in the trials and fails in the bench."""

    def __init__(self, allowed):
        self.allowed = allowed

    def __call__(self, model, params):
        self.allowed -= 1
        if self.allowed < 0:
            raise RuntimeError("out of memory")
        hasten.accelerate(model, "reuse", steps=(0, 1, 2, 3, 4))


def test_failed_peers_are_rows_and_the_rest_is_measured(model, monkeypatch, tmp_path, capsys):
    peers = (
        Peer("absent", "no-such", "no_such_package", nothing, lambda search, wanted: [{}]),
        Peer("late", "torch", "torch", LateFailure(2), lambda search, wanted: [{}]),
    )
    monkeypatch.setattr(runner, "peer_arms", lambda counts, trials, _: peer_arms(counts, trials, peers))
    out = tmp_path / "out.json"
    settings = BenchSettings(methods=("taylorseer", "fbcache"), computed_steps=(5,), prompts=1, steps=STEPS, peers=True)
    result = run_bench(model, settings, out)
    rows = {row["method"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["euler", "unipc", "taylorseer", "fbcache", "absent", "late"]
    assert rows["late"]["failed"] == "RuntimeError: out of memory"
    assert "pip install no-such" in rows["absent"]["failed"]
    for name in ("absent", "late"):
        assert rows[name].keys() == rows["euler"].keys()
        assert rows[name]["psnr"] is None
        assert rows[name]["budget"] == 5
    for name in ("euler", "unipc", "taylorseer", "fbcache"):
        assert not rows[name]["failed"]
        assert 3 <= rows[name]["computed_steps"] <= 5
        assert rows[name]["steps_ratio"] == pytest.approx(STEPS / rows[name]["computed_steps"], abs=1e-3)
    show_result(result)
    text = " ".join(capsys.readouterr().out.split())
    assert "Not measured: late (torch), 5 computed steps: RuntimeError: out of memory" in text
    assert "out of memory" in render_report(out, tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_peers_on_the_trained_model(emoji, tmp_path):
    for module in ("cache_dit", "hicache_pp"):
        pytest.importorskip(module)
    settings = BenchSettings(methods=("taylorseer",), computed_steps=(5,), prompts=1, steps=20, peers=True)
    rows = run_bench(emoji, settings, tmp_path / "out.json").rows
    peers = [row for row in rows if row.library not in ("plain", "hasten")]
    assert [row.method for row in peers] == [peer.name for peer in PEERS]
    for row in peers:
        assert not row.failed
        assert row.computed_steps <= row.budget
        assert row.psnr > 15


def test_peers_are_chosen_by_name():
    assert chosen_peers(()) == PEERS
    assert [peer.name for peer in chosen_peers(("hermite", "dbcache"))] == ["hermite", "dbcache"]
    with pytest.raises(UnknownNameError, match="Did you mean 'hermite'"):
        chosen_peers(("hermit",))


def test_the_reference_model_brings_a_leap_fit(emoji):
    trials = Trials(emoji, emoji.prompts[:1], 0, 50, {})
    fitted, absent = method_arms([parse_request("leap")], [9, 11], 50, trials)
    assert (fitted.steps, fitted.computed_steps, fitted.error) == (9, 9, "")
    assert "fitted for 4, 5, 6, 7, 8, 9, 10, 12, 14, 16 evaluations" in absent.error
    sample, few, whole = (
        draw_sample(emoji, attach, steps, emoji.prompts[0], 0, {"max_sequence_length": 8})
        for attach, steps in ((fitted.attach, 9), (plain, 9), (plain, 50))
    )
    assert sample.forwards == 9
    assert (sample.image - whole.image).square().mean() < 0.05 * (few.image - whole.image).square().mean()
