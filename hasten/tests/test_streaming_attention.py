"""The ways to compute attention to chosen frames agree, and choosing everything is full attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from hasten.errors import ConfigError, UnknownNameError
from hasten.streaming import (
    BACKENDS,
    DummyForcing,
    FocusedForcing,
    ForcingKV,
    FullHistory,
    HeadBudgets,
    KVPolicy,
    Selection,
    SlidingWindow,
    TopKAttention,
    kernels,
)
from hasten.streaming.attention import attend, prepare
from hasten.streaming.cache import FrameCache
from hasten.streaming.current import Current
from hasten.streaming.kernels import varlen
from hasten.streaming.selection import HeadGroup, frames_at, top_frames

B, q, L, H, D, F = 2, 3, 8, 4, 16, 9
PORTABLE = [name for name in BACKENDS if name != "varlen"]


def frames(count, seed=0, dtype=torch.float32, **sizes):
    """Random `[B, count, L, H, D]`."""
    b, tokens, heads, width = (sizes.get(name, size) for name, size in (("B", B), ("L", L), ("H", H), ("D", D)))
    return torch.randn(b, count, tokens, heads, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled(held=F, dtype=torch.float32, **sizes):
    cache = FrameCache()
    cache.append(frames(held, 1, dtype, **sizes), frames(held, 2, dtype, **sizes))
    with torch.no_grad():
        cache.reserve()
    return cache


def current(dtype=torch.float32, extra=0, **sizes):
    more = None
    if extra:
        more = tuple(torch.randn(B, extra, H, D, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (6, 7))
    return Current(frames(q, 3, dtype, **sizes), frames(q, 4, dtype, **sizes), frames(q, 5, dtype, **sizes), more)


def by_hand(now, cache, selection, scale=None):
    """One softmax for each batch, query frame and head, over the frames that the table names."""
    table = selection.token_table(L).expand(B, q, H, -1)
    keys, values = now.by_head()
    out = torch.empty_like(now.queries)
    for b in range(B):
        for h in range(H):
            for i in range(q):
                seen = table[b, i, h]
                k = torch.cat([cache.keys.flatten(2, 3)[b, h][seen], keys[b, h]])
                v = torch.cat([cache.values.flatten(2, 3)[b, h][seen], values[b, h]])
                logits = now.queries[b, i, :, h] @ k.T * (scale or D**-0.5)
                out[b, i, :, h] = logits.softmax(-1) @ v
    return out


def mixed(per_frame=True):
    """Heads with budgets 0, 2, 2 and 5."""
    scores = torch.randn(B, q if per_frame else 1, H, F, generator=torch.Generator().manual_seed(8))
    return top_frames(scores, [0, 2, 2, 5])


def parts_of_frames():
    """Two heads see whole frames, two see single tokens."""
    tokens = torch.tensor([1, 9, 17, 40]).expand(B, 1, 2, 4)
    some = HeadGroup((1, 3), torch.tensor([0, 1, 2, 5]).expand(B, 1, 2, 4), tokens)
    return Selection((frames_at([4, 0], (0, 2), B, torch.device("cpu")), some), F)


@pytest.mark.parametrize("backend", PORTABLE)
@pytest.mark.parametrize("selection", [mixed(), mixed(per_frame=False), parts_of_frames()])
@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_backends_agree_with_attention_by_hand(backend, selection, extra, scale):
    now, cache = current(extra=extra), filled()
    wanted = by_hand(now, cache, selection, scale)
    with torch.no_grad():
        assert torch.allclose(attend(backend, now, cache, selection, scale=scale), wanted, atol=1e-5)


@pytest.mark.parametrize("backend", ["grouped", "masked"])
def test_backends_agree_in_bfloat16(backend):
    exact = by_hand(current(), filled(), mixed())
    coarse = attend(backend, current(torch.bfloat16), filled(dtype=torch.bfloat16), mixed())
    assert coarse.dtype == torch.bfloat16
    assert (coarse.float() - exact).square().mean() < 1e-3 * exact.square().mean()


def plain_kernel(q_, k_, v_, starts_q, starts_k, longest_q, longest_k):
    """What a flash kernel for sequences of unequal length does, one sequence after another."""
    out = torch.empty_like(q_)
    for a, b, c, d in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
        assert b - a <= longest_q
        assert d - c <= longest_k
        parts = (t.transpose(0, 1) for t in (q_[a:b], k_[c:d], v_[c:d]))
        out[a:b] = scaled_dot_product_attention(*parts).transpose(0, 1)
    return out


@pytest.mark.parametrize("selection", [mixed(), mixed(per_frame=False), parts_of_frames()])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_sequences_are_packed_and_unpacked_rightly(selection, scale):
    now, cache = current(extra=5), filled()
    wanted = by_hand(now, cache, selection, scale)
    assert torch.allclose(varlen(now, cache, selection, scale, plain_kernel), wanted, atol=1e-5)


def test_varlen_with_the_flash_kernel():
    pytest.importorskip("flash_attn")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    cache = FrameCache()
    cache.append(*(frames(F, s, torch.bfloat16).cuda() for s in (1, 2)))
    now = Current(*(frames(q, s, torch.bfloat16).cuda() for s in (3, 4, 5)))
    selection = top_frames(torch.randn(B, q, H, F, device="cuda"), [0, 2, 2, 5])
    flash, masked = (attend(name, now, cache, selection) for name in ("varlen", "masked"))
    assert torch.allclose(flash, masked, atol=1e-2)


def test_varlen_says_what_it_needs():
    with pytest.raises(ConfigError, match="grouped"):
        attend("varlen", current(), filled(), mixed())


def test_an_unknown_backend_is_refused():
    with pytest.raises(UnknownNameError, match="grouped"):
        attend("groupd", current(), filled(), mixed())
    with pytest.raises(UnknownNameError, match="grouped"):
        KVPolicy(FullHistory(), backend="groupd")


COVERING = [
    FullHistory(),
    SlidingWindow(window=F, sink=1),
    TopKAttention(k=F),
    FocusedForcing(budget=F),
    FocusedForcing(budget=F + 5, choice="frame", mix=0.2),
    FocusedForcing(budget=HeadBudgets.uniform(1, H, F)),
    DummyForcing(local=F, history=F),
    ForcingKV(threshold=0.0, context=F),
]


@pytest.mark.parametrize("method", COVERING, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_budget_that_covers_the_history_is_full_attention_bit_for_bit(method, backend):
    policy = KVPolicy(method, backend=backend)
    keys, values = frames(F, 1), frames(F, 2)
    policy.append(keys, values)
    now = current()
    full = scaled_dot_product_attention(
        now.queries.flatten(1, 2).transpose(1, 2),
        torch.cat([keys, now.keys], 1).flatten(1, 2).transpose(1, 2),
        torch.cat([values, now.values], 1).flatten(1, 2).transpose(1, 2),
    )
    with torch.no_grad():
        for _ in range(2):
            out = policy.attend(now.queries, now.keys, now.values)
            assert torch.equal(out.flatten(1, 2).transpose(1, 2), full)


@pytest.mark.parametrize("backend", PORTABLE)
@pytest.mark.parametrize(
    "method",
    [
        SlidingWindow(window=2),
        TopKAttention(k=2),
        FocusedForcing(budget=2),
        FocusedForcing(budget=0),
        DummyForcing(history=2),
        ForcingKV(threshold=0.5, context=1, patches=4),
    ],
    ids=lambda m: type(m).__name__,
)
def test_the_current_chunk_is_always_seen(method, backend):
    policy = KVPolicy(method, backend=backend)
    policy.append(frames(F, 1), frames(F, 2))
    now = current()
    with torch.no_grad():
        for _ in range(2):
            before = policy.attend(now.queries, now.keys, now.values)
        for place in range(q):
            moved = now.values.clone()
            moved[:, place] += 1
            change = (policy.attend(now.queries, now.keys, moved) - before).abs().amax((2, 4))
            assert (change > 1e-4).all()  # every batch entry, query frame and head sees frame `place`


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 7), min_size=H, max_size=H), st.integers(1, 6), st.sampled_from([1, q]), st.integers(0, 99)
)
def test_grouped_is_masked_for_every_selection(budgets, held, choosers, seed):
    cache, now = filled(held), current()
    scores = torch.randn(B, choosers, H, held, generator=torch.Generator().manual_seed(seed))
    selection = top_frames(scores, budgets)
    assert selection.table().sum(3).tolist() == [[[min(b, held) for b in budgets]] * choosers] * B
    grouped, masked = (attend(name, now, cache, selection) for name in ("grouped", "masked"))
    assert torch.allclose(grouped, masked, atol=1e-5)
    with torch.no_grad():  # now the frames of a choice that the chunk shares are exchanged in place
        for _ in range(2):
            assert torch.allclose(attend("grouped", now, cache, selection), masked, atol=1e-5)
            assert torch.allclose(attend("masked", now, cache, selection), masked, atol=1e-5)
            assert torch.equal(cache.keys, filled(held).keys)
            assert torch.equal(cache.values, filled(held).values)


@pytest.mark.parametrize("budgets", [[3] * H, [0, 2, 2, 5]])
def test_a_choice_that_the_chunk_shares_is_read_where_it_lies(budgets):
    """No key or value of the history is copied in a forward, and none is held twice."""
    cache, now = filled(), current()
    selection = top_frames(torch.randn(B, 1, H, F, generator=torch.Generator().manual_seed(8)), budgets)
    with torch.no_grad():
        prepared = prepare("grouped", cache, selection, now)
        assert prepared.nbytes == 0
        addresses = [t.data_ptr() for t in cache._buffers()]
        keys, values = cache.end(3, q)
        for part, whole in zip((keys, values), cache._buffers(), strict=True):
            assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        for _ in range(3):
            attend("grouped", now, cache, selection, prepared)
        assert [t.data_ptr() for t in cache._buffers()] == addresses
        per_frame = top_frames(torch.randn(B, q, H, F), [3] * H)
        assert prepare("grouped", cache, per_frame, now).nbytes == 2 * B * H * q * (3 + q) * L * D * 4


def test_a_borrowed_cache_is_never_written_to():
    keys, values = frames(F, 1), frames(F, 2)
    before = keys.clone(), values.clone()
    cache, now = FrameCache(), current()
    cache.view(keys, values, range(F))
    selection = mixed(per_frame=False)
    with torch.no_grad():
        out = attend("grouped", now, cache, selection)
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])
    assert torch.allclose(out, by_hand(now, filled(), selection), atol=1e-5)


@settings(max_examples=25)
@given(st.data())
def test_exchanged_frames_stay_themselves(data):
    """Whatever is brought to the end, evicted and appended: every head finds every frame where it says it is."""
    cache = filled(held=6)
    known_keys, known_values = frames(6, 1), frames(6, 2)
    with torch.no_grad():
        for round_ in range(data.draw(st.integers(1, 5))):
            held = len(cache)
            b = data.draw(st.integers(1, held))
            generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
            heads = data.draw(st.sampled_from([None, torch.tensor([0, 2]), torch.tensor([3])]))
            n = H if heads is None else len(heads)
            chosen = torch.rand(B, n, held, generator=generator).argsort(2)[..., :b].sort(2).values
            cache.bring_to_end(chosen, heads)
            last = [t[:, :, held - b : held] for t in cache._buffers()]
            every = torch.arange(H) if heads is None else heads
            wanted = cache.frames_of(every, chosen[:, None])
            for part, want in zip(last, wanted, strict=True):
                found = part.index_select(1, every).sort(2).values
                assert torch.equal(found, want[:, 0].unflatten(2, (b, L)).sort(2).values)
            kept = sorted(data.draw(st.sets(st.integers(0, held - 1), min_size=1)))
            cache.keep(kept)
            new = frames(2, 50 + round_), frames(2, 60 + round_)
            cache.append(*new)
            known_keys, known_values = (
                torch.cat([old[:, kept], more], 1) for old, more in zip((known_keys, known_values), new, strict=True)
            )
            assert torch.equal(cache.keys, known_keys.permute(0, 3, 1, 2, 4))
            assert torch.equal(cache.values, known_values.permute(0, 3, 1, 2, 4))
            assert torch.allclose(cache.means, known_keys.mean(2).transpose(1, 2), atol=1e-6)


def test_the_block_mask_is_made_once_per_choice(monkeypatch):
    made: list[int] = []
    kernel, make_mask = kernels._compiled(False)

    def counted(*arguments, **named):
        made.append(1)
        return make_mask(*arguments, **named)

    monkeypatch.setattr(kernels, "_compiled", lambda _: (kernel, counted))
    policy = KVPolicy(FocusedForcing(budget=2, forget_after=None), backend="flex")
    for chunk in range(3):
        policy.append(frames(3, chunk), frames(3, chunk + 5))
    now = current()
    with torch.no_grad():
        for _ in range(4):
            policy.attend(now.queries, now.keys, now.values)
        assert len(made) == 1
        policy.append(frames(3, 8), frames(3, 9))
        for _ in range(2):
            policy.attend(now.queries, now.keys, now.values)
    assert len(made) == 2


def test_gradients_reach_queries_and_values_through_every_backend():
    now = current()
    grads = []
    for backend in ("grouped", "masked"):
        queries = now.queries.clone().requires_grad_()
        values = now.values.clone().requires_grad_()
        out = attend(backend, Current(queries, now.keys, values), filled(), mixed())
        out.square().sum().backward()
        grads.append((queries.grad, values.grad))
    assert torch.allclose(grads[0][0], grads[1][0], atol=1e-5)
    assert torch.allclose(grads[0][1], grads[1][1], atol=1e-4)


def test_a_selection_names_every_head_once():
    with pytest.raises(ConfigError, match="each head in one group"):
        Selection((frames_at([0], (0, 1, 1), B, torch.device("cpu")),), F)


def test_budgets_must_fit_the_heads():
    with pytest.raises(ConfigError, match="each of 4 heads"):
        top_frames(torch.zeros(1, 1, 4, 3), [1, 1])


def test_equal_scores_go_to_the_older_frame():
    assert top_frames(torch.zeros(1, 1, 1, 7), [3]).groups[0].frames.flatten().tolist() == [0, 1, 2]


def test_values_are_of_the_frames_that_the_keys_are_of():
    """One frame of values would be spread over three of keys."""
    now = current()
    for held in (0, F):
        policy = KVPolicy(FocusedForcing(budget=2, diversity_on="cached"))
        if held:
            policy.append(frames(held), frames(held, 1))
        for keys, values in ((now.keys, now.values[:, :1]), (now.keys[:, :1], now.values)):
            with pytest.raises(ConfigError, match="are not of the same frames"):
                policy.attend(now.queries, keys, values)


@pytest.mark.parametrize("choice", ["maximum", "frame"])
def test_a_chunk_may_bring_other_keys_and_frames_from_forward_to_forward(choice):
    """Of frames of one token a shape alone would not tell that there is another room to fill."""
    answers = []
    for backend in ("grouped", "masked"):
        policy = KVPolicy(FocusedForcing(budget=2, diversity_on="cached", choice=choice), backend=backend)
        policy.append(frames(F, L=1), frames(F, 1, L=1))
        with_more, now = current(extra=5, L=1), current(L=1)
        policy.attend(now.queries, now.keys, now.values, extra=with_more.extra)
        fewer = [tensor[:, :1] for tensor in (now.queries, now.keys, now.values)]
        answers.append([policy.attend(now.queries, now.keys, now.values), policy.attend(*fewer)])
    for one, other in zip(*answers, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
