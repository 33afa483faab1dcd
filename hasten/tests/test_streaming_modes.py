"""What must not change a choice or what is kept: rounding, autocast, dtypes, inference mode, copies, and who holds."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import ConfigError
from hasten.streaming import (
    DummyForcing,
    FocusedForcing,
    ForcingKV,
    FullHistory,
    HeadBudgets,
    KVPolicy,
    KVStream,
    SlidingWindow,
    TopKAttention,
)
from hasten.streaming.methods.forcing_kv import changed_patches
from hasten.streaming.scores import redundancy, relevance, standardised
from hasten.streaming.selection import MARGIN, top_frames

B, q, L, H, D = 1, 3, 8, 4, 16
METHODS = [
    FullHistory(),
    SlidingWindow(window=2),
    TopKAttention(k=2),
    FocusedForcing(budget=2),
    FocusedForcing(budget=HeadBudgets(((0, 1, 2, 3), (2, 2, 1, 9)))),
    FocusedForcing(budget=2, choice="frame", refresh_every=1),
    FocusedForcing(budget=2, choice="union"),
    FocusedForcing(budget=2, choice="mean", mix=1.0),
    DummyForcing(),
    ForcingKV(threshold=0.5, context=1, patches=4),
]
BY_NAME = [f"{type(m).__name__}-{getattr(m, 'choice', '')}-{i}" for i, m in enumerate(METHODS)]


def frames(seed, count=q, dtype=torch.float32, batch=B):
    return torch.randn(batch, count, L, H, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rolled(method, chunks=4, backend="grouped", dtype=torch.float32, attending=torch.no_grad, appending=torch.no_grad):
    """A stream of two layers after some chunks, and what its forwards returned."""
    stream, outs = KVStream(method, 2, backend=backend), []
    seeds = itertools.count()
    for _ in range(chunks):
        for mode in (attending, torch.no_grad):  # one chunk is forwarded in both modes
            for layer in stream:
                with mode():
                    given_ = [frames(next(seeds), dtype=dtype) for _ in range(3)]
                    outs.append(layer.attend(*given_))
        for layer in stream:
            with appending():
                layer.append(frames(next(seeds), dtype=dtype), frames(next(seeds), dtype=dtype))
    return stream, outs


# ---------------------------------------------------------------- equal scores


def test_of_two_frames_that_are_worth_the_same_the_older_is_chosen():
    """One is the more relevant, the other the more diverse: standardised, both are 1 and -1, and their mean is 0."""
    ties = 0
    for seed in range(60):
        policy = KVPolicy(FocusedForcing(budget=1, mix=0.5, keep_first=False))
        keys, queries = frames(seed, 2), frames(1000 + seed, 1)
        policy.append(keys, keys)
        fit = standardised(relevance(queries, policy.cache.means))[0, 0]
        differs = standardised(-redundancy(policy.cache.keys))[0]
        disagree = (fit[:, 0] * differs[:, 0] < 0) & (fit.abs().amin(1) > 0.999) & (differs.abs().amin(1) > 0.999)
        ties += int(disagree.sum())
        assert policy.select(queries, queries).table()[0, 0, disagree, 0].all()
    assert ties > 60


@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(1, 4))
def test_a_choice_does_not_depend_on_rounding(seed, held, size):
    """Scores of few values, which lie anywhere, with noise of the size of rounding on top."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(1, generator=generator) + 20 * MARGIN * torch.arange(4)
    scores = values[torch.randint(4, (1, q, H, held), generator=generator)]
    noise = (MARGIN / 8) * torch.rand(scores.shape, generator=generator)
    exact = [(-scores[0, i, h]).argsort(stable=True)[:size].sort().values for i in range(q) for h in range(H)]
    for noisy in (scores, scores + noise, scores - noise):
        found = top_frames(noisy, [size] * H).groups[0].frames[0].flatten(0, 1)
        assert torch.equal(found, torch.stack(exact))


def test_frames_that_are_infinitely_good_come_first_and_by_age():
    scores = torch.tensor([3.0, torch.inf, 5.0, torch.inf, -torch.inf]).expand(1, 1, 1, 5)
    for size, wanted in ((1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (4, [0, 1, 2, 3])):
        assert top_frames(scores, [size]).groups[0].frames.flatten().tolist() == wanted


@pytest.mark.parametrize("method", [FocusedForcing(budget=3, keep_first=False, mix=1.0), TopKAttention(k=3)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_frames_with_the_same_tokens_in_another_order_go_by_age(method, size):
    """Their mean keys are the same, but for the order in which they were summed."""
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        one = size * (1 + torch.randn(1, 1, 64, H, D, generator=generator))
        keys = torch.cat([one[:, :, torch.randperm(64, generator=generator)] for _ in range(7)], 1)
        policy = KVPolicy(method)
        policy.append(keys, keys)
        queries = 1 + torch.randn(1, 2, 64, H, D, generator=generator)
        table = policy.select(queries, queries).table()
        assert torch.equal(table, torch.tensor([True] * 3 + [False] * 4).expand_as(table))


def test_patches_that_changed_equally_go_by_place():
    """A picture that stands still: every patch is as it was, up to rounding."""
    still = torch.randn(1, 2, 1, 16, 8, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 5, 1, 1)
    for seed in range(5):
        keys = still * (1 + 1e-6 * torch.randn(still.shape, generator=torch.Generator().manual_seed(seed)))
        assert changed_patches(keys, patches=8, kept=3).tolist() == [[[0, 1, 2]] * 4]


def test_heads_of_equal_mass_are_split_by_their_order():
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        stream = KVStream(DummyForcing(dummy_share=0.5), 2)
        for layer in range(2):
            mass = 0.5 + 1e-7 * torch.rand(H, generator=generator)
            stream[layer].view.shared.setdefault("mass", {})[layer] = mass
            stream[layer].append(frames(1), frames(2))
        tables = [stream[layer].select(frames(3), frames(4)).table()[0, 0].sum(1) for layer in range(2)]
        assert [table.tolist() for table in tables] == [[1] * H, [3] * H]


# ---------------------------------------------------------------- autocast and dtypes


@pytest.mark.parametrize("method", METHODS, ids=BY_NAME)
@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(torch.float32, "grouped"), (torch.bfloat16, "grouped"), (torch.float32, "masked"), (torch.float32, "flex")],
)
def test_autocast_changes_the_attention_and_not_the_choice(method, dtype, backend):
    plain, exact = rolled(method, backend=backend, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        cast, outs = rolled(method, backend=backend, dtype=dtype)
        for one, other in zip(plain, cast, strict=True):
            with torch.no_grad():
                assert torch.equal(one.score(frames(7, dtype=dtype)), other.score(frames(7, dtype=dtype)))
    assert [p.cache.frames for p in plain] == [p.cache.frames for p in cast]
    assert plain.stats().pairs == cast.stats().pairs
    assert {out.dtype for out in outs} == {torch.bfloat16}
    assert all((a.float() - b.float()).abs().mean() < 0.02 for a, b in zip(exact, outs, strict=True))


@pytest.mark.parametrize("method", METHODS, ids=BY_NAME)
@pytest.mark.parametrize("backend", ["grouped", "masked"])
def test_float64_is_served(method, backend):
    single, double = (rolled(method, backend=backend, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert {out.dtype for out in double[1]} == {torch.float64}
    assert all(torch.allclose(a.double(), b, atol=1e-4) for a, b in zip(single[1], double[1], strict=True))
    assert [p.cache.frames for p in single[0]] == [p.cache.frames for p in double[0]]


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_dtypes_without_arithmetic_are_refused(name):
    wrong = frames(0).to(getattr(torch, name))
    for given_ in (lambda p: p.attend(wrong, wrong, wrong), lambda p: p.append(wrong, wrong)):
        with pytest.raises(ConfigError, match=name):
            given_(KVPolicy(FullHistory()))


# ---------------------------------------------------------------- inference mode

MODES = [torch.inference_mode, torch.no_grad, torch.enable_grad]


@pytest.mark.parametrize("method", METHODS, ids=BY_NAME)
@pytest.mark.parametrize("backend", ["grouped", "masked"])
def test_modes_may_change_between_forwards_and_appends(method, backend):
    _, wanted = rolled(method, backend=backend)
    for attending, appending in itertools.product(MODES, MODES):
        _, found = rolled(method, backend=backend, attending=attending, appending=appending)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize("method", METHODS, ids=BY_NAME)
def test_what_is_kept_of_an_inference_mode_is_no_inference_tensor(method):
    stream, _ = rolled(method, attending=torch.inference_mode, appending=torch.inference_mode)
    with torch.inference_mode():
        stream.attend(0, frames(1), frames(2), frames(3))
        stream[1].evict(range(2, len(stream[1].cache)))
    held = [tensor for layer in stream for tensor in vars(layer.cache).values() if isinstance(tensor, torch.Tensor)]
    assert held
    assert not any(tensor.is_inference() for tensor in held)


def test_gradients_flow_through_a_history_that_was_chosen_in_inference_mode():
    policy = KVPolicy(FocusedForcing(budget=2, choice="frame"))
    policy.append(frames(0, 6).requires_grad_(), frames(1, 6))
    given_ = [frames(seed) for seed in (2, 3, 4)]
    with torch.inference_mode():
        policy.attend(*given_)
    keys = given_[1].requires_grad_()
    policy.attend(given_[0], keys, given_[2]).sum().backward()
    assert keys.grad.abs().sum() > 0


def test_plain_keys_are_copied():
    """One head, or one frame of one token, may have the layout of the cache already."""
    policy = KVPolicy(FullHistory(), rotated=True)
    plain = torch.randn(1, 2, 4, 1, 8)
    before = plain.clone()
    policy.append(plain.clone(), plain.clone(), plain)
    plain.zero_()
    assert torch.equal(policy.cache.plain_keys(), before.permute(0, 3, 1, 2, 4))


# ---------------------------------------------------------------- what is held


def sizes(notes):
    """Entries and numbers of everything that a method noted."""
    if isinstance(notes, torch.Tensor):
        return notes.untyped_storage().nbytes()
    if isinstance(notes, dict):
        return sum(1 + sizes(value) for value in notes.values())
    if isinstance(notes, list | tuple | set):
        return sum(1 + sizes(value) for value in notes)
    return sizes(vars(notes)) if hasattr(notes, "__dict__") else 1


@pytest.mark.parametrize("method", METHODS, ids=BY_NAME)
def test_a_history_that_the_model_keeps_leaves_no_notes_behind(method):
    policy, found = KVPolicy(method, layers=2), []
    with torch.no_grad():
        for chunk in range(40):
            policy.look_at(frames(chunk, 12), frames(chunk, 12), range(chunk, chunk + 12))
            for step in range(2):
                policy.attend(frames(step), frames(step + 1), frames(step + 2))
            found.append(sizes([policy.view.notes, policy.view.memo, policy.view.shared]))
    assert found[-1] == found[5]


def test_choices_that_nobody_asks_for_do_not_pile_up():
    policy = KVPolicy(FocusedForcing(budget=2, refresh_every=1))
    with torch.no_grad():
        policy.append(frames(0, 9), frames(1, 9))
        found = []
        for step in range(40):
            policy.attend(frames(step), frames(step), frames(step))
            found.append(sizes(policy.view.notes))
    assert found[-1] == found[0]


@pytest.mark.parametrize("method", METHODS, ids=BY_NAME)
@pytest.mark.parametrize(
    ("backend", "way"),
    [
        ("grouped", "deepcopy"),
        ("grouped", "pickle"),
        ("grouped", "torch.save"),
        ("flex", "deepcopy"),
        ("flex", "pickle"),
    ],
)
def test_a_copy_goes_on_alike_and_on_its_own(method, backend, way):
    stream, _ = rolled(method, backend=backend)
    first = [frames(seed) for seed in (50, 51, 52)]
    with torch.no_grad():
        for layer in stream:
            layer.attend(*first)
    if way == "deepcopy":
        other = copy.deepcopy(stream)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(stream))
    else:
        file = io.BytesIO()
        torch.save(stream, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert other.stats() == stream.stats() or other.stats().packed_bytes == 0
    assert [peer() for peer in other[0].view.peers] == [layer.view for layer in other]
    with torch.no_grad():
        for chunk in range(3):
            outs = []
            for one in (stream, other):
                outs.append([layer.attend(*first) for layer in one])
                for layer in one:
                    layer.append(frames(60 + chunk), frames(70 + chunk))
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*outs, strict=True))
    assert [a.cache.frames for a in stream] == [b.cache.frames for b in other]
    other.reset()
    assert len(stream[0].cache) > 0


def test_a_layer_alone_may_be_copied():
    stream, _ = rolled(FocusedForcing(budget=2))
    alone = pickle.loads(pickle.dumps(stream[1]))
    with torch.no_grad():
        given_ = [frames(seed) for seed in (50, 51, 52)]
        assert torch.allclose(alone.attend(*given_), stream[1].attend(*given_), atol=1e-6)


# ---------------------------------------------------------------- misuse


@pytest.mark.parametrize("axis", [0, 2, 3, 4])
def test_queries_to_select_for_fit_the_history(axis):
    size = [B, q, L, H, D]
    size[axis] += 3
    stream, _ = rolled(FocusedForcing(budget=2))
    for given_ in ((torch.randn(size),) * 2, (frames(0), torch.randn(size)), (torch.randn(size), frames(0))):
        with pytest.raises(ConfigError):
            stream[0].select(*given_)
    with pytest.raises(ConfigError, match="not of the same frames"):
        stream[0].select(frames(0), frames(0, 2))


@pytest.mark.parametrize("place", [0, 1])
def test_further_tokens_on_another_device_are_refused(place):
    stream, _ = rolled(FocusedForcing(budget=2))
    extra = [torch.randn(B, 2, H, D), torch.randn(B, 2, H, D)]
    extra[place] = extra[place].to("meta")
    with pytest.raises(ConfigError, match=r"on cpu, got .* on meta"):
        stream.attend(0, frames(0), frames(1), frames(2), extra=tuple(extra))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda keys, numbers: keys[..., :4],
        lambda keys, numbers: keys[:, :, :1],
        lambda keys, numbers: keys.transpose(1, 2),
        lambda keys, numbers: None,
        lambda keys, numbers: keys.to("meta"),
    ],
)
@pytest.mark.parametrize("method", [FocusedForcing(budget=2), ForcingKV(context=1, patches=4, threshold=1.0)])
def test_keys_that_are_unrotated_wrongly_are_refused(wrong, method):
    policy = KVPolicy(method, unrotate=wrong)
    policy.append(frames(0, 9), frames(1, 9))
    with pytest.raises(ConfigError, match="expected unrotate to return keys of the shape"):
        policy.attend(frames(2), frames(3), frames(4))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_first_chunk_is_looked_at_as_well(place):
    for wrong in ("three", frames(0).double(), frames(0).to("meta"), frames(0)[..., :8], frames(0).to_sparse()):
        given_ = [frames(1), frames(2), frames(3)]
        given_[place] = wrong
        with pytest.raises(ConfigError):
            KVPolicy(FullHistory()).attend(*given_)
