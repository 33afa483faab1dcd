"""What each method keeps and looks at, what is counted, and that memory is freed."""

import gc
import json
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hasten
from hasten.errors import CalibrationError, ConfigError
from hasten.streaming import (
    DummyForcing,
    FocusedForcing,
    ForcingKV,
    FrameCache,
    FullHistory,
    HeadBudgets,
    KVPolicy,
    KVStream,
    SlidingWindow,
    TopKAttention,
)
from hasten.streaming.methods.forcing_kv import changed_patches
from hasten.streaming.scores import attention_mass, pooled_relevance, redundancy, relevance, standardised

B, q, L, H, D = 2, 3, 8, 4, 16


def frames(count, seed=0, B=B, L=L, H=H, D=D):
    return torch.randn(B, count, L, H, D, generator=torch.Generator().manual_seed(seed))


def begun(method, held=9, **arguments):
    """A policy with `held` random frames, appended three at a time."""
    policy = KVPolicy(method, **arguments)
    keys, values = frames(held, 1), frames(held, 2)
    for start in range(0, held, 3):
        policy.append(keys[:, start : start + 3], values[:, start : start + 3])
    return policy


def step(policy, seed=3):
    with torch.no_grad():
        return policy.attend(frames(q, seed), frames(q, seed + 1), frames(q, seed + 2))


def seen(policy, seed=3):
    """Frames that each batch entry, query frame and head sees, as a table."""
    return policy.select(frames(q, seed), frames(q, seed + 1)).table()


def selected(policy, queries):
    """The same for given queries."""
    return policy.select(queries, frames(q, 4)).table()


# ---------------------------------------------------------------- scores


@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 50))
def test_pooling_does_not_change_relevance(pools, seed):
    queries, keys = frames(q, seed), frames(5, seed + 1)
    fast = relevance(queries, keys.mean(2).transpose(1, 2))
    assert torch.allclose(pooled_relevance(queries, keys, pools), fast, atol=1e-5)


def test_relevance_is_the_mean_logit():
    queries, keys = frames(q, 0), frames(5, 1)
    logits = torch.einsum("bqlhd,bfmhd->bqhflm", queries, keys) / D**0.5
    assert torch.allclose(relevance(queries, keys.mean(2).transpose(1, 2)), logits.mean((4, 5)), atol=1e-5)


def test_pools_must_divide_the_frame():
    with pytest.raises(ConfigError, match="divides the 8 tokens"):
        pooled_relevance(frames(1), frames(1), 3)


@given(st.integers(5, 8), st.integers(0, 50))
def test_copies_of_a_frame_are_the_least_diverse(copies, seed):
    """Copies that are most of the frames pull the mean towards themselves."""
    keys = frames(8, seed).permute(0, 3, 1, 2, 4).clone()
    keys[:, :, :copies] = keys[:, :, :1]
    alike = redundancy(keys)
    if copies < 8:
        diversity = standardised(-alike)
        assert (diversity[..., :copies].amax(-1) < diversity[..., copies:].amin(-1)).all()
    else:
        assert torch.allclose(alike, torch.ones_like(alike), atol=1e-6)


def test_attention_mass_is_the_share_of_the_softmax_on_the_last_tokens():
    queries, keys, history = frames(q, 0), frames(q, 1), frames(5, 2)
    logits = torch.einsum("bqlhd,bfmhd->bhqlfm", queries, torch.cat([history, keys], 1)) / D**0.5
    weights = logits.flatten(4).softmax(4)
    mass = attention_mass(queries, keys, history.permute(0, 3, 1, 2, 4), last=q * L + 2, samples=q * L)
    assert torch.allclose(mass, weights[..., -(q * L + 2) :].sum(4).mean((0, 2, 3)), atol=1e-5)
    sampled = attention_mass(queries, keys, history.permute(0, 3, 1, 2, 4), last=q * L, samples=2)
    ends = weights.flatten(2, 3)[:, :, [0, -1], -q * L :]  # two of them: the first and the last query
    assert torch.allclose(sampled, ends.sum(3).mean((0, 2)), atol=1e-5)


def test_standardised_scores_have_mean_zero_and_deviation_one():
    scores = standardised(torch.randn(3, 7, generator=torch.Generator().manual_seed(0)) * 40 + 9)
    assert torch.allclose(scores.mean(-1), torch.zeros(3), atol=1e-5)
    assert torch.allclose(scores.std(-1, correction=0), torch.ones(3), atol=1e-4)
    assert torch.equal(standardised(torch.full((2, 1), 5.0)), torch.zeros(2, 1))  # one frame: no deviation


# ---------------------------------------------------------------- methods


def test_the_window_is_the_sink_and_the_last_frames():
    policy = begun(SlidingWindow(window=2, sink=1), held=12)
    assert policy.cache.frames == [0, 10, 11]
    assert policy.stats().frames == 3
    assert begun(SlidingWindow(window=0, sink=0)).cache.frames == []
    assert begun(SlidingWindow(window=4, sink=2)).cache.frames == [0, 1, 5, 6, 7, 8]


@pytest.mark.parametrize("method", [SlidingWindow(window=4, sink=2), DummyForcing(), ForcingKV(patches=4)])
def test_a_window_scores_the_sink_highest_and_then_the_newest(method):
    policy = begun(method, held=12)
    scores = policy.score(frames(q, 3))
    order = scores[0, 0, 0].argsort(descending=True, stable=True)
    held = [policy.cache.frames[place] for place in order.tolist()]
    sink = sum(frame < getattr(method, "sink", 1) for frame in held)
    assert sink >= 1
    assert held == [*range(sink), *sorted(held, reverse=True)[: len(held) - sink]]


def test_chosen_frames_are_in_order_of_time():
    selection = begun(TopKAttention(k=4)).select(frames(q, 3), frames(q, 4))
    for group in selection.groups:
        assert (group.frames.diff(dim=3) > 0).all()


def test_a_window_of_nothing_is_attention_to_the_chunk_alone():
    empty, fresh = begun(SlidingWindow(window=0, sink=0)), KVPolicy(FullHistory())
    assert torch.equal(step(empty), step(fresh))


def test_top_k_is_the_most_relevant_frames_for_each_query_frame():
    policy = begun(TopKAttention(k=2))
    best = relevance(frames(q, 3), policy.cache.means).topk(2, dim=3).indices
    assert torch.equal(seen(policy), torch.zeros(B, q, H, 9, dtype=torch.bool).scatter_(3, best, True))


def test_focused_forcing_without_diversity_is_top_k():
    assert torch.equal(
        seen(begun(FocusedForcing(budget=3, mix=1.0, choice="frame", keep_first=False))),
        seen(begun(TopKAttention(k=3))),
    )


@pytest.mark.parametrize("mix", [0.0, 0.3])
@pytest.mark.parametrize("diversity_on", ["unrotated", "cached"])
def test_focused_forcing_prefers_frames_that_differ(mix, diversity_on):
    """Seven frames are copies of one, two are others: with little weight on relevance every head takes the two."""
    policy = KVPolicy(FocusedForcing(budget=2, mix=mix, diversity_on=diversity_on))
    keys = frames(1, 1).expand(-1, 9, -1, -1, -1).clone()
    keys[:, [2, 7]] = frames(2, 5)
    for start in range(0, 9, 3):
        policy.append(keys[:, start : start + 3], frames(3, start))
    table = selected(policy, queries=torch.zeros(B, q, L, H, D))
    assert table.expand(B, q, H, 9).nonzero()[:, 3].unique().tolist() == [2, 7]


def test_diversity_alone_is_the_same_for_every_query_frame():
    table = seen(begun(FocusedForcing(budget=3, mix=0.0)))
    assert torch.equal(table, table[:, :1].expand_as(table))
    assert not torch.equal(table, seen(begun(FocusedForcing(budget=3, mix=1.0))))


@pytest.mark.parametrize(("most", "every"), [(1, 8), (3, 3), (4, 2), (8, 1), (50, 1)])
def test_frames_are_compared_by_tokens_that_are_evenly_spread(most, every):
    policy = begun(FocusedForcing(mix=0.0, diversity_tokens=most))
    expected = standardised(-redundancy(policy.cache.keys[:, :, :, ::every]))[:, None]
    torch.testing.assert_close(
        policy.score(frames(q, 3)), expected.expand(-1, policy.score(frames(q, 3)).shape[1], -1, -1)
    )


def repeating(mix, budget=2):
    """A policy whose history is one frame seven times over, and two others at the places 3 and 6."""
    keys = frames(1, 1).repeat(1, 9, 1, 1, 1)
    keys[:, [3, 6]] = frames(2, 4)
    policy = KVPolicy(FocusedForcing(budget=budget, mix=mix))
    policy.append(keys, frames(9, 2))
    return policy


def test_the_mix_is_the_weight_of_relevance():
    """Queries that ask for the frame that is repeated: relevance takes its copies, diversity the others."""
    queries = frames(1, 1).repeat(1, q, 1, 1, 1)
    copies = {}
    for mix in (0.1, 0.9):
        table = repeating(mix).select(queries, queries).table()
        copies[mix] = float(table[..., [0, 1, 2, 4, 5, 7, 8]].sum() / table.sum())
    assert copies[0.1] == 0
    assert copies[0.9] == 1


def test_a_chunk_can_choose_as_one():
    per_frame, per_chunk = (begun(FocusedForcing(budget=3, choice=name)) for name in ("frame", "maximum"))
    assert seen(per_frame).shape[1] == q
    assert seen(per_chunk).shape[1] == 1
    for policy in (per_frame, per_chunk):
        step(policy)
    assert per_frame.stats().pairs == per_chunk.stats().pairs
    assert per_frame.stats().kv_bytes == q * per_chunk.stats().kv_bytes


def choosing(choice, budget=1):
    """A policy whose nine frames are marks, asked by three query frames: two for frame 2, one harder for frame 6."""
    policy = KVPolicy(FocusedForcing(budget=budget, mix=1.0, choice=choice))
    policy.append(5 * torch.eye(D)[:9].view(1, 9, 1, 1, D).expand(B, 9, L, H, D), frames(9, 2))
    queries = torch.eye(D)[2].expand(B, q, L, H, D).clone()
    queries[:, :2] += 0.9 * torch.eye(D)[4]
    queries[:, 2] = torch.eye(D)[6]
    return policy, queries


def test_who_chooses():
    """Frame 6 has the highest score of any query frame; frame 2 that of most of them, and the highest mean."""
    found = {}
    for choice in ("maximum", "mean", "union", "frame"):
        policy, queries = choosing(choice)
        table = policy.select(queries, queries).table()
        found[choice] = [table[0, i, 0].nonzero().flatten().tolist() for i in range(table.shape[1])]
        assert torch.equal(table, table[:1, :, :1].expand_as(table))
    assert found == {"maximum": [[6]], "mean": [[2]], "union": [[2, 6]], "frame": [[2], [2], [6]]}


def test_a_union_has_what_every_query_frame_would_choose():
    for seed in range(5):
        own, all_ = (begun(FocusedForcing(budget=2, choice=choice)) for choice in ("frame", "union"))
        wanted, found = seen(own, seed).any(1), seen(all_, seed)[:, 0]
        assert (found | ~wanted).all()
        sizes = wanted.sum(2).amax(0)  # budgets are of heads: the entries of a batch have equally many
        assert torch.equal(found.sum(2), sizes.expand(B, H))


def test_heads_get_their_own_budgets():
    budgets = HeadBudgets(((0, 1, 4, 20),))
    assert seen(begun(FocusedForcing(budget=budgets))).sum(3).unique(dim=0).tolist() == [[[0, 1, 4, 9]]]


def test_the_first_frame_can_be_forced_on_heads_that_can_afford_it():
    budgets = HeadBudgets(((2, 3, 3, 4),))
    forced, free = (seen(begun(FocusedForcing(budget=budgets, keep_first=keep))) for keep in (True, False))
    assert forced[:, :, 1:, 0].all()
    assert torch.equal(forced[:, :, 0], free[:, :, 0])
    assert not free[:, :, 1:, 0].all()
    assert torch.equal(forced.sum(3), free.sum(3))


def test_the_pool_of_frames_can_be_a_window():
    policy = begun(FocusedForcing(budget=2, window=4), held=12)
    assert policy.cache.frames == [0, 8, 9, 10, 11]
    assert seen(policy).shape == (B, 1, H, 5)


def rotate(keys, numbers):
    """Turns the first two channels of `[B, H, F, L, D]` by the frame's number."""
    angle = numbers[:, None].to(keys)
    x, y = keys[..., 0], keys[..., 1]
    turned = torch.stack([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], -1)
    return torch.cat([turned, keys[..., 2:]], -1)


@pytest.mark.parametrize("way", ["unrotate", "plain keys"])
def test_frames_are_compared_without_their_rotation(way):
    plain = frames(9, 1)
    rotated = rotate(plain.permute(0, 3, 1, 2, 4), torch.arange(9)).permute(0, 2, 3, 1, 4)
    undo = (lambda keys, numbers: rotate(keys, -numbers)) if way == "unrotate" else None
    policies = []
    for keys, arguments in ((plain, {}), (rotated, {"rotated": True, "unrotate": undo})):
        policy = KVPolicy(FocusedForcing(budget=3, mix=0.0), **arguments)
        policy.append(keys, frames(9, 2), plain if way == "plain keys" and arguments else None)
        policies.append(policy)
    assert torch.equal(seen(policies[0]), seen(policies[1]))
    cached = KVPolicy(FocusedForcing(budget=3, mix=0.0, diversity_on="cached"), rotated=True)
    cached.append(rotated, frames(9, 2))
    assert not torch.equal(seen(cached), seen(policies[0]))


def test_rotated_keys_without_a_way_back_are_refused():
    policy = KVPolicy(FocusedForcing(budget=2), rotated=True)
    policy.append(frames(9), frames(9))
    with pytest.raises(ConfigError, match='diversity_on="cached"'):
        step(policy)


def test_the_choice_holds_for_the_chunk_or_is_refreshed():
    kept, renewed, second = (begun(FocusedForcing(budget=2, refresh_every=n)) for n in (None, 1, 2))
    tables = {}
    for name, policy in (("kept", kept), ("renewed", renewed), ("second", second)):
        tables[name] = []
        for seed in (3, 30, 300):
            tables[name].append(seen(policy, seed))
            step(policy, seed)
    assert torch.equal(tables["kept"][0], tables["kept"][2])
    assert not torch.equal(tables["renewed"][0], tables["renewed"][1])
    assert torch.equal(tables["second"][0], tables["second"][1])
    assert torch.equal(tables["second"][2], tables["renewed"][2])
    kept.append(frames(3, 7), frames(3, 8))
    assert seen(kept).shape[3] == 12


def test_a_refreshed_choice_is_attended_to():
    """The copies of chosen frames are thrown away with the choice."""
    grouped, masked = (begun(FocusedForcing(budget=2, refresh_every=1), backend=name) for name in ("grouped", "masked"))
    for seed in (3, 30, 300):
        assert torch.allclose(step(grouped, seed), step(masked, seed), atol=1e-5)


def dummy_stream(method, layers=2):
    """Two layers; the first head of each looks at the present only, the others at the past."""
    stream = KVStream(method, layers)
    keys = torch.ones(B, 9, L, H, D)
    for layer in range(layers):
        stream[layer].append(keys, frames(9, 2))
    return stream


def test_dummy_heads_are_those_that_look_at_the_present():
    stream = dummy_stream(DummyForcing(dummy_share=0.25, local=1, history=3))
    queries, keys = torch.ones(B, q, L, H, D), torch.ones(B, q, L, H, D)
    keys[:, :, :, 0] = 5
    for layer in range(2):
        stream[layer].attend(queries, keys, keys)
    assert stream.stats().work_ratio == 1  # while they are measured all see everything
    for layer in range(2):
        table = stream[layer].select(queries, keys).table()[0, 0]
        assert table[0].nonzero().flatten().tolist() == [8]
        for head in range(1, H):
            assert table[head].nonzero().flatten().tolist() == [0, 6, 7, 8]


def test_dummy_forcing_begins_at_its_chunk():
    policy = KVPolicy(DummyForcing(begin=2, history=0, local=0))
    for chunk in range(3):
        before = policy.stats()
        step(policy)
        step(policy)
        after = policy.stats()
        assert (after.pairs - before.pairs < after.full_pairs - before.full_pairs) == (chunk >= 2)
        policy.append(frames(3), frames(3))


def test_static_heads_keep_a_short_context_and_dynamic_ones_what_changed():
    policy = KVPolicy(ForcingKV(threshold=0.5, recent=4, context=2, patches=4, retention=0.5))
    keys = torch.zeros(B, 9, L, H, D)
    keys[:, :, :, 1] = 1.0  # head 1 has looked at the past all the time
    keys[:, 4, 2:6, 1] = torch.randn(
        B, 4, D, generator=torch.Generator().manual_seed(0)
    )  # frame 4 differs in its middle
    policy.append(keys, frames(9, 2))
    queries, now = torch.ones(B, q, L, H, D), torch.zeros(B, q, L, H, D)
    now[:, :, :, [0, 2, 3]] = 4.0
    selection = policy.select(queries, now)
    tokens = selection.token_table(L)[0, 0].view(H, 9, L)
    for head in (0, 2, 3):
        assert tokens[head].all(1).nonzero().flatten().tolist() == [0, 7, 8]
        assert tokens[head].sum() == 3 * L
    assert tokens[1].sum(1).tolist() == [L, *[L // 2] * 6, L, L]
    assert tokens[1, 4].nonzero().flatten().tolist() == [2, 3, 4, 5]


def test_changed_patches_are_those_least_like_the_frame_before():
    keys = torch.ones(1, 1, 3, 8, 2)
    keys[0, 0, 1, 4:6] = -1.0
    assert changed_patches(keys, patches=4, kept=1)[0, :, 0].tolist() == [2, 2]


def test_patches_must_divide_the_frame():
    with pytest.raises(ConfigError, match="8 tokens"):
        step(begun(ForcingKV(patches=3)))


@pytest.mark.parametrize(
    "method",
    [
        FullHistory(),
        SlidingWindow(),
        TopKAttention(),
        FocusedForcing(),
        FocusedForcing(choice="frame"),
        DummyForcing(),
        ForcingKV(),
    ],
    ids=lambda m: type(m).__name__,
)
def test_every_method_scores_the_frames_it_holds(method):
    policy = begun(method)
    scores = policy.score(frames(q, 3))
    assert scores.shape in {(B, 1, H, len(policy.cache)), (B, q, H, len(policy.cache))}
    assert scores.dtype == torch.float32
    with pytest.raises(ConfigError, match="append a chunk"):
        KVPolicy(method).score(frames(q))


def test_methods_are_known_by_name():
    known = {info.name: info for info in hasten.methods() if info.kind == "streaming"}
    wanted = {"full-history", "sliding-window", "topk-attention", "focused-forcing", "dummy-forcing", "forcing-kv"}
    assert set(known) == wanted
    assert known["focused-forcing"].parameters["mix"].default == 0.5


# ---------------------------------------------------------------- budgets


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=30), st.integers(0, 5), st.integers(0, 9), st.floats(0.2, 5))
def test_budgets_rise_with_importance_within_their_range(values, b_min, more, gamma):
    importance = torch.tensor([values])
    table = HeadBudgets.from_importance(importance, b_min, b_min + more, gamma).table[0]
    assert all(b_min <= b <= b_min + more for b in table)
    ranked = [b for _, b in sorted(zip(values, table, strict=True))]
    assert ranked == sorted(ranked)


def test_budgets_are_the_papers_rule():
    importance = torch.tensor([[0.0, 1.0], [2.0, 4.0]])
    assert HeadBudgets.from_importance(importance, 2, 10, 1.0, clip=1.0).table == ((2, 4), (6, 10))
    assert HeadBudgets.from_importance(importance, 2, 10, 2.0, clip=1.0).table == ((2, 2), (4, 10))


def test_one_outlier_does_not_take_everything():
    importance = torch.cat([torch.linspace(0, 1, 200), torch.tensor([1e6])])[None]
    assert HeadBudgets.from_importance(importance, clip=1.0).mean < 2.1
    assert HeadBudgets.from_importance(importance).mean > 5


@given(st.integers(0, 99), st.floats(3.5, 8))
def test_budgets_of_a_wanted_mean_cost_no_more(seed, mean):
    importance = torch.rand(4, 6, generator=torch.Generator().manual_seed(seed))
    budgets = HeadBudgets.with_mean(importance, mean, 2, 9)
    assert mean - 0.5 < budgets.mean <= mean
    with pytest.raises(ConfigError, match="lower b_min"):
        HeadBudgets.with_mean(importance, 1.5, 2, 9)


def test_budgets_are_saved_and_refuse_another_model(tmp_path):
    path = tmp_path / "budgets.json"
    budgets = HeadBudgets(((1, 2), (3, 4)), {"model": "ours", "chunk": 3})
    budgets.save(path)
    assert HeadBudgets.load(path) == budgets
    method = FocusedForcing(budget=str(path))
    assert KVStream(method, 2, facts={"model": "ours", "layers": 2})[1].method.budgets(1, 2) == (3, 4)
    with pytest.raises(CalibrationError, match="model 'ours' instead of 'theirs'"):
        KVStream(method, 2, facts={"model": "theirs"})
    with pytest.raises(CalibrationError, match="2 layers"):
        KVStream(method, 3)
    with pytest.raises(CalibrationError, match="2 heads"):
        step(begun(method))


@pytest.mark.parametrize("content", [None, "no json", json.dumps({"schema": 1}), json.dumps([1])])
def test_a_damaged_file_of_budgets_is_refused(tmp_path, content):
    path = tmp_path / "budgets.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CalibrationError, match=r"budgets\.json: no (such file|usable)"):
        FocusedForcing(budget=str(path))


@pytest.mark.parametrize("table", [(), ((),), ((1, 2), (1,)), ((-1,),), ((1.5,),), None, 5, "12", ("12",)])
def test_impossible_tables_are_refused(table):
    with pytest.raises(ConfigError, match=r"whole numbers of 0 or more|as many heads"):
        HeadBudgets(table)


def test_impossible_importance_is_refused():
    with pytest.raises(ConfigError, match="finite"):
        HeadBudgets.from_importance(torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(ConfigError, match="b_min"):
        HeadBudgets.from_importance(torch.ones(1, 2), 5, 4)


# ---------------------------------------------------------------- counting and memory


def test_work_is_counted_in_pairs_and_bytes():
    policy = begun(TopKAttention(k=2), timed=True)
    step(policy)
    stats = policy.stats()
    assert stats.pairs == B * H * (q * L) * (2 + q) * L
    assert stats.full_pairs == B * H * (q * L) * (9 + q) * L
    assert stats.work_ratio == 12 / 5
    assert stats.kv_bytes == 2 * B * H * q * (2 + q) * L * D * 4
    assert stats.full_kv_bytes == 2 * B * H * (9 + q) * L * D * 4
    assert stats.forwards == 1
    assert stats.attention_seconds > 0
    assert stats.select_seconds > 0
    assert stats.overhead > 0
    assert stats.full_cache_bytes == 2 * B * H * 9 * L * D * 4


def test_no_time_is_taken_unless_asked_for():
    policy = begun(TopKAttention(k=2))
    step(policy)
    assert policy.stats().forwards == 1
    assert policy.stats().seconds == policy.stats().overhead == 0


def test_evicted_frames_still_count_as_full_work():
    policy = begun(SlidingWindow(window=2, sink=1))
    step(policy)
    assert policy.stats().work_ratio == 12 / 6


def test_a_stream_adds_its_layers_up_and_gates_its_heads():
    stream = KVStream(FocusedForcing(budget=2), 2)
    for layer in range(2):
        stream[layer].append(frames(9, 1), frames(9, 2))
    plain = stream.attend(0, *(frames(q, s) for s in (3, 4, 5)))
    stream.gates = torch.tensor([[1.0, 0.0, 2.0, 1.0], [1.0] * 4])
    gated = stream.attend(0, *(frames(q, s) for s in (3, 4, 5)))
    assert torch.equal(gated, plain * torch.tensor([1.0, 0.0, 2.0, 1.0])[:, None])
    stream.attend(1, *(frames(q, s) for s in (3, 4, 5)))
    assert stream.stats().forwards == 3
    assert stream.stats().pairs == 3 * stream[1].stats().pairs
    stream.reset()
    assert stream.stats().cache_bytes == 0
    assert stream.stats().forwards == 3


def tensors_of(policy):
    """All tensors that the cache holds."""
    return [thing for thing in vars(policy.cache).values() if isinstance(thing, torch.Tensor)]


def test_eviction_frees_memory():
    policy = KVPolicy(FocusedForcing(budget=2))
    for _ in range(10):
        policy.append(frames(3), frames(3))
    step(policy)
    old = [weakref.ref(tensor) for tensor in tensors_of(policy)]
    full = policy.stats().cache_bytes
    with torch.no_grad():
        policy.evict([0, 28, 29])
    gc.collect()
    assert len(old) == 4  # keys, values, means, and where frames are
    assert all(tensor() is None for tensor in old)
    assert policy.cache.frames == [0, 28, 29]
    assert policy.stats().cache_bytes == sum(t.untyped_storage().nbytes() for t in tensors_of(policy)) < 0.3 * full
    policy.evict([])
    assert tensors_of(policy) == []
    policy.append(frames(3), frames(3))
    assert policy.cache.frames == [30, 31, 32]


def test_what_frames_are_compared_by_takes_next_to_no_memory():
    """Their means and where they are; keys are compared where they lie."""
    policy = begun(FocusedForcing(budget=2, forget_after=None), held=30)
    with torch.no_grad():
        bare = policy.cache.nbytes
        step(policy)
    assert policy.cache.nbytes - bare == policy.cache.means.nbytes + policy.cache._slots.nbytes
    big = 2 * 12 * 128 * 1560 * 2  # a frame's keys and values at Wan 2.1 1.3B's size, bfloat16
    assert (12 * 128 * 4 + 12 * 8) / big < 0.01


def test_a_dropped_stream_is_freed_at_once():
    stream = KVStream(FocusedForcing(budget=2), 2)
    with torch.no_grad():
        for layer in range(2):
            stream[layer].append(frames(9, 1), frames(9, 2))
        step(stream[0])
    held = [weakref.ref(tensor) for tensor in tensors_of(stream[0])]
    gc.disable()
    try:
        del stream
        assert [tensor() for tensor in held] == [None] * 4
    finally:
        gc.enable()


BOUNDED = [
    SlidingWindow(window=4),
    FocusedForcing(budget=2, window=6, forget_after=None),
    FocusedForcing(budget=2, window=6, forget_after=None, choice="frame"),
]


@pytest.mark.parametrize("method", BOUNDED)
def test_a_thousand_frames_in_constant_memory(method):
    policy, sizes = KVPolicy(method), []
    chunk = [frames(2, s, B=1, L=4, H=2, D=8) for s in range(5)]
    with torch.no_grad():
        for _ in range(500):
            policy.attend(*chunk[:3])
            policy.append(*chunk[3:])
            sizes.append(policy.stats().cache_bytes)
    assert policy.cache.next_frame == 1000
    assert max(sizes[10:]) == min(sizes[10:]) == sizes[-1]
    assert sizes[-1] == sum(t.untyped_storage().nbytes() for t in tensors_of(policy))
    assert policy.stats().full_cache_bytes == 1000 * policy.cache.frame_bytes


def test_room_grows_by_a_share_and_not_by_a_chunk():
    """Buffers are made anew a few times, not once per chunk."""
    cache, made = FrameCache(), set()
    with torch.no_grad():
        for chunk in range(100):
            cache.append(frames(3, chunk, L=2, D=4), frames(3, chunk, L=2, D=4))
            cache.reserve()
            made.add(cache._keys.data_ptr())
            assert cache._keys.shape[2] >= len(cache) + 3
            assert cache._keys.shape[2] <= 1.0625 * (len(cache) + 3)
    assert len(made) < 60


# ---------------------------------------------------------------- forgetting


def watched(method, seen_by_chunk, layers=1, chunk=3):
    """Roll out so that every head looks at the frames that `seen_by_chunk` names for the chunk, and no others."""
    stream = KVStream(method, layers)
    width = 32
    marks = torch.eye(width)
    with torch.no_grad():
        for number, wanted in enumerate(seen_by_chunk):
            first = number * chunk
            keys = 5 * marks[first : first + chunk].view(1, chunk, 1, 1, width).expand(1, chunk, 2, 2, width)
            queries = sum(marks[frame] for frame in wanted) if wanted else torch.zeros(width)
            queries = queries.view(1, 1, 1, 1, width).expand(1, chunk, 2, 2, width)
            for layer in range(layers):
                stream.attend(layer, queries, keys, keys, first=first)
                stream[layer].append(keys, keys, first=first)
    return stream


def forgetting(chunks, budget=2):
    return FocusedForcing(budget=budget, mix=1.0, forget_after=chunks)


def test_frames_that_no_head_chose_are_forgotten_and_the_chosen_ones_are_not():
    looked_at = [[], [0, 2], [0, 4], [0, 4], [0, 4], [0, 4]]
    assert watched(forgetting(None), looked_at)[0].cache.frames == list(range(18))
    # Frames 0 and 4 were chosen to the end; 12 to 14 were there to be chosen once, 15 to 17 never.
    assert watched(forgetting(1), looked_at)[0].cache.frames == [0, 4, 15, 16, 17]
    assert watched(forgetting(2), looked_at)[0].cache.frames == [0, 4, 12, 13, 14, 15, 16, 17]
    assert watched(forgetting(3), looked_at)[0].cache.frames == [0, 4, *range(9, 18)]


@pytest.mark.parametrize("choice", ["frame", "union"])
def test_a_frame_is_kept_for_as_long_as_one_head_of_one_query_frame_chooses_it(choice):
    policy = KVPolicy(FocusedForcing(budget=1, mix=1.0, forget_after=1, choice=choice))
    keys = 5 * torch.eye(16)[:9].view(1, 9, 1, 1, 16).expand(1, 9, L, H, 16)
    with torch.no_grad():
        policy.append(keys, keys)
        queries = 5 * torch.eye(16)[3].expand(1, q, L, H, 16).clone()
        queries[:, 2, :, 1] = 50 * torch.eye(16)[7]  # one head, and of it the last frame alone
        policy.attend(queries, keys[:, :3], keys[:, :3])
        policy.append(keys[:, :3], keys[:, :3])
    assert policy.cache.frames == [3, 7, 9, 10, 11]


def test_choices_within_a_chunk_all_count():
    policy = KVPolicy(FocusedForcing(budget=1, mix=1.0, forget_after=1, refresh_every=1))
    keys = 5 * torch.eye(16)[:9].view(1, 9, 1, 1, 16).expand(1, 9, L, H, 16)
    with torch.no_grad():
        policy.append(keys, keys)
        for frame in (2, 5):
            policy.attend(5 * torch.eye(16)[frame].expand(1, q, L, H, 16), keys[:, :3], keys[:, :3])
        policy.append(keys[:, :3], keys[:, :3])
    assert policy.cache.frames == [2, 5, 9, 10, 11]


def test_nothing_is_forgotten_while_everything_is_seen():
    assert watched(forgetting(1, budget=9), [[], [0], [0], [0]])[0].cache.frames == list(range(12))


def test_layers_forget_for_themselves_and_memory_stays_bounded():
    method = FocusedForcing(budget=2, forget_after=1)
    stream, sizes = KVStream(method, 2), []
    with torch.no_grad():
        for chunk in range(60):
            for layer in range(2):
                now = [frames(3, 7 * chunk + layer + s, B=1, L=2, H=2, D=8) for s in range(3)]
                stream.attend(layer, *now, first=3 * chunk)
                stream[layer].append(*now[1:], first=3 * chunk)
            sizes.append([len(policy.cache) for policy in stream])
    assert max(max(pair) for pair in sizes) <= 2 * 2 + 3 + 3  # two heads' choices, new frames, and those just appended
    assert any(stream[0].cache.frames != stream[1].cache.frames for _ in [0])


# ---------------------------------------------------------------- peaks


def test_the_peak_is_the_most_that_all_layers_held_at_once():
    stream, most = KVStream(FocusedForcing(budget=2, choice="frame", forget_after=None), 3), 0
    with torch.no_grad():
        for chunk in range(4):
            for layer in range(3):
                stream.attend(layer, frames(q, 3), frames(q, 4), frames(q, 5))
                held = sum(policy.cache.nbytes + policy.stats().packed_bytes for policy in stream)
                most = max(most, held)
            for layer in range(3):
                stream[layer].append(frames(3, chunk), frames(3, chunk + 9))
                most = max(most, sum(policy.cache.nbytes + policy.stats().packed_bytes for policy in stream))
    stats = stream.stats()
    assert stats.peak_bytes >= most > stats.cache_bytes  # moving a buffer of one layer comes on top of it
    assert stats.peak_bytes <= most + 2 * stream[0].cache.nbytes
    stream.reset()
    assert stream.stats().peak_bytes == stream.stats().cache_bytes == 0


def test_a_choice_per_chunk_peaks_lower_than_one_per_frame():
    peaks = {}
    for choice in ("maximum", "frame"):
        stream = KVStream(FocusedForcing(budget=2, choice=choice, forget_after=None), 3)
        with torch.no_grad():
            for chunk in range(4):
                for layer in range(3):
                    stream.attend(layer, frames(q, 3), frames(q, 4), frames(q, 5))
                for layer in range(3):
                    stream[layer].append(frames(3, chunk), frames(3, chunk + 9))
        peaks[choice] = stream.stats().peak_bytes / stream.stats().full_cache_bytes
    assert peaks["maximum"] < 0.7 * peaks["frame"]


# ---------------------------------------------------------------- misuse


def test_a_missed_reset_is_told():
    stream = watched(FullHistory(), [[], [], []])
    now = frames(3, B=1, L=2, H=2, D=32)
    with pytest.raises(ConfigError, match=r"frame 0 comes after 9 frames: call reset\(\)"):
        stream.attend(0, now, now, now, first=0)
    stream.reset()
    stream.attend(0, now, now, now, first=0)


def test_frames_out_of_turn_are_told():
    policy = begun(FullHistory())
    with pytest.raises(ConfigError, match="frame 6 comes again, after 9 frames"):
        policy.append(frames(3), frames(3), first=6)
    with pytest.raises(ConfigError, match="frame 12 comes after 9 frames"):
        policy.attend(frames(3), frames(3), frames(3), first=12)


def test_two_appends_in_a_step_are_refused():
    policy = begun(FullHistory())  # a history may be given chunk by chunk, before anything is made
    step(policy)
    policy.append(frames(3), frames(3))
    with pytest.raises(ConfigError, match="layer 0 was given a chunk twice without a forward in between"):
        policy.append(frames(3), frames(3))
    assert len(policy.cache) == 12
    policy.reset()
    policy.append(frames(3), frames(3))


def test_fewer_key_heads_than_query_heads_are_told():
    keys = frames(3, H=2)
    with pytest.raises(ConfigError, match=r"grouped-query attention is not served.*repeat_interleave\(2, dim=3\)"):
        KVPolicy(FullHistory()).attend(frames(3, H=4), keys, keys)
    policy = begun(FullHistory())
    with pytest.raises(ConfigError, match="2 heads where 4 were expected"):
        policy.attend(frames(3), keys, keys)


@pytest.mark.parametrize("layer", [2, -1])
def test_layers_that_there_are_not_are_told(layer):
    stream = KVStream(FullHistory(), 2)
    with pytest.raises(ConfigError, match=f"from 0 to 1, got {layer}"):
        stream.attend(layer, frames(3), frames(3), frames(3))
    assert [policy.view.layer for policy in stream] == [0, 1]


def test_appending_keeps_what_was_there():
    cache, keys, values = FrameCache(), frames(9, 1), frames(9, 2)
    for start in (0, 1, 4):
        stop = {0: 1, 1: 4, 4: 9}[start]
        cache.append(keys[:, start:stop], values[:, start:stop])
        cache.with_current(frames(2, 7), frames(2, 8))  # scribbles behind the history only
        assert torch.allclose(cache.means, keys[:, :stop].mean(2).transpose(1, 2), atol=1e-6)
    assert torch.equal(cache.keys, keys.permute(0, 3, 1, 2, 4))
    assert torch.equal(cache.values, values.permute(0, 3, 1, 2, 4))
    cache.keep([1, 4, 8])
    cache.append(keys[:, :2], values[:, :2])
    assert torch.allclose(cache.means, keys[:, [1, 4, 8, 0, 1]].mean(2).transpose(1, 2), atol=1e-6)


def test_a_view_copies_nothing_but_means():
    cache, keys, values = FrameCache(), frames(9, 1), frames(9, 2)
    cache.view(keys, values, range(4, 13))
    assert cache.keys.data_ptr() == keys.data_ptr()
    assert cache.frames == list(range(4, 13))
    with pytest.raises(ConfigError, match="rising"):
        cache.view(keys, values, range(3))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: frames(3)[0], r"\[B, F, L, H, D\]"),
        (lambda: frames(3, L=4), "agree in batch"),
        (lambda: frames(3).double(), "float32"),
        (lambda: frames(3)[:, :0], "none of them 0"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(wrong, message):
    policy = begun(FullHistory())
    with pytest.raises(ConfigError, match=message):
        policy.append(wrong(), wrong())
    with pytest.raises(ConfigError, match=message):
        policy.attend(wrong(), wrong(), wrong())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: (torch.zeros(B, 5, H, D), torch.zeros(B, 4, H, D)),
        lambda: (torch.zeros(B, 5, H + 1, D),) * 2,
        lambda: (torch.zeros(B, 5, H),) * 2,
        lambda: (torch.zeros(B, 5, H, D).double(),) * 2,
    ],
)
def test_further_tokens_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ConfigError, match="extra keys and values"):
        begun(FullHistory()).attend(frames(q), frames(q), frames(q), extra=wrong())


def test_frames_to_keep_must_exist():
    policy = begun(FullHistory())
    for places in ([9], [3, 1], [-1], [2, 2]):
        with pytest.raises(ConfigError, match="positions from 0 to 8"):
            policy.evict(places)


def test_plain_keys_come_always_or_never():
    policy = KVPolicy(FullHistory(), rotated=True)
    policy.append(frames(3), frames(3), frames(3))
    with pytest.raises(ConfigError, match="always or never"):
        policy.append(frames(3), frames(3))
    with pytest.raises(ConfigError, match="keys' shape"):
        policy.append(frames(3), frames(2), frames(3))


def test_redundancy_is_the_mean_cosine_with_the_mean_key():
    keys = frames(6).permute(0, 3, 1, 2, 4)
    wanted = torch.nn.functional.cosine_similarity(keys, keys.mean(2, keepdim=True), dim=-1).mean(-1)
    assert torch.allclose(redundancy(keys), wanted, atol=1e-5)
    keys[:, :, 2] = 0
    assert (redundancy(keys)[:, :, 2] == 0).all()
