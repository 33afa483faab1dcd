"""Wrong inputs of the public functions of streaming: one line that says what was wrong, and nothing else."""

import numpy as np
import pytest
import torch
from wrong import assert_refused

from hasten.errors import ConfigError
from hasten.streaming import (
    FocusedForcing,
    FrameCache,
    FullHistory,
    HeadBudgets,
    HeadGroup,
    KVPolicy,
    KVStream,
    Selection,
)

SHAPE = (1, 2, 4, 2, 8)
WRONG = {
    "text": "three",
    "a fraction": 1.5,
    "a negative": -1,
    "a set": {1, 2},
    "a slice": slice(1, 2),
    "an object": object(),
    "an array": np.ones(SHAPE),
    "a vector": torch.ones(3),
    "whole numbers": torch.ones(SHAPE, dtype=torch.long),
    "complex": torch.ones(SHAPE, dtype=torch.complex64),
    "sparse": torch.ones(SHAPE).to_sparse(),
}


def frames():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def begun(chunks=3):
    stream = KVStream(FocusedForcing(budget=2), layers=2)
    with torch.no_grad():
        for _ in range(chunks):
            for layer in stream:
                layer.attend(frames(), frames(), frames())
                layer.append(frames(), frames())
        for layer in stream:
            layer.attend(frames(), frames(), frames())
    return stream


def gated(gates):
    stream = begun()
    stream.gates = gates
    return stream.attend(0, frames(), frames(), frames())


CALLS = {
    "method": lambda x: KVStream(x, layers=2),
    "layers": lambda x: KVStream(FullHistory(), layers=x),
    "layer": lambda x: KVPolicy(FullHistory(), x),
    "backend": lambda x: KVStream(FullHistory(), layers=2, backend=x),
    "rotated": lambda x: KVStream(FullHistory(), layers=2, rotated=x),
    "timed": lambda x: KVStream(FullHistory(), layers=2, timed=x),
    "facts": lambda x: KVStream(FullHistory(), layers=2, facts=x),
    "item": lambda x: begun()[x],
    "queries": lambda x: begun().attend(0, x, frames(), frames()),
    "keys": lambda x: begun().attend(0, frames(), x, frames()),
    "values": lambda x: begun().attend(0, frames(), frames(), x),
    "extra": lambda x: begun().attend(0, frames(), frames(), frames(), extra=x),
    "extra keys": lambda x: begun().attend(0, frames(), frames(), frames(), extra=(x, x)),
    "first": lambda x: begun().attend(0, frames(), frames(), frames(), first=x),
    "append keys": lambda x: begun()[0].append(x, frames()),
    "append values": lambda x: begun()[0].append(frames(), x),
    "append plain": lambda x: begun()[0].append(frames(), frames(), x),
    "look at keys": lambda x: begun()[0].look_at(x, frames(), [0, 1]),
    "look at values": lambda x: begun()[0].look_at(frames(), x, [0, 1]),
    "look at frames": lambda x: begun()[0].look_at(frames(), frames(), x),
    "evict": lambda x: begun()[0].evict(x),
    "keep": lambda x: begun()[0].cache.keep(x),
    "score": lambda x: begun()[0].score(x),
    "select": lambda x: begun()[0].select(x, frames()),
    "gates": gated,
    "cache rotated": lambda x: FrameCache(rotated=x),
    "table": HeadBudgets,
    "budgets": lambda x: HeadBudgets.uniform(2, 2, x),
    "budget layers": lambda x: HeadBudgets.uniform(x, 2, 2),
    "importance": HeadBudgets.from_importance,
    "mean": lambda x: HeadBudgets.with_mean(torch.rand(2, 2), x),
    "budgets of": lambda x: HeadBudgets(((1, 2),)).of(x, 2),
    "budgets check": lambda x: HeadBudgets(((1, 2),)).check(x, {}),
    "budgets load": HeadBudgets.load,
    "groups": lambda x: Selection(x, 3),
    "held": lambda x: Selection((), x),
    "heads": lambda x: HeadGroup(x, torch.zeros(1, 1, 1, 1).long()),
    "frames": lambda x: HeadGroup((0,), x),
}
FITTING = {("mean", "a fraction")}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_none_of_what_is_expected_is_refused_in_one_line(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(CALLS[call], {name: wrong for name, wrong in WRONG.items() if (call, name) not in FITTING})


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("backend", ["grouped", "masked", "flex"])
def test_queries_keys_and_values_are_of_the_same_frames(part, backend):
    """Fewer queries than keys had the last frames of the chunk left out, silently."""
    stream = KVStream(FocusedForcing(budget=1), layers=1, backend=backend)
    with torch.no_grad():
        for _ in range(3):
            stream.attend(0, frames(), frames(), frames())
            stream[0].append(frames(), frames())
        given = [frames(), frames(), frames()]
        given[part] = given[part][:, :1]
        with pytest.raises(ConfigError, match="not of the same frames"):
            stream.attend(0, *given)


def test_a_history_to_look_at_is_of_the_same_frames():
    policy = KVPolicy(FullHistory())
    with pytest.raises(ConfigError, match="values of the keys' shape"):
        policy.look_at(frames(), frames()[:, :1], [0, 1])
    with pytest.raises(ConfigError, match="plain keys of the keys' shape"):
        policy.look_at(frames(), frames(), [0, 1], frames()[:, :1])


def test_gates_are_one_per_head_of_each_layer():
    for gates in (torch.ones(2, 1), torch.ones(2), torch.ones(1, 2)):
        with pytest.raises(ConfigError, match=r"expected gates \[2, 2\]"):
            gated(gates)


def test_a_cache_without_a_frame_says_so():
    for name in ("keys", "values", "stored", "means"):
        with pytest.raises(ConfigError, match="holds no frame yet"):
            getattr(FrameCache(), name)


def test_budgets_of_a_layer_before_the_first_are_refused():
    with pytest.raises(ConfigError, match="layer must be"):
        HeadBudgets(((1,), (2,))).of(-1, 1)
