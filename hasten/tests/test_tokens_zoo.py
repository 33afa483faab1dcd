"""The emoji tokenizer, its data and its measures at tiny size."""

import numpy as np
import pytest
import torch

from hasten.errors import ConfigError, ModelError
from hasten.tokens import SemanticTree, flat_map, random_map
from hasten.tokens.shards import TokenShards
from hasten.tokens.train import Recipe
from hasten.zoo.emoji_tokens import VQTokenizer
from hasten.zoo.emoji_tokens.compare import _with_reach, compare, vocabularies
from hasten.zoo.emoji_tokens.data import load_token_set, varied
from hasten.zoo.emoji_tokens.evaluate import FeatureSpace, frechet, precision_recall, replacement_test
from hasten.zoo.emoji_tokens.tokenizer import TokenizerConfig
from hasten.zoo.emoji_tokens.train_tokenizer import export, train

TINY = TokenizerConfig(codes=16, code_width=4, channels=8)
DATA = load_token_set()


def test_the_two_sets_share_no_picture_and_know_all_classes():
    pictures = {p.numpy().tobytes() for p in DATA.train}
    assert not any(p.numpy().tobytes() in pictures for p in DATA.test)
    assert len(DATA.test) == (len(DATA.train) + len(DATA.test)) // 10
    assert set(DATA.test_classes.tolist()) | set(DATA.train_classes.tolist()) == set(range(len(DATA.names)))


def test_variants_are_pictures_and_depend_on_the_seed_alone():
    a, b, c = (varied(DATA.train[:6], torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.shape == DATA.train[:6].shape
    assert 0 <= a.min() <= a.max() <= 1


def test_a_token_is_the_nearest_code_by_direction_and_pictures_have_their_size():
    torch.manual_seed(0)
    tokenizer = VQTokenizer(TINY).eval()
    tokens = tokenizer.encode(DATA.train[:2])
    assert tokens.shape == (2, 256)
    assert tokenizer.decode(tokens).shape == (2, 3, 64, 64)
    assert torch.equal(tokenizer.lookup(3 * tokenizer.codebook), torch.arange(16))
    with pytest.raises(ConfigError, match="square"):
        tokenizer.decode(tokens[:, :5])


def test_forgotten_codes_are_put_onto_latents():
    torch.manual_seed(0)
    tokenizer = VQTokenizer(TINY).train()
    tokenizer.usage[3] = 0.0
    tokenizer.codebook.data[3] = 0.0
    tokenizer.loss(DATA.train[:2])
    assert tokenizer.codebook[3].norm().item() == pytest.approx(1, abs=1e-5)


def test_a_tokenizer_is_read_back(tmp_path):
    tokenizer = VQTokenizer(TINY).eval()
    again = VQTokenizer.load(tokenizer.save(tmp_path / "t.safetensors"))
    assert torch.equal(again.encode(DATA.test[:1]), tokenizer.encode(DATA.test[:1]))
    (tmp_path / "bad").write_bytes(b"x")
    for name in ("bad", "none"):
        with pytest.raises(ModelError, match="train one again"):
            VQTokenizer.load(tmp_path / name)
    with pytest.raises(ConfigError):
        TokenizerConfig(channels=9)


def test_the_distance_is_zero_for_the_same_and_known_for_shifted_features():
    a = np.random.default_rng(0).standard_normal((500, 3))
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet(a, a + np.array([3, 0, 4])) == pytest.approx(25)
    assert frechet(a, 2 * a) == pytest.approx(np.trace(np.cov(a.T)) + ((a.mean(0)) ** 2).sum())
    with pytest.raises(ConfigError):
        frechet(a[:1], a)


def test_precision_falls_for_strange_pictures_and_recall_for_missing_ones():
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((2, 200, 2)) + np.array([[[-20, 0]], [[20, 0]]])
    both = np.concatenate([left, right])
    precision, recall = precision_recall(both, rng.standard_normal((200, 2)) + np.array([-20, 0]))
    assert precision > 0.9
    assert 0.4 < recall < 0.55
    precision, _ = precision_recall(left, both)
    assert 0.45 < precision < 0.55
    with pytest.raises(ConfigError):
        precision_recall(left[:3], right)


def test_features_of_the_training_pictures_are_white():
    features = FeatureSpace.of(DATA.train, 10)(DATA.train)
    np.testing.assert_allclose(np.cov(features.T), np.eye(10), atol=1e-8)
    with pytest.raises(ConfigError, match="more pictures"):
        FeatureSpace.of(DATA.train[:5])


def test_replacement_hurts_nothing_in_a_flat_vocabulary_and_random_mates_hurt():
    torch.manual_seed(0)
    tokenizer, space = VQTokenizer(TINY).eval(), FeatureSpace.of(DATA.train)
    flat = replacement_test(tokenizer, flat_map(16), DATA.test[:4], space)
    mates = replacement_test(tokenizer, random_map(SemanticTree.fit(tokenizer.codebook).map(3)), DATA.test[:4], space)
    assert flat["psnr_to_reconstruction"] == pytest.approx(120)
    assert mates["psnr_to_reconstruction"] < 100


def test_the_four_vocabularies_have_the_sizes_they_should_have():
    maps = vocabularies(np.random.default_rng(0).standard_normal((16, 4)), np.ones(16), 5)
    assert {name: m.clusters for name, m in maps.items()} == {"flat": 16, "k-means": 5, "random": 5, "masc": 5}


def test_dead_codes_favour_no_vocabulary():
    counts = np.arange(16) % 4
    used = counts > 0
    maps = vocabularies(np.random.default_rng(0).standard_normal((16, 4)), counts, 5)
    sizes = {name: np.bincount(m.labels[used], minlength=5) for name, m in maps.items() if name != "flat"}
    assert all(s.min() > 0 for s in sizes.values())
    assert sorted(sizes["random"]) == sorted(sizes["masc"])


def test_reach_is_the_first_step_at_the_quality_of_the_flat_model():
    def row(name, *losses):
        curve = [{"step": 100 * (i + 1), "loss_over_log_k": x, "token_loss": 2 * x} for i, x in enumerate(losses)]
        return {"vocabulary": name, "seed": 0, **curve[-1], "curve": curve}

    runs = [row("flat", 0.9, 0.7, 0.6), row("masc", 0.8, 0.6, 0.5), row("random", 0.95, 0.8, 0.7)]
    for measure in ("loss_over_log_k", "token_loss"):
        assert [run["reach"][measure] for run in _with_reach({"runs": runs})["runs"]] == [300, 200, None]


def test_tokenizer_training_goes_on_where_it_stopped(tmp_path):
    assert not train(tmp_path, steps=4, minutes=0.0, batch=2, config=TINY, every=2)
    assert train(tmp_path, steps=4, minutes=1.0, batch=2, config=TINY, every=2)
    assert len((tmp_path / "tokenizer_log.jsonl").read_text().splitlines()) == 2
    fine, held_out = TokenShards.open(tmp_path / "fine"), TokenShards.open(tmp_path / "held_out")
    assert (len(fine), len(held_out)) == (8 * len(DATA.train), len(DATA.test))


@pytest.mark.slow
def test_the_comparison_is_resumed_and_measures_all_four(tmp_path):
    torch.manual_seed(0)
    export(tmp_path, VQTokenizer(TINY).eval(), variants=1)
    recipe = Recipe(steps=2, batch=4, width=16, layers=1, heads=2)
    assert not compare(tmp_path, recipe, 5, 1, minutes=0.0, images=60)
    assert compare(tmp_path, recipe, 5, 1, minutes=5.0, images=60)
    assert {path.parent.name for path in tmp_path.glob("*/result.json")} == {
        "flat-0",
        "k-means-0",
        "random-0",
        "masc-0",
    }
