"""Real codebooks: codes that never occur, what a map knows of its codebook, density, several codebooks, files."""

import pickle

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import cdist, pdist

from hasten.errors import ConfigError, ModelError
from hasten.fitting.token_model import Trainer
from hasten.fitting.token_recipe import Recipe
from hasten.tokens import MemberSampler, SemanticTree, TokenMap, kmeans_map, random_map
from hasten.tokens.approximate import approximate_linkage
from hasten.tokens.causal import Condition, FunctionModel
from hasten.tokens.comparators import adjusted_rand, mean_within_distance
from hasten.tokens.linkage import SQUARE, average_linkage
from hasten.tokens.members import MEMBER_KINDS
from hasten.tokens.reading import codebook_of, read_codebook
from hasten.tokens.refiner import Refiner, RefinerConfig
from hasten.tokens.residual import ResidualMaps
from hasten.tokens.sample import drawn_from, sample_clusters
from hasten.tokens.shards import TokenShards, write_shards

RNG = np.random.default_rng(0)
BOOK = RNG.standard_normal((2048, 8)).astype(np.float32)
COUNTS = np.where(RNG.random(2048) < 0.06, RNG.integers(1, 50, 2048), 0)  # 6 % of the codes are in use
SPARSE = SemanticTree.fit(BOOK, used=COUNTS, normalize="none").map(32, max_size=8)
MAKERS = {
    "masc": SPARSE,
    "k-means": kmeans_map(BOOK, 32, used=COUNTS, normalize="none"),
    "random": random_map(SPARSE, 1),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("kind", MEMBER_KINDS)
def test_dead_codes_never_come_back(name, kind):
    mapping = MAKERS[name]
    sampler = MemberSampler.make(mapping, kind, codebook=BOOK, counts=COUNTS)
    clusters = RNG.integers(0, 32, (50, 64))
    drawn = sampler(clusters, seed=1)
    assert (COUNTS[drawn] > 0).all()
    np.testing.assert_array_equal(mapping(drawn), clusters)


@pytest.mark.parametrize("name", MAKERS)
def test_sizes_caps_and_members_count_used_codes_only(name):
    mapping = MAKERS[name]
    assert mapping.sizes.sum() == (COUNTS > 0).sum()
    assert sorted(mapping.members.tolist()) == np.flatnonzero(COUNTS).tolist()
    assert len(mapping.labels) == 2048  # every token can be mapped all the same
    if name != "k-means":
        assert mapping.sizes.max() <= 8


def test_the_losses_count_used_members_only(tmp_path):
    tokens = np.flatnonzero(COUNTS)[RNG.integers(0, 60, (8, 6))]
    shards = write_shards(tmp_path / "fine", tokens, 2048, codebook=BOOK)
    trainer = Trainer(shards, SPARSE, Recipe(steps=1, batch=4, width=16, layers=1, heads=2), cpu=True)
    measured = trainer.evaluate(shards)
    members = np.array([len(SPARSE.of(c)) for c in SPARSE(tokens).ravel()])
    assert measured["token_loss"] - measured["loss"] == pytest.approx(np.log(members).mean(), rel=1e-5)
    refiner = Refiner(SPARSE, RefinerConfig(hidden=8, width=16, heads=2))
    dead = torch.from_numpy(np.flatnonzero(COUNTS == 0)[:5])[None]
    assert refiner.loss(torch.randn(1, 5, 8), dead).item() == 0.0
    logits = refiner(torch.randn(1, 5, 8), torch.arange(5)[None])
    np.testing.assert_array_equal(logits[0, 3].isfinite().nonzero().flatten().numpy(), SPARSE.of(3))
    with pytest.raises(ModelError, match="another map"):
        refiner.check(TokenMap(SPARSE.labels))


def test_weights_for_tokens_that_never_occur_are_refused():
    weights = np.ones(2048)
    with pytest.raises(ConfigError, match="never occurs by the map, but has a weight"):
        MemberSampler(SPARSE, weights)
    with pytest.raises(ConfigError, match="no used member"):
        TokenMap(np.array([0, 1, 1]), used=np.array([True, False, False]))
    with pytest.raises(ConfigError, match="one bool per token"):
        TokenMap(np.array([0, 1, 1]), used=np.array([True, True]))


def test_clusters_that_the_counts_do_not_have_are_uniform_over_used_members():
    sampler = MemberSampler.make(SPARSE, "frequency", counts=np.zeros(2048))
    np.testing.assert_array_equal(sampler.weights > 0, COUNTS > 0)


def test_a_map_keeps_what_it_knows_of_its_codebook(tmp_path):
    unit = SemanticTree.fit(BOOK, normalize="unit", used=COUNTS).map(32)
    again = TokenMap.load(unit.save(tmp_path / "map.safetensors"))
    assert (again.normalize, again.fingerprint) == ("unit", unit.fingerprint)
    np.testing.assert_array_equal(again.used, COUNTS > 0)
    assert kmeans_map(BOOK, 9, normalize="unit").normalize == random_map(unit).normalize == "unit"


def test_medoids_are_chosen_by_the_distances_of_the_map():
    """By direction the middle one of three codes is the medoid, by distance another one."""
    book = np.array([[1.0, 0.0], [20.0, 20.0], [0.0, 1.0], [-5.0, -5.0]])
    labels = np.array([0, 0, 0, 1])
    by = {
        n: MemberSampler.make(TokenMap(labels, normalize=n), "medoid", codebook=book)([0])[0] for n in ("none", "unit")
    }
    assert by["unit"] == 1
    assert by["none"] != 1


@pytest.mark.parametrize("kind", ["medoid", "centroid"])
def test_a_foreign_codebook_of_the_right_length_is_refused_wherever_one_is_given(kind, tmp_path):
    foreign = BOOK[::-1].copy()
    with pytest.raises(ModelError, match="the map was made of the codebook"):
        MemberSampler.make(SPARSE, kind, codebook=foreign)
    with pytest.raises(ModelError, match="the map was made of the codebook"):
        mean_within_distance(foreign, SPARSE)
    shards = write_shards(tmp_path / "fine", [[1, 2, 3]], 2048, codebook=foreign)
    assert TokenShards.open(shards.folder).codebook == shards.codebook != ""
    for use in (
        lambda: shards.mapped(SPARSE, tmp_path / "coarse"),
        lambda: Trainer(shards, SPARSE, Recipe(width=16, layers=1, heads=2), cpu=True),
    ):
        with pytest.raises(ModelError, match="use the map of this tokenizer"):
            use()


@pytest.mark.parametrize("n", [300, 700])
def test_compacting_and_both_tables_give_the_merges_of_scipy(n, monkeypatch):
    points = np.random.default_rng(n).standard_normal((n, 3))
    expected = linkage(pdist(points), "average")
    for limit in (SQUARE, 10):  # the square, and the triangle
        monkeypatch.setattr("hasten.tokens.linkage.SQUARE", limit)
        merges, heights = average_linkage(points)
        np.testing.assert_array_equal(merges, expected[:, :2].astype(int))
        np.testing.assert_allclose(heights, expected[:, 2], rtol=1e-12)


def test_codes_count_by_their_density():
    """A code of weight w is as good as w codes at the same place, in the exact tree and in the approximate one."""
    points = np.random.default_rng(0).standard_normal((40, 3))
    weights = np.random.default_rng(1).integers(1, 5, 40)
    copies = np.repeat(np.arange(40), weights)
    many = SemanticTree.fit(points[copies], normalize="none")
    first = np.flatnonzero(np.diff(copies, prepend=-1))
    for k in (3, 8, 20):
        weighted = SemanticTree.fit(points, weights=weights, normalize="none").cut(k)
        assert adjusted_rand(weighted, many.cut(k)[first]) == 1.0
        merges, heights = approximate_linkage(points, weights.astype(float), cell=40, groups=20)
        near = SemanticTree(merges, heights, np.arange(40), np.arange(40), "none", False, "")
        assert adjusted_rand(near.cut(k), weighted) == 1.0
    assert (
        adjusted_rand(
            SemanticTree.fit(points, normalize="none").cut(8),
            SemanticTree.fit(points, weights=weights, normalize="none").cut(8),
        )
        < 1.0
    )
    for wrong in (np.ones(3), np.zeros(40), np.full(40, np.nan)):
        with pytest.raises(ConfigError, match="weights"):
            SemanticTree.fit(points, weights=wrong, normalize="none")


def test_tokens_are_drawn_as_often_as_they_should_be_without_multinomial():
    chances = torch.tensor([[0.5, 0.3, 0.2, 0.0]]).expand(20_000, 4)
    drawn = drawn_from(chances, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 20_000, [0.5, 0.3, 0.2, 0.0], atol=0.015)


class TwoBooks(torch.nn.Module):
    """Predicts from the number of known clusters alone, which it counts modulo two."""

    def __init__(self, clusters):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(2, clusters))

    def forward(self, condition, clusters):
        place = torch.arange(clusters.shape[1] + 1) % 2
        return self.table[place].expand(len(condition), -1, -1)


def test_several_codebooks_have_a_tree_each_and_positions_keep_to_theirs(tmp_path):
    books = [BOOK[:40], BOOK[100:130]]
    used = [np.arange(40) % 4, np.arange(30) % 3]
    maps = ResidualMaps.fit(books, (6, 5), used=used, normalize="none")
    assert maps.codebooks == (6, 5)
    np.testing.assert_array_equal(
        maps.maps[1].labels, SemanticTree.fit(books[1], used=used[1], normalize="none").cut(5)
    )
    fine = np.stack(
        [np.flatnonzero(used[0])[RNG.integers(0, 30, (12, 4))], np.flatnonzero(used[1])[RNG.integers(0, 20, (12, 4))]],
        -1,
    )
    flat, whole = maps.flat(fine), maps.stacked()
    np.testing.assert_array_equal(maps.split(flat), fine)
    np.testing.assert_array_equal(whole(flat)[:, 0::2], maps.maps[0](fine[..., 0]))
    np.testing.assert_array_equal(whole(flat)[:, 1::2], 6 + maps.maps[1](fine[..., 1]))
    again = ResidualMaps.load(maps.save(tmp_path / "maps"))
    np.testing.assert_array_equal(again.stacked().labels, whole.labels)
    shards = write_shards(tmp_path / "fine", flat, 70)
    recipe = Recipe(steps=2, batch=4, width=16, layers=1, heads=2)
    for model in (None, FunctionModel(net := TwoBooks(11), net, 11, maps.codebooks)):
        recipe = Recipe(steps=2, batch=4, width=16, layers=1, heads=2, condition_dropout=0.0 if model else 0.1)
        trainer = Trainer(shards, whole, recipe, model, codebooks=maps.codebooks, cpu=True)
        trainer.run(tmp_path / f"run{model is None}")
        assert np.isfinite(trainer.evaluate(shards)["token_loss"])
        clusters, _ = sample_clusters(trainer.causal, trainer.conditions.of(torch.zeros(3, dtype=torch.long)), 8)
        assert (clusters[:, 0::2] < 6).all()
        assert (clusters[:, 1::2] >= 6).all()
        drawn = maps.split(maps.members("medoid", codebooks=books)(clusters.numpy()))
        assert (used[0][drawn[..., 0]] > 0).all()
        assert (used[1][drawn[..., 1]] > 0).all()
    with pytest.raises(ConfigError, match="another codebook than its position"):
        maps.split([50, 3])
    with pytest.raises(ConfigError, match="as many numbers"):
        ResidualMaps.fit(books, (6,), normalize="none")
    with pytest.raises(ModelError, match="residual_maps"):
        ResidualMaps.load(tmp_path)
    with pytest.raises(ConfigError, match="must add up to 11"):
        FunctionModel(net, net, 11, (6, 4))


def test_two_codebooks_differ_from_one_in_what_is_predicted():
    net = TwoBooks(11)
    shown = Condition(torch.tensor([[0]]))
    logits = FunctionModel(net, net, 11, (6, 5))(shown, torch.tensor([[1, 7]])).logits[0]
    assert logits.isfinite().sum(-1).tolist() == [6, 5, 6]
    assert FunctionModel(net, net, 11)(shown, torch.tensor([[1, 7]])).logits.isfinite().all()


def test_codebooks_are_read_of_checkpoints_and_modules_weights_only(tmp_path):
    state = {"quantize.embedding.weight": torch.from_numpy(BOOK), "post.weight": torch.zeros(3, 3)}
    for name, content in (
        ("llamagen.pt", {"model": state, "steps": 3}),
        ("ema.pth", {"ema": state}),
        ("plain.pt", state),
        ("tensor.pt", torch.from_numpy(BOOK)),
    ):
        torch.save(content, tmp_path / name)
        np.testing.assert_array_equal(read_codebook(tmp_path / name), BOOK)
    torch.save({"model": {"a": torch.zeros(2, 2), "b": torch.ones(2, 2)}}, tmp_path / "two.pt")
    with pytest.raises(ModelError, match="holds the matrices a, b; say which"):
        read_codebook(tmp_path / "two.pt")
    assert read_codebook(tmp_path / "two.pt", "b").sum() == 4
    torch.save({"model": state, "trap": Trap(tmp_path / "sprung")}, tmp_path / "trap.pt")
    with pytest.raises(ModelError, match="cannot be read as a codebook"):
        read_codebook(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()
    endless: dict[str, object] = {}
    endless["model"] = endless
    for content, message in (
        (endless, "holds the matrices none"),
        ({"codebook": torch.zeros(3, 2, dtype=torch.complex64)}, "numbers of type complex64"),
        ({"codebook": torch.zeros(3, 2).to_sparse()}, "of layout torch.sparse_coo"),
        ({"codebook": torch.zeros(3, 2, device="meta")}, "without numbers"),
        (torch.nn.Linear(2, 2), "holds more than tensors"),
    ):
        torch.save(content, tmp_path / "odd.pt")
        with pytest.raises(ModelError, match=message) as caught:
            read_codebook(tmp_path / "odd.pt")
        assert "weights_only" not in str(caught.value)
    for array, message in ((BOOK * 1j, "numbers of type complex"), (BOOK.astype(str), "numbers of type <U")):
        np.save(tmp_path / "odd.npy", array)
        with pytest.raises(ModelError, match=message):
            read_codebook(tmp_path / "odd.npy")
    (tmp_path / "odd.npy").write_bytes(pickle.dumps(BOOK))
    with pytest.raises(ModelError, match=r"not written by numpy\.save"):
        read_codebook(tmp_path / "odd.npy")
    tokenizer = torch.nn.Module()
    tokenizer.quantize = torch.nn.Module()
    tokenizer.quantize.embedding = torch.nn.Embedding.from_pretrained(torch.from_numpy(BOOK))
    np.testing.assert_array_equal(codebook_of(tokenizer), BOOK)


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


def test_dead_codes_are_mapped_to_the_cluster_of_the_nearest_used_code_under_k_means_too():
    used = np.flatnonzero(COUNTS)
    dead = np.flatnonzero(COUNTS == 0)[:50]
    nearest = used[cdist(BOOK[dead], BOOK[used]).argmin(1)]
    for mapping in (MAKERS["k-means"], SPARSE):
        np.testing.assert_array_equal(mapping(dead), mapping(nearest))
