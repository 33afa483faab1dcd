"""The small causal video model, its data, training and grades, and what is measured on it; at tiny size."""

import gc
import json
import math
import re
from dataclasses import asdict, replace
from itertools import islice, pairwise
from random import Random

import pytest
import torch
from hasten.bench import subject
from hasten.bench.report import render_report
from hasten.bench.rollout import REFERENCE, Rolled, fidelity, measure
from hasten.bench.streams import DEFAULT_METHODS, StreamSettings, parse_streaming
from hasten.bench.video import best_suffix, side_by_side, write_video
from hasten.cli import main as cli
from hasten.cli import stream as cli_stream
from hasten.errors import ConfigError, ModelError
from hasten.fitting.importance import DistributionMatching, first_order_importance, masked_importance
from hasten.streaming import FocusedForcing, FullHistory, HeadBudgets, SlidingWindow, StreamStats, TopKAttention
from PIL import Image
from subjects import install
from torch._subclasses.fake_tensor import FakeTensor

from hasten_zoo.fit import Level, Rates, run
from hasten_zoo.sprites_stream import ModelConfig, conditions, draw, new_stream, paths, random_world, roll_out
from hasten_zoo.sprites_stream import evaluate as evaluation
from hasten_zoo.sprites_stream.data import NAMED, SIDE, UNNAMED
from hasten_zoo.sprites_stream.grade import grade
from hasten_zoo.sprites_stream.model import CausalVideoTransformer, load_model, save_model
from hasten_zoo.sprites_stream.reference import WEIGHTS, load_sprites_stream, worlds_of
from hasten_zoo.sprites_stream.rollout import noise_levels, rolled_chunks
from hasten_zoo.sprites_stream.train import export, main, make_fit

TINY = ModelConfig(patch=12, width=32, heads=2, layers=2)
WORLD = random_world(Random(0))


def tiny(seed=0):
    """A model with random weights whose gates and output layer are open."""
    torch.manual_seed(seed)
    model = CausalVideoTransformer(TINY)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@torch.no_grad()
def roll(model, method=None, frames=12, steps=2, backend="grouped", worlds=(WORLD,)):
    return roll_out(model, worlds, new_stream(model, method or FullHistory(), backend), frames, steps).video


# ---------------------------------------------------------------- data and grades


def test_objects_leave_and_come_back():
    for seed in range(20):
        world = random_world(Random(seed))
        for centres in paths(world, 96):
            gone = ((centres[:, 1] - SIDE / 2).abs() > 34).tolist()
            assert not all(gone[:NAMED])  # everybody is seen while named
            changes = sum(a != b for a, b in pairwise(gone))
            assert changes >= 4  # away and back twice or more
            assert sum(gone) >= 30


def test_a_video_is_its_world():
    video = draw(WORLD, 10)
    assert video.shape == (10, 3, SIDE, SIDE)
    assert video.min() >= 0
    assert video.max() <= 1
    assert torch.equal(draw(WORLD, 20)[:10], video)
    assert not torch.equal(draw(replace(WORLD, phases=(0.1, 0.2)), 10), draw(replace(WORLD, phases=(0.3, 0.4)), 10))


def test_names_are_told_at_first_only():
    words = conditions(WORLD, NAMED - 3, 6)
    assert words[:3, :3].tolist() == [[*WORLD.items, WORLD.background]] * 3
    assert words[3:, :3].tolist() == [list(UNNAMED)] * 3
    assert words[:, 3:].T.tolist() == paths(WORLD, NAMED + 3)[:, NAMED - 3 :, 1].tolist()
    assert (conditions(WORLD, 0, 6, named=3)[:, 0] == UNNAMED[0]).tolist() == [False] * 3 + [True] * 3


def test_worlds_for_training_and_for_grading_differ():
    rng = Random(0)
    assert not any(random_world(rng).held_out for _ in range(30))
    assert all(random_world(rng, held_out=True).held_out for _ in range(5))


def test_the_true_video_has_the_best_grades():
    curves = grade(WORLD, draw(WORLD, 12))
    seen = [v for v in curves["identity"] if not math.isnan(v)]
    assert seen
    assert all(v == 1 for v in seen)
    assert all(v < 0.01 for v in curves["motion"] if not math.isnan(v))
    assert all(v < 1e-6 for v in curves["background"])


def test_grades_see_another_object_another_place_and_another_background():
    others = [i for i in range(8) if i not in WORLD.items][:2]
    replaced = grade(WORLD, draw(replace(WORLD, items=tuple(others)), 12))
    assert all(v == 0 for v in replaced["identity"] if not math.isnan(v))
    late = grade(WORLD, torch.cat([draw(WORLD, 13)[1:]]))
    assert any(v > 1 for v in late["motion"] if not math.isnan(v))
    moved = grade(WORLD, draw(replace(WORLD, background=(WORLD.background + 1) % 4), 12))
    assert all(v > 0.02 for v in moved["background"])
    with pytest.raises(ConfigError, match="48, 48"):
        grade(WORLD, torch.zeros(3, 3, 8, 8))


# ---------------------------------------------------------------- model


def test_training_in_parallel_is_the_rollout_chunk_by_chunk():
    """What a chunk sees in training is what the stream of clean chunks gives it."""
    model, frames = tiny(), 9
    clean = draw(WORLD, frames)[None] * 2 - 1
    noisy = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    t, words = torch.full((1, frames), 0.6), conditions(WORLD, 0, frames)[None]
    with torch.no_grad():
        wanted = model.teach(clean, torch.zeros(1, frames), noisy, t, words)
        stream = new_stream(model, FullHistory())
        for first in range(0, frames, 3):
            now = slice(first, first + 3)
            got = model(noisy[:, now], t[:, now], words[:, now], stream, first)
            assert torch.allclose(got, wanted[:, now], atol=1e-4)
            model(clean[:, now], torch.zeros(1, 3), words[:, now], stream, first, keep=True)


def test_history_matters_and_the_future_does_not():
    model, frames = tiny(), 9
    clean = draw(WORLD, frames)[None] * 2 - 1
    noisy = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    t, words = torch.full((1, frames), 0.6), conditions(WORLD, 0, frames)[None]

    def velocities(changed):
        other = clean.clone()
        other[:, changed] += 0.5
        with torch.no_grad():
            return model.teach(other, torch.zeros(1, frames), noisy, t, words)

    plain = velocities([])
    changed = velocities(4)  # in the second chunk of three
    assert torch.allclose(changed[:, :6], plain[:, :6], atol=1e-6)  # a noisy chunk does not see its own clean copy
    assert (changed[:, 6:] - plain[:, 6:]).abs().max() > 1e-3


def test_rotation_depends_on_differences_and_is_undone():
    rotary = tiny().rotary
    tokens = torch.randn(1, 1, TINY.tokens, 2, 16, generator=torch.Generator().manual_seed(0))
    logits = [
        torch.einsum("bflhd,bfmhd->lmh", rotary(tokens, torch.tensor([a])), rotary(tokens, torch.tensor([b])))
        for a, b in ((5, 2), (9, 6), (9, 2))
    ]
    assert torch.allclose(logits[0], logits[1], atol=1e-4)
    assert not torch.allclose(logits[0], logits[2], atol=1e-2)
    numbers = torch.tensor([3, 40])
    turned = rotary(tokens.expand(1, 2, -1, -1, -1), numbers).permute(0, 3, 1, 2, 4)
    undone = rotary.unrotate(turned, numbers)
    still = rotary(tokens, torch.tensor([0])).permute(0, 3, 1, 2, 4)
    assert torch.allclose(undone, still.expand_as(undone), atol=1e-5)


def test_rollouts_with_the_whole_history_are_equal_and_others_are_not():
    model = tiny()
    plain = roll(model)
    assert plain.shape == (1, 12, 3, SIDE, SIDE)
    assert torch.equal(roll(model, FocusedForcing(budget=9)), plain)
    chosen = roll(model, FocusedForcing(budget=2))
    assert torch.allclose(chosen, roll(model, FocusedForcing(budget=2), backend="masked"), atol=1e-4)
    assert torch.equal(chosen[:, :3], plain[:, :3])  # the first chunk has no history
    assert not torch.allclose(chosen[:, 9:], plain[:, 9:], atol=1e-3)


def test_a_batch_is_its_videos():
    other = random_world(Random(5))
    model = tiny()
    both = roll(model, FocusedForcing(budget=2), worlds=(WORLD, other))
    assert both.shape[0] == 2
    assert not torch.equal(both[0], both[1])


def test_frames_come_in_chunks():
    model = tiny()
    with pytest.raises(ConfigError, match="multiples of 3"):
        roll(model, frames=10)
    with pytest.raises(ConfigError, match="one step"):
        roll(model, steps=0)
    with pytest.raises(ConfigError, match="one world"):
        roll(model, worlds=())
    with pytest.raises(ConfigError, match="heads that divide"):
        ModelConfig(width=100)


def test_chunks_come_one_by_one_without_end():
    model = tiny()
    stream = new_stream(model, SlidingWindow(window=2))
    with torch.no_grad():
        chunks = list(islice(rolled_chunks(model, (WORLD,), stream, steps=2), 6))
    assert stream[0].cache.frames == [0, 16, 17]
    video = roll(model, SlidingWindow(window=2), frames=18)
    assert torch.equal((torch.cat(chunks, 1) / 2 + 0.5).clamp(0, 1), video)


def living_bytes():
    """Of all tensors that anybody still holds."""
    gc.collect()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if is_tensor(t)}
    return sum(storages.values())


def is_tensor(thing):
    return issubclass(type(thing), torch.Tensor) and type(thing) is not FakeTensor


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [SlidingWindow(window=4), FocusedForcing(budget=2, window=6, diversity_tokens=4, forget_after=None)],
    ids=["window", "focused"],
)
def test_a_thousand_frames_of_the_model_take_no_more_memory_than_a_hundred(method):
    model = tiny()
    stream = new_stream(model, method)
    seen = {}
    with torch.no_grad():
        for i, chunk in enumerate(islice(rolled_chunks(model, (WORLD,), stream, steps=1), 334), 1):
            del chunk
            if i in (34, 334):
                seen[3 * i] = stream.stats().cache_bytes, living_bytes()
    assert stream[0].cache.next_frame == 1002
    assert seen[102] == seen[1002]


def test_what_no_head_chooses_is_forgotten_over_a_long_rollout():
    """Frames held, and with them memory and work, stop growing; without forgetting they are all there."""
    model, held = tiny(), {}
    methods = {"kept": FocusedForcing(budget=1, forget_after=None), "forgotten": FocusedForcing(budget=1)}
    for name, method in methods.items():
        stream, most = new_stream(model, method), []
        with torch.no_grad():
            for _ in islice(rolled_chunks(model, (WORLD,), stream, steps=1), 40):
                most.append(stream.stats().frames)
        held[name] = most
    assert held["kept"][-1] == 120
    assert max(held["forgotten"][20:]) <= max(held["forgotten"][:20]) < 30


def test_a_stream_that_was_not_reset_is_told():
    model = tiny()
    stream = new_stream(model, FullHistory())
    with torch.no_grad():
        for _ in islice(rolled_chunks(model, (WORLD,), stream, steps=1), 2):
            pass
        words = conditions(WORLD, 0, 3)[None]
        with pytest.raises(ConfigError, match=r"frame 0 comes after 6 frames: call reset\(\)"):
            model(torch.zeros(1, 3, 3, SIDE, SIDE), torch.ones(1, 3), words, stream, 0)


def test_noise_levels_fall_from_one_to_zero():
    levels = noise_levels(5, 3.0)
    assert levels[0] == 1
    assert levels[-1] == 0
    assert levels == sorted(levels, reverse=True)
    assert noise_levels(4, 1.0) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_models_are_saved_and_loaded(tmp_path):
    model = tiny()
    save_model(model, tmp_path)
    assert torch.allclose(roll(load_model(tmp_path)), roll(model), atol=0.1)
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="train"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match="train"):
        load_model(tmp_path / "nowhere")


# ---------------------------------------------------------------- training

QUICK = [Level("6", 48, 8, 1.0), Level("9", 8, 4, 3.0)]


def test_training_lowers_the_loss_and_goes_through_both_lengths():
    fit = make_fit(QUICK, TINY)
    fit.rates = Rates(lr=3e-3, warmup_steps=2)
    frames, losses = [], []
    while not fit.done:
        level, loss = fit.step()
        frames.append(level)
        losses.append(loss)
    assert frames[:6] == ["6"] * 6
    assert frames.count("9") == 2
    assert sum(losses[4:6]) < 0.95 * sum(losses[:2])


def test_the_history_that_is_learned_from_is_nearly_clean(monkeypatch):
    seen = []

    def teach(self, clean, t_clean, noisy, t, words):
        seen.append((clean, t_clean, noisy, t))
        return torch.zeros_like(clean)

    monkeypatch.setattr(CausalVideoTransformer, "teach", teach)
    make_fit(QUICK, TINY).loss("6", 8, torch.Generator().manual_seed(0))
    ((_, near, _, t),) = seen
    assert near.max() <= 0.1
    assert torch.equal(t[:, ::3].repeat_interleave(3, 1), t)  # one level a chunk
    assert t.std(1).min() > 0


def test_a_run_writes_a_log_and_a_checkpoint_to_export(tmp_path):
    run(make_fit(QUICK, TINY), tmp_path)
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert row["seen"]["9"] == 8
    run(make_fit(QUICK, TINY), tmp_path)  # nothing is left to do
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1
    export(tmp_path, TINY, tmp_path / "weights")
    assert load_model(tmp_path / "weights").config == TINY


def test_the_training_command_stops_when_its_time_is_up_and_exports(tmp_path):
    sizes = f"--out {tmp_path} --width 32 --layers 1 --device cpu"
    main([*sizes.split(), "--minutes", "0"])
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["steps"] == 0
    main([*sizes.split(), "--export", str(tmp_path / "weights")])
    assert load_model(tmp_path / "weights").config.layers == 1


# ---------------------------------------------------------------- importance


def gated(model, frames=6):
    def rollout(gates):
        stream = new_stream(model, FullHistory())
        stream.gates = gates
        return roll_out(model, (WORLD,), stream, frames, 1, seed=0).video

    return rollout


def test_masking_and_first_order_find_the_head_that_does_nothing():
    model = tiny()
    with torch.no_grad():
        model.blocks[1].out.weight[:, 16:] = 0  # the second head of the second layer is not read
    for importance in (
        masked_importance(gated(model), 2, 2),
        first_order_importance(gated(model), 2, 2),
        first_order_importance(gated(model), 2, 2, loss=lambda video: video.square().mean()),
    ):
        assert importance.shape == (2, 2)
        assert importance[1, 1] == 0
        assert (importance.flatten()[:3] > 0).all()
    budgets = HeadBudgets.from_importance(importance, 0, 5)
    assert budgets.table[1][1] == 0


def test_first_order_is_the_slope_of_masking():
    """For latents that are linear in the gates both are the mean square of each head's part."""
    parts = torch.randn(2, 3, 400, generator=torch.Generator().manual_seed(9)) * torch.tensor([0.1, 1.0, 3.0])[:, None]

    def rollout(gates):
        return (gates[..., None] * parts).sum((0, 1))

    masked = masked_importance(rollout, 2, 3)
    assert torch.allclose(masked, parts.square().mean(2), rtol=1e-4)
    assert torch.allclose(first_order_importance(rollout, 2, 3, probes=300), masked, rtol=0.3)


def test_the_distribution_matching_loss_is_its_formula():
    latents = torch.ones(1, 4)
    loss = DistributionMatching(real=lambda x, t: torch.full_like(x, 0.5), fake=lambda x, t: torch.full_like(x, 1.5))
    assert loss(latents).item() == pytest.approx((1.0 / 0.5) ** 2 / 2)
    seen = []

    def real(noisy, t):
        seen.append((noisy.clone(), t.clone()))
        return torch.zeros_like(noisy)

    again = DistributionMatching(real=real, fake=real, times=3)
    assert again(latents) == 0
    levels = [float(t) for _, t in seen]
    assert len(set(levels)) == 3
    assert all(0 < t < 1 for t in levels)
    again(latents)
    assert [float(t) for _, t in seen[6:]] == levels  # the same noise in every call
    assert torch.equal(seen[0][0], seen[6][0])


def test_importance_is_not_made_up():
    with pytest.raises(ConfigError, match="seed the noise"):
        masked_importance(lambda gates: torch.randn(3), 1, 2)
    with pytest.raises(ConfigError, match="no gate changes"):
        masked_importance(lambda gates: torch.ones(3), 1, 2)
    with pytest.raises(ConfigError, match="no gradient"):
        first_order_importance(lambda gates: torch.ones(3), 1, 2)
    with pytest.raises(ConfigError, match="at least one layer"):
        masked_importance(lambda gates: gates, 0, 2)
    with pytest.raises(ConfigError, match="times"):
        DistributionMatching(real=torch.add, fake=torch.add, times=0)


# ---------------------------------------------------------------- measuring and video files


def test_fidelity_is_psnr_frame_by_frame():
    reference = torch.rand(1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    video = reference.clone()
    video[:, 1] += 0.1
    assert fidelity(video, reference)[0].tolist() == pytest.approx([100.0, 20.0], abs=1e-3)
    with pytest.raises(ConfigError, match="two videos"):
        fidelity(video[0], reference[0])


def fake_roll(calls):
    """A quarter of the work for any method but the full one, which takes twice the time."""

    def roll(method, seed):
        calls.append((type(method).__name__, seed))
        full = isinstance(method, FullHistory)
        video = torch.full((1, 2, 3, 4, 4), 0.5 if full else 0.6)
        work = 100 if full else 25
        stats = StreamStats(
            forwards=1,
            pairs=work,
            full_pairs=100,
            kv_bytes=work,
            full_kv_bytes=200,
            attention_seconds=3 * work / 100,
            cache_bytes=work // 5,
            full_cache_bytes=20,
            peak_bytes=work // 4,
        )
        grades = [{"identity": [1.0, float("nan")]}, {"identity": [0.0, float("nan")]}]
        return Rolled(video, [2.0, 4.0] if full else [1.0, 2.0], stats, grades)

    return roll


def test_methods_that_fail_are_named_and_have_no_row():
    good = fake_roll([])

    def roll(method, seed):
        rolled = good(method, seed)
        if isinstance(method, SlidingWindow) and seed == 4:  # after one seed that was fine
            raise ZeroDivisionError("in a\nmethod")
        broken = rolled.video * float("nan") if isinstance(method, TopKAttention) else rolled.video
        return replace(rolled, video=broken)

    failures = {}
    methods = {"window": SlidingWindow(), "top": TopKAttention(k=2), "other": FullHistory()}
    rows = measure(roll, methods, [3, 4], failures=failures)
    assert [row.method for row in rows] == [REFERENCE, "other"]
    assert failures["window"] == "ZeroDivisionError: in a method"
    assert "values that are not finite" in failures["top"]
    with pytest.raises(ZeroDivisionError):
        measure(roll, {"window": SlidingWindow()}, [3, 4])


def test_rows_compare_each_method_with_the_full_history():
    calls = []
    rows = measure(fake_roll(calls), {"window": SlidingWindow()}, [3, 4, 5])
    assert calls[1:] == [(name, seed) for seed in (3, 4, 5) for name in ("FullHistory", "SlidingWindow")]
    full, window = rows
    assert (full.method, window.method) == (REFERENCE, "window")
    assert (full.latency_ratio, full.work_ratio, full.psnr) == (1, 1, None)
    assert (window.latency_ratio, window.work_ratio, window.kv_ratio, window.attention_ratio) == (2, 4, 8, 4)
    assert window.seconds_per_frame == 1.5
    assert (full.attention_share, full.most_ratio) == (0.5, 1)
    assert window.attention_share == 0.5  # of the whole history's time, which is what can be saved of
    assert window.most_ratio == pytest.approx(1 / (0.5 + 0.5 / 4))  # Amdahl: half of the time falls to a quarter
    assert (window.cache_bytes, window.cache_ratio, window.peak_bytes) == (5, 0.25, 6)
    assert window.seconds_curve == [1, 2]
    assert window.psnr_curve == pytest.approx([20, 20], abs=1e-3)
    assert window.drift["identity"][0] == 0.5
    plain = json.loads(json.dumps(asdict(window), allow_nan=False))
    assert plain["drift"]["identity"] == [0.5, None]


def test_measuring_needs_seeds_and_names():
    with pytest.raises(ConfigError, match="at least one seed"):
        measure(fake_roll([]), {}, [])
    with pytest.raises(ConfigError, match="full history"):
        measure(fake_roll([]), {REFERENCE: FullHistory()}, [1])


@pytest.fixture
def weights(tmp_path):
    save_model(tiny(), tmp_path / "weights")
    return tmp_path / "weights"


def test_the_evaluation_fits_budgets_and_measures_the_parts(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(evaluation, "DEFAULT_METHODS", ("focused-forcing:budget=2", "sliding-window:window=1"))
    monkeypatch.setattr(evaluation, "ablations", lambda budget, budgets: {"fitted": FocusedForcing(budget=budgets)})
    file = tmp_path / "result.json"
    evaluation.main(f"--weights {weights} --json {file} --worlds 1 --frames 9 --steps 1".split())
    assert HeadBudgets.load(weights / "budgets.json").mean <= evaluation.BUDGET
    names = [row["method"] for row in json.loads(file.read_text())["rows"]]
    assert names == [REFERENCE, "focused-forcing:budget=2", "sliding-window:window=1", "fitted"]


def test_the_parts_are_compared_at_one_budget():
    methods = [parse_streaming(text) for text in DEFAULT_METHODS] + [*evaluation.ablations(6, None).values()]
    assert {method.budget for method in methods if isinstance(method, FocusedForcing)} == {6}


def test_the_shipped_model_remembers_who_it_saw():
    """Frames after the names are withheld: with the history it knows who comes back, without it cannot."""
    model, frames = load_model(WEIGHTS).eval(), NAMED + 12
    worlds = worlds_of(0, 4)

    def drawn(method):
        with torch.no_grad():
            return roll_out(model, worlds, new_stream(model, method), frames, seed=0).video

    wanted = torch.stack([draw(world, frames) for world in worlds])
    methods = FullHistory(), SlidingWindow(window=1, sink=0)
    full, blind = ((drawn(method) - wanted)[:, NAMED:].square().mean() for method in methods)
    assert full < 0.01  # 20 dB
    assert full < 0.75 * blind


# ---------------------------------------------------------------- hasten bench, hasten demo --video


@pytest.fixture
def shipped(weights, monkeypatch):
    """A model of random weights in the place of the trained one."""
    install(monkeypatch, subject.STREAMING, "sprites-stream", lambda: load_sprites_stream(weights))


def command(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["hasten", *map(str, words)])
    try:
        cli.main()
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.usefixtures("shipped")
def test_bench_writes_figures_videos_and_a_report(tmp_path, monkeypatch, capsys):
    out, methods = tmp_path / "bench.json", "focused-forcing:budget=1,sliding-window:window=1,dummy-forcing:history=2"
    words = f"bench --model sprites-stream --methods {methods} --prompts 2 --frames 9 --steps 1 --json {out}"
    assert command(monkeypatch, *words.split()) == 0
    result = json.loads(out.read_text())
    assert result["kind"] == "streaming"
    assert result["settings"] == {"worlds": 2, "frames": 9, "steps": 1, "seed": 0}
    full, focused, windowed, _ = result["rows"]
    assert full["method"] == REFERENCE
    assert full["work_ratio"] == full["kv_ratio"] == 1
    assert focused["params"]["budget"] == 1
    assert focused["work_ratio"] > 1
    assert windowed["kv_ratio"] > 1  # a choice for each frame of a chunk reads more than one for all
    assert len(focused["psnr_curve"]) == 9
    assert len(focused["seconds_curve"]) == 3
    assert set(focused["drift"]) == {"identity", "motion", "background"}
    for row in result["rows"]:
        assert (tmp_path / row["video"]).stat().st_size > 500
    shown = capsys.readouterr().out
    assert "dummy-forcing" in shown
    assert "background" in shown
    page = render_report(out, tmp_path / "report.html").read_text()
    assert page.count("data:image/webp") + page.count("data:video/mp4") == 4
    charts = ["PSNR to the full history, dB", "seconds per chunk", "background", "identity", "motion"]
    assert re.findall('<svg role="img" aria-label="([^"]*)"', page) == charts
    assert "sliding-window, window=1" in page
    for heading in ("attention share", "at most", "held share", "peak"):
        assert heading in page
    assert focused["most_ratio"] > full["most_ratio"] == 1
    assert 0 < focused["attention_share"] < 1
    assert focused["peak_bytes"] >= focused["cache_bytes"] > 0


@pytest.mark.usefixtures("shipped")
def test_the_demo_writes_a_video_that_plays(tmp_path, monkeypatch):
    monkeypatch.setattr(cli_stream, "DEMO", ("focused-forcing:budget=1",))
    monkeypatch.setattr(StreamSettings.__init__, "__defaults__", (8, 6, 1, 0))  # six frames, one step
    video, out = tmp_path / "walk.webp", tmp_path / "demo"
    assert command(monkeypatch, "demo", "--video", video, "--out", out) == 0
    with Image.open(video) as file:
        assert file.n_frames == 6
        assert file.size == (2 * 6 * SIDE + 8, 6 * SIDE + 28)
    assert "<svg" in (out / "sprites-stream" / "report.html").read_text()


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize(
    ("methods", "message"),
    [("foca", "chooses no history"), ("focused-forsing", "focused-forcing"), ("topk-attention:k=-1", "k")],
)
def test_bench_says_which_methods_fit_a_stream(tmp_path, monkeypatch, capsys, methods, message):
    out = tmp_path / "bench.json"
    assert command(monkeypatch, "bench", "--model", "sprites-stream", "--methods", methods, "--json", out) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_images_cannot_be_streamed(tmp_path, monkeypatch, capsys):
    words = f"bench --methods focused-forcing --prompts 1 --computed-steps 9 --json {tmp_path / 'out.json'}"
    assert command(monkeypatch, *words.split()) == 2
    assert "focused-forcing is no caching or resolution method" in " ".join(capsys.readouterr().err.split())


def test_videos_side_by_side_carry_their_names():
    video = draw(WORLD, 3)
    both = side_by_side({"full history": video, "less": video}, enlarge=2)
    assert both.shape == (3, 3, 2 * SIDE + 28, 4 * SIDE + 8)
    assert torch.equal(both[:, :, 28:, : 2 * SIDE], both[:, :, 28:, -2 * SIDE :])
    assert not torch.equal(both[:, :, :28, : 2 * SIDE], both[:, :, :28, -2 * SIDE :])  # the names differ
    long = side_by_side({"focused-forcing, budget=6, diversity_tokens=16": video}, enlarge=6)
    assert (long[:, :, :28, -4:] == 1).all()  # a long name is written smaller, not cut off
    with pytest.raises(ConfigError, match="one shape"):
        side_by_side({"a": video, "b": video[:2]})


@pytest.mark.parametrize("suffix", [".webp", ".gif", ".mp4"])
def test_a_video_is_written_as_a_file_that_plays(tmp_path, suffix):
    if suffix == ".mp4":
        pytest.importorskip("imageio_ffmpeg")
    video = draw(WORLD, 6)
    path = write_video(video, tmp_path / "new" / f"clip{suffix}", fps=10, enlarge=2)
    if suffix == ".mp4":
        assert path.stat().st_size > 500
        return
    with Image.open(path) as file:
        assert file.n_frames == 6
        assert file.size == (2 * SIDE, 2 * SIDE)
        file.seek(3)
        shown = torch.tensor(list(file.convert("RGB").resize((SIDE, SIDE), 0).getdata())).view(SIDE, SIDE, 3)
    error = (shown.permute(2, 0, 1) / 255 - video[3]).abs().mean()
    assert error < (0.003 if suffix == ".webp" else 0.05)


def test_bad_videos_and_paths_are_refused(tmp_path, monkeypatch):
    video = draw(WORLD, 2)
    with pytest.raises(ConfigError, match="ends in"):
        write_video(video, tmp_path / "clip.avi")
    with pytest.raises(ConfigError, match=r"\[F, 3, H, W\]"):
        write_video(video[0], tmp_path / "clip.gif")
    with pytest.raises(ConfigError, match="fps"):
        write_video(video, tmp_path / "clip.gif", fps=0)
    monkeypatch.setattr("hasten.bench.video._has_ffmpeg", lambda: False)
    assert best_suffix() == ".webp"
    with pytest.raises(ConfigError, match="imageio-ffmpeg"):
        write_video(video, tmp_path / "clip.mp4")
