"""Gates and the methods that have one: FBCache, TeaCache, MagCache, EasyCache, SpeCa."""

import math
import warnings
from itertools import pairwise

import pytest
import tiny
import torch
from pipelines import draw

import hasten
from hasten.caching.gates import ThresholdGate, relative_change
from hasten.caching.methods.easycache import RateGate
from hasten.caching.methods.fbcache import FrontGate
from hasten.caching.methods.magcache import MagnitudeGate
from hasten.caching.methods.teacache import AccumulatingGate
from hasten.calibration import Calibration, Fingerprint
from hasten.errors import CalibrationError, ConfigError, HastenWarning, ScheduleError, UnknownNameError

FINGERPRINT = Fingerprint("FluxTransformer2DModel", "", "", "", tuple(range(10)), ("cond",), None, "hidden")


def same(sums):
    return sums


def ratios(*values):
    tensor = torch.tensor(values, dtype=torch.float64)
    return Calibration("magcache", {"ratios": tensor}, FINGERPRINT)


def follow(gate, seen, total=None, result=same):
    """Decisions of a gate that observes `seen`, one per step; `result` makes the model's output of what it observed."""
    gate.begin(total)
    last, decisions = None, []
    for step, tensor in enumerate(seen):
        decision = gate.decide(step, last, tensor)
        if decision.computed:
            last = step
            gate.computed(step, result(tensor))
        decisions.append(decision)
    return decisions


def computed(decisions):
    return [step for step, decision in enumerate(decisions) if decision.computed]


# --- what is measured


def test_relative_change_is_the_ratio_of_mean_magnitudes():
    old, new = torch.tensor([[1.0, -3.0]]), torch.tensor([[2.0, -2.0]])
    assert relative_change(new, old, same) == pytest.approx(0.5)


def test_the_change_of_the_worst_image_of_a_batch():
    old = torch.ones(2, 4)
    new = old + torch.tensor([[0.0], [0.8]])
    assert relative_change(new, old, same) == pytest.approx(0.4)
    assert relative_change(new, old, same, per_sample=True) == pytest.approx(0.8)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("make", [lambda m: FrontGate(m), lambda m: AccumulatingGate(m, (1.0, 0.0))], ids=["fb", "tea"])
def test_the_worst_case_over_the_batch_decides_where_asked(make, per_sample):
    """One image of two changes by 80 %: 40 % on the average, below the threshold of 60 %."""
    config = hasten.FBCache if make(hasten.FBCache()).__class__ is FrontGate else hasten.TeaCache
    gate = make(config(threshold=0.6, per_sample=per_sample, schedule="uniform"))
    still = torch.ones(2, 4)
    moved = still + torch.tensor([[0.0], [0.8]])
    assert computed(follow(gate, [still, still, moved])) == ([0, 2] if per_sample else [0])


def test_the_error_of_easycache_begins_again_at_each_computed_step():
    """Input and result move by the same amount per step, and the error grows by a tenth of the result per step."""
    gate = RateGate(threshold=0.25, interval=50, warmup=3, last=False)
    steps = [torch.full((1, 4), 10.0 + step) for step in range(16)]
    decisions = follow(gate, steps)
    ran = computed(decisions)
    assert ran[:3] == [0, 1, 2]
    gaps = [b - a for a, b in pairwise(ran[2:])]
    assert len(gaps) >= 2
    assert min(gaps) > 1, "after a computed step the error is 0 again, and the next step is skipped"
    after = [decisions[step + 1].indicator for step in ran[3:] if step + 1 < len(steps)]
    assert all(indicator < 0.15 for indicator in after)


def test_a_reduction_makes_shards_agree():
    """Two devices with half of the tokens each add up sums, not ratios."""
    old, new = torch.rand(1, 8, 3), torch.rand(1, 8, 3)
    sums = []
    for half in (slice(0, 4), slice(4, 8)):
        relative_change(new[:, half], old[:, half], lambda s: sums.append(s) or s)
    whole = relative_change(new, old, same)
    assert relative_change(new[:, :4], old[:, :4], lambda s: sums[0] + sums[1]) == pytest.approx(whole, rel=1e-5)


# --- rules


class Given(ThresholdGate):
    """A gate that measures what it is told."""

    def __init__(self, values, **params):
        super().__init__(**{"threshold": 0.1, "interval": 100, "warmup": 1, "last": False, **params})
        self.values = values

    def measure(self, step, seen):
        return self.values[step]


def test_warmup_threshold_interval_and_last_step():
    values = [0.0] * 4 + [0.2] + [0.0] * 15
    gate = Given(values, warmup=2, interval=6, last=True)
    decisions = follow(gate, [None] * 20, total=20)
    assert computed(decisions) == [0, 1, 4, 10, 16, 19]
    assert [d.reason for d in decisions if d.computed] == ["warm-up", "warm-up", "above threshold", "interval",
                                                       "interval", "last step"]  # fmt: skip
    assert decisions[4].indicator == 0.2
    assert decisions[5].indicator == 0.0


@pytest.mark.parametrize(("params", "all_of_them"), [({"interval": 1}, True), ({"warmup": 12}, True), ({}, False)])
def test_what_a_gate_says_beforehand_is_what_it_does(params, all_of_them):
    gate = Given([0.0] * 12, **params)
    assert gate.skips_nothing(12) == all_of_them
    assert (computed(follow(gate, [None] * 12, total=12)) == list(range(12))) == all_of_them


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ScheduleError, match="longer than the run of 3"):
        Given([], warmup=5).begin(3)
    Given([], warmup=5, interval=1).begin(3)  # computes every step, however few there are


def test_teacache_adds_up_changes_and_a_computed_step_starts_again():
    config = hasten.TeaCache(threshold=0.25, schedule="uniform")
    steps = [torch.full((1, 4), 1.1**i) for i in range(8)]  # every change is 0.1 of what was before
    decisions = follow(AccumulatingGate(config, (1.0, 0.0)), steps)
    assert computed(decisions) == [0, 3, 6]
    assert [round(d.indicator, 6) for d in decisions if d.indicator is not None] == pytest.approx(
        [0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.1], abs=1e-5
    )


def test_teacache_polynomial_is_applied_to_each_change():
    config = hasten.TeaCache(threshold=0.25)
    steps = [torch.full((1, 4), 1.1**i) for i in range(3)]
    (_, one, two) = follow(AccumulatingGate(config, (2.0, 0.0, 0.01)), steps)
    assert one.indicator == pytest.approx(2 * 0.1**2 + 0.01, rel=1e-4)
    assert two.indicator == pytest.approx(2 * one.indicator, rel=1e-4)


@pytest.mark.parametrize("ratio", [0.9, 1.1])
def test_magcache_follows_its_curve_down_and_up(ratio):
    curve = [1.0] + [ratio] * 9
    config = hasten.MagCache(threshold=0.25, interval=50, retention=0.0, calibration=ratios(*curve))
    decisions = follow(MagnitudeGate(config, curve), [None] * 10, total=10)
    # after a computed step: |1 - .9| = .1, then |1 - .81| more = .29 > .25; or .1 and .21 more
    assert computed(decisions) == [0, 2, 4, 6, 8]


def test_magcache_curve_stretches_to_other_numbers_of_steps():
    gate = MagnitudeGate(hasten.MagCache(threshold=9.0, retention=0.0, calibration=ratios(1.0, 0.5)), [1.0, 0.5])
    decisions = follow(gate, [None] * 10, total=10)
    assert [d.indicator is not None and d.indicator > 0.1 for d in decisions[1:4]] == [False] * 3
    assert decisions[6].indicator is not None or decisions[6].computed


def test_magcache_computes_the_first_part_of_a_run():
    config = hasten.MagCache(threshold=9.0, interval=50, retention=0.3, calibration=ratios(*[1.0] * 10))
    assert computed(follow(MagnitudeGate(config, [1.0] * 10), [None] * 20, total=20)) == list(range(6))


def growing(steps, rate=0.1):
    """Tensors that grow by a share per step."""
    return [torch.full((1, 4), (1 + rate) ** step) for step in range(steps)]


def test_fbcache_compares_with_the_last_computed_step():
    """A change of a tenth per step adds up to a third in three steps."""
    gate = hasten.FBCache(threshold=0.25, interval=99, schedule="uniform").gate()
    assert computed(follow(gate, growing(10))) == [0, 3, 6, 9]


@pytest.mark.parametrize("size", [1, 100])
def test_easycache_adds_up_changes_and_a_computed_step_starts_again(size):
    """Whatever the unit of the results: where they follow the input, its own relative change is what adds up."""
    gate = hasten.EasyCache(threshold=0.25, interval=99, schedule="uniform").gate()
    decisions = follow(gate, growing(12), result=lambda tensor: size * tensor)
    assert computed(decisions) == [0, 1, 2, 5, 8, 11]
    assert decisions[3].indicator == pytest.approx(0.1, rel=0.01)
    assert decisions[6].indicator == pytest.approx(0.1, rel=0.01)


def test_easycache_expects_more_change_where_the_result_moves_faster_than_its_input():
    """A cube grows by a third where its root grows by a tenth."""
    gate = hasten.EasyCache(threshold=0.25, interval=99, schedule="uniform").gate()
    assert len(computed(follow(gate, growing(30), result=lambda tensor: tensor**3))) == 30
    assert len(computed(follow(gate, growing(30)))) == 12


def test_easycache_decides_alike_where_latents_and_results_lie_in_fixed_buffers():
    """As in a loop around a captured graph: what the gate was given is written over before the next step."""

    def decided(fixed):
        gate = hasten.EasyCache(threshold=0.25, interval=99, schedule="uniform").gate()
        gate.begin(12)
        last, found, given = None, [], list(growing(12))
        x, result = torch.zeros_like(given[0]), torch.zeros_like(given[0])
        for step, tensor in enumerate(given):
            x = x.copy_(tensor) if fixed else tensor
            decision = gate.decide(step, last, x)
            if decision.computed:
                last, result = step, result.copy_(tensor**2) if fixed else tensor**2
                gate.computed(step, result)
            found.append((decision.computed, decision.indicator))
        return found

    assert decided(fixed=True) == decided(fixed=False)
    assert not all(computed for computed, _ in decided(fixed=True))


def drafted(error, total=20, **params):
    """Decisions of SpeCa's gate when every draft is off by `error`."""
    gate = hasten.SpeCa(**{"threshold": 0.1, "warmup": 1, "interval": 99, "least": 0, **params}).gate()
    gate.begin(total)
    last, decisions = None, []
    for step in range(total):
        decision = gate.decide(step, last, None)
        if decision.computed:
            last = step
        else:
            gate.verified(step, error)
        decisions.append(decision)
    return decisions


def test_speca_accepts_at_the_start_what_it_refuses_at_the_end():
    """The threshold falls from 0.1 to a tenth of it over the run, and is 0.03 in the middle."""
    steps = computed(drafted(0.03, decay=0.1))
    assert steps[0] == 0
    assert 10 <= steps[1] <= 12
    assert computed(drafted(0.03, decay=1.0)) == [0]
    assert computed(drafted(0.009, decay=1e-6)) == [0]  # and is never less than a tenth


def test_speca_drafts_as_many_steps_as_it_is_told_at_least():
    assert computed(drafted(1.0, total=12, decay=1.0)) == [0, 2, 4, 6, 8, 10]
    assert computed(drafted(1.0, total=12, decay=1.0, least=2)) == [0, 3, 6, 9]


def test_the_worst_of_specas_passes_decides_and_is_forgotten_with_its_step():
    gate = hasten.SpeCa(threshold=0.1, warmup=1, interval=99, least=0, decay=1.0).gate()
    gate.begin(20)
    assert gate.decide(0, None, None).computed
    assert not gate.decide(1, 0, None).computed
    for error in (0.5, 0.01):  # two passes of the step, the second one of them close
        gate.verified(1, error)
    assert gate.decide(2, 0, None).computed
    assert not gate.decide(3, 2, None).computed


# --- on a pipeline


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("fbcache", 0.1, 0.6), ("teacache", 0.02, 0.5), ("easycache", 0.05, 1.0), ("speca", 0.01, 0.5)],
)
def test_a_larger_threshold_skips_more(pipe, name, low, high):
    plain = draw(pipe)
    counts, errors = [], []
    for threshold in (low, high):
        with hasten.accelerate(pipe, name, threshold=threshold) as run:
            fast = draw(pipe)
            assert torch.equal(draw(pipe), fast)  # a gate starts every run anew
            counts.append(run.summary().computed_steps)
            errors.append(float((fast - plain).norm() / plain.norm()))
            assert any(record.indicator is not None for record in run.records)
    assert counts[1] < counts[0] <= 12
    assert 0 <= errors[0] < errors[1] < 0.5
    assert torch.equal(draw(pipe), plain)


def test_a_gate_that_never_fires_says_which_threshold_would(pipe):
    with hasten.accelerate(pipe, "fbcache", threshold=1e-6) as run, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draw(pipe)
        draw(pipe)
    (message,) = [str(w.message) for w in caught if issubclass(w.category, HastenWarning)]
    smallest = min(r.indicator for r in run.records if r.indicator is not None)
    assert f"{smallest:.3g}" in message
    assert "larger threshold" in message


@pytest.mark.parametrize("name", ["fbcache", "teacache", "easycache", "speca"])
def test_all_passes_of_a_step_share_one_decision(pipe, name):
    with hasten.accelerate(pipe, name, threshold=0.3) as run:
        draw(pipe, true_cfg_scale=3.0, negative_prompt="banana")
    by_pass = {n: [r.computed for r in run.records if r.pass_name == n] for n in ("cond", "uncond")}
    assert by_pass["cond"] == by_pass["uncond"]
    assert not all(by_pass["cond"])


def test_front_blocks_run_at_every_step_and_the_others_do_not(pipe):
    model = pipe.transformer
    calls = {"front": 0, "double": 0, "single": 0}

    def count(name):
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    model.transformer_blocks[0].attn.register_forward_hook(count("front"))
    model.transformer_blocks[1].attn.register_forward_hook(count("double"))
    model.single_transformer_blocks[3].attn.register_forward_hook(count("single"))
    with hasten.accelerate(pipe, "fbcache", threshold=0.5) as run:
        draw(pipe)
        full = run.summary().computed_steps
    assert calls == {"front": 12, "double": full, "single": full}
    assert full < 12


def test_more_front_blocks_run_at_every_step():
    """A model of four blocks, of which two decide."""
    model, calls = tiny.build("WanTransformer3DModel"), [0] * 4
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    with hasten.accelerate(model, "fbcache", threshold=0.6, front=2) as run:
        tiny.sample("WanTransformer3DModel", model, steps=12)
        computed_steps = run.summary().computed_steps
    assert calls == [12, 12, computed_steps, computed_steps]
    assert computed_steps < 12


def test_looking_at_the_modulated_input_runs_no_attention(pipe):
    calls = []
    pipe.transformer.transformer_blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    with hasten.accelerate(pipe, "teacache", threshold=0.3) as run:
        draw(pipe)
        assert len(calls) == run.summary().computed_steps < 12


def test_speca_runs_one_block_to_check_a_draft(pipe):
    model, calls = pipe.transformer, []
    model.single_transformer_blocks[3].attn.register_forward_hook(lambda *_: calls.append("last"))
    model.single_transformer_blocks[2].attn.register_forward_hook(lambda *_: calls.append("other"))
    with hasten.accelerate(pipe, "speca", threshold=0.05) as run:
        draw(pipe)
        assert calls.count("last") == 12
        assert calls.count("other") == run.summary().computed_steps < 12


def test_easycache_runs_nothing_of_the_model_on_a_skipped_step(pipe):
    calls = []
    pipe.transformer.x_embedder.register_forward_hook(lambda *_: calls.append(1))
    with hasten.accelerate(pipe, "easycache", threshold=1.0) as run:
        draw(pipe)
        assert len(calls) == run.summary().computed_steps < 12


def test_a_skip_adds_the_remembered_change_to_what_enters(pipe):
    """With everything reused, the hidden tokens of a skipped step are entry + change of the last computed step."""
    seen = []
    pipe.transformer.norm_out.register_forward_hook(lambda _m, args, _o: seen.append(args[0].clone()))
    entries = []
    pipe.transformer.x_embedder.register_forward_hook(lambda _m, _a, output: entries.append(output.clone()))
    with hasten.accelerate(pipe, "teacache", threshold=100.0, schedule="uniform") as run:
        draw(pipe, 6)
    assert run.summary().computed_steps == 1
    change = seen[0] - entries[0]
    for entry, hidden in zip(entries[1:], seen[1:], strict=True):
        assert torch.allclose(hidden, entry + change, atol=1e-5)


def test_a_forecast_of_the_change_is_not_its_reuse(pipe):
    with hasten.accelerate(pipe, "fbcache", threshold=0.5):
        reused = draw(pipe)
    with hasten.accelerate(pipe, "fbcache", threshold=0.5, order=1):
        assert not torch.equal(draw(pipe), reused)


def test_the_gates_own_tensors_are_counted(pipe):
    with hasten.accelerate(pipe, "fbcache", threshold=0.5) as run:
        draw(pipe)
        assert run.summary().cache_bytes == 2 * 64 * 32 * 4  # the change of the blocks, and the front's reference


@pytest.mark.parametrize(
    ("name", "params", "error", "says"),
    [
        ("fbcache", {"front": 9}, ConfigError, "front must be less than the 2 blocks"),
        ("fbcache", {"steps": (0, 3)}, UnknownNameError, "parameter of fbcache 'steps'"),
        ("fbcache", {"computed_steps": 9}, UnknownNameError, "parameter of fbcache 'computed_steps'"),
        ("fbcache", {"schedule": "even"}, ConfigError, "FBCache: schedule must be 'uniform' or 'last'"),
        ("fbcache", {"site": "module"}, ConfigError, "FBCache: site must be 'hidden'"),
        ("teacache", {"coefficients": "fulx"}, ConfigError, "did you mean 'flux'"),
        ("easycache", {"site": "hidden"}, ConfigError, "EasyCache: site must be 'output'"),
        ("magcache", {}, CalibrationError, "hasten calibrate"),
    ],
)
def test_bad_input_is_refused(pipe, name, params, error, says):
    with pytest.raises(error, match=says), hasten.accelerate(pipe, name, **params):
        draw(pipe, 4)
    draw(pipe, 2)  # and the pipeline still works


def test_thresholds_decide_and_numbers_of_steps_do_not():
    with pytest.raises(ConfigError, match="threshold"):
        hasten.FBCache().with_computed_steps(9, 50)
    assert hasten.FBCache.adaptive
    assert math.isclose(hasten.FBCache().threshold, 0.05)
