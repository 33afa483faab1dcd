"""Wrong inputs of the public functions of tokens: one line that says what was wrong, and nothing else."""

import numpy as np
import pytest
import torch
from torch import nn
from wrong import assert_refused

from hasten.errors import ConfigError, UnknownNameError
from hasten.fitting.refiner import train_refiner
from hasten.fitting.token_model import Trainer
from hasten.fitting.token_recipe import Conditions, Recipe
from hasten.tokens import (
    MemberSampler,
    SemanticTree,
    TokenMap,
    flat_map,
    kmeans_map,
    random_map,
    replace_vocabulary,
)
from hasten.tokens.causal import Condition, FunctionModel
from hasten.tokens.comparators import adjusted_rand, mean_within_distance
from hasten.tokens.export import export_model, open_model
from hasten.tokens.hugging_face import HuggingFaceModel
from hasten.tokens.reading import read_codebook
from hasten.tokens.refiner import Refiner, RefinerConfig
from hasten.tokens.residual import ResidualMaps
from hasten.tokens.sample import Sampling, sample_clusters
from hasten.tokens.shards import TokenShards, write_shards

CODES = np.random.default_rng(0).standard_normal((60, 4))
MANY = np.random.default_rng(1).standard_normal((5000, 3))
TREE = SemanticTree.fit(CODES)
MAP = TREE.map(20)
MAPS = ResidualMaps((MAP, MAP))
SAMPLER = MemberSampler.make(MAP)

# None of these is a codebook of 60 codes, a map, a number of clusters, a path or a module.
WRONG = {
    "ragged": [[1, 2], [3]],
    "text": "three",
    "texts": [["1", "2"], ["3", "4"]],
    "holes": [[None, 1], [2, 3]],
    "a dict": {"a": 1},
    "complex": CODES + 1j,
    "a complex tensor": torch.from_numpy(CODES + 1j),
    "objects": CODES.astype(object),
    "a meta tensor": torch.ones(60, 4, device="meta"),
    "a sparse tensor": torch.from_numpy(CODES).to_sparse(),
    "a slice": slice(1, 2),
    "a fraction": 1.5,
    "not a number": float("nan"),
    "an object": object(),
}
CALLS = {
    "fit": SemanticTree.fit,
    "fit used": lambda x: SemanticTree.fit(CODES, used=x),
    "fit weights": lambda x: SemanticTree.fit(CODES, weights=x),
    "fit normalize": lambda x: SemanticTree.fit(CODES, normalize=x),
    "fit exact": lambda x: SemanticTree.fit(CODES, exact=x),
    "cut": TREE.cut,
    "map": TREE.map,
    "max_size": lambda x: TREE.cut(20, max_size=x),
    "tree check": TREE.check,
    "labels": TokenMap,
    "map used": lambda x: TokenMap(MAP.labels, used=x),
    "map normalize": lambda x: TokenMap(MAP.labels, normalize=x),
    "map tokens": MAP,
    "map of": MAP.of,
    "map check": MAP.check,
    "refines": MAP.refines,
    "flat": flat_map,
    "k-means": lambda x: kmeans_map(x, 3),
    "k-means k": lambda x: kmeans_map(CODES, x),
    "k-means seed": lambda x: kmeans_map(CODES, 3, seed=x),
    "k-means used": lambda x: kmeans_map(CODES, 3, used=x),
    "random": random_map,
    "random seed": lambda x: random_map(MAP, x),
    "rand": lambda x: adjusted_rand(x, x),
    "within": lambda x: mean_within_distance(x, MAP),
    "within map": lambda x: mean_within_distance(CODES, x),
    "members": lambda x: MemberSampler(MAP, x),
    "members map": lambda x: MemberSampler(x, np.ones(60)),
    "members kind": lambda x: MemberSampler.make(MAP, x),
    "medoid": lambda x: MemberSampler.make(MAP, "medoid", codebook=x),
    "frequency": lambda x: MemberSampler.make(MAP, "frequency", counts=x),
    "drawn": SAMPLER,
    "drawn seed": lambda x: SAMPLER([0], x),
    "residual": ResidualMaps,
    "residual fit": lambda x: ResidualMaps.fit([CODES, CODES], x),
    "residual used": lambda x: ResidualMaps.fit([CODES, CODES], [3, 3], used=x),
    "residual flat": MAPS.flat,
    "residual split": MAPS.split,
    "residual members": lambda x: MAPS.members("medoid", codebooks=x),
    "read codebook": read_codebook,
    "load": TokenMap.load,
    "load tree": SemanticTree.load,
    "open": TokenShards.open,
    "open model": open_model,
    "replace model": lambda x: replace_vocabulary(x, MAP),
    "replace map": lambda x: replace_vocabulary(nn.Linear(2, 2), x),
    "export": lambda x: export_model(x, MAP, "nowhere", None),
    "hugging face": lambda x: HuggingFaceModel(x, None),
    "condition": Condition,
    "padded": Condition.padded,
    "forward": lambda x: FunctionModel(nn.Linear(2, 2), x, 3),
    "clusters": lambda x: FunctionModel(nn.Linear(2, 2), print, x),
    "refiner": lambda x: Refiner(x, RefinerConfig(hidden=4)),
    "refiner size": lambda x: RefinerConfig(hidden=x),
    "temperature": lambda x: Sampling(temperature=x),
    "top_p": lambda x: Sampling(top_p=x),
    "top_k": lambda x: Sampling(top_k=x),
    "sample": lambda x: sample_clusters(x, Condition(torch.ones(1, 1).long()), 3),
    "recipe": lambda x: Recipe(steps=x),
    "train": lambda x: Trainer(x, MAP, Recipe()),
    "train refiner": lambda x: train_refiner(x, None, None, Conditions(), steps=1),
}


FITTING = {("temperature", "a fraction")}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_none_of_what_is_expected_is_refused_in_one_line(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(CALLS[call], {name: wrong for name, wrong in WRONG.items() if (call, name) not in FITTING})


@pytest.mark.parametrize("normalize", [None, 5])
def test_a_normalization_that_is_no_text_is_refused_by_name(normalize):
    with pytest.raises(UnknownNameError, match=r"unknown normalization (None|5)\."):
        SemanticTree.fit(CODES, normalize=normalize)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("weight", [1e-200, 1e300, 1.7e308, 5e-324])
def test_equal_weights_are_no_weights_whatever_their_size(weight, exact):
    codes = MANY if not exact else CODES
    plain = SemanticTree.fit(codes, exact=exact)
    weighted = SemanticTree.fit(codes, exact=exact, weights=np.full(len(codes), weight))
    np.testing.assert_array_equal(weighted.merges, plain.merges)
    np.testing.assert_allclose(weighted.heights, plain.heights, rtol=1e-9)


@pytest.mark.parametrize("exact", [True, False])
def test_only_the_ratios_of_weights_count(exact):
    weights = np.random.default_rng(2).uniform(0.1, 10, 60)
    trees = [SemanticTree.fit(CODES, exact=exact, weights=weights * scale) for scale in (1, 1e-300, 1e300)]
    for tree in trees[1:]:
        np.testing.assert_array_equal(tree.merges, trees[0].merges)
        np.testing.assert_allclose(tree.heights, trees[0].heights, rtol=1e-9)


@pytest.mark.parametrize("scale", [1, 1e-200])
def test_an_approximate_tree_of_one_cell_counts_weights_as_the_exact_one_does(scale):
    weights = np.random.default_rng(2).uniform(0.1, 10, 60) * scale
    exact, approximate = (SemanticTree.fit(CODES, exact=exact, weights=weights) for exact in (True, False))
    np.testing.assert_array_equal(approximate.merges, exact.merges)
    np.testing.assert_allclose(approximate.heights, exact.heights, rtol=1e-9)


@pytest.mark.parametrize("scale", [1e308, 1e200, 1e40, 1e-50, 1e-200])
@pytest.mark.parametrize(
    "fit",
    [
        SemanticTree.fit,
        lambda codes: SemanticTree.fit(codes, normalize="none", exact=False),
        lambda codes: SemanticTree.fit(torch.from_numpy(codes), normalize="none"),
        lambda codes: kmeans_map(codes, 5),
        MAP.check,
    ],
)
def test_codes_that_float32_cannot_hold_are_refused_before_any_work(fit, scale):
    codes = np.clip(CODES, -1, 1) * scale
    with pytest.raises(ConfigError, match=r"code 0 has values of about .* which float32 cannot hold"):
        fit(codes)


@pytest.mark.parametrize("scale", [1e-40, 1e37])
def test_codes_that_float32_can_hold_keep_their_tree(scale):
    for exact in (True, False):
        plain, scaled = (SemanticTree.fit(c, normalize="none", exact=exact) for c in (CODES, CODES * scale))
        np.testing.assert_array_equal(scaled.merges, plain.merges)
        np.testing.assert_allclose(scaled.heights, plain.heights * scale, rtol=1e-6)


def test_counts_below_none_are_refused():
    for used in (-np.ones(60), np.full(60, np.nan)):
        with pytest.raises(ConfigError, match="0 or more"):
            SemanticTree.fit(CODES, used=used)


def test_members_of_huge_weights_are_drawn_as_often_as_they_should_be():
    labels = np.zeros(4, np.int32)
    sampler = MemberSampler(TokenMap(labels), np.array([1.0, 1.0, 0.0, 2.0]) * 8e307)
    drawn = np.bincount(sampler(np.zeros(40_000, int), 0), minlength=4) / 40_000
    np.testing.assert_allclose(drawn, [0.25, 0.25, 0, 0.5], atol=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary": 1.5}, "vocabulary must be"),
        ({"vocabulary": "24"}, "vocabulary must be"),
        ({"rows": 0}, "rows must be"),
        ({"rows": 2.5}, "rows must be"),
        ({"labels": [0.5, 1]}, "labels must be whole numbers"),
        ({"labels": ["a", "b"]}, "labels must be whole numbers"),
        ({"labels": [-1, 0]}, "labels must lie within 0"),
        ({"labels": [2**33, 0]}, "labels must lie within 0"),
        ({"labels": [[-1, 3], [-2, 3]]}, "labels must lie within -1"),
        ({"tokens": [[1.0, 2.0], [3.0, 4.0]]}, "tokens must be whole numbers"),
        ({"tokens": [[1, 2], [3]]}, "tokens must be whole numbers"),
        ({"codebook": "codes"}, "a codebook must be real numbers"),
    ],
)
def test_shards_of_what_they_cannot_hold_are_refused_and_nothing_is_written(options, message, tmp_path):
    given = {"tokens": [[1, 2], [3, 4]], "vocabulary": 24, **options}
    with pytest.raises(ConfigError, match=message):
        write_shards(tmp_path / "fine", **given)
    assert not list(tmp_path.iterdir())


def test_training_on_no_image_is_refused(tmp_path):
    empty = write_shards(tmp_path / "none", np.empty((0, 4), int), 60)
    with pytest.raises(ConfigError, match="holds no image"):
        Trainer(empty, MAP, Recipe(width=16, layers=1, heads=2), cpu=True)


def test_tensors_on_any_device_and_of_any_real_type_are_taken():
    exact = SemanticTree.fit(torch.from_numpy(CODES))
    assert exact.fingerprint == TREE.fingerprint
    np.testing.assert_array_equal(exact.heights, TREE.heights)
    half = torch.from_numpy(CODES).bfloat16()
    np.testing.assert_array_equal(SemanticTree.fit(half).merges, SemanticTree.fit(half.float()).merges)
    tokens = torch.tensor([3, 5])
    np.testing.assert_array_equal(MAP(tokens), MAP([3, 5]))
    np.testing.assert_array_equal(SAMPLER(torch.tensor([1, 2]), 3), SAMPLER([1, 2], 3))
