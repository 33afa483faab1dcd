"""The semantic tree and its cuts: exactness, laws, bad input."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import cdist, pdist

import hasten.tokens.cost as cost_module
import hasten.tokens.tree as tree_module
from hasten.errors import ConfigError, ModelError
from hasten.tokens import SemanticTree, TokenMap, kmeans_map, random_map
from hasten.tokens.approximate import approximate_linkage
from hasten.tokens.comparators import adjusted_rand, mean_within_distance
from hasten.tokens.linkage import average_linkage


def codes(n=60, d=4, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


def greedy(points, k):
    """The paper's loop: merge the closest pair until k clusters are left."""
    distance = cdist(points, points)
    np.fill_diagonal(distance, np.inf)
    members = [[i] for i in range(len(points))]
    while len(members) > k:
        s, t = np.unravel_index(distance.argmin(), distance.shape)
        s, t = min(s, t), max(s, t)
        a, b = len(members[s]), len(members[t])
        row = (a * distance[s] + b * distance[t]) / (a + b)
        distance[s], distance[:, s] = row, row
        distance[s, s] = np.inf
        distance = np.delete(np.delete(distance, t, 0), t, 1)
        members[s] += members.pop(t)
    labels = np.empty(len(points), int)
    for cluster, tokens in enumerate(members):
        labels[tokens] = cluster
    return labels


def same(a, b):
    return adjusted_rand(a, b) == 1.0


@pytest.fixture(scope="module")
def four_hundred():
    points = codes(400, 8)
    return points, SemanticTree.fit(points, normalize="none")


@pytest.mark.parametrize("k", [1, 7, 100, 399])
def test_the_tree_is_that_of_greedy_merging(four_hundred, k):
    points, tree = four_hundred
    assert same(tree.cut(k), greedy(points, k)) if k > 1 else (tree.cut(k) == 0).all()


def test_the_merges_and_heights_are_those_of_scipy(four_hundred):
    points, tree = four_hundred
    expected = linkage(pdist(points), "average")
    np.testing.assert_allclose(tree.heights, expected[:, 2], rtol=1e-12)
    np.testing.assert_array_equal(tree.merges, expected[:, :2].astype(int))
    np.testing.assert_array_equal(tree.sizes, expected[:, 3].astype(int))


@settings(max_examples=30)
@given(st.integers(2, 40), st.integers(0, 1000), st.floats(1e-3, 1e3), st.data())
def test_any_cut_is_exact_scale_free_and_nested(n, seed, scale, data):
    points = codes(n, 3, seed)
    tree, scaled = SemanticTree.fit(points, normalize="none"), SemanticTree.fit(points * scale, normalize="none")
    k = data.draw(st.integers(1, n))
    coarser = data.draw(st.integers(1, k))
    assert len(np.unique(tree.cut(k))) == k
    np.testing.assert_array_equal(tree.cut(k), scaled.cut(k))
    assert tree.map(k).refines(tree.map(coarser))


def test_refines_tells_when_it_does_not(four_hundred):
    _, tree = four_hundred
    assert not tree.map(50).refines(tree.map(100))
    assert not random_map(tree.map(100)).refines(tree.map(50))


@settings(max_examples=30)
@given(st.integers(4, 40), st.integers(0, 1000), st.integers(1, 6), st.data())
def test_a_cap_holds_and_keeps_k_and_nesting(n, seed, cap, data):
    tree = SemanticTree.fit(codes(n, 2, seed), normalize="none")
    least = n - int((tree.sizes <= cap).sum())
    k = data.draw(st.integers(least, n))
    coarse = tree.cut(least, cap)
    assert np.bincount(tree.cut(k, cap)).max() <= cap
    assert tree.cut(k, cap).max() + 1 == k
    assert tree.map(k, cap).refines(TokenMap(coarse))
    if least > 1:
        with pytest.raises(ConfigError, match="raise max_size or k"):
            tree.cut(least - 1, cap)


def test_equal_codes_merge_first_and_ties_are_no_trouble():
    points = np.repeat(codes(5), 4, axis=0)
    tree = SemanticTree.fit(points, normalize="none")
    assert same(tree.cut(5), np.repeat(np.arange(5), 4))
    grid = SemanticTree.fit(np.stack(np.meshgrid(range(5), range(5)), -1).reshape(-1, 2), normalize="none")
    assert np.bincount(grid.cut(6)).sum() == 25


def test_dead_codes_join_the_cluster_of_their_nearest_used_code():
    points = codes(60)
    used = np.ones(60, bool)
    used[[3, 10, 41]] = False
    tree = SemanticTree.fit(points, used=used, normalize="none")
    np.testing.assert_array_equal(tree.cut(20)[used], SemanticTree.fit(points[used], normalize="none").cut(20))
    distance = cdist(points, points[used])
    for dead in (3, 10, 41):
        assert tree.cut(20)[dead] == tree.cut(20)[used][distance[dead].argmin()]
    assert tree.map(40).refines(tree.map(20))


def test_unit_rows_ignore_the_length_of_each_code():
    points = codes(60)
    stretched = points * np.random.default_rng(1).uniform(0.1, 10, (60, 1))
    tree = SemanticTree.fit(stretched, normalize="unit")
    np.testing.assert_array_equal(tree.cut(20), SemanticTree.fit(points, normalize="unit").cut(20))
    assert not same(SemanticTree.fit(stretched, normalize="none").cut(20), tree.cut(20))


def test_pieces_of_two_moons_lie_in_one_moon_at_least_as_often_as_those_of_k_means():
    rng = np.random.default_rng(0)
    t = rng.uniform(0, np.pi, 150)
    upper = np.stack([np.cos(t), np.sin(t)], -1)
    lower = np.stack([1 - np.cos(t), 0.5 - np.sin(t)], -1)
    points = np.concatenate([upper, lower]) + 0.03 * rng.standard_normal((300, 2))
    moon = np.repeat([0, 1], 150)
    tree, means = SemanticTree.fit(points, normalize="none").map(8), kmeans_map(points, 8, runs=5, normalize="none")

    def purity(mapping):
        return sum(np.bincount(moon[mapping.of(c)]).max() for c in range(8)) / 300

    assert purity(tree) >= 0.95
    assert purity(tree) >= purity(means)


def test_a_tree_is_read_back_and_knows_its_codebook(tmp_path):
    points = codes()
    tree = SemanticTree.fit(points, normalize="unit", used=np.arange(60) % 7)
    again = SemanticTree.load(tree.save(tmp_path / "tree.safetensors"))
    np.testing.assert_array_equal(again.cut(13), tree.cut(13))
    assert (again.normalize, again.exact, again.fingerprint) == ("unit", True, tree.fingerprint)
    again.check(points)
    with pytest.raises(ModelError, match="make the tree of this one"):
        again.check(points + 1e-3)


def test_costs_are_announced_and_trees_that_do_not_fit_are_refused_before_any_work(monkeypatch):
    large = SemanticTree.cost(10**6, 8, exact=True)
    assert str(large).startswith("exact tree of 1,000,000 codes: about 3.6 TiB of memory")
    assert not SemanticTree.cost(10**6, 8).exact
    assert SemanticTree.cost(10**6, 8).memory < 4 << 30
    assert SemanticTree.cost(16_384, 8).exact
    points, work = codes(), []
    monkeypatch.setattr(tree_module, "average_linkage", lambda *_, **__: work.append("exact"))
    monkeypatch.setattr(cost_module, "free_memory", lambda: large.memory - 1)
    with pytest.raises(ConfigError, match=r"exact tree of 1,000,000 codes.*use exact=False \(--no-exact\): an approx"):
        large.refuse_unless_it_fits(8)
    monkeypatch.setattr(cost_module, "free_memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"60 codes.*use fewer codes"):
        SemanticTree.fit(points, normalize="none")
    assert work == []


def test_what_is_announced_is_what_a_tree_takes():
    """Within a factor of two, by the allocator's own count."""
    for n, exact in ((3000, True), (3000, False)):
        points = np.random.default_rng(0).standard_normal((n, 4))
        tracemalloc.start()
        SemanticTree.fit(points, exact=exact, normalize="none")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 0.5 < SemanticTree.cost(n, 4, exact).memory / peak < 2.5


def test_files_that_are_no_trees_are_refused(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        SemanticTree.load(tmp_path / "none")
    (tmp_path / "damaged").write_bytes(b"abc")
    with pytest.raises(ModelError, match="cut off"):
        SemanticTree.load(tmp_path / "damaged")
    path = SemanticTree.fit(codes(), normalize="none").map(5).save(tmp_path / "map")
    with pytest.raises(ModelError, match=r"no usable semantic tree .*: 'token map'"):
        SemanticTree.load(path)


@pytest.mark.parametrize(
    ("codebook", "options", "message"),
    [
        (np.zeros(4), {}, "matrix"),
        (np.zeros((1, 4)), {}, "at least two codes"),
        (np.full((3, 2), np.nan), {}, "code 0 has a value that is not finite"),
        (np.zeros((3, 2)), {"normalize": "unit"}, "is zero"),
        (codes(), {"used": [True]}, "one value for each of the 60"),
        (codes(), {"used": np.arange(60) == 5}, "at least two used"),
        (codes(), {"normalize": "units"}, "Did you mean 'unit'"),
    ],
)
def test_bad_codebooks_are_refused(codebook, options, message):
    with pytest.raises(ValueError, match=message):
        SemanticTree.fit(codebook, **options)


@pytest.mark.parametrize(("k", "cap"), [(0, None), (61, None), (5, 0)])
def test_bad_cuts_are_refused(k, cap):
    with pytest.raises(ConfigError):
        SemanticTree.fit(codes(), normalize="none").cut(k, cap)


def test_progress_comes_to_its_end():
    seen = []
    SemanticTree.fit(codes(200), progress=lambda done, total: seen.append((done, total)), normalize="none")
    assert seen == sorted(seen)
    assert seen[-1] == (199, 199)


def test_the_approximate_tree_is_exact_with_one_cell_and_near_with_several():
    points = codes(600, 4)
    exact = SemanticTree.fit(points, normalize="none")
    merges, heights = approximate_linkage(points, cell=600, groups=300)
    np.testing.assert_allclose(heights, exact.heights, rtol=1e-9)
    assert len(merges) == 599
    near = SemanticTree.fit(points, exact=False, normalize="none")
    assert not near.exact
    merges, heights = approximate_linkage(points, cell=100, groups=150)
    near = SemanticTree(merges, heights, exact.used, exact.nearest, "none", False, "")
    spread = [mean_within_distance(points, m) for m in (near.map(75), exact.map(75), random_map(exact.map(75)))]
    assert spread[0] < 1.1 * spread[1] < 0.6 * spread[2]
    assert near.map(75).refines(near.map(20))


@pytest.mark.parametrize("least", [1e-12, 1e-200])
def test_weights_may_be_as_different_as_they_like(least):
    """A share that rounds to one would make numbers of infinities that are none, and an endless loop."""
    weights = np.where(np.arange(60) % 3, 1e6, least)
    merges, heights = average_linkage(codes(), weights)
    assert np.isfinite(heights).all()
    assert (np.diff(heights) >= 0).all()
    assert len(merges) == 59
