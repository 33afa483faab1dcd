"""Low-rank differences: where they start, what merging keeps, what a file gives back, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hasten.errors import ConfigError, ModelError
from torch import Tensor, nn

from hasten_zoo.low_rank import (
    KIND,
    LowRankLinear,
    add_low_rank,
    learned,
    merge,
    read_low_rank,
    weights_digest,
    write_low_rank,
)

WIDTH, RANK = 24, 3
NAMES = {"blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2"}


class Net(nn.Module):
    """A table, a norm, blocks of which one layer has no bias, and an end that is too small for factors."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(7, WIDTH), nn.LayerNorm(WIDTH)
        wide = [nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH, bias=False)]
        self.blocks = nn.ModuleList(nn.Sequential(layer, nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)) for layer in wide)
        self.end = nn.Linear(WIDTH, 2)

    def forward(self, words: Tensor) -> Tensor:
        x = self.table(words)
        for block in self.blocks:
            x = x + block(self.norm(x))
        return self.end(x)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


WORDS = torch.arange(7)[None]


def _error(net: nn.Module) -> Tensor:
    return (net(WORDS) - torch.linspace(-1, 1, 14).view(1, 7, 2)).square().mean()


def _train(net: nn.Module, steps: int = 30) -> None:
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        _error(net).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_it_starts_as_its_base_bit_for_bit(net: Net) -> None:
    before = net(WORDS)
    add_low_rank(net, RANK)
    assert {name for name, module in net.named_modules() if isinstance(module, LowRankLinear)} == NAMES
    assert torch.equal(net(WORDS), before)


def test_matrices_stay_and_everything_else_learns(net: Net) -> None:
    base = copy.deepcopy(net.state_dict())
    add_low_rank(net, RANK)
    started = {name: value.clone() for name, value in net.state_dict().items()}
    untrained = _error(net).detach()
    _train(net)
    frozen = {f"{name}.weight" for name in NAMES}
    assert {name for name, value in net.state_dict().items() if torch.equal(value, started[name])} == frozen
    assert all(torch.equal(net.state_dict()[name], base[name]) for name in frozen)
    assert bool(_error(net) < 0.1 * untrained)


def test_merged_it_is_plain_and_gives_the_same(net: Net) -> None:
    names, classes = list(net.state_dict()), [type(module) for module in net.modules()]
    add_low_rank(net, RANK)
    _train(net)
    expected = net(WORDS)
    changes = {n: m.up.detach() @ m.down.detach() for n, m in net.named_modules() if isinstance(m, LowRankLinear)}
    before = {name: net.get_submodule(name).weight.clone() for name in changes}
    merge(net)
    assert list(net.state_dict()) == names
    assert [type(module) for module in net.modules()] == classes
    assert torch.equal(net(WORDS), expected)
    for name, change in changes.items():
        assert float(change.abs().max()) > 1e-3
        assert int(torch.linalg.matrix_rank(net.get_submodule(name).weight - before[name], rtol=1e-3)) == RANK


def test_a_file_gives_back_what_was_learned_to_half_precision(net: Net, tmp_path: Path) -> None:
    plain, base = copy.deepcopy(net), weights_digest(net)
    add_low_rank(net, RANK)
    _train(net)
    path = write_low_rank(tmp_path / "differences.safetensors", net, RANK, base)
    again = copy.deepcopy(plain)
    nn.init.normal_(again.table.weight)  # it learned as a whole: what is there before does not matter
    assert read_low_rank(path, again, base, "the net") == RANK
    for name, value in learned(net).items():
        assert torch.equal(learned(again)[name], value.half().float())
    merge(net)
    merge(again)
    assert (again(WORDS) - net(WORDS)).abs().max() < 1e-2 * (plain(WORDS) - net(WORDS)).abs().max()


def test_differences_from_other_weights_are_refused_by_name(net: Net, tmp_path: Path) -> None:
    base = weights_digest(net)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.blocks[0][0].weight[0, 0] += 1e-6
    assert weights_digest(copy.deepcopy(net)) == base != weights_digest(other)
    add_low_rank(net, RANK)
    path = write_low_rank(tmp_path / "differences.safetensors", net, RANK, base)
    with pytest.raises(ModelError, match=r"differences\.safetensors holds differences from other weights of the net"):
        read_low_rank(path, other, weights_digest(other), "the net")
    assert not [module for module in other.modules() if isinstance(module, LowRankLinear)]


def test_a_file_of_another_model_or_a_damaged_one_is_refused(net: Net, tmp_path: Path) -> None:
    other = copy.deepcopy(net)
    other.table = nn.Embedding(8, WIDTH)
    add_low_rank(net, RANK)
    path = write_low_rank(tmp_path / "differences.safetensors", net, RANK, "0" * 64)
    with pytest.raises(ModelError, match="its tensors are not those of differences from the net"):
        read_low_rank(path, other, "0" * 64, "the net")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match=f"no usable {KIND.name}"):
        read_low_rank(path, Net(), "0" * 64, "the net")


def test_a_rank_of_nothing_is_refused(net: Net) -> None:
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        add_low_rank(net, 0)
