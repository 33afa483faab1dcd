"""The emoji tokenizer, its data and its measures; trainings at tiny size."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from hasten.errors import ConfigError, ModelError, UnknownNameError
from hasten.fitting.token_recipe import Recipe, build_model
from hasten.tokens import SemanticTree, TokenMap, flat_map, random_map
from hasten.tokens.codebook import codebook_fingerprint
from hasten.tokens.export import export_model
from hasten.tokens.refiner import Refiner, RefinerConfig
from hasten.tokens.shards import TokenShards

from hasten_zoo.emoji_tokens import VQTokenizer, compare, evaluate, features, load_tokenizer, swatches
from hasten_zoo.emoji_tokens.data import (
    BACKGROUNDS,
    HELD_OUT,
    MEASURE,
    OBJECTS,
    SIDE,
    TRAIN,
    _patterns,
    batches,
    draw,
    images,
)
from hasten_zoo.emoji_tokens.features import FeatureNet
from hasten_zoo.emoji_tokens.model import EmojiTokens, pack
from hasten_zoo.emoji_tokens.summary import differences, interval, rates, summary
from hasten_zoo.emoji_tokens.tokenizer import TokenizerConfig
from hasten_zoo.emoji_tokens.train_tokenizer import train

ROOT = Path(__file__).resolve().parents[2]
TINY = TokenizerConfig(codes=16, code_width=4, channels=16)


@pytest.fixture
def few(monkeypatch):
    """Measures on few images."""
    monkeypatch.setattr(evaluate, "REFERENCE", 96)
    monkeypatch.setattr(evaluate, "FIRST", 2)
    evaluate.reference.cache_clear()
    yield
    evaluate.reference.cache_clear()


def test_images_are_a_function_of_the_seed_and_show_objects_wholly_inside():
    a, b, c = images(40, 0), images(40, 0), images(40, 1)
    assert torch.equal(a.pixels, b.pixels)
    assert not torch.equal(a.pixels, c.pixels)
    assert a.pixels.shape == (40, 3, SIDE, SIDE)
    assert 0 <= a.pixels.min() <= a.pixels.max() <= 1
    assert set(a.classes.tolist()) <= set(range(len(OBJECTS)))
    assert set(a.backgrounds.tolist()) <= set(range(len(BACKGROUNDS)))
    low, high = (a.places[:, :2] - a.places[:, 2:] / 2, a.places[:, :2] + a.places[:, 2:] / 2)
    assert low.min() >= -1e-6
    assert high.max() <= 1 + 1e-6
    with pytest.raises(ConfigError, match="objects are"):
        draw(torch.tensor([len(OBJECTS)]), torch.Generator())


def test_an_object_is_where_its_place_says():
    generator = torch.Generator().manual_seed(3)
    seen = draw(torch.zeros(200, dtype=torch.long), generator)
    snow = (seen.backgrounds == 0).nonzero().flatten()
    for i in snow.tolist():
        ink = (seen.pixels[i] - seen.pixels[i, :, :1, :1]).abs().sum(0) > 0.4
        y, x = (torch.nonzero(ink).float().mean(0) + 0.5) / SIDE
        assert abs(float(x - seen.places[i, 0])) < 0.15
        assert abs(float(y - seen.places[i, 1])) < 0.15
    assert len(snow) > 5


def test_patterns_are_in_range_and_move_with_their_phase():
    patterns = _patterns(torch.tensor([[0, 0], [1, 2]]))
    assert all(-1 <= p.min() <= p.max() <= 1 for p in patterns.values())
    for name in ("dots", "checks", "stripes"):
        assert torch.equal(patterns[name][0][1:, 2:], patterns[name][1][:-1, :-2])


def test_uses_do_not_share_images_and_batches_add_up():
    parts = list(batches(70, HELD_OUT, 32))
    assert [len(part.classes) for part in parts] == [32, 32, 6]
    firsts = [images(1, use).pixels for use in (TRAIN, HELD_OUT, MEASURE)]
    assert not any(torch.equal(a, b) for a, b in [(0, 1), (0, 2), (1, 2)] for a, b in [(firsts[a], firsts[b])])


def test_a_token_is_the_nearest_code_by_direction_and_images_have_their_size():
    torch.manual_seed(0)
    tokenizer = VQTokenizer(TINY).eval()
    tokens = tokenizer.encode(images(2, 0).pixels)
    assert tokens.shape == (2, 64)
    assert tokenizer.decode(tokens).shape == (2, 3, 32, 32)
    assert torch.equal(tokenizer.lookup(3 * tokenizer.codebook), torch.arange(16))
    with pytest.raises(ConfigError, match="square"):
        tokenizer.decode(tokens[:, :5])


def test_codes_move_to_their_latents_and_rare_ones_are_put_onto_latents():
    torch.manual_seed(0)
    tokenizer = VQTokenizer(TINY).train()
    pixels = images(4, 0).pixels
    tokenizer.begin(pixels)
    assert tokenizer.perplexity() == pytest.approx(16)
    tokenizer.usage[3] = 0.0
    latents = tokenizer.latents(pixels).detach()
    tokens = tokenizer.lookup(latents)
    before = (latents * tokenizer.codebook[tokens]).sum(-1).mean()
    tokenizer.loss(pixels)
    torch.testing.assert_close(tokenizer.codebook.norm(dim=1), torch.ones(16))
    tokenizer.usage.fill_(1.0)
    for _ in range(20):
        tokenizer.loss(pixels)
    after = (latents * tokenizer.codebook[tokenizer.lookup(latents)]).sum(-1).mean()
    assert after > before
    with pytest.raises(ConfigError, match="as many latents"):
        VQTokenizer(TokenizerConfig(codes=512, channels=16)).begin(pixels)


def test_a_tokenizer_is_read_back_as_half_precision_has_it(tmp_path):
    torch.manual_seed(0)
    once = VQTokenizer.load(VQTokenizer(TINY).save(tmp_path / "once"))
    again = VQTokenizer.load(once.save(tmp_path / "again"))
    pixels = images(4, 0).pixels
    assert torch.equal(again.decode(again.encode(pixels)), once.decode(once.encode(pixels)))
    (tmp_path / "bad").write_bytes(b"x")
    for name in ("bad", "none"):
        with pytest.raises(ModelError, match="train one again"):
            VQTokenizer.load(tmp_path / name)
    with pytest.raises(ConfigError):
        TokenizerConfig(channels=24)


def test_the_shipped_tokenizer_reconstructs_and_uses_its_codes():
    tokenizer, pixels = load_tokenizer(), images(128, HELD_OUT).pixels
    tokens = tokenizer.encode(pixels)
    error = (tokenizer.decode(tokens) - pixels).square().mean()
    assert -10 * float(error.log10()) > 24
    share = torch.bincount(tokens.flatten(), minlength=tokenizer.config.codes) / tokens.numel()
    assert float(torch.special.entr(share).sum().exp()) > tokenizer.config.codes / 4
    drawn = swatches(np.array([0, 5, 7]))
    assert drawn.shape == (3, 12, 12, 3)
    assert 0 <= drawn.min() <= drawn.max() <= 1


def test_the_feature_network_knows_objects_and_damage():
    net, seen = features.FeatureNet.load(), images(256, HELD_OUT)
    assert (net.objects(seen.pixels) == seen.classes).float().mean() > 0.95
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(seen.pixels.shape, generator=generator)
    clean = net.describe(seen.pixels)
    steps = [
        np.linalg.norm(net.describe((seen.pixels + s * noise).clamp(0, 1)) - clean, axis=1).mean()
        for s in (0.02, 0.05, 0.1)
    ]
    assert 0 < steps[0] < steps[1] < steps[2]
    with pytest.raises(ModelError, match="Reinstall"):
        features.FeatureNet.load("none")


def test_half_of_the_images_are_spoiled_and_stay_images():
    pixels = images(200, 0).pixels
    spoiled = features.spoiled(pixels, torch.Generator().manual_seed(0))
    assert 0 <= spoiled.min() <= spoiled.max() <= 1
    changed = (spoiled != pixels).flatten(1).any(1).float().mean()
    assert 0.35 < changed < 0.6


def test_the_feature_network_is_trained_and_read_back(tmp_path):
    net = features.train(tmp_path, steps=2, every=1)
    again = features.FeatureNet.load(tmp_path / "features.safetensors")
    pixels = images(3, 0).pixels
    np.testing.assert_allclose(again.describe(pixels), net.describe(pixels), atol=0.02)
    assert [json.loads(x)["step"] for x in (tmp_path / "features_log.jsonl").read_text().splitlines()] == [1, 2]


def test_the_distance_is_zero_for_the_same_and_known_for_shifted_features():
    a = np.random.default_rng(0).standard_normal((500, 3))
    assert evaluate.frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert evaluate.frechet(a, a + np.array([3, 0, 4])) == pytest.approx(25)
    assert evaluate.frechet(a, 2 * a) == pytest.approx(np.trace(np.cov(a.T)) + ((a.mean(0)) ** 2).sum())
    with pytest.raises(ConfigError):
        evaluate.frechet(a[:1], a)


def test_precision_falls_for_strange_images_and_recall_for_missing_ones():
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((2, 200, 2)) + np.array([[[-20, 0]], [[20, 0]]])
    both = np.concatenate([left, right])
    precision, recall = evaluate.precision_recall(both, rng.standard_normal((200, 2)) + np.array([-20, 0]))
    assert precision > 0.9
    assert 0.4 < recall < 0.55
    precision, _ = evaluate.precision_recall(left, both)
    assert 0.45 < precision < 0.55
    with pytest.raises(ConfigError):
        evaluate.precision_recall(left[:3], right)


def test_real_images_are_good_and_noise_is_not(few):
    seen = images(96, HELD_OUT)
    real = evaluate.quality(seen.pixels, seen.classes)
    noise = evaluate.quality(torch.rand(seen.pixels.shape, generator=torch.Generator().manual_seed(0)), seen.classes)
    assert real.frechet < 0.2 * noise.frechet
    assert real.objects > 0.9 > 0.3 > noise.objects
    assert real.recall > noise.recall


def test_replacement_hurts_nothing_in_a_flat_vocabulary_and_random_mates_hurt_more_than_masc(few):
    tokenizer = load_tokenizer()
    test = evaluate.ReplacementTest(tokenizer, images(32, HELD_OUT).pixels)
    masc = SemanticTree.fit(tokenizer.codebook, normalize="unit").map(512)
    flat, mates, mixed = (test(m) for m in (flat_map(tokenizer.config.codes), masc, random_map(masc)))
    assert flat.psnr_to_reconstruction == pytest.approx(120)
    assert flat.psnr > mates.psnr > mixed.psnr
    assert flat.ssim > mates.ssim > mixed.ssim
    assert flat.feature_distance < mates.feature_distance < mixed.feature_distance


def test_the_four_vocabularies_have_the_sizes_they_should_have():
    maps = compare.vocabularies(np.random.default_rng(0).standard_normal((16, 4)), np.ones(16), 5)
    assert tuple(maps) == compare.ARMS
    assert {name: m.clusters for name, m in maps.items()} == {name: 16 if name == "flat" else 5 for name in maps}


def test_dead_codes_favour_no_vocabulary():
    counts = np.arange(16) % 4
    used = counts > 0
    maps = compare.vocabularies(np.random.default_rng(0).standard_normal((16, 4)), counts, 5)
    sizes = {name: np.bincount(m.labels[used], minlength=5) for name, m in maps.items() if name != "flat"}
    assert all(s.min() > 0 for s in sizes.values())
    assert sorted(sizes["random"]) == sorted(sizes["masc"])


def finished(name, seed, *distances, lr=1e-3):
    """A run as `compare` keeps it."""
    figures = {"loss": 1.0, "loss_over_log_k": 0.2, "entropy_over_log_k": 0.2, "token_loss": 2.0}
    curve = [
        {"step": 100 * (i + 1), "cpu_seconds": i + 1.0, "seconds": i + 2.0, "frechet": x, **figures}
        for i, x in enumerate(distances)
    ]
    last = {"uniform": {"frechet": distances[-1], "precision": 0.5, "recall": 0.5, "objects": 0.5}}
    facts = {"clusters": 5, "largest_cluster": 3, "parameters": 100, "lr": lr}
    return {"vocabulary": name, "seed": seed, **facts, "curve": curve, "last": last}


def test_the_summary_says_when_a_run_is_as_good_as_the_flat_one_in_the_end():
    runs = [finished("flat", 0, 9, 7, 6), finished("masc", 0, 8, 5, 4), finished("random", 0, 9, 8, 7)]
    runs += [finished("flat", 1, 9, 5, 4), finished("masc", 1, 9, 9, 3), finished("random", 1, 9, 9, 9)]
    found = summary([*runs, finished("flat", 2, 9, 1, 1)])  # an unfinished seed changes nothing
    assert found["seeds"] == [0, 1]
    assert found["goal"] == 5
    assert {name: one["steps_to_flat"] for name, one in found["vocabularies"].items()} == {
        "flat": [None, 200],
        "masc": [200, 300],
        "random": [None, None],
    }
    drawn = found["vocabularies"]["masc"]["drawn"]["frechet"]
    assert (drawn["mean"], drawn["min"], drawn["max"]) == (3.5, 3, 4)
    assert drawn["low"] < 3 < 4 < drawn["high"]  # of two seeds an interval is wide
    with pytest.raises(ConfigError, match="no seed is complete"):
        summary([finished("masc", 0, 1)])


def test_intervals_are_of_the_mean_and_differences_are_taken_seed_by_seed():
    draws = np.random.default_rng(0).normal(3.0, 2.0, (2000, 5))
    held = [found["low"] <= 3.0 <= found["high"] for found in map(interval, draws.tolist())]
    assert 0.93 < np.mean(held) < 0.97
    assert interval([2.0])["high"] == float("inf")
    runs = [finished(name, s, 9 + s + d) for s in range(5) for name, d in (("masc", 0), ("k-means", 1 + 0.1 * s))]
    found = differences(runs, "masc", "k-means")["frechet"]
    assert found["mean"] == pytest.approx(-1.2)
    assert -1.5 < found["low"] < found["high"] < -1.0  # though seeds differ by more
    with pytest.raises(ConfigError, match="both masc and flat"):
        differences(runs, "masc", "flat")


def test_each_vocabulary_gets_its_own_best_learning_rate():
    tuning = [finished("flat", 100, x, lr=lr) for lr, x in ((1e-3, 8.0), (2e-3, 5.0), (4e-3, 6.0))]
    assert compare.best_rate(tuning) == 2e-3
    assert rates(tuning) == {"flat": {"0.001": 8.0, "0.002": 5.0, "0.004": 6.0}}


def test_tokenizer_training_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("hasten_zoo.emoji_tokens.train_tokenizer.PLAIN", 2)
    for folder, minutes in (("parts", 0.0), ("whole", 1.0)):
        done = train(tmp_path / folder, steps=4, minutes=minutes, batch=2, config=TINY, every=2)
        assert done == (minutes > 0)
    assert train(tmp_path / "parts", steps=4, minutes=1.0, batch=2, config=TINY, every=2)
    assert len((tmp_path / "parts" / "tokenizer_log.jsonl").read_text().splitlines()) == 2
    one, two = (VQTokenizer.load(tmp_path / folder / "tokenizer.safetensors") for folder in ("parts", "whole"))
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-2)


def test_tokens_of_another_tokenizer_are_refused(tmp_path):
    torch.manual_seed(0)
    sizes = compare.Sizes(train=8, held_out=4)
    fine, held_out = compare.prepare(tmp_path, VQTokenizer(TINY).eval(), sizes)
    assert (len(fine), len(held_out), fine.length, fine.vocabulary) == (8, 4, 64, 16)
    with pytest.raises(ModelError, match="another tokenizer"):
        compare.prepare(tmp_path, VQTokenizer(TINY).eval(), sizes)


def test_the_shipped_model_draws_the_objects_that_it_is_asked_for():
    shipped = EmojiTokens.load()
    classes = torch.arange(len(OBJECTS)).repeat_interleave(4)
    drawn = shipped.draw(classes, seed=1)
    assert drawn.shape == (64, 3, 32, 32)
    assert torch.equal(drawn[:4], shipped.draw(classes, seed=1)[:4])
    right = float((FeatureNet.load().objects(drawn) == classes).float().mean())
    assert right > 0.6  # 0.79 of 2048 were measured; by chance it is a sixteenth


def test_only_what_belongs_together_is_packed(tmp_path):
    fingerprint = codebook_fingerprint(load_tokenizer().codebook)
    mapping = TokenMap(np.arange(2048) % 20, "masc", fingerprint)
    model = build_model(mapping, len(OBJECTS), 64, Recipe(width=8, layers=1, heads=2))
    export_model(model.model, mapping, tmp_path / "model", model.vocabulary)
    refiner = Refiner(mapping, RefinerConfig(hidden=8, width=4, heads=2)).save(tmp_path / "refiner.safetensors")
    packed = EmojiTokens.load(pack(tmp_path / "model", refiner, tmp_path / "packed"))
    assert packed.model.model.dtype == torch.float32
    for name, value in packed.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], atol=1e-3, rtol=1e-3)
    other = Refiner(flat_map(9), RefinerConfig(hidden=8, width=4, heads=2)).save(tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="another map"):
        pack(tmp_path / "model", other, tmp_path / "x")
    few = build_model(mapping, 3, 64, Recipe(width=8, layers=1, heads=2))
    export_model(few.model, mapping, tmp_path / "few", few.vocabulary)
    with pytest.raises(ModelError, match="24 rows"):
        pack(tmp_path / "few", refiner, tmp_path / "x")
    (tmp_path / "packed" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"'config\.json' is missing, damaged or changed"):
        EmojiTokens.load(tmp_path / "packed")
    with pytest.raises(ModelError, match="holds no model"):
        EmojiTokens.load(tmp_path / "none")


@pytest.mark.slow
def test_the_comparison_is_resumed_and_measures_all_four(tmp_path, few):
    recipe = Recipe(steps=2, batch=4, width=16, layers=1, heads=2)
    sizes = compare.Sizes(train=600, held_out=8, drawn=16, drawn_last=16, every=1, refiner_steps=1)
    options = {"sizes": sizes, "rates": (1e-3, 2e-3)}
    assert not compare.compare(tmp_path, recipe, 5, 1, minutes=0.0, **options)
    assert compare.compare(tmp_path, recipe, 5, 1, minutes=5.0, **options)
    result = json.loads((tmp_path / "comparison.json").read_text())
    assert [(run["vocabulary"], len(run["curve"])) for run in result["runs"]] == [(name, 2) for name in compare.ARMS]
    assert [(run["vocabulary"], run["lr"]) for run in result["tuning"]] == [
        (name, lr) for name in compare.ARMS for lr in (1e-3, 2e-3)
    ]
    of = {run["vocabulary"]: run for run in result["runs"]}
    assert set(of["masc"]["last"]) == set(of["k-means"]["last"]) == {"uniform", "frequency", "medoid", "refiner"}
    assert of["masc"]["last"]["refiner"]["cpu_seconds"] > 0
    assert summary(result["runs"])["seeds"] == [0]
    assert len(TokenShards.open(tmp_path / "fine")) == 600
    with pytest.raises(UnknownNameError, match="Did you mean 'k-means'"):
        compare.compare(tmp_path, recipe, 5, 1, minutes=0.0, arms=("kmeans",))


def test_the_pages_hold_what_the_json_files_say():
    script = runpy.run_path(str(ROOT / "benchmarks" / "tokens.py"))
    for page in script["PAGES"]:
        text = page.read_text(encoding="utf-8")
        assert "<!-- tokens " in text
        assert script["fill"](text) == text, "run python benchmarks/tokens.py tables"


def test_tables_show_means_ranges_and_what_was_not_reached():
    script = runpy.run_path(str(ROOT / "benchmarks" / "tokens.py"))
    runs = [finished("flat", 0, 9, 6), finished("masc", 0, 5, 4), finished("flat", 1, 9, 7), finished("masc", 1, 9, 8)]
    tuning = [finished(name, 100, 9, lr=lr) for name in ("flat", "masc") for lr in (1e-3, 2e-3)]
    found = summary(runs) | {"tuning": rates(tuning), "settings": {"rates": [1e-3, 2e-3]}}
    found["differences"] = {"masc - flat": differences(runs, "masc", "flat")}
    flat, masc = script["fair_table"](found).splitlines()[2:4]
    assert "| 6.5 (0.1 to 12.9) |" in flat
    assert "100, not reached" in masc
    assert "| masc | 9.0 | 9.0 |" in script["rates_table"](found)
    assert "| masc - flat | -0.5 (" in script["differences_table"](found)
    found["settings"]["recipe"] = {"steps": 2, "batch": 8, "width": 16, "layers": 1}
    assert "between MASC and the flat vocabulary no difference" in script["fair_line"](found)
    found["differences"]["masc - flat"]["frechet"] = {"mean": -2.0, "low": -3.0, "high": -1.0}
    assert "MASC is ahead of the flat vocabulary by 2.0 (1.0 to 3.0)" in script["fair_line"](found)
    for name in ("fair_table", "differences_table"):
        assert script[name]({"tuning": {}}) == script["NO_SEED"]
